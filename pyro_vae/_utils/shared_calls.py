"""Calls that ranks share, for which all must have the same arguments and parameters: what differs is an error."""

import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyro_vae._utils.data import DataTensors, data_tensors, is_data
from pyro_vae._utils.module_state import before_each_run, bound_module
from pyro_vae._utils.ranks import fingerprint, ranks
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.validation import with_article

__all__ = ["notice_parameters", "report_of_ranks"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_FREE = {"path", "progress", "processes", "title", "pictures"}  # arguments that change no number
_NUMBERS = 2**20  # of a tensor that are compared; of a larger one, those of rows that are spread over it
_READ = 8  # rows of a data set, each of which may be slow to read
_REMEDY = (
    ". All ranks share the work of one call; calls of one rank alone, or of a model of its own, belong in `with "
    "pyro_vae.parallel.one_process():`"
)


def report_of_ranks(name: str) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Make a function that reports on a model and guide run on all ranks together, each with a part of the work.

    An error on one of them is raised on all. It is one if they have other arguments, by a sample of large ones, or
    other parameters: those that the model and guide are bound to, before the work, and those that their runs use.
    What a loader gives is not compared, since each rank may have rows of its own.
    """

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        signature = inspect.signature(function)

        @wraps(function)
        def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            group = ranks()
            if group.size == 1:
                return function(*args, **kwargs)
            with group.together(name):
                given: dict[str, Any] = {}
                with suppress(TypeError):  # which the call raises
                    given = signature.bind(*args, **kwargs).arguments
                described = {name: _described(value) for name, value in given.items() if name not in _FREE}
                modules = {name: module for name, one in given.items() if (module := _module(one)) is not None}
                before = {
                    f"{name}: {path}": tensor for name, one in modules.items() for path, tensor in _tensors_of(one)
                }
                group.check_same(f"the arguments of {name}", described | before, _REMEDY)
                with _parameters_noticed() as found:
                    result = function(*args, **kwargs)
                known = set(map(id, before.values()))
                group.check_same(
                    f"the parameters of {name}",
                    {name: tensor for name, tensor in found.items() if id(tensor) not in known},
                    _REMEDY,
                )
                return result

        return run

    return decorate


_found: list[dict[str, Tensor]] = []  # parameters of the calls at present, the outermost first


def notice_parameters(parameters: Mapping[str, Tensor]) -> None:
    """Add parameters that a run has used, by their names, to those that ranks compare, unless this one is alone."""
    if _found and ranks().size > 1:
        _found[-1].update(parameters)


@contextmanager
def _parameters_noticed() -> Iterator[dict[str, Tensor]]:
    """Collect the parameters and buffers that runs on all ranks use in a block."""
    roots: list[nn.Module] = []  # kept alive, so that no other module gets the same id
    seen: set[int] = set()

    def notice(module: nn.Module) -> None:
        if id(module) not in seen and ranks().size > 1:
            roots.append(module)
            seen.update(map(id, module.modules()))
            kind = f"{type(module).__name__} {len(roots)}"
            notice_parameters({f"{kind}: {path}": tensor for path, tensor in _tensors_of(module)})

    _found.append({})
    try:
        with before_each_run(notice):
            yield _found[-1]
    finally:
        _found.pop()


def _module(value: Any) -> nn.Module | None:
    return bound_module(value) if callable(value) else None


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by path.

    Batch normalisation counts the batches of each rank, which need not be as many on all of them.
    """
    yield from module.named_parameters()
    yield from (pair for pair in module.named_buffers() if not pair[0].endswith("num_batches_tracked"))


def _described(value: Any) -> Any:
    """Describe an argument by what JSON can hold: numbers and text as they are, data by checksums, the rest by type."""
    with suppress(Exception):  # of objects of the user, about which the call itself raises
        if isinstance(value, bool | int | float | str | None):
            return value
        if isinstance(value, DataTensors):
            rows = torch.arange(0, count := len(value[0]), _step(count, value), device=value[0].device)
            return [count, *map(fingerprint, value.rows(rows))]
        if isinstance(value, Tensor):
            return _text_of_rows(value, fingerprint)
        if isinstance(value, np.ndarray):
            return _text_of_rows(value, _text_of_array)
        if isinstance(value, Mapping):
            return {str(name): _described(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return list(map(_described, value))
        if isinstance(value, TensorDataset):
            return _described(value.tensors)
        if isinstance(value, Dataset) and not isinstance(value, IterableDataset):
            return _described_set(value)
        if isinstance(value, ELBO):
            settings = {name: one for name, one in vars(value).items() if name not in ("max_plate_nesting", "name")}
            return [type(value).__name__, {name: one for name, one in settings.items() if isinstance(one, int | float)}]
        if callable(getattr(value, "to_data", None)):
            return _described(value.to_data())
        if is_data(value) and not isinstance(value, DataLoader):
            return _described(data_tensors(value, "data", lazy=True))
        if hasattr(value, "args") and hasattr(value, "kwargs"):  # pyro_vae.Arguments
            return [_described(value.args), _described(value.kwargs)]
    return with_article(type(value).__name__)


def _step(count: int, rows: Any) -> int:
    """The distance of rows that are compared, in tensors of which these are all."""
    size = sum(one[0].numel() for one in rows if count) or 1
    return max(1, -(-count // max(1, _NUMBERS // size)))


def _text_of_rows(value: Any, text: Callable[[Any], str]) -> str:
    """Describe an array by its shape, and by its rows or, if it is large, some of them."""
    size = int(np.prod(value.shape))
    if size <= _NUMBERS:
        return text(value)
    step = -(-len(value) // max(1, _NUMBERS * len(value) // size))
    return f"{tuple(value.shape)}, of which each {step}th row is {text(value[::step])}"


def _text_of_array(array: np.ndarray) -> str:
    numbers = repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).tobytes()
    return f"{array.shape} {array.dtype} with checksum {zlib.crc32(numbers):08x}"


def _described_set(data: Any) -> Any:
    """Describe a data set by its length and a few rows, unless these are others each time that they are read."""
    count = len(data)

    def read() -> Any:
        with seeded(0):
            return [_described(data[number]) for number in range(0, count, max(1, -(-count // _READ)))]

    rows = read()
    return [count, rows if rows == read() else with_article(type(data).__name__)]
