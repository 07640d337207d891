"""Types that several chapters share."""

from collections.abc import Callable
from typing import Any

__all__ = ["Function"]

Function = Callable[..., Any]
"""A Pyro model or guide."""
