"""Operations that take the place of others in a captured step, on processors, where they are faster.

Large matrix products go to oneDNN: MKL, which torch takes, chooses its instructions by the maker of the processor and
not by what it can do, and takes twice as long on some. The hyperbolic tangent is made of an exponential, in a third of
the time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["SUBSTITUTES"]

_LEAST = 2**20  # products of numbers, from which on it pays

_THIN = 2  # terms of a sum that need no product of matrices
_NEAR = 0.04  # square below which the series of tanh has all digits of float32

_library = torch.library.Library("pyro_vae", "DEF")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl(
    "linear", lambda x, weight, bias: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""), "CPU"
)


@torch.library.register_fake("pyro_vae::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _pays(a: Tensor, b: Tensor) -> bool:
    plain = a.dtype == torch.float32 and a.is_cpu and torch.backends.mkldnn.is_available()
    return plain and a.shape[0] * a.shape[1] * b.shape[1] >= _LEAST


def _is_thin(a: Tensor) -> bool:
    """Whether a product over so few numbers is better a part of the loop around it."""
    return a.is_cpu and 0 < a.shape[1] <= _THIN


def _thin(a: Tensor, b: Tensor) -> Tensor:
    product = a[:, :1] * b[0]
    for k in range(1, a.shape[1]):
        product = product + a[:, k : k + 1] * b[k]
    return product


def _mm(a: Tensor, b: Tensor) -> Any:
    if _is_thin(a):
        return _thin(a, b)
    return torch.ops.pyro_vae.linear(a, b.t(), None) if _pays(a, b) else NotImplemented


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1:
        return NotImplemented
    if _is_thin(a):
        return _thin(a, b) + bias
    fits = _pays(a, b) and bias.dim() == 1 and bias.dtype == a.dtype
    return torch.ops.pyro_vae.linear(a, b.t(), bias) if fits else NotImplemented


def _tanh(x: Tensor) -> Any:
    """tanh |x| = (1 - e^-2|x|) / (1 + e^-2|x|); near zero, where digits would cancel, its series."""
    if x.dtype != torch.float32 or not x.is_cpu:
        return NotImplemented
    decay, square = torch.exp(-2 * x.abs()), x * x
    series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return torch.where(square < _NEAR, series, torch.copysign((1 - decay) / (1 + decay), x))


SUBSTITUTES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.default: _mm,
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten.tanh.default: _tanh,
}
"""For ``make_fx``: from operations to what takes their place, which leaves to them what it is not for."""
