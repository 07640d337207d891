"""The joint density log p(x, z) of a Pyro model, and the density log q(z | x) of a guide, at any z.

What :mod:`pyro_vae.exact` sums and integrates: a model or guide of one data plate is run with its latents conditioned
on many values at once, one more dimension on the left.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from scipy.stats import t as student_t
from torch import Tensor

from pyro_vae.checks import data_tensors, function
from pyro_vae.decomposition import log_density
from pyro_vae.distributions import (
    AdditiveLogRatioTransform,
    LogitRelaxedBernoulli,
    LogRelaxedOneHotCategorical,
    base_distribution,
    base_support,
    is_normalized,
    log_simplex,
)
from pyro_vae.flows import Flow
from pyro_vae.handlers import guide_sites, latent_sites, observed_sites
from pyro_vae.missing import check_model
from pyro_vae.quadrature import MAX_NODES, SHARED_NODES, Box, QuadratureError, Rule, refined
from pyro_vae.randomness import seeded

__all__ = ["MAX_STATES", "Chart", "Guide", "Problem", "draw", "drawn", "log_joint"]

MAX_STATES = 2**16
"""The most states of discrete latents that are summed over."""

_BUDGET = 2**20  # numbers in the largest tensor of one chunk: larger ones only cost page faults

Function = Callable[..., Any]
Values = dict[str, Tensor]


class Problem:
    """A model on its data, with its latents open: log p(x, z) at any z."""

    def __init__(self, model: Function, data: tuple[Tensor, ...], plate: str):
        self.model = function(model, "model")
        self.data = data_tensors(data, "data")
        self.plate = plate
        with poutine.block(), seeded(0), pyro.validation_enabled():
            check_model(model, self.data, "data")
            trace = poutine.trace(model).get_trace(*data)
            trace.compute_log_prob()
        self.latents = latent_sites(trace)
        self.observed = observed_sites(trace)
        self.num_data = _check_structure(self.latents, self.observed, plate)
        self.dtype = log_density(next(iter(self.observed.values()))).dtype
        widths = [site["fn"].event_shape.numel() for site in (self.latents | self.observed).values()]
        self.chunk = max(1, _BUDGET // (self.num_data * max(64, *widths)))
        self._check_repeatable()

    def _check_repeatable(self) -> None:
        """Run the model twice at the same latents, alone and beside others: dropout, say, makes no one p(x, z)."""
        drawn = {name: site["value"][None] for name, site in self.latents.items()}
        beside = {name: torch.cat([value, value.roll(1, 1)]) for name, value in drawn.items()}
        with torch.no_grad(), seeded(0):
            first, second = self.log_joint(drawn)[0], self.log_joint(beside)[0]
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-3):
            raise ValueError(
                "model: gives another log p(x, z) at the same z when it is run again, beside other values. Put "
                "dropout and batch normalisation into evaluation mode: `vae.eval()`"
            )

    @property
    def is_discrete(self) -> bool:
        """Whether every latent can be enumerated."""
        return all(site["fn"].has_enumerate_support for site in self.latents.values())

    def single_site(self) -> tuple[str, dict[str, Any]]:
        """Name and site of the only latent."""
        if len(self.latents) != 1:
            raise ValueError(
                f"model: has the latent sites {list(self.latents)}; accepted are several discrete ones, of at most "
                f"{MAX_STATES} states together, or a single continuous one; a posterior is given of a single site"
            )
        return next(iter(self.latents.items()))

    def chart(self) -> "Chart":
        """Coordinates of the only latent, a continuous one."""
        name, site = self.single_site()
        return Chart(name, site["fn"], self.dtype)

    def zeros(self) -> Tensor:
        """``(N,)`` in float64, where the data are."""
        return torch.zeros(self.num_data, dtype=torch.float64, device=self.data[0].device)

    def log_joint(self, values: Values) -> Tensor:
        """log p(x, z) at values ``(C, 1 or N, *event)`` of every latent, as ``(C, N)``."""
        return log_joint(self.model, values, self.data)

    def sites(self, values: Values) -> dict[str, Any]:
        """The sites of the model, latent and observed, at values of every latent as :meth:`log_joint` takes them."""
        return _sites(self.model, values, self.data)

    @property
    def num_states(self) -> int:
        """How many joint states the discrete latents have."""
        return math.prod(map(len, self._supports()))

    def _supports(self) -> list[Tensor]:
        return [
            site["fn"].enumerate_support(expand=False).reshape(-1, 1, *site["fn"].event_shape)
            for site in self.latents.values()
        ]

    def states(self) -> Iterator[Values]:
        """Chunks of the joint states of all latents, as values ``(C, 1, *event)``."""
        supports, count = self._supports(), self.num_states
        if count > MAX_STATES:
            raise ValueError(
                f"model: its discrete latents {list(self.latents)} have {count} states; at most {MAX_STATES} are "
                "summed over exactly"
            )
        for first in range(0, count, self.chunk):
            flat = torch.arange(first, min(first + self.chunk, count), device=supports[0].device)
            values = {}
            for name, support in zip(self.latents, supports, strict=True):
                values[name] = support[flat % len(support)]
                flat = flat // len(support)
            yield values


def _check_structure(latents: dict[str, Any], observed: dict[str, Any], plate: str) -> int:
    if not latents or not observed:
        raise ValueError(f"model: needs latent and observed sites; has {list(latents)} and {list(observed)}")
    for name, site in (latents | observed).items():
        _check_frames("model", name, site, plate)
        if torch.as_tensor(site["scale"]).ne(1).any():
            raise ValueError(
                f"model: site {name!r} is subsampled or scaled (scale {site['scale']}); exact answers need all "
                "data, and densities as they are"
            )
    masked = [name for name, site in latents.items() if site["mask"] is not None or _is_masked(site["fn"])]
    if masked:
        raise ValueError(f"model: its latents {masked} are masked, and their prior is then no distribution")
    unnormalised = [name for name, site in observed.items() if not is_normalized(site["fn"])]
    if unnormalised:
        raise ValueError(
            f"model: the likelihood of {unnormalised} is not normalised (soft targets, or pyro.factor), so there is no "
            "p(x). Use likelihoods.ContinuousBernoulli for grey data, or likelihoods.Bernoulli on binarized data"
        )
    return next(iter(observed.values()))["cond_indep_stack"][0].size


def _check_frames(who: str, name: str, site: dict[str, Any], plate: str, size: int | None = None) -> None:
    frames = site["cond_indep_stack"]
    if [frame.name for frame in frames] != [plate] or frames[0].dim != -1:
        raise ValueError(
            f"{who}: site {name!r} is in the plates {[frame.name for frame in frames]}; exact answers need every "
            f"site in one plate, {plate!r}, as the rightmost batch dimension"
        )
    if size is not None and frames[0].size != size:
        raise ValueError(f"{who}: site {name!r} has {frames[0].size} rows, and the model has {size}")


def _is_masked(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            return True
        fn = fn.base_dist
    return False


def _sites(function: Function, values: Values, data: tuple[Tensor, ...]) -> dict[str, Any]:
    with poutine.block():
        trace = poutine.trace(poutine.condition(function, data=values)).get_trace(*data)
    return observed_sites(trace)


def log_joint(function: Function, values: Values, data: tuple[Tensor, ...]) -> Tensor:
    """The log-density of a model or guide, ``(C, N)``, at values ``(C, 1 or N, *event)`` of every latent."""
    return sum((log_density(site) for site in _sites(function, values, data).values()), torch.zeros(()))


def draw(guide: Function, data: tuple[Tensor, ...], count: int) -> dict[str, Any]:
    """The latent sites of a guide of one data plate, each with ``count`` draws of every datum."""
    with poutine.block(), pyro.plate("num_draws", count, dim=-2):
        return latent_sites(poutine.trace(guide).get_trace(*data))


def drawn(guide: Function, data: tuple[Tensor, ...], count: int) -> tuple[Values, Tensor]:
    """The values of :func:`draw`, ``(count, N, *event)`` by site, and their log q(z | x), ``(count, N)``."""
    sites = draw(guide, data, count)
    log_q = sum((log_density(site) for site in sites.values()), torch.zeros(()))
    return {name: site["value"] for name, site in sites.items()}, log_q


class Guide:
    """A guide on the data of a problem: log q(z | x) at any z, and expectations under it."""

    def __init__(self, problem: Problem, guide: Function):
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
            if site["mask"] is not None or _is_masked(site["fn"]):
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

    def reach(self) -> Box:
        """A box for each datum that holds q(z | x)."""
        return self.problem.chart().reach(self.site()["fn"], self.problem.num_data)

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
        own = self.reach()
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
            for nodes, log_weights, _ in Rule(box, panels).chunks(self.problem.chunk):
                values = {chart.name: chart.to_site(nodes)}
                log_mass = self.log_prob(values).double() + log_weights
                total += _weighted_sum(log_mass, integrand(values).double())
                mass.add_(log_mass.exp().sum(0))
            return torch.where((mass - 1).abs() <= tolerance, total, torch.nan)  # nan agrees with nothing

        rounding = 8 * torch.finfo(self.problem.dtype).eps
        try:
            return refined(estimate, chart.dims, tolerance, max_nodes[chart.dims], rounding)[0]
        except QuadratureError as error:
            found = f"; the mass of q(z | x) that it finds is {float(mass.min()):.6g} to {float(mass.max()):.6g}"
            raise QuadratureError(f"{error}{found}") from error


def _weighted_sum(log_weight: Tensor, value: Tensor) -> Tensor:
    weight = log_weight.exp()
    return torch.where(weight > 0, weight * value, 0.0).sum(0)


class Chart:
    """Coordinates ``(*, d)``, with d at most 2, of a continuous latent site."""

    def __init__(self, name: str, fn: dist.TorchDistribution, dtype: torch.dtype):
        self.name = name
        self.dtype = dtype
        self.event_shape = fn.event_shape
        self.on_simplex = isinstance(base_distribution(fn), LogRelaxedOneHotCategorical)
        if base_support(fn) not in (constraints.real, log_simplex):
            kind = type(base_distribution(fn)).__name__
            raise ValueError(
                f"model: its latent {name!r} is a {kind} on {fn.support}; quadrature is "
                "over the reals or the log-simplex. Write the latent on the real line and transform it after the site"
            )
        *variables, last = self.event_shape if self.event_shape else (1,)
        self.coordinate_shape = (*variables, last - 1) if self.on_simplex else tuple(self.event_shape)
        self.dims = math.prod(self.coordinate_shape)
        if self.dims > 2:
            raise ValueError(
                f"model: its latent {name!r} has {self.dims} dimensions, and quadrature goes up to 2. Discrete "
                "latents are enumerated; of a linear Gaussian model, log p(x) and p(z | x) have a closed form"
            )

    def to_site(self, points: Tensor) -> Tensor:
        """Values of the site at coordinates ``(*, d)``."""
        shaped = points.reshape(*points.shape[:-1], *self.coordinate_shape)
        return (AdditiveLogRatioTransform()(shaped) if self.on_simplex else shaped).to(self.dtype)

    def to_points(self, value: Tensor) -> Tensor:
        """Coordinates ``(*, d)`` of values of the site ``(*, *event)``."""
        points = AdditiveLogRatioTransform().inv(value) if self.on_simplex else value
        return points.reshape(*value.shape[: value.dim() - len(self.event_shape)], self.dims)

    def reach(self, fn: dist.TorchDistribution, num_data: int) -> Box:
        """A box for each datum that holds all but e^-36 of a distribution, broken where a relaxed one is read hard.

        Of a Student-t it holds all but 1e-7.
        """
        base = base_distribution(fn)
        if isinstance(base, LogRelaxedOneHotCategorical):
            temperature = base.temperature[..., None]
            loc, spread = (base.logits[..., :-1] - base.logits[..., -1:]) / temperature, 36 / temperature
            middle = torch.zeros_like(loc)
        elif isinstance(base, LogitRelaxedBernoulli):
            loc, spread = base.logits / base.temperature, 36 / base.temperature
            middle = torch.zeros_like(loc)
        elif isinstance(base, dist.Laplace):
            loc, spread, middle = base.loc, 36 * base.scale, base.loc
        elif isinstance(base, dist.StudentT):
            tails = student_t.isf(5e-8, base.df.double().cpu().numpy())  # all but 1e-7 of the mass
            loc, spread, middle = base.loc, torch.as_tensor(tails).to(base.scale) * base.scale, base.loc
        elif isinstance(base, Flow):
            low, middle, high = base.extent()
            loc, spread = (low + high) / 2, (high - low) / 2
        else:
            try:
                loc, spread = fn.mean, 9 * fn.variance.sqrt()
            except NotImplementedError as error:
                raise ValueError(
                    f"model: site {self.name!r} has a {type(base).__name__}, whose mean and variance are not known, so "
                    "that quadrature does not know where to look"
                ) from error
            middle = loc
            if not (loc.isfinite() & spread.isfinite()).all():
                raise ValueError(
                    f"model: site {self.name!r} has a {type(base).__name__} without a finite mean and variance, so "
                    "that quadrature does not know where to look"
                )
        shape = (num_data, self.dims)
        loc, spread, middle = (
            tensor.expand(num_data, *self.coordinate_shape).reshape(shape).double()
            for tensor in (loc, spread.expand_as(loc), middle)
        )
        low, high = loc - spread, loc + spread
        return Box(low, middle.clamp(low, high), high).shared()
