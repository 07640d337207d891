"""Joint draws of latents and data from a model and guide, in chunks, with their log-densities."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import latent_sites, log_density, observed_sites
from pyro_vae._utils.typing import Function
from pyro_vae.draws import PerDraw
from pyro_vae.handlers import ResampleObserved
from pyro_vae.inference_data.dims import parameters, plates_and_event
from pyro_vae.inference_data.settings import ExportSettings, as_array
from pyro_vae.model_guide import ModelGuide, check_same_latents

__all__ = ["Groups", "JointSampler", "Variable"]

_CHUNK_BYTES = 2**26
_WIDTH = 256  # numbers per datum that a network is assumed to hold at once

Groups = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Variable:
    """Shape and type of one draw of a variable."""

    shape: tuple[int, ...]
    dtype: np.dtype


class JointSampler:
    """Joint draws of latents and data from a model and guide on data.

    It runs the pair once, for its sites and the size of a draw, and leaves the random stream of the draws unchanged. It
    raises a TypeError or ValueError if model, guide and data do not fit each other.

    Attributes:
        latents, deterministic, observed: the sites of these roles, by name, without the auxiliary latents of a guide.
        by_datum: whether all sites are in the data plate, and log-densities are ``(N)``; else they are of all data.
        statistics: names of the log-densities that exist.
        variables: what is drawn, by group and name.
        nbytes: size of all draws.
    """

    def __init__(self, model: Function, guide: Function, data: tuple[Tensor, ...], settings: ExportSettings):
        self.settings, self._per_draw = settings, PerDraw()
        with seeded(settings.seed), poutine.block(), torch.no_grad():
            self.pair = pair = ModelGuide(model, guide, data, settings.plate, seed=None)
            settings.plate = pair.plate
            pair.check_data_plate(every_site=False)
            check_same_latents(pair.latents, pair.guide_latents, more=True)
            pair.check_factors()
            self.latents, self.observed, self.deterministic = pair.guide_latents, pair.observed, pair.deterministic
            self._generative = ResampleObserved()(pair.model)
            self.by_datum = all(pair.is_local(site) for _, _, site in pair.sites)
            self.statistics = self._find_statistics()
            first = self._with_redraws(pair.guide_trace, pair.model_trace)
        self.variables = {
            group: {name: self._variable(group, name, value) for name, value in values.items()}
            for group, values in first.items()
            if values
        }
        self.nbytes = settings.draws * sum(value.nbytes for values in first.values() for value in values.values())

    @property
    def chunk(self) -> int:
        """Number of draws that take about 64 MiB together."""
        draws, activations = self.settings.draws, 4 * _WIDTH * self.pair.num_data
        return min(draws, max(1, _CHUNK_BYTES // max(self.nbytes // draws, activations)))

    def empty(self, *lead: int) -> Groups:
        """Make an array ``(*lead, *shape)`` for each variable."""
        return {
            group: {name: np.empty((*lead, *variable.shape), variable.dtype) for name, variable in variables.items()}
            for group, variables in self.variables.items()
        }

    def chunks(self, size: int | None = None) -> Iterator[tuple[slice, Groups]]:
        """Yield which draws, and their values ``(C, *shape)`` by group and name, from the current random stream."""
        size = size or self.chunk
        for first in range(0, self.settings.draws, size):
            count = min(size, self.settings.draws - first)
            yield slice(first, first + count), self._chunk(count)

    def parametric_latents(self) -> dict[str, Any]:
        """Return the latents whose parameters depend on the data alone, and not on the draw of another latent."""
        if self.pair.auxiliary:
            return {}
        with poutine.block(), torch.no_grad(), TrackProvenance():
            tracked = latent_sites(poutine.trace(self.pair.guide).get_trace(*self.pair.data))

        def depends_on_draws(name: str) -> bool:
            first, second = parameters(self.latents[name]["fn"]), parameters(tracked[name]["fn"])
            return any(
                get_provenance(second[key]) & self.latents.keys()
                # Provenance is lost where the guide converts a draw to an array and back.
                or not torch.allclose(value, detach_provenance(second[key]), equal_nan=True)
                for key, value in first.items()
            )

        return {name: site for name, site in self.latents.items() if not depends_on_draws(name)}

    def _chunk(self, count: int) -> Groups:
        if self.settings.parallel:
            with poutine.block(), torch.no_grad():
                results = self._per_draw(lambda _: (self._draw_by_key(), None), count)
            return {
                group: {name: as_array(results.each((group, name), count)) for name in variables}
                for group, variables in self.variables.items()
            }
        values = self.empty(count)
        for number in range(count):
            with poutine.block():
                drawn = self._draw()
            for group, variables in self.variables.items():
                for name, variable in variables.items():
                    values[group][name][number] = as_array(drawn[group][name]).reshape(variable.shape)
        return values

    def _draw_by_key(self) -> dict[Any, Tensor]:
        drawn = self._draw()
        return {
            (group, name): drawn[group][name].reshape(variable.shape)
            for group, variables in self.variables.items()
            for name, variable in variables.items()
        }

    @torch.no_grad()
    def _draw(self) -> dict[str, dict[str, Tensor]]:
        """Draw everything once."""
        q = p = poutine.trace(self.pair.guide).get_trace(*self.pair.data)
        if self.statistics or self.deterministic:
            p = poutine.trace(poutine.replay(self.pair.model, q)).get_trace(*self.pair.data)
        return self._with_redraws(q, p)

    def _with_redraws(self, q: Trace, p: Trace) -> dict[str, dict[str, Tensor]]:
        """Add draws of new data, and of everything from the prior, to a draw of the guide that the model scored."""
        new_data = poutine.trace(poutine.replay(self._generative, q)).get_trace(*self.pair.data)
        prior = poutine.trace(self._generative).get_trace(*self.pair.data)
        in_prior = [name for name in (*self.latents, *self.deterministic) if name in prior.nodes]
        return {
            "posterior": _values_of(q, self.latents) | _values_of(p, self.deterministic),
            "sample_stats": self._log_densities(q, p),
            "prior": _values_of(prior, in_prior),
            "posterior_predictive": _values_of(new_data, self.observed),
            "prior_predictive": _values_of(prior, self.observed),
        }

    def _log_densities(self, q: Trace, p: Trace) -> dict[str, Tensor]:
        sites = {"lp": latent_sites(p) | observed_sites(p), "log_q": latent_sites(q)}
        found = {name: self._log_density(of) for name, of in sites.items() if name in self.statistics}
        if "log_weight" in self.statistics:
            found["log_weight"] = found["lp"] - found["log_q"]
        return found

    def _log_density(self, sites: dict[str, Any]) -> Tensor:
        """Sum over sites and plates; keep the data plate if every site is in it."""
        total: Any = 0.0
        for site in sites.values():
            term = log_density(site) if self.by_datum else log_density(site).double()
            kept = {
                frame.dim for frame in site["cond_indep_stack"] if self.by_datum and frame.name == self.settings.plate
            }
            summed = [dim for dim in range(-term.dim(), 0) if dim not in kept]
            total = total + (term.sum(summed) if summed else term)
        return total

    def _find_statistics(self) -> tuple[str, ...]:
        """Name the log-densities that exist; a weight is a ratio of two over the same latents."""
        exists = {
            "lp": bool(self.observed) and _passes(self.pair.check_likelihood) and _passes(self.pair.check_kinds),
            "log_q": bool(self.latents) and not self.pair.points,
        }
        exists["log_weight"] = exists["lp"] and exists["log_q"] and _passes(self.pair.check_density)
        return tuple(name for name, found in exists.items() if found)

    def _variable(self, group: str, name: str, value: Tensor) -> Variable:
        shape = tuple(value.shape)
        if group != "sample_stats":
            site = (self.latents | self.deterministic | self.observed)[name]
            plates, event_shape = plates_and_event(site)
            shape = (*plates.values(), *event_shape)
        return Variable(shape, as_array(value).dtype)


def _passes(check: Callable[[], None]) -> bool:
    try:
        check()
    except ValueError:
        return False
    return True


def _values_of(trace: Trace, names: Iterable[str]) -> dict[str, Tensor]:
    nodes: dict[str, Any] = dict(trace.nodes)
    return {name: nodes[name]["value"] for name in names}
