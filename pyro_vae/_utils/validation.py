"""Arguments that cannot be used are refused before any work, by name: what came, and what is accepted."""

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

__all__ = [
    "as_shape",
    "boolean",
    "data_tensors",
    "describe",
    "file_path",
    "first_index",
    "function",
    "image_size",
    "is_integer",
    "mapping",
    "nonempty_string",
    "number",
    "numbers",
    "positive",
    "positive_int",
    "real_tensor",
    "rows_like",
    "seed_number",
    "tqdm_disable",
    "whole_numbers",
    "writable",
]

_LARGEST = 2**63 - 1  # that a tensor can have of anything


_LARGEST_SEED = 2**32 - 1  # that NumPy takes


def describe(value: object) -> str:
    """What came, in words: shape, dtype and device of a tensor, of anything else its type.

    >>> describe(torch.zeros(3)), describe([1.0]), describe(None)
    ('a torch.float32 tensor of shape (3,)', 'a list', 'a NoneType')
    """
    if not isinstance(value, Tensor):
        return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
    where = "" if value.device.type == "cpu" else f" on {value.device}"
    return f"a {value.dtype} tensor of shape {tuple(value.shape)}{where}"


def is_integer(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer, of Python or NumPy; ``True`` is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def positive_int(value: object, name: str) -> int:
    """``value`` if it is a positive integer.

    >>> positive_int(True, "epochs")
    Traceback (most recent call last):
        ...
    ValueError: epochs: got True; accepted is a positive integer
    """
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name}: got {value!r}; accepted is a positive integer")
    if value > _LARGEST:
        raise ValueError(f"{name}: got {value!r}; accepted is a positive integer below 2^63")
    return int(value)


def as_shape(size: int | Sequence[int], name: str) -> torch.Size:
    """An event shape from ``3`` or ``(3, 2)``.

    >>> as_shape(3, "latent"), as_shape((20, 10), "latent")
    (torch.Size([3]), torch.Size([20, 10]))
    """
    shape = tuple(size) if isinstance(size, Sequence) else (size,)
    if not shape or not all(is_integer(extent) and extent > 0 for extent in shape):
        raise ValueError(f"{name}: got {size!r}; accepted is a positive integer or a tuple of them")
    if math.prod(map(int, shape)) > _LARGEST:
        raise ValueError(f"{name}: got {size!r}; accepted is a size below 2^63")
    return torch.Size(int(extent) for extent in shape)


def image_size(shape: object, name: str) -> tuple[int, int]:
    """Height and width, if these are two positive integers."""
    if not isinstance(shape, Sequence) or len(shape) != 2 or not all(is_integer(n) and n > 0 for n in shape):
        raise ValueError(f"{name}: got {shape!r}; accepted are height and width of an image, such as (28, 28)")
    return int(shape[0]), int(shape[1])


def seed_number(value: object, name: str = "seed") -> int:
    """``value`` if it can seed torch, NumPy and :mod:`random` alike."""
    if not is_integer(value) or not 0 <= value <= _LARGEST_SEED:
        raise ValueError(f"{name}: got {value!r}; accepted is an integer from 0 to 2^32 - 1")
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
    accepted = "accepted is a number or a tensor of them"
    if isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}; {accepted}")
    if isinstance(value, Tensor):
        real_tensor(value, name, accepted)
    try:
        return torch.as_tensor(value, dtype=torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: got {value!r}; {accepted}") from error


def boolean(value: object, name: str) -> bool:
    """``value`` if it is ``True`` or ``False``: a word such as "no" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}; accepted are True and False")
    return value


def tqdm_disable(progress: bool | None) -> bool | None:
    """What ``tqdm`` takes for ``disable``: a bar is shown or not, or where it is left out, on a terminal alone."""
    return None if progress is None else not boolean(progress, "progress")


def nonempty_string(value: object, name: str) -> str:
    """``value`` if it is a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name}: got {value!r}; accepted is a string that is not empty")
    return value


def mapping(value: Any, name: str, example: str) -> Mapping[str, Any]:
    """``value`` if it is a mapping from names; an empty one if it is left out."""
    if not isinstance(value, Mapping | None):
        raise TypeError(f"{name}: got {describe(value)}; accepted is a mapping, such as {example}")
    if wrong := [key for key in value or {} if not isinstance(key, str)]:
        raise TypeError(f"{name}: got the key {wrong[0]!r}; accepted are names, as in {example}")
    return value or {}


def function(value: Any, name: str) -> Any:
    """``value`` if it can be a Pyro model or guide: a pair of them in the place of one is what is handed over first."""
    example = f"`vae.{'model' if name == 'model' else 'guide'}`"
    if not isinstance(value, type) and hasattr(value, "model") and hasattr(value, "guide"):
        raise TypeError(f"{name}: got {describe(value)}, a pair of functions; accepted is one of them, {example}")
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"{name}: got {describe(value)}; accepted is a Pyro function, such as {example}")
    return value


def file_path(value: Any, name: str) -> Path:
    """``value`` as a path."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise TypeError(f"{name}: got {value!r}; accepted is a path, a string or a `pathlib.Path`")
    return Path(value)


def writable(path: Path, name: str) -> Path:
    """``path`` if a file can be made in its folder: tried, for permissions do not tell of every file system."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{name}: there is no folder {str(path.parent)!r} for {path.name!r}; accepted is a path in one there is"
        )
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise PermissionError(
            f"{name}: nothing can be written in {str(path.parent)!r} ({error.strerror}); accepted is a path in a "
            "folder where it can"
        ) from error


def real_tensor(value: Any, name: str, accepted: str) -> Tensor:
    """``value`` if it is a tensor of real numbers that are there: dense, and not on the device ``meta``.

    >>> real_tensor(torch.zeros(2, device="meta"), "x", "accepted is a tensor")
    Traceback (most recent call last):
        ...
    ValueError: x: got a torch.float32 tensor of shape (2,) on meta, which holds no values; accepted is a tensor
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {describe(value)}; {accepted}")
    if value.is_complex():
        raise TypeError(f"{name}: got {describe(value)}; {accepted}, of real numbers")
    if value.is_meta:
        raise ValueError(f"{name}: got {describe(value)}, which holds no values; {accepted}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got {describe(value)}, {value.layout}; {accepted}, dense: `x.to_dense()`")
    return value


_BLOCK = 2**22  # numbers that are looked at together


def first_index(test: Callable[[Tensor], Tensor], tensor: Tensor) -> list[int] | None:
    """The first place in a tensor whose number passes a test, block of rows by block: the data may be larger than the
    memory, in a file that is mapped. Integers pass none.

    >>> first_index(torch.isnan, torch.tensor([[0.0, 1.0], [torch.nan, 2.0]]))
    [1, 0]
    """
    if not tensor.is_floating_point() or not tensor.dim():
        return [] if tensor.is_floating_point() and test(tensor) else None
    rows = max(1, _BLOCK // max(1, tensor[:1].numel()))
    for number, block in enumerate(tensor.split(rows)):
        if (found := test(block)).any():
            row, *column = found.nonzero()[0].tolist()
            return [number * rows + row, *column]
    return None


def whole_numbers(value: Any, name: str, count: int) -> Tensor:
    """``value`` as whole numbers, ``(count,)``."""
    accepted = f"accepted are whole numbers, ({count},), one for each datum"
    try:
        found = real_tensor(torch.as_tensor(value), name, accepted)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: got {describe(value)}; {accepted}") from error
    if found.shape != (count,):
        raise ValueError(f"{name}: got shape {tuple(found.shape)}; {accepted}")
    if (wrong := found != found.long()).any():
        raise ValueError(f"{name}: got {found[wrong][0].item()}; {accepted}")
    return found.long()


def data_tensors(data: Tensor | Sequence[Tensor], name: str) -> tuple[Tensor, ...]:
    """The data as tensors of one number of rows, all finite or NaN: whether NaN is accepted, the model will tell.

    :mod:`pyro_vae.distributions.missing` asks it.
    """
    accepted = "accepted is a tensor, such as `torch.as_tensor(array)` or `dataset.x`, or a sequence of tensors"
    if not isinstance(data, Tensor | Sequence):
        raise TypeError(f"{name}: got {describe(data)}; {accepted}")
    tensors = (data,) if isinstance(data, Tensor) else tuple(data)
    for tensor in tensors:
        real_tensor(tensor, name, accepted)
        if tensor.dim() == 0 or len(tensor) == 0:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, without rows; accepted is (N, ...) with N >= 1")
        if len(tensor) != len(tensors[0]):
            raise ValueError(f"{name}: got tensors of {len(tensors[0])} and {len(tensor)} rows; accepted is one number")
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"{name}: got tensors on {tensors[0].device} and {tensor.device}; accepted is one device for all"
            )
        if (place := first_index(torch.isinf, tensor)) is not None:
            row, *column = place
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
        if ours.device != theirs.device:
            raise ValueError(f"{name}: got rows on {ours.device}; accepted are rows on {theirs.device}, as data")
    return held_out
