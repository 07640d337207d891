"""Faster replacements for some operations of a captured step on CPUs.

- Large matrix products are computed by oneDNN. Torch's own choice, MKL, selects its instructions by the maker of the
  processor and not by its abilities, and takes twice as long on some.
- Matrix products with up to four rows, columns or terms become sums, which a compiler joins with the loops around them.
- The hyperbolic tangent is computed from an exponential, in a third of the time.
- The logarithm of a sigmoid, of which a Bernoulli likelihood takes one per pixel, is computed from an exponential and a
  polynomial, in a third of the time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.compilation.torch_private import onednn_linear

__all__ = ["decompositions", "matrix_product"]

_LARGE = 2**20  # multiplications from which on oneDNN is faster
_NARROW = 64  # columns up to which the transposed product, a weight's gradient, takes as little as a tenth of the time
_FEW = 4  # rows, columns or terms up to which sums are faster
_NEAR = 0.04  # square below which the series of tanh has all digits of float32
_ARTANH = 2.000000007681758, 0.6666632164140144, 0.40024595229818943, 0.2796515775679465, 0.28157778313522575
"""Coefficients of p(t) = 2 artanh(sqrt(t)) / sqrt(t), through its Chebyshev points on [0, 1/9]: to 4e-9, relative."""


def _use_onednn(a: Tensor, b: Tensor) -> bool:
    plain = a.dtype == torch.float32 and a.is_cpu and torch.backends.mkldnn.is_available()
    large = a.shape[0] * a.shape[1] * b.shape[1] >= _LARGE
    return plain and large and _is_matrix(a) and _is_matrix(b)


def _is_matrix(x: Tensor) -> bool:
    """Whether ``x`` is stored by rows or by columns without overlap, as BLAS libraries require."""
    (rows, columns), (down, along) = x.shape, x.stride()
    return (along == 1 and down >= columns) or (down == 1 and along >= rows)


def _unrolled_matmul(a: Tensor, b: Tensor) -> Tensor | None:
    """Return the product as sums if it has few rows, columns or terms, otherwise ``None``."""
    (rows, terms), columns = a.shape, b.shape[1]
    plain = a.dtype in (torch.float32, torch.float64) and a.is_cpu
    if not plain or not 0 < min(rows, terms, columns) <= _FEW:
        return None
    if terms <= _FEW:
        b = b if b.is_contiguous() else _stored(b.contiguous())  # so that it is read in the order of the columns
        product = a[:, :1] * b[0]
        for k in range(1, terms):
            product = product + a[:, k : k + 1] * b[k]
        return product
    if rows * terms * columns >= _LARGE:
        return None
    if rows <= _FEW:
        return torch.stack([(row[:, None] * b).sum(0) for row in a])
    if a.stride(1) == 1:
        if not (a.is_contiguous() and a.numel() > 1 and a.untyped_storage().nbytes() == a.nbytes):
            return None  # it does not fill its storage
        a = _stored(a)
    return torch.stack([(a * column).sum(1) for column in b.t()], 1)


def _stored(x: Tensor) -> Tensor:
    """Return ``x`` so that a compiler stores it, instead of computing it again at each use.

    Inductor does so for ``as_strided``. On a part of a tensor, ``as_strided`` would address other numbers.
    """
    return x.as_strided(x.shape, x.stride())


def _mm(a: Tensor, b: Tensor) -> Any:
    product = _unrolled_matmul(a, b)
    if product is None and _use_onednn(a, b):
        if a.stride(0) == 1 and b.shape[1] <= min(_NARROW, a.shape[0]):
            product = onednn_linear(b.t(), a, None).t().contiguous()
        else:
            product = onednn_linear(a, b.t(), None)
    return NotImplemented if product is None else product


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1:
        return NotImplemented
    product = _unrolled_matmul(a, b)
    if product is not None:
        return product + bias
    fits = _use_onednn(a, b) and bias.shape == b.shape[1:] and bias.is_contiguous() and bias.dtype == a.dtype
    return onednn_linear(a, b.t(), bias) if fits else NotImplemented


def matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two matrices."""
    product = _mm(a, b)
    return torch.mm(a, b) if product is NotImplemented else product


def _tanh(x: Tensor) -> Any:
    """Compute tanh |x| = (1 - e^-2|x|) / (1 + e^-2|x|), and its series near zero, where digits would cancel."""
    if x.dtype != torch.float32 or not x.is_cpu:
        return NotImplemented
    decay, square = torch.exp(-2 * x.abs()), x * x
    series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return torch.where(square < _NEAR, series, torch.copysign((1 - decay) / (1 + decay), x))


def _log_sigmoid(x: Tensor) -> Any:
    """Compute log sigmoid(x) = min(x, 0) - log(1 + z) with z = e^-|x|; return z, too, which the gradient is made of.

    With s = z / (2 + z), which is at most 1/3, log(1 + z) = 2 artanh(s) = s p(s^2).
    """
    if x.dtype != torch.float32 or not x.is_cpu:
        return NotImplemented
    decay = torch.exp(-x.abs())
    ratio = decay / (2 + decay)
    square = ratio * ratio
    series: Any = _ARTANH[-1]
    for coefficient in reversed(_ARTANH[:-1]):
        series = series * square + coefficient
    return x.clamp(max=0) - ratio * series, decay


decompositions: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.default: _mm,
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten.tanh.default: _tanh,
    torch.ops.aten.log_sigmoid_forward.default: _log_sigmoid,
}
"""Replacements of operations for ``make_fx``; each returns ``NotImplemented`` for arguments that it is not made for."""
