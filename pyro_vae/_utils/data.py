"""Data of any common form as tensors: arrays, frames, sparse matrices, data sets; with the names of rows and columns.

:func:`data_tensors` is the one door. Model and guide receive tensors of N rows. Rows of a memory-mapped file, a sparse
matrix or a :class:`torch.utils.data.Dataset` are read on demand where the caller takes some rows at a time.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from pyro_vae._utils.module_state import bound_module
from pyro_vae._utils.ranks import share_of
from pyro_vae._utils.validation import describe, first_index, real_tensor, with_article

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Columns", "DataTensors", "FirstBatch", "LazyData", "Placement", "as_tensors", "data_tensors", "is_data",
    "placement", "read_only_arrays", "rows_like", "to_device", "without_infinity",
]  # fmt: skip

Columns = tuple[str, np.ndarray]
"""The name of the dimension of the columns, and their labels, ``(D,)``."""

_MOST_BYTES = 2**30  # of data that are read as a whole where their rows are read on demand
_BLOCK = 2**22  # numbers that are read at once
_NUM_CHECKED = 256  # rows of a Dataset, each of which may be slow to read, that are checked before training
_FRAMES = {"polars", "pyarrow", "modin", "cudf", "dask", "pyspark", "duckdb", "ibis"}
_EXPECTED = (
    "a tensor, such as `torch.as_tensor(array)` or `dataset.x`, an array, a frame, a sparse matrix, a data set or a "
    "sequence of these"
)


class DataTensors(tuple[Tensor, ...]):
    """Data that :func:`data_tensors` has checked: tensors of the same number of rows.

    Args:
        tensors: the arguments of model and guide.
        row_labels: labels of the rows, ``(N,)``, if they have some.
        columns: for each tensor the labels of its columns, if it has some, with the name of their dimension.
        first_row: the number of the first row in the data of the user, of which these may be a batch.

    >>> data = DataTensors([torch.zeros(2, 3)], columns=[("column", np.array(["a", "b", "c"]))])
    >>> len(data), data.columns[0][0], data.row_labels is None
    (1, 'column', True)
    """

    row_labels: np.ndarray | None
    columns: tuple[Columns | None, ...]
    first_row: int

    def __new__(
        cls,
        tensors: Sequence[Tensor],
        row_labels: np.ndarray | None = None,
        columns: Sequence[Columns | None] | None = None,
        first_row: int = 0,
    ) -> "DataTensors":
        self = super().__new__(cls, tensors)
        self.row_labels, self.columns = row_labels, (None,) * len(self) if columns is None else tuple(columns)
        self.first_row = first_row
        return self

    @property
    def form(self) -> str:
        """The shape and dtype of each tensor.

        >>> DataTensors([torch.zeros(5, 2), torch.zeros(5)]).form
        '(5, 2) float32 and (5,) float32'
        """
        return " and ".join(f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in self)

    @property
    def num_checked(self) -> int:
        """How many rows, the first ones, are checked before training: all, where reading is fast."""
        return len(self[0])

    @property
    def checked_rows(self) -> range:
        """Those of these rows that this process checks, see :func:`data_tensors`."""
        return range(self.num_checked)

    def rows(self, index: Tensor | slice) -> tuple[Tensor, ...]:
        """Return some rows of each tensor."""
        return tuple(tensor[index] for tensor in self)

    def whole(self, name: str = "data") -> "DataTensors":
        """Return the data in memory."""
        return self

    @property
    def in_any_order(self) -> bool:
        """Whether each row can be read at any time, by its number."""
        return True

    def few(self, count: int) -> "DataTensors":
        """Return the first rows in memory, at most this number and no more than are checked before training."""
        return DataTensors(self.rows(slice(0, min(count, self.num_checked))))

    def batch(self, start: int, stop: int) -> "DataTensors":
        """Return the rows from one number to another in memory, with their labels and their numbers."""
        labels = None if self.row_labels is None else self.row_labels[start:stop]
        return DataTensors(self.rows(slice(start, stop)), labels, self.columns, self.first_row + start)

    def first_index(self, test: Callable[[Tensor], Tensor]) -> tuple[int, list[int]] | None:
        """Find the first number that passes a test, among the rows that are checked: its tensor, and its index."""
        found = ((number, first_index(test, tensor)) for number, tensor in enumerate(self))
        return next(((number, place) for number, place in found if place is not None), None)

    def place(self, test: Callable[[Tensor], Tensor]) -> str | None:
        """Describe the place of the first number that passes a test, by the names of row and column."""
        if (found := self.first_index(test)) is None:
            return None
        number, index = found
        row, *column = index or [0]
        row += self.first_row
        if not column:
            return f"row {row}"
        labels = self.columns[number]
        return f"row {row}, column {tuple(column) if labels is None else str(labels[1][column[0]])!r}"


class RowSource:
    """Rows that are read on demand.

    Attributes:
        num_rows: N.
        templates: the first row of each tensor.
        num_checked: how many rows are read in checks before training.
        in_any_order: whether each row can be read at any time, by its number.
    """

    num_rows: int
    templates: tuple[Tensor, ...]
    num_checked: int
    in_any_order = True

    def read(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Read some rows of each tensor."""
        raise NotImplementedError

    def first_index(self, test: Callable[[Tensor], Tensor], among: range) -> tuple[int, list[int]] | None:
        """Find the first number that passes a test, among some rows: its tensor, and its index."""
        block = max(1, _BLOCK // max(1, *(template.numel() for template in self.templates)))
        for start in among[::block]:
            rows = torch.arange(start, min(start + block, among.stop), device="cpu")
            for number, tensor in enumerate(self.read(rows)):
                if (place := first_index(test, tensor)) is not None:
                    return number, [start + place[0], *place[1:]]
        return None


class LazyData(DataTensors):
    """Data of which some are read on demand, by :meth:`rows`.

    As a tuple it has tensors of the right shapes, dtypes and device, whose rows all are the first one, and which take
    no memory: what model and guide get where ``pyro.subsample`` returns the rows, see
    :class:`pyro_vae.handlers.FixedSubsample`.

    Args:
        parts: tensors, and sources of rows.
        device: of the rows.
        row_labels, columns: as for :class:`DataTensors`.
        checked_by: as for :func:`data_tensors`.
    """

    parts: tuple[Tensor | RowSource, ...]
    device: torch.device
    checked_by: tuple[int, int]

    def __new__(
        cls,
        parts: Sequence[Tensor | RowSource],
        device: torch.device,
        row_labels: np.ndarray | None = None,
        columns: Sequence[Columns | None] | None = None,
        checked_by: tuple[int, int] = (0, 1),
    ) -> "LazyData":
        tensors: list[Tensor] = []
        for part in parts:
            if isinstance(part, RowSource):
                tensors += [row.to(device).expand(part.num_rows, *row.shape) for row in part.templates]
            else:
                tensors.append(part.view_as(part))  # one tensor may have two roles
        self = super().__new__(cls, tensors, row_labels, columns)
        assert isinstance(self, LazyData)
        self.parts, self.device, self.checked_by = tuple(parts), device, checked_by
        return self

    @property
    def num_checked(self) -> int:
        """How many rows, the first ones, are checked before training."""
        return min(part.num_checked if isinstance(part, RowSource) else len(part) for part in self.parts)

    @property
    def checked_rows(self) -> range:
        """The share of this process in the rows that are checked."""
        return self._share(self.num_checked)

    def _share(self, count: int) -> range:
        return range(count)[share_of(count, *self.checked_by)]

    @property
    def in_any_order(self) -> bool:
        """Whether each row can be read at any time, by its number."""
        return all(part.in_any_order for part in self.parts if isinstance(part, RowSource))

    def rows(self, index: Tensor | slice) -> tuple[Tensor, ...]:
        """Read some rows of each tensor."""
        if isinstance(index, slice):
            index = torch.arange(*index.indices(len(self[0])), device="cpu")
        found: list[Tensor] = []
        for part in self.parts:
            if isinstance(part, RowSource):
                found += (to_device(tensor, self.device) for tensor in part.read(index.cpu()))
            else:
                found.append(part[index])
        return tuple(found)

    def whole(self, name: str = "data") -> DataTensors:
        """Read all rows; raise if they would take more than 1 GiB of memory."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in self)
        if size > _MOST_BYTES:
            raise ValueError(
                f"`{name}` must take at most 1 GiB of memory where all rows are used at once, got {len(self[0])} rows "
                f"of {size / 2**30:.3g} GiB. Pass some of the rows, or `batch_size` to `fit` or `evaluate`"
            )
        return DataTensors(self.rows(slice(None)), self.row_labels, self.columns)

    def first_index(self, test: Callable[[Tensor], Tensor]) -> tuple[int, list[int]] | None:
        """Find the first number that passes a test, among the rows that are checked: its tensor, and its index."""
        first = 0
        for part in self.parts:
            if isinstance(part, RowSource):
                found = part.first_index(test, self._share(part.num_checked))
            else:
                found = None if (place := first_index(test, part)) is None else (0, place)
            if found is not None:
                return first + found[0], found[1]
            first += len(part.templates) if isinstance(part, RowSource) else 1
        return None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; to a GPU from pinned memory, while the CPU goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor if tensor.is_pinned() else tensor.pin_memory()
        return tensor.to(device, non_blocking=True)
    return tensor.to(device)


class Placement(NamedTuple):
    """The dtype and device of data that are no tensors.

    Attributes:
        dtype: of floats.
        device: of all data.
        integers: whether integers become floats as well: those of arrays for the model of a module without a
            ``transform``.
        keep_integers: whether those of frames and sparse matrices stay what they are, since there is a ``transform``.
        module: whether dtype and device are those of a module, to which the floats of a stream are converted, too.
    """

    dtype: torch.dtype
    device: torch.device
    integers: bool = False
    keep_integers: bool = False
    module: bool = False


def placement(model: Any, keep_integers: bool = False) -> Placement:
    """Return dtype and device of the module that a model is a method of, such as a VAE; else the default ones.

    >>> placement(torch.nn.Linear(2, 3).double().forward).dtype, placement(len).dtype
    (torch.float64, torch.float32)
    """
    module = None if model is None else bound_module(model)
    parameters = [] if module is None else [tensor for tensor in module.parameters() if tensor.is_floating_point()]
    if not parameters:
        return Placement(torch.get_default_dtype(), torch.get_default_device(), False, keep_integers)
    return Placement(parameters[0].dtype, parameters[0].device, not keep_integers, keep_integers, True)


def data_tensors(
    data: Any,
    name: str,
    model: Any = None,
    *,
    keep_integers: bool = False,
    lazy: bool = False,
    checked_by: tuple[int, int] = (0, 1),
) -> DataTensors:
    """Return data as tensors with the same number of rows and without infinities, with the names of rows and columns.

    Tensors stay as they are; those of an object with ``to_data()`` get the device of the module that the model is of.
    Floats of other data get the dtype of the model, see :func:`placement`. NaN, ``None`` and
    ``pd.NA`` are NaN, which is accepted here: whether a model allows missing values is checked by
    :mod:`pyro_vae.distributions.missing`.

    Args:
        data: a tensor, a NumPy array, a pandas or polars frame or series, a SciPy sparse matrix, a map-style
            :class:`torch.utils.data.Dataset`, an object with ``to_data()`` that returns one of these, such as
            :class:`pyro_vae.datasets.Dataset`; or a sequence of these, of which each is an argument of the model.
        name: of the data in errors.
        model: the model, whose dtype and device the data get.
        keep_integers: whether integers stay integers, for a transform.
        lazy: whether rows of memory-mapped files, sparse matrices and data sets may be read on demand.
        checked_by: the number of this process and of all that check the rows that are read on demand: each checks its
            share, and an error in one must end all.

    >>> data_tensors(np.array([[1.0], [np.nan]]), "data")
    (tensor([[1.],
            [nan]]),)
    """
    found = _assembled(data, name, placement(model, keep_integers), checked_by)
    return found if lazy else found.whole(name)


def _assembled(data: Any, name: str, to: Placement, checked_by: tuple[int, int] = (0, 1)) -> DataTensors:
    """Convert and check data; rows may be read on demand."""
    if isinstance(data, DataTensors):
        return data
    items = list(data) if isinstance(data, Sequence) and not isinstance(data, str | bytes) else [data]
    if len(items) == 1 and isinstance(items[0], DataTensors):
        return items[0]
    if len(items) == 1 and isinstance(items[0], list | tuple):  # `f(model, guide, (x, y))` for `f(..., x, y)`
        items = list(items[0])
    if not items:
        raise ValueError(f"`{name}` must be {_EXPECTED}, got no tensor")
    found = [_converted(item, name, to) for item in items]
    parts = [part for one in found for part in one.parts]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    for tensor in tensors:
        if tensor.dim() == 0:
            raise ValueError(f"`{name}` must have shape (N, ...) with N >= 1, got shape (), without rows")
        if tensor.device != tensors[0].device:
            raise ValueError(f"`{name}` must be tensors on one device, got {tensors[0].device} and {tensor.device}")
    row_labels = _common_labels([one.row_labels for one in found if one.row_labels is not None], name)
    columns = [labels for one in found for labels in one.columns]
    device = tensors[0].device if tensors else to.device
    if len(tensors) < len(parts):
        result: DataTensors = LazyData(parts, device, row_labels, columns, checked_by)
    else:
        result = DataTensors(tensors, row_labels, columns)
    for tensor in result:
        if not len(tensor):
            raise ValueError(
                f"`{name}` must have shape (N, ...) with N >= 1, got shape {tuple(tensor.shape)}, without rows"
            )
        if len(tensor) != len(result[0]):
            raise ValueError(f"`{name}` must be tensors of one number of rows, got {len(result[0])} and {len(tensor)}")
    if row_labels is not None and len(row_labels) != len(result[0]):
        raise ValueError(f"`{name}` must have a label for each of its {len(result[0])} rows, got {len(row_labels)}")
    return without_infinity(result, name)


def without_infinity(data: DataTensors, name: str) -> DataTensors:
    """Return the data if the rows that are checked hold no infinity."""
    if (found := data.first_index(torch.isinf)) is not None:
        number, (row, *column) = found
        value = data.rows(slice(row, row + 1))[number][(0, *column)].item()
        raise ValueError(f"`{name}` must hold finite numbers, got {value} at {data.place(torch.isinf)}")
    return data


def _common_labels(found: list[np.ndarray], name: str) -> np.ndarray | None:
    for other in found[1:]:
        if not np.array_equal(found[0], other):
            raise ValueError(
                f"`{name}` must be frames with the same index, got different ones: their rows would be put together by "
                "position. Align them, `right.loc[left.index]`, or use `reset_index(drop=True)`"
            )
    return found[0] if found else None


def is_data(item: Any) -> bool:
    """Whether a value is of a type whose rows :func:`data_tensors` reads, or a loader of such data.

    >>> is_data(np.zeros(3)), is_data([0.0]), is_data(None)
    (True, False, False)
    """
    if isinstance(item, Tensor | np.ndarray | DataTensors | Dataset | DataLoader):
        return True
    if callable(getattr(item, "to_data", None)) and not isinstance(item, type):
        return True
    return type(item).__module__.partition(".")[0] in {"pandas", "scipy", *_FRAMES}


class _Converted(NamedTuple):
    """One item of the data: its arguments of the model, the labels of the columns of each, and those of its rows."""

    parts: Sequence[Tensor | RowSource]
    columns: Sequence[Columns | None] = (None,)
    row_labels: np.ndarray | None = None


def _converted(item: Any, name: str, to: Placement) -> _Converted:
    """Convert one item of the data by its type."""
    if isinstance(item, Tensor):
        return _Converted([real_tensor(item, name, _EXPECTED)])
    if isinstance(item, DataTensors) or (callable(getattr(item, "to_data", None)) and not isinstance(item, type)):
        given = _assembled(item if isinstance(item, DataTensors) else item.to_data(), name, to)
        parts: Sequence[Tensor | RowSource] = given.parts if isinstance(given, LazyData) else given
        if to.module and not isinstance(item, DataTensors):  # the user has no tensors to move
            parts = [to_device(part, to.device) if isinstance(part, Tensor) else part for part in parts]
        return _Converted(parts, given.columns, given.row_labels)
    if isinstance(item, np.ndarray):
        return _Converted([_from_array(item, name, to)])
    if isinstance(item, DataLoader | IterableDataset):
        raise TypeError(
            f"`{name}` must be {_EXPECTED}, with rows that can be read in any order, got {describe(item)}, which `fit` "
            "and `evaluate` take. Pass its data set, or one of its batches"
        )
    if isinstance(item, TensorDataset):
        return _Converted([real_tensor(tensor, name, _EXPECTED) for tensor in item.tensors], [None] * len(item.tensors))
    if isinstance(item, Dataset):
        source = DatasetRows(item, name, to)
        return _Converted([source], [None] * len(source.templates))
    package = type(item).__module__.partition(".")[0]
    if package == "pandas":
        return _from_pandas(item, name, to)
    if package in _FRAMES:
        return _from_narwhals(item, name, to)
    if package == "scipy":
        return _Converted([SparseRows(item, name, to)])
    raise TypeError(f"`{name}` must be {_EXPECTED}, got {describe(item)}")


def as_tensors(batch: Any, name: str, to: Placement) -> tuple[Tensor, ...]:
    """Return a batch of a stream as tensors on the device of the model: what a loader or a data set gives.

    Raises:
        TypeError: if it is no tensor, array or number, or a sequence of these, such as a dictionary.
    """
    if isinstance(batch, dict):
        raise TypeError(
            f"`{name}` must give tensors, or tuples of them for several arguments, got a dict with the keys "
            f"{', '.join(map(repr, batch))}: its order is not that of the arguments of the model. Return "
            "`(item['x'], item['y'])` in the data set, or by `collate_fn`"
        )
    items = batch if isinstance(batch, list | tuple) else (batch,)
    expected = "a tensor, an array or a number in each item, or a tuple of these"
    tensors = []
    for item in items:
        if isinstance(item, Tensor):
            tensor = real_tensor(item, name, expected)
        elif isinstance(item, np.ndarray | np.number | float | int):
            with read_only_arrays():
                tensor = torch.as_tensor(_checked_array(np.asarray(item), name, expected))
        else:
            raise TypeError(f"`{name}` must give {expected}, got {describe(item)}")
        floats = tensor.is_floating_point()
        wanted = floats if to.module or not isinstance(item, Tensor) else False
        if wanted or (to.integers and not floats):
            tensor = tensor.to(to.dtype)
        tensors.append(to_device(tensor, to.device))
    return tuple(tensors)


def _checked_array(array: np.ndarray, name: str, expected: str = _EXPECTED) -> np.ndarray:
    """Return an array of real numbers that torch can take, without the mask: masked entries are NaN."""
    if array.dtype.kind not in "fiub":
        real = ", of real numbers" * (array.dtype.kind == "c")
        raise TypeError(f"`{name}` must be {expected}{real}, got {_describe_array(array)}")
    if isinstance(array, np.ma.MaskedArray):
        array = np.ma.filled(array.astype(np.float64), np.nan) if np.ma.is_masked(array) else array.data
    if array.dtype == np.longdouble:
        array = array.astype(np.float64)
    elif array.dtype.kind == "u" and array.dtype.itemsize > 1:  # torch has few operations on these
        array = array.astype(np.int64)
    elif not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array


def _describe_array(array: np.ndarray) -> str:
    return f"{with_article(type(array).__name__)} of dtype {array.dtype} and shape {array.shape}"


def _target_dtype(array: np.ndarray, to: Placement, whole_numbers: bool) -> torch.dtype | None:
    """The dtype that an array gets, ``None`` for its own; integers become floats with ``whole_numbers``."""
    return to.dtype if array.dtype.kind == "f" or whole_numbers else None


def _from_array(array: np.ndarray, name: str, to: Placement) -> "Tensor | RowSource":
    """Return an array as a tensor that shares its memory, or as rows of a memory-mapped file."""
    if not array.ndim:
        raise ValueError(f"`{name}` must have shape (N, ...) with N >= 1, got shape (), without rows")
    mapped = _is_mapped(array)
    if mapped and array.dtype.kind in "fiub" and len(array):
        dtype = _target_dtype(array, to, to.integers)
        row = torch.as_tensor(_checked_array(np.array(array[:1]), name))
        if to.device.type != "cpu" or row.dtype != (dtype or row.dtype) or not array.dtype.isnative:
            return MappedRows(array, name, to, dtype or row.dtype)
    array = _checked_array(array, name)
    dtype = _target_dtype(array, to, to.integers)
    if any(step < 0 for step in array.strides) or not (array.flags.writeable or mapped):
        array = array.copy()  # torch has no negative strides, and warns of arrays that cannot be written to
    with read_only_arrays():
        return torch.from_numpy(np.asarray(array)).to(device=to.device, dtype=dtype)


@contextmanager
def read_only_arrays() -> Iterator[None]:
    """Let torch take arrays that cannot be written to, as rows of frames are, without a warning: nothing is written."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        yield


def _is_mapped(array: Any) -> bool:
    """Whether the numbers of an array are in a memory-mapped file."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False


class MappedRows(RowSource):
    """Rows of a memory-mapped array of another dtype than the model, or for another device."""

    def __init__(self, array: np.ndarray, name: str, to: Placement, dtype: torch.dtype):
        self._array, self._name, self._dtype = array, name, dtype
        self.num_rows = self.num_checked = len(array)
        self.templates = (self.read(torch.zeros(1, dtype=torch.long, device="cpu"))[0][0],)

    def read(self, rows: Tensor) -> tuple[Tensor, ...]:
        block = _checked_array(np.asarray(self._array[rows.numpy()]), self._name)
        return (torch.from_numpy(block).to(self._dtype),)


class FirstBatch(RowSource):
    """The first batch of a stream of N rows, of which others cannot be read by their numbers."""

    in_any_order = False

    def __init__(self, batch: Sequence[Tensor], num_rows: int):
        self._batch, self.num_rows, self.num_checked = batch, num_rows, len(batch[0])
        self.templates = tuple(tensor[0] for tensor in batch)

    def read(self, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor[rows.to(tensor.device)] for tensor in self._batch)


class SparseRows(RowSource):
    """Rows of a SciPy sparse matrix, which become dense when they are read."""

    def __init__(self, matrix: Any, name: str, to: Placement):
        from scipy import sparse

        if not sparse.issparse(matrix) or matrix.ndim != 2:
            raise TypeError(f"`{name}` must be {_EXPECTED}, got {describe(matrix)}")
        if matrix.dtype.kind not in "fiub":
            raise TypeError(f"`{name}` must be {_EXPECTED}, of real numbers, got a sparse matrix of {matrix.dtype}")
        self._matrix = matrix.tocsr()
        self.num_rows = self.num_checked = matrix.shape[0]
        keep = to.keep_integers and matrix.dtype.kind != "f"
        self._dtype = torch.from_numpy(_checked_array(np.zeros(1, matrix.dtype), name)).dtype if keep else to.dtype
        first = np.zeros((1, matrix.shape[1])) if not self.num_rows else self._matrix[:1].toarray()
        self.templates = (torch.from_numpy(first[0]).to(self._dtype),)

    def read(self, rows: Tensor) -> tuple[Tensor, ...]:
        block = self._matrix[rows.numpy()].toarray()
        return (torch.from_numpy(_checked_array(block, "data")).to(self._dtype),)

    def first_index(self, test: Callable[[Tensor], Tensor], among: range) -> tuple[int, list[int]] | None:
        """Find the first stored number that passes a test: zeros are finite."""
        first, last = self._matrix.indptr[among.start], self._matrix.indptr[among.stop]
        stored = torch.from_numpy(_checked_array(self._matrix.data[first:last], "data"))
        if (place := first_index(test, stored)) is None:
            return None
        number = int(first) + place[0]
        row = int(np.searchsorted(self._matrix.indptr, number, side="right")) - 1
        return 0, [row, int(self._matrix.indices[number])]


class DatasetRows(RowSource):
    """Rows of a map-style data set, which are read one by one and put together as torch's loader does it."""

    def __init__(self, dataset: Any, name: str, to: Placement):
        if not hasattr(dataset, "__len__"):
            raise TypeError(
                f"`{name}` must be a data set with a length, of which rows can be read in any order, got "
                f"{describe(dataset)} without `__len__`; make it a `torch.utils.data.IterableDataset` for `fit`"
            )
        self._dataset, self._name, self._to = dataset, name, to
        self.num_rows = len(dataset)
        if not self.num_rows:
            raise ValueError(f"`{name}` must have shape (N, ...) with N >= 1, got a data set without rows")
        self.num_checked = min(self.num_rows, _NUM_CHECKED)
        self.templates = tuple(tensor[0] for tensor in self.read(torch.zeros(1, dtype=torch.long, device="cpu")))

    def read(self, rows: Tensor) -> tuple[Tensor, ...]:
        try:
            numbers = rows.tolist()
            if callable(getattr(self._dataset, "__getitems__", None)):
                items = self._dataset.__getitems__(numbers)
            else:
                items = [self._dataset[number] for number in numbers]
        except Exception as error:
            error.add_note(f"`{self._name}`: the data set raised this at one of the rows {numbers[:5]}")
            raise
        if isinstance(items[0], dict):
            as_tensors(items[0], self._name, self._to)
        try:
            with read_only_arrays():
                batch = default_collate(items)
        except (TypeError, RuntimeError) as error:
            raise type(error)(
                f"`{self._name}` must have items of one shape, of tensors, arrays or numbers, got a data set whose "
                f"items cannot be put together: {error}"
            ) from error
        return as_tensors(batch, self._name, self._to._replace(device=torch.device("cpu")))


def _from_pandas(value: Any, name: str, to: Placement) -> _Converted:
    """Convert a frame or series of pandas."""
    import pandas as pd

    if not isinstance(value, pd.DataFrame | pd.Series):
        raise TypeError(f"`{name}` must be {_EXPECTED}, got {describe(value)}")
    frame = value.to_frame() if isinstance(value, pd.Series) else value
    types = [frame.dtypes.iloc[place] for place in range(frame.shape[1])]
    names = [_text(label) for label in frame.columns]
    numeric = [pd.api.types.is_numeric_dtype(one) and not pd.api.types.is_complex_dtype(one) for one in types]
    _check_columns(names, [None if ok else str(one) for ok, one in zip(numeric, types, strict=True)], name)
    whole = all(pd.api.types.is_integer_dtype(one) for one in types) and not bool(frame.isna().to_numpy().any())
    keep = to.keep_integers and whole
    numbers = frame.to_numpy() if keep else frame.to_numpy(dtype=np.float64, na_value=np.nan)
    dimension = frame.columns.name if isinstance(frame.columns.name, str) else "column"
    return _frame(numbers, names, dimension, _row_labels(frame.index), isinstance(value, pd.Series), keep, to)


def _from_narwhals(value: Any, name: str, to: Placement) -> _Converted:
    """Convert a frame or series of polars, or of another library that narwhals knows."""
    package = type(value).__module__.partition(".")[0]
    try:
        import narwhals.stable.v1 as nw
    except ImportError as error:
        raise ImportError(
            f"`{name}` needs the package narwhals for data of {package}: pip install 'pyro_vae[frames]', or convert "
            "them, `frame.to_pandas()` or `frame.to_numpy()`"
        ) from error
    try:
        frame: Any = nw.from_native(value, eager_only=True, allow_series=True)
    except TypeError as error:
        raise TypeError(
            f"`{name}` must be a frame whose rows are in memory, got {describe(value)} of {package}. Collect it first: "
            "`frame.collect()`"
        ) from error
    is_series = isinstance(frame, nw.Series)
    columns = [frame] if is_series else [frame[column] for column in frame.columns]
    names = [_text(column.name) for column in columns]
    booleans = [column.dtype == nw.Boolean for column in columns]
    wrong = [
        None if flag or column.dtype.is_numeric() else str(column.dtype)
        for flag, column in zip(booleans, columns, strict=True)
    ]
    _check_columns(names, wrong, name)
    whole = all(column.dtype.is_integer() and not column.is_null().any() for column in columns)
    keep = to.keep_integers and whole
    arrays = [(column if keep else column.cast(nw.Float64)).to_numpy() for column in columns]
    return _frame(np.stack(arrays, 1), names, "column", None, is_series, keep, to)


def _frame(
    numbers: np.ndarray,
    names: list[str],
    dimension: str,
    index: np.ndarray | None,
    is_series: bool,
    keep: bool,
    to: Placement,
) -> _Converted:
    """Put the numbers of a frame, of one dtype, together with the names of its rows and columns."""
    numbers = np.array(numbers[:, 0] if is_series else numbers)
    tensor = torch.from_numpy(numbers).to(device=to.device, dtype=None if keep else to.dtype)
    return _Converted([tensor], [None if is_series else (dimension, np.array(names, dtype=str))], index)


def _check_columns(names: list[str], wrong: list[str | None], name: str) -> None:
    """Raise unless there are columns, of different names, of numbers alone; ``wrong`` are the other dtypes."""
    if not names:
        raise ValueError(f"`{name}` must have columns of numbers, got a frame without columns")
    if repeated := next((one for one in names if names.count(one) > 1), None) if len(set(names)) < len(names) else None:
        raise ValueError(
            f"`{name}` must have different names for its columns, got {repeated!r} {names.count(repeated)} times"
        )
    if found := [f"{one!r} ({dtype})" for one, dtype in zip(names, wrong, strict=True) if dtype is not None]:
        plural, more = "s" * (len(found) > 1), f" and {len(found) - 5} more" * (len(found) > 5)
        raise TypeError(
            f"`{name}` must have columns of numbers, got the column{plural} {', '.join(found[:5])}{more}. Encode such "
            "columns with `pv.tables.Table.from_frame(frame)`, convert dates to days and objects to numbers, or leave "
            "these columns out"
        )


def _text(label: Any) -> str:
    """A label as text; one of several levels with commas."""
    return ", ".join(map(str, label)) if isinstance(label, tuple) else str(label)


def _row_labels(index: "pd.Index") -> np.ndarray | None:
    """The labels of the rows of a frame; ``None`` for the default ones, 0 to N - 1."""
    import pandas as pd

    if isinstance(index, pd.RangeIndex) and (index.start, index.step) == (0, 1):
        return None
    if not isinstance(index, pd.MultiIndex) and isinstance(index.dtype, np.dtype) and index.dtype.kind in "iufM":
        return index.to_numpy()
    return np.array([_text(label) for label in index], dtype=str)


def rows_like(held_out: DataTensors, data: DataTensors, name: str) -> DataTensors:
    """Return ``held_out`` if its rows have the shapes, dtypes, device and names of columns of those of ``data``."""
    if len(held_out) != len(data):
        raise ValueError(f"`{name}` must be {len(data)} tensors, as `data`, got {len(held_out)}")
    for ours, theirs in zip(held_out, data, strict=True):
        if ours.shape[1:] != theirs.shape[1:] or ours.dtype != theirs.dtype:
            raise ValueError(
                f"`{name}` must have rows like those of `data`, shape {tuple(theirs.shape[1:])}, {theirs.dtype}, got "
                f"shape {tuple(ours.shape[1:])}, {ours.dtype}"
            )
        if ours.device != theirs.device:
            raise ValueError(f"`{name}` must be on {theirs.device}, as `data`, got {ours.device}")
    for mine, other in zip(held_out.columns, data.columns, strict=True):
        if mine is not None and other is not None and not np.array_equal(mine[1], other[1]):
            first = next(number for number in range(len(mine[1])) if mine[1][number] != other[1][number])
            raise ValueError(
                f"`{name}` must have the columns of `data` in the same order, got {str(mine[1][first])!r} in place of "
                f"{str(other[1][first])!r}. Select them: `frame[list(data.columns)]`"
            )
    return held_out
