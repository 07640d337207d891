"""The density log q(z | x) of a guide at any values of its latents, and expectations under it."""

from collections.abc import Callable
from copy import copy
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import latent_sites
from pyro_vae._utils.typing import Function
from pyro_vae.exact.model_density import (
    ModelDensity,
    Values,
    check_repeatable,
    check_site,
    few_rows,
    joint_log_density,
    log_prob_at,
)
from pyro_vae.exact.quadrature import Box, QuadratureError, integrate
from pyro_vae.model_guide import check_one_plate

__all__ = ["GuideDensity", "sample_sites", "sample_with_log_q"]


class GuideDensity:
    """A guide on the data of a model, ``p`` of a pair with a guide: log q(z | x) at any z, and expectations under it.

    Raises:
        ValueError: if the guide does not have the latents of the model, all in the data plate, unscaled and unmasked;
            if two runs give different densities.
    """

    def __init__(self, p: ModelDensity):
        self.p, self.guide = p, p.pair.guide
        self.sites = latent_sites(p.pair.guide_trace)
        p.pair.check_factors()
        if self.sites.keys() != p.latents.keys():
            must = f"draw the latents of the model, {sorted(p.latents)}"
            raise ValueError(f"`guide` must {must}, got {sorted(self.sites)}")
        p.pair.check_points()
        check_one_plate([("guide", name, site) for name, site in self.sites.items()], p.plate, p.num_data)
        for name, site in self.sites.items():
            check_site("guide", name, site)
            expected, shape = (tuple(of[name]["fn"].event_shape) for of in (p.latents, self.sites))
            if shape != expected:
                must = f"have the event shape of the model at site {name!r}, {expected}"
                raise ValueError(f"`guide` must {must}, got {shape}")
        p.pair.check_rows("guide")
        with torch.no_grad(), seeded(1):
            values = {name: site["value"][None] for name, site in self.sites.items()}
            check_repeatable("guide", self.sites, self.log_prob(values)[0])

    def of_rows(self, p: ModelDensity) -> "GuideDensity":
        """Return the density of the guide on a batch of rows, one of :meth:`ModelDensity.batches`."""
        part = copy(self)
        part.p = p
        return part

    def site(self) -> dict[str, Any]:
        """Return the site of the only latent."""
        return self.sites[self.p.single_site()[0]]

    def log_prob(self, values: Values) -> Tensor:
        """Compute log q(z | x) at values of every latent, ``(C, N)``."""
        return log_prob_at(self.guide, values, self.p.data)

    def factors(self) -> dict[str, Any] | None:
        """Return q of each latent if q(z | x) is their product, else ``None``: none is computed from another."""
        if len(self.sites) > 1 and self.p.pair.has_dependent_latents():
            return None
        return {name: site["fn"] for name, site in self.sites.items()}

    def integration_box(self) -> Box:
        """Return a box for each datum that contains q(z | x)."""
        return self.p.integration_box(self.site()["fn"])

    def sum(self, integrand: Callable[[Values], Tensor]) -> Tensor:
        """Compute an expectation as a sum over all states, ``(N,)``."""
        total = self.p.zeros()
        for values in self.p.states():
            total = total + _weighted_sum(self.log_prob(values).double(), integrand(values).double())
        return total

    def elbo(self, tolerance: float, reach: float = 1.0) -> Tensor:
        """Compute E_q[log p(x, z) - log q(z | x)] by quadrature, ``(N,)``, on a box of q that is wider by ``reach``."""
        expectation = _Expectation(self)
        log_mass, value, _ = integrate(expectation, self.integration_box(), tolerance, reach)
        mass = log_mass.exp()
        if value is None or ((mass - 1).abs() > 2 * tolerance + expectation.rounding).any():
            masses = f"{float(mass.min()):.6g} to {float(mass.max()):.6g}"
            raise QuadratureError(f"quadrature did not converge: the mass of q(z | x) on its nodes is {masses}")
        return value


class _Expectation:
    """log q(z | x), the density, and log p(x, z) - log q(z | x), at coordinates of the latent."""

    def __init__(self, q: GuideDensity):
        self.q, self.coordinates = q, q.p.coordinates()
        self.num_data, self.chunk = q.p.num_data, q.p.chunk
        self.rounding = 8 * torch.finfo(q.p.dtype).eps

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor]:
        values = {self.coordinates.name: self.coordinates.to_site(points)}
        with pyro.validation_enabled(False):
            log_q = self.q.log_prob(values)
            ratio = self.q.p.log_joint(values) - log_q
        shape = (len(points), self.num_data)
        return (log_q.double() + self.coordinates.log_jacobian(points)).expand(shape), ratio.expand(shape)

    def few_rows(self, count: int) -> "tuple[_Expectation, Tensor] | None":
        if (rows := few_rows(self.q.p, count)) is None:
            return None
        return _Expectation(self.q.of_rows(self.q.p.of_rows(rows))), rows


def sample_sites(guide: Function, data: tuple[Tensor, ...], count: int) -> dict[str, Any]:
    """Return the latent sites of a guide with one data plate, with ``count`` draws of every datum."""
    with poutine.block(), pyro.plate("num_draws", count, dim=-2):
        return latent_sites(poutine.trace(guide).get_trace(*data))


def sample_with_log_q(guide: Function, data: tuple[Tensor, ...], count: int) -> tuple[Values, Tensor]:
    """Draw values from a guide, ``(count, N, *event)`` by site, and compute their log q(z | x), ``(count, N)``."""
    sites = sample_sites(guide, data, count)
    return {name: site["value"] for name, site in sites.items()}, joint_log_density(sites)


def _weighted_sum(log_weight: Tensor, value: Tensor) -> Tensor:
    weight = log_weight.exp()
    return torch.where(weight > 0, weight * value, 0.0).sum(0)
