"""The space of a sweep: for each setting some values, or a range of numbers to draw from."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyro_vae._utils.validation import boolean, describe, is_integer, mapping, number, positive_int

__all__ = [
    "Choices",
    "Range",
    "Settings",
    "Space",
    "integers",
    "log_uniform",
    "plain_settings",
    "settings_text",
    "uniform",
]

Settings = dict[str, Any]
"""The settings of a run by name, as they are shown and stored: numbers, strings, ``True``, ``False`` or ``None``."""

_EXAMPLE = '{"latent": [1, 2, 4], "lr": pv.sweeps.log_uniform(1e-3, 1e-1)}'
_MAX_REPEATS = 1000  # draws in a row of settings that were drawn before


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, see :func:`uniform`, :func:`log_uniform` and :func:`integers`.

    Attributes:
        low: the smallest number.
        high: the largest number.
        log: whether their logarithm is uniform, and not they themselves.
        integer: whether they are integers.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def at(self, fraction: float) -> float:
        """Return the number below which a fraction of the distribution is, from 0 to 1.

        >>> log_uniform(1.0, 4.0).at(0.5), [integers(1, 3).at(u) for u in (0.0, 0.4, 0.99)]
        (2.0, [1, 2, 3])
        """
        low, high = self.low, self.high + self.integer
        found = low * math.exp(fraction * math.log(high / low)) if self.log else low + fraction * (high - low)
        return min(math.floor(found), int(self.high)) if self.integer else min(max(found, low), high)


def uniform(low: float, high: float) -> Range:
    """Return the range of numbers from ``low`` to ``high``.

    >>> uniform(0.0, 0.5)
    Range(low=0.0, high=0.5, log=False, integer=False)
    """
    return _range(number(low, "low"), number(high, "high"))


def log_uniform(low: float, high: float) -> Range:
    """Return the range of positive numbers whose logarithm is uniform, for learning rates and other scales.

    >>> log_uniform(1e-4, 1e-1)
    Range(low=0.0001, high=0.1, log=True, integer=False)
    """
    if number(low, "low") <= 0:
        raise ValueError(f"`low` must be a positive number in a logarithmic range, got {low!r}")
    return _range(float(low), number(high, "high"), log=True)


def integers(low: int, high: int, *, log: bool = False) -> Range:
    """Return the range of integers from ``low`` to ``high``, both included.

    With ``log``, small ones are drawn more often: from n to 2n as often as from 2n to 4n.

    >>> integers(1, 16, log=True)
    Range(low=1, high=16, log=True, integer=True)
    """
    for name, value in (("low", low), ("high", high)):
        if not is_integer(value):
            raise TypeError(f"`{name}` must be an integer, got {value!r}")
    if boolean(log, "log") and low < 1:
        raise ValueError(f"`low` must be a positive integer in a logarithmic range, got {low!r}")
    return _range(int(low), int(high), log=log, integer=True)


def _range(low: float, high: float, **kind: bool) -> Range:
    if low >= high:
        raise ValueError(f"`high` must be above `low`, which is {low!r}, got {high!r}")
    return Range(low, high, **kind)


class Choices(dict[Any, Any]):
    """The values of a setting by label: as they are shown and stored."""


class Space(dict[str, Range | Choices]):
    """The space of a sweep, checked.

    Args:
        space: by name of the setting a :class:`Range`, a list of values, or a mapping from labels to values.

    >>> from pyro_vae import priors
    >>> space = Space({"prior": [priors.StandardNormal, priors.VampPrior], "lr": [0.1, 0.01]})
    >>> space.draw(None, 0)[0], space.values_of({"prior": "VampPrior", "lr": 0.1})["prior"] is priors.VampPrior
    ({'prior': 'StandardNormal', 'lr': 0.1}, True)
    """

    def __init__(self, space: Mapping[str, Any]):
        given = mapping(space, "space", _EXAMPLE)
        if not given:
            raise ValueError(f"`space` must have a setting or more, as {_EXAMPLE}, got none")
        super().__init__({name: _checked(name, values) for name, values in given.items()})

    @property
    def size(self) -> float:
        """The number of different settings; infinite with a range of real numbers."""
        sizes = (_size(values) for values in self.values())
        return math.prod(sizes)

    @property
    def middle(self) -> Settings:
        """Settings in the middle of each range and list."""
        return {name: _at(values, 0.5) for name, values in self.items()}

    def draw(self, count: int | None, seed: int) -> list[Settings]:
        """Return all combinations of values for ``None``, else so many different ones, drawn at random."""
        if count is None:
            if wrong := [name for name, values in self.items() if isinstance(values, Range)]:
                must = f"given where the space has a range, as {wrong[0]!r}"
                raise ValueError(f"`num_settings` must be {must}, got None")
            return [dict(zip(self, labels, strict=True)) for labels in itertools.product(*map(_labels, self.values()))]
        if positive_int(count, "num_settings") > self.size:
            raise ValueError(f"`num_settings` must be at most {self.size:,}, all that the space has, got {count}")
        if not any(isinstance(values, Range) for values in self.values()):
            every, order = self.draw(None, seed), np.random.default_rng(seed).permutation(int(self.size))
            return [every[place] for place in order[:count]]
        return self._draw_different(count, np.random.default_rng(seed))

    def _draw_different(self, count: int, generator: np.random.Generator) -> list[Settings]:
        """Draw settings, and draw again what is equal to earlier ones."""
        drawn: dict[tuple[Any, ...], Settings] = {}
        repeats = 0
        while len(drawn) < count:
            settings = {name: _at(values, float(generator.random())) for name, values in self.items()}
            repeats = repeats + 1 if tuple(settings.values()) in drawn else 0
            drawn.setdefault(tuple(settings.values()), settings)
            if repeats > _MAX_REPEATS:
                raise ValueError(
                    f"`num_settings` must be far below the size of the space, {self.size:,}, to be drawn at random, "
                    f"got {count}: give lists of values for a grid"
                )
        return list(drawn.values())

    def values_of(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of settings, from their labels."""
        found = {}
        for name, values in self.items():
            label = settings[name]
            found[name] = values[label] if isinstance(values, Choices) else label
        return found

    def description(self) -> dict[str, Any]:
        """Return the space as JSON values."""
        return {name: list(values) if isinstance(values, Choices) else repr(values) for name, values in self.items()}


def _checked(name: str, values: Any) -> Range | Choices:
    if isinstance(values, Range):
        return values
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        must = "a list of values, a mapping from labels to values, or a range, as pv.sweeps.uniform(0.0, 1.0)"
        raise TypeError(f"`space[{name!r}]` must be {must}, got {describe(values)}")
    pairs: Sequence[tuple[Any, Any]] = (
        list(values.items()) if isinstance(values, Mapping) else [(_label(name, value), value) for value in values]
    )
    labels = [_plain(name, label) for label, _ in pairs]
    if not labels:
        raise ValueError(f"`space[{name!r}]` must have a value or more, got none")
    if twice := [label for place, label in enumerate(labels) if label in labels[:place]]:
        raise ValueError(f"`space[{name!r}]` must have values that differ, got {twice[0]!r} twice")
    return Choices(zip(labels, (value for _, value in pairs), strict=True))


def _label(name: str, value: Any) -> Any:
    """Return how a value is shown and stored: itself, or the name of a function or class."""
    if isinstance(value, str | int | float | np.number | np.bool_ | None):
        return value
    label = getattr(value, "__name__", None)
    if not isinstance(label, str) or label == "<lambda>":
        must = f'a mapping from labels to values, as {{"{name} 1": ...}}, for values without a name'
        raise TypeError(f"`space[{name!r}]` must be {must}, got {describe(value)}")
    return label


def _plain(name: str, label: Any) -> Any:
    """Return a label as JSON has it."""
    label = label.item() if isinstance(label, np.generic) else label
    if not isinstance(label, str | int | float | None) or (isinstance(label, float) and not math.isfinite(label)):
        raise TypeError(f"`space[{name!r}]` must have strings or finite numbers as labels, got {label!r}")
    return label


def plain_settings(settings: Mapping[str, Any]) -> Settings:
    """Return settings without numbers of NumPy, which some searchers propose.

    >>> plain_settings({"latent": np.int64(2)})
    {'latent': 2}
    """
    return {name: _plain(name, label) for name, label in settings.items()}


def _labels(values: Range | Choices) -> list[Any]:
    return list(values) if isinstance(values, Choices) else []


def _size(values: Range | Choices) -> float:
    if isinstance(values, Choices):
        return len(values)
    return int(values.high) - int(values.low) + 1 if values.integer else math.inf


def _at(values: Range | Choices, fraction: float) -> Any:
    return values.at(fraction) if isinstance(values, Range) else list(values)[int(fraction * len(values))]


def settings_text(settings: Mapping[str, Any]) -> str:
    """Show settings in a line.

    >>> settings_text({"latent": 2, "lr": 0.012345678})
    'latent 2, lr 0.01235'
    """
    shown = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()
    )
    return ", ".join(shown)
