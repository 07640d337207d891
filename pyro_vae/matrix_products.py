"""Large matrix products by oneDNN: on some processors torch's own, by MKL, take twice as long.

MKL chooses its instructions by the maker of the processor, oneDNN by what it can do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["BY_ONEDNN"]

_LEAST = 2**20  # products of numbers, from which on it pays

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


def _mm(a: Tensor, b: Tensor) -> Any:
    return torch.ops.pyro_vae.linear(a, b.t(), None) if _pays(a, b) else NotImplemented


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    fits = _pays(a, b) and beta == alpha == 1 and bias.dim() == 1 and bias.dtype == a.dtype
    return torch.ops.pyro_vae.linear(a, b.t(), bias) if fits else NotImplemented


BY_ONEDNN: dict[Any, Callable[..., Any]] = {torch.ops.aten.mm.default: _mm, torch.ops.aten.addmm.default: _addmm}
"""For ``make_fx``: from operations to what takes their place, where it pays."""
