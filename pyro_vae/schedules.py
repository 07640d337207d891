"""Schedules: values that change as training goes on, such as a temperature; functions from the step to a number."""

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from pyro_vae.checks import number, positive, positive_int

__all__ = ["Schedule", "check_schedules", "constant", "cyclical", "decayed", "exponential", "linear"]

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
        raise ValueError(f"rise: got {rise!r}; accepted is a share above 0, 1 at most")
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
        raise ValueError(f"hold, end: got {hold!r} and {end!r}; accepted are shares, hold from 0 to below 1, end to 1")

    def value(step: int) -> float:
        fallen = min(max((step / steps - hold) / (1 - hold), 0.0), 1.0)
        return start * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * fallen)))

    return value


def check_schedules(schedules: Mapping[Tensor, Schedule]) -> Mapping[Tensor, Schedule]:
    """The schedules, if each is a function for a tensor of one number."""
    if not isinstance(schedules, Mapping):
        raise TypeError(f"schedules: got a {type(schedules).__name__}; accepted is a dict from tensors to schedules")
    for value, schedule in schedules.items():
        if not isinstance(value, Tensor) or value.dim() != 0 or value.requires_grad or not value.is_floating_point():
            shape = f"{tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else value
            raise ValueError(
                f"schedules: got {shape!r} as a key; accepted is a 0-dim tensor without gradient, of floats, such as "
                "`vae.encoder.family.temperature`"
            )
        if not callable(schedule):
            raise TypeError(f"schedules: got {schedule!r}; accepted is a function of the step, such as `exponential()`")
    return schedules
