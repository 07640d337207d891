"""Joint draws of latents and data from a model and guide, in chunks, with their log-densities."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae._utils.chunks import chunk_seed, rounds_of_chunks
from pyro_vae._utils.rng import reseed, seeded
from pyro_vae._utils.traces import latent_sites, log_density, observed_sites, summed_to
from pyro_vae._utils.typing import Function
from pyro_vae.distributions.properties import is_point
from pyro_vae.draws import PerDraw
from pyro_vae.exact.elimination import enumerated, log_marginal, sample_eliminated
from pyro_vae.handlers import ResampleObserved
from pyro_vae.inference_data.dims import parameters
from pyro_vae.inference_data.layouts import SiteLayout
from pyro_vae.inference_data.likelihood import PointwiseLikelihood
from pyro_vae.inference_data.predictions import Predictor
from pyro_vae.inference_data.settings import ExportSettings, as_array
from pyro_vae.model_guide import ModelGuide, check_same_latents

__all__ = ["Groups", "JointSampler", "Variable"]

_SHARED, _RATIO = "shared", " log p(θ) - log q(θ)"  # a group that is no part of the export, and a name in it
_PILOT = 200  # draws of the guide from which proposals are made
_CHUNK_BYTES = 2**26
_CHUNKS = 8  # at least, of draws that are made one by one
_WIDTH = 256  # numbers per datum that a network is assumed to hold at once

Groups = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Variable:
    """Shape and type of one draw of a variable."""

    shape: tuple[int, ...]
    dtype: np.dtype


class _Chunk(NamedTuple):
    """Some draws: their values, their weights p(x, θ) / q(θ), and the largest error of their likelihoods."""

    values: Groups
    log_weights: Tensor | None
    largest_error: float


class JointSampler:
    """Joint draws of latents and data from a model and guide on data.

    It runs the pair once, for its sites and the size of a draw, and leaves the random stream of the draws unchanged. It
    raises a TypeError or ValueError if model, guide and data do not fit each other.

    Discrete latents that the guide leaves out are drawn from their exact conditional, given the data and the draw of
    the guide, and summed out of the densities.

    Attributes:
        latents, deterministic, observed: the sites of these roles, by name, without the auxiliary latents of a guide.
        layouts: of the values of these sites.
        dtype: of log-densities.
        units: the plates that all sites share, in whose cells log-densities have values of their own.
        statistics: names of the log-densities that exist.
        variables: what is drawn, by group and name.
        predictor: at new arguments, if there are any.
        likelihood: of each observation at the latents that observations share.
        why_no_likelihood: why it is left out; empty if it is not.
        log_weights: of the draws of these latents so far, p(x, θ) / q(θ).
        nbytes: size of all draws.
    """

    def __init__(self, model: Function, guide: Function, data: tuple[Tensor, ...], settings: ExportSettings):
        self.settings, self._per_draw = settings, PerDraw()
        with seeded(settings.seed), poutine.block(), torch.no_grad():
            self.pair = pair = ModelGuide(model, guide, data, settings.plate, seed=None)
            settings.plate = pair.plate
            eliminated = {name: pair.latents[name] for name in pair.eliminated}
            check_same_latents(pair.required_latents, pair.guide_latents, more=True)
            self.latents, self.observed, self.deterministic = pair.guide_latents, pair.observed, pair.deterministic
            self.latents = self.latents | eliminated
            sites = self.latents | self.deterministic | self.observed
            self.layouts = {name: SiteLayout(site) for name, site in sites.items()}
            self._missing = {name: _missing(site) for name, site in self.observed.items()}
            self._generative = ResampleObserved()(pair.model)
            self._enumerated = enumerated(pair.model, eliminated, -1 - pair.max_plate_nesting) if eliminated else None
            self._eliminated: list[tuple[Tensor, dict[str, Tensor]]] = []  # for all draws at once
            self._elimination: Iterator[tuple[Tensor, dict[str, Tensor]]] | None = None  # of the draws of a chunk
            self.units = pair.units
            self.dtype = next((log_density(site).dtype for _, _, site in pair.sites), torch.get_default_dtype())
            self.statistics = self._find_statistics()
            new = settings.predictions
            self.predictor = None if new is None else Predictor(pair, new, settings.seed)
            self.likelihood = PointwiseLikelihood(pair, settings.local_draws)
            self.why_no_likelihood = self._why_no_likelihood()
            self._weighs_shared = self._has_density_of_shared()
            first = self._read(pair.guide_trace, pair.model_trace)
        self._drawn = _variables(first)
        self.log_weights: list[Tensor] = []
        shared = {name: value[None] for name, value in first.pop(_SHARED).items() if name in self.likelihood.shared}
        if shared:
            with seeded(settings.seed + 2), poutine.block(), torch.no_grad():
                self.likelihood.learn(self._pilot_draws())
                found = self.likelihood(shared)
                self.likelihood.largest_error = 0.0
            first["log_likelihood"] = {name: value[0] for name, value in found.items()}
        self.variables = _variables(first)
        self.nbytes = settings.draws * sum(value.nbytes for values in first.values() for value in values.values())

    @property
    def chunk(self) -> int:
        """Number of draws that take about 64 MiB together."""
        draws, activations = self.settings.draws, 4 * _WIDTH * self.pair.num_data
        # Draws that are made together save time; others are as fast in some chunks, which ranks share.
        most = draws if self.settings.parallel else -(-draws // _CHUNKS)
        return min(most, max(1, _CHUNK_BYTES // max(self.nbytes // draws, activations)))

    def empty(self, *lead: int) -> Groups:
        """Make an array ``(*lead, *shape)`` for each variable."""
        return _empty(self.variables, *lead)

    def chunks(self, size: int | None = None, on_first: bool = False) -> Iterator[tuple[slice, Groups]]:
        """Yield which draws, and their values ``(C, *shape)`` by group and name, on all ranks or on rank 0 alone.

        The random numbers of a draw come from the seed and its number, those of draws that are made together from that
        of the first one.
        """
        settings, size = self.settings, size or self.chunk
        self.log_weights = []
        with seeded(chunk_seed(settings.seed, settings.draws)):
            self._eliminated = self._eliminate_for_all()
        taken = [slice(first, min(first + size, settings.draws)) for first in range(0, settings.draws, size)]
        device, largest = self.pair.data[0].device, 0.0
        for draws, (values, weights, error) in rounds_of_chunks("draws", taken, self._chunk, device, on_first):
            if weights is not None:
                self.log_weights.append(weights)
            self.likelihood.largest_error = largest = max(largest, error)
            yield draws, values

    def _eliminate_for_all(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The draws of the eliminated latents, where all draws of the guide are the same; nothing elsewhere."""
        if not self._enumerated or self.settings.parallel or not self._has_constant_guide():
            return []
        with poutine.block(), torch.no_grad():
            q = poutine.trace(self.pair.guide).get_trace(*self.pair.data)
            return list(self._eliminate(q, self.settings.draws))

    def parametric_latents(self) -> dict[str, Any]:
        """Return the latents whose parameters depend on the data alone, and not on the draw of another latent."""
        of_guide = self.pair.guide_latents
        if self.pair.auxiliary:
            return {}
        with poutine.block(), torch.no_grad(), TrackProvenance():
            tracked = latent_sites(poutine.trace(self.pair.guide).get_trace(*self.pair.data))

        if lacking := [name for name in of_guide if name not in tracked]:
            raise _other_sites(lacking)

        def depends_on_draws(name: str) -> bool:
            first, second = parameters(of_guide[name]["fn"]), parameters(tracked[name]["fn"])
            return any(
                get_provenance(second[key]) & of_guide.keys()
                # Provenance is lost where the guide converts a draw to an array and back.
                or not torch.allclose(value, detach_provenance(second[key]), equal_nan=True)
                for key, value in first.items()
            )

        return {name: site for name, site in of_guide.items() if not depends_on_draws(name)}

    def _chunk(self, draws: slice) -> "_Chunk":
        """Make some draws, which depend on no others."""
        self.likelihood.largest_error = 0.0
        with seeded(self.settings.seed):
            values = self._drawn_together(draws) if self.settings.parallel else self._drawn_one_by_one(draws)
            shared = values.pop(_SHARED, {})
            if not self.likelihood.shared:
                return _Chunk(values, None, 0.0)
            values["log_likelihood"], weights = self._log_likelihood(shared, values)
        return _Chunk(values, weights, self.likelihood.largest_error)

    def _drawn_together(self, draws: slice) -> Groups:
        count = draws.stop - draws.start
        reseed(chunk_seed(self.settings.seed, draws.start))
        with poutine.block(), torch.no_grad():
            results = self._per_draw(lambda _: (self._draw_by_key(), None), count)
        return {
            group: {name: as_array(results.each((group, name), count)) for name in variables}
            for group, variables in self._drawn.items()
        }

    def _drawn_one_by_one(self, draws: slice) -> Groups:
        values = _empty(self._drawn, draws.stop - draws.start)
        self._elimination = iter(self._eliminated[draws]) if self._eliminated else None
        for place, number in enumerate(range(draws.start, draws.stop)):
            reseed(chunk_seed(self.settings.seed, number))
            with poutine.block():
                drawn = self._draw()
            for group, variables in self._drawn.items():
                for name in variables:
                    values[group][name][place] = as_array(drawn[group][name])
        return values

    def _draw_by_key(self) -> dict[Any, Tensor]:
        drawn = self._draw()
        return {(group, name): drawn[group][name] for group, variables in self._drawn.items() for name in variables}

    @torch.no_grad()
    def _draw(self) -> dict[str, dict[str, Tensor]]:
        """Draw everything once."""
        q = p = poutine.trace(self.pair.guide).get_trace(*self.pair.data)
        if not self._enumerated and (self.statistics or self.deterministic):
            p = poutine.trace(poutine.replay(self.pair.model, q)).get_trace(*self.pair.data)
        return self._read(q, p)

    def _read(self, q: Trace, p: Trace) -> dict[str, dict[str, Tensor]]:
        """Add draws of the eliminated latents, of new data, and of everything from the prior, to a draw of the guide.

        Args:
            q: the trace of the guide.
            p: that of the model at the same values.
        """
        lp, drawn = None, q
        if self._enumerated:
            lp, values = next(self._elimination) if self._elimination else next(self._eliminate(q, 1))
            drawn = with_values(q, values)
        new_data = poutine.trace(poutine.replay(self._generative, drawn)).get_trace(*self.pair.data)
        if self._enumerated and self.deterministic:
            p = poutine.trace(poutine.replay(self.pair.model, drawn)).get_trace(*self.pair.data)
        elif self._enumerated:  # the latents are the same there
            p = new_data
        prior = poutine.trace(self._generative).get_trace(*self.pair.data)
        sites = latent_sites(p) | observed_sites(p)
        if further := [name for name in sites if name not in self.layouts and name not in self.pair.auxiliary]:
            raise _other_sites(further)
        in_prior = [name for name in (*self.latents, *self.deterministic) if name in prior.nodes]
        return {
            "posterior": self._values(p, self.latents, q) | self._values(p, self.deterministic),
            "sample_stats": self._log_densities(q, p, lp),
            "prior": self._values(prior, in_prior),
            "posterior_predictive": self._values(new_data, self.observed),
            "prior_predictive": self._values(prior, self.observed),
            "predictions": self.predictor.draw({**q.nodes, **p.nodes}) if self.predictor else {},
            _SHARED: self._shared_values(q, p) if self.likelihood.shared else {},
        }

    def _shared_values(self, q: Trace, p: Trace) -> dict[str, Tensor]:
        """The values of the latents that observations share, and log p(θ) - log q(θ) if it is known."""
        nodes: dict[str, Any] = dict(p.nodes)
        found = {name: torch.as_tensor(nodes[name]["value"]) for name in self.likelihood.shared}
        if self._weighs_shared:
            ours = {name: nodes[name] for name in self.likelihood.shared}
            theirs = {name: site for name, site in latent_sites(q).items() if self._is_shared(site)}
            found[_RATIO] = _sum(ours) - _sum(theirs)
        return found

    def _log_likelihood(self, shared: dict[str, np.ndarray], values: Groups) -> tuple[dict[str, np.ndarray], Tensor]:
        """The likelihood of each observation for a chunk of draws, and the weights of these."""
        device = self.pair.data[0].device
        at = {name: torch.from_numpy(shared[name]).to(device) for name in self.likelihood.shared}
        with torch.no_grad():
            found = {name: value.cpu() for name, value in self.likelihood(at).items()}
        if self._weighs_shared:
            terms = [value.reshape(len(value), -1).sum(1) for value in found.values()]
            log_weights = torch.from_numpy(shared[_RATIO]) + torch.stack(terms).sum(0)
        elif "log_weight" in self.statistics:
            weights = torch.from_numpy(values["sample_stats"]["log_weight"])
            log_weights = weights.reshape(len(weights), -1).sum(1)
        else:  # the guide draws none of the latents
            log_weights = torch.zeros(len(next(iter(found.values()))), dtype=torch.float64, device="cpu")
        return {name: value.numpy() for name, value in found.items()}, log_weights

    def _pilot_draws(self) -> dict[str, Tensor]:
        """Some draws of the latents of each observation."""
        names = self.likelihood.sampled
        if not names:
            return {}

        def run(_: Any) -> tuple[dict[Any, Tensor], None]:
            nodes: dict[str, Any] = dict(poutine.trace(self.pair.guide).get_trace(*self.pair.data).nodes)
            return {name: nodes[name]["value"] for name in names}, None

        results = PerDraw()(run, _PILOT)
        return {name: results.each(name, _PILOT) for name in names}

    def _why_no_likelihood(self) -> str:
        """Why there is no likelihood for leave-one-out; it is then not computed."""
        why, pair = self.likelihood.why_not, self.pair
        if not why and "lp" not in self.statistics:
            why = "left out: the likelihood is no normalised density"
        if not why and pair.guide_latents and "log_weight" not in self.statistics:
            what = f"a point for {pair.points}" if pair.points else "no density of the model's latents"
            why = f"left out: the guide has {what}, so that its draws are no posterior"
        if why:
            self.likelihood.parts, self.likelihood.shared = [], []
        return why

    def _has_density_of_shared(self) -> bool:
        """Whether q(θ) of the shared latents is known: a guide draws them first, and by themselves.

        Their weights p(x, θ) / q(θ) vary less than those of all latents.
        """
        shared, sites = self.likelihood.shared, latent_sites(self.pair.guide_trace)
        local = [name for name, site in sites.items() if not self._is_shared(site)]
        if not shared or not local or set(shared) & set(self.pair.eliminated) or self.pair.factors:
            return False
        if list(sites)[-len(local) :] != local and not self.pair.auxiliary:
            return False
        for is_local in (True, False):
            mine = [(name, site) for name, site in sites.items() if (name in local) is is_local]
            auxiliary = sum(site["value"].numel() for name, site in mine if name in self.pair.auxiliary)
            points = sum(site["value"].numel() for name, site in mine if is_point(site["fn"]))
            if auxiliary != points:
                return False
        return "log_weight" in self.statistics

    def _is_shared(self, site: dict[str, Any]) -> bool:
        names = {frame.name for frame in site["cond_indep_stack"]}
        return not any(part.local and names >= {frame.name for frame in part.plates} for part in self.likelihood.parts)

    def _values(self, trace: Trace, names: Iterable[str], other: Trace | None = None) -> dict[str, Tensor]:
        """The values of sites, arranged; of a latent that the model does not have, those in another trace."""
        nodes: dict[str, Any] = {**(other.nodes if other else {}), **trace.nodes}
        if lacking := [name for name in names if name not in nodes]:
            raise _other_sites(lacking)
        return {name: self.layouts[name].values(nodes[name], self._missing.get(name)) for name in names}

    def _eliminate(self, q: Trace, count: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield the log-density without the eliminated latents, and draws of these, at one draw of the guide."""
        assert self._enumerated is not None
        trace = poutine.trace(poutine.replay(self._enumerated, q)).get_trace(*self.pair.data)
        lp, values = log_marginal(trace, self.units), sample_eliminated(trace, count)
        for number in range(count):
            yield lp, {name: value[number] for name, value in values.items()}

    def _has_constant_guide(self) -> bool:
        """Whether all draws of the guide are the same: it draws nothing, or points."""
        return all(is_point(site["fn"]) for site in latent_sites(self.pair.guide_trace).values())

    def _log_densities(self, q: Trace, p: Trace, lp: Tensor | None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if "lp" in self.statistics:
            found["lp"] = self._total(latent_sites(p) | observed_sites(p)) if lp is None else lp
        if "log_q" in self.statistics:
            found["log_q"] = self._total(latent_sites(q) | observed_sites(q))  # with factors of the change of volume
        if "log_weight" in self.statistics:
            found["log_weight"] = found["lp"] - found["log_q"]
        return found

    def _total(self, sites: dict[str, Any]) -> Tensor:
        """Sum over sites and plates, for each cell of the units; the sum of all data in double precision."""
        terms = [log_density(site) for site in sites.values()]
        terms = [summed_to(term if self.units else term.double(), self.units) for term in terms]
        return sum(terms[1:], terms[0])

    def _find_statistics(self) -> tuple[str, ...]:
        """Name the log-densities that exist; a weight is a ratio of two over the same latents."""
        pair = self.pair
        exists = {
            "lp": bool(self.observed) and _passes(pair.check_likelihood) and _passes(pair.check_kinds),
            "log_q": bool(pair.guide_latents) and not pair.points and (bool(pair.auxiliary) or not pair.factors),
        }
        exists["log_weight"] = exists["lp"] and exists["log_q"] and _passes(pair.check_density)
        return tuple(name for name, found in exists.items() if found)


def _passes(check: Callable[[], None]) -> bool:
    try:
        check()
    except ValueError:
        return False
    return True


def _variables(values: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Variable]]:
    """Shapes and types of what one draw has, in groups that are not empty."""
    return {
        group: {name: Variable(tuple(value.shape), as_array(value).dtype) for name, value in of.items()}
        for group, of in values.items()
        if of
    }


def _empty(variables: dict[str, dict[str, Variable]], *lead: int) -> Groups:
    return {
        group: {name: np.empty((*lead, *variable.shape), variable.dtype) for name, variable in of.items()}
        for group, of in variables.items()
    }


def _sum(sites: dict[str, Any]) -> Tensor:
    return torch.stack([log_density(site).double().sum() for site in sites.values()]).sum()


def _other_sites(names: list[str]) -> ValueError:
    return ValueError(
        f"`model` and `guide` must have the same sites in each run, got runs with and without {names}: a variable of "
        "the tree has a value for each draw. Give such a site a value in each run, and mask it where it does not "
        "count, `poutine.mask(mask=...)`; its values are NaN there"
    )


def with_values(trace: Trace, values: dict[str, Tensor]) -> Trace:
    """Return a trace to replay with the values of further latents."""
    trace = trace.copy()
    for name, value in values.items():
        if name not in trace.nodes:
            trace.add_node(name, name=name, type="sample", is_observed=False, value=value, infer={})
    return trace


def _missing(site: dict[str, Any]) -> Tensor | None:
    """Where data are missing: NaN, which a new draw replaces."""
    value = torch.as_tensor(site["value"])
    return value.isnan() if value.is_floating_point() else None
