"""Types that several chapters share."""

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Function", "Shape"]

Function = Callable[..., Any]
"""A Pyro model or guide."""
Shape = int | Sequence[int]
"""The size of a vector, or the shape of an array."""
