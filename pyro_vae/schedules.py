"""Schedules: values that change as training goes on, such as a temperature; functions from the step to a number."""

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from pyro_vae.checks import positive, positive_int

__all__ = ["Schedule", "check_schedules", "exponential"]

Schedule = Callable[[int], float]
"""From the number of steps that are done to the value for the next."""


def exponential(start: float, rate: float, floor: float = 0.0, every: int = 1) -> Schedule:
    r"""Exponential decay to a floor, :math:`\max(\mathrm{floor}, \mathrm{start} \cdot e^{-\mathrm{rate} \cdot t})`.

    Args:
        start: value at step 0.
        rate: by which the logarithm falls at each step.
        floor: below which the value does not fall.
        every: t is the step, rounded down to a multiple of this.

    Source: Jang, Gu and Poole 2017, section 4.1: start 1, floor 0.5, rates of 1e-5 and 1e-4, every 500 to 1000 steps.

    >>> temperature = exponential(1.0, rate=1e-4, floor=0.5)
    >>> [round(temperature(step), 4) for step in (0, 1000, 10_000)]
    [1.0, 0.9048, 0.5]
    """
    positive(start, "start")
    positive_int(every, "every")
    if not 0 <= rate < math.inf or not 0 <= floor < math.inf:
        raise ValueError(f"rate, floor: got {rate!r} and {floor!r}; accepted are finite numbers, 0 or more")
    return lambda step: max(floor, start * math.exp(-rate * (step - step % every)))


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
