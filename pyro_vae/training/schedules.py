"""Schedules: values that change as training goes on, such as a temperature; functions from the step to a number."""

import math
import threading
import warnings
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae._utils.validation import number, positive, positive_int

__all__ = ["Schedule", "check_schedules", "constant", "cyclical", "decayed", "exponential", "from_torch", "linear"]

Schedule = Callable[[int], float]
"""From the number of steps that are done to the value for the next."""


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
        rate: by which the logarithm falls at each step.
        floor: below which the value does not fall.
        every: t is the step, rounded down to a multiple of this, such as the number of steps in an epoch.

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
    """A straight line from ``start`` at step 0 to ``end`` at ``steps``, and ``end`` from there on: a warm-up.

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
    """A warm-up over and over: in each period a straight line from ``start`` to ``end``, then ``end``.

    Args:
        start: value at the beginning of each period.
        end: value after the rise.
        period: steps of one cycle.
        rise: share of the period that the line takes, above 0 and at most 1.

    Source: Fu, Li, Liu, Gao, Celikyilmaz and Carin 2019, "Cyclical annealing schedule", equation 6.

    >>> beta = cyclical(0.0, 1.0, period=100)
    >>> [beta(step) for step in (0, 25, 50, 99, 100)]
    [0.0, 0.5, 1.0, 1.0, 0.0]
    """
    number(start, "start")
    number(end, "end")
    positive_int(period, "period")
    if not 0 < number(rise, "rise") <= 1:
        raise ValueError(f"`rise` must be a share above 0, 1 at most, got {rise!r}")
    return lambda step: start + (end - start) * min(step % period / (rise * period), 1.0)


def decayed(start: float, steps: int, hold: float = 0.5, end: float = 0.01) -> Schedule:
    r"""Held at ``start``, then falling along half a cosine to ``end * start`` at the last step: for a learning rate.

    Args:
        start: value over the first part.
        steps: of the whole run.
        hold: share of the steps before the fall.
        end: share of ``start`` that is left.

    Source: Loshchilov and Hutter 2017, "SGDR: stochastic gradient descent with warm restarts", equation 5.

    >>> lr = decayed(1e-3, steps=1000)
    >>> [round(lr(step), 6) for step in (0, 500, 750, 1000)]
    [0.001, 0.001, 0.000505, 1e-05]
    """
    positive(start, "start")
    positive_int(steps, "steps")
    if not 0 <= number(hold, "hold") < 1 or not 0 <= number(end, "end") <= 1:
        raise ValueError(f"hold, end must be shares, hold from 0 to below 1, end to 1, got {hold!r} and {end!r}")

    def value(step: int) -> float:
        fallen = min(max((step / steps - hold) / (1 - hold), 0.0), 1.0)
        return start * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * fallen)))

    return value


def from_torch(make: Callable[[Any], LRScheduler], start: float = 1e-3) -> Schedule:
    """The learning rates of a scheduler of ``torch.optim.lr_scheduler``, which is stepped once for each step.

    It drives an optimizer of its own, which trains nothing: the schedule is a function of the step alone, and a run
    that goes on from a checkpoint needs no state of it.

    Args:
        make: from an optimizer to its scheduler.
        start: the optimizer's learning rate, from which most schedulers begin.

    Raises:
        TypeError: if what comes is no scheduler, or ``ReduceLROnPlateau``, which is no function of the step.
        ValueError: if it changes Adam's momentum too; and when it is called, past the last step of ``OneCycleLR``.

    >>> from torch.optim.lr_scheduler import CosineAnnealingLR
    >>> lr = from_torch(lambda optimizer: CosineAnnealingLR(optimizer, 1000), start=1e-3)
    >>> [round(lr(step), 6) for step in (0, 500, 1000)]
    [0.001, 0.0005, 0.0]
    """
    if not callable(make) or (isinstance(make, type) and issubclass(make, ReduceLROnPlateau)):
        raise TypeError(f"make: got {make!r}; {_SCHEDULER}")
    optimizer = torch.optim.Adam([torch.zeros(())], lr=positive(start, "start"))
    betas = optimizer.param_groups[0]["betas"]
    maker: Any = make  # which mypy would call no function any more
    scheduler = maker(optimizer)
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(f"make: gives a {type(scheduler).__name__}; {_SCHEDULER}")
    if optimizer.param_groups[0]["betas"] != betas:
        raise ValueError(
            f"`make` must be `cycle_momentum=False`: gives a {type(scheduler).__name__} that changes Adam's momentum, "
            "and only the learning rate is taken"
        )
    values = array("d", [_current(optimizer)])
    lock = threading.Lock()

    def extend(steps: int) -> None:
        with lock, warnings.catch_warnings():
            # SequentialLR steps the schedulers in it as torch itself says one should not.
            warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step", UserWarning)
            while len(values) < steps:
                optimizer.step()
                try:
                    scheduler.step()
                except ValueError as error:
                    raise ValueError(
                        f"`lr` must be a scheduler for as many steps as the run has: {type(scheduler).__name__} has "
                        f"no value for step {len(values) + 1}: {error}"
                    ) from error
                values.append(_current(optimizer))

    def value(step: int) -> float:
        if step >= len(values):
            extend(step + 1)
        return values[step]

    return value


_SCHEDULER = (
    "accepted is a function from an optimizer to a scheduler of torch.optim.lr_scheduler, such as `lambda optimizer: "
    "CosineAnnealingLR(optimizer, 1000)`; ReduceLROnPlateau, which looks at losses, is no function of the step: "
    "`patience` ends a run that no longer gets better"
)


def _current(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def check_schedules(schedules: Mapping[Tensor, Schedule]) -> Mapping[Tensor, Schedule]:
    """The schedules, if each is a function for a tensor of one number."""
    if not isinstance(schedules, Mapping):
        raise TypeError(f"`schedules` must be a dict from tensors to schedules, got a {type(schedules).__name__}")
    for value, schedule in schedules.items():
        if not isinstance(value, Tensor) or value.dim() != 0 or value.requires_grad or not value.is_floating_point():
            shape = f"{tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else value
            raise ValueError(
                "`schedules` must be a 0-dim tensor without gradient, of floats, such as "
                f"`vae.encoder.family.temperature`, got {shape!r} as a key"
            )
        if not callable(schedule):
            raise TypeError(f"`schedules` must be a function of the step, such as `exponential()`, got {schedule!r}")
    return schedules
