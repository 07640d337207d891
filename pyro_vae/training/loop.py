"""The loop over epochs, and its parts: batches, metrics, early stopping, checkpoints, Ctrl-C."""

import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.ambient import check_gradients_enabled
from pyro_vae._utils.data import DataTensors, LazyData
from pyro_vae._utils.module_state import buffers_kept
from pyro_vae._utils.progress import progress_bar
from pyro_vae._utils.ranks import OnEveryRank, Ranks, one_process, ranks
from pyro_vae._utils.rng import preserve_rng_state, set_torch_random_states, torch_random_states
from pyro_vae._utils.warn import warn_user
from pyro_vae.compilation.graph import CaptureError
from pyro_vae.compilation.python_state import PythonState
from pyro_vae.training.automatic import CHANGED, AutomaticEngine
from pyro_vae.training.checkpoints import Checkpoints, contents_of_first
from pyro_vae.training.compiled_step import CapturedStep
from pyro_vae.training.gradient_sum import Decisions
from pyro_vae.training.schedules import PlateauRate
from pyro_vae.training.state import (
    RunState,
    check_run_state,
    discover_parameters,
    engine_of,
    load_model_state,
    load_rank_state,
    load_run_state,
    model_state,
    rank_state,
    run_state,
    set_trainable_flags,
    trainable_flags,
)
from pyro_vae.training.step import BatchContext, Step
from pyro_vae.training.streams import Stream

__all__ = ["Batches", "Callback", "Epoch", "Loop", "RunCheckpoints", "StreamBatches"]

_EAGER_BATCHES = 100  # of the first epoch, before its further rows are validated at once
_SAME_SIGNAL = 1.0  # seconds in which two signals of a kind are one
_SYNC_SECONDS, _MAX_CONSECUTIVE_SKIPS = 0.2, 100
_FEW_NUMBERS = 2**20  # of a tensor outside of modules whose changes are noticed
_MOST_PENDING = 2**28  # bytes of the inputs of steps whose metrics are not read yet


@dataclass(frozen=True)
class Epoch:
    """The argument of a callback: the progress of the run at the end of an epoch.

    Attributes:
        number: number of finished epochs.
        steps: number of finished steps.
        record: the history's entries for this epoch.
        history: the history of all epochs so far.
    """

    number: int
    steps: int
    record: dict[str, float]
    history: dict[str, list[float]]


Callback = Callable[[Epoch], Any]
"""Function called at the end of each epoch; training ends if it returns ``True``, also as NumPy or torch spell it."""


class Loop:
    """Train a step for some epochs, each over all rows in a new random order; ``state`` is the progress of the run.

    At the end of each epoch, ``validate`` returns the ELBO and its terms on held-out data, a learning rate that depends
    on the loss is updated, and callbacks are called. With ``records_rate``, the history has the learning rate.
    An ``engine`` chooses the step, of which the first one is ``step``; ``validate_rows`` then runs all rows with Pyro's
    validation. After ``patience`` epochs without a better validation ELBO training ends, with the parameters of the
    best epoch.
    """

    def __init__(
        self,
        step: Step,
        batches: "Batches",
        validate: Callable[[], dict[str, float]] | None = None,
        patience: int | None = None,
        callbacks: Sequence[Callback] = (),
        checkpoints: "RunCheckpoints | None" = None,
        records_rate: bool = False,
        engine: AutomaticEngine | None = None,
        validate_rows: Callable[[], None] | None = None,
    ):
        self.step, self.batches, self.validate, self.callbacks = step, batches, validate, callbacks
        self.checkpoints, self.state = checkpoints, RunState()
        self.engine, self._validate_rows, self._are_validated = engine, validate_rows, False
        self._pending, self._signals = PendingMetrics(batches.device), DeferredSignals(checkpoints is not None)
        self._lengths: list[int] = []  # numbers of steps of the finished epochs that are not in the history yet
        self._early_stopping = EarlyStopping(patience)
        self._plateau = step.lr if isinstance(step.lr, PlateauRate) else None
        self._records_rate = records_rate
        self.ranks = Ranks() if step.gradient_sum is None else step.gradient_sum.ranks

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one, see :meth:`RunCheckpoints.resume`."""
        if self.checkpoints is not None:
            self.checkpoints.resume(self._resumed_step, self.batches, self.state)
        for epoch in range(self.state.epoch):
            self._update_plateau(epoch)

    def _resumed_step(self, engine: Mapping[str, Any]) -> Step:
        """Return the step that a run continues with, by what its checkpoint has of the engine."""
        if self.engine is not None:
            self.step = self.engine.resumed(engine)
        return self.step

    def _update_plateau(self, epoch: int) -> None:
        """Set the learning rate to that after an epoch, by its validation ELBO, or without that its training ELBO."""
        if self._plateau is not None:
            name = ("" if self.validate is None else "validation_") + self.step.names[0]
            self._plateau.update(-self.state.history[name][epoch])

    def run(self, epochs: int, progress: bool | None) -> None:
        """Train until this number of epochs is finished, or a part of the loop ends the run earlier."""
        state = self.state
        unfinished = state.epoch < epochs and state.stop_reason == "epochs"
        bar = progress_bar("fit", progress, total=epochs, unit="epoch")
        with self._signals, warnings.catch_warnings(), bar as self._progress:
            warnings.filterwarnings("ignore", "Encountered NaN")  # from Pyro; our error names the step and the site
            self._pending.clear()
            try:
                while state.epoch < epochs and state.stop_reason == "epochs":
                    self._run_epoch()
                self._sync_metrics()
                self._finish()
            finally:
                if self.engine is not None:
                    self.engine.close()
            if unfinished:
                self._save()
            if self.ranks.exchange("the end of fit", [self._signals.terminated])[0]:
                self._end_terminated()
        self._early_stopping.load_best(self.step, state)

    def _run_epoch(self) -> None:
        """Run the steps of the current epoch that are not yet done."""
        state, batches = self.state, self.batches
        ended, source = True, iter(batches.remaining(state.batch, state.epoch))
        while self._run_step(source):
            decided = self._decided()
            if decided.reads or decided.saves or decided.interrupted or decided.terminated:
                self._sync_metrics()
                self.ranks.exchange("the metrics of fit")
            if decided.saves or decided.terminated:
                self._save()
            if decided.terminated:
                self._end_terminated()
            if decided.interrupted:
                state.stop_reason = "interrupted"
                ended = state.batch == batches.per_epoch
                break
        if ended:
            self._end_epoch()

    def _run_step(self, source: Iterator[tuple[Tensor, ...]]) -> bool:
        """Run the next step of the epoch; return whether there was one."""
        state, gradient_sum = self.state, self.step.gradient_sum
        if gradient_sum is not None:
            gradient_sum.decisions = self._wishes(self.step.count + 1)
        with nullcontext() if gradient_sum is None else gradient_sum.step_of_all():
            inputs = next(source, None)
            if inputs is None and (gradient_sum is None or self.batches.per_epoch is not None):
                return False
            # Pyro's validation costs time, and some of its warnings, such as a scale at its floor, come late in a run.
            validate = state.epoch == 0 or (state.batch == 0 and state.epoch.bit_count() == 1)
            if validate and state.batch == _EAGER_BATCHES and self._validate_rows is not None:
                self._validate_rows()  # all at once, in place of the further steps of the first epoch
                self._validate_rows, self._are_validated = None, True
            row = self._take_step(inputs or (), validate and not (self._are_validated and state.epoch == 0))
        if gradient_sum is not None and not gradient_sum.rows:  # no rank has another batch
            return False
        step = self.step
        self._pending.add(inputs if inputs and isinstance(step, CapturedStep) and not step.skips else (), row)
        state.batch += 1
        return True

    def _wishes(self, steps: int) -> Decisions:
        """What this process would do after this number of steps."""
        saves = self.checkpoints is not None and self.checkpoints.due(steps)
        return Decisions(self._pending.due(), saves, self._signals.pressed, self._signals.terminated)

    def _decided(self) -> Decisions:
        """What all ranks do now, after a step."""
        gradient_sum = self.step.gradient_sum
        return self._wishes(self.step.count) if gradient_sum is None else gradient_sum.decisions

    def _take_step(self, inputs: tuple[Tensor, ...], validate: bool) -> Tensor:
        context = self.batches.context
        if self.engine is not None and self.engine.has_news():
            self._sync_metrics()
            self.engine.prepare(context, *self.batches.first)
            self.step = self.engine.step
        try:
            return self.step(context, *inputs, validate=validate)
        except CaptureError as error:
            if self.engine is None or not self.engine.is_compiled:
                raise
            self._leave_compiled(error)
            return self.step(context, *inputs, validate=validate)

    def _leave_compiled(self, error: CaptureError) -> None:
        """Continue without a compiler, after a compiled step was refused by a comparison with an eager one."""
        assert self.engine is not None
        self._sync_metrics()
        self.engine.fall_back(error)
        self.step = self.engine.step
        discover_parameters(self.step, self.batches.context, *self.batches.first)
        warn_user(
            f"fit: compiled steps end at step {self.step.count + 1}, since they are not possible "
            f"{self.engine.reason}. Steps since the last comparison may have repeated operations of an earlier one; "
            "all further ones run Pyro's code. With compile=False all steps do"
        )

    def _finish(self) -> None:
        try:
            self.step.finish()
        except CaptureError as error:
            if self.engine is None or not self.engine.is_compiled:
                raise
            self._leave_compiled(error)

    def _save(self) -> None:
        """Write a checkpoint, if there are any."""
        if self.checkpoints is not None:
            engine = {} if self.engine is None else self.engine.header()
            self.checkpoints.save(self.step, self.batches, self.state, engine)

    def _end_terminated(self) -> None:
        """Deliver SIGTERM on the ranks that have received it; raise on the others if it ends one of these."""
        ended = self.ranks.gather("SIGTERM in fit", self._signals.terminated and self._signals.is_ended)
        with suppress(RuntimeError):
            self.ranks.exchange("SIGTERM in fit")  # which ends on a rank only once all others have read its answer
        if self._signals.terminated:
            self._signals.deliver()
        elif any(ended):
            written = "" if self.checkpoints is None else " A checkpoint of this step is written"
            error = RuntimeError(
                f"rank {ended.index(True)} has received SIGTERM, and has ended after step {self.step.count} of fit."
                f"{written}"
            )
            self.ranks.leave(error)

    def _sync_metrics(self, refresh: bool = True) -> None:
        """Read the metrics of the pending steps: check that they are finite, and average finished epochs.

        ``refresh``: whether nothing else lets the step notice what Python has changed, before the next one.
        """
        table = self._pending.read()
        check_finite(self.step, self.batches.context, self.state, self._pending, table)
        self.state.metrics += table
        self._record_epochs()
        self._pending.clear()
        latest = {name: f"{values[-1]:.4g}" for name, values in self.state.history.items()}
        self._progress.note(latest)
        self._progress.advance_to(self.state.epoch)
        if refresh:
            self._refresh()

    def _refresh(self) -> None:
        """Let the step notice what Python has changed, such as parameters that were frozen."""
        try:
            changed = self.step.refresh()
        except CaptureError as error:
            if self.engine is None:
                raise
            changed = self.engine.refused(error)
        if changed and self.engine is not None and self.engine.is_compiled:
            self.engine.fall_back(CaptureError(CHANGED))
        if self.engine is not None:
            self.step = self.engine.step
        if changed:
            discover_parameters(self.step, self.batches.context, *self.batches.first)

    def _record_epochs(self) -> None:
        """Append to the history the mean of each metric over the finite steps of each finished epoch."""
        names, metrics = self.step.names, self.state.metrics
        while self._lengths and len(metrics) >= self._lengths[0]:
            length = self._lengths.pop(0)
            finite = [row[2:] for row in metrics[:length] if row[0]] or [[math.nan] * len(names)]
            for name, column in zip(names, zip(*finite, strict=True), strict=True):
                self.state.history.setdefault(name, []).append(math.fsum(column) / len(column))
            del metrics[:length]

    def _end_epoch(self) -> None:
        state = self.state
        self._lengths.append(state.batch)
        state.epoch, state.batch = state.epoch + 1, 0
        self.batches.next_epoch()
        if self._records_rate and self.step.lr is not None:
            for name in self.step.names:  # they stand first
                state.history.setdefault(name, [])
            state.history.setdefault("lr", []).append(float(self.step.lr(self.step.count - 1)))
        if self.validate is not None or self.callbacks or self._plateau is not None:
            self._sync_metrics(refresh=not self.callbacks)
        if self.validate is not None:
            with buffers_kept(self.step.evaluator.model, self.step.evaluator.guide):
                terms = self.validate()
            for name, value in terms.items():
                state.history.setdefault(f"validation_{name}", []).append(value)
            if self._early_stopping.patience is not None or self.checkpoints is not None:
                self._early_stopping.update(self.step, state, next(iter(terms.values())))
        self._update_plateau(state.epoch - 1)
        self._check_alike()
        if self.callbacks:
            self._call_callbacks()
            self._check_alike()

    def _check_alike(self) -> None:
        """Raise if ranks have become different."""
        step, last = self.step, max(0, self.step.count - 1)
        if step.gradient_sum is not None:
            rates = {"lr": None if step.lr is None else float(step.lr(last))}
            values = {f"schedules[{number}]": value.item() for number, value in enumerate(step.schedules)}
            step.gradient_sum.check_alike(rates | values)

    def _call_callbacks(self) -> None:
        """Call each callback: it may end the run, freeze parameters, and draw random numbers.

        One that runs on rank 0 alone may change tensors and flags, which all ranks then have.
        """
        state, ranks = self.state, self.ranks
        record = {name: values[-1] for name, values in state.history.items()}
        alone = ranks.size > 1 and not all(isinstance(call, OnEveryRank) for call in self.callbacks)
        changes = _Changes(self.step) if alone and ranks.is_first else None
        with preserve_rng_state():
            for call in self.callbacks:
                runs_alone = alone and not isinstance(call, OnEveryRank)
                ends = False
                with one_process() if runs_alone else nullcontext():
                    if ranks.is_first or not runs_alone:
                        ends = _ends_run(call(Epoch(state.epoch, self.step.count, record, state.history)))
                if ranks.exchange("a callback of fit", [ends])[0]:
                    state.stop_reason = "callback"
        check_gradients_enabled("fit")
        if changes is not None:
            changes.check()
        if alone and self.step.gradient_sum is not None:
            set_trainable_flags(self.step, ranks.from_first("the flags of fit", trainable_flags(self.step)))
            self.step.gradient_sum.copy_from_first()
        self._refresh()


class _Changes:
    """What callbacks on rank 0 alone must not change: all that is no parameter, buffer or flag of a module."""

    def __init__(self, step: Step):
        self._step, self._named = step, step.named_tensors()
        schedules = [*step.schedules.values(), *([] if step.lr is None else [step.lr])]
        roots = [*step.evaluator.read, *schedules]
        self._places = [PythonState(*roots), PythonState(*roots, tensors=True)]
        self._tensors = self._others()

    def _others(self) -> dict[str, Tensor]:
        known = {id(one) for one in self._named.values()}
        found = self._places[1].tensors().items()
        few = ((label, one) for label, one in found if id(one) not in known and one.numel() <= _FEW_NUMBERS)
        return {label: one.detach().clone() for label, one in few}

    def check(self) -> None:
        """Raise for a change."""
        changed = [label for place in self._places for label in place.changes()]
        now = self._others()
        changed += [label for label, one in self._tensors.items() if label in now and not torch.equal(one, now[label])]
        others = self._step.named_tensors()
        changed += [name for name, one in self._named.items() if others.get(name) is not one]
        if changed:
            raise ValueError(
                f"`callbacks` must not change {changed[0]!r} on rank 0 alone: other ranks get the numbers in "
                "parameters and buffers, and the flags of modules. Wrap the callback: "
                "`pyro_vae.parallel.on_every_rank(callback)`"
            )


def _ends_run(result: Any) -> bool:
    """Whether a callback returned ``True``, as Python, NumPy or torch spell it; raise for what is no answer."""
    is_flag = isinstance(result, bool | np.bool_) or (
        isinstance(result, Tensor) and result.dtype == torch.bool and result.dim() == 0
    )
    if not is_flag and result is not None:
        raise TypeError(
            f"`callbacks` must be functions that return True to end the run, or False or None, got one that returns "
            f"{result!r}"
        )
    return bool(result)


class Batches:
    """The inputs of each step of an epoch: all N rows in random order, or in one batch that holds them in order.

    The inputs are numbers of rows, and the rows themselves where these are read on demand. ``context`` turns them into
    the arguments of model and guide.

    Attributes:
        per_epoch: number of batches, ``None`` if it is not known.
        first: inputs of the first rows of the data, as many as a batch has. On several ranks, these are the rows of
            this one; all of them if it has none.

    Args:
        ranks: those that make the steps.
        shares_rows: whether each rank has a share of the rows of a batch; else rank 0 has them all.
    """

    per_epoch: int | None

    def __init__(
        self,
        context: BatchContext,
        data: DataTensors,
        batch_size: int,
        seed: int,
        ranks: Ranks | None = None,
        shares_rows: bool = True,
    ):
        self.context, self.data, self.batch_size, self.device = context, data, batch_size, data[0].device
        self.num_data, self.ranks, self._shares_rows = len(data[0]), ranks or Ranks(), shares_rows
        whole, left = divmod(self.num_data, batch_size)
        self.per_epoch = whole + (left > 1)  # see `split`
        rows = torch.arange(batch_size, device=self.device)
        self.first = self._inputs(rows)
        self._has_rows = bool(self.first)
        self.first = self.first or self._read(rows)
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self.order = self._generator.get_state()  # from which the order of the current epoch is drawn

    def remaining(self, done: int, epoch: int) -> Iterable[tuple[Tensor, ...]]:
        """Return the inputs of each step of the current epoch, without the first ``done`` ones."""
        if self.per_epoch == 1:
            return [self.first if self._has_rows else ()][done:]
        self._generator.set_state(self.order)
        shuffled = torch.randperm(self.num_data, generator=self._generator, device="cpu").to(self.device)
        return map(self._inputs, self.split(shuffled)[done:])

    def in_order(self) -> Iterable[tuple[Tensor, ...]]:
        """Return inputs for all rows in order; of a data set, whose rows may be slow to read, those of one batch."""
        if self.data.num_checked < self.num_data:
            return [self.first]
        return filter(None, map(self._inputs, self.split(torch.arange(self.num_data, device=self.device))))

    def _inputs(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs of this rank for the rows of a batch; none if it has no row."""
        if self._shares_rows:
            rows = rows[self.ranks.share(len(rows))]
        elif not self.ranks.is_first:
            return ()
        return self._read(rows) if len(rows) else ()

    def _read(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows, *self.data.rows(rows)) if isinstance(self.data, LazyData) else (rows,)

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """Split rows into batches. A single row that is left joins them: batch normalisation needs two rows."""
        *batches, last = rows.split(self.batch_size)
        if batches and len(last) == 1 < self.batch_size:
            batches, last = batches[:-1], torch.cat([batches[-1], last])
        return [*batches, last]

    def next_epoch(self) -> None:
        """Continue with the order of the next epoch."""
        if self.per_epoch != 1:
            self.order = self._generator.get_state()

    def states(self) -> dict[str, Tensor]:
        """Return the random states from which the order of the current epoch is drawn."""
        return {"order": self.order}

    def sampler(self) -> Any:
        """Return the state of a sampler of the user at the start of the current epoch, if there is one."""
        return None

    def load(self, states: Mapping[str, Tensor], sampler: Any) -> None:
        """Set the current epoch to one with the states that :meth:`states` and :meth:`sampler` returned."""
        self.order = states["order"]


class StreamBatches(Batches):
    """The inputs of each step of a pass over a stream, see :class:`pyro_vae.training.streams.Stream`."""

    def __init__(self, context: BatchContext, stream: Stream, seed: int):
        super().__init__(context, stream.data, stream.most_rows, seed)
        self.batch_size, self.ranks = stream.batch_size, stream.ranks
        self.stream, self.per_epoch = stream, None
        self._begin()

    def _begin(self) -> None:
        self._users, self._sampler, self._count = self.stream.generator_states(), self.stream.sampler_state(), 0

    def remaining(self, done: int, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """Return the inputs of each step of the current pass, without the first ``done`` ones."""
        self._generator.set_state(self.order)
        self.stream.set_generator_states(self._users)
        self.stream.start_pass(epoch)
        seed = int(torch.randint(2**32, (), generator=self._generator, device="cpu"))
        return self._counted(self.stream.parts(seed, done), done)

    def _counted(self, parts: Iterator[tuple[Tensor, ...]], done: int) -> Iterator[tuple[Tensor, ...]]:
        self._count = done
        for inputs in parts:
            self._count += 1
            yield inputs

    def next_epoch(self) -> None:
        """Continue with the next pass."""
        self.stream.end_pass(self._count)
        super().next_epoch()
        self._begin()

    def states(self) -> dict[str, Tensor]:
        """Return the random states from which the order of the current pass is drawn."""
        return super().states() | {f"generator{number}": state for number, state in enumerate(self._users)}

    def sampler(self) -> Any:
        """Return the state of a sampler of the user at the start of the current pass, if there is one."""
        return self._sampler

    def load(self, states: Mapping[str, Tensor], sampler: Any) -> None:
        """Set the current pass to one with the states that :meth:`states` and :meth:`sampler` returned."""
        super().load(states, sampler)
        self._users, self._sampler = [states[f"generator{number}"] for number in range(len(self._users))], sampler
        self.stream.set_sampler_state(sampler)


class PendingMetrics:
    """Metrics of the latest steps, not yet read from the device, and the random states before them.

    Captured steps keep their inputs, too, to find out by another run why one was not finite.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.inputs: list[tuple[Tensor, ...]] = []
        self._metrics: list[Tensor] = []
        self._bytes = 0  # of these inputs

    def clear(self) -> None:
        """Begin with no steps, at the current random states."""
        self.inputs.clear()
        self._metrics.clear()
        self._bytes = 0
        self.random_states = torch_random_states()
        self._next_sync = time.perf_counter() + _SYNC_SECONDS

    def add(self, inputs: tuple[Tensor, ...], metrics: Tensor) -> None:
        """Append a step."""
        self.inputs.append(inputs)
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in inputs)
        self._metrics.append(metrics)

    def due(self) -> bool:
        """Whether it is time to read the metrics."""
        return time.perf_counter() > self._next_sync or self._bytes > _MOST_PENDING

    def read(self) -> list[list[float]]:
        """Return the metrics of each step, as :class:`pyro_vae.training.step.Step` describes them."""
        return torch.stack([row.to(self.device) for row in self._metrics]).tolist() if self._metrics else []


def check_finite(
    step: Step, context: BatchContext, state: RunState, pending: PendingMetrics, table: list[list[float]]
) -> None:
    """Count the pending steps that were not finite; raise at one, or at the hundredth in a row if they are skipped."""
    for index, metrics in enumerate(table):
        if metrics[0]:
            state.consecutive_skips = 0
            continue
        state.skipped += 1
        state.consecutive_skips += 1
        number = step.count + index + 1 - len(table)
        if isinstance(step, CapturedStep) and not step.skips:
            step.count = number
            inputs = pending.inputs[: index + 1]
            raise step.diagnose_nonfinite(context, inputs, partial(set_torch_random_states, pending.random_states))
        if state.consecutive_skips >= _MAX_CONSECUTIVE_SKIPS:
            raise FloatingPointError(
                f"step {number}: it is the {_MAX_CONSECUTIVE_SKIPS}th in a row whose loss or gradient is not finite"
            )


class EarlyStopping:
    """Keep the parameters of the epoch with the best validation ELBO, and end the run ``patience`` epochs after it."""

    def __init__(self, patience: int | None):
        self.patience = patience

    def update(self, step: Step, state: RunState, bound: float) -> None:
        """Compare the validation ELBO of the epoch that has ended with the best one."""
        if state.best_epoch == 0 or bound > state.best_bound:
            state.best_epoch, state.best_bound = state.epoch, bound
            state.best_parameters = {name: tensor.clone() for name, tensor in model_state(step).items()}
        if self.patience is not None and state.epoch - state.best_epoch >= self.patience:
            state.stop_reason = "patience"

    def load_best(self, step: Step, state: RunState) -> None:
        """Set the parameters to those of the best epoch, if ``patience`` was given."""
        if self.patience is not None and state.best_epoch:
            load_model_state(step, state.best_parameters)


class RunCheckpoints:
    """The checkpoints of one run, with ``run_config``: the arguments that must be the same when it resumes, by name.

    On several ranks, rank 0 alone uses the folder. All ranks have this object, and call its methods together.
    """

    def __init__(self, checkpoints: Checkpoints | None, folder: str, run_config: dict[str, Any]):
        self._checkpoints, self._folder, self._run_config = checkpoints, folder, run_config
        self._ranks, self._best_written = ranks(), 0

    def due(self, steps: int) -> bool:
        """Whether rank 0 wants to write a checkpoint after this number of steps, see :meth:`Checkpoints.due`."""
        return self._checkpoints is not None and self._checkpoints.due(steps)

    @staticmethod
    def are_given(checkpoints: Checkpoints | str | os.PathLike[str] | None) -> bool:
        """Whether the run has checkpoints, on all ranks alike: rank 0 must have their folder, and others may not."""
        given = ranks().gather("the checkpoints of fit", checkpoints is not None)
        if any(given) and not given[0]:
            raise ValueError(
                f"`checkpoints` must be given on rank 0, which writes them, got None there and others on rank "
                f"{given.index(True)}"
            )
        return given[0]

    @classmethod
    @contextmanager
    def opened(
        cls, checkpoints: Checkpoints | str | os.PathLike[str] | None, run_config: dict[str, Any]
    ) -> "Iterator[RunCheckpoints]":
        """Yield the checkpoints of a run, of which no other run uses the folder, made by rank 0."""
        group = ranks()
        with nullcontext() if checkpoints is None or not group.is_first else Checkpoints.opened(checkpoints) as opened:
            folder = group.from_first("the folder of checkpoints", None if opened is None else str(opened.folder))
            yield cls(opened, folder, run_config)

    def save(self, step: Step, batches: Batches, state: RunState, engine: dict[str, Any]) -> None:
        """Write the state of the run, and the parameters of the best epoch if it is new; ``engine``: how steps run."""
        own = rank_state(batches.states(), sampler=batches.sampler(), engine=engine or None)
        of_ranks = self._ranks.gather("a checkpoint of fit", own)
        if self._checkpoints is None:
            return
        if state.best_epoch > self._best_written:
            of_best = {"epoch": state.best_epoch, "validation": state.best_bound}
            if self._checkpoints.save_best(of_best, state.best_parameters):
                self._best_written = state.best_epoch
        header, tensors = run_state(step, state, of_ranks)
        self._checkpoints.save(header | {"run": self._run_config}, tensors)

    def resume(self, step_of: Callable[[Mapping[str, Any]], Step], batches: Batches, state: RunState) -> None:
        """Set the run to the newest checkpoint, if there is one; raise if it belongs to another run or model.

        ``step_of`` returns the step for what the checkpoint has of the engine.
        """
        checkpoints = self._checkpoints
        contents = contents_of_first(lambda: None if checkpoints is None else checkpoints.read(check_run_state))
        if contents is None:
            return
        header, folder = contents[0], repr(self._folder)
        saved_config = header["run"]
        for name, value in self._run_config.items():
            if (saved := saved_config.get(name, value)) != value:  # an earlier version has fewer settings
                raise ValueError(
                    f"`{name}` must be {saved!r}, as in the run of {folder}, got {value!r}; use another folder for "
                    "another run"
                )
        step = step_of(engine_of(header, self._ranks))
        discover = partial(discover_parameters, step, batches.context, *batches.first)
        load_run_state(step, state, discover, contents, folder)
        current = batches.states(), batches.sampler()
        batches.load(*load_rank_state(contents, self._ranks, self._run_config["seed"], current))


class DeferredSignals:
    """Signals that take effect after the current step, in the main thread.

    Ctrl-C, without a user's handler, ends the run. With checkpoints SIGTERM, of a scheduler of jobs, waits until one is
    written; :meth:`deliver` lets it do what it would have done: end the process, or call the user's handler. A second
    signal of a kind, a second later or more, takes effect at once. Before that it is the same one: under ``torchrun``
    it may come from the terminal, or the scheduler, and from the process that started this one.
    """

    def __init__(self, saves: bool) -> None:
        self.pressed = self.terminated = False
        self._received: dict[int, float] = {}  # when each signal came first
        self._saves, self._process = saves, os.getpid()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "DeferredSignals":
        if threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._press)
            if self._saves and signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, None):  # None: not of Python
                self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _comes_again(self, number: int) -> bool:
        now = time.monotonic()
        return now - self._received.setdefault(number, now) >= _SAME_SIGNAL

    def _press(self, number: int, _: Any) -> None:
        if self._comes_again(number):
            raise KeyboardInterrupt
        self.pressed = True

    def _terminate(self, number: int, _: Any) -> None:
        again = self._comes_again(number) or os.getpid() != self._process  # a callback's fork has no checkpoint
        self.terminated = True
        if again:
            self.deliver()

    @property
    def is_ended(self) -> bool:
        """Whether SIGTERM ends the process without a function of the user."""
        return self._previous.get(signal.SIGTERM) is signal.SIG_DFL

    def deliver(self) -> None:
        """Raise SIGTERM again, if it was received, for the handler that was there before the run."""
        if self.terminated:
            self.terminated = False
            self._received.pop(signal.SIGTERM)
            ours = signal.signal(signal.SIGTERM, self._previous[signal.SIGTERM])
            signal.raise_signal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, ours)
