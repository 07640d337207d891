"""What a graph costs in seconds: a replay of its operations, the compiled graph, and its compilation.

The estimates come from the operations and their shapes alone, and never from the clock: a decision that rests on them
is the same in every run, so that one seed gives the same bits. They are good to a factor of two or so, which is enough
to tell a run of seconds from one of minutes. The constants are those of a core of a server of 2024.
"""

import math
import operator

import torch

from pyro_vae._utils.typing import Function
from pyro_vae.compilation.graph import CompiledFunction, Graph
from pyro_vae.compilation.recorder import Node

__all__ = [
    "automatic", "compilation_pays", "compilation_seconds", "compiled_seconds", "paying_calls", "replay_seconds",
]  # fmt: skip

_CALL = 2.5e-6  # seconds of an operation that torch is called for
_NUMBER = 0.4e-9  # seconds for each number that such an operation reads or writes
_MULTIPLICATION = 1 / 60e9  # seconds, in products of matrices and convolutions
_RANDOM = 4e-9  # seconds of a random number
_JOINED = 0.25  # share of the time for numbers that is left where a compiler joins operations
_START, _EACH = 4.0, 0.01  # seconds to compile a graph, and for each of its operations
_FEWEST_CALLS = 16  # of a function that is captured, which takes as long as some of them
_LONG = 40.0  # seconds to find the repetitions of a long graph and to compile what is repeated

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 1, _aten.addmm.default: 2, _aten.bmm.default: 1, _aten.baddbmm.default: 2}
"""Products of matrices, with the number of matrices that they multiply before the last."""


def replay_seconds(graph: Graph) -> float:
    """Estimate the seconds of a call of a graph that is not compiled.

    >>> small, large = (Graph(lambda x: [x @ x], [torch.ones(size, size)]) for size in (10, 1000))
    >>> replay_seconds(small) < 1e-4 < 1e-2 < replay_seconds(large)
    True
    """
    calls, numbers, products, random = _counts(graph)
    return _CALL * calls + _NUMBER * numbers + _MULTIPLICATION * products + _RANDOM * random


def compiled_seconds(graph: Graph) -> float:
    """Estimate the seconds of a call of a compiled graph."""
    calls, numbers, products, random = _counts(graph)
    return _CALL * calls / 20 + _JOINED * _NUMBER * numbers + _MULTIPLICATION * products + _RANDOM * random


def compilation_seconds(graph: Graph) -> float:
    """Estimate the seconds that :meth:`pyro_vae.compilation.graph.Graph.compile` takes, without torch's cache."""
    return _LONG if graph.is_long else _START + _EACH * len(graph.nodes)


def compilation_pays(graph: Graph, calls: float) -> bool:
    """Whether so many further calls take less time if the graph is compiled before the first of them.

    >>> graph = Graph(lambda x: [(x * 2).exp().sum()], [torch.ones(1000)])
    >>> compilation_pays(graph, 100), compilation_pays(graph, 10**7)
    (False, True)
    """
    return calls > paying_calls(graph)


def paying_calls(graph: Graph) -> float:
    """Estimate from how many calls on they take less time if the graph is compiled before the first of them."""
    saved = replay_seconds(graph) - compiled_seconds(graph)
    return compilation_seconds(graph) / saved if saved > 0 else math.inf


def automatic(function: Function, calls: float) -> Function:
    """Return a function of tensors that is as fast as so many calls of it deserve, with the same results.

    It is captured where there are many calls and it can be, and its graph compiled where that pays, see
    :class:`pyro_vae.compilation.graph.CompiledFunction`. The choice depends on numbers and sizes alone.

    >>> double = automatic(lambda x: [2 * x], calls=100)
    >>> [double(torch.ones(2)) for _ in range(3)]
    [[tensor([2., 2.])], [tensor([2., 2.])], [tensor([2., 2.])]]
    """
    if calls < _FEWEST_CALLS:
        return function
    return CompiledFunction(function, lambda graph: compilation_pays(graph, calls))


def _counts(graph: Graph) -> tuple[int, float, float, float]:
    """Count operations, the numbers that they read and write, multiplications in products, and random numbers."""
    calls, numbers, products, random = 0, 0.0, 0.0, 0.0
    for node in graph.nodes:
        if getattr(node.target, "is_view", False) or node.target is operator.getitem:
            continue
        size = _size(node)
        calls += 1
        numbers += size + sum(map(_size, node.inputs))
        products += _products(node, size)
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            random += size
    return calls, numbers, products, random


def _size(node: Node) -> int:
    return 0 if node.form is None else math.prod(node.form[0])  # none of an operation with several results


def _products(node: Node, size: int) -> float:
    """The number of multiplications in a product of matrices or a convolution."""
    if node.target in _PRODUCTS:
        return size * node.inputs[_PRODUCTS[node.target] - 1].form[0][-1]
    if node.target is _aten.convolution.default:
        return size * math.prod(node.inputs[1].form[0][1:])
    if node.target is _aten.convolution_backward.default:
        return 2 * _size(node.inputs[0]) * math.prod(node.inputs[2].form[0][1:])
    return 0
