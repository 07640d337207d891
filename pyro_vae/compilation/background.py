"""Compile graphs in a process of its own, while this one goes on, by way of torch's cache of compiled graphs on disk.

A thread would take the interpreter's lock from the training, and switch settings of the whole process. The process is a
new interpreter, not a fork, which would copy the threads of OpenMP in any state; it does not import the main script.
"""

import json
import operator
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from pyro_vae.compilation import torch_private

__all__ = ["BackgroundProcess", "Piece", "from_text", "main", "to_text"]

_MAIN = "from pyro_vae.compilation import background; background.main()"
_PATIENCE = 5.0  # seconds for it to remove its files when it is stopped


class Piece:
    """A graph that is compiled as one.

    Args:
        module: a function of tensors.
        examples: its arguments, whose values are not read.

    Attributes:
        run: the compiled function, of tensors like the examples, after :meth:`compile`.
    """

    def __init__(self, module: torch.fx.GraphModule, examples: Sequence[Tensor]):
        self.module, self.examples = module, [tensor.detach() for tensor in examples]
        self.run: Callable[..., Any] | None = None

    def compile(self) -> None:
        """Compile the graph, or load it from torch's cache if another process has compiled it."""
        if self.run is None:
            self.run = torch_private.compile_graph(self.module, self.examples)
            self.examples = []


class BackgroundProcess:
    """A process that compiles pieces into torch's cache, from which :meth:`Piece.compile` loads them.

    It leaves out a piece for another device than the CPU, or with operations that it does not know. Where no process
    can be started, nothing is done. It ends with this process, and with the last reference to it.

    >>> BackgroundProcess([]).is_done()
    True
    """

    def __init__(self, pieces: Sequence[Piece]):
        self._process: subprocess.Popen[bytes] | None = None
        texts = [text for piece in pieces if piece.run is None and (text := _sendable(piece)) is not None]
        if texts and _helps():
            with suppress(OSError):  # no space for a file, or no further process
                self._start(texts)

    def _start(self, texts: Sequence[str]) -> None:
        job = {
            "pieces": texts,
            "threads": torch.get_num_threads(),  # which the code depends on, like the others
            "dtype": _constant(torch.get_default_dtype()),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        paths = [os.path.abspath(path) for path in sys.path]
        code = f"import sys; sys.path[:] = {paths!r}; {_MAIN}"
        theirs, ours = os.pipe()  # the process reads the end of this one as that of its parent
        try:
            with tempfile.TemporaryFile("w+") as file:
                json.dump(job, file)
                file.seek(0)
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-c", code, str(theirs)], stdin=file, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL, pass_fds=[theirs], start_new_session=True,
                )  # fmt: skip
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._finalizer = weakref.finalize(self, _end, self._process, ours)

    def is_done(self) -> bool:
        """Whether the process has ended."""
        return self._process is None or self._process.poll() is not None

    def wait(self) -> None:
        """Wait for the end of the process."""
        if self._process is not None:
            self._process.wait()
            self._finalizer()

    def cancel(self) -> None:
        """End the process and its compiler; the cache keeps what is whole."""
        if self._process is not None:
            self._finalizer()


def _helps() -> bool:
    """Whether another interpreter can be started, and this one finds its results in the cache."""
    is_python = os.path.basename(sys.executable or "").startswith("python")  # and no application that contains one
    return os.name == "posix" and is_python and not torch.compiler.config.force_disable_caches


def _end(process: "subprocess.Popen[bytes]", pipe: int) -> None:
    os.close(pipe)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _sendable(piece: Piece) -> str | None:
    if not all(tensor.is_cpu for tensor in piece.examples):
        return None
    try:
        return to_text(piece.module, piece.examples)
    except TypeError:
        return None


def to_text(module: torch.fx.GraphModule, examples: Sequence[Tensor]) -> str:
    """Write a graph, and the shapes of its arguments and which of them share memory, as JSON.

    Raises:
        TypeError: if the graph has an argument that is no number, string, dtype, device or list of them.
    """
    nodes = list(module.graph.nodes)
    places = {node: place for place, node in enumerate(nodes)}

    def value(one: Any) -> Any:
        if isinstance(one, torch.fx.Node):
            return {"node": places[one]}
        return [value(item) for item in one] if isinstance(one, list | tuple) else _constant(one)

    calls = [
        [_name(node.target), value(node.args), {name: value(one) for name, one in node.kwargs.items()}]
        for node in nodes
        if node.op == "call_function"
    ]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in examples}
    numbers = {pointer: number for number, pointer in enumerate(storages)}
    forms = [
        [numbers[one.untyped_storage().data_ptr()], list(one.shape), list(one.stride()), one.storage_offset(),
         _constant(one.dtype)]
        for one in examples
    ]  # fmt: skip
    (results,) = nodes[-1].args
    return json.dumps({"calls": calls, "results": value(results), "memory": list(storages.values()), "inputs": forms})


def from_text(text: str) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """Return the graph that was written, and arguments of its shapes without values.

    Raises:
        AttributeError: if this process does not know an operation.
    """
    found = json.loads(text)
    graph, nodes = torch.fx.Graph(), []
    for place in range(len(found["inputs"])):
        nodes.append(graph.placeholder(f"input_{place}"))

    def value(one: Any) -> Any:
        if isinstance(one, list):
            return [value(item) for item in one]
        if not isinstance(one, dict):
            return one
        if "node" in one:
            return nodes[one["node"]]
        return torch.device(one["device"]) if "device" in one else getattr(torch, one["torch"])

    for name, args, kwargs in found["calls"]:
        keywords = {key: value(one) for key, one in kwargs.items()}
        nodes.append(graph.call_function(_operation(name), tuple(value(args)), keywords))
    graph.output(value(found["results"]))
    storages = [torch.empty(count, dtype=torch.uint8, device="cpu").untyped_storage() for count in found["memory"]]
    examples = [
        torch.empty(0, dtype=value(dtype), device="cpu").set_(storages[number], offset, shape, stride)
        for number, shape, stride, offset, dtype in found["inputs"]
    ]
    return torch.fx.GraphModule(torch.nn.Module(), graph), examples


def _constant(one: Any) -> Any:
    if one is None or isinstance(one, bool | int | float | str):
        return one
    if isinstance(one, torch.device):
        return {"device": str(one)}
    if isinstance(one, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(one).removeprefix("torch.")}
    raise TypeError(f"a graph with {one!r} is not sent to another process")


def _name(operation: Any) -> str:
    if operation is operator.getitem:
        return "getitem"
    if torch_private.is_operation(operation):
        return operation.name()
    raise TypeError(f"a graph with {operation!r} is not sent to another process")


def _operation(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    library, _, rest = name.partition("::")
    operation, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, library), operation), overload or "default")


def main() -> None:
    """Compile the pieces that the standard input names, in a process that :class:`BackgroundProcess` has started."""
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with_parent, args=[int(sys.argv[1])], daemon=True).start()
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    torch.set_default_dtype(getattr(torch, job["dtype"]["torch"]))
    torch.use_deterministic_algorithms(job["deterministic"])
    for text in job["pieces"]:
        with suppress(Exception):  # it is then compiled, or refused, in the process that needs it
            torch_private.compile_into_cache(*from_text(text))


def _end_with_parent(pipe: int) -> None:
    os.read(pipe, 1)  # nothing is written: it returns when the parent ends
    os.kill(os.getpid(), signal.SIGTERM)


def _stop(number: int, frame: Any) -> None:
    """End the C++ compiler, which removes its files, and then this process, which removes its own."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    with suppress(ChildProcessError):
        while True:
            os.wait()
    raise SystemExit(1)
