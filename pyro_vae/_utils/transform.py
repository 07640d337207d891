"""Transforms: functions that are called on the rows of each step, such as binarization."""

from collections.abc import Callable, Sequence

from torch import Tensor

__all__ = ["Transform", "transformed"]

Transform = Callable[..., Tensor | Sequence[Tensor]]
"""From the rows of each data tensor to the rows that model and guide run on."""


def transformed(rows: tuple[Tensor, ...], transform: Transform | None) -> tuple[Tensor, ...]:
    """Apply a transform to the rows of each data tensor.

    Raises:
        TypeError: if it is no function, or does not return tensors.
        ValueError: if it changes its rows in place, or returns another number of rows or tensors.
    """
    if transform is None:
        return rows
    expected = "`transform` must be a function that returns a tensor for each data tensor, as `pv.datasets.binarize`"
    if not callable(transform):
        raise TypeError(f"{expected}, got {transform!r}")
    versions = [_version(tensor) for tensor in rows]
    result = transform(*rows)
    if [_version(tensor) for tensor in rows] != versions:
        raise ValueError(
            "`transform` must be a function that makes new tensors, `x / 255` instead of `x.div_(255)`, got one that "
            "changes its rows in place, and so the data"
        )
    new = tuple(result) if isinstance(result, tuple | list) else (result,)
    given = f"for {len(rows)} tensors of {len(rows[0])} rows"
    if not all(isinstance(tensor, Tensor) and tensor.dim() > 0 for tensor in new):
        raise TypeError(f"{expected}, got {result!r} {given}")
    if [len(tensor) for tensor in new] != [len(tensor) for tensor in rows]:
        raise ValueError(
            f"`transform` must return one tensor for each data tensor, with as many rows, got tensors of "
            f"{[len(tensor) for tensor in new]} rows {given}"
        )
    return new


def _version(tensor: Tensor) -> int:
    """Return a number that grows when a tensor is changed in place; 0 for tensors of inference mode."""
    return 0 if tensor.is_inference() else tensor._version
