"""Types that several chapters share."""

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Data", "Function", "Shape"]

Data = Any
"""What :func:`pyro_vae._utils.data.data_tensors` takes: a tensor, an array, a frame, a sparse matrix, a data set."""
Function = Callable[..., Any]
"""A Pyro model or guide."""
Shape = int | Sequence[int]
"""The size of a vector, or the shape of an array."""
