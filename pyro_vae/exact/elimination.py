r"""Sums over discrete latents by variable elimination: :math:`\log \sum_z p(x, z)` without a loop over joint states.

The density of a model is a product of factors, one for each site, and each factor depends on few latents. Summing out
one latent after another costs the size of the largest factor on the way, its *width*, and not the number of joint
states: a chain of T steps costs T.

Source: Koller & Friedman 2009, "Probabilistic Graphical Models", chapter 9; with plates, Obermeyer et al. 2019, "Tensor
Variable Elimination for Plated Factor Graphs", algorithm 1.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae._utils.traces import latent_sites, log_density, observed_sites, set_plate_sizes
from pyro_vae._utils.typing import Function
from pyro_vae.distributions.properties import is_masked

__all__ = ["Factor", "FactorGraph", "Step", "enumerated", "log_marginal", "read_factors"]


def log_marginal(trace: Trace, plates: Iterable[CondIndepStackFrame]) -> Tensor:
    """Sum the enumerated latents out of the density of a model, exactly.

    Args:
        trace: of a run of :func:`enumerated`, with all other latents at values of their own.
        plates: those in which log p(x) has values of its own, ``ModelGuide.units``.

    Returns:
        The log-density of the other latents and the data, not scaled, summed to the plates, ``(*sizes)``, in float64.

    Raises:
        ValueError: if a sum needs too many states, or a site depends on a latent of another plate.

    >>> import pyro
    >>> from pyro import poutine
    >>> def mixture(x):
    ...     with pyro.plate("data", len(x)) as rows:
    ...         z = pyro.sample("z", dist.Categorical(torch.tensor([0.25, 0.75])))
    ...         pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[z], 1.0), obs=x)
    >>> trace = poutine.trace(enumerated(mixture, {"z"}, -2)).get_trace(torch.zeros(3))
    >>> log_marginal(trace, trace.nodes["x"]["cond_indep_stack"])
    tensor([-1.4189, -1.4189, -1.4189], dtype=torch.float64)
    """
    frames = list(plates)
    graph = FactorGraph(read_factors(trace), [frame.name for frame in frames])
    return graph.log_sum()


def enumerated(model: Function, names: Iterable[str], first_available_dim: int) -> Function:
    """Return a model whose latents of these names have all of their states at once, each in a dimension of its own.

    Other latents are drawn, whatever their marks. Of the user's marks for these latents ``expand`` is kept;
    ``"sequential"`` and ``num_samples`` are not, since neither changes the exact sum.

    Args:
        model: a Pyro model.
        names: latents with ``enumerate_support``.
        first_available_dim: the first dimension, from the right, to the left of all plates.
    """
    return _Enumeration(first_available_dim)(_EnumerationMarks(frozenset(names))(model))


class _Enumeration(EnumMessenger):
    """Pyro's enumeration, also inside of ``torch.vmap``, where ``value.data`` cannot be read."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], TorchDistributionMixin) and isinstance(msg["value"], Tensor):
            shape = msg["value"].shape[: msg["value"].dim() - msg["fn"].event_dim]
            ids = msg["infer"].setdefault("_dim_to_id", {})
            ids.update(self._param_dims.get(msg["name"], {}))
            self._value_dims[msg["name"]] = {
                dim: id_ for dim, id_ in ids.items() if len(shape) >= -dim and shape[dim] > 1
            }


class _EnumerationMarks(Messenger):
    """Mark the latents of these names for parallel enumeration, and no others."""

    def __init__(self, names: frozenset[str]):
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        marks = ("enumerate", "num_samples", "tmc")
        infer = {key: value for key, value in msg["infer"].items() if key not in marks}
        msg["infer"] = {**infer, "enumerate": "parallel"} if msg["name"] in self.names else infer


class Factor(NamedTuple):
    """A log-density of a site by the states of the latents that it depends on.

    Args:
        log: a dimension for each of ``dims``.
        dims: names of latents and plates.
        plates: the names of all plates of the site; its log-density need not have a dimension for each.
        latents: the latents among ``dims``.
    """

    log: Tensor
    dims: tuple[str, ...]
    plates: frozenset[str]
    latents: frozenset[str]


class Step(NamedTuple):
    """A latent that is summed out.

    Args:
        latent: its name.
        log: the product of all factors with it.
        dims: the latent, other latents that it depends on, which are summed out later, and plates.
    """

    latent: str
    log: Tensor
    dims: tuple[str, ...]


class Factors(NamedTuple):
    """The factors of a model, the plates of each latent that is to be summed out, and sizes of latents and plates."""

    factors: list[Factor]
    plates: dict[str, frozenset[str]]
    sizes: dict[str, int]


def read_factors(trace: Trace) -> Factors:
    """Read the factors from the trace of an :func:`enumerated` model, in float64.

    Masks of latents that are summed out do not count: a masked latent of a padded step sums to one, as in
    ``TraceEnum_ELBO``.
    """
    set_plate_sizes(trace)
    latents = latent_sites(trace)
    sites = latents | observed_sites(trace)
    dims = {name: site["infer"].get("_enumerate_dim") for name, site in latents.items()}
    summed = {name: dim for name, dim in dims.items() if dim is not None}
    names = {latents[name]["infer"]["_dim_to_id"][dim]: name for name, dim in summed.items()}
    plates = {name: _plates(latents[name]) for name in summed}
    sizes = {frame.name: frame.size for site in sites.values() for frame in site["cond_indep_stack"]}
    for name, dim in summed.items():
        shape, event_dim = latents[name]["value"].shape, latents[name]["fn"].event_dim
        sizes[name] = shape[dim - event_dim]
    factors = []
    for name, site in sites.items():
        log = _unmasked(site["fn"]).log_prob(site["value"]) if name in summed else log_density(site)
        factor = _named(name, log.double(), site, names)
        for latent in factor.latents:
            check_inside(name, factor.plates, latent, plates[latent])
        factors.append(factor)
    return Factors(factors, plates, sizes)


def check_inside(name: str, inside: frozenset[str], latent: str, plates: frozenset[str]) -> None:
    """Raise if a site depends on a latent of a plate that it does not lie in."""
    if not plates <= inside:
        raise ValueError(
            f"`model` must use the latent {latent!r} inside of its plates {sorted(plates)} alone, got the site "
            f"{name!r} outside of {sorted(plates - inside)}, which depends on it: the cells of the plate are then not "
            "independent, and their joint states too many to be summed over"
        )


def _named(name: str, log: Tensor, site: dict[str, Any], latents: dict[int, str]) -> Factor:
    """Name the dimensions of a log-density."""
    plates = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
    ids = site["infer"].get("_dim_to_id", {})
    dims = []
    for dim in (dim for dim in range(-log.dim(), 0) if log.shape[dim] > 1):
        found = plates.get(dim) or latents.get(ids.get(dim, -1))
        if found is None:
            raise ValueError(
                f"`model` must have densities with a dimension for each plate around a site alone, got the shape "
                f"{tuple(log.shape)} at site {name!r} in the plates {sorted(plates.values())}"
            )
        dims.append(found)
    log = log.reshape([size for size in log.shape if size > 1])
    return Factor(log, tuple(dims), frozenset(plates.values()), frozenset(dims) - frozenset(plates.values()))


def _plates(site: dict[str, Any]) -> frozenset[str]:
    return frozenset(frame.name for frame in site["cond_indep_stack"] if frame.vectorized)


def _unmasked(fn: Any) -> Any:
    """A distribution without masks among its wrappers."""
    if isinstance(fn, dist.MaskedDistribution):
        return _unmasked(fn.base_dist)
    return _unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims) if is_masked(fn) else fn


Reduction = Callable[[Tensor, int], Tensor]
"""From log-densities and a dimension to those without it: a sum of densities, or their maximum."""


class FactorGraph:
    """Factors of which latents are summed out, and an order of doing it.

    Latents of inner plates go first. Then the factors of the cells of a plate are multiplied. Among latents of the same
    plates the next one is that whose sum leaves the smallest factor.

    Args:
        factors: of a model.
        kept: the names of the plates that stay, from left to right.

    Attributes:
        width: the largest number of joint states that one sum needs in a cell of its plates.

    Raises:
        ValueError: if latents of crossed plates depend on each other, so that no order is feasible.
    """

    def __init__(self, factors: Factors, kept: Sequence[str]):
        self.factors, self.plates, self.sizes = factors
        self.kept = list(kept)
        self.width = 1
        self.largest: tuple[str, ...] = ()  # the latents of the largest sum
        self._live = {index: (factor.latents, factor.plates) for index, factor in enumerate(self.factors)}
        self._order: list[tuple[str | None, tuple[int, ...], frozenset[str]]] = []
        left = set(self.plates)
        while levels := {self.plates[name] for name in left} | {plates for _, plates in self._live.values()}:
            level = max(levels, key=lambda plates: (len(plates), sorted(plates)))
            self._sum_out([name for name in self.plates if name in left and self.plates[name] == level], level)
            left -= {name for name in left if self.plates[name] == level}
            if level <= frozenset(kept):
                break
            self._multiply(level)

    def _sum_out(self, names: list[str], level: frozenset[str]) -> None:
        """Order the latents of a level."""
        having: dict[str, set[int]] = {name: set() for name in self.plates}
        for index, (latents, _) in self._live.items():
            for name in latents:
                having[name].add(index)
        place = {name: number for number, name in enumerate(names)}

        def scope(name: str) -> frozenset[str]:
            return frozenset({name}).union(*(self._live[index][0] for index in having[name]))

        def cost(name: str) -> tuple[int, int, str]:
            return self._states(scope(name) - {name}), place[name], name

        queue = [cost(name) for name in names]
        heapq.heapify(queue)
        left = set(names)
        while left:
            known, _, name = heapq.heappop(queue)
            if name not in left:
                continue
            if known != (now := cost(name))[0]:
                heapq.heappush(queue, now)
                continue
            left.discard(name)
            joint, used = scope(name), tuple(sorted(having[name]))
            if self._states(joint) > self.width:
                self.width, self.largest = self._states(joint), tuple(sorted(joint))
            self._add((name, used, level), joint - {name}, level)
            for index in used:
                for other in self._live.pop(index)[0]:
                    having[other].discard(index)
            for other in joint - {name}:
                having[other].add(max(self._live))
                if other in left:
                    heapq.heappush(queue, cost(other))

    def _multiply(self, level: frozenset[str]) -> None:
        """Multiply the factors of a level over the plates of which no latent of theirs has a value of its own."""
        for index in [index for index, (_, plates) in self._live.items() if plates == level]:
            latents, _ = self._live.pop(index)
            outer = frozenset(self.kept).union(*(self.plates[name] for name in latents))
            if outer == level:
                raise ValueError(
                    f"`model` must have discrete latents that do not depend on each other across plates, got a site in "
                    f"the plates {sorted(level)} that depends on {sorted(latents)}: the sum over their states grows "
                    "exponentially with the size of a plate. Give one of them a distribution in the guide, or use a "
                    "sequential plate, `for i in pyro.plate(...)`, if it is small"
                )
            self._add((None, (index,), outer), latents, outer)

    def _add(
        self, step: tuple[str | None, tuple[int, ...], frozenset[str]], latents: frozenset[str], plates: frozenset[str]
    ) -> None:
        self._order.append(step)
        self._live[len(self.factors) + len(self._order) - 1] = latents, plates

    def _states(self, names: Iterable[str]) -> int:
        return math.prod(self.sizes[name] for name in names)

    def log_sum(self, reduction: Reduction = torch.logsumexp, steps: list[Step] | None = None) -> Tensor:
        """Eliminate all latents; return what is left of the density in each cell of the kept plates, ``(*sizes)``.

        Args:
            reduction: what to do with the states of a latent; by default, sum their densities.
            steps: gets a step for each latent.
        """
        factors = dict(enumerate(self.factors))
        for number, (name, used, plates) in enumerate(self._order, len(self.factors)):
            terms = [factors.pop(index) for index in used]
            if name is None:
                factors[number] = self._over_plates(terms[0], plates)
                continue
            log, dims = self._product(terms, first=name)
            if steps is not None:
                steps.append(Step(name, log, dims))
            latents = frozenset(dims[1:]) & self.plates.keys()
            factors[number] = Factor(reduction(log, 0), dims[1:], plates, latents)
        total, dims = self._product([self._over_plates(factor, frozenset(self.kept)) for factor in factors.values()])
        shape = [self.sizes[name] if name in dims else 1 for name in self.kept]
        order = [dims.index(name) for name in self.kept if name in dims]
        return total.permute(order).reshape(shape).expand([self.sizes[name] for name in self.kept])

    def _product(self, terms: Sequence[Factor], first: str = "") -> tuple[Tensor, tuple[str, ...]]:
        """Multiply factors by the names of their dimensions."""
        found = dict.fromkeys(name for term in terms for name in term.dims)
        rest = sorted((name for name in found if name != first), key=lambda name: name not in self.plates)
        dims = (first, *rest) if first else tuple(rest)
        total: Any = 0.0
        for term in terms:
            order = sorted(range(len(term.dims)), key=lambda place: dims.index(term.dims[place]))
            sizes = dict(zip(term.dims, term.log.shape, strict=True))
            total = total + term.log.permute(order).reshape([sizes.get(name, 1) for name in dims])
        total = torch.as_tensor(total, dtype=torch.float64)
        return total.reshape([1] * (len(dims) - total.dim()) + list(total.shape)), dims

    def _over_plates(self, factor: Factor, plates: frozenset[str]) -> Factor:
        """Multiply a factor over the cells of the plates that are not among these."""
        gone = factor.plates - plates
        places = [place for place, name in enumerate(factor.dims) if name in gone]
        times = math.prod(self.sizes[name] for name in gone if name not in factor.dims)
        log = factor.log.sum(places) if places else factor.log
        dims = tuple(name for name in factor.dims if name not in gone)
        return Factor(log * times, dims, plates, factor.latents)
