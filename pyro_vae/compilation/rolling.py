"""Run a long graph whose operations repeat themselves, as those of a sequence do, without compiling each repetition.

A recurrent network, a hidden Markov model or a deep Markov model of T steps leads to a graph with T copies of the same
operations. Here the copies are found again, and what depends on the copy before is separated from what does not:

- operations that do not depend on the copy before run once, on all copies together;
- a sum over copies runs once, a sum of matrix products as one product;
- the rest is a loop. Its body is compiled once, and is the same code for any number of copies.

This is loop distribution (Allen and Kennedy 2001, "Optimizing compilers for modern architectures", chapter 2).
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.rng import preserve_rng_state
from pyro_vae._utils.typing import Function
from pyro_vae.compilation import torch_private
from pyro_vae.compilation.kernels import matrix_product
from pyro_vae.compilation.recorder import Node, function_of, mapped

__all__ = ["Program", "is_random", "is_view", "operation_key", "simplified"]

_aten = torch.ops.aten
_ALIASES = {_aten.detach.default, _aten.alias.default}
_EMPTY = {_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default, _aten.empty_strided.default}
_SAME_SHAPE = {_aten.view.default, _aten.expand.default, _aten._unsafe_view.default}
_SEPARATE = {_aten.unsafe_split.Tensor, _aten.unsafe_split_with_sizes.default}
"""Operations whose results share memory with nothing that is used, as in torch's gated recurrent layers."""
_EARLY = {
    _aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.view.default, _aten.expand.default,
    _aten.unsqueeze.default, _aten.squeeze.dim,
}  # fmt: skip
"""Views that cost nothing: of inputs, they are made before all else."""
_COUNTED = {_aten.select.int: (2,), _aten.slice.Tensor: (2, 3), _aten.select_backward.default: (3,)}
"""Operations with arguments that count copies, and the places of these."""
_SUMS = {_aten.add.Tensor: torch.add, _aten.sub.Tensor: torch.sub}
_LINEAR_VIEWS = {_aten.t.default, _aten.transpose.int, _aten.view.default, _aten.permute.default}
_ANY_ORDER = dict.fromkeys([_aten.view.default, _aten._unsafe_view.default], _aten.reshape.default)
"""For operations that need their argument in a certain order of memory: the same for any order."""
_LEAST = 4  # copies that are taken together
_BODY, _MOST_TOGETHER = 48, 8
"""Up to how many operations, and copies of a loop's body, are compiled together: a call takes the time of some."""
_MOST_PERIODS = 12  # that are tried at a place


@dataclass(frozen=True)
class Functional:
    """An operation that changes its first argument in place, as a function that returns a new tensor."""

    func: Any

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return a changed copy."""
        return self.func(x.clone(), *args, **kwargs)


@dataclass(frozen=True)
class Draw:
    """An operation that fills a tensor with random numbers, as a function of its other arguments."""

    func: Any
    form: tuple[torch.Size, torch.dtype, torch.device]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return a new tensor of random numbers."""
        shape, dtype, device = self.form
        return self.func(torch.empty(shape, dtype=dtype, device=device), *args, **kwargs)


def _in_any_order(target: Any) -> Any:
    """Return what computes an operation's values in a head, where stacked values are not stored as in the capture.

    Nothing is changed in place there, so a copy is as good as a view.
    """
    return _ANY_ORDER.get(target, target)


def is_random(target: Any) -> bool:
    """Whether an operation takes numbers of torch's random stream."""
    func = getattr(target, "func", target)
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


@dataclass
class Simplified:
    """A graph whose ``head`` changes nothing in place, and whose ``tail`` changes inputs and its own results alone."""

    inputs: list[Node]
    head: list[Node]
    tail: list[Node]
    results: list[Node]


def simplified(inputs: Sequence[Node], nodes: Sequence[Node], results: Sequence[Node]) -> Simplified | None:
    """Return a graph with the same results that runs equal operations once, or ``None`` where views are changed."""
    given, memory = set(inputs), {node: node for node in inputs}  # memory: the node that has made it, by node
    writes = [torch_private.written_arguments(node.target, node.args, node.kwargs) for node in nodes]
    for node, written in zip(nodes, writes, strict=True):
        base = written[0] if written else node.inputs[0] if is_view(node) else node
        memory[node] = memory.get(base, node)
    outside = (place for place, written in enumerate(writes) if any(memory[one] in given for one in written))
    start = next(outside, len(nodes))
    own = given.union(nodes[start:])
    if any(memory[one] not in own for written in writes[start:] for one in written):
        return None
    head = _values(nodes[:start], writes, memory, nodes, results)
    if head is None:
        return None
    new, kept = head
    tail = []
    for node in nodes[start:]:
        new[node] = Node(node.target, *_renamed(node, new), node.form)
        tail.append(new[node])
    return _without_unused(Simplified(list(inputs), kept, tail, [new.get(node, node) for node in results]))


def _values(
    head: Sequence[Node], writes: list[list[Node]], memory: dict[Node, Node], nodes: Sequence[Node],
    results: Sequence[Node],
) -> tuple[dict[Node, Node], list[Node]] | None:  # fmt: skip
    """Return operations that return new tensors, by the ones that they replace, and those that remain, in order."""
    last: dict[Node, float] = {one: place for place, user in enumerate(nodes) for one in user.inputs}
    last |= dict.fromkeys(results, float("inf"))
    views: dict[Node, list[Node]] = defaultdict(list)
    new: dict[Node, Node] = {}
    known: dict[Any, Node] = {}
    kept: list[Node] = []
    for place, (node, written) in enumerate(zip(head, writes, strict=False)):
        for changed in written:
            if any(one is not changed and last.get(one, -1) > place for one in views[memory[changed]]):
                return None
        views[memory[node]].append(node)
        made = _value(node, *_renamed(node, new), bool(written))
        if made.index == -1 and made.target is not None:
            made.index = 0
            key = operation_key(made)
            first = made if key is None else known.setdefault(key, made)
            if first is made:
                kept.append(made)
            made = first
        new[node] = made
    return new, kept


def _renamed(node: Node, new: dict[Node, Node]) -> tuple[list[Any], dict[str, Any]]:
    def rename(one: Node) -> Node:
        return new.get(one, one)

    return mapped(node.args, rename), {name: mapped(value, rename) for name, value in node.kwargs.items()}


def is_view(node: Node) -> bool:
    """Whether a result shares memory with an argument."""
    if node.target is operator.getitem:
        return node.args[0].target not in _SEPARATE
    return getattr(node.target, "is_view", False) or node.target in _SAME_SHAPE | _ALIASES


def _value(node: Node, args: list[Any], kwargs: dict[str, Any], written: bool) -> Node:
    """Return a node for the value of a node: without change in place, and an older one where that has the value."""
    target, first = node.target, args[0] if args and isinstance(args[0], Node) else None
    if target in _ALIASES and first is not None:
        return first
    if target is _aten.t.default and first is not None and first.target is target:
        return first.args[0]
    if target in _SAME_SHAPE and first is not None and first.form and first.form[0] == node.form[0]:
        return first
    if target is operator.getitem and first is not None and first.target is _aten.unbind.int:
        tensor, dim = first.args[0], first.args[1] if len(first.args) > 1 else 0
        return Node(_aten.select.int, [tensor, dim, args[1]], {}, node.form)
    if not written:
        return Node(target, args, kwargs, node.form)
    if is_random(target) and first is not None and first.target in _EMPTY:
        return Node(Draw(target, node.form), args[1:], kwargs, node.form)
    return Node(torch_private.functional(target) or Functional(target), args, kwargs, node.form)


def operation_key(node: Node) -> Any:
    """Return a key that is equal for equal operations, ``None`` for one with other results each time."""
    if is_random(node.target) or node.target in _EMPTY:
        return None
    return _key([node.target, node.args, node.kwargs])


def _key(value: Any) -> Any:
    """Return a key that is equal for equal arguments."""
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(one)) for name, one in value.items())
    return value if isinstance(value, Node) else (type(value), repr(value))


def _without_unused(graph: Simplified) -> Simplified:
    needed = set(graph.results)
    for node in graph.tail:
        needed.update(node.inputs)
    kept = []
    for node in reversed(graph.head):
        if node in needed or is_random(node.target):
            needed.update(node.inputs)
            kept.append(node)
    early: set[Node] = set(graph.inputs)
    first: list[Node] = []
    others: list[Node] = []
    for node in reversed(kept):
        is_early = node.target in _EARLY and early.issuperset(node.inputs)
        early.update([node] if is_early else [])
        (first if is_early else others).append(node)
    graph.head = first + others
    return graph


def find_regions(nodes: Sequence[Node], fixed: set[Node]) -> list[tuple[int, int, int]]:
    """Return begin, period and number of copies of operations that repeat themselves, from left to right.

    Operations are the same that have the same arguments, apart from nodes that are not ``fixed``, and from numbers
    that count copies.
    """
    numbers: dict[Any, int] = {}
    labels = np.array([numbers.setdefault(_label(node, fixed), len(numbers)) for node in nodes], dtype=np.int64)
    following = np.full(len(nodes), -1)  # the next place of the same label
    place_of: dict[int, int] = {}
    for place in range(len(nodes) - 1, -1, -1):
        following[place] = place_of.get(labels[place], -1)
        place_of[labels[place]] = place
    ends: dict[int, np.ndarray] = {}  # by period: where nodes are no longer those of a period later

    def copies(place: int, period: int) -> int:
        if period not in ends:
            ends[period] = np.append(np.flatnonzero(labels[:-period] != labels[period:]), len(nodes) - period)
        end = ends[period][np.searchsorted(ends[period], place)]
        return int(end - place) // period + 1

    found, place = [], 0
    while place < len(nodes):
        best, other = (0, 0, 0), int(following[place])
        for _ in range(_MOST_PERIODS):
            if other < 0:
                break
            period = other - place
            count = copies(place, period)
            if count >= _LEAST and count * period > best[0]:
                best = (count * period, period, count)
            other = int(following[other])
        size, period, count = best
        if size:
            found.append((place, period, count))
        place += max(size, 1)
    return found


def _label(node: Node, fixed: set[Node]) -> Any:
    counted = _COUNTED.get(node.target, ())
    args = ["#" if place in counted else value for place, value in enumerate(node.args)]

    def name(value: Any) -> Any:
        if isinstance(value, Node):
            return id(value) if value in fixed else ("node", value.form)
        if isinstance(value, list | tuple):
            return tuple(map(name, value))
        return type(value), repr(value)

    return node.target, name(args), tuple((key, name(value)) for key, value in node.kwargs.items()), repr(node.form)


@dataclass(eq=False)
class Region:
    """Copies of the same operations: ``nodes[j][i]`` is operation j of copy i.

    ``slots[j]`` has, for each node among the arguments of operation j, the nodes that stand there in the copies.
    ``before[j]`` has the operations of the region that operation j reads, with how many copies earlier, if the same in
    all copies, ``components`` the operations that depend on each other, in an order in which they can run.
    """

    nodes: list[list[Node]]

    def __post_init__(self) -> None:
        self.count = len(self.nodes[0])
        self.place = {node: (j, i) for j, copies in enumerate(self.nodes) for i, node in enumerate(copies)}
        self.slots = [list(zip(*(node.inputs for node in copies), strict=True)) for copies in self.nodes]
        reads: list[set[int]] = []
        for j, slots in enumerate(self.slots):
            reads.append({self.place[node][0] for seq in slots for node in seq if node in self.place})
            if self.nodes[j][0].target is operator.getitem:  # the results of one operation stay together
                for other in list(reads[j]):
                    reads[other].add(j)
        drawn = [j for j, copies in enumerate(self.nodes) if is_random(copies[0].target)]
        for j, before in zip(drawn, drawn[-1:] + drawn[:-1], strict=True):  # random numbers come in order
            reads[j].add(before)
        self.components = _components(reads)
        self.reads = reads

    def link(self, seq: Sequence[Node], group: Iterable[int]) -> tuple[int, int] | None:
        """Return operation and distance in copies where nodes are those of an operation of a group; -1 if irregular."""
        group = set(group)
        inside = [self.place.get(node, (-1, 0)) for node in seq]
        if not any(j in group for j, _ in inside):
            return None
        j, i = inside[-1]
        distance = len(seq) - 1 - i
        regular = all(one == (j, place - distance) for place, one in enumerate(inside) if place >= distance)
        free = all(one[0] not in group for one in inside[: max(distance, 0)])
        return (j, distance) if regular and free and distance >= 0 else (-1, 0)

    def is_loop(self, group: Sequence[int]) -> bool:
        """Whether operations read their own results of earlier copies."""
        links = [self.link(seq, group) for j in group for seq in self.slots[j]]
        return any(link is not None and link != (link[0], 0) for link in links) or any(
            is_random(self.nodes[j][0].target) for j in group
        )

    def is_regular(self) -> bool:
        """Whether operations that depend on each other have the same distances and arguments in all copies."""
        return not any(
            any(self.link(seq, group) == (-1, 0) for seq in self.slots[j]) or (len(group) > 1 and _is_counted(self, j))
            for group in self.components
            for j in group
        )


def _components(reads: Sequence[Iterable[int]]) -> list[list[int]]:
    """Return the strongly connected components of a graph, each after those that it reads (Tarjan 1972)."""
    found: list[list[int]] = []
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    done: set[int] = set()
    for root in range(len(reads)):
        if root in number:
            continue
        work = [(root, iter(reads[root]))]
        number[root] = low[root] = len(number)
        stack.append(root)
        while work:
            node, others = work[-1]
            other = next(others, None)
            if other is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == number[node]:
                    cut = stack.index(node)
                    found.append(sorted(stack[cut:]))
                    done.update(stack[cut:])
                    del stack[cut:]
            elif other not in number:
                number[other] = low[other] = len(number)
                stack.append(other)
                work.append((other, iter(reads[other])))
            elif other not in done:
                low[node] = min(low[node], number[other])
    return found


class Values:
    """The values of nodes during a run."""

    def __init__(self, place: dict[Node, tuple[Region, int, int]], given: Iterable[tuple[Node, Tensor]]):
        self.single: dict[Node, Any] = dict(given)
        self.stacks: dict[tuple[Region, int], Tensor] = {}  # of all copies
        self.rows: dict[tuple[Region, int], Sequence[Tensor]] = {}
        self.streams: dict[int, Tensor] = {}
        self._place = place

    def __getitem__(self, node: Node) -> Any:
        if node in self.single:
            return self.single[node]
        region, j, i = self._place[node]
        return self.copies((region, j))[i]

    def copies(self, key: tuple[Region, int]) -> Sequence[Tensor]:
        """Return the values of an operation, one for each copy."""
        if key not in self.rows:
            self.rows[key] = self.stacks[key].unbind(0)
        return self.rows[key]

    def stack(self, key: tuple[Region, int]) -> Tensor:
        """Return the values of an operation, stacked."""
        if key not in self.stacks:
            self.stacks[key] = torch.stack(list(self.rows[key]))
        return self.stacks[key]


class Stream:
    """The values of some nodes, one for each copy of an operation that reads them."""

    def __init__(self, nodes: Sequence[Node], place: dict[Node, tuple[Region, int, int]]):
        self.nodes = nodes
        self.is_fixed = len(set(nodes)) == 1
        self.pieces: list[Any] = []  # nodes, and runs of copies of one operation
        for node in nodes:
            if node in place:
                region, j, i = place[node]
                run = self.pieces[-1] if self.pieces else None
                if isinstance(run, _Run) and run.key == (region, j) and run.takes(i):
                    run.copies.append(i)
                else:
                    self.pieces.append(_Run((region, j), [i]))
            else:
                self.pieces.append(node)

    def rows(self, values: Values) -> Sequence[Tensor]:
        """Return the values one by one."""
        return [values[node] for node in self.nodes]

    def stacked(self, values: Values) -> Tensor:
        """Return all values, stacked."""
        if id(self) not in values.streams:
            parts: list[Tensor] = []
            singles: list[Tensor] = []
            for piece in [*self.pieces, None]:
                if isinstance(piece, Node):
                    singles.append(values[piece])
                    continue
                parts += [torch.stack(singles)] if singles else []
                singles = []
                parts += [piece.of(values)] if piece is not None else []
            values.streams[id(self)] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return values.streams[id(self)]


@dataclass
class _Run:
    key: tuple[Region, int]
    copies: list[int]

    def takes(self, copy: int) -> bool:
        step = copy - self.copies[-1]
        return abs(step) == 1 and (len(self.copies) == 1 or step == self.copies[1] - self.copies[0])

    def of(self, values: Values) -> Tensor:
        stack, first, last = values.stack(self.key), self.copies[0], self.copies[-1]
        return stack[first : last + 1] if first <= last else stack[last : first + 1].flip(0)


class Program:
    """A graph that runs its repeated operations together, or in loops.

    Args:
        graph: what to run.
        compile: from a function of tensors, an example of its arguments, and whether the function is the same for any
            number of copies, to a faster function.
    """

    def __init__(self, graph: Simplified, compile: Callable[[Function, Sequence[Tensor], bool], Function]):
        self.graph, self.compile = graph, compile
        self.place: dict[Node, tuple[Region, int, int]] = {}
        self.users: dict[Node, set[Node]] = defaultdict(set)
        for user in [*graph.head, *graph.tail]:
            for node in user.inputs:
                self.users[node].add(user)
        self.kept = set(graph.results).union(*(node.inputs for node in graph.tail))
        self.absorbed: set[Node] = set()
        self._streams: dict[tuple[Node, ...], Stream] = {}
        self.steps: list[Callable[[Values], None]] = []
        self._schedule()
        self._tail = Singles(self, graph.tail)

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Run the graph on its inputs."""
        values = self._run_head(tensors)
        self._tail(values)
        return [values[node] for node in self.graph.results]

    def prepare(self, tensors: Sequence[Tensor]) -> None:
        """Compile all that is compiled, on an example of the inputs, which is not changed."""
        with preserve_rng_state():
            self._tail.prepare(self._run_head(tensors))

    def _run_head(self, tensors: Sequence[Tensor]) -> Values:
        values = Values(self.place, zip(self.graph.inputs, tensors, strict=True))
        with torch.no_grad():
            for step in self.steps:
                step(values)
        return values

    def stream(self, nodes: Sequence[Node]) -> Stream:
        """Return the values of these nodes, one for each copy."""
        key = tuple(nodes)
        if key not in self._streams:
            self._streams[key] = Stream(key, self.place)
        return self._streams[key]

    def _schedule(self) -> None:
        nodes, fixed = self.graph.head, set(self.graph.inputs)
        for node in nodes:
            if node.target in _EARLY and fixed.issuperset(node.inputs):
                fixed.add(node)
        parts: list[Node | Region] = []
        place = 0
        for begin, period, count in find_regions(nodes, fixed):
            parts += nodes[place:begin]
            place = begin + period * count
            while count >= _LEAST:
                copies = [nodes[begin + j : place : period] for j in range(period)]
                region = Region(copies)
                if region.is_regular():
                    parts.append(region)
                    break
                parts += nodes[begin : begin + period]
                begin, count = begin + period, count - 1
            else:
                parts += nodes[begin:place]
        parts += nodes[place:]
        regions = [part for part in parts if isinstance(part, Region)]
        sums = {region: self._sums(region) for region in regions}
        for region in regions:
            self.place |= {
                node: (region, j, i)
                for node, (j, i) in region.place.items()
                if node not in self.absorbed and j not in sums[region]
            }
        singles: list[Node] = []
        for part in [*parts, None]:
            if isinstance(part, Node):
                singles += [] if part in self.absorbed else [part]
                continue
            if singles:
                self.steps.append(Singles(self, singles))
                singles = []
            if part is not None:
                self._schedule_region(part, sums[part])

    def _sums(self, region: Region) -> dict[int, tuple[Function, Node, Callable[[Values], Tensor]]]:
        """Find operations that add up, or subtract, a value of each copy; return sign, start and the sum of terms."""
        found = {}
        for group in region.components:
            j = group[0]
            first, final = region.nodes[j][0], region.nodes[j][-1]
            if len(group) > 1 or first.target not in _SUMS or first.kwargs or len(region.slots[j]) != 2:
                continue
            links = [region.link(seq, group) for seq in region.slots[j]]
            if sorted(map(str, links)) != sorted([str((j, 1)), "None"]):
                continue
            carry = links.index((j, 1))
            if first.target is _aten.sub.Tensor and carry == 1:  # signs alternate
                continue
            terms, start = region.slots[j][1 - carry], region.slots[j][carry][0]
            copies = region.nodes[j]
            alone = all(self.users[one] == {two} and one not in self.kept for one, two in pairwise(copies))
            if alone and all(one.form == final.form for one in (*terms, start)):
                found[j] = (_SUMS[first.target], start, self._sum_of(terms))
        return found

    def _sum_of(self, terms: Sequence[Node]) -> Callable[[Values], Tensor]:
        """Return the sum of nodes: before a linear operation rather than after it, where nothing else reads them."""
        first, same = terms[0], self._are_alike(terms)
        inputs = list(zip(*(node.inputs for node in terms), strict=False)) if same else []
        if same and first.target in _LINEAR_VIEWS and len(inputs) == 1:
            self.absorbed.update(terms)
            inner, rest = self._sum_of(inputs[0]), first.args[1:]
            return lambda values: _in_any_order(first.target)(inner(values), *rest)
        if same and first.target is _aten.mm.default:
            self.absorbed.update(terms)
            return self._sum_of_products(*inputs)
        if same and first.target is _aten._to_copy.default and self._are_products(inputs[0]):
            self.absorbed.update(terms)
            product = self._sum_of(inputs[0])
            return lambda values: first.target(product(values), **first.kwargs)
        if same and first.target is _aten.select_backward.default:
            places = [node.args[3] for node in terms]
            if len(set(places)) == len(places):
                self.absorbed.update(terms)
                return self._placed(inputs[0], first.args[1], first.args[2], places)
        return lambda values: self.stream(terms).stacked(values).sum(0)

    def _are_alike(self, terms: Sequence[Node]) -> bool:
        """Whether nodes are results of the same operation, which nothing but one other node reads."""
        first = terms[0]
        alone = all(
            node.target is first.target and len(self.users[node]) == 1 and node not in self.kept for node in terms
        )
        return alone and len(set(terms)) == len(terms) and len({_label(node, set()) for node in terms}) == 1

    def _are_products(self, terms: Sequence[Node]) -> bool:
        """Whether the sum of nodes is one product, which a processor sums in float32; others would be rounded."""
        return terms[0].target is _aten.mm.default and self._are_alike(terms)

    def _sum_of_products(self, left: Sequence[Node], right: Sequence[Node]) -> Callable[[Values], Tensor]:
        def run(values: Values) -> Tensor:
            a, b = self.stream(left).stacked(values), self.stream(right).stacked(values)
            return matrix_product(a.movedim(0, 1).reshape(a.shape[1], -1), b.reshape(-1, b.shape[2]))

        return run

    def _placed(
        self, terms: Sequence[Node], shape: list[int], dim: int, places: list[int]
    ) -> Callable[[Values], Tensor]:
        """Return a tensor of zeros with these values at places of a dimension."""

        def run(values: Values) -> Tensor:
            rows = self.stream(terms).stacked(values)
            result = rows.new_zeros(shape)
            result.movedim(dim, 0)[torch.tensor(places, device=rows.device)] = rows
            return result

        return run

    def _schedule_region(self, region: Region, sums: dict[int, Any]) -> None:
        waiting = [
            group for group in region.components
            if group[0] not in sums and not all(node in self.absorbed for j in group for node in region.nodes[j])
        ]  # fmt: skip
        done = {j for j in range(len(region.nodes)) if not any(j in group for group in waiting)}
        while waiting:
            together: list[int] = []
            for group in list(waiting):
                if _is_together(region, group) and self._is_ready(region, group, done, together):
                    together += group
                    waiting.remove(group)
            if together:
                self.steps.append(Together(self, region, sorted(together)))
            else:
                group = next(group for group in waiting if self._is_ready(region, group, done, []))
                waiting.remove(group)
                together = group
                counted = len(group) == 1 and _is_counted(region, group[0])
                if counted and (step := Counted.of(self, region, group[0])) is not None:
                    self.steps.append(step)
                else:
                    self.steps.append(Loop(self, region, group, counted))
            done.update(together)
        for j, (combine, start, terms) in sums.items():
            self.steps.append(partial(_add_up, region.nodes[j][-1], combine, start, terms))

    def _is_ready(self, region: Region, group: Sequence[int], done: set[int], together: Sequence[int]) -> bool:
        """Whether what operations read is done, or stands in the same copy of operations that run with them."""
        inside = {*group, *together}
        for j in group:
            if not region.reads[j] <= done | inside:
                return False
            for seq in region.slots[j]:
                link = region.link(seq, inside)
                if link is not None and link[1] != 0 and together:
                    return False
                if link == (-1, 0):
                    return False
        return True


def _add_up(result: Node, combine: Function, start: Node, terms: Callable[[Values], Tensor], values: Values) -> None:
    values.single[result] = combine(values[start], terms(values))


class Singles:
    """Operations that run one by one."""

    def __init__(self, program: Program, nodes: Sequence[Node]):
        own = set(nodes)
        self.program = program
        self.inputs = list(dict.fromkeys(one for node in nodes for one in node.inputs if one not in own))
        tail = nodes is program.graph.tail
        outside = set(program.graph.results) if tail else program.kept
        self.results = [node for node in nodes if node in outside or not program.users[node] <= own]
        self._run = function_of(self.inputs, nodes, self.results, *([] if tail else [_in_any_order]))

    def __call__(self, values: Values) -> None:
        """Compute the values."""
        for node, value in zip(self.results, self._run(*map(values.__getitem__, self.inputs)), strict=True):
            values.single[node] = value

    def prepare(self, values: Values) -> None:
        """Compile the operations."""
        self._run = self.program.compile(self._run, [values[node] for node in self.inputs], True)


def _is_counted(region: Region, j: int) -> bool:
    first, second = region.nodes[j][:2]
    return any(first.args[place] != second.args[place] for place in _COUNTED.get(first.target, ()))


def _is_together(region: Region, group: Sequence[int]) -> bool:
    """Whether operations can run on all copies together."""
    return not region.is_loop(group) and not any(_is_counted(region, j) for j in group)


class Body:
    """Operations of a region as a function: ``links`` to earlier copies first, then ``streams``, then what is fixed."""

    def __init__(self, program: Program, region: Region, group: Sequence[int]):
        self.links: dict[tuple[int, int], Node] = {}
        self.starts: dict[tuple[int, int], Sequence[Node]] = {}
        self.streams: dict[Stream, Node] = {}
        self.nodes: list[Node] = []
        made: dict[int, Node] = {}
        for j in group:
            first = region.nodes[j][0]
            slots = iter(region.slots[j])

            def parameter(_: Node, slots: Iterator[Any] = slots) -> Node:
                seq = next(slots)
                link = region.link(seq, group)
                if link is None:
                    return self.streams.setdefault(program.stream(seq), Node(None))
                if link[1] == 0:
                    return made[link[0]]
                self.starts[link] = seq[: link[1]]
                return self.links.setdefault(link, Node(None))

            args = mapped(first.args, parameter)
            kwargs = {name: mapped(value, parameter) for name, value in first.kwargs.items()}
            made[j] = Node(first.target, args, kwargs)
            self.nodes.append(made[j])
        inside = set(group)
        self.results = [
            j for j in group
            if any(link[0] == j for link in self.links) or any(
                node in program.kept or any(not _inside(region, user, inside, i) for user in program.users[node])
                for i, node in enumerate(region.nodes[j])
            )
        ]  # fmt: skip
        parameters = [*(self.links[link] for link in self.starts), *self.streams.values()]
        self.run = function_of(parameters, self.nodes, [made[j] for j in self.results], _in_any_order)


def _inside(region: Region, user: Node, group: set[int], copy: int) -> bool:
    place = region.place.get(user)
    return place is not None and place[0] in group and place[1] == copy


class Together:
    """Operations that run on all copies at once."""

    def __init__(self, program: Program, region: Region, group: Sequence[int]):
        self.program, self.region, self.body = program, region, Body(program, region, group)
        self._run: Function | None = None

    def __call__(self, values: Values) -> None:
        """Compute the values of all copies."""
        streams = list(self.body.streams)
        tensors = [values[one.nodes[0]] if one.is_fixed else one.stacked(values) for one in streams]
        if self._run is None:
            dims = tuple(None if one.is_fixed else 0 for one in streams)
            self._run = self.program.compile(_batched(self.body, dims, self.region.count), tensors, False)
        for j, stack in zip(self.body.results, self._run(*tensors), strict=True):
            values.stacks[self.region, j] = stack


def _batched(body: Body, dims: tuple[int | None, ...], count: int) -> Function:
    def run(*tensors: Tensor) -> list[Tensor]:
        if all(dim is None for dim in dims):
            return [result.expand(count, *result.shape) for result in body.run(*tensors)]
        with torch_private.quiet_vmap():
            return list(torch.vmap(lambda *args: tuple(body.run(*args)), dims)(*tensors))

    return run


class Loop:
    """Operations that run copy by copy."""

    def __init__(self, program: Program, region: Region, group: Sequence[int], counted: bool):
        self.program, self.region, self.group, self.counted = program, region, group, counted
        self.body = Body(program, region, group)
        self._run: Function | None = None
        self._plain = len(group) == 1
        self._own = set(region.nodes[group[0]])
        longest = max((distance for _, distance in self.body.starts), default=1)
        self._chunk = max(longest, min(_MOST_TOGETHER, _BODY // len(group)))  # copies that are compiled together

    def __call__(self, values: Values) -> None:
        """Compute the values of all copies, one after the other."""
        if self._plain:
            self._run_single(values)
            return
        body, size = self.body, self._chunk
        streams = [values[one.nodes[0]] if one.is_fixed else one.stacked(values).contiguous() for one in body.streams]
        states = [values[node].contiguous() for nodes in body.starts.values() for node in nodes]
        parts: list[list[Tensor]] = []
        for begin in range(0, self.region.count, size):
            copies = min(size, self.region.count - begin)
            rows = [
                stream if one.is_fixed else stream[begin : begin + copies]
                for stream, one in zip(streams, body.streams, strict=True)
            ]
            if copies < size:
                parts.append(self._several(copies, [*states, *rows]))
                break
            if self._run is None:
                self._run = self.program.compile(partial(_in_turn, self._several, size), [*states, *rows], True)
            parts.append(self._run(*states, *rows))
            done = dict(zip(body.results, parts[-1], strict=True))
            states = [done[j][row] for j, distance in body.starts for row in range(size - distance, size)]
        for j, *stacks in zip(body.results, *parts, strict=True):
            values.stacks[self.region, j] = torch.cat(stacks)

    def _several(self, copies: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run some copies, from results of earlier ones and rows of the streams; return the results, stacked."""
        given = iter(tensors)
        before = {link: [next(given) for _ in nodes] for link, nodes in self.body.starts.items()}
        streams = [[next(given)] * copies if one.is_fixed else next(given).unbind(0) for one in self.body.streams]
        done: dict[int, list[Tensor]] = {j: [] for j in self.body.results}
        for copy in range(copies):
            links = [(before[j, d] + done[j])[copy] for j, d in self.body.starts]
            found = self.body.run(*links, *[rows[copy] for rows in streams])
            for results, result in zip(done.values(), found, strict=True):
                results.append(result)
        return [torch.stack(results) for results in done.values()]

    def _run_single(self, values: Values) -> None:
        (j,) = self.group
        nodes = self.region.nodes[j]
        rows: list[Tensor] = []
        for node in nodes:
            given = {one: rows[self.region.place[one][1]] for one in node.inputs if one in self._own}
            args, kwargs = _renamed_values(node, given, values)
            rows.append(_in_any_order(node.target)(*args, **kwargs))
        values.rows[self.region, j] = rows


def _renamed_values(node: Node, own: dict[Node, Tensor], values: Values) -> tuple[list[Any], dict[str, Any]]:
    def value(one: Node) -> Any:
        return own[one] if one in own else values[one]

    return mapped(node.args, value), {name: mapped(one, value) for name, one in node.kwargs.items()}


def _in_turn(several: Function, copies: int, *tensors: Tensor) -> list[Tensor]:
    return several(copies, tensors)


class Counted:
    """A selection of rows of one tensor, of all copies at once."""

    def __init__(self, region: Region, j: int, dim: int, start: int, step: int, width: int):
        self.region, self.j, self.dim, self.start, self.step, self.width = region, j, dim, start, step, width

    @staticmethod
    def of(program: Program, region: Region, j: int) -> "Counted | None":
        """Return the step, if rows of one tensor are selected at equal distances."""
        nodes = region.nodes[j]
        first = nodes[0]
        if first.target not in (_aten.select.int, _aten.slice.Tensor) or len(set(region.slots[j][0])) > 1:
            return None
        size = first.args[0].form[0][first.args[1]]
        ends = [(one.args[2], one.args[3] if first.target is _aten.slice.Tensor else one.args[2] + 1) for one in nodes]
        if len(first.args) > 4 or not all(0 <= begin < end <= size for begin, end in ends):
            return None
        steps, widths = {two[0] - one[0] for one, two in pairwise(ends)}, {end - begin for begin, end in ends}
        if len(steps) > 1 or len(widths) > 1:
            return None
        dim = first.args[1] % len(first.args[0].form[0])
        width = widths.pop() if first.target is _aten.slice.Tensor else 0
        return Counted(region, j, dim, ends[0][0], steps.pop(), width)

    def __call__(self, values: Values) -> None:
        """Compute the values of all copies."""
        tensor, span = values[self.region.slots[self.j][0][0]], abs(self.step)
        last = self.start + (self.region.count - 1) * self.step
        first, size = min(self.start, last), (self.region.count - 1) * span + max(1, self.width)
        windows = tensor.narrow(self.dim, first, size).unfold(self.dim, max(1, self.width), span).movedim(self.dim, 0)
        windows = windows.movedim(-1, self.dim + 1) if self.width else windows.squeeze(-1)
        values.stacks[self.region, self.j] = windows if self.step > 0 else windows.flip(0)
