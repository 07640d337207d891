"""Arguments that cannot be used are refused before any work, by name: what came, and what is accepted."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

__all__ = [
    "data_tensors",
    "flag",
    "is_integer",
    "number",
    "numbers",
    "positive",
    "positive_int",
    "rows_like",
]


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer, of Python or NumPy; ``True`` is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def positive_int(value: object, name: str) -> int:
    """``value`` if it is a positive integer.

    >>> positive_int(True, "epochs")
    Traceback (most recent call last):
        ...
    ValueError: epochs: got True; accepted is a positive integer
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {value!r}; accepted is a positive integer")
    return int(value)


def positive(value: object, name: str) -> float:
    """``value`` as a float if it is a positive, finite number."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name}: got {value!r}; accepted is a positive, finite number")
    return float(value)


def number(value: object, name: str, least: float = -math.inf) -> float:
    """``value`` as a float if it is a finite number, ``least`` or more.

    >>> number("a", "rate", least=0)
    Traceback (most recent call last):
        ...
    ValueError: rate: got 'a'; accepted is a finite number, 0 or more
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or float(value) < least:
        bound = "" if least == -math.inf else f", {least:g} or more"
        raise ValueError(f"{name}: got {value!r}; accepted is a finite number{bound}")
    return float(value)


def numbers(value: object, name: str) -> Tensor:
    """``value``, a number or numbers, as a tensor of the default dtype."""
    try:
        return torch.as_tensor(value, dtype=torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: got {value!r}; accepted is a number or a tensor of them") from error


def flag(value: object, name: str) -> bool:
    """``value`` if it is ``True`` or ``False``: a word such as "no" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}; accepted are True and False")
    return value


def data_tensors(data: Tensor | Sequence[Tensor], name: str) -> tuple[Tensor, ...]:
    """The data as tensors of one number of rows, all finite or NaN: whether NaN is accepted, the model will tell.

    :mod:`pyro_vae.missing` asks it.
    """
    accepted = "accepted is a tensor, such as `torch.as_tensor(array)` or `dataset.x`, or a sequence of tensors"
    if not isinstance(data, Tensor | Sequence):
        raise TypeError(f"{name}: got a {type(data).__name__}; {accepted}")
    tensors = (data,) if isinstance(data, Tensor) else tuple(data)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got a {type(tensor).__name__}; {accepted}")
        if tensor.dim() == 0 or len(tensor) == 0:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, without rows; accepted is (N, ...) with N >= 1")
        if len(tensor) != len(tensors[0]):
            raise ValueError(f"{name}: got tensors of {len(tensors[0])} and {len(tensor)} rows; accepted is one number")
        if tensor.is_floating_point() and tensor.isinf().any():
            row, *column = tensor.isinf().nonzero()[0].tolist()
            where = f"row {row}" + (f", column {tuple(column)}" if column else "")
            raise ValueError(f"{name}: holds {tensor[(row, *column)].item()} at {where}; accepted are finite numbers")
    if not tensors:
        raise ValueError(f"{name}: got no tensor; {accepted}")
    return tensors


def rows_like(held_out: tuple[Tensor, ...], data: tuple[Tensor, ...], name: str) -> tuple[Tensor, ...]:
    """``held_out`` if its rows are like those of ``data``."""
    if len(held_out) != len(data):
        raise ValueError(f"{name}: got {len(held_out)} tensors; accepted are {len(data)}, as data")
    for ours, theirs in zip(held_out, data, strict=True):
        if ours.shape[1:] != theirs.shape[1:] or ours.dtype != theirs.dtype:
            raise ValueError(
                f"{name}: got rows of shape {tuple(ours.shape[1:])}, {ours.dtype}; accepted are rows like those of "
                f"data, shape {tuple(theirs.shape[1:])}, {theirs.dtype}"
            )
    return held_out
