"""Random states: seed a block without a change to the user's random streams, and save or restore them.

They are those of :mod:`random`, NumPy, torch on the CPU, and each device that this process has used: a program draws on
other devices than the current one, too. No device is started to read its state.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_vae._utils.validation import seed_number

__all__ = [
    "RandomStream", "is_random_state", "preserve_rng_state", "random_states", "reseed", "seed_all", "seeded",
    "set_random_states", "set_torch_random_states", "torch_random_states",
]  # fmt: skip

_CPU = "torch"
_KINDS = ("cuda", "xpu", "mps", "mtia", "privateuseone")  # the last one is that of a backend outside of torch


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Run a block, then restore the random states of torch (of all devices), NumPy and :mod:`random`."""
    states = _states()
    try:
        yield
    finally:
        _set_states(states)


def torch_random_states() -> dict[str, Tensor]:
    """The random states of torch alone: of the CPU, named ``torch``, and of each device, named as ``cuda:1`` is.

    >>> list(torch_random_states())
    ['torch'...]
    """
    states = {_CPU: torch.get_rng_state()}
    for kind, module in _used_modules():
        for number in range(module.device_count()):
            device = torch.device(kind, number)
            states[str(device)] = module.get_rng_state(device)
    return states


def set_torch_random_states(states: dict[str, Tensor]) -> None:
    """Restore the states that :func:`torch_random_states` returned.

    Devices that were first used since then get the seed of the CPU's state, which ``torch.manual_seed`` gives to all.
    """
    torch.set_rng_state(states[_CPU])
    for kind, module in _used_modules():
        found = [torch.device(kind, number) for number in range(module.device_count())]
        if not any(str(device) in states for device in found):
            _seed_all(module)
        for device in found:
            if str(device) in states:
                module.set_rng_state(states[str(device)], device)


def is_random_state(name: str) -> bool:
    """Whether a name is one of :func:`torch_random_states`, in this process or in that of a file.

    >>> [is_random_state(name) for name in ("torch", "cuda:1", "order")]
    [True, True, False]
    """
    return name in (_CPU, "cuda") or ":" in name  # "cuda" was that of the current device in earlier files


def _used_modules() -> list[tuple[str, Any]]:
    """The modules of torch for kinds of devices that this process has used, with the names of these kinds."""
    return [(name, module) for name, module in _modules() if getattr(module, "is_initialized", module.is_available)()]


def _modules() -> Iterator[tuple[str, Any]]:
    """The modules of torch for all kinds of devices that have random states, with the names of these kinds."""
    for kind in _KINDS:
        name = kind if kind != _KINDS[-1] else torch.device(kind).type  # such a backend may have another name
        module: Any = getattr(torch, name, None)
        if hasattr(module, "get_rng_state"):
            yield name, module


def _may_start_later(module: Any) -> bool:
    return hasattr(module, "is_initialized") and module.is_available() and not module.is_initialized()


def _seed_all(module: Any) -> None:
    """Seed all devices of a kind as the last ``torch.manual_seed`` did."""
    seed = module.manual_seed_all if hasattr(module, "manual_seed_all") else module.manual_seed
    seed(torch.initial_seed())


def _states() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return pyro.util.get_rng_state(), torch_random_states()


def _set_states(states: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    pyro.util.set_rng_state(states[0])
    set_torch_random_states(states[1])


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
    try:
        with preserve_rng_state():
            seed_all(seed)
            yield
    finally:
        for _, module in _modules():
            if _may_start_later(module):
                _seed_all(module)  # which keeps the last seed until it starts


def seed_all(seed: int) -> None:
    """Seed all random streams as ``pyro.set_rng_seed``, in less time where no device can be used later.

    For each kind of device torch keeps the seed together with the text of the whole call stack until it starts, which
    takes milliseconds even where there is none.
    """
    if any(_may_start_later(module) for _, module in _modules()):
        pyro.set_rng_seed(seed)
    else:
        reseed(seed)


def reseed(seed: int) -> None:
    """Seed all random streams again, inside of a :func:`seeded` block: as ``pyro.set_rng_seed``, in less time.

    That one seeds the devices that may be used later, too, which take the seed of the block here.

    >>> with seeded(0):
    ...     reseed(1)
    ...     ours = torch.rand(3)
    >>> with seeded(1):
    ...     torch.equal(ours, torch.rand(3))
    True
    """
    torch.default_generator.manual_seed(seed)
    for _, module in _used_modules():
        (module.manual_seed_all if hasattr(module, "manual_seed_all") else module.manual_seed)(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # the stream that programs of users may draw from


def random_states() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All random states, as JSON values and tensors, to restore in another process."""
    state, streams = _states()
    name, keys, *rest = state["numpy"]
    return {"random": state["random"], "numpy": [name, keys.tolist(), *rest]}, streams


def set_random_states(states: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Restore the states that :func:`random_states` returned, of the devices that this process uses."""
    version, keys, gauss = states["random"]
    name, numbers, *rest = states["numpy"]
    numpy = (name, np.array(numbers, dtype=np.uint32), *rest)
    if "cuda" in tensors and torch.cuda.is_initialized():
        tensors = {f"cuda:{torch.cuda.current_device()}": tensors["cuda"]} | tensors
    ours = {"torch": tensors[_CPU], "random": (version, tuple(keys), gauss), "numpy": numpy}
    _set_states((ours, tensors))


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
            self._states = _states()

    def __enter__(self) -> None:
        self._outer = _states()
        _set_states(self._states)

    def __exit__(self, *exception: Any) -> None:
        self._states = _states()
        _set_states(self._outer)
