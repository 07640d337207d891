"""Capture a function of tensors as a graph of its operations, and replay the graph, compiled, on new tensors.

Python's work around the operations (Pyro's handlers, shapes, sites) is then done once. A replay repeats the operations,
so the function must run the same ones on all data: a capture refuses a function that reads the value of a tensor.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.ops.provenance import detach_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vae._utils.rng import preserve_rng_state, random_states
from pyro_vae._utils.typing import Function
from pyro_vae.compilation import torch_private
from pyro_vae.compilation.kernels import decompositions

__all__ = ["CaptureError", "CompiledFunction", "Graph", "InputSignature", "capturable_optimizers", "input_signature"]

InputSignature = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device], ...]
"""Shape, strides, dtype and device of each input of a graph."""


class CaptureError(ValueError):
    """Error for a function that cannot be captured: it does not run the same operations on all data."""


class Graph:
    """The operations of a function on its inputs and on the tensors that it refers to, such as parameters.

    A call repeats the operations on new inputs, and changes in place the tensors that the function changes in place.
    The capture itself leaves all tensors and random states as they are.

    Args:
        function: takes tensors and returns a sequence of tensors.
        inputs: an example of its arguments. Calls must have the same shapes, strides, dtypes and devices.
        decompositions: replacements of operations, for speed.

    Attributes:
        module: the graph, a function of the inputs and of ``constants``.
        constants: the tensors that the function refers to.

    Raises:
        CaptureError: if the function reads the value of a tensor, if its shapes depend on values, or if it draws random
            numbers from another source than torch's random state.

    >>> total = torch.zeros(())
    >>> graph = Graph(lambda x: [total.add_(x.sum()) + 0], [torch.ones(3)])
    >>> total
    tensor(0.)
    >>> graph(torch.ones(3)), graph(torch.ones(3))
    ([tensor(3.)], [tensor(6.)])
    """

    def __init__(
        self,
        function: Function,
        inputs: Sequence[Tensor],
        decompositions: dict[Any, Callable[..., Any]] = decompositions,
    ):
        site = _LastSite()
        rollback = _InPlaceRollback(site)
        # oneDNN's recurrent layers have a backward pass that cannot be recorded; torch's own one can.
        plain = torch_private.without_onednn()
        with preserve_rng_state(), pyro.validation_enabled(False), plain, rollback, site, _ValueAccessGuard(site):
            before = random_states()[0]
            try:
                trace = torch_private.make_fx(
                    lambda *args: list(map(detach_provenance, function(*args))),  # TraceGraph_ELBO wraps tensors
                    decomposition_table=decompositions,
                )
                module = trace(*inputs)
            except RuntimeError as error:
                if "tracing tensor" not in str(error):
                    raise _not_capturable(site, error) from error
                raise _data_dependent(f"{site} reads the value of a tensor{_line_of(error)}") from error
            if random_states()[0] != before:
                raise _foreign_random_numbers(site, "NumPy or from the module `random`")
        self.module, constants = _lift_constants(module)
        if not all(isinstance(tensor, Tensor) for tensor in constants):
            raise _foreign_random_numbers(site, "a torch.Generator of its own")
        if any(_address(tensor) in rollback.computed for tensor in constants):
            raise CaptureError(
                f"`compile` must be False where results are hidden from the capture: {site} computes tensors outside "
                "of it, as by a subclass of torch.Tensor, which would have the same values in every step. Leave "
                "`compile` out"
            )
        written = {_address(tensor) for tensor in rollback.written}
        self.written = [tensor for tensor in constants if _address(tensor) in written]  # what the function changes
        self.constants = [tensor.detach() for tensor in constants]  # they share their memory with the originals
        self._run: Callable[..., Any] = self.module

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Repeat the operations on new inputs."""
        with torch.no_grad():
            return list(self._run(*inputs, *self.constants))

    def compile(self, inputs: Sequence[Tensor]) -> None:
        """Compile the graph for all further calls, like ``inputs``; without a C++ compiler, warn and do nothing."""
        try:
            self._run = torch_private.compile_graph(self.module, [*inputs, *self.constants])
        except RuntimeError as error:
            cause = getattr(error, "inner_exception", error)
            if not torch_private.is_compiler_missing(cause):
                raise
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            warnings.warn(
                f"compile: no working C++ compiler ({reason}). The captured step is replayed uncompiled, which is "
                "slower. Name a compiler in the environment variable CXX",
                stacklevel=2,
            )

    @property
    def operations(self) -> list[str]:
        """The operations in order, each with its arguments that are no tensors: the numbers that a capture fixes."""
        return [
            f"{node.target}{torch.fx.map_arg((node.args, node.kwargs), lambda _: None)}"
            for node in self.module.graph.nodes
            if node.op == "call_function"
        ]

    def new_constants(self, other: "Graph") -> tuple[list[Tensor], list[Tensor]]:
        """The constants of each of two graphs that the other has not: the function makes them in each run."""
        addresses = [set(map(_address, graph.constants)) for graph in (self, other)]
        ours = [tensor for tensor in self.constants if _address(tensor) not in addresses[1]]
        return ours, [tensor for tensor in other.constants if _address(tensor) not in addresses[0]]

    @property
    def code(self) -> str:
        """The operations, one per line; two captures of the same function have the same code."""
        return self.module.code


class CompiledFunction:
    """A function of tensors that runs as a compiled graph from the second call with inputs of one signature on.

    The function returns a sequence of tensors, by the same operations in each call. The first results of a graph are
    compared with its results, to 1e-3, relative or absolute.

    >>> double = CompiledFunction(lambda x: [2 * x])
    >>> double(torch.ones(2)), double(torch.zeros(2))
    ([tensor([2., 2.])], [tensor([0., 0.])])
    """

    def __init__(self, function: Function):
        self.function = function
        self._graphs: dict[InputSignature, Graph | None] = {}

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Return the function's results; raise if it cannot be captured, or its graph gives other numbers."""
        signature = input_signature(inputs)
        if signature not in self._graphs:
            self._graphs[signature] = None
            return list(self.function(*inputs))
        graph = self._graphs[signature] or self._captured(inputs)
        self._graphs[signature] = graph
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
                    "`compile` must be False where two runs differ: the results of the captured graph are off by "
                    f"{float((one - other).abs().max()):.3g} from those of model and guide. Leave `compile` out"
                )
        return graph


@contextmanager
def capturable_optimizers() -> Iterator[None]:
    """Run a block in which torch's optimizers can be captured: they keep the number of the step in a tensor.

    The tensor is of float64: in float32, the 1 - 0.999**step of Adam's first steps would be off by 6e-5.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch_private.forced_compiling_flag():
            yield
    finally:
        torch.set_default_dtype(default)


def input_signature(inputs: Sequence[Tensor]) -> InputSignature:
    """Return shapes, strides, dtypes and devices: a graph takes inputs of those that it was captured with."""
    return tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in inputs)


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


def _foreign_random_numbers(site: "_LastSite", source: str) -> CaptureError:
    return CaptureError(
        f"`compile` must be False where random numbers are not torch's: {site} draws some from {source}, which would "
        "be the same in every step. Use those of torch without a generator, or leave `compile` out"
    )


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

_TORCH_CALLERS = ("torch.fx.", "torch._tensor", "torch.functional", "torch.overrides")
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

    def __init__(self, site: _LastSite):
        super().__init__()
        self.site = site

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        if func not in _VALUE_READS and func not in _WATCHED:
            return func(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_TORCH_CALLERS):
            frame = frame.f_back
        caller = frame.f_globals.get("__name__", "")
        if func is Tensor.register_hook:  # Pyro's hooks warn where a gradient is not finite
            return None if caller == _WARNINGS else func(*args, **(kwargs or {}))
        if func is Tensor.nonzero:  # of a matrix of ones below the diagonal
            rows, columns = args[0].shape
            return torch.tril_indices(rows, columns, -1).t() if caller == _PAIRS else func(*args, **(kwargs or {}))
        if func is Tensor.__bool__ and caller == _DICE:
            return False
        if func is Tensor.masked_select:
            return torch.where(args[1], args[0], 0.0) if caller == _DICE else func(*args, **(kwargs or {}))
        if func is Tensor.item and caller.startswith(_LOSS_SUMS):
            return args[0].detach()
        if caller.startswith(_CHECKS) or (func is Tensor.__bool__ and caller in _MOMENTUM):
            with torch_private.disable_proxy_modes_tracing():
                return func(*args, **(kwargs or {}))
        where = f"({frame.f_code.co_filename}, line {frame.f_lineno}: {func.__name__})"
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


class _InPlaceRollback(torch_private.TorchDispatchMode):
    """Undo in-place changes at the end of a block, and refuse operations whose output shape depends on values."""

    def __init__(self, site: _LastSite) -> None:
        super().__init__()
        self.site = site
        self.written: list[Tensor] = []
        self.computed: dict[int, Tensor] = {}  # by address; kept alive, so that no other tensor gets the address
        self._copies: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.dynamic_output_shape in func.tags and not _indexes_by_numbers(func, args):
            operation = func.__name__.partition(".")[0]
            raise _data_dependent(f"{self.site} makes a tensor whose shape depends on values ({operation})")
        schema = torch_private.operation_schema(func)
        if schema.is_mutable and torch.Tag.inplace_view not in func.tags:  # these change the shape alone
            for place, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[place] if place < len(args) else kwargs.get(argument.name)
                    for tensor in value if isinstance(value, list | tuple) else [value]:
                        self._keep(tensor)
        for place in _UNDECLARED_WRITES.get(func, ()):
            self._keep(args[place])
        result = func(*args, **kwargs)
        if not schema.is_mutable and not func.is_view:
            for tensor in result if isinstance(result, list | tuple) else [result]:
                real = isinstance(tensor, Tensor) and not isinstance(tensor, torch_private.FakeTensor)
                if real and tensor.numel():
                    self.computed[_address(tensor)] = tensor
        return result

    def _keep(self, tensor: Tensor | None) -> None:
        if tensor is not None and id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.detach().clone()
            self.written.append(tensor)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        with torch.no_grad():
            for tensor in reversed(self.written):  # where tensors overlap, the first copy is the oldest
                tensor.copy_(self._copies[id(tensor)])
        self._copies.clear()


def _address(tensor: Tensor) -> int:
    """Return where a tensor and its views lie in memory."""
    return tensor.untyped_storage().data_ptr()


def _indexes_by_numbers(func: Any, args: Any) -> bool:
    """Whether an operation is ``x[rows]``, whose shape is known, and not ``x[x > 0]``."""
    if func is not _aten.index.Tensor:
        return False
    return not any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _lift_constants(module: torch.fx.GraphModule) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """Turn the tensors that a graph refers to into further inputs, after its own; return the graph and the tensors."""
    graph, tensors = module.graph, []
    last = [node for node in graph.nodes if node.op == "placeholder"]
    lifted: dict[str, torch.fx.Node] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        if node.target not in lifted:
            tensors.append(getattr(module, node.target))
            with graph.inserting_after(last[-1]) if last else graph.inserting_before(next(iter(graph.nodes))):
                last.append(graph.placeholder(f"constant_{len(tensors)}"))
            lifted[node.target] = last[-1]
        node.replace_all_uses_with(lifted[node.target])
        graph.erase_node(node)
    for node in graph.nodes:
        node.meta.clear()  # it holds tensors
    return torch.fx.GraphModule(torch.nn.Module(), graph), tensors
