"""Random states: seed a block without a change to the user's random streams, and save or restore them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_vae._utils.validation import seed_number

__all__ = [
    "RandomStream", "preserve_rng_state", "random_states", "seeded", "set_random_states", "set_torch_random_states",
    "torch_random_states",
]  # fmt: skip


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Run a block, then restore the random states of torch (CPU and current CUDA device), NumPy and :mod:`random`."""
    state, streams = pyro.util.get_rng_state(), torch_random_states()
    try:
        yield
    finally:
        pyro.util.set_rng_state(state)
        set_torch_random_states(streams)


def torch_random_states() -> list[Tensor]:
    """The random states of torch alone: of the CPU and of the current CUDA device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_torch_random_states(states: list[Tensor]) -> None:
    """Restore the states that :func:`torch_random_states` returned."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under ``pyro.set_rng_seed(seed)``, then restore all random states, see :func:`preserve_rng_state`.

    >>> with seeded(0):
    ...     first = torch.rand(3)
    >>> with seeded(0):
    ...     second = torch.rand(3)
    >>> torch.equal(first, second)
    True
    """
    seed = seed_number(seed)
    with preserve_rng_state():
        pyro.set_rng_seed(seed)
        yield


def random_states() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All random states, as JSON values and tensors, to restore in another process."""
    state = pyro.util.get_rng_state()
    name, keys, *rest = state["numpy"]
    tensors = {"torch": state["torch"]}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return {"random": state["random"], "numpy": [name, keys.tolist(), *rest]}, tensors


def set_random_states(states: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Restore the states that :func:`random_states` returned."""
    version, keys, gauss = states["random"]
    name, numbers, *rest = states["numpy"]
    numpy = (name, np.array(numbers, dtype=np.uint32), *rest)
    pyro.util.set_rng_state({"torch": tensors["torch"], "random": (version, tuple(keys), gauss), "numpy": numpy})
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


class RandomStream:
    """A random stream of its own: what is drawn inside its blocks continues it, and changes no other stream.

    >>> stream = RandomStream(0)
    >>> with stream:
    ...     first = torch.rand(3)
    >>> with stream:
    ...     second = torch.rand(3)
    >>> with seeded(0):
    ...     torch.equal(torch.cat([first, second]), torch.rand(6))
    True
    """

    def __init__(self, seed: int):
        with seeded(seed):
            self._states = pyro.util.get_rng_state()

    def __enter__(self) -> None:
        self._outer = pyro.util.get_rng_state()
        pyro.util.set_rng_state(self._states)

    def __exit__(self, *exception: Any) -> None:
        self._states = pyro.util.get_rng_state()
        pyro.util.set_rng_state(self._outer)
