"""Record the operations of a function of tensors, and refuse a function that reads the value of a tensor."""

import operator
import os
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vae._utils.typing import Function
from pyro_vae.compilation import torch_private

__all__ = [
    "CaptureError", "Node", "Recorder", "address", "ancestors", "checked_hook", "foreign_random_numbers",
    "from_outside", "function_of", "is_recording", "mapped", "module_of", "nodes_in",
]  # fmt: skip

Value = Any
"""Of an argument: a node, a number or another constant, or a list of them."""


class CaptureError(ValueError):
    """Error for a function that cannot be captured: it does not run the same operations on all data."""


class Node:
    """A tensor in a graph: an input, without a ``target``, or the result of an operation.

    A node of an operation with several results is followed by one of ``operator.getitem`` for each.
    """

    __slots__ = ("args", "form", "index", "kwargs", "target")

    def __init__(
        self, target: Any, args: Sequence[Value] = (), kwargs: dict[str, Value] | None = None, form: Any = None
    ):
        self.target, self.args, self.kwargs, self.form = target, args, kwargs or {}, form
        self.index = -1  # in the order of its graph

    @property
    def inputs(self) -> list["Node"]:
        """The nodes among the arguments."""
        return nodes_in([self.args, list(self.kwargs.values())])

    def __str__(self) -> str:
        named = [f"{name}={_written(value)}" for name, value in self.kwargs.items()]
        return f"v{self.index} = {self.target}({', '.join([*map(_written, self.args), *named])})"


def _written(value: Value) -> str:
    if isinstance(value, Node):
        return f"v{value.index}"
    return f"[{', '.join(map(_written, value))}]" if isinstance(value, list | tuple) else repr(value)


def nodes_in(value: Value) -> list[Node]:
    """Return the nodes of an argument, in order."""
    if isinstance(value, Node):
        return [value]
    return [node for item in value for node in nodes_in(item)] if isinstance(value, list | tuple) else []


def mapped(value: Value, replace: Callable[[Node], Any]) -> Any:
    """Return an argument with its nodes replaced."""
    if isinstance(value, Node):
        return replace(value)
    return [mapped(item, replace) for item in value] if isinstance(value, list | tuple) else value


def ancestors(nodes: Sequence[Node]) -> list[Node]:
    """Return nodes and all that they are computed from."""
    found, left = dict.fromkeys(nodes), list(nodes)
    while left:
        for node in left.pop().inputs:
            if node not in found:
                found[node] = None
                left.append(node)
    return list(found)


def _is_settled(node: Node) -> bool:
    """Whether a node is an integer or truth value from outside, or the same operation on such ones each time."""
    if node.target is None:
        dtype = node.form[1]
        return not (dtype.is_floating_point or dtype.is_complex)
    if node.target is operator.getitem:
        return True
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not (random or torch_private.operation_schema(node.target).is_mutable)


def module_of(inputs: Sequence[Node], nodes: Sequence[Node], results: Sequence[Node]) -> torch.fx.GraphModule:
    """Return nodes as a module of torch, a function of the inputs."""
    graph, made = torch.fx.Graph(), {}
    for place, node in enumerate(inputs):
        made[node] = graph.placeholder(f"input_{place}")
    for node in nodes:
        keywords = {name: mapped(value, made.__getitem__) for name, value in node.kwargs.items()}
        made[node] = graph.call_function(node.target, tuple(mapped(node.args, made.__getitem__)), keywords)
    graph.output([made[node] for node in results])
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def function_of(
    inputs: Sequence[Node], nodes: Sequence[Node], results: Sequence[Node], called: Function = lambda target: target
) -> Function:
    """Return nodes as a Python function of the inputs, which returns a list and lets go of what is no longer used.

    ``called`` returns the function that an operation is called by.
    """
    names = {node: f"v{place}" for place, node in enumerate([*inputs, *nodes])}
    known: dict[str, Any] = {}  # the operations and constants, by name

    def constant(value: Any) -> str:
        if type(value) in (int, bool, type(None)):
            return repr(value)
        known[f"c{len(known)}"] = value
        return f"c{len(known) - 1}"

    def text(value: Value) -> str:
        if isinstance(value, Node):
            return names[value]
        return f"[{', '.join(map(text, value))}]" if isinstance(value, list | tuple) else constant(value)

    last = {node: place for place, user in enumerate(nodes) for node in user.inputs}
    ends: dict[int, list[str]] = {}
    kept = set(results)
    for node, place in last.items():
        if node not in kept:
            ends.setdefault(place, []).append(names[node])
    lines = [f"def run({', '.join(names[node] for node in inputs)}):"]
    for place, node in enumerate(nodes):
        arguments = [*map(text, node.args), *[f"{name}={text(value)}" for name, value in node.kwargs.items()]]
        unused = [] if node in last or node in kept else [names[node]]
        line = f"{names[node]} = {constant(called(node.target))}({', '.join(arguments)})"
        lines.append("  " + "; ".join([line, *[f"{name} = None" for name in ends.get(place, []) + unused]]))
    lines.append(f"  return [{', '.join(names[node] for node in results)}]")
    exec(compile("\n".join(lines), "<captured graph>", "exec"), known)
    return known["run"]


class Recorder(torch_private.TorchDispatchMode):
    """Record the operations of a function as a graph, and undo its in-place changes at the end.

    Refuse operations whose results are Python numbers, or have a shape that depends on values, unless they are computed
    from integers and truth values that come from outside, such as the lengths of sequences: then they are
    :attr:`reads`. Tensors that come from outside are :attr:`constants`, further inputs of the graph after those of the
    function.
    """

    def __init__(self, inputs: Sequence[Tensor], decompositions: dict[Any, Callable[..., Any]]):
        super().__init__()
        self.site, self.decompositions = _LastSite(), decompositions
        self.constants: list[Tensor] = []
        self.written: list[Tensor] = []  # by the function, of what comes from outside
        self.inputs: list[Node] = []  # and then the constants
        self.nodes: list[Node] = []
        self._known: dict[int, Node] = {}  # by the id of a tensor that is alive
        self._ends: dict[int, Any] = {}  # weak references, which forget a tensor at the end of its life
        self._memory: dict[int, torch_private.StorageWeakRef] = {}  # of results, by their addresses
        self._numbers: dict[Node, Tensor] = {}  # numbers in the code of the function
        self._copies: dict[int, Tensor] = {}  # of what is written, by id
        self._hidden: list[Tensor] = []  # results in a pause, kept alive so that no other tensor gets their address
        self.reads: list[tuple[Node, Tensor]] = []  # nodes whose values were read, with these
        self._paused = False
        self._alive = list(inputs)
        for tensor in inputs:
            self._input(tensor)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the operations of a block, and undo its in-place changes after it."""
        _active.append(self)
        try:
            with self.site, _ValueAccessGuard(self), self:
                yield
        except CaptureError:
            raise
        except RuntimeError as error:
            raise _not_capturable(self.site, error) from error
        finally:
            _active.pop()
            with torch.no_grad():
                for tensor in reversed(self.written):  # where tensors overlap, the first copy is the oldest
                    tensor.copy_(self._copies[id(tensor)])
            self._copies.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the operations of a block, which checks values, out of the graph."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def forget(self, tensor: Tensor) -> None:
        """Take a tensor that was made in a pause as one from outside."""
        self._hidden = [one for one in self._hidden if address(one) != address(tensor)]

    def read(self, tensors: Sequence[Tensor], as_size: bool = False) -> bool:
        """Whether the values of tensors may be read: they are computed from integers and truth values from outside.

        With ``as_size``, they may be computed from floats among the inputs: ``int(counts.sum())``.
        """
        nodes = [node for tensor in tensors if (node := self._known.get(id(tensor))) is not None]
        floats = self.inputs[: len(self._alive)] if as_size else []
        if len(nodes) < len(tensors) or not all(node in floats or _is_settled(node) for node in ancestors(nodes)):
            return False
        with self.paused():
            self.reads += [(node, tensor.detach().clone()) for node, tensor in zip(nodes, tensors, strict=True)]
        return True

    def results(self, tensors: Sequence[Tensor]) -> list[Node]:
        """Number all nodes, and return those of the results."""
        found = self._mapped(list(tensors))
        for index, node in enumerate([*self.inputs, *self.nodes]):
            node.index = index
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            result = func(*args, **kwargs)
            self._hidden += [tensor for tensor in _listed(result) if isinstance(tensor, Tensor)]
            return result
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        replaced = self._replaced(func, args, kwargs)
        if replaced is not NotImplemented:
            return replaced
        if func is _aten.lift_fresh.default:  # a tensor of numbers in the code, whose copy may be changed in place
            func = _aten.lift_fresh_copy.default
        if torch.Tag.dynamic_output_shape in func.tags and not _indexes_by_numbers(func, args):
            operation, args = func.__name__.partition(".")[0], self._with_places(func, args)
            if args is None:
                raise _data_dependent(f"{self.site} makes a tensor whose shape depends on values ({operation})")
            if func is _aten.nonzero.default:
                return func(*args)  # the same in each replay, and so a constant
        if kwargs.get("generator") is not None:
            raise foreign_random_numbers(self.site, "a torch.Generator of its own")
        arguments, keywords = self._mapped(args), {name: self._mapped(value) for name, value in kwargs.items()}
        writes = self._keep_written(func, args, kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor | list | tuple) and result is not None:
            return self._number(func, arguments, args, result)
        node = self._made(func, arguments, keywords)
        fresh = not writes and not func.is_view
        if isinstance(result, Tensor):
            self._track(result, node, fresh)
            self._follow_number(func, node, result, writes)
        else:
            for place, tensor in enumerate(_listed(result)):  # such as of a split
                if isinstance(tensor, Tensor):
                    self._track(tensor, self._made(operator.getitem, [node, place]), fresh)
        return result

    def _with_places(self, func: Any, args: Any) -> Any:
        """Return arguments with the numbers of the true places in the place of masks, if these may be read."""
        masks = list(filter(_is_mask, args[1])) if func is _aten.index.Tensor else [args[0]]
        if func not in _BY_MASK or not self.read(masks):
            return None
        if func is _aten.nonzero.default:
            return args
        places = [one.nonzero(as_tuple=True) if _is_mask(one) else (one,) for one in args[1]]
        return args[0], [each for of_one in places for each in of_one]

    def _replaced(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run and record other operations in the place of one that has a replacement, or is made of others."""
        replacement = self.decompositions.get(func)
        if replacement is not None:
            with self:
                result = replacement(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in _BASIC:
            return NotImplemented
        with self:
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            _BASIC.add(func)
        return result

    def _made(self, func: Any, args: list[Value], kwargs: dict[str, Value] | None = None) -> Node:
        node = Node(func, args, kwargs)
        self.nodes.append(node)
        return node

    def _mapped(self, value: Any) -> Value:
        """Replace tensors by their nodes."""
        if isinstance(value, Tensor):
            return self._known.get(id(value)) or self._constant(value)
        if isinstance(value, list | tuple):
            return [self._mapped(item) for item in value]
        return value

    def _constant(self, tensor: Tensor) -> Node:
        """Take a tensor from outside as a further input of the graph."""
        place = address(tensor)
        computed = place in self._memory and not self._memory[place].expired()
        if tensor.numel() and (computed or any(address(one) == place for one in self._hidden)):
            raise CaptureError(
                f"`compile` must be False where results are hidden from the capture: {self.site} computes tensors "
                "outside of it, as by a subclass of torch.Tensor, which would have the same values in every step. "
                "Leave `compile` out"
            )
        self.constants.append(tensor)
        return self._input(tensor)

    def _input(self, tensor: Tensor) -> Node:
        node = Node(None)
        self.inputs.append(node)
        self._track(tensor, node)
        return node

    def _track(self, tensor: Tensor, node: Node, fresh: bool = False) -> None:
        """Know a tensor from now on as the result of a node; ``fresh`` if the node has made its memory."""
        key = id(tensor)
        self._known[key] = node
        node.form = tensor.shape, tensor.dtype, tensor.device
        if key not in self._ends:
            self._ends[key] = weakref.ref(tensor, lambda _: (self._known.pop(key, None), self._ends.pop(key, None)))
        if fresh:
            self._memory[address(tensor)] = torch_private.StorageWeakRef(tensor.untyped_storage())

    def _number(self, func: Any, arguments: Any, tensors: Any, result: Any) -> Any:
        """Return a Python number that an operation computes from numbers of the code alone; refuse any other."""
        frame = sys._getframe(1)
        while frame.f_back is not None and _module(frame).startswith(("torch.", __name__, _PRECISION)):
            frame = frame.f_back
        if all(node in self._numbers for node in nodes_in(arguments)) or _module(frame).startswith(_CHECKS):
            return result
        if self.read([tensor for tensor in _listed(tensors) if isinstance(tensor, Tensor)]):
            return result
        raise _data_dependent(f"{self.site} reads the value of a tensor ({func.__name__.partition('.')[0]})")

    def _follow_number(self, func: Any, node: Node, result: Tensor, writes: bool) -> None:
        if writes or torch.Tag.nondeterministic_seeded in func.tags:
            for changed in node.inputs:
                self._numbers.pop(changed, None)
        elif result.numel() <= 1 and (
            func is _aten.lift_fresh_copy.default or all(one in self._numbers for one in node.inputs)
        ):
            self._numbers[node] = result

    def _keep_written(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Copy what an operation will change in place, if it comes from outside; return whether it changes anything."""
        schema = torch_private.operation_schema(func)
        places = list(_UNDECLARED_WRITES.get(func, ()))
        if schema.is_mutable and torch.Tag.inplace_view not in func.tags:  # these change the shape alone
            written = (one.alias_info is not None and one.alias_info.is_write for one in schema.arguments)
            places += [place for place, writes in enumerate(written) if writes]
        for place in places:
            value = args[place] if place < len(args) else kwargs.get(schema.arguments[place].name)
            for tensor in _listed(value):
                if tensor is not None and id(tensor) not in self._copies and not self._is_result(tensor):
                    self._copies[id(tensor)] = tensor.detach().clone()
                    self.written.append(tensor)
        return bool(places)

    def _is_result(self, tensor: Tensor) -> bool:
        place = address(tensor)
        return place in self._memory and not self._memory[place].expired()


def is_recording() -> bool:
    """Whether operations are being recorded."""
    return bool(_active)


def from_outside(make: Callable[[], Tensor]) -> Tensor:
    """Return the tensor of a function as one that comes from outside of what is being recorded."""
    with ExitStack() as stack:
        for recorder in _active:
            stack.enter_context(recorder.paused())
        tensor = make()
    for recorder in _active:
        recorder.forget(tensor)
    return tensor


def address(tensor: Tensor) -> int:
    """Return where a tensor and its views lie in memory."""
    return tensor.untyped_storage().data_ptr()


def _indexes_by_numbers(func: Any, args: Any) -> bool:
    """Whether an operation is ``x[rows]``, whose shape is known, and not ``x[x > 0]``."""
    if func is not _aten.index.Tensor:
        return False
    return not any(map(_is_mask, args[1]))


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _data_dependent(what: str) -> CaptureError:
    return CaptureError(
        f"`compile` must be False where the operations depend on data: {what}. Use `torch.where` or `poutine.mask`, or "
        "leave `compile` out"
    )


def _not_capturable(site: "_LastSite", error: Exception) -> CaptureError:
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CaptureError(
        f"`compile` must be False where torch cannot record an operation: {site} ends in {type(error).__name__}"
        f"{_line_of(error)}: {first_line}. Use another operation there, or leave `compile` out"
    )


def _line_of(error: Exception) -> str:
    """Name the last line of the user's code that led to an error."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not any(f"{os.sep}{package}{os.sep}" in frame.filename for package in ("torch", "pyro", "pyro_vae")):
            return f" ({frame.filename}, line {frame.lineno}: {frame.line})"
    return ""


def foreign_random_numbers(site: "_LastSite", source: str) -> CaptureError:
    """Return the error for random numbers that a replay would not draw."""
    return CaptureError(
        f"`compile` must be False where random numbers are not torch's: {site} draws some from {source}, which would "
        "be the same in every step. Use those of torch without a generator, or leave `compile` out"
    )


def checked_hook(hook: Function, name: str) -> Function:
    """Return a hook on gradients that raises where it returns nothing: a replay runs its operations alone, not it."""

    def run(*gradients: Any) -> Any:
        result = hook(*gradients)
        if result is None:
            raise CaptureError(
                f"`compile` must be False where a hook on gradients returns nothing, got one at {name}: captured "
                "steps repeat the operations by which a hook changes a gradient, and would not call it, such as to log "
                "a norm. Let it return a gradient, read `.grad` in steps without `compile`, or leave the hook out"
            )
        return result

    return run


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


class _LastSite(Messenger):
    """The sample site that ran last, for errors."""

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            self.name = msg["name"]

    def __str__(self) -> str:
        return "the function" if self.name is None else f"the model or guide, at or after site {self.name!r},"


_VALUE_READS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__bool__", "__int__", "__float__")
} | {Tensor.__index__, torch.equal, torch.allclose, torch.is_nonzero}
"""The functions by which Python reads the value of a tensor."""

_PRECISION = "pyro_vae.compilation.precision"
"""The module that runs products in bfloat16, in handlers between the code and the function that it calls."""

_TORCH_CALLERS = (
    "torch.fx.", "torch._tensor", "torch.functional", "torch.overrides", _PRECISION
)  # fmt: skip
"""Modules between the code that reads a value and the function that it calls for that."""
_LOSS_SUMS = ("pyro.infer.", "pyro_vae.objectives.particle_elbo")
"""Modules that take the value of a loss only to sum and return it."""
_CHECKS = (
    "pyro.util", "pyro.infer.", "pyro.poutine.", "torch.distributions.distribution",
    "pyro_vae._utils.validation", "pyro_vae.datasets", "pyro_vae.distributions",
    "pyro_vae.objectives.importance_weighted", "pyro_vae.objectives.particles", "pyro_vae.objectives.score_function",
    "pyro_vae.parts.base", "pyro_vae.parts.families",
)  # fmt: skip
"""Modules that read values only to warn or raise: their operations are otherwise the same on all data."""

_MOMENTUM = ("torch.optim.sgd", "torch.optim.rmsprop")
"""Modules that compare a scheduled momentum with 0; a captured step has one above 0 all the time."""

_WATCHED = {Tensor.masked_select, Tensor.nonzero, Tensor.register_hook}
"""Further functions that a capture replaces in some modules."""

_PAIRS = "pyro.infer.energy_distance"
"""The module that lists the pairs of particles, which depend on their number alone."""

_WARNINGS = "pyro.util"
"""The module that registers hooks on gradients to warn of NaN; a captured step checks its gradients itself."""

_DICE = "pyro.infer.util"
"""The module that drops states of probability zero from a sum if there are any; a capture keeps them, as zeros."""


class _ValueAccessGuard(TorchFunctionMode):
    """Refuse to read the value of a tensor, except where it is summed up (the tensor is returned) or only checked."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.site, self.recorder = recorder.site, recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        if func not in _VALUE_READS and func not in _WATCHED:
            return func(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        while frame.f_back is not None and _module(frame).startswith(_TORCH_CALLERS):
            frame = frame.f_back
        caller = _module(frame)
        if func is Tensor.register_hook:  # Pyro's hooks warn where a gradient is not finite
            return None if caller == _WARNINGS else func(args[0], checked_hook(args[1], _place(frame)))
        if func is Tensor.nonzero:  # of a matrix of ones below the diagonal
            pairs = caller == _PAIRS
            if not pairs:
                return func(*args, **(kwargs or {}))
            return torch.tril_indices(len(args[0]), len(args[0]), -1, device=args[0].device).t()
        if func is Tensor.__bool__ and caller == _DICE:
            return False
        if func is Tensor.masked_select:
            return torch.where(args[1], args[0], 0.0) if caller == _DICE else func(*args, **(kwargs or {}))
        if func is Tensor.item and caller.startswith(_LOSS_SUMS):
            return args[0].detach().double()  # as Python's numbers are
        if caller.startswith(_CHECKS) or (func is Tensor.__bool__ and caller in _MOMENTUM):
            with self.recorder.paused():
                return func(*args, **(kwargs or {}))
        if self.recorder.read([arg for arg in args if isinstance(arg, Tensor)], func is Tensor.__int__):
            with self.recorder.paused():
                return func(*args, **(kwargs or {}))
        where = f"({_place(frame)}: {func.__name__})"
        raise _data_dependent(f"{self.site} reads the value of a tensor {where}")


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """Compute torch's ``one_hot``, which reads all values to check their range, without that check."""
    if num_classes < 0:  # the number of classes, a shape, is then read from the values
        return torch.nn.functional.one_hot(tensor, num_classes)
    return (tensor[..., None] == torch.arange(num_classes, device=tensor.device)).long()


_aten = torch.ops.aten
_UNDECLARED_WRITES = dict.fromkeys(
    (_aten.native_batch_norm.default, _aten.cudnn_batch_norm.default, _aten.miopen_batch_norm.default), (3, 4)
)
"""Operations that change arguments in place without declaring it: running mean and variance."""

_BY_MASK = {_aten.index.Tensor, _aten.nonzero.default}
"""Operations that take as many elements as a mask is true."""

_BASIC: set[Any] = set()
"""Operations that are not made of others, as far as they were met."""

_active: list[Recorder] = []
"""What records at present."""
