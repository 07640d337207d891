r"""The log-likelihood of each observation at draws of the latents that observations share, for leave-one-out.

An observation is a cell of the plates that the observed sites share; where latents are local to the data plate but not
to all of these, it is a datum. Its latents are those that have a value for each of these cells; all others,
:math:`\theta`, are shared. The likelihood for leave-one-out is marginal over the
latents of the observation,

.. math:: p(x_i \mid \theta) = \int p(x_i, z_i \mid \theta)\,dz_i,

since :math:`z_i` is known from :math:`x_i` alone, and nothing is left to know it from where :math:`x_i` is left out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import StudentT, biject_to

from pyro_vae._utils.traces import PARTICLES, log_density, masked, shared_plates, summed_to
from pyro_vae.distributions.properties import is_discrete, is_point
from pyro_vae.draws import PerDraw
from pyro_vae.exact.elimination import FactorGraph, enumerated, read_factors
from pyro_vae.inference_data.layouts import counted_cells, vectorized_frames
from pyro_vae.model_guide import ModelGuide

__all__ = ["JOINT", "Observations", "PointwiseLikelihood", "resampled"]

JOINT = "observed"
"""The name of the likelihood of several observed sites together."""

Site = dict[str, Any]
Sites = Mapping[str, Site]
Values = dict[str, Tensor]

_BUDGET = 2**22  # numbers in the tensors of a chunk
_FEW = 10  # draws of local latents where the model must run once for each
_FREEDOM = 5.0  # of Student's t, whose tails are heavier than those of a likelihood


@dataclass(frozen=True)
class Observations:
    """Observed sites that are left out together.

    Attributes:
        name: of their likelihood: the site, or :data:`JOINT` for several.
        sites: the observed sites.
        plates: the plates of which each cell is an observation.
        local: the latents that have a value for each observation.
        counted: which cells are observed, ``(cells)``, numbered from left to right; ``None`` if all are.
    """

    name: str
    sites: tuple[str, ...]
    plates: tuple[CondIndepStackFrame, ...]
    local: tuple[str, ...]
    counted: Tensor | None


class PointwiseLikelihood:
    r"""log p(x_i | θ) of each observation, at any values of the latents that observations share.

    Latents of an observation that can be enumerated are summed out exactly, others by importance sampling, with half of
    the draws from their prior :math:`p(z_i \mid \theta)`, half from Student's t with the mean and standard deviation of
    their posterior, in unconstrained coordinates, and weights of the mixture of both. Where draws of a prior cannot be
    made together, all come from Student's t.

    Source: Magnusson, Andersen, Jonasson and Vehtari 2019, "Bayesian leave-one-out cross-validation for large data";
    Merkle, Furr and Rabe-Hesketh 2019, "Bayesian comparison of latent variable models", for marginal likelihoods.

    Args:
        pair: a model on its data.
        num_local: the number of draws of the latents of an observation.

    Attributes:
        parts: what is left out together; none if there is nothing to leave out.
        why_not: the reason then.
        shared: the names of the shared latents.
        sampled: the names of the latents that are integrated by importance sampling.
    """

    def __init__(self, pair: ModelGuide, num_local: int):
        self.pair, self.num_local = pair, num_local
        self.parts, self.why_not = _observations(pair.latents, pair.observed, pair.plate)
        local = {name for part in self.parts for name in part.local}
        self.shared = [name for name in pair.latents if name not in local]
        if self.parts and not self.shared:
            self.parts, self.why_not = [], _all_local(pair.latents)
        if not self.parts:
            local, self.shared = set(), []
        local = {name for name in local if not is_point(pair.latents[name]["fn"])}
        sites = {name: pair.latents[name] for name in pair.latents if name in local}
        summed = [name for name, site in sites.items() if site["fn"].has_enumerate_support]
        self.sampled = [name for name in sites if name not in summed]
        self._proposed = [name for name in self.sampled if not is_discrete(sites[name]["fn"])]
        self._model = enumerated(pair.model, summed, -1 - pair.max_plate_nesting) if summed else pair.model
        self._sums = bool(summed)
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._runs = PerDraw()
        self._mixes = True  # draws from the prior with those of Student's t
        self.largest_error = 0.0

    @property
    def repeats(self) -> int:
        """The number of draws of the latents of an observation for each draw of the shared ones."""
        if not self.sampled:
            return 1
        return min(self.num_local, _FEW) if self._runs.loops else self.num_local

    def learn(self, draws: Values) -> None:
        """Take mean and standard deviation of the latents of each observation from draws of their posterior."""
        for name in self._proposed:
            value = draws[name]
            free = biject_to(self.pair.latents[name]["fn"].support).inv(value)
            low, high = -1e6, 1e6
            free = free.nan_to_num(0.0, high, low).clamp(low, high)
            scale = free.std(0) if len(free) > 1 else torch.ones_like(free[0])
            self._moments[name] = free.mean(0), scale.clamp(min=1e-6)

    def __call__(self, shared: Values) -> Values:
        """Compute the log-likelihoods of C draws of the shared latents, ``(C, *cells)`` by name, in float64."""
        self._find_proposal(shared)
        count, repeats = len(next(iter(shared.values()))), self.repeats
        sites = (self.pair.latents | self.pair.observed).values()
        width = sum(torch.as_tensor(site["value"]).numel() for site in sites)
        size = max(1, _BUDGET // (max(64, width) * repeats))
        found = [
            self._chunk({name: value[first : first + size] for name, value in shared.items()})
            for first in range(0, count, size)
        ]
        return {part.name: torch.cat([of[part.name] for of in found]) for part in self.parts}

    def _find_proposal(self, shared: Values) -> None:
        """Leave the prior out of the proposal where its draws cannot be made together by ``torch.vmap``."""
        if not self._mixes or self._proposed != self.sampled or not self.sampled:
            return
        if not self._runs.loops:
            self._chunk({name: value[:1] for name, value in shared.items()})
        if self._runs.loops:
            self._mixes, self._runs = False, PerDraw()
            self._chunk({name: value[:1] for name, value in shared.items()})

    def _chunk(self, shared: Values) -> Values:
        count, repeats = len(next(iter(shared.values()))), self.repeats
        inputs = {("shared", name): value.repeat_interleave(repeats, 0) for name, value in shared.items()}
        for name, (loc, scale) in self._moments.items():
            inputs["free", name] = StudentT(_FREEDOM, loc, scale).sample((count * repeats,))
        if self.sampled and self._mixes:
            inputs["prior", ""] = torch.arange(count * repeats, device=self.pair.data[0].device) % 2 == 0

        def run(values: Any) -> tuple[dict[Any, Tensor], None]:
            with torch.no_grad():
                return self._log_weights(values), None

        with poutine.block():
            results = self._runs(run, count * repeats, inputs)  # type: ignore[arg-type]
        reduced = {}
        for part in self.parts:
            weights = results.each(part.name, count * repeats).double()
            weights = weights.reshape(count, repeats, -1)
            if part.counted is not None:
                weights = weights[..., part.counted]
            reduced[part.name] = weights.logsumexp(1) - math.log(repeats)
            if self.sampled and weights.numel():
                ess = (2 * weights.logsumexp(1) - (2 * weights).logsumexp(1)).exp()
                error = (1 / ess - 1 / repeats).clamp(min=0).mean(0).max().sqrt()
                self.largest_error = max(self.largest_error, float(error))
            if part.counted is None:
                reduced[part.name] = reduced[part.name].reshape(count, *(frame.size for frame in part.plates))
        return reduced

    def _log_weights(self, values: dict[tuple[str, str], Tensor]) -> dict[Any, Tensor]:
        """log p(x_i, z_i | θ) - log r(z_i) of each observation at one draw; log p(x_i | θ) if nothing is drawn."""
        of = {kind: {name: value for (group, name), value in values.items() if group == kind} for kind in _KINDS}
        data, shared = self.pair.data, of["shared"]
        if not self.sampled:
            trace = poutine.trace(poutine.condition(self._model, data=shared)).get_trace(*data)
            return {part.name: self._total(trace, part, (*part.sites, *part.local)).flatten() for part in self.parts}
        proposal = _Proposal(of["free"], self._moments, of["prior"].get(""))
        with proposal:
            drawn = poutine.trace(poutine.condition(self.pair.model, data=shared)).get_trace(*data)
        trace = drawn
        if self._sums:
            nodes: dict[str, Any] = dict(drawn.nodes)
            at = shared | {name: nodes[name]["value"] for name in self.sampled}
            trace = _unobserved(poutine.trace(poutine.condition(self._model, data=at)).get_trace(*data), self.sampled)
        found = {}
        for part in self.parts:
            joint = self._total(trace, part, (*part.sites, *part.local))
            if terms := [self._log_proposal(drawn, proposal, name) for name in part.local if name in self.sampled]:
                log_r: Any = sum(summed_to(term, part.plates) for term in terms)
                if self._mixes:
                    log_prior = self._total(trace, part, part.local)
                    log_r = torch.logaddexp(log_prior, log_r.to(log_prior.dtype)) - math.log(2)
                joint = joint - log_r
            found[part.name] = joint.flatten()
        return found

    def _total(self, trace: Trace, part: Observations, names: Sequence[str]) -> Tensor:
        """Sum the densities of sites to the cells of observations, and over the states of enumerated latents."""
        nodes: dict[str, Any] = dict(trace.nodes)
        if not self._sums:
            return torch.stack([summed_to(log_density(nodes[name]), part.plates) for name in names]).sum(0)
        some = Trace()
        for name in names:
            some.nodes[name] = nodes[name]
        return FactorGraph(read_factors(some), [frame.name for frame in part.plates]).log_sum()

    @staticmethod
    def _log_proposal(drawn: Trace, proposal: "_Proposal", name: str) -> Tensor:
        site: Any = drawn.nodes[name]
        return proposal.log_probs.get(name, log_density(site))


_KINDS = ("shared", "free", "prior")


class _Proposal(Messenger):
    """Draw latents from their prior or, without one or where it is not wanted, take unconstrained coordinates.

    Attributes:
        log_probs: the log-density of Student's t at each value, whichever it comes from.
    """

    def __init__(self, free: Values, moments: Mapping[str, tuple[Tensor, Tensor]], from_prior: Tensor | None):
        super().__init__()
        self._free, self._moments, self._from_prior = free, moments, from_prior
        self.log_probs: Values = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._free and self._from_prior is None:
            msg["value"], msg["done"] = biject_to(msg["fn"].support)(self._free[msg["name"]]), True

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self._free:
            return
        transform = biject_to(msg["fn"].support)
        if self._from_prior is not None:
            msg["value"] = torch.where(self._from_prior, msg["value"], transform(self._free[name]))
        free = transform.inv(msg["value"])
        loc, scale = self._moments[name]
        num_batch = msg["value"].dim() - msg["fn"].event_dim
        log_prob = StudentT(_FREEDOM, loc, scale, validate_args=False).log_prob(free)
        volume = transform.log_abs_det_jacobian(free, msg["value"])
        log_prob = sum_rightmost(log_prob, log_prob.dim() - num_batch)
        log_prob = log_prob - sum_rightmost(volume, volume.dim() - num_batch)
        counted = counted_cells({**msg, "mask": None})
        if counted is not None:
            counted = counted.expand(msg["value"].shape).reshape(*msg["value"].shape[:num_batch], -1).all(-1)
            log_prob = torch.where(counted, log_prob, 0.0)
        self.log_probs[name] = masked(log_prob, msg)


def _unobserved(trace: Trace, names: Sequence[str]) -> Trace:
    """Return a trace whose latents, conditioned on values, are latents again."""
    for name in names:
        trace.nodes[name]["is_observed"] = False
    return trace


def _observations(latents: Sites, observed: Sites, data_plate: str) -> tuple[list[Observations], str]:
    """Find what is left out together, and why nothing is."""
    plates = {name: _plates(site) for name, site in (*latents.items(), *observed.items())}
    if not latents or not observed:
        return [], "left out: leave-one-out needs latents and observed sites"
    if without := [name for name in observed if not plates[name]]:
        return [], (
            f"left out: the observed sites {without} are in no plate, and a plate declares which observations are "
            "independent given the shared latents and can be left out"
        )
    found = []
    for number, names in enumerate(_connected({name: plates[name] for name in observed})):
        shared = shared_plates(observed[name] for name in names)
        common = {frame.name for frame in shared}
        if data_plate in common:  # a datum is left out where latents are local to it
            common = common.intersection(*(own for name in latents if data_plate in (own := plates[name])))
        shared = tuple(frame for frame in shared if frame.name in common)
        if not shared:
            return [], (
                f"left out: the observed sites {names} have no plate in common, and so no cells that can be left out "
                "one by one"
            )
        local = [name for name in latents if common <= plates[name]]
        joint = JOINT if not number else f"{JOINT}_{number}"
        name = names[0] if len(names) == 1 else joint
        found.append(Observations(name, tuple(names), shared, tuple(local), _counted(observed, names, shared)))
    return found, ""


def _connected(plates: dict[str, frozenset[str]]) -> list[list[str]]:
    """Split sites into those that are connected by common plates."""
    parts: list[tuple[list[str], frozenset[str]]] = []
    for name, own in plates.items():
        near = [part for part in parts if part[1] & own]
        names = [other for part in near for other in part[0]]
        parts = [part for part in parts if part not in near]
        parts.append(([*names, name], own.union(*(part[1] for part in near))))
    return [names for names, _ in parts]


def _plates(site: Site) -> frozenset[str]:
    return frozenset(frame.name for frame in vectorized_frames(site)) - {PARTICLES}


def _counted(observed: Sites, names: Sequence[str], plates: Sequence[CondIndepStackFrame]) -> Tensor | None:
    """Which cells have an observed value; ``None`` if all have."""
    total: Any = 0.0
    for name in names:
        site = observed[name]
        num_batch = log_density(site).dim()
        counted = counted_cells(site)
        fn = site["fn"]
        shape = torch.broadcast_shapes(torch.as_tensor(site["value"]).shape, fn.batch_shape + fn.event_shape)
        counted = torch.ones(shape, device="cpu") if counted is None else counted.expand(shape).double().cpu()
        counted = counted.reshape(*shape[:num_batch], -1).sum(-1)
        total = total + summed_to(counted, plates)
    counted = (total > 0).flatten()
    return None if counted.all() else counted


def _all_local(latents: Sites) -> str:
    return (
        f"left out: each of the latents {list(latents)} belongs to one observation, and log p(x | z) of such a latent "
        "is no likelihood for leave-one-out; compare models by log p(x) of held-out data, pv.compare_evidence"
    )


def resampled(log_weights: Tensor, seed: int) -> Tensor:
    """Return the numbers of draws that represent the target of importance weights, as many as there are weights.

    Weights are truncated at their mean times the root of their number; the draws are a systematic sample, so that equal
    weights take each draw once.

    Source: Ionides 2008, "Truncated importance sampling"; Kitagawa 1996, "Monte Carlo filter and smoother", section
    A.1.

    >>> resampled(torch.zeros(3), seed=0)
    tensor([0, 1, 2])
    >>> resampled(torch.tensor([0.0, -1e3, 0.0, -1e3]), seed=0)
    tensor([0, 0, 2, 2])
    """
    count = len(log_weights)
    weights = (log_weights.double() - log_weights.max()).exp()
    weights = weights.clamp(max=float(weights.mean()) * count**0.5)
    ends = weights.cumsum(0) / weights.sum()
    start = torch.rand((), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu")
    places = (torch.arange(count, dtype=torch.float64, device="cpu") + start) / count
    return torch.searchsorted(ends.cpu(), places).clamp(max=count - 1)
