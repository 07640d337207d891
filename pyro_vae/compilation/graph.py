"""Capture a function of tensors as a graph of its operations, and replay the graph, compiled, on new tensors.

Python's work around the operations (Pyro's handlers, shapes, sites) is then done once. A replay repeats the operations,
so the function must run the same ones on all data: a capture refuses a function that reads the value of a tensor.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro.ops.provenance import detach_provenance
from torch import Tensor

from pyro_vae._utils.rng import preserve_rng_state, random_states
from pyro_vae._utils.typing import Function
from pyro_vae.compilation import torch_private
from pyro_vae.compilation.background import BackgroundProcess, Piece
from pyro_vae.compilation.cuda_graph import CudaGraph, cuda_graph_of
from pyro_vae.compilation.kernels import decompositions
from pyro_vae.compilation.recorder import (
    CaptureError,
    Recorder,
    address,
    ancestors,
    foreign_random_numbers,
    function_of,
    mapped,
    module_of,
)
from pyro_vae.compilation.rolling import Program, simplified

__all__ = [
    "CaptureError", "Compilation", "CompiledFunction", "Graph", "InputSignature", "Piece", "capturable_optimizers",
    "input_signature",
]  # fmt: skip

InputSignature = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device], ...]
"""Shape, strides, dtype and device of each input of a graph."""

_CAPTURES = 8
"""How often a function is captured that need not be: for inputs of so many signatures, or values that it reads."""
_LONG = 1500
"""The number of operations from which on a graph is searched for repetitions: it would take a minute to compile."""


class Graph:
    """The operations of a function on its inputs and on the tensors that it refers to, such as parameters.

    A call repeats the operations on new inputs, and changes in place the tensors that the function changes in place.
    The capture itself leaves all tensors and random states as they are.

    Args:
        function: takes tensors and returns a sequence of tensors.
        inputs: an example of its arguments. Calls must have the same shapes, strides, dtypes and devices.
        decompositions: replacements of operations, for speed.
        keeps_recurrent: whether recurrent layers are those of an eager run, of which some cannot be captured; by
            default others are, which add up in another order.

    Attributes:
        inputs: the nodes of the inputs and of ``constants``.
        nodes: the operations, in order.
        results: the nodes of the results.
        constants: the tensors that the function refers to.

    Raises:
        CaptureError: if the function reads the value of a tensor that is not computed from integers and truth values
            among the inputs and constants, such as lengths of sequences; if its shapes depend on other values; or if it
            draws random numbers from another source than torch's random state.

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
        decompositions: Mapping[Any, Callable[..., Any]] | None = None,
        keeps_recurrent: bool = False,
    ):
        # One tensor in two places is two inputs, which may differ in another call.
        ids = list(map(id, inputs))
        inputs = [one if ids.index(id(one)) == place else one.view_as(one) for place, one in enumerate(inputs)]
        recorder = Recorder(inputs, dict(decompositions or {}))
        # oneDNN's recurrent layers have a backward pass that cannot be recorded; torch's own one can.
        plain = nullcontext() if keeps_recurrent else torch_private.without_onednn()
        with preserve_rng_state(), pyro.validation_enabled(False), plain:
            before = random_states()[0]
            with recorder.recording():
                results = list(map(detach_provenance, function(*inputs)))  # TraceGraph_ELBO wraps tensors
                if random_states()[0] != before:
                    raise foreign_random_numbers(recorder.site, "NumPy or from the module `random`")
            self.results = recorder.results(results)
        self.inputs, self.nodes = recorder.inputs, recorder.nodes
        written = {address(tensor) for tensor in recorder.written}
        # What the function changes:
        self.written = [tensor for tensor in recorder.constants if address(tensor) in written]
        self.constants = [tensor.detach() for tensor in recorder.constants]  # they share the memory of the originals
        self._reads = recorder.reads
        self._run: Callable[..., Any] | None = None
        self._cuda_graph: CudaGraph | None = None

    def holds(self, *inputs: Tensor) -> bool:
        """Whether the values that the function read in the capture are those that it would read on new inputs."""
        if not self._reads:
            return True
        with torch.no_grad():
            values = self._read(*inputs, *self.constants)
        return all(map(torch.equal, values, (value for _, value in self._reads)))

    @cached_property
    def _read(self) -> Function:
        """The values that were read as a function of the inputs and of ``constants``."""
        found = [node for node, _ in self._reads]
        needed = set(ancestors(found))
        return function_of(self.inputs, [node for node in self.nodes if node in needed], found)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Repeat the operations on new inputs."""
        if self._cuda_graph is not None:
            return self._cuda_graph(*inputs)
        with torch.no_grad():
            return list((self._run or self._plain)(*inputs, *self.constants))

    def start_together(self, inputs: Sequence[Tensor]) -> str:
        """Start all kernels of further calls at once, by a CUDA graph; return why not, or nothing.

        The next call then overwrites the results, apart from the first one. Without a GPU, do nothing.
        """
        run = self._run or self._plain
        self._cuda_graph, reason = cuda_graph_of(run, inputs, self.constants, self.written, self.nodes)
        return reason

    @cached_property
    def _plain(self) -> Function:
        """The graph as a Python function of the inputs and of ``constants``."""
        return function_of(self.inputs, self.nodes, self.results)

    def compile(self, inputs: Sequence[Tensor], pieces: dict[Any, Piece] | None = None) -> None:
        """Compile the graph for all further calls, like ``inputs``; without a C++ compiler, warn and do nothing.

        A long graph is run as a :class:`pyro_vae.compilation.rolling.Program`, of which only the bodies of loops are
        compiled; a long one without repetitions is replayed as it is.

        Args:
            inputs: an example of the inputs.
            pieces: what was compiled for other graphs, which is added to.
        """
        self._prepared(inputs, pieces).finish()

    def compile_in_background(self, inputs: Sequence[Tensor], pieces: dict[Any, Piece] | None = None) -> "Compilation":
        """Compile the graph in another process; calls run it as it is until :meth:`Compilation.wait`.

        Arguments are those of :meth:`compile`.

        >>> graph = Graph(lambda x: [x.sin()], [torch.zeros(1)])
        >>> graph.compile_in_background([torch.zeros(1)]).cancel()
        """
        return self._prepared(inputs, pieces).start()

    def _prepared(self, inputs: Sequence[Tensor], pieces: dict[Any, Piece] | None) -> "Compilation":
        """Find the pieces to compile, and the function that runs the graph with them."""
        known: dict[Any, Piece] = {} if pieces is None else pieces
        example, found = [*inputs, *self.constants], Compilation(self)

        def compile(run: Function, tensors: Sequence[Tensor], body: bool = True) -> Function:
            lowered, piece = _lowered(run, tensors, known if body else None)
            if piece is not None:
                found.pieces.append(piece)
            return lowered

        if not self.is_long:
            found.run = compile(self._plain, example)
        elif (graph := simplified(self.inputs, self.nodes, self.results)) is not None:
            program = Program(graph, compile)
            program.prepare(example)
            found.run = program
        return found

    @property
    def is_long(self) -> bool:
        """Whether the graph is searched for repetitions, and not compiled as a whole."""
        return len(self.nodes) >= _LONG

    @cached_property
    def module(self) -> torch.fx.GraphModule:
        """The graph as a module of torch, a function of the inputs and of ``constants``."""
        return module_of(self.inputs, self.nodes, self.results)

    @property
    def operations(self) -> list[str]:
        """The operations in order, each with its arguments that are no tensors: the numbers that a capture fixes."""
        return [f"{node.target}{mapped((node.args, list(node.kwargs.items())), lambda _: None)}" for node in self.nodes]

    def new_constants(self, other: "Graph") -> tuple[list[Tensor], list[Tensor]]:
        """The constants of each of two graphs that the other has not: the function makes them in each run."""
        addresses = [set(map(address, graph.constants)) for graph in (self, other)]
        ours = [tensor for tensor in self.constants if address(tensor) not in addresses[1]]
        return ours, [tensor for tensor in other.constants if address(tensor) not in addresses[0]]

    @property
    def code(self) -> str:
        """The operations, one per line; two captures of the same function have the same code."""
        return "\n".join(map(str, [*self.nodes, f"return {[node.index for node in self.results]}"]))


def _lowered(
    run: Function, tensors: Sequence[Tensor], pieces: dict[Any, Piece] | None
) -> tuple[Function, Piece | None]:
    """Return a function by its operations, with faster ones for some, and the piece that compiles it.

    The piece is one of ``pieces`` or is added to them; without these there is none.
    """
    graph = Graph(run, tensors, decompositions)
    if pieces is None or not graph.nodes:
        return graph, None
    key = graph.code, input_signature([*tensors, *graph.constants])
    if key not in pieces:
        pieces[key] = Piece(graph.module, [*tensors, *graph.constants])
    piece = pieces[key]

    def call(*tensors: Tensor) -> list[Tensor]:
        return piece.run(*tensors, *graph.constants) if piece.run is not None else graph(*tensors)

    return call, piece


class Compilation:
    """The compilation of a graph by :meth:`Graph.compile_in_background`.

    The process is another one, which ends with this one. Where it can do nothing, as for a graph of CUDA or without a
    folder for its cache, :meth:`wait` compiles the graph in this process.
    """

    def __init__(self, graph: Graph):
        self.pieces: list[Piece] = []
        self.run: Function | None = None  # by the pieces, once they are compiled
        self._graph: Graph | None = graph
        self._process = BackgroundProcess([])

    def start(self) -> "Compilation":
        """Start the process."""
        self._process = BackgroundProcess(self.pieces)
        return self

    def done(self) -> bool:
        """Whether :meth:`wait` need not wait for the other process."""
        return self._process.is_done()

    def wait(self) -> None:
        """Wait for the process, and load what it has compiled: from now on calls of the graph are compiled.

        Without a C++ compiler, warn and leave the graph as it is.
        """
        self._process.wait()
        self.finish()

    def finish(self) -> None:
        """Compile in this process what no other one has compiled, and run it in further calls of the graph."""
        if self._graph is None or self.run is None:
            return
        try:
            for piece in self.pieces:
                piece.compile()
            self._graph._run = self.run
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
    def succeeded(self) -> bool:
        """Whether calls of the graph are compiled."""
        return self._graph is not None and self._graph._run is not None

    def cancel(self) -> None:
        """End the process, if it still runs; the graph stays as it is, unless it is compiled already."""
        self._process.cancel()
        self._graph = None


class CompiledFunction:
    """A function of tensors that runs as a graph from the second call with inputs of one signature on.

    The function returns a sequence of tensors, by the same operations in each call. The first results of a graph are
    compared with its results, to 1e-3, relative or absolute.

    Args:
        function: takes tensors and returns a sequence of tensors.
        compiles: whether a graph is compiled, or replayed as it is. If this is given, the function itself runs where it
            cannot be captured, or where its graph gives other numbers. If it is left out, each graph is compiled, and
            these are errors.

    >>> double = CompiledFunction(lambda x: [2 * x])
    >>> double(torch.ones(2)), double(torch.zeros(2))
    ([tensor([2., 2.])], [tensor([0., 0.])])
    """

    def __init__(self, function: Function, compiles: Callable[[Graph], bool] | None = None):
        self.function = function
        self._compiles = compiles
        self._captures_left = math.inf if compiles is None else _CAPTURES
        self._graphs: dict[InputSignature, Graph | None] = {}

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Return the function's results; raise if it must be captured and cannot be, or its graph has other numbers."""
        signature = input_signature(inputs)
        if signature not in self._graphs:
            self._graphs[signature] = None
            return list(self.function(*inputs))
        graph = self._graphs[signature]
        if graph is None or not graph.holds(*inputs):
            graph = self._graphs[signature] = self._captured_if_possible(inputs)
        return list(self.function(*inputs)) if graph is None else graph(*inputs)

    def _captured_if_possible(self, inputs: Sequence[Tensor]) -> Graph | None:
        if not self._captures_left:
            return None
        self._captures_left -= 1
        try:
            return self._captured(inputs)
        except Exception:  # of the function under the capture, which then runs as it is
            if self._compiles is None:
                raise
            self._captures_left = 0
            return None

    def _captured(self, inputs: Sequence[Tensor]) -> Graph:
        graph = Graph(self.function, inputs)
        if self._compiles is None or self._compiles(graph):
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
