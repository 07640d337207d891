"""Fit and evaluate any Pyro model and guide by stochastic variational inference."""

import copy
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae._utils.ambient import check_gradients_enabled, one_thread
from pyro_vae._utils.chunks import in_chunks
from pyro_vae._utils.data import DataTensors, rows_like
from pyro_vae._utils.display import Result, Table, count_of
from pyro_vae._utils.module_state import buffers_kept, evaluation_mode
from pyro_vae._utils.param_store import rollback_params_on_error, without_training
from pyro_vae._utils.plates import every_row
from pyro_vae._utils.ranks import OnEveryRank, Ranks, each_rank, ranks
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.shared_calls import report_of_ranks
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import describe, function, mapping, positive, positive_int
from pyro_vae._utils.warn import warn_user
from pyro_vae.arguments import any_arguments, bind, unbound
from pyro_vae.compilation.precision import check_precision
from pyro_vae.model_guide import (
    ModelGuide,
    Transform,
    autoguide_as_before_on_error,
    autoguide_follows_subsample,
    rows_at_once,
)
from pyro_vae.training.automatic import AutomaticEngine, GradientEngine
from pyro_vae.training.checkpoints import Checkpoints
from pyro_vae.training.compiled_step import CapturedStep
from pyro_vae.training.elbo_evaluator import ElboEvaluator, rows_that_fit
from pyro_vae.training.gradient_sum import GradientSum
from pyro_vae.training.loop import Batches, Callback, Loop, RunCheckpoints, StreamBatches
from pyro_vae.training.optimizers import MakeOptimizer, RunOptimizer
from pyro_vae.training.preflight import as_elbo, check_options, run_all_rows
from pyro_vae.training.replayed_step import ReplayedStep
from pyro_vae.training.schedules import (
    RunSchedule,
    Schedule,
    check_ends_of_ranks,
    check_schedules,
    checked_schedule,
    described,
)
from pyro_vae.training.shared_draws import SharedDraws
from pyro_vae.training.state import data_fingerprint, discover_parameters
from pyro_vae.training.step import Step
from pyro_vae.training.streams import Stream, as_source, check_no_batch_size

__all__ = ["Fitted", "as_history", "evaluate", "fit"]


class Terms(dict[str, Any]):
    """ELBO, distortion and rate by name; where there is a surrogate instead of an ELBO, an error names the reason."""

    def __init__(self, terms: Mapping[str, Any], why_no_bound: str):
        super().__init__(terms)
        self.why_no_bound = why_no_bound

    def __missing__(self, name: str) -> Any:
        bound = name.endswith("elbo") and self.why_no_bound
        raise KeyError(f"{name!r}: the objective is no ELBO, but a 'surrogate': {self.why_no_bound}" if bound else name)


@dataclass(frozen=True, repr=False)
class Fitted(Result):
    """What :func:`fit` returns. The trained parameters are in the networks, and in Pyro's param store.

    Attributes:
        model: the model, as given.
        guide: the guide, as given.
        history: per epoch, in nats per datum, of which each row of the data plate is one: ``elbo``, ``distortion`` and
            ``rate``, means over the epoch's steps; with validation data ``validation_elbo``, ``validation_distortion``
            and ``validation_rate`` at its end. With a schedule of the learning rate also ``lr``, that of the epoch's
            last step.
        seed: the seed.
        steps: number of gradient steps.
        seconds: wall-clock time of the training.
        stopped: why it ended: ``"epochs"`` are done, ``"patience"``, ``"callback"`` or ``"interrupted"``.
        skipped: steps that were left out, as they were not finite.
        engine: how the steps were computed: ``"eager"``, by the code of model and guide; ``"replayed"``, by the same
            operations without that code; or ``"compiled"``, and from which step on; with the reason if ``fit`` chose.
        of_all_data: whether the history is in nats of all data, since no observed site is in a data plate.
    """

    model: Function
    guide: Function
    history: dict[str, list[float]]
    seed: int
    steps: int
    seconds: float
    stopped: str = "epochs"
    skipped: int = 0
    engine: str = "eager"
    of_all_data: bool = False

    @property
    def unit(self) -> str:
        """The unit of the history: nats per datum, or of all data."""
        return "nats of all data" if self.of_all_data else "nats per datum"

    @property
    def _bound(self) -> str:
        """The name of the objective in the history."""
        return "surrogate" if "surrogate" in self.history else "elbo"

    def _line(self) -> str:
        bound = self._bound
        held_out = f"validation_{bound}"
        found = [f"{'ELBO' if bound == 'elbo' else bound} {self.history[bound][-1]:.3f}"]
        if held_out in self.history:
            found.append(f"validation {self.history[held_out][-1]:.3f}")
        ended = f", ended by {self.stopped}" if self.stopped != "epochs" else ""
        skipped = f", {count_of(self.skipped, 'step')} skipped" if self.skipped else ""
        return (
            f"{', '.join(found)} {self.unit} after {count_of(len(self.history[bound]), 'epoch')}, "
            f"{count_of(self.steps, 'step')}, {self.seconds:.3g} s{ended}{skipped}"
        )

    def _table(self) -> Table:
        terms = [name for name in self.history if not name.startswith("validation_") and name != "lr"]
        held_out = any(name.startswith("validation_") for name in self.history)
        rows: list[tuple[object, ...]] = []
        for term in terms:
            columns = [self.history.get(prefix + term, []) for prefix in ("", "validation_")[: 1 + held_out]]
            shown = (f"{column[-1]:.3f}" if len(column) else "" for column in columns)
            rows.append(("ELBO" if term == "elbo" else term, *shown))
        epochs = count_of(len(next(iter(self.history.values()), [])), "epoch")
        note = f"In {self.unit}, after {epochs}, {count_of(self.steps, 'step')}, {self.seconds:.3g} s. "
        note += f"Seed {self.seed}. Steps: {self.engine}."
        best = self.history.get(f"validation_{self._bound}", [])
        if len(best) and (epoch := int(np.argmax(best))) < len(best) - 1:
            note += f" The best validation was {best[epoch]:.3f}, in epoch {epoch + 1:,}."
        if self.stopped != "epochs":
            note += f" The run was ended by {self.stopped}."
        if self.skipped:
            note += f" {count_of(self.skipped, 'step')} not finite: left out."
        return Table(("term", "training", *(["validation"] if held_out else [])), rows, note)

    def _curves(self) -> Mapping[str, Sequence[float]]:
        shown = {"": "training", "validation_": "validation"}
        names = {f"{label} {self._bound}": prefix + self._bound for prefix, label in shown.items()}
        return {label: self.history[name] for label, name in names.items() if name in self.history}


def as_history(history: "Fitted | Mapping[str, Sequence[float]]") -> Mapping[str, Sequence[float]]:
    """Return the history of a :class:`Fitted`, or a mapping from names to one number per epoch, as it is.

    Every function with an argument ``history`` takes it through here.

    >>> as_history({"elbo": [-3.0, -2.0]})
    {'elbo': [-3.0, -2.0]}
    """
    expected = "the result of `fit`, or a mapping from names to one number per epoch"
    if not isinstance(history, Fitted | Mapping):
        raise TypeError(f"`history` must be {expected}, got {describe(history)}")
    epochs: Mapping[str, Any] = history.history if isinstance(history, Fitted) else history
    for name, values in mapping(epochs, "history", "`fitted.history`").items():
        numbers = values.detach().cpu() if isinstance(values, Tensor) else values
        try:
            array = np.asarray(numbers)
        except ValueError as error:
            raise ValueError(f"`history` must be {expected}, got {values!r} for {name!r}") from error
        if array.ndim != 1 or array.dtype.kind not in "iuf":
            got = f"{name!r} of shape {array.shape} and dtype {array.dtype}"
            raise ValueError(f"`history` must be {expected}, got {got}")
    return epochs


@each_rank("fit")
@any_arguments
def fit(
    model: Function,
    guide: Function,
    data: Data = (),
    *,
    epochs: int,
    batch_size: int | None = None,
    lr: float | Schedule | RunSchedule | None = None,
    optimizer: MakeOptimizer = torch.optim.Adam,
    elbo: ELBO | None = None,
    validation: Data | None = None,
    transform: Transform | None = None,
    schedules: Mapping[Tensor, Schedule] | None = None,
    plate: str = "data",
    seed: int = 0,
    progress: bool | None = None,
    compile: bool | None = None,
    precision: str | None = None,
    clip_norm: float | None = None,
    nonfinite: str = "stop",
    patience: int | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
    num_data: int | None = None,
) -> Fitted:
    r"""Maximise the ELBO of a Pyro model and guide with Adam, or another optimizer of torch.

    A step is that of ``pyro.infer.SVI``, with one optimizer for all parameters in place of one for each. Parameters
    stay in the current param store. Random states, default dtype, threads and the validation flag are restored at the
    end.

    The history holds the ELBO at β = 1, -distortion - rate. It holds a ``surrogate`` instead where that is no bound,
    see :attr:`pyro_vae.model_guide.ModelGuide.why_no_bound`: soft targets, a point for a continuous latent (MAP), data
    outside of the support of the likelihood, for example; ``history["elbo"]`` is then an error that names the reason.

    Args:
        model: a Pyro model, called as ``model(data)``, or ``model(*data)`` for a sequence.
        guide: its guide, called with the same arguments.
        data: N rows, or a sequence of data with N rows each, one for each argument. Tensors are used as they are.
            Arrays of NumPy, memory-mapped ones too, frames of pandas and polars, sparse matrices of SciPy and data sets
            of torch get dtype and device of the VAE, or the default ones; with ``batch_size``, rows of files, sparse
            matrices and data sets are read for each batch. A ``DataLoader`` or an iterable data set of torch is a
            stream: its batches are used as they come, and a tuple has the arguments of model and guide. Any other
            arguments, such as keywords, numbers and dictionaries, are possible, see
            :class:`pyro_vae.arguments.Arguments`; none for a program that has its data already.
        epochs: passes over the data; without ``batch_size``, each is one step.
        batch_size: rows per step, in a new random order in each epoch; all N if left out. A single row that is left
            joins the batch before. Mini-batches subsample the data plate, see
            :func:`pyro_vae.model_guide.ModelGuide.on_batches`. It must be left out for a ``DataLoader``.
        lr: the learning rate, or a schedule of it (see :mod:`pyro_vae.training.schedules`); the optimizer's own if left
            out, 1e-3 for Adam. It must be left out if ``optimizer`` sets one. With a schedule, the history has the rate
            of each epoch's last step, ``lr``.
        optimizer: a class of ``torch.optim``, with settings by ``functools.partial(torch.optim.AdamW,
            weight_decay=0.01)``, or a function from a list of parameters to their optimizer. ``lr`` is passed to it by
            name. It is called for all parameters of the first step, again for those that a later step adds, and once
            before training, for small tensors, as a check. With ``compile=True`` it must be one whose steps can be
            captured: most of ``torch.optim``.
        elbo: any ELBO of ``pyro.infer``; by default ``Trace_ELBO()``. ``TraceEnum_ELBO`` needs ``config_enumerate``.
        validation: held-out data of the same form, evaluated after each epoch, in batches of ``batch_size`` and in
            evaluation mode: dropout is off, and batch normalisation uses its running statistics. Training is in the
            mode that the networks are in.
        transform: function of the rows of each data tensor, such as :func:`pyro_vae.datasets.pixels.resample` for
            bytes; it must return new tensors. It is called once per step, which model and guide share, once with the
            validation data, and a few times before training as a check.
        schedules: values that change during training: 0-dim tensors, such as the ``temperature`` of a relaxed family
            (taken after ``vae.to(...)``, which replaces it), each with a schedule: a function of the step, from 0.
        plate: name of the data plate. Where no plate has the default name, it is the one that holds every observed
            site and has N rows.
        seed: of the random numbers of the run and of the order of the data. Weights are drawn when parts are built:
            call ``torch.manual_seed`` before that. A second call of ``fit`` continues from the current parameters.
        progress: whether to show a progress bar; by default only on a terminal or in a notebook.
        compile: whether to capture the step as one graph and compile it: the same numbers, many times faster, after
            some seconds in a C++ compiler. Model and guide must run the same operations in every step. ``False`` runs
            their code in every step. By default, ``None``, the run decides: it replays loss and gradients of its first
            steps, to the same bits, where these can be captured; a long run lets a compiler work in the background,
            and goes on with its graph. The result has what was chosen, in ``engine``. See the page on speed.
        precision: ``"bf16-mixed"`` for large products of networks in bfloat16 and all else in float32: those of
            linear and recurrent layers from 2^20 multiplications on, and convolutions. It saves time where the
            processor or card has instructions for bfloat16. The history is that of these steps; the validation is
            in float32. By default, all is in the dtype of the tensors.
        clip_norm: largest norm of all gradients together; larger gradients are scaled down to it.
        nonfinite: ``"stop"`` at a step whose loss or gradient is not finite, or ``"skip"`` it, up to 99 in a row.
        patience: number of epochs without a better validation ELBO after which training ends. The parameters are then
            those of the best epoch, also if ``epochs`` end first.
        callbacks: functions called at the end of each epoch with an :class:`pyro_vae.training.loop.Epoch`; training
            ends if one returns ``True``. On several ranks they run on rank 0, or on all of them by
            :func:`pyro_vae.parallel.on_every_rank`.
        checkpoints: :class:`pyro_vae.Checkpoints`, or their folder, to which the state of the run is written. If the
            folder has a checkpoint, the run resumes from it, with the same numbers as without the stop. A
            ``DataLoader`` needs a sampler of torch for that, or one with ``state_dict`` and ``load_state_dict``.
        num_data: N of a stream, of all ranks, by which terms of B rows are scaled, N/B. By default the length of its
            data set, of a ``SubsetRandomSampler``, or else the number of rows of a pass, which is read before training.

    Ctrl-C ends the run after the current step, with a warning; the parameters stay as trained so far.

    In a script that ``torchrun`` has started as several processes, the ranks, each rank runs its share of the rows of
    every batch, and all make the step of the whole batch, see :mod:`pyro_vae.parallel`. Where all rows are one batch,
    and the pair cannot be trained on some of them, rank 0 runs them all, with a warning. All have the same parameters,
    history and result; latents outside of the data plate have one draw for all ranks. The data, or the batches of a
    stream, are the same on each rank, or a stream has rows of its own on each. What fails on one rank is raised on all.

    Raises:
        TypeError, ValueError: for unusable arguments, before any training;
            :class:`pyro_vae.compilation.graph.CaptureError` is one, if the step is not the same each time.
        FloatingPointError: if the loss or a gradient is not finite, with the step and the site and its rows, or the
            parameter. The parameters are then those of the last good step.

    Source: Kingma and Welling 2014; Hoffman et al. 2013, "Stochastic variational inference".

    >>> from pyro_vae import VAE, datasets, priors, guides, likelihoods, networks
    >>> x = datasets.two_gaussians(200, seed=0).x
    >>> net = networks.mlp([16])
    >>> vae = VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> fitted = fit(vae.model, vae.guide, x, epochs=20, batch_size=50, lr=1e-2)
    >>> fitted.steps, sorted(fitted.history)
    (80, ['distortion', 'elbo', 'rate'])
    """
    function(model, "model")
    function(guide, "guide")
    check_gradients_enabled("fit")
    check_no_batch_size(data, batch_size)
    tensors, stream = as_source(data, "data", model, transform is not None, batch_size, num_data)
    held_out, held_out_stream, to_validate = None, None, [model, guide]
    if validation is not None:
        *to_validate, validation = bind(
            unbound(model), unbound(guide), validation, plate, "validation", transform is not None
        )
        held_out, held_out_stream = as_source(validation, "validation", model, transform is not None, batch_size)
        rows_like(held_out, tensors, "validation")
    check_precision(precision)
    check_options(epochs, compile, clip_norm, nonfinite, patience, callbacks, progress, held_out is not None)
    if not isinstance(lr, RunSchedule | None):
        lr = checked_schedule(lr, "lr") if callable(lr) else positive(lr, "lr")
    schedules = check_schedules({} if schedules is None else schedules)
    clip_norm = None if clip_norm is None else float(clip_norm)
    group = ranks()
    batch_size = _batch_size(batch_size, len(tensors[0])) if stream is None else stream.batch_size
    share = group.largest_share(batch_size) if stream is None else stream.most_rows  # of a batch on this rank
    shares_rows = group.size > 1 and (stream is not None or share < len(tensors[0]))
    if share == len(tensors[0]) and stream is None:
        tensors = tensors.whole()
    saves = RunCheckpoints.are_given(checkpoints)
    if stream is not None and saves:
        stream.check_resumable()
    evaluator = ElboEvaluator(model, guide, as_elbo(elbo), plate, precision)
    callbacks = _callbacks_of_ranks(callbacks, group)
    make_optimizer = RunOptimizer(optimizer, lr, compile is True and group.size == 1, saves, tensors[0].device)
    settings: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "compile": compile, "clip_norm": clip_norm}
    settings |= {
        "precision": precision,
        "lr": make_optimizer.rate,
        "optimizer": make_optimizer.description,
        "schedules": schedules,
    }
    check_ends_of_ranks([one for one in (lr, *schedules.values()) if callable(one)], group)
    needs_config = saves or group.size > 1
    run_config = _run_config(evaluator, tensors, held_out, **settings) if needs_config else {}
    group.check_same("the arguments of fit", run_config | {"epochs": epochs, "patience": patience})
    started = time.perf_counter()
    with (
        one_thread("fit"),
        RunCheckpoints.opened(checkpoints, run_config) if saves else nullcontext() as saved,
        autoguide_follows_subsample(guide),
        nullcontext() if stream is None else stream.epochs_kept(),
    ):
        pair = None
        with rollback_params_on_error(), seeded(seed), buffers_kept(model, guide):
            make_pair = partial(_pair_to_train, model, guide, plate, transform, evaluator.elbo)
            if group.size > 1 and stream is None and batch_size == len(tensors[0]):
                pair = _pair_on_shares(partial(make_pair, tensors, share, True), model, guide, group, seed, shares_rows)
                shares_rows = pair is not None
                if not shares_rows:
                    share, tensors = batch_size, tensors.whole()
            pair = pair or make_pair(tensors, share, shares_rows)
            _share_reason(pair)
            evaluator.bound, evaluator.plate, evaluator.model_masks = pair.bound, pair.plate, pair.draws_cells
            with every_row(), evaluation_mode(model, guide):
                held_out_pair = None if held_out is None else pair.held_out(held_out, batch_size, *to_validate)
        if stream is None:
            batches = Batches(pair.take, tensors, batch_size, seed, group, shares_rows)
        else:
            batches = StreamBatches(pair.take, stream, seed)
        last_step = math.inf if batches.per_epoch is None else epochs * batches.per_epoch
        rate = lr.begin(last_step) if isinstance(lr, RunSchedule) else lr
        validate = None
        if held_out_pair is not None:
            validator = evaluator if held_out_pair.model is model else evaluator.of(*to_validate)
            validator = validator.in_float32()
            validate = partial(_evaluate_held_out, validator, held_out_pair, seed, held_out_stream)
        options: dict[str, Any] = {"clip_norm": clip_norm, "skips": nonfinite == "skip", "numbered": True}
        if group.size > 1:
            options["shared"] = SharedDraws(pair.plate if shares_rows else None, seed)
        # A run that may resume with more epochs must not depend on their number.
        ends = last_step if saved is None else math.inf
        arguments = evaluator, make_optimizer, rate, schedules
        step, engine = _make_step(arguments, options, compile, len(batches.first[0]), ends)
        if group.size > 1:
            step.gradient_sum = GradientSum(group, step, batch_size)
        validate_rows = partial(
            run_all_rows, ElboEvaluator(model, guide, copy.copy(evaluator.elbo), pair.plate), batches
        )
        loop = Loop(
            step, batches, validate, patience, callbacks, saved, callable(rate), engine,
            validate_rows if compile is None else None,
        )  # fmt: skip
        with seeded(group.seed(seed)), nullcontext() if step.gradient_sum is None else closing(step.gradient_sum):
            with rollback_params_on_error():
                if step.gradient_sum is not None:
                    discover_parameters(step, batches.context, *batches.first)
                    step.gradient_sum.start()
                loop.resume()
                if compile and step.count == 0:
                    validate_rows()
            loop.run(epochs, progress)
    pyro.get_param_store().get_state()  # removes Pyro's weak references from the parameters, which pickle refuses
    step = loop.step
    if loop.state.stop_reason == "interrupted":
        warn_user(f"fit: interrupted after {step.count} steps; the parameters are kept")
    seconds, state = time.perf_counter() - started, loop.state
    how = step.describe() if engine is None else engine.describe()  # a rank without rows has nothing to capture
    history = Terms(state.history, pair.why_no_bound)
    return Fitted(
        unbound(model),
        unbound(guide),
        history,
        seed,
        step.count,
        seconds,
        state.stop_reason,
        state.skipped,
        group.from_first("the steps of fit", how),
        of_all_data=not pair.has_data_plate,
    )


@report_of_ranks("evaluate")
@any_arguments
@without_training
def evaluate(
    model: Function,
    guide: Function,
    data: Data = (),
    *,
    elbo: ELBO | None = None,
    num_samples: int = 1,
    batch_size: int | None = None,
    plate: str = "data",
    seed: int = 0,
) -> dict[str, float]:
    """ELBO, distortion and rate of a pair on data, in nats per datum, without training, in evaluation mode.

    Args:
        model: a Pyro model.
        guide: its guide; must be amortized to take data that it was not trained on.
        data, elbo: as for :func:`fit`; enumerated latents are summed over exactly. Of a ``DataLoader`` the means are
            those over the rows of one pass.
        num_samples: how many draws of the latents to average over.
        batch_size: rows that are run at once, which bounds the memory; the sums are the same. If left out, half a
            million numbers of data, fewer with many particles or enumerated states, where the pair can be run on some
            of its rows, and else all rows.
        plate, seed: name of the data plate, and seed of the draws.

    Raises:
        ValueError: if the pair cannot be run on ``batch_size`` of its rows, see
            :func:`pyro_vae.model_guide.ModelGuide.on_batches`.

    >>> from pyro_vae import VAE, priors, guides, likelihoods, networks
    >>> net = networks.linear()
    >>> vae = VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> sorted(evaluate(vae.model, vae.guide, torch.randn(10, 2), num_samples=5))
    ['distortion', 'elbo', 'rate']
    """
    positive_int(num_samples, "num_samples")
    function(model, "model")
    evaluator = ElboEvaluator(model, function(guide, "guide"), as_elbo(elbo), plate)
    check_no_batch_size(data, batch_size)
    tensors, stream = as_source(data, "data", model, batch_size=batch_size)
    if stream is not None:
        batch_size = stream.num_first
    most = rows_at_once(tensors) if batch_size is None else positive_int(batch_size, "batch_size")
    with one_thread("evaluate"), autoguide_follows_subsample(guide):
        pair = None
        if most < len(tensors[0]) or stream is not None:
            with nullcontext() if batch_size is not None else suppress(ValueError), seeded(seed):
                pair = ModelGuide.on_batches(model, guide, tensors, most, plate)
        pair = pair or ModelGuide(model, guide, tensors.whole(), plate)
        pair.check_observed()
        pair.check_elbo(evaluator.elbo)
        _share_reason(pair)
        evaluator.guide, evaluator.bound, evaluator.plate = pair.guide, pair.bound, pair.plate
        evaluator.model_masks = pair.draws_cells
        if batch_size is None and pair.batch_size < pair.num_data:
            pair.batch_size = rows_that_fit(evaluator, pair.take, pair.data[0].device, pair.batch_size)
        with seeded(seed), pyro.validation_enabled():
            return Terms(_terms(evaluator, pair, "data", stream, num_samples, seed), pair.why_no_bound)


def _share_reason(pair: ModelGuide) -> None:
    """Let all ranks have the reason why there is no bound that the data of some of them show."""
    reasons = ranks().gather("the bound of a model and guide", pair.why_no_bound)
    pair.why_no_bound = next(filter(None, reasons), "")


def _callbacks_of_ranks(callbacks: Sequence[Callback], group: Ranks) -> Sequence[Callback]:
    """Return the callbacks of this rank, which may be left out where they run on rank 0 alone."""
    everywhere = [isinstance(call, OnEveryRank) for call in callbacks]
    first = group.from_first("the callbacks of fit", everywhere)
    if not everywhere and not any(first):
        callbacks, everywhere = [lambda epoch: None for _ in first], first
    kinds = ["on every rank" if one else "on rank 0" for one in everywhere]
    group.check_same("the callbacks of fit", {"callbacks": kinds})
    return callbacks


def _pair_to_train(
    model: Function,
    guide: Function,
    plate: str,
    transform: Transform | None,
    elbo: ELBO,
    data: DataTensors,
    num_rows: int,
    shares_rows: bool,
) -> ModelGuide:
    """Run a pair on some of its rows; raise if it cannot be trained on these, or on the shares of several ranks."""
    pair = ModelGuide.on_batches(model, guide, data, num_rows, plate, transform)
    pair.check_elbo(elbo)
    if shares_rows:
        pair.check_sums_over_rows(elbo)
    pair.check_regressions(elbo)
    return pair


class _NotSharedError(Exception):
    """The rows of a batch cannot be shared."""


def _pair_on_shares(
    make: Callable[[], ModelGuide], model: Function, guide: Function, group: Ranks, seed: int, are_enough: bool
) -> ModelGuide | None:
    """Return what ``make`` returns, for ranks that share all rows; ``None``, with a warning, if it raises on one.

    What trains on all rows in one process must train on several ranks, too: rank 0 then has the rows.
    """
    reason = None if are_enough else "there are too few"
    try:
        with rollback_params_on_error(), autoguide_as_before_on_error(guide), seeded(seed), buffers_kept(model, guide):
            pair = None
            try:
                pair = make() if are_enough else None
            except Exception as error:
                reason = str(error)
            reasons = group.gather("the rows of fit", reason)
            if any(one is not None for one in reasons):
                raise _NotSharedError(next(one for one in reasons if one is not None))
            return pair
    except _NotSharedError as error:
        if group.is_first:
            warn_user(
                "fit: rank 0 computes the steps alone, with all rows, and the other ranks nothing, since ranks cannot "
                f"share the rows. The reason, the same as for mini-batches: {error}"
            )
        return None


def _make_step(
    arguments: tuple[ElboEvaluator, RunOptimizer, float | Schedule | None, Mapping[Tensor, Schedule]],
    options: dict[str, Any],
    compile: bool | None,
    batch_size: int,
    last_step: float,
) -> tuple[Step, AutomaticEngine | None]:
    """Return the first step of a run, and what chooses the next ones if ``compile`` is ``None``."""
    evaluator, make_optimizer, rate, schedules = arguments
    if compile is False:
        return Step(*arguments, **options), None

    def compiles(rows: Tensor, *read: Tensor) -> bool:
        return len(rows) == batch_size

    if "shared" in options:  # several ranks
        first = ReplayedStep(*arguments, compiles=compiles if compile else None, **options)
        return first, None if compile else GradientEngine(first, compiles, last_step)

    def captured(optimizer: torch.optim.Optimizer | None = None) -> CapturedStep:
        make = make_optimizer.capturable()
        new = CapturedStep(evaluator, make, rate, schedules, compiles=compiles, refreshes=False, **options)
        if optimizer is not None:
            new.optimizer = make.captured(optimizer)
        return new

    if compile:
        return captured(), None
    first = ReplayedStep(*arguments, **options)
    return first, AutomaticEngine(first, captured, last_step)


def _run_config(
    evaluator: ElboEvaluator,
    data: DataTensors,
    held_out: DataTensors | None,
    schedules: Mapping[Tensor, Schedule],
    **arguments: Any,
) -> dict[str, Any]:
    """Return what must be equal for a run to resume from the checkpoint of another, by name of the argument."""
    return {
        **arguments,
        "schedules": [described(schedule) for schedule in schedules.values()],
        "elbo": type(evaluator.elbo).__name__,
        **{f"elbo.{name}": value for name, value in vars(evaluator.elbo).items() if _is_setting(name, value)},
        "data": data_fingerprint(data),
        "arguments": [_fingerprint(value) for value in getattr(evaluator.model, "constants", ())],
        "validation": None if held_out is None else data_fingerprint(held_out),
    }


def _fingerprint(value: Any) -> str:
    """Identify an argument that is no row: a tensor by its numbers, numbers and text as they are, the rest by type."""
    if isinstance(value, Tensor) and value.numel():
        return data_fingerprint(DataTensors([value.reshape(-1)]))
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__name__


def _is_setting(name: str, value: Any) -> bool:
    """Whether an attribute of an ELBO changes its value; Pyro finds the nesting of plates, and names have a count."""
    return isinstance(value, int | float | str | None) and name not in ("max_plate_nesting", "name")


@torch.no_grad()
def _terms(
    evaluator: ElboEvaluator, pair: ModelGuide, name: str, stream: Stream | None, num_samples: int, seed: int
) -> dict[str, float]:
    """Return the ELBO and its terms, means over some runs on all rows, or on those of a pass, in nats per datum."""

    def run(inputs: tuple[Tensor, ...]) -> tuple[int, dict[str, float]]:
        rows, *read = inputs
        with pair.take(rows, *read) as arguments:
            loss = evaluator.loss(*arguments)
            if not math.isfinite(loss):
                cause = evaluator.first_nonfinite_site(rows) or "the log_prob of every site is finite"
                raise FloatingPointError(f"{name}: the loss is {loss}; {cause}")
            return len(rows), {term: float(value) for term, value in evaluator.terms(loss).items()}

    device = pair.data[0].device
    if stream is None:
        every = torch.arange(pair.num_data, device=device).split(pair.batch_size) * num_samples
        found = in_chunks("evaluate", [(rows,) for rows in every], run, device, seed)
    else:
        own, batches = stream.batches_on_ranks(seed, num_samples)
        repeated = (inputs for inputs in batches for _ in range(num_samples))
        found = in_chunks("evaluate", repeated, run, device, seed, own=own)
    count = sum(rows for rows, _ in found)
    return {term: sum(rows * terms[term] for rows, terms in found) / count for term in found[0][1]}


def _batch_size(given: int | None, num_data: int) -> int:
    """The number of rows of a batch; a single row that is left of all rows joins."""
    size = num_data if given is None else min(positive_int(given, "batch_size"), num_data)
    return num_data if 1 < size == num_data - 1 else size


def _evaluate_held_out(
    evaluator: ElboEvaluator, pair: ModelGuide, seed: int, stream: Stream | None
) -> dict[str, float]:
    """Evaluate with random numbers of a stream of its own, so that validation does not change the run."""
    with seeded(seed), every_row(), evaluation_mode(pair.model, pair.guide):
        return _terms(evaluator, pair, "validation", stream, 1, seed)
