"""Schedules of values that change during training, such as a temperature: functions from the step to a number."""

import inspect
import math
import threading
import warnings
from array import array
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae._utils.validation import number, positive, positive_int, with_article

__all__ = [
    "Schedule", "check_schedules", "checked_schedule", "constant", "cyclical", "decayed", "described", "exponential",
    "from_torch", "linear",
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


def decayed(start: float, steps: int, hold: float = 0.5, end: float = 0.01) -> Schedule:
    r"""A learning rate: ``start`` at first, then half a cosine down to ``end * start`` at the last step.

    Args:
        start: value of the first steps.
        steps: number of steps of the run.
        hold: share of the steps that have this value.
        end: final value as a share of ``start``.

    Source: Loshchilov and Hutter 2017, "SGDR: stochastic gradient descent with warm restarts", equation 5.

    >>> lr = decayed(1e-3, steps=1000)
    >>> [round(lr(step), 6) for step in (0, 500, 750, 1000)]
    [0.001, 0.001, 0.000505, 1e-05]
    """
    positive(start, "start")
    positive_int(steps, "steps")
    if not 0 <= number(hold, "hold") < 1 or not 0 <= number(end, "end") <= 1:
        raise ValueError(
            f"`hold, end` must be shares, `hold` from 0 to below 1 and `end` from 0 to 1, got {hold!r} and {end!r}"
        )

    def value(step: int) -> float:
        fallen = min(max((step / steps - hold) / (1 - hold), 0.0), 1.0)
        return start * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * fallen)))

    return value


def from_torch(make: Callable[[Any], LRScheduler], start: float = 1e-3) -> Schedule:
    """The learning rates of a scheduler of ``torch.optim.lr_scheduler``, with one call of its ``step()`` per step.

    The scheduler has its own optimizer, which trains nothing: a checkpoint therefore holds no state of it.

    Args:
        make: from an optimizer to its scheduler.
        start: the optimizer's learning rate, where most schedulers begin.

    Raises:
        TypeError: if ``make`` does not return a scheduler, or returns ``ReduceLROnPlateau``, which depends on losses.
        ValueError: if the scheduler also changes Adam's momentum; from the schedule, after the last step of a
            scheduler with a fixed number of steps, such as ``OneCycleLR``.

    >>> from torch.optim.lr_scheduler import CosineAnnealingLR
    >>> lr = from_torch(lambda optimizer: CosineAnnealingLR(optimizer, 1000), start=1e-3)
    >>> [round(lr(step), 6) for step in (0, 500, 1000)]
    [0.001, 0.0005, 0.0]
    """
    optimizer = torch.optim.Adam([torch.zeros(())], lr=positive(start, "start"))
    group = optimizer.param_groups[0]
    betas = group["betas"]
    try:
        scheduler: Any = make(optimizer) if callable(make) else None
    except TypeError as error:
        raise TypeError(f"`make` must be a function of an optimizer, got {make!r}, which raises: {error}") from error
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        got = f"a function that returns {with_article(type(scheduler).__name__)}" if callable(make) else repr(make)
        raise TypeError(
            "`make` must be a function from an optimizer to a scheduler of torch.optim.lr_scheduler, such as `lambda "
            f"optimizer: CosineAnnealingLR(optimizer, 1000)`, got {got}. ReduceLROnPlateau depends on losses; "
            "`patience` ends a run that no longer improves"
        )
    if group["betas"] != betas:
        raise ValueError(
            "`make` must return a scheduler of the learning rate alone, got "
            f"{with_article(type(scheduler).__name__)} that changes Adam's momentum; use `cycle_momentum=False`"
        )
    values, lock = array("d", [group["lr"]]), threading.Lock()

    def value(step: int) -> float:
        if step < len(values):
            return values[step]
        with lock, warnings.catch_warnings():
            # SequentialLR itself calls its schedulers in the way that torch warns of.
            warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step", UserWarning)
            while len(values) <= step:
                optimizer.step()
                try:
                    scheduler.step()
                except ValueError as error:
                    raise ValueError(
                        "`lr` must be a scheduler for all steps of the run, got "
                        f"{with_article(type(scheduler).__name__)} without a value for step {len(values) + 1}: {error}"
                    ) from error
                values.append(group["lr"])
        return values[step]

    return value


def described(schedule: Schedule | float) -> float | str:
    """Describe a schedule by its values at some of the first thousand steps, to compare it in another process.

    >>> described(0.5), described(linear(0.0, 1.0, steps=10))
    (0.5, 'a schedule: 0, 0.1, 0.2, 0.5, 1, 1, 1, 1, 1, 1, 1')
    """
    if not callable(schedule):
        return schedule
    values: list[str] = []
    with suppress(LookupError, ValueError):  # a table of values, or a scheduler of torch, may be shorter
        for step in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
            values.append(f"{float(schedule(step)):.9g}")
    return f"a schedule: {', '.join(values)}"


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
