"""Tensors that are proved to be affine in some variables, with their sparse coefficients in float64.

A function runs on such tensors instead of numbers. Each operation on them either keeps an affine function of the
variables, whose coefficients it computes, or raises :class:`NotAffineError`: nothing is probed. Python's loops and
branches run as they are, as long as they read no value that depends on the variables.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from pyro_vae.compilation import torch_private

__all__ = ["AffineForm", "AffineTensor", "NotAffineError", "affine_form", "affine_variables"]


_MOST = 2**25  # coefficients of one operation, about a gigabyte


class NotAffineError(ValueError):
    """Error for an operation whose result is not proved to be affine in the variables."""


class AffineForm(NamedTuple):
    """The affine function ``constant + matrix @ variables`` of each of n numbers, in float64.

    ``constant`` is ``(n,)``, ``matrix`` a sparse ``(n, number of variables)``.
    """

    constant: np.ndarray
    matrix: sparse.csr_array

    def rows(self, index: np.ndarray) -> "AffineForm":
        """Return the functions of some of the numbers, in the order of their places."""
        if len(index) == len(self.constant) and np.array_equal(index, np.arange(len(index))):
            return self
        return AffineForm(self.constant[index], self.matrix[index])

    def combined(self, weight: np.ndarray, index: np.ndarray) -> "AffineForm":
        """Return ``sum_k weight[o, k] self[index[o, k]]`` for each o, of arrays ``(outputs, K)``."""
        count, width = index.shape
        if index.size > _MOST:
            raise NotAffineError(f"a result has {index.size:,} coefficients, more than {_MOST:,}")
        starts = np.arange(0, count * width + 1, width) if width else np.zeros(count + 1, dtype=np.int64)
        shape = (count, len(self.constant))
        sums = sparse.csr_array((weight.reshape(-1), index.reshape(-1), starts), shape=shape)
        if width > 1:
            sums.eliminate_zeros()
        matrix = sparse.csr_array(sums @ self.matrix)
        matrix.sort_indices()
        return AffineForm(sums @ self.constant, matrix)


class _Storage:
    """The numbers that an affine tensor and its views share; a write through one of them is seen by all."""

    def __init__(self, form: AffineForm):
        self.form = form


class AffineTensor(Tensor):
    """A tensor without values, each of whose numbers is an affine function of variables; see :func:`affine_form`."""

    storage_of_forms: _Storage
    places: Tensor  # the place of each of its numbers in the storage

    @staticmethod
    def __new__(cls, storage: _Storage, index: Tensor, dtype: torch.dtype, device: torch.device) -> "AffineTensor":
        tensor = torch_private.wrapper_tensor(cls, index.shape, index.stride(), dtype, device)
        tensor.storage_of_forms, tensor.places = storage, index
        return tensor

    def __init__(self, *args: Any) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AffineTensor({tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch_private.without_torch_function():
            if func in _MATMULS and not kwargs:  # torch's own changes the shape of a tensor in place
                one, other = args if func is not Tensor.__rmatmul__ else (args[1], args[0])
                return _wrap(_matmul(one, other), args, {})
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        with torch.no_grad():
            if name in _NEW:
                return _new_constant(func, args, kwargs)
            if name in _VIEWS and isinstance(args[0], AffineTensor) and not _affine(args[1:]):
                return _view(args[0], func(args[0].places, *args[1:], **kwargs))
            if name in _MOVES:
                return _wrap(_moved(func, args, kwargs), args, kwargs)
            if name.endswith("_") and isinstance(args[0], AffineTensor):
                return _write(func, args, kwargs)
            if name in _OPERATIONS:
                return _wrap(_OPERATIONS[name](*args, **kwargs), args, kwargs)
        raise NotAffineError(f"torch's operation `{name}` is not affine")


def affine_variables(shape: Sequence[int], first: int, total: int, like: Tensor) -> AffineTensor:
    """Return a tensor of the variables with the numbers ``first``, ``first + 1``, ... out of ``total``."""
    count = math.prod(shape)
    columns = np.arange(first, first + count)
    matrix = sparse.csr_array((np.ones(count), columns, np.arange(count + 1)), shape=(count, total))
    index = torch.arange(count, device="cpu").reshape(tuple(shape))
    return AffineTensor(_Storage(AffineForm(np.zeros(count), matrix)), index, like.dtype, like.device)


def affine_form(tensor: Tensor, shape: Sequence[int], total: int) -> AffineForm:
    """Return the affine functions of a tensor, or its constants, expanded to a shape and flattened.

    >>> z = affine_variables((2,), 0, 2, torch.zeros(()))
    >>> form = affine_form(2 * z + torch.tensor([[1.0], [3.0]]), (2, 2), 2)
    >>> form.constant, form.matrix.todense()[:2].tolist()
    (array([1., 1., 3., 3.]), [[2.0, 0.0], [0.0, 2.0]])
    """
    if isinstance(tensor, AffineTensor):
        return _rows(tensor, tensor.places.expand(tuple(shape)))
    constant = _number(tensor).expand(tuple(shape)).reshape(-1).numpy()
    return AffineForm(constant, sparse.csr_array((len(constant), total)))


def _rows(tensor: AffineTensor, index: Tensor) -> AffineForm:
    return tensor.storage_of_forms.form.rows(index.reshape(-1).numpy())


def _double(value: Any) -> Any:
    """Numbers of a constant in float64, on the CPU; other tensors keep their dtype."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.double() if value.is_floating_point() else value


def _affine(values: Any) -> list[AffineTensor]:
    """The affine tensors among arguments, and in lists of them."""
    found: list[AffineTensor] = []
    for value in values:
        if isinstance(value, AffineTensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _affine(value)
    return found


def _map(values: Any, change: Callable[[Any], Any]) -> Any:
    """Change the values among arguments, and in lists of them."""
    return [_map(value, change) if isinstance(value, list | tuple) else change(value) for value in values]


class _Result(NamedTuple):
    """The affine functions of a new tensor, and its shape."""

    form: AffineForm
    shape: torch.Size


def _wrap(result: _Result, args: Any, kwargs: Any) -> AffineTensor:
    tensors = [*_affine(args), *(value for value in args if isinstance(value, Tensor))]
    wide = any(tensor.dtype == torch.float64 for tensor in tensors) or kwargs.get("dtype") == torch.float64
    if kwargs.get("dtype", torch.float64) not in _PRECISE:
        raise NotAffineError(f"rounding to {kwargs['dtype']} is not affine")
    index = torch.arange(result.shape.numel(), device="cpu").reshape(result.shape)
    first = tensors[0]
    dtype = kwargs.get("dtype") or (torch.float64 if wide else first.dtype)
    return AffineTensor(_Storage(result.form), index, dtype, first.device)


_PRECISE = (None, torch.float32, torch.float64)

_NEW = {"empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like"}
_NEW |= {"new_empty_strided", "rand_like", "randn_like"}
"""Operations that read the shape of a tensor alone."""


def _new_constant(func: Any, args: Any, kwargs: Any) -> Tensor:
    like = torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype, device=args[0].device)
    return func(like, *args[1:], **kwargs)


_VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "expand", "lift_fresh", "permute",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze",
    "view",
}  # fmt: skip
"""Operations whose result shares its numbers with the first argument."""


def _view(tensor: AffineTensor, index: Any) -> Any:
    if isinstance(index, list | tuple):
        return [_view(tensor, part) for part in index]
    return AffineTensor(tensor.storage_of_forms, index, tensor.dtype, tensor.device)


_MOVES = dict.fromkeys((
    "_to_copy", "clone", "contiguous", "diag_embed", "flip", "gather", "index", "index_select", "lift_fresh_copy",
    "pixel_shuffle", "positive", "reflection_pad1d", "reflection_pad2d", "repeat", "replication_pad1d",
    "replication_pad2d", "roll", "tril", "triu",
), (0,)) | {
    "as_strided_scatter": (0, 1), "cat": (0,), "constant_pad_nd": (0, 2), "diagonal_scatter": (0, 1),
    "index_put": (0, 2), "masked_fill": (0, 2), "select_scatter": (0, 1), "slice_scatter": (0, 1), "stack": (0,),
    "where": (1, 2),
}  # fmt: skip
"""Operations that put each number of some arguments, or a zero, in some place, and the places of these arguments."""


def _moved(func: Any, args: Any, kwargs: Any) -> "_Result":
    """Run an operation on the places of the numbers, counted from 1, and on the constants alone."""
    name, options = func.overloadpacket.__name__, dict(kwargs)
    moved = _MOVES[name]
    if _affine(value for place, value in enumerate(args) if place not in moved) or any(args[3:] or ()):
        raise NotAffineError(f"torch's operation `{name}` is not affine with these arguments")
    options.pop("device", None)
    if options.pop("dtype", None) not in _PRECISE:
        raise NotAffineError("rounding is not affine")
    storages: list[AffineForm] = []

    def places(value: Any) -> Any:
        if isinstance(value, AffineTensor):
            offset = 1 + sum(len(form.constant) for form in storages)
            storages.append(value.storage_of_forms.form)
            return (value.places + offset).double()
        return torch.zeros(value.shape, dtype=torch.float64, device="cpu") if isinstance(value, Tensor) else 0

    def constants(value: Any) -> Any:
        if isinstance(value, AffineTensor):
            return torch.zeros(value.shape, dtype=torch.float64, device="cpu")
        return value.detach().cpu().double() if isinstance(value, Tensor) else value

    def run(change: Callable[[Any], Any]) -> Tensor:
        changed = [_map([value], change if place in moved else _double)[0] for place, value in enumerate(args)]
        return func(*changed, **options)

    constant, labels = run(constants), run(places).reshape(-1).long().numpy()
    together = _stacked(storages)
    form, filled = together.rows(np.maximum(labels, 1) - 1), labels == 0
    if filled.any():
        matrix = sparse.csr_array(sparse.diags_array((~filled).astype(np.float64), format="csr") @ form.matrix)
        matrix.eliminate_zeros()
        form = AffineForm(np.where(filled, constant.reshape(-1).numpy(), form.constant), matrix)
    return _Result(form, constant.shape)


def _stacked(forms: Sequence[AffineForm]) -> AffineForm:
    if len(forms) == 1:
        return forms[0]
    matrix = sparse.vstack([form.matrix for form in forms], format="csr")
    return AffineForm(np.concatenate([form.constant for form in forms]), sparse.csr_array(matrix))


def _add(one: Any, other: Any, alpha: float = 1) -> "_Result":
    """Sum of two arguments, at least one of them affine, that are broadcast."""
    one, other = _tensor(one), _tensor(other)
    shape, total = torch.broadcast_shapes(one.shape, other.shape), _total(one, other)
    first, second = (affine_form(value, shape, total) for value in (one, other))
    if alpha != 1:
        second = AffineForm(alpha * second.constant, second.matrix * alpha)
    return _Result(AffineForm(first.constant + second.constant, first.matrix + second.matrix), shape)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64, device="cpu")


def _total(*values: Any) -> int:
    """The number of variables."""
    return _affine(values)[0].storage_of_forms.form.matrix.shape[1]


def _weighted(tensor: AffineTensor, index: Tensor, weight: Any, sums: bool) -> "_Result":
    """Numbers of an affine tensor, at some places, times weights; summed over the last dimension."""
    index, weight = torch.broadcast_tensors(index, _number(weight))
    shape = index.shape[:-1] if sums else index.shape
    flat = index.reshape(shape.numel(), -1).numpy(), weight.reshape(shape.numel(), -1).numpy()
    return _Result(tensor.storage_of_forms.form.combined(flat[1], flat[0]), shape)


def _product(one: Any, other: Any) -> "_Result":
    tensor, weight = _factors(one, other)
    return _weighted(tensor, tensor.places, _number(weight), sums=False)


def _number(value: Any) -> Tensor:
    return _double(_tensor(value)).double()


def _factors(one: Any, other: Any) -> tuple[AffineTensor, Any]:
    """The affine factor of a product and the constant one."""
    if isinstance(one, AffineTensor) and isinstance(other, AffineTensor):
        raise NotAffineError("a product of two numbers that depend on the variables is not affine")
    return (one, other) if isinstance(one, AffineTensor) else (other, one)


def _quotient(one: Any, other: Any, rounding_mode: str | None = None) -> "_Result":
    if isinstance(other, AffineTensor) and not _rows(other, other.places).matrix.count_nonzero():
        other = torch.from_numpy(_rows(other, other.places).constant).reshape(other.shape)  # such as a sum that is one
    if isinstance(other, AffineTensor) or rounding_mode is not None:
        raise NotAffineError("a quotient by a number that depends on the variables, or a rounded one, is not affine")
    return _product(one, 1 / _number(other))


def _mean(tensor: AffineTensor, *args: Any, **kwargs: Any) -> "_Result":
    total = _sum(tensor, *args, **kwargs)
    share = total.shape.numel() / tensor.numel()
    return _Result(AffineForm(share * total.form.constant, share * total.form.matrix), total.shape)


def _sum(tensor: AffineTensor, dims: Any = None, keepdim: bool = False, **_: Any) -> "_Result":
    dims = [dims] if isinstance(dims, int) else list(dims or range(tensor.dim()))
    dims = sorted(dim % max(1, tensor.dim()) for dim in dims) if tensor.dim() else []
    index = tensor.places.movedim(dims, list(range(-len(dims), 0))).flatten(-len(dims)) if dims else tensor.places[None]
    found = _weighted(tensor, index, 1.0, sums=True)
    if not keepdim:
        return found
    shape = torch.Size(1 if dim in dims else size for dim, size in enumerate(tensor.shape))
    return _Result(found.form, shape)


def _cumsum(tensor: AffineTensor, dim: int, **_: Any) -> "_Result":
    index = tensor.places.movedim(dim, -1)
    lower = torch.ones(index.shape[-1], index.shape[-1], device="cpu").tril()
    found = _weighted(tensor, index[..., None, :], lower, sums=True)
    places = torch.arange(len(found.form.constant), device="cpu").reshape(found.shape).movedim(-1, dim)
    return _Result(found.form.rows(places.reshape(-1).numpy()), places.shape)


def _matmul(one: Tensor, other: Tensor) -> "_Result":
    """``(..., i, k) @ (..., k, j)``, vectors on the left and on the right included."""
    left, right = (value.places if isinstance(value, AffineTensor) else _double(value) for value in (one, other))
    rows = left[..., None, :] if left.dim() > 1 and right.dim() > 1 else left
    columns = right.mT if right.dim() > 1 else right
    columns = columns[..., None, :, :] if left.dim() > 1 and right.dim() > 1 else columns
    tensor, _ = _factors(one, other)
    return _weighted(tensor, *((rows, columns) if tensor is one else (columns, rows)), sums=True)


def _added(product: Callable[..., "_Result"]) -> Callable[..., "_Result"]:
    """``beta * base + alpha * product(one, other)``, of which any may be constant."""

    def compute(base: Any, one: Any, other: Any, *, beta: float = 1, alpha: float = 1) -> "_Result":
        if not _affine((one, other)):
            constant = alpha * torch.matmul(_number(one), _number(other))
            return _add(constant, base, alpha=beta)
        total = _total(one, other)
        found = product(one, other)
        base = affine_form(_tensor(base), found.shape, total)
        return _Result(
            AffineForm(
                beta * base.constant + alpha * found.form.constant, beta * base.matrix + alpha * found.form.matrix
            ),
            found.shape,
        )

    return compute


_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__)


def _linear(value: Any, weight: Any, bias: Any = None) -> "_Result":
    if bias is None:
        return _matmul(value, weight.t())
    if _affine((value, weight)):
        return _added(_matmul)(bias, value, weight.t())
    return _add(torch.nn.functional.linear(_number(value), _number(weight)), bias)


_OPERATIONS: dict[str, Callable[..., "_Result"]] = {
    "add": _add,
    "addcmul": lambda base, one, other, *, value=1: _added(_product)(base, one, other, alpha=value),
    "addmm": _added(_matmul),
    "addmv": _added(_matmul),
    "baddbmm": _added(_matmul),
    "bmm": _matmul,
    "cumsum": _cumsum,
    "div": _quotient,
    "dot": _matmul,
    "linear": _linear,
    "matmul": _matmul,
    "mean": _mean,
    "mm": _matmul,
    "mul": _product,
    "mv": _matmul,
    "neg": lambda tensor: _product(tensor, -1.0),
    "rsub": lambda one, other, alpha=1: _add(other, one, alpha=-alpha),
    "sub": lambda one, other, alpha=1: _add(one, other, alpha=-alpha),
    "sum": _sum,
}
"""Operations that compute with the numbers."""


def _write(func: Any, args: Any, kwargs: Any) -> AffineTensor:
    """Run an operation that writes to its first argument, an affine tensor: its views have the new numbers, too."""
    target, name = args[0], func.overloadpacket.__name__[:-1]
    if name in ("copy", "fill", "zero"):
        value = 0.0 if name == "zero" else args[1]
        form = affine_form(_tensor(value), target.shape, _total(target))
    elif name in _OPERATIONS:
        form = _OPERATIONS[name](*args, **kwargs).form
    elif name in _MOVES:
        form = _moved(getattr(torch.ops.aten, name).default, args, kwargs).form
    else:
        raise NotAffineError(f"torch's operation `{name}_` is not affine")
    storage, places = target.storage_of_forms, target.places.reshape(-1).numpy()
    before = storage.form
    source = np.arange(len(before.constant))
    source[places] = len(source) + np.arange(len(places))
    storage.form = _stacked([before, form]).rows(source)
    return target
