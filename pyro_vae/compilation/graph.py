"""A function of tensors, run once and kept: as the graph of the operations that it ran, compiled and replayed.

What Python does around the operations (Pyro's handlers, shapes, sites) is then paid for once. It must be the same in
every run: what asks a tensor for its value is refused by name.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae._utils.rng import preserve_rng_state, random_states
from pyro_vae.compilation.kernels import decompositions

__all__ = ["CaptureError", "CompiledFunction", "Forms", "Graph", "compiling", "input_signature"]

Function = Callable[..., Sequence[Tensor]]


Forms = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device], ...]
"""Of tensors, what a graph is captured for."""


_QUESTIONS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__bool__", "__int__", "__float__")
} | {Tensor.__index__, torch.equal, torch.allclose, torch.is_nonzero}
"""How Python asks a tensor for its value."""


_BETWEEN = ("torch.fx.", "torch._tensor", "torch.functional", "torch.overrides")
"""Modules through which a question passes."""


_SUMS = ("pyro.infer.", "pyro_vae.objectives.particle_elbo")
"""Modules that take the value of a loss only to add it up and return it."""


_CHECKS = (
    *("pyro.util", "pyro.infer.", "pyro.poutine.", "torch.distributions.distribution"),
    *(
        "pyro_vae._utils.validation",
        "pyro_vae.datasets",
        "pyro_vae.distributions",
        "pyro_vae.objectives.particles",
        "pyro_vae.parts.families",
        "pyro_vae.distributions.missing",
    ),
    *("pyro_vae.parts.base", "pyro_vae.objectives.score_function", "pyro_vae.objectives.importance_weighted"),
)
"""Modules that ask only to warn or raise, and do the same with every answer otherwise."""


_DICE = "pyro.infer.util"
"""Module that leaves states of probability zero out of a sum, if there are any; captured, they are zeros in it."""


_OPTIONS: dict[str, Any] = {
    "fallback_random": True,  # random numbers are those of the eager step
    "size_asserts": False,
}
"""Of inductor."""


_ON_PROCESSORS = {
    "cpp_wrapper": True,  # from one kernel to the next without Python
    "cpp.min_chunk_size": 2**14,  # numbers for each thread: to share fewer takes longer than to work on them
}
"""Of inductor, where no tensor is on another device: for CUDA, C++ needs headers that come apart from torch."""


_NO_COMPILER = ("InvalidCxxCompiler", "CppCompileError")
"""Errors of inductor, which it hands on inside of others."""


_OTHER_NOISE = (
    "draws random numbers of {}, which a replay does not draw anew. Accepted are those of torch, without a generator, "
    "or to leave `compile` out"
)


_aten = torch.ops.aten


_WRITES_UNTOLD = dict.fromkeys(
    (_aten.native_batch_norm.default, _aten.cudnn_batch_norm.default, _aten.miopen_batch_norm.default), (3, 4)
)
"""Operations that change arguments in place without a word of it in their schema: running mean and variance."""


class CaptureError(ValueError):
    """A function that is not the same in every run, and cannot be kept as a graph."""


class Graph:
    """The operations of a function on its inputs and on the tensors that it knows by itself, such as parameters.

    A call repeats them on new inputs, and changes in place what the function changes in place. The capture itself
    leaves all tensors and random states as they are.

    Args:
        function: of tensors, which returns tensors.
        inputs: an example of its arguments. Calls must have the same shapes, strides and dtypes.

    Attributes:
        written: the tensors from outside that the function changes.

    Raises:
        CaptureError: if the function asks a tensor for its value, its shapes depend on values, or it draws random
            numbers elsewhere than from torch's random state.

    >>> total = torch.zeros(())
    >>> graph = Graph(lambda x: [total.add_(x.sum()) + 0], [torch.ones(3)])
    >>> total
    tensor(0.)
    >>> graph(torch.ones(3)), graph(torch.ones(3))
    ([tensor(3.)], [tensor(6.)])
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor]):
        where = _LastSite()
        undo = _InPlaceRollback(where)
        with preserve_rng_state(), pyro.validation_enabled(False), undo, where, _ValueAccessGuard(where):
            before = random_states()[0]
            try:
                module = make_fx(lambda *args: list(function(*args)), decomposition_table=decompositions)(*inputs)
            except RuntimeError as error:
                if "tracing tensor" not in str(error):
                    raise
                raise CaptureError(f"{where}: asks a tensor for its value") from error
            if random_states()[0] != before:
                raise CaptureError(f"{where} {_OTHER_NOISE.format('NumPy or of the module `random`')}")
        self._module, self._known = _lift_constants(module)
        if not all(isinstance(tensor, Tensor) for tensor in self._known):
            raise CaptureError(f"{where} {_OTHER_NOISE.format('a torch.Generator of its own')}")
        if any(_place(tensor) in undo.computed for tensor in self._known):
            raise CaptureError(
                f"{where} hides what it computes from what is captured, as pyro.infer.TraceGraph_ELBO does: the next "
                "step would have the numbers of this one. Accepted are other objectives, or to leave `compile` out"
            )
        written = {_place(tensor) for tensor in undo.written}
        self.written = [tensor for tensor in self._known if _place(tensor) in written]
        self._inputs = [tensor.detach() for tensor in self._known]  # which share their memory
        self._run: Callable[..., Any] = self._module

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Repeat the operations."""
        with torch.no_grad():
            return list(self._run(*inputs, *self._inputs))

    def compile(self, inputs: Sequence[Tensor]) -> None:
        """Replay compiled from now on; without a C++ compiler a warning says so, and all stays as it is.

        Args:
            inputs: an example, as for the capture.
        """
        from torch import _inductor

        examples: list[Any] = [*inputs, *self._inputs]
        options = _OPTIONS | (_ON_PROCESSORS if all(tensor.is_cpu for tensor in examples) else {})
        try:
            with torch.no_grad(), warnings.catch_warnings(), _quiet("torch._inductor"):
                warnings.simplefilter("ignore")  # torch's own, of what it imports and compiles
                self._run = _inductor.compile(self._module, examples, options=options)
        except RuntimeError as error:
            cause = getattr(error, "inner_exception", error)
            if type(cause).__name__ not in _NO_COMPILER:
                raise
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            warnings.warn(
                f"compile: no working C++ compiler ({reason}): the captured step is replayed uncompiled, which is "
                "slower. Name one in the environment variable CXX",
                stacklevel=2,
            )

    @property
    def code(self) -> str:
        """The operations, one on each line: two captures of the same function have the same."""
        return self._module.code


class CompiledFunction:
    """A function of tensors, run as it is on the first inputs of some form, and by a compiled graph from then on.

    A graph is held against the function at its first inputs: to 1e-3, relative or absolute.

    Args:
        function: of tensors, which returns tensors, the same operations each time.

    >>> double = CompiledFunction(lambda x: [2 * x])
    >>> double(torch.ones(2)), double(torch.zeros(2))
    ([tensor([2., 2.])], [tensor([0., 0.])])
    """

    def __init__(self, function: Function):
        self.function = function
        self._graphs: dict[Forms, Graph | None] = {}

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """What the function returns.

        Raises:
            CaptureError: if the function cannot be captured, or the graph gives other numbers than it does.
        """
        form = input_signature(inputs)
        if form not in self._graphs:
            self._graphs[form] = None
            return list(self.function(*inputs))
        graph = self._graphs[form] or self._captured(inputs)
        self._graphs[form] = graph
        return graph(*inputs)

    def _captured(self, inputs: Sequence[Tensor]) -> Graph:
        graph = Graph(self.function, inputs)
        graph.compile(inputs)
        with preserve_rng_state():
            expected = self.function(*inputs)
        with preserve_rng_state():
            found = graph(*inputs)
        for one, other in zip(found, expected, strict=True):
            if not torch.allclose(one, other, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise CaptureError(
                    f"compile: what is captured gives numbers that are off by {float((one - other).abs().max()):.3g} "
                    "from those of the functions themselves; leave `compile` out"
                )
        return graph


@contextmanager
def compiling() -> Iterator[None]:
    """Let torch's optimizers take the way that can be captured, with the number of the step in a tensor.

    Of float64: in float32, the 1 - 0.999**step of Adam's first steps would be off by 6e-5.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(torch.compiler, "_is_compiling_flag", True):
            yield
    finally:
        torch.set_default_dtype(default)


def input_signature(inputs: Sequence[Tensor]) -> Forms:
    """Shapes, strides, dtypes and devices: a graph takes inputs of those that it was captured with."""
    return tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in inputs)


class _LastSite(Messenger):
    """Which sample site was met last."""

    def __init__(self) -> None:
        super().__init__()
        self.site: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            self.site = msg["name"]

    def __str__(self) -> str:
        return (
            "compile: the function"
            if self.site is None
            else f"compile: model or guide, at or after site {self.site!r},"
        )


class _ValueAccessGuard(TorchFunctionMode):
    """Answers questions for values: with the tensor itself where it is only added up, with the truth where it is only
    checked. All others branch on data, and are refused."""

    def __init__(self, where: _LastSite):
        super().__init__()
        self.where = where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        if func not in _QUESTIONS and func is not Tensor.masked_select:
            return func(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_BETWEEN):
            frame = frame.f_back
        asker = frame.f_globals.get("__name__", "")
        if func is Tensor.__bool__ and asker == _DICE:
            return False
        if func is Tensor.masked_select:
            return torch.where(args[1], args[0], 0.0) if asker == _DICE else func(*args, **(kwargs or {}))
        if func is Tensor.item and asker.startswith(_SUMS):
            return args[0].detach()
        if asker.startswith(_CHECKS):
            with disable_proxy_modes_tracing():
                return func(*args, **(kwargs or {}))
        raise CaptureError(
            f"{self.where} asks a tensor for its value, and may do otherwise with other data "
            f"({frame.f_code.co_filename}, line {frame.f_lineno}: {func.__name__}). What is captured must run the same "
            "operations in every step: use `torch.where`, or leave `compile` out"
        )


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """Torch's, which looks at all values whether they are in range."""
    if num_classes < 0:  # as many as there are values: a shape that depends on them
        return torch.nn.functional.one_hot(tensor, num_classes)
    return (tensor[..., None] == torch.arange(num_classes, device=tensor.device)).long()


class _InPlaceRollback(TorchDispatchMode):
    """Puts back what was changed in place, at the end; and refuses operations whose shape depends on values."""

    def __init__(self, where: _LastSite) -> None:
        super().__init__()
        self.where = where
        self.written: list[Tensor] = []
        self.computed: dict[int, Tensor] = {}  # by place in memory; kept, so that no other comes to lie there
        self._copies: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.dynamic_output_shape in func.tags and not _indexes_by_numbers(func, args):
            raise CaptureError(
                f"{self.where} makes a tensor whose shape depends on values ({func.__name__.partition('.')[0]}), and "
                "would have another with other data: use `torch.where` or `poutine.mask`, or leave `compile` out"
            )
        if func._schema.is_mutable and torch.Tag.inplace_view not in func.tags:  # which changes the shape alone
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[place] if place < len(args) else kwargs.get(argument.name)
                    for tensor in value if isinstance(value, list | tuple) else [value]:
                        self._keep(tensor)
        for place in _WRITES_UNTOLD.get(func, ()):
            self._keep(args[place])
        result = func(*args, **kwargs)
        if not func._schema.is_mutable and not func.is_view:
            for tensor in result if isinstance(result, list | tuple) else [result]:
                if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor) and tensor.numel():
                    self.computed[_place(tensor)] = tensor
        return result

    def _keep(self, tensor: Tensor | None) -> None:
        if tensor is not None and id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.detach().clone()
            self.written.append(tensor)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        with torch.no_grad():
            for tensor in reversed(self.written):  # the first copy of overlapping ones last
                tensor.copy_(self._copies[id(tensor)])
        self._copies.clear()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Let a logger tell of errors alone: of what is slower than it might be, there is no need to."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _place(tensor: Tensor) -> int:
    """Where a tensor and its views lie in memory."""
    return tensor.untyped_storage().data_ptr()


def _indexes_by_numbers(func: Any, args: Any) -> bool:
    """Whether an operation is ``x[rows]``; by a mask, ``x[x > 0]``, it is of any shape."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return not any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _lift_constants(module: torch.fx.GraphModule) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """The graph with the tensors that it knows as further inputs, after the others; and those tensors."""
    graph, tensors = module.graph, []
    last = [node for node in graph.nodes if node.op == "placeholder"]
    lifted: dict[str, torch.fx.Node] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        if node.target not in lifted:
            tensors.append(getattr(module, node.target))
            with graph.inserting_after(last[-1]) if last else graph.inserting_before(next(iter(graph.nodes))):
                last.append(graph.placeholder(f"known_{len(tensors)}"))
            lifted[node.target] = last[-1]
        node.replace_all_uses_with(lifted[node.target])
        graph.erase_node(node)
    for node in graph.nodes:
        node.meta.clear()  # which holds tensors
    return torch.fx.GraphModule(torch.nn.Module(), graph), tensors
