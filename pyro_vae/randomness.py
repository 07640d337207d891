"""Random streams that leave the user's own untouched."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch

from pyro_vae.checks import seed_number

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under ``pyro.set_rng_seed(seed)``, then put every random state back as it was.

    The states are those of torch (the CPU and the current CUDA device), NumPy and :mod:`random`.

    >>> before = torch.get_rng_state()
    >>> with seeded(0):
    ...     first = torch.rand(3)
    >>> with seeded(0):
    ...     second = torch.rand(3)
    >>> torch.equal(first, second), torch.equal(before, torch.get_rng_state())
    (True, True)

    Raises:
        ValueError: if it is no integer from 0 to 2^32 - 1; the states are then as they were.
    """
    seed = seed_number(seed)
    state = pyro.util.get_rng_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        pyro.set_rng_seed(seed)
        try:
            yield
        finally:
            pyro.util.set_rng_state(state)
