"""The recurrent layers of torch inside of ``torch.vmap``, which has no rule for them.

``nn.GRU``, ``nn.LSTM`` and ``nn.RNN`` treat the rows of a batch alone. So the draws become further rows: C draws of N
sequences are C · N sequences.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vae.compilation.torch_private import is_batched

__all__ = ["RecurrentLayers", "lacks_recurrent_rule"]

_LAYERS = {torch.gru: "gru", torch.lstm: "lstm", torch.rnn_tanh: "rnn_tanh", torch.rnn_relu: "rnn_relu"}
"""The functions that the layers call, and their names in torch's errors."""


def lacks_recurrent_rule(error: BaseException) -> bool:
    """Whether ``torch.vmap`` failed at a recurrent layer."""
    return any(f"aten::{name}." in str(error) for name in _LAYERS.values())


class RecurrentLayers(TorchFunctionMode):
    """Run recurrent layers of padded sequences, whose weights do not depend on the draw, inside of ``torch.vmap``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A layer of packed sequences has its numbers of rows where others have the states: then args[3] is a list.
        if func in _LAYERS and isinstance(args[3], bool):
            x, states, weights, *settings = args
            states = (states,) if isinstance(states, Tensor) else tuple(states)
            if any(map(is_batched, (x, *states))) and not any(map(is_batched, weights)):
                return _DrawsAreRows.apply(func, settings, len(states), x, *states, *weights)
        return func(*args, **(kwargs or {}))


class _DrawsAreRows(torch.autograd.Function):
    """A recurrent layer for many draws; torch follows the gradients of what ``vmap`` calls."""

    @staticmethod
    def forward(*args: Any) -> Any:
        raise NotImplementedError("outside of torch.vmap a recurrent layer runs as it is")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise NotImplementedError("outside of torch.vmap a recurrent layer runs as it is")

    @staticmethod
    def vmap(info: Any, in_dims: Any, layer: Any, settings: list[Any], num_states: int, *tensors: Tensor) -> Any:
        count, rows = info.batch_size, 0 if settings[-1] else 1  # the last setting is batch_first
        x, *states = (
            tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors[: 1 + num_states], in_dims[3:], strict=False)
        )
        num_rows = x.shape[1 + rows]
        x = x.movedim(0, rows).flatten(rows, rows + 1)
        states = [state.movedim(0, 1).flatten(1, 2).contiguous() for state in states]
        weights = list(tensors[1 + num_states :])
        found = layer(x, states[0] if num_states == 1 else states, weights, *settings)
        dims = (rows, *[1] * num_states)
        return tuple(each.unflatten(dim, (count, num_rows)) for each, dim in zip(found, dims, strict=True)), dims
