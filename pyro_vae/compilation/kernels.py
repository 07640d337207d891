"""Operations that take the place of others in a captured step, on processors, where they are faster.

Large matrix products go to oneDNN: MKL, which torch takes, chooses its instructions by the maker of the processor and
not by what it can do, and takes twice as long on some. Products with up to four rows, columns or terms become a part of
the loops around them. The hyperbolic tangent is made of an exponential, in a third of the time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["decompositions"]

_LARGE = 2**20  # products of numbers, from which on oneDNN pays


_NARROW = 64  # columns, up to which the gradient of a weight takes up to a tenth of the time the other way round


_FEW = 4  # rows, columns or terms, up to which loops do


_NEAR = 0.04  # square below which the series of tanh has all digits of float32


_library = torch.library.Library("pyro_vae", "DEF")


_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


_library.impl(
    "linear", lambda x, weight, bias: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""), "CPU"
)


@torch.library.register_fake("pyro_vae::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _use_onednn(a: Tensor, b: Tensor) -> bool:
    plain = a.dtype == torch.float32 and a.is_cpu and torch.backends.mkldnn.is_available()
    large = a.shape[0] * a.shape[1] * b.shape[1] >= _LARGE
    return plain and large and _is_matrix(a) and _is_matrix(b)


def _is_matrix(x: Tensor) -> bool:
    """Whether it lies in memory by rows or by columns, of which none overlap: what libraries of products take."""
    (rows, columns), (down, along) = x.shape, x.stride()
    return (along == 1 and down >= columns) or (down == 1 and along >= rows)


def _unrolled_matmul(a: Tensor, b: Tensor) -> Tensor | None:
    """The product, if it is of few rows, columns or terms: sums that a compiler makes a part of the loops around."""
    (rows, terms), columns = a.shape, b.shape[1]
    plain = a.dtype in (torch.float32, torch.float64) and a.is_cpu
    if not plain or not 0 < min(rows, terms, columns) <= _FEW:
        return None
    if terms <= _FEW:
        b = b if b.is_contiguous() else _stored(b.contiguous())  # to be read in the order of the columns
        product = a[:, :1] * b[0]
        for k in range(1, terms):
            product = product + a[:, k : k + 1] * b[k]
        return product
    if rows * terms * columns >= _LARGE:
        return None
    if rows <= _FEW:
        return torch.stack([(row[:, None] * b).sum(0) for row in a])
    if a.stride(1) == 1:
        if not _is_whole(a):
            return None
        a = _stored(a)
    return torch.stack([(a * column).sum(1) for column in b.t()], 1)


def _is_whole(x: Tensor) -> bool:
    """Whether numbers lie one after the other, and nothing else in their storage."""
    return x.is_contiguous() and x.numel() > 1 and x.untyped_storage().nbytes() == x.nbytes


def _stored(x: Tensor) -> Tensor:
    """The same, which a compiler is to store, and not to compute anew wherever it is needed.

    For inductor that is so by ``as_strided``, if it is whole; of parts of a tensor it would make something else.
    """
    return x.as_strided(x.shape, x.stride())


def _mm(a: Tensor, b: Tensor) -> Any:
    product = _unrolled_matmul(a, b)
    if product is None and _use_onednn(a, b):
        if a.stride(0) == 1 and b.shape[1] <= min(_NARROW, a.shape[0]):
            product = torch.ops.pyro_vae.linear(b.t(), a, None).t().contiguous()
        else:
            product = torch.ops.pyro_vae.linear(a, b.t(), None)
    return NotImplemented if product is None else product


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1:
        return NotImplemented
    product = _unrolled_matmul(a, b)
    if product is not None:
        return product + bias
    fits = _use_onednn(a, b) and bias.shape == b.shape[1:] and bias.is_contiguous() and bias.dtype == a.dtype
    return torch.ops.pyro_vae.linear(a, b.t(), bias) if fits else NotImplemented


def _tanh(x: Tensor) -> Any:
    """tanh |x| = (1 - e^-2|x|) / (1 + e^-2|x|); near zero, where digits would cancel, its series."""
    if x.dtype != torch.float32 or not x.is_cpu:
        return NotImplemented
    decay, square = torch.exp(-2 * x.abs()), x * x
    series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return torch.where(square < _NEAR, series, torch.copysign((1 - decay) / (1 + decay), x))


decompositions: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.default: _mm,
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten.tanh.default: _tanh,
}
"""For ``make_fx``: from operations to what takes their place, which leaves to them what it is not for."""
