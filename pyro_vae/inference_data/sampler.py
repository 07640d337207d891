"""Draws of a model and guide in chunks, with their log-densities: what becomes a tree in memory or a file."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro import poutine
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import deterministic_sites, guide_sites, latent_sites, log_density, observed_sites
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import data_tensors, positive_int
from pyro_vae.distributions.missing import check_missing
from pyro_vae.distributions.properties import base_distribution, is_normalized
from pyro_vae.handlers import ResampleObserved
from pyro_vae.inference_data.dims import DimensionNames, parameters

__all__ = ["Groups", "JointSampler", "Variable"]

_CHUNK_BYTES = 2**26


_WIDTH = 256  # numbers of a datum that a network may hold on the way


_DRAWS = "num_draws"


Groups = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Variable:
    """A variable that is drawn: dimensions and sizes without chain and draw."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    attrs: dict[str, str] = field(default_factory=dict)


class JointSampler:
    """A model and guide on data, checked and named, from which draws are taken.

    One draw is made beforehand, for names and sizes; it leaves the stream of the others alone. Then ``permit`` is
    called, to raise where there are too many bytes; only after it is anything made whose size grows with the draws.

    Attributes:
        names: of all dimensions.
        variables: what is drawn, by group and name.
        draws: number of draws.
        nbytes: of all draws.
        statistics: the names of the log-densities that are densities.
        settled: the groups that have no draws.
    """

    def __init__(
        self,
        model: Function,
        guide: Function,
        data: tuple[Tensor, ...],
        draws: int,
        seed: int,
        plate: str,
        dims: Mapping[str, Sequence[str]],
        coords: Mapping[str, Any],
        history: Mapping[str, Sequence[float]],
        constants: Mapping[str, Any],
        parallel: bool,
        check_size: Callable[["JointSampler"], None],
    ):
        self.draws = positive_int(draws, "draws")
        self.data = data_tensors(data, "data")
        self.model, self.guide, self.generative = model, guide, ResampleObserved()(model)
        self.seed, self.plate, self.parallel = seed, plate, parallel
        constants = {name: _constant(name, value) for name, value in constants.items()}
        epochs = {name: _epochs(name, value) for name, value in history.items()}
        with seeded(seed), poutine.block(), torch.no_grad():
            q = poutine.trace(guide).get_trace(*self.data)
            self.latents = _not_auxiliary(guide_sites(q))
            try:
                p = poutine.trace(poutine.replay(model, q)).get_trace(*self.data)
            except (ValueError, RuntimeError) as error:
                raise ValueError(
                    "`guide` must be a guide of this model: the model does not run on its draws of "
                    f"{list(self.latents)}, of the event shapes {[tuple(site['fn'].event_shape) for site in self.latents.values()]}. "
                    f"It says: {error}"
                ) from error
            self.observed = observed_sites(p)
            check_missing(self.observed.values(), self.data, "data")
            _check_latents(latent_sites(p), self.latents)
            _check_plate(plate, q, p)
            self.deterministic = deterministic_sites(p)
            self._nesting = _nesting(q, p)
            self._by_datum = all(
                any(frame.name == plate and frame.vectorized for frame in site["cond_indep_stack"])
                for trace in (q, p)
                for site in (latent_sites(trace) | observed_sites(trace)).values()
            )
            self.statistics = self._densities(q, p)
        with seeded(seed):
            first = self._draw(None)
        self.nbytes = draws * sum(value.nbytes for values in first.values() for value in values.values())
        check_size(self)
        self.names = DimensionNames(
            self.latents | self.deterministic, self.observed, plate, dims, coords, draws, constants, epochs
        )
        self.variables = self._described(first)
        with seeded((seed + 1) % 2**32):  # other draws than those above, from which they are to be told
            parametric = {} if len(self.latents) < len(latent_sites(q)) else _given_data(self.latents, guide, self.data)
        self.static_groups: dict[str, xr.Dataset] = {
            "observed_data": self.names.dataset({name: _array(site["value"]) for name, site in self.observed.items()}),
            "constant_data": self.names.dataset(constants),
            "guide": self.names.guide(parametric),
            "training": self.names.training(epochs),
        }

    @property
    def chunk(self) -> int:
        """How many draws at a time take about 64 MiB."""
        passing = 4 * _WIDTH * len(self.data[0])
        return min(self.draws, max(1, _CHUNK_BYTES // max(self.nbytes // self.draws, passing)))

    def chunks(self, size: int | None = None) -> Iterator[tuple[slice, Groups]]:
        """Which draws, and their values ``(C, *shape)`` by group and name, under the seed."""
        size = size or self.chunk
        with torch.no_grad():
            for first in range(0, self.draws, size):
                count = min(size, self.draws - first)
                yield slice(first, first + count), self._chunk(count)

    def _chunk(self, count: int) -> Groups:
        if self.parallel:
            drawn = self._draw(count)
            return {
                group: {name: _array(_beside(drawn[group][name], count, of.shape)) for name, of in variables.items()}
                for group, variables in self.variables.items()
            }
        taken: Groups = {
            group: {name: np.empty((count, *of.shape), of.dtype) for name, of in variables.items()}
            for group, variables in self.variables.items()
        }
        for number in range(count):
            drawn = self._draw(None)
            for group, variables in self.variables.items():
                for name, of in variables.items():
                    taken[group][name][number] = _array(drawn[group][name]).reshape(of.shape)
        return taken

    @torch.no_grad()
    def _draw(self, count: int | None) -> dict[str, dict[str, Tensor]]:
        """One draw of everything; or some beside each other, in a plate on the left."""
        beside = nullcontext() if count is None else pyro.plate(_DRAWS, count, dim=-1 - self._nesting)
        with poutine.block(), beside:
            q = poutine.trace(self.guide).get_trace(*self.data)
            given_q = poutine.trace(poutine.replay(self.generative, q)).get_trace(*self.data)
            on_data = given_q
            if self.statistics or self.deterministic:
                on_data = poutine.trace(poutine.replay(self.model, q)).get_trace(*self.data)
            p = poutine.trace(self.generative).get_trace(*self.data)
        unobserved = (*self.latents, *self.deterministic)
        in_prior = [name for name in unobserved if name in p.nodes]
        return {
            "posterior": _values(q, self.latents) | _values(on_data, self.deterministic),
            "sample_stats": self._statistics(q, on_data),
            "prior": _values(p, in_prior),
            "posterior_predictive": _values(given_q, self.observed),
            "prior_predictive": _values(p, self.observed),
        }

    def _statistics(self, q: Trace, p: Trace) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if "lp" in self.statistics:
            found["lp"] = self._log_density(latent_sites(p) | observed_sites(p))
        if "log_q" in self.statistics:
            found["log_q"] = self._log_density(latent_sites(q))
        if "log_weight" in self.statistics:
            found["log_weight"] = found["lp"] - found["log_q"]
        return found

    def _log_density(self, sites: dict[str, Any]) -> Tensor:
        """Summed over sites and plates; for each datum apart, where every site belongs to one."""
        total: Any = 0.0
        for site in sites.values():
            term = log_density(site)
            if not self._by_datum:
                term = term.double()
            kept = {-1 - self._nesting} | {
                frame.dim for frame in site["cond_indep_stack"] if self._by_datum and frame.name == self.plate
            }
            summed = [dim for dim in range(-term.dim(), 0) if dim not in kept]
            total = total + (term.sum(summed) if summed else term)
        return total

    def _densities(self, q: Trace, p: Trace) -> tuple[str, ...]:
        """Which of the log-densities are densities; a weight is a quotient of two over the same latents."""
        latents = latent_sites(p)
        normalised = all(is_normalized(site["fn"]) for site in self.observed.values())
        alike = all(_like(site["fn"], self.latents[name]["fn"]) for name, site in latents.items())
        has = {
            "lp": bool(self.observed) and normalised and alike,
            "log_q": bool(self.latents) and not self._points(latents),
        }
        has["log_weight"] = has["lp"] and has["log_q"] and latents.keys() == self.latents.keys()
        return tuple(name for name, is_there in has.items() if is_there)

    def _points(self, of_model: dict[str, Any]) -> bool:
        """Whether a continuous latent is a point, as in ``AutoDelta``; those of other autoguides carry a density.

        These are functions of an auxiliary latent, whose density they turn into theirs.
        """
        points = {
            name
            for name, site in self.latents.items()
            if _is_delta(site["fn"]) and not (name in of_model and _is_discrete(of_model[name]["fn"]))
        }
        if not points:
            return False
        with poutine.block(), torch.no_grad(), TrackProvenance():
            sites = latent_sites(poutine.trace(self.guide).get_trace(*self.data))
        auxiliary = sites.keys() - self.latents.keys()
        return not all(get_provenance(base_distribution(sites[name]["fn"]).v) & auxiliary for name in points)

    def _described(self, draw: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Variable]]:
        def variable(group: str, name: str, value: Tensor) -> Variable:
            if group == "sample_stats":
                dims = ("obs",) if self._by_datum else ()
                return Variable(dims, tuple(value.shape), _array(value).dtype, {"units": "nats"})
            return Variable(self.names.dims[name], self.names.shapes[name], _array(value).dtype)

        return {
            group: {name: variable(group, name, value) for name, value in values.items()}
            for group, values in draw.items()
            if values
        }


def _is_delta(fn: Any) -> bool:
    return isinstance(base_distribution(fn), dist.Delta)


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError:
        return False


def _like(prior: Any, q: Any) -> bool:
    """Whether both are densities or both are masses."""
    return _is_delta(q) or _is_discrete(prior) == _is_discrete(q)


def _values(trace: Trace, names: Iterable[str]) -> dict[str, Tensor]:
    nodes: dict[str, Any] = dict(trace.nodes)
    return {name: nodes[name]["value"] for name in names}


def _array(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # a dtype that NumPy lacks


def _beside(value: Tensor, count: int, shape: tuple[int, ...]) -> Tensor:
    """``(C, *shape)``; what hangs on no draw is the same for each."""
    full = (count, *shape)
    if value.numel() == math.prod(full):
        return value.reshape(full)
    return value.reshape(value.shape[-len(full) :]).expand(full)


def _constant(name: str, value: Any) -> np.ndarray:
    """An array of numbers, booleans or words."""
    try:
        array = _array(value) if isinstance(value, Tensor) else np.asarray(value)
    except ValueError as error:
        raise ValueError(f"`constant_data` must be rows of one length: {name!r} makes no array: {error}") from error
    if array.dtype.kind not in "biufUSM":
        raise TypeError(
            f"`constant_data` must be tensors, arrays and lists of numbers, booleans or words: {name!r} is a "
            f"{type(value).__name__} that makes an array of {array.dtype}"
        )
    return array


def _epochs(name: str, value: Sequence[float]) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise ValueError(
            f"`history` must be one number for each epoch, as in the history of `pyro_vae.fit`: {name!r} has shape "
            f"{array.shape} and dtype {array.dtype}"
        )
    return array


def _nesting(*traces: Trace) -> int:
    """How many dimensions the plates take."""
    sites = [site for trace in traces for site in trace.nodes.values() if site["type"] == "sample"]
    return max((-(frame.dim or 0) for site in sites for frame in site["cond_indep_stack"]), default=0)


def _not_auxiliary(sites: dict[str, Any]) -> dict[str, Any]:
    """Without the sites that autoguides make for themselves."""
    return {name: site for name, site in sites.items() if not site["infer"].get("is_auxiliary")}


def _given_data(latents: dict[str, Any], guide: Function, data: tuple[Tensor, ...]) -> dict[str, Any]:
    """Those whose parameters are of the data alone: the others hang on draws of latents before them."""
    with poutine.block(), torch.no_grad(), TrackProvenance():
        tracked = latent_sites(poutine.trace(guide).get_trace(*data))

    def hangs(name: str) -> bool:
        ours, theirs = parameters(latents[name]["fn"]), parameters(tracked[name]["fn"])
        return any(
            get_provenance(theirs[key]) & latents.keys()
            or not torch.allclose(value, detach_provenance(theirs[key]), equal_nan=True)  # by way of NumPy, say
            for key, value in ours.items()
        )

    return {name: site for name, site in latents.items() if not hangs(name)}


def _check_plate(plate: str, *traces: Trace) -> None:
    """Refuse another name than that of a plate there is, under which nothing would belong to one datum."""
    sites = [site for trace in traces for site in (latent_sites(trace) | observed_sites(trace)).values()]
    found = {frame.name for site in sites for frame in site["cond_indep_stack"]}
    if found and plate not in found:
        raise ValueError(f"`plate` must be {sorted(found)}, the plates of model and guide, got {plate!r}")


def _check_latents(of_model: dict[str, Any], of_guide: dict[str, Any]) -> None:
    missing = sorted(set(of_model) - set(of_guide))
    if missing:
        raise ValueError(
            f"guide: the model's latents {missing} are not in it, so that there are no posterior draws of them"
        )
