"""Mixed precision: the large products of a network in bfloat16, all else in float32.

bfloat16 has the range of float32 and 8 binary digits. Both factors of a product are rounded to it, with relative errors
of up to 2^-8. The processor sums in float32, rounds the result to bfloat16, and it goes on in float32: activations,
densities, sums, parameters, their gradients and the optimizer do not change. The same holds for the products of the
backward pass.

``torch.autocast`` leaves in bfloat16 what follows a product, too: a density of such logits has some three digits.
"""

import functools
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pyro_vae.compilation import torch_private

__all__ = ["bfloat16_products", "check_precision"]

_LARGE = 2**20  # multiplications from which on a product in bfloat16, with its casts, takes less time

_LAYERS = {
    functional.linear, functional.conv1d, functional.conv2d, functional.conv3d, functional.conv_transpose1d,
    functional.conv_transpose2d, functional.conv_transpose3d, torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu,
    torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell, functional.multi_head_attention_forward,
}  # fmt: skip
"""Functions that networks are made of. Other products may be part of a density, such as those with a covariance."""


def check_precision(precision: Any) -> None:
    """Raise for a ``precision`` that is neither ``None`` nor ``"bf16-mixed"``."""
    if precision is not None and (not isinstance(precision, str) or precision != "bf16-mixed"):
        raise ValueError(f"`precision` must be 'bf16-mixed', or None for float32, got {precision!r}")


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Compute the large products of networks in a block in bfloat16, in a backward pass too, with float32 results.

    A tensor is rounded once in a block, and again after a change in place. A capture of a graph records the rounding
    and the products in bfloat16 as operations like others.

    >>> layer, x = torch.nn.Linear(256, 256), torch.randn(64, 256)
    >>> with bfloat16_products():
    ...     y = layer(x)
    >>> y.dtype, bool((y - layer(x)).abs().max() > 1e-4), torch.allclose(y, layer(x), atol=0.05)
    (torch.float32, True, True)
    """
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise ValueError(
                "`precision` must be None inside of torch.autocast, which rounds more than products, got 'bf16-mixed'. "
                "Leave one of them out"
            )
    layers = _Layers()
    with _Products(layers), layers:
        yield


class _Layers(TorchFunctionMode):
    """Find out which operations belong to layers of networks, forward by the call and backward by their number."""

    def __init__(self) -> None:
        super().__init__()
        self._running = False
        self._ends: list[int] = []  # numbers of autograd that follow those of a layer, in order
        self._begins: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _LAYERS:
            return func(*args, **(kwargs or {}))
        begin, self._running = torch_private.next_autograd_number(), True
        try:
            with torch_private.without_onednn():  # its recurrent layers are one operation; those of torch have products
                return func(*args, **(kwargs or {}))
        finally:
            self._running = False
            self._begins.append(begin)
            self._ends.append(torch_private.next_autograd_number())

    def are_running(self) -> bool:
        """Whether the present operation is part of a layer, or of its backward pass."""
        if self._running:
            return True
        number = torch_private.backward_number()
        if number is None:
            return False
        place = bisect_left(self._ends, number + 1)
        return place < len(self._ends) and self._begins[place] <= number


class _Products(torch_private.TorchDispatchMode):
    """Replace products of layers below autograd, and keep what was rounded for them."""

    def __init__(self, layers: _Layers):
        super().__init__()
        self._layers = layers
        self._rounded: dict[Any, dict[Any, Tensor]] = {}  # by memory and by part of it
        self._many = 64  # pieces of memory from which on those that were freed are forgotten

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None and self._layers.are_running():
            result = replacement(self.rounded, *args, **kwargs)
            if result is not NotImplemented:
                return result
        for written in torch_private.written_arguments(func, args, kwargs):
            self._rounded.pop(_memory(written), None)
        return func(*args, **kwargs)

    def rounded(self, x: Tensor) -> Tensor:
        """Return a tensor in bfloat16; a matrix and its transpose are rounded once."""
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        in_order = order == list(range(x.dim()))
        stored = x if in_order else x.permute(order)
        parts = self._rounded.get(memory := _memory(x))
        if parts is None:
            if len(self._rounded) >= self._many:
                self._rounded = {one: found for one, found in self._rounded.items() if not one.expired()}
                self._many = max(64, 2 * len(self._rounded))
            parts = self._rounded[memory] = {}
        part = stored.storage_offset(), stored.shape, stored.stride()
        if part not in parts:
            parts[part] = stored.to(torch.bfloat16)
        return parts[part] if in_order else parts[part].permute([order.index(dim) for dim in range(x.dim())])


def _memory(x: Tensor) -> torch_private.StorageWeakRef:
    return torch_private.StorageWeakRef(x.untyped_storage())


Round = Callable[[Tensor], Tensor]


def _product(multiply: Callable[[Tensor, Tensor], Tensor], rounded: Round, a: Tensor, b: Tensor) -> Any:
    plain = a.dtype == b.dtype == torch.float32
    if not plain or a.numel() * b.shape[-1] < _LARGE:
        return NotImplemented
    with torch_private.onednn():
        return multiply(rounded(a), rounded(b)).float()


def _sum_with_product(
    multiply: Callable[[Tensor, Tensor], Tensor],
    rounded: Round,
    bias: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Any:
    product = _product(multiply, rounded, a, b) if beta == 1 and alpha == 1 else NotImplemented
    return product if product is NotImplemented else product + bias


def _convolution(rounded: Round, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Any:
    if not x.dtype == weight.dtype == torch.float32:
        return NotImplemented
    with torch_private.onednn():
        result = _aten.convolution(rounded(x), rounded(weight), None, *geometry).float()
    return result if bias is None else result + bias.reshape(-1, *[1] * (x.dim() - 2))


def _convolution_backward(
    rounded: Round, gradient: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, *geometry: Any
) -> Any:
    if not gradient.dtype == x.dtype == weight.dtype == torch.float32:
        return NotImplemented
    *others, (of_x, of_weight, of_bias) = geometry
    factors = rounded(gradient), rounded(x), rounded(weight)
    with torch_private.onednn():
        found = _aten.convolution_backward(*factors, None, *others, [of_x, of_weight, False])
    gradients = [None if one is None else one.float() for one in found[:2]]
    return *gradients, gradient.sum([dim for dim in range(gradient.dim()) if dim != 1]) if of_bias else None


_aten = torch.ops.aten
_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    _aten.mm.default: functools.partial(_product, torch.mm),
    _aten.bmm.default: functools.partial(_product, torch.bmm),
    _aten.addmm.default: functools.partial(_sum_with_product, torch.mm),
    _aten.baddbmm.default: functools.partial(_sum_with_product, torch.bmm),
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution_backward,
}
