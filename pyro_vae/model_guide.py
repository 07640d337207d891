"""One door: a Pyro model and its guide on their data, run once, and what that run shows.

Training, evaluation, exact answers, evidence, diagnostics and export start from a :class:`ModelGuide`: the sites by
their role, the way in which rows are taken, and every check of whether model and guide are a pair.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from copy import copy
from functools import cached_property, partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae._utils.ambient import check_no_outer_handlers, fresh_autocast
from pyro_vae._utils.data import DataTensors, LazyData, data_tensors
from pyro_vae._utils.module_state import evaluation_mode
from pyro_vae._utils.param_store import check_parameters, parameters_of, rollback_params_on_error, scoped_param_store
from pyro_vae._utils.plates import own_subsamples
from pyro_vae._utils.rng import preserve_rng_state, random_states, seeded, set_random_states
from pyro_vae._utils.shared_calls import notice_parameters
from pyro_vae._utils.traces import (
    PARTICLES,
    data_plate,
    deterministic_sites,
    has_bad_rows,
    latent_shapes,
    latent_sites,
    log_density,
    observed_sites,
    set_plate_sizes,
    shared_plates,
)
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import function, nonempty_string, taking_data
from pyro_vae.arguments import LatentsOf, bind, unbound
from pyro_vae.distributions.columns import Columns
from pyro_vae.distributions.missing import accepts_missing, check_missing, first_missing
from pyro_vae.distributions.properties import (
    base_distribution,
    base_support,
    inside_support,
    is_discrete,
    is_normalized,
    is_point,
    masks,
    spell_support,
    within_support,
    without_independent,
)
from pyro_vae.handlers import FixedSubsample, SubsampleRows, SubsampleStatements, UnsizedPlates

__all__ = [
    "DATA_PLATE", "Batcher", "ModelGuide", "RowBatches", "RunError", "Transform", "autoguide_as_before_on_error",
    "autoguide_follows_subsample", "check_one_plate", "check_same_latents", "is_amortized", "rows_at_once",
    "same_rows", "trace_pair", "transformed",
]  # fmt: skip

Transform = Callable[..., Tensor | Sequence[Tensor]]
"""From the rows of each data tensor to the rows that model and guide run on."""
Batcher = Callable[..., Any]
"""From row numbers to a context manager that yields the arguments of model and guide for these rows.

Rows that have been read already follow the numbers, a tensor for each argument, before the transform.
"""
Site = dict[str, Any]
Sites = dict[str, Site]

DATA_PLATE = "data"
"""The default name of the data plate; where no plate has it, the plate of N rows around the observed sites."""

_MAX_VARIABLES = 128  # whose change of volume is computed
_SEED = 20_160_901  # of checks: a draw with a common seed may equal data that a user drew with it
_NOISE_AND_TOLERANCE = (0.1, 1e-3), (0.01, 1e-4)  # of parameters and densities, where rows are compared
_BUDGET = 2**19  # numbers in the data of rows that are run together


class ModelGuide:
    """A Pyro model and guide on their data, run once.

    Args:
        model: a Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same; none for what needs the model alone.
        data: a tensor of N rows, or a sequence of them; or any arguments, see :func:`pyro_vae.arguments.bind`.
        plate: name of the data plate. The default stands for the plate that holds the observed sites and has N rows
            where no plate has this name.
        name: of the data in errors.
        traces: the traces of a run of the pair, if it has been run; the data may then be larger than what it ran on.
        seed: of the random numbers of the run; ``None`` for those of the current stream.
        bad_rows: whether some rows may have log-densities that are not finite; a training step names or skips them.

    Attributes:
        model, guide: as functions of the rows of data.
        plate: the name of the data plate.
        model_trace: the trace of the model, at the guide's draws.
        guide_trace: the trace of the guide; empty without one.
        latents: the latent sites of the model, by name.
        guide_latents: the latent sites of the guide that are not auxiliary, by name.
        auxiliary: the names of the sites that an autoguide draws for itself.
        factors: the names of ``pyro.factor`` statements in the guide.
        regressions: the names of the auxiliary sites that the guide observes, as that of ``pyro.contrib.cevae`` does to
            train a regression of them. Its q(z | x) is that of its latent sites.
        observed: the observed sites of the model that count into its density, by name.
        deterministic: the sites of ``pyro.deterministic`` in the model, by name.
        take: the right way to run the pair on some of its rows, see :meth:`on_batches`.
        batch_size: the number of rows to take; all of them if no smaller number is right.
        subsamples: whether ``take`` sets the subsample of the data plate.

    Raises:
        TypeError, ValueError: if data, model or guide cannot be used: data with NaN that the model does not accept, a
            guide that observes data, or draws a latent with another shape than the model; or if a handler of Pyro
            around the call, such as an outer plate, would change their sites.
    """

    def __init__(
        self,
        model: Function,
        guide: Function | None,
        data: Data,
        plate: str = "data",
        name: str = "data",
        traces: tuple[Trace, Trace] | None = None,
        seed: int | None = _SEED,
        bad_rows: bool = False,
    ):
        check_no_outer_handlers()
        function(model, "model")
        if guide is not None:
            function(guide, "guide")
        nonempty_string(plate, "plate")
        self.model, self.guide, data = bind(model, guide, data, plate, name)
        self.data = data_tensors(data, name, model, lazy=traces is not None)
        self.transform: Transform | None = None
        self.take: Batcher = partial(_all_rows, self.data)
        self.batch_size, self.subsamples = len(self.data[0]), False
        self.num_run = len(self.data[0])  # rows, the first ones, on which the pair was run
        self._amortized: dict[str, bool] = {}
        try:
            with poutine.block(), nullcontext() if seed is None else seeded(seed):
                self.model_trace, self.guide_trace = traces or trace_pair(self.model, self.guide, self.data, bad_rows)
        except RunError as failure:
            with preserve_rng_state():
                self._explain(failure.error, name)
            raise failure.error from failure.error.__cause__
        notice_parameters(parameters_of(self.guide_trace) | parameters_of(self.model_trace))
        self._check_all_rows_given(name)
        self.latents, self.observed = latent_sites(self.model_trace), observed_sites(self.model_trace)
        self.deterministic = deterministic_sites(self.model_trace)
        self.plate = self._find_plate(plate)
        self.regressions = _observations(self.guide_trace)
        if self.regressions:
            self.guide, self.guide_trace = LatentsOf(self.guide), self.guide_trace.copy()
            for site in self.regressions:
                self.guide_trace.remove_node(site)
        drawn = latent_sites(self.guide_trace)
        self.factors = list(observed_sites(self.guide_trace))
        self.auxiliary = [
            site for site in drawn if drawn[site]["infer"].get("is_auxiliary") and site not in self.latents
        ]
        self.guide_latents = {site: drawn[site] for site in drawn if site not in self.auxiliary}
        if traces is None:
            check_missing(self.observed.values(), self.data, name)
        self._check_columns(self.observed, name)
        self._check_one_value_per_row()

    @classmethod
    def on_batches(
        cls,
        model: Function,
        guide: Function,
        data: tuple[Tensor, ...],
        batch_size: int,
        plate: str = "data",
        transform: Transform | None = None,
    ) -> "ModelGuide":
        """Run a pair on its first rows, and find the right way to run it on any of them, :attr:`take`.

        With all N rows in a batch they stay as they are. A model that reads its data with ``pyro.subsample`` gets all
        of them, and a handler sets the subsample of the plate: right for global latents, per-datum guides and
        autoguides alike. A model without may take slices of the data, only if every latent is local to the plate and
        the guide is amortized, so that a row's q(z | x) depends on that row alone.

        A ``transform`` is called once for each batch, so that both see the same rows, in the current random stream.

        Of data that are read by rows, those in ``pyro.subsample`` are read, and tensors of the size of all data stand
        in for the rest. A stream has no numbers of rows, so that each row must be independent of the others.

        Raises:
            ValueError: if no way is right, with the reason and what to do.
        """
        check_no_outer_handlers()
        data = data if isinstance(data, DataTensors) else DataTensors(data)
        # A transform that works in place is refused on a copy, before it changes the data.
        transformed(tuple(tensor.clone() for tensor in data.few(batch_size)), transform)
        if batch_size == len(data[0]) and data.in_any_order:
            return cls._on_all_rows(model, guide, data.whole(), plate, transform)
        lazy = isinstance(data, LazyData)
        if transform is not None and not lazy:  # `FixedSubsample` knows a tensor by its identity, and one may have two
            data = DataTensors([tensor.view_as(tensor) for tensor in data])  # roles
        some = data.few(max(batch_size, rows_at_once(data))) if lazy else data
        first = torch.arange(batch_size, device=data[0].device)
        by_name = partial(cls.on_batches, model, guide, data, batch_size, transform=transform)
        statements = SubsampleStatements()
        within = SubsampleRows(plate, first), _fixed_subsample(data, first, transform)
        by_number = plate if within[1].takes_all else None

        plates: list[str] = []

        def takes_rows(few: ModelGuide) -> bool:
            """Whether a pair takes its rows from all data by itself, or may do so in a plate of another name."""
            plates.append(few.plate)
            with preserve_rng_state():
                _, takes = _run_first_batch(model, guide, few.data, within, by_number, statements)
            return takes or statements.own > 0 or few.plate != plate

        count = max(batch_size + 1, rows_at_once(data))
        apart = None if lazy or transform is not None else cls._apart(model, guide, data, plate, count, takes_rows)
        if plates and plates[0] != plate:
            return by_name(plate=plates[0])
        found, subsamples = None, False  # slices are read, and no run needs the size of all data
        if _has_subsample(model, DataTensors(transformed(some, transform)), statements) if lazy else apart is None:
            found, subsamples = _run_first_batch(model, guide, data, within, by_number, statements)
        if found is None or not subsamples or isinstance(found, RunError):
            if statements.own and (own := cls._on_own_subsample(model, guide, data, batch_size, plate, transform)):
                return own
            pair = apart[1] if apart else cls._on_all_rows(model, guide, some, plate, transform)
            if pair.plate != plate:
                return by_name(plate=pair.plate)
            pair.check_no_own_subsample()
            if isinstance(found, RunError) and subsamples:  # what all rows raise as well is another fault than this
                if batch_size == 1:
                    _check_single_rows(pair, lambda rows: _subsampled(data, rows, plate, transform))
                few = transformed(data.few(batch_size), transform)
                if _is_of_few_rows(found, model, guide, few, len(data[0])):
                    raise found.error from found.error.__cause__
                raise _no_subsample(found.who, plate, str(found.error)) from found.error
            numbered = plate if _check_slicing(pair, data.in_any_order) else None
            if lazy:
                pair.data, pair.num_run = data, len(some[0])
            pair.take = lambda rows, *read: _sliced(data, rows, transform, numbered, read)
            pair.batch_size = batch_size
            if batch_size == 1:
                _check_single_rows(pair, pair.take)
            return pair
        pair = cls(model, guide, data, plate, traces=found)
        if pair.plate != plate:
            return by_name(plate=pair.plate)
        pair.transform = transform
        pair.check_observed()
        if not pair.has_data_plate:
            raise _outside_plate(pair.plate, list(pair.observed), pair.plates)
        _check_subsampling(pair, batch_size)
        if transform is not None or lazy:
            _check_reading(pair, *within)
        if first_missing(data) is not None:
            seen = data if transform is None else transformed(tuple(tensor.clone() for tensor in some), transform)
            check_missing(pair.observed.values(), seen, "data")
        if not data.in_any_order:
            _check_independent(pair, DataTensors(transformed(some, transform)))
        pair.take = lambda rows, *read: _subsampled(data, rows, plate, transform, read)
        pair.num_run, pair.batch_size, pair.subsamples = batch_size, batch_size, True
        pair._check_columns(pair.observed, "data")
        return pair

    @classmethod
    def _on_own_subsample(
        cls,
        model: Function,
        guide: Function,
        data: DataTensors,
        batch_size: int,
        plate: str,
        transform: Transform | None,
    ) -> "ModelGuide | None":
        """Run a pair on slices of its data whose plate has N rows and takes as many as a slice, and so scales them.

        ``None`` for any other pair. An example is ``pyro.plate("data", N, subsample_size=len(x))`` with ``obs=x``.
        """
        few = DataTensors(transformed(data.few(batch_size), transform))
        try:
            pair = cls(model, guide, few, plate, seed=None, bad_rows=True)
        except (ValueError, RuntimeError, IndexError):
            return None
        size = len(data[0])
        if plate == DATA_PLATE and (frame := data_plate(pair.observed.values(), [size])):
            pair.plate = frame.name
        if {_size_of_plate(site, pair.plate) for _, _, site in pair.sites} - {None} != {(batch_size, size)}:
            return None
        for who, run, trace in (("model", model, pair.model_trace), ("guide", guide, pair.guide_trace)):
            if _dims_of(trace, pair.plate) and not is_amortized(run, few, pair.plate, trace, full_size=size):
                raise _numbers_needed(who)
        pair.transform, pair.data, pair.num_run = transform, data, batch_size
        pair.take = lambda rows, *read: nullcontext(transformed(read or data.rows(rows), transform))
        pair.batch_size, pair.subsamples = batch_size, True
        return pair

    @classmethod
    def on_few_rows(
        cls, model: Function, guide: Function, data: DataTensors, plate: str
    ) -> "tuple[ModelGuide, ModelGuide]":
        """Run a pair on no more rows than run together, if none of all rows depends on others; else on all rows.

        Return the pair on the rows that it ran on, and on all rows.
        """
        found = cls._apart(model, guide, data, plate, rows_at_once(data))
        if found is None:
            whole = cls(model, guide, data.whole(), plate)
            return whole, whole
        return found

    @classmethod
    def _apart(
        cls,
        model: Function,
        guide: Function,
        data: DataTensors,
        plate: str,
        count: int,
        takes_rows: Callable[["ModelGuide"], bool] | None = None,
    ) -> "tuple[ModelGuide, ModelGuide] | None":
        """Run a pair on its first rows, if none of all rows depends on others.

        Return the pair on the rows that it ran on, and on all rows; ``None`` for any other pair, and for few data. For
        training, the run is one of the current random stream, and the pair must not take rows by itself, which
        ``takes_rows`` returns.
        """
        if count >= len(data[0]) or isinstance(unbound(guide), AutoGuide):  # which is set up by its first run
            return None
        trains, states = takes_rows is not None, random_states()
        with suppress(ValueError, RuntimeError, IndexError), rollback_params_on_error():
            some = DataTensors(data.rows(slice(0, count)))
            few = cls(model, guide, some, plate, seed=None if trains else _SEED, bad_rows=trains)
            whole = cls(model, guide, data, few.plate, traces=(few.model_trace, few.guide_trace))
            whole.num_run = count
            if not whole.observed or not whole.has_one_plate or whole.eliminated or (takes_rows and takes_rows(few)):
                raise ValueError("not every site has a value for each row alone")
            if not all(map(whole._knows_all_rows, whole.observed.values())):
                raise ValueError("the observed values of other rows are not known")
            if not trains:
                whole.check_likelihood()
            if not whole.is_amortized("model") or not whole.is_amortized("guide"):
                raise ValueError("rows depend on each other, or on their place")
            if first_missing(data) is not None:
                check_missing(whole.observed.values(), data, "data")
            few._amortized = whole._amortized
            return few, whole
        set_random_states(*states)
        return None

    @classmethod
    def in_batches(cls, model: Function, guide: Function | None, data: Data, plate: str = "data") -> "RowBatches":
        """Run a pair on batches of its rows, one after another, for what has a value for each row.

        That takes a pair whose sites have the data plate, and no other one, in common, and of which no row depends on
        another, which all rows are compared for, see :func:`is_amortized`. Any other pair is one batch of all rows.
        """
        tensors = data_tensors(data, "data", model, lazy=True)
        size = rows_at_once(tensors)
        if size < len(tensors[0]) and tensors.in_any_order and not isinstance(unbound(guide), AutoGuide):
            with suppress(ValueError, RuntimeError, IndexError), rollback_params_on_error():
                first = cls(model, guide, tensors.batch(0, size), plate)
                if first.has_own_rows and all(map(partial(first.is_amortized, data=tensors), first.owners)):
                    return RowBatches(first, tensors, size)
        whole = cls(model, guide, tensors.whole(), plate)
        return RowBatches(whole, tensors, len(tensors[0]))

    @classmethod
    def _on_all_rows(
        cls, model: Function, guide: Function, data: tuple[Tensor, ...], plate: str, transform: Transform | None
    ) -> "ModelGuide":
        pair = cls(model, guide, transformed(data, transform), plate, seed=None, bad_rows=True)
        pair.transform = transform
        pair.check_observed()
        pair.take = lambda rows, *read: nullcontext(transformed(data, transform))
        return pair

    def _explain(self, error: Exception, name: str) -> None:
        """Raise the cause where it is known: data with NaN, or a latent with another shape than in the model."""
        self._raise_missing_rows(name, error)
        observed, shapes = [], []
        with suppress(RunError), poutine.block(), UnsizedPlates() as plates:
            alone, _ = trace_pair(self.model, None, self.data)
            observed, shapes = list(observed_sites(alone).values()), [latent_shapes(alone)]
            if self.guide is not None:
                _, drawn = trace_pair(lambda *_: None, self.guide, self.data)
                shapes.append(latent_shapes(drawn))
        if plates.names and (isinstance(unbound(self.guide), AutoGuide) or "pyro.subsample" in str(error)):
            what = "pyro.subsample" if "pyro.subsample" in str(error) else "an autoguide"
            raise ValueError(
                f"`model` must give the plate {plates.names[0]!r} a size for {what}, "
                f'`pyro.plate("{plates.names[0]}", len(x))`, got one without'
            ) from error
        if not shapes or not all(accepts_missing(site["fn"]) for site in observed):
            check_missing([], self.data, name, error)
        with suppress(RunError), poutine.block(), pyro.validation_enabled(False):
            self._check_columns(observed_sites(_trace("model", self.model, self.data)), name, error)
        for site, shape in shapes[0].items() if len(shapes) == 2 else ():
            if shapes[1].get(site, shape) != shape:
                raise ValueError(
                    f"`guide` must draw {site!r} with the shape of the model's latent, {shape}, got {shapes[1][site]}"
                ) from error

    def _check_all_rows_given(self, name: str) -> None:
        """Raise if the log-densities of the run need rows that the data do not have."""
        if own_subsamples():
            try:
                with pyro.validation_enabled(False):
                    self.model_trace.compute_log_prob()
            except ValueError as error:
                self._raise_missing_rows(name, error)
                raise

    def _raise_missing_rows(self, name: str, error: Exception) -> None:
        """Raise if the data are some rows of a plate that takes a subsample of its own, and all of them are needed."""
        for plate, (size, count) in own_subsamples().items():
            if count == self.num_data < size:
                raise ValueError(
                    f"`{name}` must have all {size} rows of the plate {plate!r}, which takes a subsample of its own: "
                    f"what is reported is a number of all rows, got {count}"
                ) from error

    def _check_one_value_per_row(self) -> None:
        """Raise if the model has one latent where the guide has one for each row, as in a plate without a size."""
        for name in self.latents.keys() & self.guide_latents.keys():
            ours, theirs = (sites[name]["fn"].batch_shape for sites in (self.guide_latents, self.latents))
            if self.is_local(self.guide_latents[name]) and ours.numel() > theirs.numel() == 1:
                raise ValueError(
                    f"`model` must draw {name!r} with the batch shape of the guide, {tuple(ours)}, got {tuple(theirs)}"
                    f'. A plate needs a size for a value of each row, `pyro.plate("{self.plate}", len(x))`'
                )

    def _find_plate(self, plate: str) -> str:
        """The name of the data plate: as given, or by default that of the plate of N rows around observed sites."""
        if plate in self.plates:
            return plate
        if plate != DATA_PLATE:
            raise _outside_plate(plate, list(self.observed), self.plates)
        frame = data_plate(self.observed.values(), [self.num_data])
        return plate if frame is None else frame.name

    @property
    def num_data(self) -> int:
        """N, the number of rows."""
        return len(self.data[0])

    @property
    def sites(self) -> list[tuple[str, str, Site]]:
        """Owner, name and site of all latent and observed sites, the guide's first."""
        guide = [("guide", name, site) for name, site in latent_sites(self.guide_trace).items()]
        return guide + [("model", name, site) for name, site in (self.latents | self.observed).items()]

    @property
    def plates(self) -> list[str]:
        """The names of the plates around latent and observed sites."""
        return sorted({frame.name for _, _, site in self.sites for frame in site["cond_indep_stack"]})

    @property
    def units(self) -> tuple[CondIndepStackFrame, ...]:
        """The plates that hold every latent and observed site of model and guide, from left to right.

        log p(x) has a value for each of their cells: for each datum where all latents are local to it, for each group
        where they are local to an outer plate, and one for all data, without plates, where some latent is global.
        """
        return shared_plates(site for _, _, site in self.sites)

    @property
    def has_one_plate(self) -> bool:
        """Whether every site lies in the data plate alone, the rightmost dimension, and no latent is masked."""
        stacks = [[frame for frame in site["cond_indep_stack"] if frame.vectorized] for _, _, site in self.sites]
        latents = (*self.latents.values(), *latent_sites(self.guide_trace).values())
        return all([(frame.name, frame.dim) for frame in stack] == [(self.plate, -1)] for stack in stacks) and not any(
            site["mask"] is not None or masks(site["fn"]) for site in latents
        )

    @property
    def has_own_rows(self) -> bool:
        """Whether the sites have the data plate, and no other one, in common, so that each row has a log p(x)."""
        return [(frame.name, frame.size) for frame in self.units] == [(self.plate, self.num_data)]

    @property
    def owners(self) -> tuple[str, ...]:
        """The programs of the pair: ``"model"``, and ``"guide"`` if there is one."""
        return ("model",) if self.guide is None else ("model", "guide")

    @property
    def by_rows(self) -> bool:
        """Whether log p(x, z) of each datum is that of its own latents in the data plate, all drawn by the guide."""
        return bool(self.latents) and self.has_one_plate and not self.eliminated

    @property
    def eliminated(self) -> list[str]:
        """The discrete latents that the guide, if there is one, leaves to be summed out."""
        if self.guide is None:
            return []
        left = self.latents.keys() - self.guide_latents.keys()
        return [name for name in self.latents if name in left and self.latents[name]["fn"].has_enumerate_support]

    @property
    def required_latents(self) -> Sites:
        """The latents of the model that the guide must draw.

        Discrete ones that it leaves out are summed out. A point that it leaves out has no density: its log p is 0.
        """
        left_out = {name for name, site in self.latents.items() if name in self.eliminated or is_point(site["fn"])}
        drawn = self.guide_latents.keys()
        return {name: site for name, site in self.latents.items() if name in drawn or name not in left_out}

    @property
    def max_plate_nesting(self) -> int:
        """How many dimensions the plates take."""
        dims = [frame.dim for _, _, site in self.sites for frame in site["cond_indep_stack"]]
        return max((-dim for dim in dims if dim is not None), default=0)

    def is_local(self, site: Site) -> bool:
        """Whether a site lies in the data plate, so that it has a value for each datum; else it is global."""
        return any(frame.name == self.plate and frame.vectorized for frame in site["cond_indep_stack"])

    @property
    def global_latents(self) -> list[str]:
        """The names of the model's latents outside of the data plate."""
        return [name for name, site in self.latents.items() if not self.is_local(site)]

    @cached_property
    def points(self) -> list[str]:
        """The continuous latents for which the guide has a point instead of a density, as ``AutoDelta`` has.

        Other autoguides also have ``Delta`` sites: functions of an auxiliary latent, whose density they carry.
        """
        points = [name for name, site in self.guide_latents.items() if is_point(site["fn"])]
        points = [name for name in points if not _has_mass(self.latents.get(name))]
        drawn = latent_sites(self.guide_trace)
        densities = {
            name for name in self.auxiliary if not is_point(drawn[name]["fn"])
        }  # as in AutoLaplaceApproximation
        if not points or not densities:
            return points
        try:
            sites = self._tracked(self.guide)
        except (TypeError, ValueError, RuntimeError):  # code that takes plain tensors alone
            return []
        origins = {name: get_provenance(base_distribution(sites[name]["fn"]).v) for name in points}
        return [name for name in points if not origins[name] & densities]

    def _tracked(self, run: Function, track: bool = True) -> dict[str, Any]:
        """The sites of a run of model or guide in which each tensor knows the latents from which it was computed."""
        rows = torch.arange(self.num_run, device=self.data[0].device)
        tracker = _TrackLatents() if track else nullcontext()
        with poutine.block(), torch.no_grad(), seeded(1), self.take(rows) as data, tracker:
            return dict(poutine.trace(run).get_trace(*data).nodes)

    def has_dependent_latents(self) -> bool:
        """Whether q of a latent, given x, is computed from another latent of the guide."""
        origins, names = self.origins("guide"), self.guide_latents.keys()
        return any(origins[name] & names - {name} for name in names)

    def origins(self, owner: str) -> dict[str, frozenset[str]]:
        """The latents from whose values the log-density of each site in ``"model"`` or ``"guide"`` is computed.

        Its own value does not count. What passes through a number of Python is not seen.
        """
        run, trace = (self.model, self.model_trace) if owner == "model" else (self.guide, self.guide_trace)
        sites, origins = self._tracked(run), {}
        for name in latent_sites(trace) | observed_sites(trace):
            log_prob = sites[name]["fn"].log_prob(detach_provenance(sites[name]["value"]))
            origins[name] = get_provenance([log_prob, sites[name]["mask"]])
        return origins

    @property
    def enumerated(self) -> set[str]:
        """How latents are marked for enumeration: ``"parallel"``, ``"sequential"``."""
        sites = (*self.latents.values(), *latent_sites(self.guide_trace).values())
        return {site["infer"].get("enumerate") for site in sites} - {None}

    def on_other_rows(self, rows: DataTensors) -> "ModelGuide":
        """Run the pair on other rows of the data of which it is known whether rows depend on each other."""
        pair = type(self)(self.model, self.guide, rows, self.plate)
        pair._amortized = self._amortized
        return pair

    def held_out(self, data: DataTensors, batch_size: int, model: Function, guide: Function) -> "ModelGuide":
        """Return the pair on held-out data, transformed, to run in batches if that is right, else on all rows.

        ``model`` and ``guide`` are the pair with the other arguments of these data.

        Raise if the guide has parameters for its training data alone.
        """
        pair, lazy = copy(self), isinstance(data, LazyData)
        pair.model, pair.guide = model, guide
        pair.data = seen = data if lazy else DataTensors(transformed(data, self.transform))
        some = DataTensors(transformed(data.few(rows_at_once(data)), self.transform)) if lazy else seen
        check_missing(self.observed.values(), seen, "validation")
        for name, site in self.observed.items() if not self.why_no_bound else ():
            self._check_support(name, site, seen, "validation")
        if not self.is_amortized("guide", some):
            raise ValueError(
                "`validation` needs an amortized guide, got one with parameters for each datum of `data`, and so with "
                "none for held-out data"
            )
        transform, pair.batch_size = self.transform if lazy else None, batch_size
        in_batches = len(seen[0]) > batch_size or not seen.in_any_order
        if in_batches and not self.global_latents and self.is_amortized("model", some):
            pair.take = lambda rows, *read: _sliced(seen, rows, transform, read=read)
        elif in_batches and self.subsamples:
            pair.take = lambda rows, *read: _subsampled(seen, rows, self.plate, transform, read)
        else:
            whole = transformed(seen.whole("validation"), transform)
            pair.take, pair.batch_size = partial(_all_rows, whole), len(whole[0])
        return pair

    @property
    def has_data_plate(self) -> bool:
        """Whether some observed site lies in the data plate, so that there is a number of nats per datum."""
        return any(frame.name == self.plate for site in self.observed.values() for frame in site["cond_indep_stack"])

    def check_observed(self) -> None:
        """Raise if there is nothing to train on."""
        if not self.observed:
            raise _outside_plate(self.plate, [], self.plates)

    def _check_all_in_plate(self) -> None:
        """Raise if batches of the data would not be of the observed sites: slices give those outside a wrong scale."""
        if outside := [name for name, site in self.observed.items() if not self.is_local(site)]:
            raise _outside_plate(self.plate, outside, self.plates)

    @cached_property
    def why_no_bound(self) -> str:
        """Why -distortion - rate is no lower bound on log p(x); empty if it is one.

        It is one if log p(x | z), log p(z) and log q(z | x) are logarithms of normalised densities or masses, on the
        same data and of the same latents.
        """
        try:
            self.check_likelihood()
            self.check_density(own_masks=not self.draws_cells)
        except ValueError as error:
            return str(error)
        return ""

    @property
    def draws_cells(self) -> bool:
        """Whether the guide has a density of each cell alone, as ``AutoNormal``, which has no masks of the model.

        What the model masks, such as what is observed of a site with ``obs_mask``, is then no part of the bound.
        """
        return isinstance(unbound(self.guide), AutoNormal)

    @property
    def bound(self) -> str:
        """The name of -distortion - rate: ``"elbo"``, or ``"surrogate"`` where it is no bound."""
        return "surrogate" if self.why_no_bound else "elbo"

    def check_likelihood(self) -> None:
        """Raise if p(x, z) is no normalised density of the data: its p(x) then does not integrate to one."""
        if unnormalised := [name for name, site in self.observed.items() if not is_normalized(site["fn"])]:
            raise ValueError(
                f"`model` must have a normalised likelihood, got soft targets or pyro.factor at {unnormalised}; use "
                "likelihoods.ContinuousBernoulli for grey data, or likelihoods.Bernoulli on binarized data"
            )
        if improper := [name for name, site in self.latents.items() if not _is_proper(site)]:
            raise ValueError(f"`model` must have a normalised prior, got an improper one at {improper}")
        for name, site in self.observed.items():
            self._check_support(name, site, self.data, "data")
        self._check_masks()

    def check_density(self, own_masks: bool = True) -> None:
        """Raise if q(z | x) is no normalised density of the latents that the model has.

        Without ``own_masks`` the guide may leave out masks of the model, see :meth:`left_unmasked`.
        """
        check_same_latents(self.required_latents, self.guide_latents)
        self.check_points()
        if self.auxiliary:
            self._check_volumes()
        else:
            self.check_factors()
        for name, site in self.guide_latents.items():
            if not is_point(site["fn"]) and not is_normalized(site["fn"]):
                raise ValueError(f"`guide` must have a normalised density, got one that is not at {name!r}")
        self._check_masked_latents(own_masks)

    def _check_volumes(self) -> None:
        """Raise if the ``Delta`` sites that are functions of auxiliary sites, and factors, do not have their density.

        It is the density of the auxiliary values times the change of volume: as many numbers, one to one, and together
        -log |det dz/du| from ``log_density`` and ``pyro.factor``. Autoguides have it.
        """
        drawn = latent_sites(self.guide_trace)
        points = {name: site for name, site in self.guide_latents.items() if is_point(site["fn"])}
        shapes = [_unconstrained_shape(self.latents[name], site["value"].shape) for name, site in points.items()]
        given, needed = sum(drawn[name]["value"].numel() for name in self.auxiliary), sum(map(math.prod, shapes))
        if given != needed:
            raise ValueError(
                f"`guide` must have latents that are functions of its auxiliary sites {self.auxiliary}, one to one, "
                f"got {given} auxiliary numbers for {needed} of {sorted(points)}"
            )
        same_size = shapes == [site["value"].shape for site in points.values()]
        if isinstance(unbound(self.guide), AutoGuide) or not same_size:
            return
        log_volume, log_density = self._change_of_volume(list(points))
        if not torch.isclose(log_density, -log_volume, rtol=1e-3, atol=1e-3 * needed):
            raise ValueError(
                f"`guide` must have the change of volume of {sorted(points)} as functions of {self.auxiliary} in "
                f"`Delta(..., log_density=)` or pyro.factor, {-log_volume:.6g} for all data, got {log_density:.6g}"
            )

    def _change_of_volume(self, points: list[str]) -> tuple[Tensor, Tensor]:
        """log |det dz/du| of the points as functions of the auxiliary values, and minus that as the guide has it.

        Of local latents a row's z is a function of its own u. Of too many variables it is not computed.
        """
        first = torch.arange(self.num_run, device=self.data[0].device)
        with (
            poutine.block(),
            torch.enable_grad(),
            seeded(0),
            self.take(first) as data,
            _Leaves(self.auxiliary) as leaves,
        ):
            sites: dict[str, Any] = dict(poutine.trace(self.guide).get_trace(*data).nodes)
            rows = self.num_run if all(map(self.is_local, latent_sites(self.guide_trace).values())) else 1
            z = torch.cat([base_distribution(sites[name]["fn"]).v.reshape(rows, -1) for name in points], 1)
            added = torch.stack([log_density(sites[name]).sum() for name in (*points, *self.factors)])
            added = added.sum().detach().double()
            if z.shape[1] > _MAX_VARIABLES:
                return -added, added
            slopes = [
                torch.autograd.grad(column.sum(), leaves.values, retain_graph=True, materialize_grads=True)
                for column in z.unbind(1)
            ]
        jacobian = torch.stack([torch.cat([slope.reshape(rows, -1) for slope in of], 1) for of in slopes], 1)
        return torch.linalg.slogdet(jacobian.double()).logabsdet.sum(), added

    def left_unmasked(self) -> dict[str, Tensor]:
        """The masks of the model's latents that the guide does not have, as an autoguide under ``obs_mask=``."""
        masked = {name: site for name, site in self.latents.items() if name in self.guide_latents}
        found = {name: _counted(site) for name, site in masked.items() if _counted(self.guide_latents[name]).all()}
        return {name: mask for name, mask in found.items() if not mask.all()}

    def _check_masked_latents(self, own_masks: bool) -> None:
        """Raise if masks remove the rate of latents on which the likelihood of the data depends."""
        hidden, unmasked = {}, {} if own_masks else self.left_unmasked()
        for name, site in self.guide_latents.items():
            ours, theirs = torch.broadcast_tensors(unmasked.get(name, _counted(site)), _counted(self.latents[name]))
            if not torch.equal(ours, theirs):
                raise ValueError(f"`guide` must have the mask of the model at {name!r}, got another one")
            if not ours.all():
                hidden[name] = ours
        self._check_hidden(hidden, self.guide_latents)

    def check_hidden(self) -> None:
        """Raise if the likelihood of a model depends on its latents where they are masked, and have no density."""
        counted = {name: _counted(site) for name, site in self.latents.items()}
        self._check_hidden({name: count for name, count in counted.items() if not count.all()}, self.latents)

    def _check_hidden(self, hidden: dict[str, Tensor], latents: Sites) -> None:
        if not hidden:
            return
        rows, others = torch.arange(self.num_run, device=self.data[0].device), {}
        for name, site in latents.items():
            others[name] = site["value"]
            if name in hidden:
                counted = hidden[name].reshape((*hidden[name].shape, *[1] * site["fn"].event_dim))
                others[name] = torch.where(counted, site["value"], _another_value(site))
        with poutine.block(), torch.no_grad(), seeded(0), pyro.validation_enabled(False), self.take(rows) as data:
            run = poutine.replay(poutine.condition(self.model, data=others), self.guide_trace)  # with its subsamples
            again = poutine.trace(run).get_trace(*data)
        new: dict[str, Any] = dict(again.nodes)
        if not all(torch.allclose(log_density(site), log_density(new[name])) for name, site in self.observed.items()):
            raise ValueError(
                f"`model` must mask the data that depend on masked latents, got a likelihood that depends on "
                f"{sorted(hidden)} where they are masked"
            )

    def check_points(self) -> None:
        """Raise if the guide has a point for a continuous latent: log p(x, z) alone is no bound."""
        for name in self.points:
            got = f"a point (Delta, as in AutoDelta) for {name!r}"
            raise ValueError(f"`guide` must have a density for each continuous latent, got {got}")

    def check_kinds(self) -> None:
        """Raise if a latent has a density in the model and a mass in the guide, or mass outside of the model's support.

        The difference of their logarithms is then no KL, or an infinite one.
        """
        for name in self.latents.keys() & self.guide_latents.keys():
            p, q = self.latents[name]["fn"], self.guide_latents[name]["fn"]
            if is_point(p) or is_point(q):
                continue
            ours, theirs = ("mass" if is_discrete(fn) else "density" for fn in (q, p))
            if ours != theirs:
                raise ValueError(
                    f"`guide` must have a {theirs} for the latent {name!r}, as the model has, got a {ours}, a "
                    f"{_kind(q)} for a {_kind(p)}: log p(z) - log q(z) then bounds nothing. A relaxed guide needs a "
                    "relaxed prior"
                )
            if not within_support(q, p):
                raise outside_support(name, q, p)

    def _check_support(self, name: str, site: Site, data: DataTensors, argument: str) -> None:
        """Raise if an observed site has values outside of its support, which ``validate_args=False`` lets pass."""
        for first, values in self._observed_values(site, data):
            inside = inside_support(site["fn"], values)
            if site["mask"] is not None:
                inside = inside | ~torch.as_tensor(site["mask"], device=inside.device)
            if not inside.all():
                if isinstance(columns := site["fn"], Columns) and (text := columns.find_outside(values, first)):
                    raise ValueError(f"`{argument}` must hold values that its columns can have: {text}")
                row = first + int((~inside).nonzero()[0, -1]) if inside.dim() else first
                raise ValueError(
                    f"`{argument}` must hold values in the support of the likelihood of {name!r}, "
                    f"{spell_support(site['fn'])}, got others, such as in row {row}: p(x | z) does not sum to one over "
                    "them. Use a likelihood for such data, such as likelihoods.ContinuousBernoulli for grey values"
                )

    def _check_columns(self, observed: Sites, argument: str, error: Exception | None = None) -> None:
        """Raise if a table has values that a column cannot have, with the column and the row among all rows."""
        for name, site in observed.items():
            if isinstance(site["fn"], Columns):
                try:
                    self._check_support(name, site, self.data, argument)
                except ValueError as found:
                    raise found from error

    def _knows_all_rows(self, site: Site) -> bool:
        """Whether the values of an observed site in all rows are a data tensor, and have one support without a mask."""
        value, first = torch.as_tensor(site["value"]), self.data.rows(slice(0, self.num_run))
        is_shared = all(bound.numel() == 1 for bound in _tensors(base_support(site["fn"])))
        is_masked = _tensors([site["mask"], *masks(site["fn"])])
        return is_shared and not is_masked and any(same_rows(tensor, value) for tensor in first)

    def _observed_values(self, site: Site, data: DataTensors) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and the values of an observed site: those of the run, then those of all other rows.

        The other rows are known where the values are a data tensor, and the support is the same for all rows. Data that
        are not those of the pair, for validation, are transformed already unless their rows are read on demand.
        """
        value, count = torch.as_tensor(site["value"]), self.num_run
        if data is self.data:
            yield data.first_row, value
        is_shared = all(value.numel() == 1 for value in _tensors(base_support(site["fn"])))
        is_masked = _tensors([site["mask"], *masks(site["fn"])])  # by another mask in other rows
        if (data is self.data and count == len(data[0])) or not is_shared or is_masked:
            return
        with seeded(0):
            ours = self.data.rows(slice(0, count))  # already transformed, if all rows were run
            if count < self.num_data:
                ours = transformed(ours, self.transform)
            found = [index for index, tensor in enumerate(ours) if same_rows(tensor, value)]
            checked = data.checked_rows if found else range(0)
            every = torch.arange(checked.start, checked.stop, device=data[0].device)
            for rows in every.split(max(count, rows_at_once(data))) if checked else ():
                batch = data.rows(rows)
                raw = data is self.data or isinstance(data, LazyData)
                values = (transformed(batch, self.transform) if raw else batch)[found[0]]
                yield int(rows[0]), values.reshape(-1, *value.shape[1:])

    def _check_masks(self) -> None:
        """Raise if the mask of an observed site depends on a latent: what is observed is then no fixed set."""
        masked = [name for name, site in self.observed.items() if _tensors([site["mask"], *masks(site["fn"])])]
        if not masked or not self.latents:
            return
        origins = dict.fromkeys(masked, frozenset[str]())
        try:
            sites = self._tracked(poutine.replay(self.model, self.guide_trace))
            origins = {name: get_provenance([sites[name]["mask"], *masks(sites[name]["fn"])]) for name in masked}
        except (TypeError, ValueError, RuntimeError):  # code that takes plain tensors alone: masks at other latents
            sites = self._tracked(self.model, track=False)
            for name in masked:
                if not torch.equal(_counted(sites[name]), _counted(self.observed[name])):
                    origins[name] = frozenset(self.latents)
        for name in masked:
            if latents := sorted(origins[name] & self.latents.keys()):
                raise ValueError(
                    f"`model` must have a mask of {name!r} that depends on data alone, got one that depends on the "
                    f"latents {latents}: its density is no likelihood"
                )

    def check_factors(self) -> None:
        """Raise if the guide has ``pyro.factor`` statements, whose terms are no density of q(z | x)."""
        if self.factors:
            raise ValueError(
                f"`guide` must have latent sites alone, got pyro.factor statements {self.factors}, whose terms are no "
                "densities of q(z | x)"
            )

    def is_amortized(self, owner: str, data: DataTensors | None = None) -> bool:
        """Whether a row's distributions in ``"model"`` or ``"guide"`` depend on that row alone; found once."""
        if not self._amortized.get(owner):
            run, trace = (self.model, self.model_trace) if owner == "model" else (self.guide, self.guide_trace)
            self._amortized[owner] = is_amortized(run, data or self.data, self.plate, trace)
        return self._amortized[owner]

    def check_rows(self, owner: str) -> None:
        """Raise if the densities of a row in ``"model"`` or ``"guide"`` are no function of its latents and data alone.

        Where they depend on the place of the row, as parameters for each datum do, the rows keep their places: each
        half of them is run with the other half replaced.
        """
        if self.is_amortized(owner):
            return
        run, trace = (self.model, self.model_trace) if owner == "model" else (self.guide, self.guide_trace)
        with scoped_param_store(), evaluation_mode(run), poutine.block(), torch.no_grad(), seeded(_SEED + 1):
            rows = _Rows(run, self.plate)
            values, ours = rows.read(trace)
            count = max((len(density) for density in ours.values()), default=1)
            place = torch.arange(count, device=self.data[0].device)
            first = torch.randperm(count, device=place.device) < -(-count // 2)
            for kept in (first, ~first) if count > 1 else (first,):
                index = place.where(kept, place[kept][torch.randint(int(kept.sum()), place.shape, device=place.device)])
                if name := rows.first_change(ours, self.data, values, index, kept):
                    again = rows.first_change(ours, self.data, values, place, kept)
                    raise _random(owner) if again else _dependent(owner, name)

    def check_no_own_subsample(self) -> None:
        """Raise if the data plate takes a subsample of its own, which is not the one that a batch has."""
        for _, _, site in self.sites:
            for frame in site["cond_indep_stack"]:
                if frame.name == self.plate and frame.full_size is not None and frame.size < frame.full_size:
                    raise ValueError(
                        f"`batch_size` must be left out where the data plate takes a subsample of its own, got the "
                        f"plate {self.plate!r} with {frame.size} of {frame.full_size} rows"
                    )

    def check_regressions(self, elbo: ELBO) -> None:
        """Raise if an ELBO of Pyro would subtract the densities of sites that the guide observes."""
        if self.regressions and type(elbo).__module__.startswith(("pyro.infer.", "pyro_vae.")):
            raise ValueError(
                f"`elbo` must be one that trains the sites {self.regressions}, which the guide observes, such as "
                f"`pyro.contrib.cevae.TraceCausalEffect_ELBO()`, got {type(elbo).__name__}, which subtracts them"
            )

    def check_elbo(self, elbo: ELBO) -> None:
        """Raise if an ELBO does not fit the latents and their marks for enumeration."""
        check_same_latents(self.latents, self.guide_latents, fewer=True)
        self.check_kinds()
        if self.transform is not None and elbo.max_plate_nesting == float("inf"):
            # Pyro would find the nesting of the plates by a run on data without their transform.
            particles = int(elbo.vectorize_particles and elbo.num_particles > 1)
            elbo.max_plate_nesting = particles + self.max_plate_nesting
        marks, enumerates = self.enumerated, isinstance(elbo, TraceEnum_ELBO)
        if marks and not enumerates:
            raise ValueError(
                "`elbo` must be TraceEnum_ELBO(max_plate_nesting=1) for latents that are marked for enumeration, got "
                f"{type(elbo).__name__}, which would sample them"
            )
        if "sequential" in marks:
            raise ValueError("`elbo` needs latents marked with enumerate='parallel', got some marked 'sequential'")
        if enumerates and not marks and getattr(elbo, "strict_enumeration_warning", True):
            raise ValueError(
                "`elbo` must not be TraceEnum_ELBO where no latent is marked for enumeration: it would only sample. "
                "Mark discrete latents, `fit(model, config_enumerate(guide), ...)`; for others use Trace_ELBO"
            )

    def check_sums_over_rows(self, elbo: ELBO) -> None:
        """Raise unless the loss is a sum over rows and a term for all of them, so that ranks can share the rows."""
        must = "`elbo` must be a sum over the rows of the data where several ranks share them"
        linear = (Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO)
        if not isinstance(elbo, linear) or not getattr(elbo, "sums_over_rows", True):
            raise ValueError(
                f"{must}, got {type(elbo).__name__}, which is a function of all rows of a batch together. Use "
                "Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO or another objective of pv.objectives"
            )
        if self.global_latents and getattr(elbo, "bound_draws", 1) != 1:
            raise ValueError(
                f"{must}, got {type(elbo).__name__} of several draws of {self.global_latents[0]!r}, which is outside "
                "of the data plate: the bound is that of all rows together. Use Trace_ELBO"
            )
        if summed := [name for name in self.global_latents if self.latents[name]["infer"].get("enumerate")]:
            raise ValueError(
                f"{must}, got an enumerated latent outside of the data plate, {summed[0]!r}: the sum over its values "
                "is one of all rows together. Sample it, or run on one rank"
            )


class RowBatches:
    """A pair on batches of its rows, which are run one after another, whenever they are needed; or on all rows at once.

    Args:
        first: the pair on the first batch.
        data: all rows.
        size: of a batch.

    Attributes:
        num_data: N, the number of rows.
    """

    def __init__(self, first: ModelGuide, data: DataTensors, size: int):
        self.first, self._data, self._size, self.num_data = first, data, size, len(data[0])

    def __len__(self) -> int:
        return -(-self.num_data // self._size)

    def __getitem__(self, index: int) -> ModelGuide:
        start = index * self._size
        if not 0 <= start < self.num_data:
            raise IndexError(f"`index` must be less than {len(self)}, got {index}")
        stop = min(start + self._size, self.num_data)
        return self.first.on_other_rows(self._data.batch(start, stop)) if index else self.first

    def __iter__(self) -> Iterator[ModelGuide]:
        return map(self.__getitem__, range(len(self)))

    def whole(self) -> ModelGuide:
        """Run the pair on all rows at once."""
        return self.first if len(self) == 1 else self.first.on_other_rows(self._data.whole())


class _TrackLatents(TrackProvenance):
    """Track the latents from which a tensor is computed, but not the parameters, which stay plain tensors."""

    def _pyro_post_param(self, msg: Any) -> None:
        pass


def same_rows(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors have the same values in each row, in any shape, and NaN in the same places."""
    if ours.shape[:1] != theirs.shape[:1] or ours.numel() != theirs.numel():
        return False
    ours = ours.reshape(theirs.shape)
    return bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())


class _Leaves(Messenger):
    """Make the values of some sites leaves of the graph."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.names, self.values = names, list[Tensor]()

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            msg["value"] = msg["value"].detach().requires_grad_()
            self.values.append(msg["value"])


def _unconstrained_shape(site: Site, shape: torch.Size) -> torch.Size:
    """The shape of the unconstrained coordinates of a latent; its own where they are not known."""
    try:
        return biject_to(site["fn"].support).inverse_shape(shape)
    except NotImplementedError:
        return shape


def _outside_plate(plate: str, outside: list[str], plates: list[str]) -> ValueError:
    return ValueError(
        f"`plate` must be the data plate around the model's observed sites, got {plate!r}: "
        f"the sites {outside or '(none is observed)'} are not in it; plates are {plates or '(none)'}"
    )


def _tensors(values: Any) -> list[Tensor]:
    """The tensors in a list, or among the attributes of a constraint."""
    values = values if isinstance(values, list) else vars(values).values()
    return [value for value in values if isinstance(value, Tensor)]


def _has_mass(site: Site | None) -> bool:
    """Whether a latent of the model is discrete, or a point."""
    return site is not None and (is_discrete(site["fn"]) or is_point(site["fn"]))


def _is_proper(site: Site) -> bool:
    """Whether a latent of the model has a normalised density; a point may be one of a function of others."""
    return is_point(site["fn"]) or is_normalized(site["fn"])


def _counted(site: Site) -> Tensor:
    """Which data of a latent are not masked."""
    device = torch.as_tensor(site["value"]).device
    counted = torch.as_tensor(True if site["mask"] is None else site["mask"], device=device)
    for mask in masks(site["fn"]):
        mask = torch.as_tensor(mask, device=device)
        counted = counted & mask.reshape((*mask.shape[: len(site["fn"].batch_shape)], -1)).all(-1)
    return counted


def _another_value(site: Site) -> Tensor:
    """Values of a latent that differ from those of the run, in its support."""
    fn, value = site["fn"], site["value"]
    if fn.has_enumerate_support:
        support = fn.enumerate_support(expand=False)
        same = (value == support[0]).reshape(*value.shape[: value.dim() - fn.event_dim], -1).all(-1)
        return torch.where(same.reshape(same.shape + (1,) * fn.event_dim), support[-1], support[0])
    if is_discrete(fn):
        return value + 1
    try:
        transform = biject_to(fn.support)
        return transform(transform.inv(value).flip(0) + 1)
    except NotImplementedError:
        return value.flip(0) + 1


def _kind(fn: Any) -> str:
    return type(without_independent(fn)).__name__


def outside_support(name: str, drawn: Any, fn: Any) -> ValueError:
    """The error for a latent whose distribution in the guide, ``drawn``, has other values than in the model, ``fn``."""
    must = f"have its latent {name!r} on {spell_support(fn)}, as the model has"
    got = f"a {_kind(drawn)} on {spell_support(drawn)}"
    return ValueError(f"`guide` must {must}, got {got}; mass outside of the support of p(z) makes the KL infinite")


class RunError(ValueError):
    """A pair of which ``who``, model or guide, does not run on its data, with the ``error`` that it raised."""

    def __init__(self, who: str, error: Exception):
        super().__init__(f"the {who} does not run on its data: {error}")
        self.who, self.error = who, error


def trace_pair(
    model: Function, guide: Function | None, data: tuple[Tensor, ...], bad_rows: bool = False
) -> tuple[Trace, Trace]:
    """Run a guide, then its model at its draws; return the traces, the model's first.

    Raise if the guide observes, or if Pyro's store has parameters of other modules under the names of theirs. With
    ``bad_rows``, run without Pyro's validation where some rows have log-densities that are not finite, though no
    data are NaN.
    """
    run = partial(_trace_pair, model, guide, data)
    with torch.no_grad(), fresh_autocast():
        try:
            with pyro.validation_enabled():
                return check_parameters(run)
        except RunError as failure:
            if not bad_rows or not isinstance(failure.error, ValueError) or first_missing(data) is not None:
                raise
            with pyro.validation_enabled(False), warnings.catch_warnings(action="ignore"):
                traces = check_parameters(run)
                if not has_bad_rows(site for trace in traces[::-1] for site in _scored_sites(trace).values()):
                    raise
            return traces


def _scored_sites(trace: Trace) -> Sites:
    return latent_sites(trace) | observed_sites(trace)


def _trace_pair(model: Function, guide: Function | None, data: tuple[Tensor, ...]) -> tuple[Trace, Trace]:
    guide_trace = _trace("guide", guide, data) if guide is not None else Trace()
    observed = observed_sites(guide_trace)
    if names := [name for name in _observations(guide_trace) if not observed[name]["infer"].get("is_auxiliary")]:
        raise ValueError(
            f"`guide` must have latent sites alone, such as `vae.guide`, got one that observes {names} as a model does"
        )
    model_trace = _trace("model", poutine.replay(model, guide_trace), data)
    set_plate_sizes(model_trace, guide_trace)
    return model_trace, guide_trace


def _observations(guide_trace: Trace) -> list[str]:
    """The names of the sites that a guide observes, without ``pyro.factor``."""
    return [name for name, site in observed_sites(guide_trace).items() if not isinstance(site["fn"], dist.Unit)]


def _trace(who: str, run: Function, data: tuple[Tensor, ...]) -> Trace:
    try:
        with taking_data(run, who, data):
            return poutine.trace(run).get_trace(*data)
    except (ValueError, RuntimeError, IndexError) as error:
        raise RunError(who, error) from error


def check_one_plate(
    sites: Iterable[tuple[str, str, Site]], plate: str | None = None, size: int | None = None, purpose: str = ""
) -> None:
    """Raise if a site lies in other plates than one data plate, the rightmost dimension of its batch.

    ``sites`` have owner, ``"model"`` or ``"guide"``, name and site. Name and ``size`` of the plate are those of the
    first site if left out. ``purpose`` is what needs that, for the message.
    """
    for owner, name, site in sites:
        frames = [frame for frame in site["cond_indep_stack"] if frame.name != PARTICLES]
        found = [frame.name for frame in frames]
        plate = plate or (found or ["data"])[0]
        if found != [plate] or frames[0].dim != -1:
            unsized = '; a plate needs a size for a value of each row, `pyro.plate("data", len(x))`'
            raise ValueError(
                f"`{owner}` must have every site in one plate, {plate!r}, as the rightmost batch dimension{purpose}, "
                f"got site {name!r} in the plates {found}{unsized * site.get('left_unsized', False)}"
            )
        size = size or frames[0].size
        if frames[0].size != size:
            raise ValueError(
                f"`{owner}` must have one number of rows at all sites, {size}, got {frames[0].size} at site {name!r}"
            )


def check_same_latents(latents: Sites, drawn: Sites, fewer: bool = False, more: bool = False) -> None:
    """Raise if a guide draws other latents than the model has, without an autoguide's auxiliary ones.

    With ``fewer`` it may lack some, which the model then draws; with ``more`` it may draw further ones.
    """
    names = {name for name, site in drawn.items() if not site["infer"].get("is_auxiliary")}
    if (latents.keys() - names and not fewer) or (names - latents.keys() and not more):
        raise ValueError(f"`guide` must draw the latents of the model, {sorted(latents)}, got {sorted(names)}")


def transformed(rows: tuple[Tensor, ...], transform: Transform | None) -> tuple[Tensor, ...]:
    """Apply a transform to the rows of each data tensor; raise if it changes them in place, or their number."""
    if transform is None:
        return rows
    expected = "`transform` must be a function that returns a tensor for each data tensor, as `pv.datasets.binarize`"
    if not callable(transform):
        raise TypeError(f"{expected}, got {transform!r}")
    versions = [_version(tensor) for tensor in rows]
    try:
        result = transform(*rows)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{expected}, got one that raises: {error}") from error
    if [_version(tensor) for tensor in rows] != versions:
        raise ValueError(
            "`transform` must be a function that makes new tensors, `x / 255` instead of `x.div_(255)`, got one that "
            "changes its rows in place, and so the data"
        )
    new = tuple(result) if isinstance(result, tuple | list) else (result,)
    given = f"for {len(rows)} tensors of {len(rows[0])} rows"
    if not all(isinstance(tensor, Tensor) and tensor.dim() > 0 for tensor in new):
        raise TypeError(f"{expected}, got {result!r} {given}")
    if [len(tensor) for tensor in new] != [len(tensor) for tensor in rows]:
        raise ValueError(
            f"`transform` must return one tensor for each data tensor, with as many rows, got tensors of "
            f"{[len(tensor) for tensor in new]} rows {given}"
        )
    return new


def _version(tensor: Tensor) -> int:
    """Return a number that grows when a tensor is changed in place; 0 for tensors of inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _has_subsample(model: Function, data: tuple[Tensor, ...], statements: SubsampleStatements) -> bool:
    """Whether a model reads its data with ``pyro.subsample``, or does not run on them."""
    with poutine.block(), statements, preserve_rng_state():
        try:
            trace_pair(model, None, data, bad_rows=True)
        except RunError:
            return True
    return statements.count > 0


def _run_first_batch(
    model: Function,
    guide: Function,
    data: tuple[Tensor, ...],
    within: tuple[SubsampleRows, FixedSubsample],
    plate: str | None,
    statements: SubsampleStatements,
) -> tuple[tuple[Trace, Trace] | RunError, bool]:
    """The traces of a pair under a subsample, or why it does not run there, and whether it takes the rows itself.

    It does by ``pyro.subsample``, or with the numbers of the rows that a ``plate`` with this name gives it.
    """
    with poutine.block(), statements, within[0], within[1]:
        try:
            traces = trace_pair(model, guide, data)
            follows = plate is not None and _indexes_rows(traces[0], plate, len(within[0].rows))
            return traces, statements.count > 0 or follows
        except RunError as failure:
            if failure.who == "guide":  # then the model has not run
                with suppress(RunError):
                    trace_pair(model, None, data)
            if statements.count:
                with suppress(RunError):
                    return trace_pair(model, guide, data, bad_rows=True), True
            return failure, statements.count > 0


def _indexes_rows(model_trace: Trace, plate: str, count: int) -> bool:
    """Whether observed values are those of the rows in the subsample of a plate, as ``obs=x[rows]``."""
    found = [
        torch.as_tensor(site["value"]).shape[: -site["fn"].event_dim or None][frame.dim :][:1] == (count,)
        for site in observed_sites(model_trace).values()
        for frame in site["cond_indep_stack"]
        if frame.name == plate and frame.vectorized
    ]
    return bool(found) and all(found)


def _fixed_subsample(
    data: DataTensors, rows: Tensor, transform: Transform | None, read: tuple[Tensor, ...] = ()
) -> FixedSubsample:
    """Transformed rows for ``pyro.subsample`` to return; of tensors without a transform the plate takes them itself."""
    if transform is None and not isinstance(data, LazyData):
        return FixedSubsample((), ())
    return FixedSubsample(data, transformed(read or data.rows(rows), transform))


def _all_rows(data: tuple[Tensor, ...], rows: Tensor, *read: Tensor) -> AbstractContextManager[tuple[Tensor, ...]]:
    return nullcontext(data)


@contextmanager
def _subsampled(
    data: DataTensors, rows: Tensor, plate: str, transform: Transform | None, read: tuple[Tensor, ...] = ()
) -> Iterator[tuple[Tensor, ...]]:
    with SubsampleRows(plate, rows), _fixed_subsample(data, rows, transform, read):
        yield data


@contextmanager
def _sliced(
    data: DataTensors,
    rows: Tensor,
    transform: Transform | None = None,
    numbered: str | None = None,
    read: tuple[Tensor, ...] = (),
) -> Iterator[tuple[Tensor, ...]]:
    """Take slices of the data; the plate ``numbered`` then has the numbers of these rows."""
    within = nullcontext() if numbered is None else SubsampleRows(numbered, rows)
    with poutine.scale(scale=len(data[0]) / len(rows)), within:
        yield transformed(read or data.rows(rows), transform)


@contextmanager
def autoguide_follows_subsample(guide: Function) -> Iterator[None]:
    """Let an autoguide without ``create_plates`` take any subsample; Pyro fixes the size at that of the first call."""
    auto = unbound(guide)
    if not isinstance(auto, AutoGuide) or auto.create_plates is not None:
        yield
        return
    auto.create_plates = lambda *args, **kwargs: [
        pyro.plate(name, frame.full_size or frame.size, dim=frame.dim) for name, frame in auto._prototype_frames.items()
    ]
    try:
        yield
    finally:
        auto.create_plates = None


@contextmanager
def autoguide_as_before_on_error(guide: Function) -> Iterator[None]:
    """Run a block; if it raises, an autoguide that it has set up is as before, and can be set up for other rows."""
    auto = unbound(guide)
    modules = list(auto.modules()) if isinstance(auto, AutoGuide) else []
    before = [
        {name: copy(value) if isinstance(value, dict | list | set) else value for name, value in vars(module).items()}
        for module in modules
    ]
    try:
        yield
    except BaseException:
        for module, values in zip(modules, before, strict=True):
            vars(module).clear()
            vars(module).update(values)
        raise


def _is_of_few_rows(failure: RunError, model: Function, guide: Function, few: tuple[Tensor, ...], count: int) -> bool:
    """Whether what a pair raises under a subsample is its own error, and not a mix-up of all rows with some.

    It is if the pair raises on data of as few rows, too, and the message has no number of all rows.
    """
    if re.search(rf"\b{count}\b", str(failure.error)):
        return False
    with poutine.block(), preserve_rng_state():
        try:
            trace_pair(model, guide, few)
        except RunError:
            return True
    return False


def _no_subsample(who: str, plate: str, reason: str) -> ValueError:
    return ValueError(
        f"`batch_size` needs a {who} that follows the subsample of the plate {plate!r}: {reason}. Read its data with "
        "`pyro.subsample(x, event_dim=...)` inside the plate, or leave batch_size out for full batches"
    )


def _check_subsampling(pair: ModelGuide, batch_size: int) -> None:
    """Raise if a site in the data plate has another number of rows than the subsample."""
    for who, name, site in pair.sites:
        sizes = [frame.size for frame in site["cond_indep_stack"] if frame.name == pair.plate]
        if sizes and sizes != [batch_size]:
            raise _no_subsample(who, pair.plate, f"site {name!r} has {sizes[0]} rows instead of {batch_size}")
    full = {_size_of_plate(site, pair.plate) for _, _, site in pair.sites} - {None, (batch_size, pair.num_data)}
    if full:
        _, size = next(iter(full)) or (0, 0)
        raise ValueError(
            f"`data` must have a row for each row of the plate {pair.plate!r} in their first dimension for "
            f"`batch_size`, got {pair.num_data} for {size}. Other arguments are "
            "`pv.Arguments(...)`"
        )


def _size_of_plate(site: Site, plate: str) -> tuple[int, int] | None:
    """The size of a plate around a site, and that of all its rows; ``None`` if the site is in no such plate."""
    found = [(frame.size, frame.full_size or frame.size) for frame in site["cond_indep_stack"] if frame.name == plate]
    return found[0] if found else None


def _check_reading(pair: ModelGuide, subsample: SubsampleRows, drawn: FixedSubsample) -> None:
    """Raise if a function reads data but by their subsample: at the same rows, other data must change nothing."""
    last = pair.data.rows(slice(pair.data.num_checked - 1, pair.data.num_checked))
    other = tuple(row.expand_as(tensor) for row, tensor in zip(last, pair.data, strict=True))
    statement = "`pyro.subsample(x, event_dim=...)` of the tensor that it is given"
    needs, remedy, without = "`transform` needs", "Read it so, or transform the data before", "without the transform"
    if pair.transform is None:
        needs, remedy = "`data` whose rows are read on demand need", "Read it so, or pass tensors, which are in memory"
        without = "where only these are there"
    for who, run, trace in (("model", pair.model, pair.model_trace), ("guide", pair.guide, pair.guide_trace)):
        if isinstance(unbound(run), AutoGuide):  # never reads data
            continue
        if who == "model" and not all(drawn.read):
            raise ValueError(
                f"{needs} a model that reads every data tensor with {statement}, got one that does not read "
                f"tensor {drawn.read.index(False)} so. {remedy}"
            )
        fixed = poutine.condition(run, data={name: site["value"] for name, site in latent_sites(trace).items()})

        def densities(data: tuple[Tensor, ...], fixed: Function = fixed) -> dict[str, Tensor]:
            with poutine.block(), torch.no_grad(), seeded(0), subsample, FixedSubsample(data, drawn.rows):
                sites = observed_sites(poutine.trace(fixed).get_trace(*data))
            return {name: log_density(site) for name, site in sites.items()}

        ours = {name: log_density(site) for name, site in (latent_sites(trace) | observed_sites(trace)).items()}
        theirs = densities(other)
        if not _allclose(ours, theirs) and not _allclose(densities(pair.data), theirs):  # not by random numbers alone
            raise ValueError(
                f"{needs} a {who} that reads its data with {statement} alone, "
                f"got one that reads some of them in another way, {without}. {remedy}"
            )


def _allclose(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.allclose(value, theirs[name]) for name, value in ours.items())


def _check_single_rows(pair: ModelGuide, take: Batcher) -> None:
    """Raise if a batch of one row fails where two rows run, as batch normalisation in training mode does."""

    def failure(size: int) -> RunError | None:
        with poutine.block(), take(torch.arange(size, device=pair.data[0].device)) as arguments:
            try:
                trace_pair(pair.model, pair.guide, arguments)
            except RunError as error:
                return error
        return None

    if (failed := failure(1)) is not None and failure(2) is None:
        raise ValueError(
            f"`batch_size` must be 2 or more where the {failed.who} runs on two rows but not on one, as with batch "
            f"normalisation in training mode, got 1: {failed.error}"
        ) from failed.error


def _check_independent(pair: ModelGuide, first: DataTensors) -> None:
    """Raise if a row of a stream, of which this is the first batch, depends on other rows, or on its number."""
    for owner in ("model", "guide"):
        if not pair.is_amortized(owner, first):
            raise ValueError(
                f"`data` must be read by the numbers of their rows where the {owner} is not amortized: a row's "
                "distribution in it depends on more than that row, such as parameters for each datum. Got a stream; "
                "pass a tensor, an array or a Dataset with `batch_size`"
            )


def _check_slicing(pair: ModelGuide, in_any_order: bool = True) -> bool:
    """Raise if slices of the data would train a pair wrong; return whether it needs the numbers of their rows."""
    pair._check_all_in_plate()
    remedy = (
        "Read the data in model and guide with `pyro.subsample(x, event_dim=...)` inside the plate, or leave "
        "batch_size out for full batches"
    )
    if pair.global_latents:
        raise ValueError(
            f"`batch_size` needs a model that reads its data with pyro.subsample where latents are global, got "
            f"{pair.global_latents} outside of the plate {pair.plate!r}. {remedy}"
        )
    if pair.is_amortized("model") and pair.is_amortized("guide"):
        return False
    if not in_any_order:
        _check_independent(pair, pair.data)
    runs = (("model", pair.model, pair.model_trace), ("guide", pair.guide, pair.guide_trace))
    for who, run, trace in runs:
        if not is_amortized(run, pair.data, pair.plate, trace, numbered=True):
            raise _numbers_needed(who)
    return True


def _numbers_needed(who: str) -> ValueError:
    return ValueError(
        f"`batch_size` needs a model that reads its data with pyro.subsample where the {who} is not amortized: "
        "a row's distribution in it depends on more than that row, such as parameters for each datum. Read the data in "
        "model and guide with `pyro.subsample(x, event_dim=...)` inside the plate, or leave batch_size out for full "
        "batches"
    )


def is_amortized(
    run: Function,
    data: tuple[Tensor, ...],
    plate: str,
    trace: Trace | None = None,
    numbered: bool = False,
    full_size: int | None = None,
) -> bool:
    """Whether the distributions of a row, in a model or guide, depend on that row alone, wherever it stands.

    All rows are run twice in evaluation mode, at most :func:`rows_at_once` together: in order, and in a random order
    among rows beyond the range of the data. At the same latents every row must have the same density in both runs. The
    parameters, known from ``trace``, are shifted by noise, since equal ones do not distinguish rows. Where the
    densities differ, or a distribution is not valid, the runs are repeated with less noise and, in proportion, a
    smaller tolerance: noise grows with each layer of a deep network, to scales of infinity, and it can make the inverse
    of a flow of many variables too steep for its precision. Autoguides are judged by their plates. With ``numbered``,
    the data plate has the numbers of the rows in the data. ``full_size`` is that of a plate that takes a subsample of
    its own.
    """
    data = data if isinstance(data, DataTensors) else DataTensors(data)
    first = data.few(rows_at_once(data))
    with scoped_param_store(), evaluation_mode(run), poutine.block(), torch.no_grad(), seeded(_SEED):
        try:
            trace = trace or poutine.trace(run).get_trace(*first)
            if isinstance(unbound(run), AutoGuide):
                return not any(_dims_of(trace, plate))
            for noise, tolerance in _NOISE_AND_TOLERANCE:
                with suppress(ValueError), _perturbed(trace, noise):
                    if _Rows(run, plate, numbered, full_size, tolerance).are_independent(data):
                        return True
        except (ValueError, RuntimeError, IndexError, KeyError):
            pass
        return False


def rows_at_once(data: tuple[Tensor, ...]) -> int:
    """How many rows are run together where any number is right: that bounds the memory."""
    return max(2, _BUDGET // max(64, *(tensor[0].numel() for tensor in data)))


def _dims_of(trace: Trace, plate: str) -> dict[str, int]:
    """The dimension of the data plate in each site that lies in it, by name."""
    return {
        name: frame.dim
        for name, site in (latent_sites(trace) | observed_sites(trace)).items()
        for frame in site["cond_indep_stack"]
        if frame.name == plate
    }


class _Rows:
    """Runs of a model or guide on rows of data at given latents. In values and densities the rows come first."""

    def __init__(
        self,
        run: Function,
        plate: str,
        numbered: bool = False,
        full_size: int | None = None,
        tolerance: float = _NOISE_AND_TOLERANCE[0][1],
    ):
        self.run, self.plate, self.numbered, self.full_size = run, plate, numbered, full_size
        self.tolerance = tolerance
        self.outside: dict[str, Tensor] = {}  # the latents outside of the plate, the same in all runs
        self.dims: dict[str, int] = {}  # of the rows in the density of each site in the plate
        self.event_dims: dict[str, int] = {}

    def read(self, trace: Trace) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the latents in the plate, and the densities of all sites in it, of the first run."""
        sites = latent_sites(trace) | observed_sites(trace)
        self.dims = _dims_of(trace, self.plate)
        self.event_dims = {name: site["fn"].event_dim for name, site in sites.items()}
        latents = {name: site["value"] for name, site in latent_sites(trace).items()}
        self.outside |= {name: value for name, value in latents.items() if name not in self.dims}
        values = {name: self._moved(name, value) for name, value in latents.items() if name in self.dims}
        return values, {name: log_density(sites[name]).movedim(dim, 0) for name, dim in self.dims.items()}

    def trace(self, data: tuple[Tensor, ...], values: dict[str, Tensor], rows: Tensor) -> Trace:
        """Run rows, with these numbers in all data, at values of their latents."""
        values = self.outside | {name: self._moved(name, value, back=True) for name, value in values.items()}
        with SubsampleRows(self.plate, rows) if self.numbered else nullcontext():
            trace = poutine.trace(poutine.condition(self.run, data=values)).get_trace(*data)
        frames = [frame for site in trace.nodes.values() for frame in site.get("cond_indep_stack", ())]
        expected = (None, -1, self.full_size or len(rows))
        if any(frame.full_size not in expected for frame in frames if frame.name == self.plate):
            raise ValueError("the plate has another size than the data, and scales the densities of slices by itself")
        return trace

    def densities(self, data: tuple[Tensor, ...], values: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """Return the densities of rows in another run."""
        sites: dict[str, Any] = dict(self.trace(data, values, rows).nodes)
        return {name: log_density(sites[name]).movedim(dim, 0) for name, dim in self.dims.items()}

    def first_change(
        self, ours: dict[str, Tensor], data: tuple[Tensor, ...], values: dict[str, Tensor], index: Tensor, kept: Tensor
    ) -> str | None:
        """Return the first site whose density changes in the rows that are kept, where others are replaced."""
        if len(data[0]) == len(index):  # else the plate lies along another dimension of the data
            data = tuple(tensor[index] for tensor in data)
        theirs = self.densities(data, {name: value[index] for name, value in values.items()}, index)
        return next((name for name in ours if not self._close(ours[name][kept], theirs[name][kept])), None)

    def are_independent(self, data: DataTensors) -> bool:
        """Whether rows have the same densities in order and in a random order, among values beyond the data's range."""
        count, device = data.num_checked, data[0].device
        chunks = torch.arange(count, device=device).split(rows_at_once(data))
        found = [self.read(self.trace(data.rows(rows), {}, rows)) for rows in chunks]
        values, ours = (
            {name: torch.cat([of[name] for of in parts]) for name in parts[0]} for parts in zip(*found, strict=True)
        )
        cycle = torch.randperm(count, device=device)
        order = torch.empty_like(cycle).index_copy_(0, cycle, cycle.roll(1))  # moves every row
        for rows in order.split(len(chunks[0])):
            theirs = self._among_others(data, values, rows)
            if not all(self._close(ours[name][rows], theirs[name][: len(rows)]) for name in ours):
                return False
        return True

    def _among_others(self, data: DataTensors, values: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """Return the densities of rows, with half as many others after them."""
        others = rows[torch.randint(len(rows), (-(-len(rows) // 2),), device=rows.device)]
        numbers = torch.cat([rows, others])

        def run(beyond: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
            def together(ours: Tensor, theirs: Tensor) -> Tensor:
                return torch.cat([ours, beyond(ours, theirs)])

            latents = {name: together(value[rows], value[others]) for name, value in values.items()}
            return self.densities(tuple(map(together, data.rows(rows), data.rows(others))), latents, numbers)

        with pyro.validation_enabled(False):
            try:
                return run(_beyond_range)
            except (ValueError, RuntimeError, IndexError):  # such as an index that is out of range
                return run(lambda rows, others: others)

    def _close(self, ours: Tensor, theirs: Tensor) -> bool:
        return torch.allclose(ours, theirs, rtol=self.tolerance, atol=self.tolerance, equal_nan=True)

    def _moved(self, name: str, value: Tensor, back: bool = False) -> Tensor:
        """Bring the rows of the value of a site to the first dimension, or back."""
        dim = self.dims[name] - self.event_dims[name]
        return value.movedim(0, dim) if back else value.movedim(dim, 0)


def _random(owner: str) -> ValueError:
    return ValueError(
        f"`{owner}` must have one {'log p(x, z)' if owner == 'model' else 'log q(z | x)'} at each z, got two different "
        "ones at the same z: it draws random numbers outside of its sites. Dropout is off in evaluation mode as a "
        "module, `nn.Dropout`, or as `F.dropout(x, training=self.training)`"
    )


def _dependent(owner: str, name: str) -> ValueError:
    return ValueError(
        f"`{owner}` must have a density of each row that depends on that row alone, got one at site {name!r} that "
        "changes with the values of other rows, as by statistics of the batch, `x.roll(1, 0)` or attention over rows. "
        "Compute it from the row alone; batch normalisation does with its running statistics"
    )


def _beyond_range(rows: Tensor, others: Tensor) -> Tensor:
    """Values far above and below those of all rows, as many as others: extremes, means and orders are then others."""
    if not others.is_floating_point():
        return others
    low, high = rows.nan_to_num().amin(0), rows.nan_to_num().amax(0)
    step = high - low + 1
    place = torch.arange(len(others), device=rows.device).reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(place % 2 == 0, high + 3 * step, low - step)


@contextmanager
def _perturbed(trace: Trace, noise: float) -> Iterator[None]:
    """Shift the parameters of a trace by noise of this scale inside the block, and restore them after it."""
    stored = dict(pyro.get_param_store().named_parameters())  # unconstrained
    parameters = [stored[name] for name, site in trace.nodes.items() if site["type"] == "param"]
    values = [parameter.detach().clone() for parameter in parameters]
    with ExitStack() as stack:
        for parameter, value in zip(parameters, values, strict=True):
            stack.callback(parameter.copy_, value)
            parameter.add_(noise * torch.randn_like(parameter))
        yield
