"""Validation of arguments: each error names the argument, what it must be and what it was."""

import inspect
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard

import torch
from pyro.nn import PyroModule
from torch import Tensor

__all__ = [
    "as_shape", "boolean", "broadcasts", "class_labels", "describe", "file_path", "first_index", "function",
    "image_size", "is_integer", "mapping", "nonempty_string", "number", "numbers", "optional_boolean", "positive",
    "positive_int", "real_tensor", "seed_number", "taking_data", "whole_numbers", "with_article", "writable",
]  # fmt: skip

_LARGEST = 2**63 - 1  # the largest size of a tensor
_LARGEST_SEED = 2**32 - 1  # the largest seed of NumPy
_BLOCK = 2**22  # numbers that are tested at once


def describe(value: object) -> str:
    """Describe a value: shape, dtype and device of a tensor, the type of any other value.

    >>> describe(torch.zeros(3)), describe([1.0]), describe(None)
    ('a torch.float32 tensor of shape (3,)', 'a list', 'a NoneType')
    """
    if not isinstance(value, Tensor):
        return f"the class {value.__name__}" if isinstance(value, type) else with_article(type(value).__name__)
    where = "" if value.device.type == "cpu" else f" on {value.device}"
    return f"a {value.dtype} tensor of shape {tuple(value.shape)}{where}"


def with_article(name: str) -> str:
    """Put "a" or "an" before a name: ``an int``, ``a list``, ``an ndarray``, ``a OneHotCategorical``."""
    sounds_like_vowel = name.startswith("nd") or (name[0] in "aeioAEIOU" and not name.startswith("One"))
    return f"{'an' if sounds_like_vowel else 'a'} {name}"


def _in_words(name: str) -> str:
    """Quote the name of an argument, and not what follows a colon: ``lr: at step 3`` is "`lr` at step 3"."""
    argument, _, where = name.partition(": ")
    return f"`{argument}` {where}".rstrip()


def is_integer(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer of Python or NumPy, but not a boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def positive_int(value: object, name: str) -> int:
    """Return ``value`` if it is a positive integer."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}")
    if value > _LARGEST:
        raise ValueError(f"`{name}` must be a positive integer below 2^63, got {value!r}")
    return int(value)


def as_shape(size: int | Sequence[int], name: str) -> torch.Size:
    """Return an event shape from ``3`` or ``(3, 2)``."""
    shape = tuple(size) if isinstance(size, Sequence) else (size,)
    if not shape or not all(is_integer(extent) and extent > 0 for extent in shape):
        raise ValueError(f"`{name}` must be a positive integer or a tuple of them, got {size!r}")
    if math.prod(map(int, shape)) > _LARGEST:
        raise ValueError(f"`{name}` must be a size below 2^63, got {size!r}")
    return torch.Size(int(extent) for extent in shape)


def image_size(shape: object, name: str) -> tuple[int, int, int]:
    """Return channels, height and width of an image: ``(3, H, W)`` in colour, ``(1, H, W)`` or ``(H, W)`` in grey."""
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    sizes = (1, *sizes) if len(sizes) == 2 else sizes
    if len(sizes) != 3 or not all(is_integer(n) and n > 0 for n in sizes) or sizes[0] not in (1, 3):
        raise ValueError(
            f"`{name}` must be height and width of an image, such as (28, 28), or (3, 32, 32) in colour, got {shape!r}"
        )
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


def seed_number(value: object, name: str = "seed") -> int:
    """Return ``value`` if it can seed torch, NumPy and :mod:`random`."""
    if not is_integer(value) or not 0 <= value <= _LARGEST_SEED:
        raise ValueError(f"`{name}` must be an integer from 0 to 2^32 - 1, got {value!r}")
    return int(value)


def positive(value: object, name: str) -> float:
    """Return ``value`` as a float if it is a positive, finite number."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) < math.inf:
        raise ValueError(f"`{name}` must be a positive, finite number, got {value!r}")
    return float(value)


def number(value: object, name: str, least: float = -math.inf) -> float:
    """Return ``value`` as a float if it is a finite number, ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or float(value) < least:
        bound = "" if least == -math.inf else f", {least:g} or more"
        raise ValueError(f"{_in_words(name)} must be a finite number{bound}, got {value!r}")
    return float(value)


def numbers(value: object, name: str) -> Tensor:
    """Return a number or several numbers as a tensor of the default dtype."""
    expected = "a number or a tensor of them"
    if isinstance(value, bool):
        raise TypeError(f"`{name}` must be {expected}, got {value!r}")
    if isinstance(value, Tensor):
        real_tensor(value, name, expected)
    try:
        return torch.as_tensor(value, dtype=torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`{name}` must be {expected}, got {value!r}") from error


def boolean(value: object, name: str) -> bool:
    """Return ``value`` if it is ``True`` or ``False``; a string such as "no" would otherwise count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}")
    return value


def optional_boolean(value: object, name: str) -> bool | None:
    """Return ``value`` if it is ``True``, ``False`` or ``None``."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True, False or None, got {value!r}")
    return value


def nonempty_string(value: object, name: str) -> str:
    """Return ``value`` if it is a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise TypeError(f"`{name}` must be a string that is not empty, got {value!r}")
    return value


def mapping(value: Any, name: str, example: str) -> Mapping[str, Any]:
    """Return ``value`` if it is a mapping from names; an empty one for ``None``."""
    if not isinstance(value, Mapping | None):
        raise TypeError(f"`{name}` must be a mapping, such as {example}, got {describe(value)}")
    if wrong := [key for key in value or {} if not isinstance(key, str)]:
        raise TypeError(f"`{name}` must have names as keys, as in {example}, got the key {wrong[0]!r}")
    return value or {}


def function(value: Any, name: str) -> Any:
    """Return ``value`` if it can be a Pyro model or guide, and not, say, a VAE, which is a pair of them."""
    example = f"`vae.{'model' if name == 'model' else 'guide'}`"
    is_run = isinstance(value, PyroModule) and type(value).forward is not torch.nn.Module.forward  # as EasyGuide
    if not isinstance(value, type) and hasattr(value, "model") and hasattr(value, "guide") and not is_run:
        raise TypeError(f"`{name}` must be one Pyro function, {example}, got {describe(value)}, a pair of functions")
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"`{name}` must be a Pyro function, such as {example}, got {describe(value)}")
    return value


@contextmanager
def taking_data(run: Callable[..., Any], name: str, data: Sequence[Tensor]) -> Iterator[None]:
    """Name a model or guide that is called inside, if it does not take the data as its arguments."""
    try:
        yield
    except TypeError as error:
        try:
            inspect.signature(run).bind(*data)
        except TypeError:
            taken = "one tensor, `data`" if len(data) == 1 else f"the {len(data)} tensors of `data`"
            raise TypeError(f"`{name}` must be a function of {taken}, got one that raises: {error}") from error
        raise


def file_path(value: Any, name: str) -> Path:
    """Return ``value`` as a path."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise TypeError(f"`{name}` must be a path, a string or a `pathlib.Path`, got {value!r}")
    return Path(value)


def writable(path: Path, name: str) -> Path:
    """Return ``path`` if a file can be created in its folder; on some file systems only a trial shows it."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"`{name}` must be in a folder that exists: there is no folder {str(path.parent)!r} for {path.name!r}"
        )
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise PermissionError(
            f"`{name}` must be in a folder that can be written to: nothing can be written in {str(path.parent)!r} "
            f"({error.strerror})"
        ) from error


def real_tensor(value: Any, name: str, expected: str) -> Tensor:
    """Return ``value`` if it is a dense tensor of real numbers, and not on the device ``meta``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{_in_words(name)} must be {expected}, got {describe(value)}")
    if value.is_complex():
        raise TypeError(f"{_in_words(name)} must be {expected}, of real numbers, got {describe(value)}")
    if value.is_meta:
        raise ValueError(f"{_in_words(name)} must be {expected}, got {describe(value)}, which holds no values")
    if value.layout != torch.strided:
        raise TypeError(
            f"{_in_words(name)} must be {expected}, dense: `x.to_dense()`, got {describe(value)}, {value.layout}"
        )
    return value


def broadcasts(*shapes: Sequence[int]) -> bool:
    """Whether tensors of these shapes broadcast.

    >>> broadcasts((3, 1), (2,)), broadcasts((3,), (2,))
    (True, False)
    """
    try:
        torch.broadcast_shapes(*map(tuple, shapes))
    except RuntimeError:
        return False
    return True


def first_index(test: Callable[[Tensor], Tensor], tensor: Tensor) -> list[int] | None:
    """Find the index of the first number in a tensor that passes a test; ``None`` for a tensor of integers.

    It tests one block of rows at a time, since the data may be in a memory-mapped file that is larger than the memory.

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
    """Return ``value`` as a tensor of whole numbers, ``(count,)``."""
    expected = f"whole numbers, ({count},), one for each datum"
    try:
        found = real_tensor(torch.as_tensor(value), name, expected)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`{name}` must be {expected}, got {describe(value)}") from error
    if found.shape != (count,):
        raise ValueError(f"`{name}` must be {expected}, got shape {tuple(found.shape)}")
    if (wrong := found != found.long()).any():
        raise ValueError(f"`{name}` must be {expected}, got {found[wrong][0].item()}")
    return found.long()


def class_labels(value: Any, name: str, count: int) -> list[int] | list[str]:
    """Return the class of each datum: whole numbers, ``(count,)``, or as many names."""
    if isinstance(value, Tensor) or not isinstance(value, Iterable) or isinstance(value, str):
        return whole_numbers(value, name, count).tolist()
    labels = list(value)
    if not labels or not all(isinstance(label, str) for label in labels):
        return whole_numbers(labels, name, count).tolist()
    if len(labels) != count:
        raise ValueError(f"`{name}` must be one name for each of the {count} data, got {len(labels)} names")
    return labels
