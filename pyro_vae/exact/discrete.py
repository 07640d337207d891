r"""Exact answers for models whose latents are all discrete, by variable elimination.

Hidden Markov models, trees, mixtures and similar models, in any plates: :math:`\log p(x)`, the posterior, its
marginals, draws and mode, and the ELBO of a guide. See :mod:`pyro_vae.exact.elimination`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae._utils.display import Result, Table, count_of
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import latent_sites, log_density, observed_sites
from pyro_vae._utils.validation import describe
from pyro_vae.distributions.properties import is_masked, is_point
from pyro_vae.draws import PerDraw
from pyro_vae.exact.elimination import (
    MAX_STATES,
    ChangedDensityError,
    EliminationError,
    Factor,
    FactorGraph,
    Factors,
    Latent,
    LimitedSize,
    enumerated,
    first_line,
    listed,
    named_factor,
    read_factors,
    read_latent,
    site_log_density,
    too_many_states,
)
from pyro_vae.exact.model_density import check_site, common_weight
from pyro_vae.model_guide import ModelGuide, check_same_latents

__all__ = ["DiscreteModel", "DiscretePosterior"]

_FEW_STATES = 2**12  # of all latents together, that may be run one after another
_IMPOSSIBLE = -1e30  # in place of -inf, whose derivatives are NaN


class DiscreteModel:
    """A model on its data, whose latents all have ``enumerate_support``.

    Args:
        pair: the model and its data; with a guide for :meth:`elbo`.

    Raises:
        ValueError: if the model has no exact answer: a likelihood that is not normalised, a site that is scaled, a
            sum over more than ``MAX_STATES`` joint states, or densities that depend on more than latents and data.
    """

    def __init__(self, pair: ModelGuide):
        self.pair, self.kept = pair, [frame.name for frame in pair.units]
        weight = common_weight(pair)
        for owner, name, site in pair.sites:
            check_site(owner, name, site, weight, by_rows=False)
        pair.check_likelihood()
        pair.check_kinds()
        if pair.plate in self.kept:
            pair.check_rows("model")
        self.dtype = log_density(next(iter(pair.observed.values()))).dtype
        reader = _FactorReader(pair, "model")
        self.graph = reader.graph()
        self._joint = reader.joint

    @staticmethod
    def fits(pair: ModelGuide) -> bool:
        """Whether all latents of a model are discrete, and it is not one latent in the data plate.

        The states of one latent are summed over in chunks, since there may be many, as in a product of variables.
        """
        latents = pair.latents.values()
        enumerable = [site for site in latents if site["fn"].has_enumerate_support]
        functions = [site for site in latents if is_point(site["fn"])]
        if not enumerable or not pair.observed or len(enumerable) + len(functions) < len(latents):
            return False
        sites = (*latents, *pair.observed.values())
        plates = {tuple((frame.name, frame.dim) for frame in site["cond_indep_stack"]) for site in sites}
        masked = any(site["mask"] is not None or is_masked(site["fn"]) for site in latents)
        return len(pair.latents) > 1 or plates != {((pair.plate, -1),)} or masked

    def log_evidence(self) -> Tensor:
        """Compute log p(x) in each cell of the plates that all sites share, in float64."""
        return self.graph.log_sum()

    def posterior(self) -> "DiscretePosterior":
        """Return p(z | x)."""
        return DiscretePosterior(self.graph, self.dtype)

    def elbo(self) -> Tensor:
        r"""Compute :math:`\mathbb{E}_q[\log p(x, z) - \log q(z \mid x)]` in each cell, in float64.

        A guide may leave out all latents, as with ``TraceEnum_ELBO``: then they are summed out, and it is log p(x).
        Else it is the derivative in :math:`\epsilon`, at zero, of
        :math:`\log \sum_z q(z \mid x) \exp(\epsilon \, [\log p(x, z) - \log q(z \mid x)])`, found by elimination.
        """
        pair = self.pair
        if not pair.guide_latents:
            pair.check_factors()
            return self.log_evidence()
        check_same_latents(pair.latents, pair.guide_latents)
        pair.check_density()
        if without := [name for name, site in pair.guide_latents.items() if not site["fn"].has_enumerate_support]:
            raise ValueError(f"`guide` must have discrete latents with `enumerate_support`, got {without} without it")
        weights = _FactorReader(pair, "guide", joint=self._joint).graph()
        for name, ours in self.graph.latents.items():
            theirs = weights.latents[name]
            same = ours.support.shape == theirs.support.shape and bool((ours.support == theirs.support).all())
            if not same or ours.plates != theirs.plates:
                raise ValueError(
                    f"`guide` must have the plates and states of the model at {name!r}, {list(ours.plates)} and "
                    f"{describe(ours.support)}, got {list(theirs.plates)} and {describe(theirs.support)}"
                )
        # Terms of masked latents do not count in an ELBO, and their masses in q sum to one.
        model, guide = (_FactorReader(pair, owner, True, self._joint).graph() for owner in ("model", "guide"))
        return _expectation(weights, model, guide)


def _expectation(weights: FactorGraph, model: FactorGraph, guide: FactorGraph) -> Tensor:
    """The mean of the log-density of the model less that of the guide, under the masses of the guide."""
    kept = tuple(model.kept)
    sizes = weights.sizes | model.sizes
    power = torch.zeros([sizes[name] for name in kept], dtype=torch.float64, device=model.log_sum().device)
    with torch.enable_grad():
        power.requires_grad_()
        factors = {f"weight {name}": each.bounded(_IMPOSSIBLE) for name, each in weights.factors.items()}
        for role, graph, sign in (("model", model, power), ("guide", guide, -power)):
            for name, each in graph.factors.items():
                factors[f"{role} {name}"] = each.bounded(_IMPOSSIBLE).times(sign, kept)
        graph = FactorGraph(Factors(factors, weights.latents, sizes), kept)
        graph.check_width()
        (mean,) = torch.autograd.grad(graph.log_sum().sum(), power)
    return mean.masked_fill(mean < _IMPOSSIBLE / 2**20, -torch.inf)


class _FactorReader:
    """Reads the factors of a model or guide, ``owner``, in the first way that reproduces the densities of plain runs.

    1. One run in which each latent has a dimension of its own for its states. The code must broadcast, and without
       ``pyro.markov`` there are dimensions for some sixty latents.
    2. Runs at many joint values, vectorised so that the code sees the shapes of one run. Latents that no site depends
       on together have the same digit of the number of a run, so that a chain of K states needs K^2 runs.
    3. Runs at all joint values, one after another if need be, for code that branches on values in Python.
    """

    def __init__(
        self, pair: ModelGuide, owner: str, masked: bool = False, joint: Mapping[str, frozenset[str]] | None = None
    ):
        self.pair, self.owner, self.masked = pair, owner, masked
        self.joint = dict(joint or {})  # plates of which all cells of a latent have one joint state
        self.run, self.trace = (pair.model, pair.model_trace) if owner == "model" else (pair.guide, pair.guide_trace)
        latents = latent_sites(self.trace)
        observed = observed_sites(self.trace) if owner == "model" else {}
        nodes: dict[str, Any] = dict(self.trace.nodes)
        self.sites = {name: site for name, site in nodes.items() if name in latents or name in observed}
        # Others are points, functions of these: `Delta` sites, which each run makes again.
        summed = [name for name, site in latents.items() if site["fn"].has_enumerate_support]
        self.latents = {name: read_latent(name, self.sites[name]) for name in summed}
        frames = [frame for site in self.sites.values() for frame in site["cond_indep_stack"]]
        self.sizes = {frame.name: frame.size for frame in frames}

    def graph(self) -> FactorGraph:
        """Return the factors, with an order in which latents are summed out."""
        unordered = [name for name in self.latents if "_markov_scope" not in self.sites[name]["infer"]]
        if self._num_states(unordered) > MAX_STATES and self._origins is not None:
            # A sum that is too wide is found before its numbers fill the memory.
            FactorGraph(self._symbolic(self._origins), self._kept()).check_width()
        ways: list[Callable[[], Factors]] = [self._enumerated] if not self.joint else []
        ways.append(lambda: self._by_digits(self._known_origins()))
        if self._num_states(self.latents) <= _FEW_STATES:
            ways.append(lambda: self._by_digits(self._all_latents()))
        errors = []
        for way in ways:
            try:
                graph = FactorGraph(way(), self._kept())
                graph.check_width()
                graph.check_densities(self.owner, self._drawn(), self._factors)
                return graph
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # code that does not broadcast, branches on values, or couples cells
                if isinstance(error, EliminationError) and not error.coupled:
                    raise
                errors.append(error)
        if infeasible := [error for error in errors if isinstance(error, EliminationError)]:
            raise infeasible[0]
        if changed := [error for error in errors if isinstance(error, ChangedDensityError)]:
            raise changed[0]
        raise ChangedDensityError(self.owner, first_line(errors[0])) from errors[0]

    def _kept(self) -> list[str]:
        return [frame.name for frame in self.pair.units]

    def _num_states(self, names: Iterable[str]) -> int:
        return math.prod(self.latents[name].num_states for name in names)

    @cached_property
    def _origins(self) -> dict[str, frozenset[str]] | None:
        """The latents that each site depends on, itself included; ``None`` if that is not known."""
        try:
            found = self.pair.origins(self.owner)
        except Exception:  # code that takes plain tensors alone
            return None
        origins: dict[str, frozenset[str]] = {}
        for name in self.sites:  # in the order of the run, so that points are seen before what depends on them
            through = (origins.get(other, frozenset()) for other in found[name] - self.latents.keys())
            origins[name] = (found[name] | {name}) & self.latents.keys() | frozenset().union(*through)
        return origins

    def _known_origins(self) -> dict[str, frozenset[str]]:
        if self._origins is None:
            raise ValueError("it cannot be seen which latents a site depends on")
        return self._origins

    def _all_latents(self) -> dict[str, frozenset[str]]:
        """All latents, for each site, that it may depend on: those of the plates around it."""
        inside = {name: frozenset(each.name for each in site["cond_indep_stack"]) for name, site in self.sites.items()}
        return {
            name: frozenset(other for other, latent in self.latents.items() if inside[name].issuperset(latent.plates))
            for name in self.sites
        }

    def _symbolic(self, origins: dict[str, frozenset[str]]) -> Factors:
        """Factors without numbers, to find the width of sums, with latents that make them feasible.

        Where the cells of a plate depend on each other, all cells of a latent get one joint state, if these are few.
        """
        factors = {}
        for name, site in self.sites.items():
            empty = named_factor(name, torch.zeros((), device="cpu"), site, {})
            factors[name] = empty._replace(dims=tuple(sorted(origins[name])))
        while True:
            found = Factors(factors, self._joint_latents(), self.sizes)
            try:
                FactorGraph(found, self._kept())
            except EliminationError as error:
                counts = {name: self._num_joint(name, plates) for name, plates in error.coupled.items()}
                name = min(counts, key=lambda name: counts[name])
                if counts[name] > MAX_STATES:
                    raise
                self.joint[name] = self.joint.get(name, frozenset()) | error.coupled[name]
            else:
                return found

    def _joint_latents(self) -> dict[str, Latent]:
        return {
            name: read_latent(name, self.sites[name], joint=self.joint[name]) if name in self.joint else latent
            for name, latent in self.latents.items()
        }

    def _num_joint(self, name: str, plates: frozenset[str]) -> int:
        """The number of joint states of a latent in all cells of some of its plates, and those that are joint."""
        cells = math.prod(self.sizes[plate] for plate in plates | self.joint.get(name, frozenset()))
        return len(self.latents[name].support) ** cells

    def _enumerated(self) -> Factors:
        run = enumerated(self.run, self.latents, -1 - self.pair.max_plate_nesting)
        with poutine.block(), seeded(0), LimitedSize():
            return read_factors(poutine.trace(run).get_trace(*self.pair.data), self.masked)

    def _by_digits(self, origins: dict[str, frozenset[str]]) -> Factors:
        latents = self._symbolic(origins).latents
        digits, sizes = _assign_digits(latents, origins)
        count = math.prod(sizes)
        if count > MAX_STATES:
            raise too_many_states(count, list(latents))
        index = torch.arange(count, device=self.pair.data[0].device)
        values = {}
        for name, latent in latents.items():
            state = index // math.prod(sizes[digits[name] + 1 :]) % sizes[digits[name]]
            state = state.clamp(max=latent.num_states - 1).reshape([-1, *[1] * len(latent.plates)])
            values[name] = latent.values(state.expand([-1, *(self.sizes[plate] for plate in latent.plates)]))
        with poutine.block(), seeded(0):
            results = PerDraw()(lambda at: (self._densities(at), None), count, values)
        factors, nesting = {}, self.pair.max_plate_nesting
        for name, site in self.sites.items():
            log = results.each(name, count)
            log = log.reshape([*sizes, *[1] * (nesting + 1 - log.dim()), *log.shape[1:]])
            names = {}
            for other, digit in digits.items():
                if other in origins[name]:
                    names[digit - log.dim()] = other
                    log = log.narrow(digit, 0, latents[other].num_states)
            for digit in range(len(sizes)):
                if digit - log.dim() not in names:
                    log = log.narrow(digit, 0, 1)
            factors[name] = named_factor(name, log, site, names)
        return Factors(factors, latents, self.sizes)

    def _densities(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The log-density of each site in a run at values of the latents."""
        trace = poutine.trace(poutine.condition(self.run, data=dict(values))).get_trace(*self.pair.data)
        sites: dict[str, Any] = dict(trace.nodes)
        return {name: self._density(name, sites[name]) for name in self.sites}

    def _density(self, name: str, site: dict[str, Any]) -> Tensor:
        return site_log_density(site, summed=name in self.latents and not self.masked)

    def _drawn(self) -> dict[str, Tensor]:
        return {name: self.sites[name]["value"] for name in self.latents}

    def _factors(self, values: Mapping[str, Tensor]) -> dict[str, Factor]:
        return {name: named_factor(name, log, self.sites[name], {}) for name, log in self._densities(values).items()}


def _assign_digits(
    latents: Mapping[str, Latent], origins: Mapping[str, frozenset[str]]
) -> tuple[dict[str, int], list[int]]:
    """The digit of each latent, different from those of latents that a site depends on together; their sizes."""
    together: dict[str, set[str]] = {name: set() for name in latents}
    for scope in origins.values():
        for name in scope:
            together[name] |= scope
    digits: dict[str, int] = {}
    sizes: list[int] = []
    for name in sorted(latents, key=lambda name: -latents[name].num_states):  # stable: chains alternate
        taken = {digits[other] for other in together[name] if other in digits}
        digits[name] = next(digit for digit in range(len(sizes) + 1) if digit not in taken)
        if digits[name] == len(sizes):
            sizes.append(latents[name].num_states)
    return digits, sizes


class DiscretePosterior(Result):
    """The exact posterior p(z | x) of a model whose latents are all discrete.

    Attributes:
        log_evidence: log p(x) in each cell of the plates that all sites share, ``(*units)``, in nats: per datum where
            all latents are local to it, one number ``()`` where some latent is global.
        support: the states of each latent by name, ``(K, *event)``.

    >>> import pyro
    >>> import pyro.distributions as dist
    >>> from pyro_vae import exact
    >>> def model(x):
    ...     a = pyro.sample("a", dist.Bernoulli(0.5))
    ...     with pyro.plate("data", len(x)):
    ...         b = pyro.sample("b", dist.Bernoulli(0.1 + 0.8 * a))
    ...         pyro.sample("x", dist.Normal(b, 1.0), obs=x)
    >>> posterior = exact.posterior(model, torch.tensor([0.5, 0.5, 0.5]))
    >>> posterior.marginals["a"], posterior.marginals["b"].shape
    (tensor([0.5000, 0.5000]), torch.Size([2, 3]))
    >>> {name: draw.shape for name, draw in posterior.sample((10,)).items()}
    {'a': torch.Size([10]), 'b': torch.Size([10, 3])}
    """

    def __init__(self, graph: FactorGraph, dtype: torch.dtype):
        self._graph, self._dtype = graph, dtype
        self.log_evidence = graph.log_sum()
        if not self.log_evidence.isfinite().all():
            got = f"log p(x) = {self.log_evidence.min().item()}"
            raise ValueError(f"`data` must have a positive density under the model, got {got}: it has no posterior")
        self.support = {name: latent.support for name, latent in graph.latents.items()}

    def _line(self) -> str:
        units = count_of(self.log_evidence.numel(), "unit") if self.log_evidence.dim() else "all data together"
        log_p = self.log_evidence.mean().item()
        per = "nats per unit" if self.log_evidence.dim() else "nats"
        return (
            f"p(z | x) of {units}, {count_of(len(self.support), 'latent site')}, exact by variable elimination of "
            f"width {count_of(self._graph.width, 'state')}; log p(x) {log_p:.3f} {per}"
        )

    def _table(self) -> Table:
        rows = [
            (name, len(latent.support), tuple(latent.batch_shape), f"{self._entropy(name):.3f}")
            for name, latent in self._graph.latents.items()
        ]
        note = (
            f"Exact, by variable elimination of width {count_of(self._graph.width, 'state')}. log p(x) is "
            f"{self.log_evidence.mean().item():.3f} nats, the mean of {self.log_evidence.numel()}."
        )
        return Table(("latent site", "states", "batch shape", "mean entropy (nats)"), rows, note)

    def _entropy(self, name: str) -> float:
        return torch.special.entr(self.marginals[name].double()).sum(0).mean().item()

    @cached_property
    def marginals(self) -> dict[str, Tensor]:
        """The posterior mass of each state of each latent, ``(K, *batch)`` by name, ordered as ``support``."""
        return {name: mass.to(self._dtype) for name, mass in self._graph.marginals().items()}

    @cached_property
    def mode(self) -> dict[str, Tensor]:
        """The joint values of the largest posterior mass, ``(*batch, *event)`` by name."""
        return {name: value[0] for name, value in self._graph.values(self._graph.mode()).items()}

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> dict[str, Tensor]:
        """Draw all latents jointly, ``(*sample_shape, *batch, *event)`` by name."""
        shape = torch.Size(sample_shape)
        values = self._graph.values(self._graph.sample(shape.numel()))
        return {name: value.reshape(shape + value.shape[1:]) for name, value in values.items()}

    @torch.no_grad()
    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Compute log p(z | x) at values of all latents, ``(*sample_shape, *batch, *event)``.

        Return ``(*sample_shape, *units)``.

        Raises:
            ValueError: if a latent is missing, has another shape, or a value that is none of its states.
        """
        if values.keys() != self.support.keys():
            raise ValueError(f"`values` must have the latents {listed(list(self.support))}, got {listed(list(values))}")
        shapes = {}
        for name, latent in self._graph.latents.items():
            inner, shape = latent.batch_shape + latent.support.shape[1:], values[name].shape
            shapes[name] = shape[: len(shape) - len(inner)]
            if shape != shapes[name] + inner or shapes[name] != next(iter(shapes.values())):
                raise ValueError(f"`values` must end in the shape {tuple(inner)} at {name!r}, got {tuple(shape)}")
        sample_shape = next(iter(shapes.values()))
        flat = {name: values[name].reshape(-1, *values[name].shape[len(sample_shape) :]) for name in values}
        log_joint = self._graph.log_prob(self._graph.states(flat))
        log_prob = (log_joint - self.log_evidence).to(self._dtype)
        return log_prob.reshape(sample_shape + self.log_evidence.shape)
