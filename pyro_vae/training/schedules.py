"""Schedules of values that change during training, such as a temperature: functions from the step to a number."""

import inspect
import math
import threading
import warnings
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae._utils.ranks import Ranks
from pyro_vae._utils.validation import number, positive, positive_int, with_article

__all__ = [
    "Decay", "Plateau", "PlateauRate", "RunSchedule", "Schedule", "TorchSchedule", "check_ends_of_ranks",
    "check_schedules", "checked_schedule", "constant", "cyclical", "decayed", "described", "exponential",
    "from_torch", "linear", "on_plateau",
]  # fmt: skip

Schedule = Callable[[int], float]
"""From the number of finished steps to the value for the next step."""


def constant(value: float) -> Schedule:
    """The same value at every step.

    >>> constant(0.5)(1000)
    0.5
    """
    number(value, "value")
    return lambda step: value


def exponential(start: float, rate: float, floor: float = 0.0, every: int = 1) -> Schedule:
    r"""Exponential decay to a floor, :math:`\max(\mathrm{floor}, \mathrm{start} \cdot e^{-\mathrm{rate} \cdot t})`.

    Args:
        start: value at step 0.
        rate: decrease of the logarithm per step.
        floor: lower bound of the value.
        every: t is the step rounded down to a multiple of this number, such as the number of steps in an epoch.

    Source: Jang, Gu and Poole 2017, section 4.1: start 1, floor 0.5, rates of 1e-5 and 1e-4, every 500 to 1000 steps.

    >>> temperature = exponential(1.0, rate=1e-4, floor=0.5)
    >>> [round(temperature(step), 4) for step in (0, 1000, 10_000)]
    [1.0, 0.9048, 0.5]
    """
    positive(start, "start")
    positive_int(every, "every")
    number(rate, "rate", least=0)
    number(floor, "floor", least=0)
    return lambda step: max(floor, start * math.exp(-rate * (step - step % every)))


def linear(start: float, end: float, steps: int) -> Schedule:
    """A warm-up: a straight line from ``start`` at step 0 to ``end`` at step ``steps``, then ``end``.

    Source: Bowman, Vilnis, Vinyals, Dai, Jozefowicz and Bengio 2016, section 3.1; Sønderby et al. 2016, section 2.3.

    >>> beta = linear(0.0, 1.0, steps=1000)
    >>> [beta(step) for step in (0, 500, 1000, 5000)]
    [0.0, 0.5, 1.0, 1.0]
    """
    number(start, "start")
    number(end, "end")
    positive_int(steps, "steps")
    return lambda step: start + (end - start) * min(step / steps, 1.0)


def cyclical(start: float, end: float, period: int, rise: float = 0.5) -> Schedule:
    """A repeated warm-up: in each period a straight line from ``start`` to ``end``, then ``end``.

    Args:
        start, end: values at the beginning of each period and after the rise.
        period: number of steps of one cycle.
        rise: share of the period in which the value rises, above 0 and at most 1.

    Source: Fu, Li, Liu, Gao, Celikyilmaz and Carin 2019, "Cyclical annealing schedule", equation 6.

    >>> beta = cyclical(0.0, 1.0, period=100)
    >>> [beta(step) for step in (0, 25, 50, 99, 100)]
    [0.0, 0.5, 1.0, 1.0, 0.0]
    """
    number(start, "start")
    number(end, "end")
    positive_int(period, "period")
    if not 0 < number(rise, "rise") <= 1:
        raise ValueError(f"`rise` must be a share above 0 and at most 1, got {rise!r}")
    return lambda step: start + (end - start) * min(step % period / (rise * period), 1.0)


@overload
def decayed(start: float, steps: int, hold: float = 0.5, end: float = 0.01) -> Schedule: ...


@overload
def decayed(start: float, steps: None = None, hold: float = 0.5, end: float = 0.01) -> "Decay": ...


def decayed(start: float, steps: int | None = None, hold: float = 0.5, end: float = 0.01) -> "Schedule | Decay":
    r"""A learning rate: ``start`` at first, then half a cosine down to ``end * start`` at the last step.

    Args:
        start: value of the first steps.
        steps: number of steps; by default those of the run, for ``lr`` of :func:`pyro_vae.fit` alone.
        hold: share of the steps that have this value.
        end: final value as a share of ``start``.

    Source: Loshchilov and Hutter 2017, "SGDR: stochastic gradient descent with warm restarts", equation 5.

    >>> lr = decayed(1e-3, steps=1000)
    >>> [round(lr(step), 6) for step in (0, 500, 750, 1000)]
    [0.001, 0.001, 0.000505, 1e-05]
    """
    positive(start, "start")
    if steps is not None:
        positive_int(steps, "steps")
    if not 0 <= number(hold, "hold") < 1 or not 0 <= number(end, "end") <= 1:
        raise ValueError(
            f"`hold, end` must be shares, `hold` from 0 to below 1 and `end` from 0 to 1, got {hold!r} and {end!r}"
        )
    decay = Decay(start, hold, end)
    return decay if steps is None else decay.begin(steps)


class RunSchedule:
    """A learning rate for ``lr`` of :func:`pyro_vae.fit` that depends on the run, and has no value for a step alone.

    Attributes:
        start: learning rate of the first step.
    """

    start: float

    def begin(self, steps: float) -> Schedule:
        """Return the rate of a run of so many steps, infinitely many where the number is not known."""
        raise NotImplementedError


class Decay(RunSchedule):
    """A learning rate that falls towards the last step of a run, see :func:`decayed`.

    >>> rate = decayed(1e-3).begin(1000)
    >>> rate(0), round(rate(750), 6)
    (0.001, 0.000505)
    """

    def __init__(self, start: float, hold: float, end: float):
        self.start, self.hold, self.end = start, hold, end

    def begin(self, steps: float) -> Schedule:
        """Return the rate of each step of a run."""
        start, hold, end = self.start, self.hold, self.end
        if steps == math.inf:
            must = "a schedule with a number of steps, such as `schedules.decayed(1e-3, steps=1000)`"
            raise ValueError(f"`lr` must be {must}, for a stream whose length is not known, got {self!r}")

        def value(step: int) -> float:
            fallen = min(max((step / steps - hold) / (1 - hold), 0.0), 1.0)
            return start * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * fallen)))

        return value

    def __repr__(self) -> str:
        return f"decayed(start={self.start}, hold={self.hold}, end={self.end})"


class Plateau(RunSchedule):
    """A learning rate that falls when the loss does: for ``lr`` of :func:`pyro_vae.fit`, see :func:`on_plateau`."""

    def __init__(self, make: Callable[[Any], ReduceLROnPlateau], start: float):
        self._make, self.start = make, start
        self.begin()

    def begin(self, steps: float = math.inf) -> "PlateauRate":
        """Return the rate of one run, before its first epoch."""
        return PlateauRate(self._make(_optimizer(self.start)))

    def __repr__(self) -> str:
        scheduler = self.begin().scheduler
        names = ("factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lrs", "eps")
        settings = [f"{name}={getattr(scheduler, name)}" for name in names]
        return f"{type(scheduler).__name__}({', '.join([f'start={self.start}', *settings])})"


class PlateauRate:
    """The learning rate of one run, which :meth:`update` lowers; a function of the step, as schedules are.

    >>> rate = on_plateau(0.1, factor=0.5, patience=1).begin()
    >>> rate(0)
    0.1
    >>> for loss in (3.0, 3.0, 3.0):
    ...     rate.update(loss)
    >>> rate(60)
    0.05
    """

    def __init__(self, scheduler: ReduceLROnPlateau):
        self.scheduler = scheduler

    def __call__(self, step: int) -> float:
        """Return the rate of all steps until the next update."""
        return self.scheduler.optimizer.param_groups[0]["lr"]

    def update(self, loss: float) -> None:
        """Take note of the loss of an epoch, in nats per datum."""
        self.scheduler.step(loss)


def on_plateau(
    start: float = 1e-3, factor: float = 0.1, patience: int = 10, threshold: float = 1e-4, floor: float = 0.0
) -> Plateau:
    """A learning rate that is multiplied by ``factor`` when the loss has not fallen for more than ``patience`` epochs.

    The loss is the negative ELBO of the validation data at the end of each epoch, or without ``validation`` that of the
    training data, the mean over the epoch's steps: the first entry of the history, in nats per datum.

    Args:
        start: learning rate of the first epochs.
        factor: from one learning rate to the next, above 0 and below 1.
        patience: number of epochs without a lower loss that change nothing.
        threshold: nats per datum by which a loss must be below the best one to be lower.
        floor: lower bound of the learning rate.

    Source: ``torch.optim.lr_scheduler.ReduceLROnPlateau``, with ``threshold_mode="abs"``: relative to a negative loss,
    which densities can have, torch takes a slightly higher one for a lower one.

    >>> lr = on_plateau(1e-2, factor=0.5, patience=5)
    >>> lr
    ReduceLROnPlateau(start=0.01, factor=0.5, patience=5, threshold=0.0001, threshold_mode=abs, ..., eps=0.0)
    """
    positive(start, "start")
    positive_int(patience, "patience")
    if not 0 < number(factor, "factor") < 1:
        raise ValueError(f"`factor` must be above 0 and below 1, got {factor!r}")
    number(threshold, "threshold", least=0)
    number(floor, "floor", least=0)
    settings: dict[str, Any] = {"factor": factor, "patience": patience, "threshold": threshold, "min_lr": floor}
    return Plateau(lambda optimizer: ReduceLROnPlateau(optimizer, threshold_mode="abs", eps=0.0, **settings), start)


class TorchSchedule:
    """The learning rates of a scheduler of torch, and its momenta, if it has some; see :func:`from_torch`.

    Attributes:
        momentum: a schedule of the momentum, or of the first of Adam's betas; ``None`` if the scheduler has none.
    """

    def __init__(self, scheduler: LRScheduler, changes_momentum: bool):
        self._scheduler, self._lock = scheduler, threading.Lock()
        self._rates, self._momenta = array("d"), array("d")
        self._append()
        self.momentum: Schedule | None = self._momentum if changes_momentum else None

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step."""
        self._reach(step)
        return self._rates[step]

    def _momentum(self, step: int) -> float:
        self._reach(step)
        return self._momenta[step]

    def _append(self) -> None:
        (group,) = self._scheduler.optimizer.param_groups
        self._rates.append(group["lr"])
        self._momenta.append(group["betas"][0])

    def _reach(self, step: int) -> None:
        """Call the scheduler until it has a value for this step."""
        if step < len(self._rates):
            return
        with self._lock, warnings.catch_warnings():
            # SequentialLR itself calls its schedulers in the way that torch warns of.
            warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step", UserWarning)
            while len(self._rates) <= step:
                self._scheduler.optimizer.step()
                try:
                    self._scheduler.step()
                except ValueError as error:
                    raise ValueError(
                        "`lr` must be a scheduler for all steps of the run, got "
                        f"{with_article(type(self._scheduler).__name__)} without a value for step "
                        f"{len(self._rates) + 1}: {error}"
                    ) from error
                self._append()


def from_torch(make: Callable[[Any], LRScheduler], start: float = 1e-3) -> TorchSchedule | Plateau:
    """The learning rates of a scheduler of ``torch.optim.lr_scheduler``, with one call of its ``step()`` per step.

    The scheduler has its own optimizer, which trains nothing: a checkpoint therefore holds no state of it. One that
    changes the momentum too, such as ``OneCycleLR``, changes that of the run's optimizer: the first of its ``betas``,
    or its ``momentum``.

    ``ReduceLROnPlateau`` is called at the end of each epoch, with the loss that :func:`on_plateau` describes, which
    falls: its ``mode`` must be ``"min"``. On resuming, it gets the losses of the history again.

    Args:
        make: from an optimizer to its scheduler; a plateau's is called at the beginning of each run.
        start: the optimizer's learning rate, where most schedulers begin.

    Raises:
        TypeError: if ``make`` does not return a scheduler.
        ValueError: if the mode of a plateau is ``"max"``; from the schedule, after the last step of a scheduler with a
            fixed number of steps, such as ``OneCycleLR``.

    >>> from torch.optim.lr_scheduler import CosineAnnealingLR
    >>> lr = from_torch(lambda optimizer: CosineAnnealingLR(optimizer, 1000), start=1e-3)
    >>> [round(lr(step), 6) for step in (0, 500, 1000)]
    [0.001, 0.0005, 0.0]
    """
    optimizer = _optimizer(positive(start, "start"))
    (group,) = optimizer.param_groups
    try:
        scheduler: Any = make(optimizer) if callable(make) else None
    except TypeError as error:
        raise TypeError(f"`make` must be a function of an optimizer, got {make!r}, which raises: {error}") from error
    if not isinstance(scheduler, LRScheduler):
        got = f"a function that returns {with_article(type(scheduler).__name__)}" if callable(make) else repr(make)
        raise TypeError(
            "`make` must be a function from an optimizer to a scheduler of torch.optim.lr_scheduler, such as `lambda "
            f"optimizer: CosineAnnealingLR(optimizer, 1000)`, got {got}"
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        if scheduler.mode != "min":
            raise ValueError("`make` must return a ReduceLROnPlateau with mode='min', for losses, got mode='max'")
        return Plateau(cast(Any, make), start)
    return TorchSchedule(scheduler, changes_momentum=group["betas"][0] != _NO_MOMENTUM)


_NO_MOMENTUM = 0.123456789
"""The first of the betas of a scheduler's own optimizer, by which one that sets the momentum is recognised."""


def _optimizer(lr: float) -> torch.optim.Optimizer:
    """Return an optimizer for a scheduler."""
    return torch.optim.Adam([torch.zeros((), device="cpu")], lr=lr, betas=(_NO_MOMENTUM, 0.999))


def described(schedule: Schedule | RunSchedule | float) -> float | str:
    """Describe a schedule by its values at some of the first thousand steps, to compare it in another process.

    >>> described(0.5), described(linear(0.0, 1.0, steps=10))
    (0.5, 'a schedule: 0, 0.1, 0.2, 0.5, 1, 1, 1, 1, 1, 1, 1')
    """
    if isinstance(schedule, RunSchedule):
        return repr(schedule)
    if not callable(schedule):
        return schedule
    text = f"a schedule: {_values(schedule)[0]}"
    if isinstance(schedule, TorchSchedule) and schedule.momentum is not None:
        text += f", momentum: {_values(schedule.momentum)[0]}"
    return text


def _values(schedule: Schedule) -> tuple[str, Exception | None]:
    """Values at some steps, and the error that ends them: a table, or a scheduler of torch, may be shorter."""
    values: list[str] = []
    try:
        for step in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
            values.append(f"{float(schedule(step)):.9g}")
    except (LookupError, ValueError) as error:
        return ", ".join(values), error
    return ", ".join(values), None


def check_ends_of_ranks(schedules: Sequence[Schedule], group: Ranks) -> None:
    """Raise what a schedule raises on some ranks alone; on all of them it is the end of a table."""
    if group.size > 1:
        errors = [_values(schedule)[1] for schedule in schedules]
        of_ranks = group.gather("the schedules of fit", [error is not None for error in errors])
        for error, *ended in zip(errors, *of_ranks, strict=False):  # other schedules are an error later
            if error is not None and not all(ended):
                raise error


def checked_schedule(schedule: Schedule, name: str) -> Schedule:
    """Return a schedule if it can be called with the step."""
    try:
        inspect.signature(schedule).bind(0)
    except TypeError as error:
        raise TypeError(f"`{name}` must be a function of the step, got {schedule!r}: {error}") from error
    except ValueError:  # some functions in C have no signature
        pass
    return schedule


def check_schedules(schedules: Mapping[Tensor, Schedule]) -> Mapping[Tensor, Schedule]:
    """Return the schedules if each is a function and belongs to a tensor of one number."""
    if not isinstance(schedules, Mapping):
        raise TypeError(
            f"`schedules` must be a dict from tensors to schedules, got {with_article(type(schedules).__name__)}"
        )
    for value, schedule in schedules.items():
        if not isinstance(value, Tensor) or value.dim() != 0 or value.requires_grad or not value.is_floating_point():
            shape = f"{tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else value
            raise ValueError(
                "each key of `schedules` must be a 0-dim tensor without gradient, of floats, such as "
                f"`vae.encoder.family.temperature`, got {shape!r} as a key"
            )
        if not callable(schedule):
            raise TypeError(
                f"each value of `schedules` must be a function of the step, such as `exponential()`, got {schedule!r}"
            )
        checked_schedule(schedule, "schedules")
    return schedules
