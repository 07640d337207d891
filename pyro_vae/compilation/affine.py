"""Prove from a captured graph that a function is affine in its input, and compute it in float64.

Each operation gets a degree in the input: 0 if its result does not depend on it, 1 if the result is affine in it. Sums,
reshapings and products with constants keep these degrees; every other operation on what depends on the input, and every
operation that is not listed here, has no degree.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from pyro_vae._utils.typing import Function
from pyro_vae.compilation import torch_private
from pyro_vae.compilation.graph import Graph

__all__ = ["AffineGraph"]

_LINEAR = {
    "_reshape_alias", "_unsafe_view", "add", "alias", "as_strided", "as_strided_scatter", "avg_pool1d",
    "avg_pool2d", "cat", "clone", "concat", "constant_pad_nd", "copy", "cumsum", "detach", "diag_embed", "diagonal",
    "diagonal_scatter", "expand", "flip", "gather", "getitem", "im2col", "col2im", "index", "index_put",
    "index_select", "lift_fresh_copy", "masked_fill", "mean", "neg", "permute", "pixel_shuffle", "positive",
    "reflection_pad1d", "reflection_pad2d", "repeat", "replication_pad1d", "replication_pad2d", "reshape", "roll",
    "rsub", "select", "select_scatter", "slice", "slice_scatter", "split", "split_with_sizes", "squeeze", "stack",
    "sub", "sum", "t", "trace", "transpose", "tril", "triu", "unbind", "unfold", "unsqueeze", "upsample_bilinear2d",
    "upsample_linear1d", "upsample_nearest1d", "upsample_nearest2d", "view", "where",
}  # fmt: skip
"""Operations that are linear in all their tensors of numbers together."""

_FACTORS = {
    "addbmm": (1, 2), "addcmul": (1, 2), "addmm": (1, 2), "addmv": (1, 2), "addr": (1, 2), "baddbmm": (1, 2),
    "bmm": (0, 1), "convolution": (0, 1), "dot": (0, 1), "linear": (0, 1), "matmul": (0, 1), "mm": (0, 1),
    "mul": (0, 1), "mv": (0, 1),
}  # fmt: skip
"""Operations that are linear in each of two arguments."""

_BATCH_NORMS = {"native_batch_norm": 5, "cudnn_batch_norm": 5, "_native_batch_norm_legit": 5}
"""Operations that are affine in their first argument in evaluation mode, and the place of the flag for training."""

_PRECISE = (torch.float32, torch.float64)


class AffineGraph:
    """The outputs of a function of one tensor, in float64, and their degree in it: 0, 1, or ``None`` if not proved.

    Args:
        function: from a tensor to a sequence of tensors.
        example: of its argument.

    Raises:
        ValueError: if the function cannot be captured as a graph: it reads the value of a tensor.

    >>> graph = AffineGraph(lambda z: [2 * z + 1, z.relu(), torch.ones(3)], torch.zeros(3))
    >>> graph.degrees, graph(torch.ones(3))[0]
    ([1, None, 0], tensor([3., 3., 3.], dtype=torch.float64))
    """

    def __init__(self, function: Function, example: Tensor):
        graph = Graph(function, [example], decompositions={})
        self._constants = [tensor.clone() for tensor in graph.constants]  # the function may change them in place
        self._module = _without_writes(graph.module, [example, *self._constants])
        degrees: dict[Node, int | None] = {}
        placeholders = [node for node in self._module.graph.nodes if node.op == "placeholder"]
        for node in self._module.graph.nodes:
            degrees[node] = int(node is placeholders[0]) if node.op == "placeholder" else _degree(node, degrees)
        (output,) = (node for node in self._module.graph.nodes if node.op == "output")
        self.degrees = [degrees[node] for node in output.args[0]]

    def __call__(self, value: Tensor) -> list[Tensor]:
        """Compute the outputs in float64, from parameters and constants as they are."""
        return list(_InDouble(self._module).run(*map(_double, (value, *self._constants))))


def _without_writes(module: GraphModule, inputs: Sequence[Tensor]) -> GraphModule:
    """Rewrite a graph so that every operation returns a new tensor, and none changes another in place."""
    return torch_private.make_fx(torch.func.functionalize(lambda *args: list(module(*args))))(*inputs)


def _degree(node: Node, degrees: dict[Node, int | None]) -> int | None:
    found = [degrees[argument] for argument in node.all_input_nodes]
    if not any(degree != 0 for degree in found):
        return 0
    if None in found:
        return None
    if node.op == "output":
        return 1
    name = getattr(node.target, "__name__", "").partition(".")[0]
    places = [place for place, argument in enumerate(node.args) if isinstance(argument, Node) and degrees[argument]]
    if node.target is operator.getitem or name in _LINEAR:
        is_affine = True
    elif name in _FACTORS:
        is_affine = not set(_FACTORS[name]) <= set(places)
    elif name == "div":
        is_affine = places == [0] and not node.kwargs.get("rounding_mode")
    elif name in _BATCH_NORMS:
        is_affine = places == [0] and node.args[_BATCH_NORMS[name]] is False
    elif name == "_native_batch_norm_legit_no_training":
        is_affine = places == [0]
    else:
        is_affine = name == "_to_copy" and node.kwargs.get("dtype", torch.float64) in _PRECISE
    return 1 if is_affine else None


class _InDouble(Interpreter):
    """Run a graph of float32 in float64."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        result = super().call_function(target, args, kwargs)
        return _double(result) if isinstance(result, Tensor) else result


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
