"""Work in numbered chunks, which ranks share: each computes some of them, and every rank gets the results of all.

The random numbers of a chunk depend on the seed and on its number alone. So the results are the same for each number of
ranks, and on one process. The size of a chunk must depend on the data and on what fits the memory, not on the ranks.
"""

import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.progress import counted_for_all
from pyro_vae._utils.ranks import one_process, ranks
from pyro_vae._utils.rng import reseed, seeded

__all__ = ["chunk_seed", "in_chunks", "rounds_of_chunks"]

_Chunk = TypeVar("_Chunk")
_Result = TypeVar("_Result")


def chunk_seed(seed: int, number: int) -> int:
    """Return the seed of a chunk; that of the first one is ``seed``.

    >>> chunk_seed(3, 0), chunk_seed(3, 1) == chunk_seed(3, 1), chunk_seed(3, 1) == chunk_seed(4, 1)
    (3, True, False)
    """
    return int(np.random.SeedSequence([seed, 1, number]).generate_state(1)[0]) if number else seed


def in_chunks(
    name: str,
    chunks: Iterable[_Chunk],
    compute: Callable[[_Chunk], _Result],
    device: torch.device,
    seed: int | None = None,
    first: int = 0,
    own: bool = False,
) -> list[_Result]:
    """Return what ``compute`` returns for each chunk, from one of the ranks, on all ranks.

    A chunk runs as on one process: what it calls is not shared again. If one raises, all ranks raise its error, in a
    function that is an :func:`pyro_vae._utils.ranks.each_rank`.

    Args:
        name: of the function that is computed, the same on all ranks.
        chunks: descriptions of the chunks, the same on all ranks.
        compute: from a chunk to its result: tensors, numbers, and what can be pickled.
        device: that of the tensors of other ranks which are not on the CPU there.
        seed: from which, with the number of the chunk, its random numbers come; without it, a chunk draws none.
        first: the number of the first chunk. It must not be 0 where random numbers of ``seed`` were drawn before.
        own: whether each rank has chunks of its own, which it computes all.

    >>> in_chunks("powers", range(4), lambda number: 2**number, torch.device("cpu"))
    [1, 2, 4, 8]
    """
    group, found = ranks(), dict[int, _Result]()
    with one_process(), counted_for_all(group.size), nullcontext() if seed is None else seeded(seed):
        for number, chunk in enumerate(chunks):
            if own:
                number = number * group.size + group.rank
            elif number % group.size != group.rank:
                continue
            if seed is not None:
                reseed(chunk_seed(seed, first + number))
            found[number] = compute(chunk)
    if group.size > 1:
        for packed in group.gather(name, _packed(found)):
            found |= _unpacked(packed, device)
    return [found[number] for number in sorted(found)]


def rounds_of_chunks(
    name: str,
    chunks: Sequence[_Chunk],
    compute: Callable[[_Chunk], _Result],
    device: torch.device,
    on_first: bool = False,
) -> Iterator[tuple[_Chunk, _Result]]:
    """Yield each chunk and what ``compute`` returns for it, in their order, on all ranks or on rank 0 alone.

    In each round, each rank computes one chunk, so that the memory holds as many as there are ranks. Arguments are
    those of :func:`in_chunks`. All ranks must take all chunks.

    >>> list(rounds_of_chunks("powers", range(3), lambda number: 2**number, torch.device("cpu")))
    [(0, 1), (1, 2), (2, 4)]
    """
    group = ranks()
    for start in range(0, len(chunks), group.size):
        found = dict[int, _Result]()
        with one_process():
            if (number := start + group.rank) < len(chunks):
                found[number] = compute(chunks[number])
        if group.size > 1:
            packed = _packed(found)
            for others in group.to_first(name, packed) if on_first else group.gather(name, packed):
                found |= _unpacked(others, device)
        if group.is_first or not on_first:
            yield from ((chunks[number], found[number]) for number in sorted(found))


class _Pickler(pickle.Pickler):
    """Tensors of devices travel as those of the CPU."""

    def persistent_id(self, value: Any) -> Tensor | None:
        return value.detach().cpu() if isinstance(value, Tensor) and value.device.type != "cpu" else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, device: torch.device):
        super().__init__(file)
        self._device = device

    def persistent_load(self, tensor: Any) -> Tensor:
        return tensor.to(self._device)


def _packed(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def _unpacked(packed: bytes, device: torch.device) -> Any:
    return _Unpickler(io.BytesIO(packed), device).load()
