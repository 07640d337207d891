"""The loop over epochs: what it records, when it stops, and the state that it can go on from."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae._utils.module_state import buffers_kept
from pyro_vae._utils.rng import preserve_rng_state, random_states, set_random_states
from pyro_vae._utils.validation import tqdm_disable
from pyro_vae.training.checkpoints import Checkpoints, misfits
from pyro_vae.training.compiled_step import CapturedStep
from pyro_vae.training.state import (
    discover_parameters,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
    set_trainable_flags,
    trainable_flags,
)
from pyro_vae.training.step import BatchContext, Step

__all__ = ["Callback", "Epoch", "Loop"]

_SYNC_SECONDS = 0.2  # seconds between looks at what the steps returned: each waits for the device


_SKIPPED = 100  # steps in a row that may be skipped


_NUMBERS = ("epoch", "batch", "skipped", "consecutive_skips", "best_epoch", "stop_reason")


@dataclass(frozen=True)
class Epoch:
    """What a callback is told at the end of an epoch.

    Attributes:
        number: of epochs that are done.
        steps: that are done.
        record: the epoch's entries in the history.
        history: of all epochs so far, and as it goes on.
    """

    number: int
    steps: int
    record: dict[str, float]
    history: dict[str, list[float]]


Callback = Callable[[Epoch], Any]
"""Called at the end of each epoch; training ends if it returns ``True``."""


class Loop:
    """Epochs of steps, on rows in random order.

    Args:
        step: what is done with each batch.
        take: from row numbers to arguments.
        num_data: N.
        batch_size: rows per step; N for all of them in order.
        seed: of the order.
        device: of the row numbers.
        validate: called at the end of each epoch, for the ELBO and its terms on held-out data.
        patience: epochs without a better validation ELBO after which training ends, with the best parameters.
        callbacks: called at the end of each epoch.
        checkpoints: where the state is written to.
        run_config: what tells this run from others, by the names of arguments; written with its state.

    Attributes:
        history: by name, a number for each epoch.
        epoch: how many are done.
        batch: how many of the epoch that is under way.
        stopped: why training ended: ``"epochs"``, ``"patience"``, ``"callback"`` or ``"interrupted"``.
        skipped: steps that were left out, as they were not finite.
        consecutive_skips: how many of them were the last ones.
        best: what was learnt by the epoch with the best validation ELBO.
        best_epoch: its number.
    """

    def __init__(
        self,
        step: Step,
        take: BatchContext,
        num_data: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        validate: Callable[[], dict[str, float]] | None = None,
        patience: int | None = None,
        callbacks: Sequence[Callback] = (),
        checkpoints: Checkpoints | None = None,
        run_config: dict[str, Any] | None = None,
    ):
        self.step, self.take = step, take
        self.num_data, self.batch_size, self.device = num_data, batch_size, device
        self.validate, self.patience, self.callbacks, self.checkpoints = validate, patience, callbacks, checkpoints
        self.run_config = run_config or {}
        self.order = torch.Generator().manual_seed(seed)
        self.history: dict[str, list[float]] = {}
        self.epoch = self.batch = self.skipped = self.consecutive_skips = self.best_epoch = 0
        self.stop_reason = "epochs"
        self.best: dict[str, Tensor] = {}
        self._order_of_epoch = self.order.get_state()
        self._all = [torch.arange(num_data, device=device)] if batch_size == num_data else []  # the batch of each epoch
        self._rows: list[list[float]] = []  # what steps returned, of the epoch that is under way
        self._pending: list[Tensor] = []  # the same, since the last look
        self._inputs: list[Tensor] = []  # of these steps
        self._best_written = 0
        self._interrupted = False

    def run(self, epochs: int, progress: bool | None) -> None:
        """Go on until so many epochs are done, or something ends it before."""
        begun = self.epoch < epochs and self.stop_reason == "epochs"
        with (
            self._deferring_interrupts(),
            warnings.catch_warnings(),
            tqdm(total=epochs, disable=tqdm_disable(progress), unit="epoch") as bar,
        ):
            warnings.filterwarnings("ignore", "Encountered NaN")  # of Pyro, where an error of ours says more
            self._open_window()
            while self.epoch < epochs and self.stop_reason == "epochs":
                self._run_epoch(bar)
            self._sync_metrics(bar)
        if begun:
            self._save()
        if self.patience is not None and self.best:
            load_model_state(self.step, self.best)

    def _run_epoch(self, bar: Any) -> None:
        """What is left of it."""
        for rows in self._batches():
            self._inputs.append(rows)
            # What validation warns of, such as a scale at its floor, may come late; to look at each step costs time.
            validate = self.epoch == 0 or (self.batch == 0 and self.epoch.bit_count() == 1)
            self._pending.append(self.step(self.take, rows, validate=validate))
            self.batch += 1
            due = self.checkpoints is not None and self.checkpoints.due(self.step.count)
            if due or self._interrupted or time.perf_counter() > self._next_look:
                self._sync_metrics(bar)
            if due:
                self._save()
            if self._interrupted:
                self.stop_reason = "interrupted"
                break
        if self.batch * self.batch_size >= self.num_data:
            self._end_epoch(bar)

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        if self.best_epoch > self._best_written:
            value = next(values for name, values in self.history.items() if name.startswith("validation_"))
            self.checkpoints.save_best({"epoch": self.best_epoch, "validation": value[self.best_epoch - 1]}, self.best)
            self._best_written = self.best_epoch
        header, tensors = self.state()
        self.checkpoints.save(header | {"run": self.run_config}, tensors)

    def _batches(self) -> Sequence[Tensor]:
        """What is left of the epoch's."""
        if self._all:
            return self._all[self.batch :]
        self.order.set_state(self._order_of_epoch)
        shuffled = torch.randperm(self.num_data, generator=self.order).to(self.device)
        return shuffled.split(self.batch_size)[self.batch :]

    def _open_window(self) -> None:
        """From here on, what the steps return is not looked at."""
        self._pending.clear()
        self._inputs.clear()
        self._states = random_states()
        self._next_look = time.perf_counter() + _SYNC_SECONDS

    def _sync_metrics(self, bar: Any) -> None:
        """Read what the steps have returned: means for the history, and whether one of them was not finite."""
        table = torch.stack([row.to(self.device) for row in self._pending]).tolist() if self._pending else []
        for index, row in enumerate(table):
            if row[0]:
                self.consecutive_skips = 0
            else:
                self._not_finite(index)
        self._rows += table
        length = -(-self.num_data // self.batch_size)
        while len(self._rows) >= length:
            self._record([row for row in self._rows[:length] if row[0]])
            del self._rows[:length]
        self._open_window()
        bar.set_postfix({name: f"{values[-1]:.4g}" for name, values in self.history.items()}, refresh=False)
        bar.update(self.epoch - bar.n)

    def _record(self, rows: list[list[float]]) -> None:
        columns = list(zip(*rows, strict=True))[2:] if rows else [(math.nan,)] * len(self.step.names)
        for name, column in zip(self.step.names, columns, strict=True):
            self.history.setdefault(name, []).append(math.fsum(column) / len(column))

    def _not_finite(self, index: int) -> None:
        """Count a step since the last look as skipped, or raise for it."""
        number = self.step.count + index + 1 - len(self._pending)
        self.skipped += 1
        self.consecutive_skips += 1
        if isinstance(self.step, CapturedStep) and not self.step.skips:
            self.step.count = number
            done = [(rows,) for rows in self._inputs[: index + 1]]
            raise self.step.diagnose_nonfinite(self.take, done, partial(set_random_states, *self._states))
        if self.consecutive_skips >= _SKIPPED:
            raise FloatingPointError(
                f"step {number}: it is the {_SKIPPED}th in a row whose loss or gradient is not finite"
            )

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that the run goes on from, for :func:`pyro_vae.saving.tensor_file.write`."""
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        random, streams = random_states()
        header = numbers | {
            "steps": self.step.count,
            "history": self.history,
            "rows": self._rows,
            "random": random,
            "switches": trainable_flags(self.step),
        }
        groups = {
            "learnt": model_state(self.step),
            "optimizer": optimizer_state(self.step),
            "best": self.best,
            "random": streams | {"order": self._order_of_epoch},
        }
        return header, {f"{group}/{name}": tensor for group, found in groups.items() for name, tensor in found.items()}

    def resume(self) -> None:
        """Go on from the checkpoint in the folder, if it has one.

        Raises:
            ValueError: if it is of another run or model, by the name of what differs.
        """
        if self.checkpoints is None or (contents := self.checkpoints.load()) is None:
            return
        header, tensors = contents
        folder = repr(str(self.checkpoints.folder))
        for name, value in self.run_config.items():
            if (saved := header["run"].get(name)) != value:
                raise ValueError(
                    f"`{name}` must be {saved!r}, that of the run in {folder}, or another folder, got {value!r}"
                )
        groups: dict[str, dict[str, Tensor]] = {"learnt": {}, "optimizer": {}, "best": {}, "random": {}}
        for name, tensor in tensors.items():
            group, _, name = name.partition("/")
            groups[group][name] = tensor
        rows = torch.arange(self.batch_size, device=self.device)
        discover_parameters(self.step, self.take, rows)
        if lines := misfits(groups["learnt"], model_state(self.step)):
            raise ValueError(f"checkpoints: {folder} is of another model: {'; '.join(lines)}")
        if header["switches"] != trainable_flags(self.step):
            set_trainable_flags(self.step, header["switches"])
            self.step.clear_parameter_cache()
            discover_parameters(self.step, self.take, rows)
        self._restore(header, groups)

    def _restore(self, header: dict[str, Any], groups: dict[str, dict[str, Tensor]]) -> None:
        load_model_state(self.step, groups["learnt"])
        load_optimizer_state(self.step, header["switches"]["optimized"], groups["optimizer"])
        for name in _NUMBERS:
            setattr(self, name, header[name])
        if self.stop_reason == "interrupted":
            self.stop_reason = "epochs"
        self.step.count, self.history, self._rows = header["steps"], header["history"], header["rows"]
        self.best = {name: tensor.to(self.device) for name, tensor in groups["best"].items()}
        self._order_of_epoch = groups["random"].pop("order")
        set_random_states(header["random"], groups["random"])

    def _end_epoch(self, bar: Any) -> None:
        self.epoch += 1
        self.batch = 0
        if not self._all:
            self._order_of_epoch = self.order.get_state()
        if self.validate is None and not self.callbacks:
            return
        self._sync_metrics(bar)
        if self.validate is not None:
            with buffers_kept():
                held_out = self.validate()
            for name, value in held_out.items():
                self.history.setdefault(f"validation_{name}", []).append(value)
            self._update_best(self.history[f"validation_{next(iter(held_out))}"])
        if self.callbacks:
            self._call_back()

    def _call_back(self) -> None:
        """Tell the callbacks, of which one may end the run, and others freeze parameters."""
        before = trainable_flags(self.step)
        record = {name: values[-1] for name, values in self.history.items()}
        with preserve_rng_state():
            for call in self.callbacks:
                if call(Epoch(self.epoch, self.step.count, record, self.history)) is True:
                    self.stop_reason = "callback"
        if trainable_flags(self.step) != before:
            self.step.clear_parameter_cache()
            discover_parameters(self.step, self.take, torch.arange(self.batch_size, device=self.device))

    def _update_best(self, bounds: list[float]) -> None:
        """Keep what the best epoch has learnt, and stop where it lies too far back."""
        if self.patience is None and self.checkpoints is None:
            return
        if not self.best or bounds[-1] > bounds[self.best_epoch - 1]:
            self.best_epoch = self.epoch
            self.best = {name: tensor.clone() for name, tensor in model_state(self.step).items()}
        if self.patience is not None and self.epoch - self.best_epoch >= self.patience:
            self.stop_reason = "patience"

    @contextmanager
    def _deferring_interrupts(self) -> Iterator[None]:
        """Let Ctrl-C end the run after the step that it falls in; a second one ends it at once."""

        def interrupt(*_: Any) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        ours = threading.current_thread() is threading.main_thread()
        if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
