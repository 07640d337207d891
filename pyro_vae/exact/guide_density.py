"""The density log q(z | x) of a guide, at values of its latents."""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import guide_sites, latent_sites
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import function
from pyro_vae.distributions.properties import base_distribution, is_masked
from pyro_vae.exact.densities import ModelDensity, Values, _check_frames, log_joint
from pyro_vae.exact.quadrature import MAX_NODES, SHARED_NODES, Box, QuadratureError, QuadratureRule, refine_to_tolerance

__all__ = ["GuideDensity"]


class GuideDensity:
    """A guide on the data of a problem: log q(z | x) at any z, and expectations under it."""

    def __init__(self, problem: ModelDensity, guide: Function):
        self.problem = problem
        self.guide = function(guide, "guide")
        with poutine.block(), seeded(0):
            self.sites = guide_sites(poutine.trace(guide).get_trace(*problem.data))
        if self.sites.keys() != problem.latents.keys():
            raise ValueError(
                f"guide: its latents {sorted(self.sites)} are not those of the model, {sorted(problem.latents)}"
            )
        for name, site in self.sites.items():
            _check_frames("guide", name, site, problem.plate, problem.num_data)
            if torch.as_tensor(site["scale"]).ne(1).any():
                raise ValueError(
                    f"guide: site {name!r} is subsampled or scaled (scale {site['scale']}); exact answers need all "
                    "data, and densities as they are"
                )
            if site["mask"] is not None or is_masked(site["fn"]):
                raise ValueError(f"guide: its latent {name!r} is masked, and its q(z | x) is then no distribution")
            if site["fn"].event_shape != problem.latents[name]["fn"].event_shape:
                raise ValueError(
                    f"guide: site {name!r} has event shape {tuple(site['fn'].event_shape)}, and the model "
                    f"{tuple(problem.latents[name]['fn'].event_shape)}"
                )

        self._check_repeatable()

    def _check_repeatable(self) -> None:
        """Run the guide twice at the same latents: dropout, say, makes no one q(z | x)."""
        values = {name: site["value"][None] for name, site in self.sites.items()}
        with torch.no_grad(), seeded(0):
            first, second = self.log_prob(values), self.log_prob(values)
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-3):
            raise ValueError(
                "guide: gives another log q(z | x) at the same z when it is run again. Put dropout and batch "
                "normalisation into evaluation mode: `vae.eval()`"
            )

    def site(self) -> dict[str, Any]:
        """The only latent's site."""
        return self.sites[self.problem.single_site()[0]]

    def log_prob(self, values: Values) -> Tensor:
        """log q(z | x) at values ``(C, 1 or N, *event)``, as ``(C, N)``."""
        return log_joint(self.guide, values, self.problem.data)

    def check_densities(self) -> None:
        """Refuse a point of a continuous latent: it has no density to weight a draw by, and log p(x, z) is no bound."""
        for name, site in self.sites.items():
            continuous = not self.problem.latents[name]["fn"].support.is_discrete
            if continuous and isinstance(base_distribution(site["fn"]), dist.Delta):
                raise ValueError(
                    f"guide: its latent {name!r} is a point (Delta, as in AutoDelta), without a density to weight "
                    "draws by"
                )

    def factors(self) -> dict[str, Any] | None:
        """q of each latent site where none hangs on another, so that q(z | x) is their product; else ``None``.

        Tried by drawing the others anew a few times.
        """
        if len(self.sites) > 1:
            for seed in range(1, 5):
                with poutine.block(), seeded(seed):
                    others = latent_sites(poutine.trace(self.guide).get_trace(*self.problem.data))
                for name, site in self.sites.items():
                    same = others[name]["fn"].log_prob(site["value"])
                    if not torch.allclose(site["fn"].log_prob(site["value"]), same, rtol=1e-4, atol=1e-4):
                        return None
        return {name: site["fn"] for name, site in self.sites.items()}

    def integration_box(self) -> Box:
        """A box for each datum that holds q(z | x)."""
        return self.problem.chart().integration_box(self.site()["fn"], self.problem.num_data)

    def sum(self, integrand: Callable[[Values], Tensor]) -> Tensor:
        """The expectation over all states, ``(N,)``."""
        total = self.problem.zeros()
        for values in self.problem.states():
            total = total + _weighted_sum(self.log_prob(values).double(), integrand(values).double())
        return total

    def integral(self, integrand: Callable[[Values], Tensor], around: Box, tolerance: float) -> Tensor:
        """The expectation, ``(N,)``, by quadrature.

        One box around all data and ``around`` is tried first, since a decoder then runs once for all of them; then
        boxes around each q(z | x).
        """
        own = self.integration_box()
        try:
            return self._integral(integrand, own.join(around).union(), tolerance, SHARED_NODES)
        except QuadratureError:
            return self._integral(integrand, own, tolerance, MAX_NODES)

    def _integral(
        self, integrand: Callable[[Values], Tensor], box: Box, tolerance: float, max_nodes: dict[int, int]
    ) -> Tensor:
        chart = self.problem.chart()
        mass = self.problem.zeros()

        def estimate(panels: int) -> Tensor:
            total = mass.zero_().clone()
            for nodes, log_weights, _ in QuadratureRule(box, panels).chunks(self.problem.chunk):
                values = {chart.name: chart.to_site(nodes)}
                log_mass = self.log_prob(values).double() + log_weights + chart.log_jacobian(nodes)
                total += _weighted_sum(log_mass, integrand(values).double())
                mass.add_(log_mass.exp().sum(0))
            return torch.where((mass - 1).abs() <= tolerance, total, torch.nan)  # nan agrees with nothing

        rounding = 8 * torch.finfo(self.problem.dtype).eps
        try:
            return refine_to_tolerance(estimate, chart.dims, tolerance, max_nodes[chart.dims], rounding)[0]
        except QuadratureError as error:
            found = f"; the mass of q(z | x) that it finds is {float(mass.min()):.6g} to {float(mass.max()):.6g}"
            raise QuadratureError(f"{error}{found}") from error


def _weighted_sum(log_weight: Tensor, value: Tensor) -> Tensor:
    weight = log_weight.exp()
    return torch.where(weight > 0, weight * value, 0.0).sum(0)
