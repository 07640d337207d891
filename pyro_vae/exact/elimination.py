r"""Sums over discrete latents by variable elimination: :math:`\log \sum_z p(x, z)` without a loop over joint states.

The density of a model is a product of factors, one for each site, and each factor depends on few latents. Summing out
one latent after another costs the size of the largest factor on the way, its *width*, and not the number of joint
states: a chain of T steps costs T.

Source: Koller & Friedman 2009, "Probabilistic Graphical Models", chapter 9; with plates, Obermeyer et al. 2019, "Tensor
Variable Elimination for Plated Factor Graphs", algorithm 1.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import latent_sites, log_density, observed_sites, set_plate_sizes
from pyro_vae._utils.typing import Function
from pyro_vae.distributions.properties import is_point, without_masks

__all__ = [
    "MAX_STATES", "ChangedDensityError", "EliminationError", "Factor", "FactorGraph", "Factors", "Latent",
    "LimitedSize", "States", "check_enumeration", "enumerated", "first_line", "listed", "log_marginal", "named_factor",
    "read_factors", "read_latent", "sample_eliminated", "site_log_density", "too_many_states",
]  # fmt: skip


MAX_STATES = 2**16
"""The largest number of joint states of discrete latents that is summed over."""
_MAX_NUMBERS = 2**27  # in a tensor of an enumerated run
_MAX_SHOWN = 8  # latents


class EliminationError(ValueError):
    """A sum over discrete latents is not feasible.

    Attributes:
        coupled: latents and plates; with one joint state for all cells of the plates of one of them it may be feasible.
    """

    def __init__(self, message: str, coupled: Mapping[str, frozenset[str]] | None = None):
        super().__init__(message)
        self.coupled = dict(coupled or {})


def log_marginal(trace: Trace, plates: Iterable[CondIndepStackFrame]) -> Tensor:
    """Sum the enumerated latents out of the density of a model, exactly.

    Args:
        trace: of a run of :func:`enumerated`, with all other latents at values of their own.
        plates: those in which log p(x) has values of its own, ``ModelGuide.units``.

    Returns:
        The log-density of the other latents and the data, not scaled, summed to the plates, ``(*sizes)``, in float64.

    Raises:
        EliminationError: if latents of crossed plates depend on each other, or a site depends on a latent of a plate
            that it does not lie in.

    >>> import pyro
    >>> import pyro.distributions as dist
    >>> from pyro import poutine
    >>> def mixture(x):
    ...     with pyro.plate("data", len(x)) as rows:
    ...         z = pyro.sample("z", dist.Categorical(torch.tensor([0.25, 0.75])))
    ...         pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[z], 1.0), obs=x)
    >>> trace = poutine.trace(enumerated(mixture, {"z"}, -2)).get_trace(torch.zeros(3))
    >>> log_marginal(trace, trace.nodes["x"]["cond_indep_stack"])
    tensor([-1.4189, -1.4189, -1.4189], dtype=torch.float64)
    """
    return FactorGraph(read_factors(trace), [frame.name for frame in plates]).log_sum()


class ChangedDensityError(ValueError):
    """A site has another log-density at given latents than the sum over its latents takes."""

    def __init__(self, owner: str, reason: str):
        super().__init__(
            f"`{owner}` must have log-densities that are functions of its latents and data, got others: {reason}. Code "
            "has none that draws random numbers outside of its sites, compares the cells of a plate, or needs more "
            "steps than `pyro.markov(history=)` allows"
        )


def check_enumeration(
    model: Function, names: Iterable[str], first_available_dim: int, trace: Trace, data: Sequence[Any]
) -> None:
    """Raise unless the enumerated run of a model has the log-densities of plain runs, and can be summed over.

    Args:
        model, names, first_available_dim: as in :func:`enumerated`.
        trace: of a plain run, at whose values of the other latents both are compared.
        data: the arguments of the model.

    Raises:
        ValueError: if the code does not take all states at once, or has other log-densities then.
        EliminationError: if the sum is not feasible.
    """
    summed, latents = list(names), latent_sites(trace)
    others = {name: site["value"] for name, site in latents.items() if name not in summed and not is_point(site["fn"])}
    nodes: dict[str, Any] = dict(trace.nodes)
    try:
        with LimitedSize():
            run = poutine.condition(enumerated(model, summed, first_available_dim), data=others)
            graph = FactorGraph(read_factors(poutine.trace(run).get_trace(*data)), [])
    except EliminationError:
        raise
    except Exception as error:
        raise ValueError(
            f"`model` must take all states of the discrete latents {listed(summed)} at once, as for TraceEnum_ELBO, "
            f"got code that raises: {first_line(error)}. Let it broadcast, with a `pyro.markov(history=)` of all steps "
            "that it needs, or draw them in the guide"
        ) from error
    graph.check_width()

    def densities(values: Mapping[str, Tensor]) -> dict[str, Factor]:
        plain = poutine.trace(poutine.condition(model, data={**others, **values})).get_trace(*data)
        sites: dict[str, Any] = dict(plain.nodes)
        return {
            name: named_factor(name, site_log_density(sites[name], name in summed), nodes[name], {})
            for name in graph.factors
        }

    graph.check_densities("model", {name: latents[name]["value"] for name in summed}, densities)


class LimitedSize(TorchFunctionMode):
    """Stop a run before its tensors fill the memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() > _MAX_NUMBERS:
            raise EliminationError(
                f"`model` must need at most {_MAX_NUMBERS} numbers in one tensor for all states of its discrete "
                f"latents, got {result.numel()}: use fewer data at once, or draw some latents in a guide"
            )
        return result


def first_line(error: Exception) -> str:
    """The message of an error, without tables of shapes; its name where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def listed(names: Sequence[str]) -> str:
    """Spell the first names."""
    shown = list(names)[:_MAX_SHOWN]
    return f"{shown}" if len(names) <= _MAX_SHOWN else f"{shown} and {len(names) - _MAX_SHOWN} more"


def too_many_states(count: int, names: Sequence[str]) -> EliminationError:
    """Return the error of a sum that is too wide."""
    return EliminationError(
        f"`model` must have discrete latents with at most {MAX_STATES} states together in one sum, got {count} states "
        f"of {listed(names)}, which depend on each other. Draw some of them in a guide, and use pv.log_evidence"
    )


def sample_eliminated(trace: Trace, count: int) -> dict[str, Tensor]:
    """Draw the enumerated latents from their exact conditional, given the data and the other latents of a trace.

    Return ``(count, *batch, *event)`` by site, with the batch shape of a run without enumeration. Latents that
    :func:`log_marginal` sums out are drawn in the opposite order, each given those that are drawn already.

    Source: Carter & Kohn 1994, "On Gibbs sampling for state space models", for chains.
    """
    graph = FactorGraph(read_factors(trace), [])
    return graph.values(graph.sample(count))


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
    """A log-density by the states of the latents that it depends on.

    Args:
        log: a dimension for each of ``dims``, in any order.
        dims: names of latents and plates.
        plates: all plates of its site, from left to right; its log-density need not have a dimension for each.
    """

    log: Tensor
    dims: tuple[str, ...]
    plates: tuple[str, ...]

    @property
    def latents(self) -> frozenset[str]:
        """The latents among its dimensions."""
        return frozenset(self.dims).difference(self.plates)

    def bounded(self, low: float) -> "Factor":
        """Return a factor of log-densities that are not below a number."""
        return self._replace(log=self.log.clamp(min=low))

    def times(self, power: Tensor, plates: tuple[str, ...]) -> "Factor":
        """Raise a factor to a power in each cell of some of its plates."""
        dims = (*self.dims, *(name for name in plates if name not in self.dims))
        return self._replace(log=_arranged(self.log, self.dims, dims) * _arranged(power, plates, dims), dims=dims)


class Latent(NamedTuple):
    """A latent that is to be summed out.

    Args:
        support: the values of one cell, ``(K, *event)``.
        plates: those in whose cells it is summed out separately, from left to right.
        places: their dimensions in ``batch_shape``.
        batch_shape: of its site in a run without enumeration.
        cells: for each state, the number of the value in each cell of other plates, which have a joint state; ``(S,
            *batch)`` with the batch shape, but one cell for ``plates``.
    """

    support: Tensor
    plates: tuple[str, ...]
    places: tuple[int, ...]
    batch_shape: torch.Size
    cells: Tensor

    @property
    def num_states(self) -> int:
        """S, the number of joint states."""
        return len(self.cells)

    def values(self, states: Tensor) -> Tensor:
        """Return the values of states, ``(D, *sizes of the plates)``, as ``(D, *batch, *event)``."""
        return self.support[self._to_batch(self.cells[states])]

    def states(self, values: Tensor) -> Tensor | None:
        """Return the states of values, ``(D, *batch, *event)``; ``None`` if one is not in the support."""
        event_dim = self.support.dim() - 1
        same = values.unsqueeze(values.dim() - event_dim) == self.support
        same = same.flatten(-event_dim).all(-1) if event_dim else same
        if not same.any(-1).all():
            return None
        numbers, num_batch = same.long().argmax(-1), len(self.batch_shape)
        others = [1 + place for place in range(num_batch) if place not in self.places]
        numbers = numbers.permute([0, *(1 + place for place in self.places), *others])
        return _digits_to_number(numbers.reshape(*numbers.shape[: 1 + len(self.places)], -1), len(self.support))

    def marginal(self, mass: Tensor) -> Tensor:
        """Sum masses of states, ``(S, *sizes of the plates)``, to those of the values of each cell, ``(K, *batch)``."""
        chosen = torch.nn.functional.one_hot(self.cells, len(self.support)).to(mass.dtype)
        return self._to_batch(torch.tensordot(mass.movedim(0, -1), chosen, 1).movedim(-1, 0))

    def _to_batch(self, tensor: Tensor) -> Tensor:
        """Bring dimensions of plates and of other cells, ``(D, *plates, *cells)``, into the order of the batch."""
        plates, num_batch = len(self.plates), len(self.batch_shape)
        own = {place: 1 + number for number, place in enumerate(self.places)}
        order = [own.get(place, 1 + plates + place) for place in range(num_batch)]
        order += [1 + plates + place for place in self.places]
        return tensor.permute([0, *order]).reshape(len(tensor), *self.batch_shape)


def _digits_to_number(digits: Tensor, base: int) -> Tensor:
    """Read the last dimension as the digits of numbers."""
    powers = base ** torch.arange(digits.shape[-1] - 1, -1, -1, device=digits.device)
    return (digits * powers).sum(-1)


class Factors(NamedTuple):
    """The factors of a model by site, its latents that are to be summed out, and the sizes of plates."""

    factors: dict[str, Factor]
    latents: dict[str, Latent]
    sizes: dict[str, int]


def read_factors(trace: Trace, masked: bool = False) -> Factors:
    """Read the factors from the trace of an :func:`enumerated` model, in float64.

    With ``masked`` the masks of its latents count, see :func:`site_log_density`.
    """
    stacks = {name: site.get("cond_indep_stack") for name, site in trace.nodes.items()}
    set_plate_sizes(trace)
    latents = latent_sites(trace)
    dims = {name: site["infer"].get("_enumerate_dim") for name, site in latents.items()}
    summed = {name: dim for name, dim in dims.items() if dim is not None}
    ids = {latents[name]["infer"]["_dim_to_id"][dim]: name for name, dim in summed.items()}
    observed = observed_sites(trace)
    nodes: dict[str, Any] = dict(trace.nodes)
    sites = {name: site for name, site in nodes.items() if name in latents or name in observed}
    sizes = {frame.name: frame.size for site in sites.values() for frame in _frames(site)}
    found: dict[str, Latent] = {}
    factors = {}
    for name, site in sites.items():
        log = site_log_density(site, name in summed and not masked)
        own = {dim: ids[id_] for dim, id_ in site["infer"].get("_dim_to_id", {}).items() if id_ in ids}
        _restore_plates(site, stacks[name], sizes, [found[own[dim]] for dim in _used(log) if own.get(dim) in found])
        if name in summed:
            found[name] = read_latent(name, site, summed[name])
        factors[name] = named_factor(name, log, site, own)
    return Factors(factors, found, sizes)


def _restore_plates(site: Any, stack: Any, sizes: dict[str, int], parents: Iterable[Latent]) -> None:
    """Give a site the plates without a size that it shares with a latent on which it depends.

    Its distribution has no dimension for their rows if it has one for the states of the latent alone.
    """
    inside = {plate for latent in parents for plate in latent.plates}
    kept = {frame.name for frame in site["cond_indep_stack"]}
    frames = []
    for frame in stack:
        if frame.name in kept or frame.name in inside:
            size = sizes.get(frame.name, frame.size)
            frames.append(frame._replace(size=size, full_size=size) if frame.size == -1 else frame)
    site["cond_indep_stack"] = tuple(frames)


def _used(log: Tensor) -> list[int]:
    """The dimensions of a log-density that have more than one place."""
    return [dim for dim in range(-log.dim(), 0) if log.shape[dim] > 1]


def site_log_density(site: dict[str, Any], summed: bool) -> Tensor:
    """Return the log-density of a site, without its masks if its states are summed over.

    A masked latent of a padded step has no factors but its prior, which sums to one, as in ``TraceEnum_ELBO``; a mask
    would give each of its states the mass one.
    """
    return without_masks(site["fn"]).log_prob(site["value"]) if summed else log_density(site)


def named_factor(name: str, log: Tensor, site: dict[str, Any], latents: Mapping[int, str]) -> Factor:
    """Name the dimensions of a log-density: plates of the site, and latents by dimension."""
    frames = _frames(site)
    names = dict(latents) | {frame.dim or 0: frame.name for frame in frames}
    used = _used(log)
    if unknown := [dim for dim in used if dim not in names]:
        raise ValueError(
            f"`model` must have densities with a dimension for each plate around a site alone, got the shape "
            f"{tuple(log.shape)} at site {name!r}, whose dimension {unknown[0]} is no plate"
        )
    log = log.double().reshape([log.shape[dim] for dim in used])
    return Factor(log, tuple(names[dim] for dim in used), tuple(frame.name for frame in frames))


def _frames(site: dict[str, Any]) -> list[CondIndepStackFrame]:
    """The plates around a site that have a dimension, from left to right."""
    return sorted((frame for frame in site["cond_indep_stack"] if frame.vectorized), key=lambda frame: frame.dim or 0)


def read_latent(name: str, site: dict[str, Any], dim: int | None = None, joint: frozenset[str] = frozenset()) -> Latent:
    """Read a latent that has its values in a dimension of its site, or one of a run without enumeration.

    ``joint`` are plates of which all cells have one joint state.
    """
    fn, frames = site["fn"], _frames(site)
    if dim is None:
        try:
            support = fn.enumerate_support(expand=False)
        except NotImplementedError as error:
            raise ValueError(
                f"`model` must have discrete latents of which every cell has the same states, got {name!r}: {error}"
            ) from error
        support = support.reshape(len(support), 1, *fn.event_shape)
    else:
        dim -= fn.event_dim
        support = site["value"].movedim(dim, 0).reshape(site["value"].shape[dim], -1, *fn.event_shape)
    sizes = {frame.dim or 0: frame.size for frame in frames}
    batch_shape = torch.Size([sizes.get(place, 1) for place in range(min(sizes, default=0), 0)])
    own = [frame for frame in frames if frame.name not in joint]
    places = tuple(len(batch_shape) + (frame.dim or 0) for frame in own)
    cells = torch.Size([1 if place in places else size for place, size in enumerate(batch_shape)])
    states = torch.arange(len(support) ** cells.numel(), device=support.device)
    powers = len(support) ** torch.arange(cells.numel() - 1, -1, -1, device=support.device)
    digits = (states[:, None] // powers % len(support)).reshape(-1, *cells)
    return Latent(support[:, 0], tuple(frame.name for frame in own), places, batch_shape, digits)


Reduction = Callable[[Tensor, int], Tensor]
"""From log-densities and a dimension to those without it: a sum of densities, or their maximum."""
States = dict[str, Tensor]
"""Numbers of states of latents by name, ``(D, *sizes of the plates)`` for D draws."""


class FactorGraph:
    """Factors of which latents are summed out, and an order of doing it.

    Latents of inner plates go first. Then the factors of the cells of a plate are multiplied. Among latents of the same
    plates the next one is that whose sum leaves the smallest factor.

    Args:
        factors: of a model.
        kept: the names of the plates that stay, from left to right.

    Attributes:
        width: the largest number of joint states that one sum needs in a cell of its plates.
        widest: the latents of that sum.

    Raises:
        EliminationError: if a site depends on a latent of a plate that it does not lie in, or latents of crossed plates
            depend on each other, so that no order is feasible.
    """

    def __init__(self, factors: Factors, kept: Sequence[str]):
        self.factors, self.latents, self.sizes = factors
        self.kept, self.width, self.widest = list(kept), 1, list[str]()
        for name, factor in self.factors.items():
            self._check_inside(name, factor)
        self._levels = {name: frozenset(latent.plates) for name, latent in self.latents.items()}
        self._live = {index: (each.latents, frozenset(each.plates)) for index, each in enumerate(self.factors.values())}
        self._order: list[tuple[str | None, list[int], frozenset[str]]] = []
        left = set(self.latents)
        while levels := {self._levels[name] for name in left} | {plates for _, plates in self._live.values()}:
            level = max(levels, key=lambda plates: (len(plates), sorted(plates)))
            self._sum_out([name for name in self.latents if self._levels[name] == level], level)
            left -= {name for name in left if self._levels[name] == level}
            if level <= frozenset(kept):
                break
            self._multiply(level)

    def _check_inside(self, name: str, factor: Factor) -> None:
        for latent in sorted(factor.latents):
            if outside := sorted(set(self.latents[latent].plates).difference(factor.plates)):
                raise EliminationError(
                    f"`model` must use the latent {latent!r} inside of the plates {outside} alone, got the site "
                    f"{name!r} outside of them, which depends on it: the latents of all cells then depend on each "
                    "other, and their joint states are too many to be summed over",
                    {latent: frozenset(outside)},
                )

    def _sum_out(self, names: list[str], level: frozenset[str]) -> None:
        """Order the latents of a level."""
        having: dict[str, set[int]] = {name: set() for name in self.latents}
        for index, (latents, _) in self._live.items():
            for name in latents:
                having[name].add(index)
        places, left = {name: place for place, name in enumerate(names)}, set(names)

        def scope(name: str) -> frozenset[str]:
            return frozenset({name}).union(*(self._live[index][0] for index in having[name]))

        def cost(name: str) -> tuple[int, int, str]:
            return self._num_states(scope(name) - {name}), places[name], name

        queue = [cost(name) for name in names]
        heapq.heapify(queue)
        while left:
            entry = heapq.heappop(queue)
            name = entry[-1]
            if name not in left or entry != cost(name):  # an entry of its present cost is in the queue, too
                continue
            left.discard(name)
            joint, used = scope(name), sorted(having[name])
            if self._num_states(joint) > self.width:
                self.width, self.widest = self._num_states(joint), sorted(joint)
            for index in used:
                for other in self._live.pop(index)[0]:
                    having[other].discard(index)
            made = self._add((name, used, level), joint - {name})
            for other in joint - {name}:
                having[other].add(made)
                if other in left:
                    heapq.heappush(queue, cost(other))

    def _multiply(self, level: frozenset[str]) -> None:
        """Multiply the factors of a level over the plates of which no latent of theirs has a value of its own."""
        for index in [index for index, (_, plates) in self._live.items() if plates == level]:
            latents, _ = self._live.pop(index)
            outer = frozenset(self.kept).union(*(self._levels[name] for name in latents))
            if outer == level:
                raise EliminationError(
                    f"`model` must have discrete latents that do not depend on each other across plates, got a site in "
                    f"the plates {sorted(level)} that depends on {sorted(latents)}: the sum over their states grows "
                    "exponentially with the size of a plate. Draw some of them in the guide, or use a sequential "
                    "plate, `for i in pyro.plate(...)`, if it is small",
                    {name: self._levels[name].difference(self.kept) for name in latents},
                )
            self._add((None, [index], outer), latents)

    def _add(self, step: tuple[str | None, list[int], frozenset[str]], latents: frozenset[str]) -> int:
        """Add a step to the order, and return the number of the factor that it makes."""
        made = len(self.factors) + len(self._order)
        self._order.append(step)
        self._live[made] = latents, step[-1]
        return made

    def _num_states(self, names: Iterable[str]) -> int:
        return math.prod(self.latents[name].num_states for name in names)

    def log_sum(self, reduction: Reduction = torch.logsumexp, steps: list[Factor] | None = None) -> Tensor:
        """Eliminate all latents, and return what is left of the density in the cells of the kept plates, ``(*sizes)``.

        Args:
            reduction: of the states of a latent; by default a sum of densities.
            steps: gets the product of all factors with a latent, for each latent, before the reduction; its first
                dimension is the latent, others are later latents and plates.
        """
        factors = dict(enumerate(self.factors.values()))
        for made, (name, used, plates) in enumerate(self._order, len(self.factors)):
            terms = [factors.pop(index) for index in used]
            if name is None:
                factors[made] = self._over_plates(terms[0], plates)
                continue
            step = _product(terms, name, self.latents[name].plates)
            if steps is not None:
                steps.append(step)
            factors[made] = Factor(reduction(step.log, 0), step.dims[1:], step.plates)
        total = _product([self._over_plates(factor, frozenset(self.kept)) for factor in factors.values()])
        return _arranged(total.log, total.dims, self.kept).expand([self.sizes[name] for name in self.kept])

    def _over_plates(self, factor: Factor, plates: frozenset[str]) -> Factor:
        """Multiply a factor over the cells of the plates that are not among these."""
        gone = frozenset(factor.plates) - plates
        places = [place for place, name in enumerate(factor.dims) if name in gone]
        times = math.prod(self.sizes[name] for name in gone.difference(factor.dims))
        dims, left = (tuple(name for name in names if name not in gone) for names in (factor.dims, factor.plates))
        return Factor((factor.log.sum(places) if places else factor.log) * times, dims, left)

    def sample(self, count: int) -> States:
        """Draw from the joint posterior of all latents."""

        def draw(logits: Tensor) -> Tensor:
            cumulated = (logits - logits.amax(-1, keepdim=True)).exp().cumsum(-1)
            uniform = torch.rand(count, *cumulated.shape[1:-1], dtype=cumulated.dtype, device=cumulated.device)
            passed = cumulated <= uniform[..., None] * cumulated[..., -1:]
            return passed.sum(-1).clamp(max=cumulated.shape[-1] - 1)

        return self._backward(torch.logsumexp, draw)

    def mode(self) -> States:
        """Return the joint state of the largest posterior mass, with D = 1.

        Source: Viterbi 1967, "Error bounds for convolutional codes", for chains.
        """
        return self._backward(lambda log, dim: log.amax(dim), lambda logits: logits.argmax(-1))

    def _backward(self, reduction: Reduction, choose: Callable[[Tensor], Tensor]) -> States:
        """Choose states in the opposite order, each from log-masses given the chosen ones, ``(D, *plates, K)``."""
        steps: list[Factor] = []
        self.log_sum(reduction, steps)
        states: States = {}
        for step in reversed(steps):
            states[step.dims[0]] = choose(self.at(step, states))
        return states

    def at(self, factor: Factor, states: States) -> Tensor:
        """Read a log-density at the states of some of its latents, ``(D, *plates)``, or ``(D, *plates, K)``.

        The last dimension is that of the first latent, if it has no state.
        """
        others = [name for name in factor.dims if name in states and name not in factor.plates]
        free = [name for name in factor.dims if name in self.latents and name not in others]
        sizes = [self.sizes[name] for name in factor.plates]
        log = _arranged(factor.log, factor.dims, [*others, *factor.plates, *free])
        left, right = log.shape[: len(others)], log.shape[len(others) + len(sizes) :]
        log = log.expand([*left, *sizes, *right])
        if not others:
            return log[None]
        cells = [
            torch.arange(size, device=log.device).reshape([-1 if place == at else 1 for at in range(len(sizes))])
            for place, size in enumerate(sizes)
        ]
        index = [_arranged(states[name], ("", *self.latents[name].plates), ["", *factor.plates]) for name in others]
        return log[(*index, *(cell[None] for cell in cells))]

    def check_width(self) -> None:
        """Raise if a sum has more than ``MAX_STATES`` joint states."""
        if self.width > MAX_STATES:
            raise too_many_states(self.width, self.widest)

    def check_densities(
        self,
        owner: str,
        drawn: Mapping[str, Tensor],
        densities: Callable[[Mapping[str, Tensor]], Mapping[str, Factor]],
    ) -> None:
        """Raise if factors are not the densities of plain runs, at a draw of the latents and at arbitrary states.

        Code that compares the cells of a plate, or looks further back than ``pyro.markov`` allows, has others.

        Args:
            owner: ``"model"`` or ``"guide"``.
            drawn: values of all latents.
            densities: from values to the log-density of each site in a plain run.
        """
        at = self.states({name: value[None] for name, value in drawn.items()})
        with poutine.block(), seeded(1):
            arbitrary = {}
            for name, latent in self.latents.items():
                sizes = [1, *(self.sizes[plate] for plate in latent.plates)]
                arbitrary[name] = torch.randint(latent.num_states, sizes, device=at[name].device)
            for states in (at, arbitrary):
                values = {name: value[0] for name, value in self.values(states).items()}
                for name, factor in densities(values).items():
                    found = self.at(self.factors[name], states)
                    if not torch.allclose(found, self.in_cells(factor), rtol=1e-4, atol=1e-4):
                        raise ChangedDensityError(
                            owner, f"that of site {name!r} at given latents changes in another run"
                        )

    def in_cells(self, factor: Factor) -> Tensor:
        """Give a log-density without latents a number for each cell of all of its plates, ``(*sizes)``."""
        return _arranged(factor.log, factor.dims, factor.plates).expand([self.sizes[name] for name in factor.plates])

    def log_prob(self, states: States) -> Tensor:
        """Compute the log-density of all factors at states of all latents, ``(D, *sizes of the kept plates)``."""
        count = max(map(len, states.values()), default=1)
        total: Any = 0.0
        for factor in self.factors.values():
            log = Factor(self.at(factor, states), ("", *factor.plates), ("", *factor.plates))
            total = total + self._over_plates(log, frozenset(["", *self.kept])).log
        return total.expand([count, *(self.sizes[name] for name in self.kept)])

    def marginals(self) -> dict[str, Tensor]:
        """Compute the posterior mass of each state of each latent, ``(K, *batch)``.

        In the opposite order, the joint mass of a latent and those that it was summed out with is its conditional mass
        times their joint mass, which is known then.

        Source: Lauritzen & Spiegelhalter 1988, "Local computations with probabilities on graphical structures"; the
        forward-backward algorithm for chains.
        """
        steps: list[Factor] = []
        self.log_sum(steps=steps)
        places = {step.dims[0]: place for place, step in enumerate(steps)}
        beliefs: dict[str, Factor] = {}
        masses = {}
        for step in reversed(steps):
            name, plates = step.dims[0], step.plates
            others = [other for other in step.dims[1:] if other not in plates]
            conditional = (step.log - step.log.logsumexp(0)).exp().nan_to_num(0.0)  # states that cannot be reached
            log_mass = Factor(conditional.log(), step.dims, plates)
            if others:
                parent = beliefs[min(others, key=lambda other: places[other])]
                gone = [place for place, dim in enumerate(parent.dims) if dim in parent.latents.difference(others)]
                dims = tuple(dim for place, dim in enumerate(parent.dims) if place not in gone)
                mass = parent.log.logsumexp(gone) if gone else parent.log
                log_mass = _product([log_mass, Factor(mass, dims, parent.plates)], name, plates)
            beliefs[name] = log_mass
            other_dims = [place for place, dim in enumerate(log_mass.dims) if dim in others]
            mass = log_mass.log.logsumexp(other_dims) if other_dims else log_mass.log
            dims = tuple(dim for dim in log_mass.dims if dim not in others)
            sizes = [self.sizes[plate] for plate in plates]
            mass = _arranged(mass.exp(), dims, [name, *plates]).expand([-1, *sizes])
            masses[name] = self.latents[name].marginal(mass)
        return {name: masses[name] for name in self.latents}

    def values(self, states: States) -> dict[str, Tensor]:
        """Return the values of states, ``(D, *batch, *event)`` by site."""
        return {name: latent.values(states[name]) for name, latent in self.latents.items()}

    def states(self, values: Mapping[str, Tensor]) -> States:
        """Return the states of values, ``(D, *batch, *event)`` by site.

        Raises:
            ValueError: if a value is not in the support of its latent.
        """
        states = {}
        for name, latent in self.latents.items():
            found = latent.states(values[name])
            if found is None:
                raise ValueError(f"`values` must have states of {name!r} alone, got others")
            states[name] = found
        return states


def _arranged(tensor: Tensor, dims: Sequence[str], names: Sequence[str]) -> Tensor:
    """Put the named dimensions of a tensor into an order, with size one for names that it does not have."""
    tensor = tensor.permute([dims.index(name) for name in names if name in dims])
    sizes = iter(tensor.shape)
    return tensor.reshape([next(sizes) if name in dims else 1 for name in names])


def _product(terms: Sequence[Factor], first: str = "", plates: tuple[str, ...] = ()) -> Factor:
    """Multiply factors: the dimensions of the result are a latent, if it is given, other latents, and plates."""
    found = dict.fromkeys(name for term in terms for name in term.dims if name != first)
    inner = {name for term in terms for name in term.plates}
    dims = [*[first] * bool(first), *(name for name in found if name not in inner)]
    dims += [name for name in found if name in inner]
    total = torch.zeros([1] * len(dims), dtype=torch.float64, device=terms[0].log.device if terms else None)
    for term in terms:
        total = total + _arranged(term.log, term.dims, dims)
    return Factor(total, tuple(dims), plates)
