"""CUDA graphs: all kernels of a function are started at once, so that the processor does not hold up the GPU.

A small model has many short kernels, and each one that Python starts costs the processor more time than the GPU. A
graph holds the kernels with the addresses of their tensors. New inputs are copied to these addresses; random numbers
continue the random state of the device, as in a run of the function.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae._utils.rng import preserve_rng_state, torch_random_states
from pyro_vae._utils.typing import Function
from pyro_vae.compilation.recorder import Node
from pyro_vae.compilation.rolling import is_random

__all__ = ["CudaGraph", "CudaGraphError", "cuda_device", "cuda_graph_of"]

_WARM_UPS = 2  # runs before the capture, in which libraries set up what a capture does not allow
_DIGITS = 1e-3  # to which the graph and the function agree, where an operation adds in another order each time


class CudaGraphError(RuntimeError):
    """Error for a function that is no CUDA graph; the message is the end of a sentence, ``where it ...``."""


def cuda_device(tensors: Sequence[Tensor]) -> torch.device | None:
    """Return the first CUDA device of some tensors, ``None`` if they are on no such device.

    >>> cuda_device([torch.zeros(3, device="cpu")])
    """
    return next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), None)


def cuda_graph_of(
    run: Function,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    written: Sequence[Tensor],
    nodes: Sequence[Node],
) -> "tuple[CudaGraph | None, str]":
    """Return a function, with ``constants`` as its last arguments, as a CUDA graph, or ``None`` and the reason.

    Args:
        run: a function of tensors that returns a list of tensors.
        inputs: an example of the first arguments.
        constants: the further arguments, the same tensors in each call; their values may change.
        written: the tensors that the function changes in place.
        nodes: the operations of the function.

    The reason is empty where no tensor is on a CUDA device.
    """
    device = cuda_device([*constants, *inputs])
    if device is None:
        return None, ""
    if any(is_random(node.target) and not _is_on(device, node) for node in nodes):
        return None, f"where it draws random numbers elsewhere than on {device}"
    try:
        return CudaGraph(run, inputs, constants, written, device), ""
    except CudaGraphError as error:
        return None, str(error)


def _is_on(device: torch.device, node: Node) -> bool:
    """Whether an operation runs on a device: its result is there or, where it has several, an input."""
    forms = [node.form] if node.form is not None else [one.form for one in node.inputs if one.form is not None]
    return any(found == device for _, _, found in forms)


class CudaGraph:
    """A function of tensors on a CUDA device whose kernels are started at once.

    Args:
        run: a function of ``inputs`` and ``constants`` that returns a list of tensors, always by the same kernels.
        inputs: an example of the arguments that differ between calls. Calls have the same shapes, strides and dtypes.
        constants: the arguments that are the same tensors in each call. Those on the CPU are copied before each call.
        written: the tensors that the function changes in place.
        device: the CUDA device.

    The function runs a few times. What it changes and the random states are then as before.

    Raises:
        CudaGraphError: if a kernel cannot be captured, such as one whose result the processor waits for; or if the
            graph has other results than the function, or draws other random numbers.
    """

    def __init__(
        self,
        run: Function,
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor],
        written: Sequence[Tensor],
        device: torch.device,
    ):
        self._device, self._written = device, list(written)
        self._check_devices([*inputs, *constants])
        try:
            with torch.no_grad(), torch.cuda.device(device), preserve_rng_state():
                self._inputs = [self._buffer(tensor) for tensor in inputs]
                held = [tensor if tensor.device == device else self._buffer(tensor) for tensor in constants]
                self._copied = [(one, own) for one, own in zip(held, constants, strict=True) if one is not own]
                self._capture(lambda: run(*self._inputs, *held))
                self._check(lambda: run(*inputs, *constants), inputs)
        except CudaGraphError:
            raise
        except RuntimeError as error:  # of CUDA, or of torch about the capture
            raise CudaGraphError(f"where CUDA refuses it: {(str(error).splitlines() or [''])[0]}") from error

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run the kernels on new inputs. The next call overwrites the results, apart from the first one, a copy."""
        with torch.no_grad():
            for buffer, tensor in zip(self._inputs, inputs, strict=True):
                buffer.copy_(tensor)
            for buffer, tensor in self._copied:
                buffer.copy_(tensor)
            self._graph.replay()
            first, *others = self._results
            return [first.clone(), *others]

    def _check_devices(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if tensor.device.type != "cpu" and tensor.device != self._device:
                raise CudaGraphError(f"where it has tensors on {self._device} and {tensor.device}")
        if any(tensor.device != self._device for tensor in self._written):
            raise CudaGraphError("where it changes a tensor on the CPU")

    def _buffer(self, tensor: Tensor) -> Tensor:
        buffer = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device)
        return buffer.copy_(tensor)

    def _capture(self, call: Callable[[], list[Tensor]]) -> None:
        """Warm up and capture on a stream of its own, as CUDA wants it."""
        before = [tensor.clone() for tensor in self._written]
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    call()
            current.wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._results = call()
        except RuntimeError:
            torch.cuda.set_stream(current)  # a capture that fails may leave its own one, whose work goes on
            torch.cuda.synchronize()
            _release_generator(self._device)
            raise
        finally:
            _restore(self._written, before)

    def _check(self, call: Callable[[], list[Tensor]], inputs: Sequence[Tensor]) -> None:
        """Raise unless the graph has the results of the function, also those that it writes, and its random numbers."""
        found, expected = self._trial(lambda: self(*inputs)), self._trial(call)
        if not all(map(_are_close, found, expected)):
            raise CudaGraphError("where it has other results than the operations one by one")

    def _trial(self, call: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return results, written tensors and random states after a call, which changes none of these."""
        before = [tensor.clone() for tensor in self._written]
        with preserve_rng_state():
            found = [tensor.clone() for tensor in [*call(), *self._written]]
            states = list(torch_random_states().values())
        _restore(self._written, before)
        return [*found, *states]


def _restore(tensors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(old)


def _are_close(one: Tensor, other: Tensor) -> bool:
    """Whether tensors are equal, up to the order of sums."""
    if torch.equal(one, other):
        return True
    if not one.is_floating_point():
        return False
    finite = other[other.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=_DIGITS, atol=_DIGITS * size, equal_nan=True)


def _release_generator(device: torch.device) -> None:
    """Let random numbers be drawn after a capture that has failed: the generator may still wait for its end."""
    generator: Any = torch.cuda.default_generators[device.index]
    try:
        torch.rand((), device=device)
    except RuntimeError:
        generator.graphsafe_set_state(generator.clone_state())
