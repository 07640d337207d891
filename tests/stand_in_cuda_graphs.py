"""CUDA graphs for machines without CUDA: a capture records operations with their tensors, a replay runs them again.

As on CUDA, a replay reads and writes the same memory each time, numbers of Python are those of the capture, a value
that the program reads ends the capture, and a capture that fails leaves its stream and a generator that waits. What it
cannot show are kernels, their memory and their time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae._utils.rng import preserve_rng_state
from pyro_vae.compilation import cuda_graph, torch_private
from pyro_vae.training import graph_step


class Cuda:
    """What stands in for ``torch.cuda``.

    Attributes:
        stream: the current stream.
        graphs: the graphs that were captured.
        replays: the number of replays.
        waits: whether the generator waits for the end of a capture that has failed.
    """

    def __init__(self):
        self.stream, self.graphs, self.replays, self.waits = Stream(), [], 0, False
        self.default_generators = {index: Generator(self) for index in (None, 0)}

    def set_stream(self, stream):
        self.stream = stream

    @contextmanager
    def use(self, stream):
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    @contextmanager
    def graph(self, graph, stream, capture_error_mode):
        before, self.stream = self.stream, stream
        try:
            with preserve_rng_state(), graph:
                yield
        except RuntimeError:
            self.waits = True
            raise
        self.stream = before
        self.graphs.append(graph)


class Stream:
    def wait_stream(self, other):
        assert isinstance(other, Stream)


class Generator:
    def __init__(self, cuda):
        self.cuda = cuda

    def clone_state(self):
        return "a new state"

    def graphsafe_set_state(self, state):
        self.cuda.waits = state != "a new state"


class Graph(TorchDispatchMode):
    """Operations, with the tensors that they read and write."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda, self.calls, self._before = cuda, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self._before += [(one, one.clone()) for one in torch_private.written_arguments(func, args, kwargs)]
        found = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, found))
        return found

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for tensor, old in reversed(self._before):  # a capture runs nothing
            tensor.copy_(old)

    def replay(self):
        self.cuda.replays += 1
        for func, args, kwargs, results in self.calls:
            for result, now in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(result, torch.Tensor) and result.data_ptr() != now.data_ptr():
                    result.copy_(now)


@contextmanager
def cuda_graphs(device: torch.device) -> Iterator[Cuda]:
    """Run a block in which a device is one of CUDA, as far as graphs are concerned."""
    cuda, rand = Cuda(), torch.rand

    def draw(*sizes, **options):
        if cuda.waits:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        return rand(*sizes, **options)

    @contextmanager
    def current(chosen):
        assert chosen == device
        yield

    changes = {
        "default_generators": cuda.default_generators, "set_stream": cuda.set_stream, "stream": cuda.use,
        "current_stream": lambda: cuda.stream, "Stream": Stream, "synchronize": lambda: None, "device": current,
        "CUDAGraph": lambda: Graph(cuda), "graph": cuda.graph,
    }  # fmt: skip

    def found(tensors):
        return next((tensor.device for tensor in tensors if tensor.device == device), None)

    with (
        patch.multiple(torch.cuda, **changes), patch.object(torch, "rand", draw),
        patch.object(cuda_graph, "cuda_device", found), patch.object(graph_step, "cuda_device", found),
    ):  # fmt: skip
        yield cuda
