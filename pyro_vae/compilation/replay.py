"""Replay a graph without a compiler, by as few operations as give the same bits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.compilation import torch_private
from pyro_vae.compilation.cuda_graph import CudaGraph, cuda_graph_of
from pyro_vae.compilation.graph import Graph
from pyro_vae.compilation.recorder import Node, function_of, mapped
from pyro_vae.compilation.rolling import is_random, is_view, operation_key, simplified

__all__ = ["Replay"]

_aten = torch.ops.aten
_BY_ONE = {_aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar, _aten.pow.Tensor_Scalar}
"""Operations that return their first argument if the second one is 1."""
_TWICE = {_aten.neg.default, _aten.t.default}
"""Operations that undo themselves."""


class Replay:
    """The operations of a graph without a compiler: the same bits in less time.

    Equal operations run once. What depends on numbers in the code alone, and views of parameters, are computed before
    the first call.

    >>> weight = torch.ones(2, 3)
    >>> replay = Replay(Graph(lambda x: [(x @ weight.t()) * 1], [torch.ones(4, 3)]))
    >>> len(replay.nodes), replay(torch.ones(4, 3))[0].shape
    (1, torch.Size([4, 2]))
    """

    def __init__(self, graph: Graph):
        graph_inputs = list(graph.inputs)
        self.values: list[Tensor] = list(graph.constants)
        self.nodes: list[Node] = list(graph.nodes)
        results = graph.results
        simple = simplified(graph.inputs, graph.nodes, graph.results)
        if simple is not None:  # no views are changed in place
            folding = _Folding(simple.inputs, self.values, written_nodes(simple.tail))
            self.nodes = folding.nodes_of(simple.head, simple.tail)
            results = [folding.new.get(node, node) for node in simple.results]
            graph_inputs, self.values = folding.inputs, folding.values
        self.nodes, results = _separate(_needed(self.nodes, results), results)
        self._run = function_of(graph_inputs, self.nodes, results, torch_private.raw_operation)
        self._written = graph.written
        self._cuda_graph: CudaGraph | None = None

    def start_together(self, inputs: Sequence[Tensor]) -> str:
        """Start all kernels of further calls at once, by a CUDA graph; return why not, or nothing.

        The next call then overwrites the results, apart from the first one. Without a GPU, do nothing.
        """
        self._cuda_graph, reason = cuda_graph_of(self._run, inputs, self.values, self._written, self.nodes)
        return reason

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Repeat the operations on new inputs."""
        return self._run(*inputs, *self.values) if self._cuda_graph is None else self._cuda_graph(*inputs)


class _Folding:
    """Replace operations whose results are known before a call.

    Args:
        inputs: the inputs of a graph, the last of which are ``values``.
        written: nodes that the graph changes in place.
    """

    def __init__(self, inputs: Sequence[Node], values: Sequence[Tensor], written: set[Node]):
        self.inputs, self.values, self._written = list(inputs), list(values), written
        self.new: dict[Node, Node] = {}
        constants = inputs[len(inputs) - len(values) :]
        self._known: dict[Node, Tensor] = dict(zip(constants, values, strict=True))
        self._operations: dict[Any, Node] = {}
        self._fixed: set[Node] = set()  # whose numbers never change

    def nodes_of(self, head: Sequence[Node], tail: Sequence[Node]) -> list[Node]:
        """Return the operations that remain."""
        kept: list[Node] = []
        for node in head:
            args, kwargs = self._renamed(node)
            made = Node(node.target, args, kwargs, node.form)
            key = operation_key(made)
            other = self._equal(made) or self._operations.get(key) or self._computed(made)
            if other is None:
                kept.append(made)
            self.new[node] = other or made
            if key is not None:
                self._operations.setdefault(key, self.new[node])
        for node in tail:
            self.new[node] = Node(node.target, *self._renamed(node), node.form)
            kept.append(self.new[node])
        return kept

    def _renamed(self, node: Node) -> tuple[list[Any], dict[str, Any]]:
        def rename(one: Node) -> Node:
            return self.new.get(one, one)

        return mapped(list(node.args), rename), {name: mapped(value, rename) for name, value in node.kwargs.items()}

    def _equal(self, node: Node) -> Node | None:
        """Return an earlier node with the same numbers, shape and dtype."""
        first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if first is None or first in self._written or first.form is None:
            return None
        if node.target in _BY_ONE and node.args[1:] == [1] and first.form == node.form:
            return first
        if node.target in _TWICE and first.target is node.target:
            return first.args[0]
        return None

    def _computed(self, node: Node) -> Node | None:
        """Return a node for the result of an operation, if it can be computed now."""
        inputs = node.inputs
        if is_random(node.target) or node.form is None or any(one not in self._known for one in inputs):
            return None
        copied = node.target is _aten.lift_fresh_copy.default  # of a number in the code
        fixed = copied or self._fixed.issuperset(inputs)
        if not (fixed or is_view(node)) or self._written.intersection([node, *inputs]):
            return None
        with torch.no_grad():
            arguments = mapped(node.args, self._known.__getitem__)
            keywords = {name: mapped(value, self._known.__getitem__) for name, value in node.kwargs.items()}
            value = node.target(*arguments, **keywords)
        made = Node(None, form=node.form)
        self.inputs.append(made)
        self.values.append(value)
        self._known[made] = value
        if fixed:
            self._fixed.add(made)
        return made


def written_nodes(nodes: Sequence[Node]) -> set[Node]:
    """The nodes that operations change in place, and those that they are views of."""
    found: set[Node] = set()
    for node in nodes:
        for written in torch_private.written_arguments(node.target, node.args, node.kwargs):
            while isinstance(written, Node) and written not in found:
                found.add(written)
                written = written.inputs[0] if written.target is not None and is_view(written) else None
    return found


def _needed(nodes: Sequence[Node], results: Sequence[Node]) -> list[Node]:
    """The operations that results or changes in place depend on, and all that draw random numbers."""
    needed, kept = set(results), []
    for node in reversed(nodes):
        writes = torch_private.written_arguments(node.target, node.args, node.kwargs)
        if node in needed or writes or is_random(node.target):
            needed.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def _separate(nodes: list[Node], results: Sequence[Node]) -> tuple[list[Node], list[Node]]:
    """Copy results that share memory with inputs or with each other: the caller may change each in place."""
    seen: set[Node] = set()
    nodes, found = list(nodes), []
    for result in results:
        base = result
        while base.target is not None and is_view(base):
            base = base.inputs[0]
        if base.target is None or base in seen:
            result = Node(_aten.clone.default, [result], form=result.form)
            nodes.append(result)
        seen.add(base)
        found.append(result)
    return nodes, found
