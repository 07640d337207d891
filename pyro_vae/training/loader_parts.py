"""What each of several ranks reads of a loader of torch: rows of its own, or a part of each batch."""

import warnings
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset

from pyro_vae._utils.data import read_only_arrays
from pyro_vae._utils.ranks import Ranks
from pyro_vae._utils.rng import RandomStream

__all__ = ["LoaderParts", "Part", "named_ranks", "reads_by_number"]

Part = Callable[[int, int], slice]
"""Which rows of a batch to read, from the number of the batch and its number of rows."""

_RANKS = (("num_replicas", "rank"), ("num_processes", "process_index"))  # in samplers of torch, and of Accelerate
_READING = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "prefetch_factor", "persistent_workers", "pin_memory_device",
)  # fmt: skip


def named_ranks(owners: Iterable[Any]) -> tuple[int, int] | None:
    """Return for how many ranks samplers or data sets choose rows, and for which one; ``None`` for all rows."""
    for owner in owners:
        for names in _RANKS:
            size, rank = (getattr(owner, name, None) for name in names)
            if isinstance(size, int) and isinstance(rank, int) and size > 1:
                return size, rank
    return None


def reads_by_number(loader: Any) -> bool:
    """Whether a loader reads the rows of a batch by their numbers, as torch does, so that some can be left out."""
    as_torch = type(loader).__iter__ is DataLoader.__iter__ and loader.batch_sampler is not None
    return as_torch and not isinstance(loader.dataset, IterableDataset)


class LoaderParts:
    """Read the part of each batch of a loader that belongs to this rank, and no other row.

    The order of the rows comes from a random stream that is the same on all ranks, as in one process. What the data set
    draws comes from a stream of the rank.

    Args:
        loader: for which :func:`reads_by_number` is true.
        ranks: of the run.

    Attributes:
        has_own_rows: whether the sampler has the rows of this rank alone. Those that a ``DistributedSampler`` repeats,
            so that all ranks have the same number, are left out.
    """

    def __init__(self, loader: Any, ranks: Ranks):
        self.has_own_rows = False
        self._ranks, self._most = ranks, _num_without_repeats(loader)
        self._order: Any = DataLoader(
            _Numbers(), batch_sampler=loader.batch_sampler, generator=loader.generator, collate_fn=list
        )
        self._dataset, self._collate = loader.dataset, loader.collate_fn
        self._sampler = _PartSampler(self)
        with warnings.catch_warnings(action="ignore"):  # of the number of workers: the loader itself has warned
            options = {name: getattr(loader, name) for name in _READING}
            self._loader: Any = DataLoader(loader.dataset, batch_sampler=self._sampler, **options)

    @property
    def code(self) -> int:
        """A number of the rows of all batches that were drawn in the current pass."""
        return self._sampler.code

    def numbers(self, random: RandomStream) -> Generator[list[Any], None, None]:
        """Yield the numbers of the rows in each batch of a pass, without repeated ones."""
        with random:
            order = iter(self._order)
        count = 0
        while True:
            with random:
                numbers = next(order, None)
            if numbers is None:
                return
            yield numbers[: max(0, self._most - count)]
            count += len(numbers)

    def part(self, number: int, count: int) -> slice:
        """The part of this rank in a batch of a pass."""
        return slice(0, count) if self.has_own_rows else self._ranks.share(count)

    def read(self, numbers: list[Any]) -> Any:
        """Read rows in this process, as the loader gives them."""
        return next(iter(DataLoader(self._dataset, batch_sampler=[numbers], collate_fn=self._collate)))

    def batches(self, seed: int, part: Part | None = None) -> Iterator[tuple[int, Any]]:
        """Yield the rows of this rank in each batch of a pass, ``None`` if it has none; and their first number.

        ``part``: which rows of a batch to read, from its number and its number of rows, in place of :meth:`part`.
        """
        parts = self._sampler.begin(RandomStream(seed), part or self.part)
        random = RandomStream(self._ranks.seed(seed))
        with random:
            loaded = iter(self._loader)
        while True:
            with random, read_only_arrays():
                batch = next(loaded, None)
            while parts and not parts[0][1]:
                yield parts.popleft()[0], None
            if batch is None:
                return
            yield parts.popleft()[0], batch


class _PartSampler:
    """The sampler of batches of a loader that reads parts; of a part without rows the loader learns nothing."""

    def __init__(self, parts: LoaderParts):
        self._parts, self.code = parts, 0

    def begin(self, random: RandomStream, part: Part) -> deque[tuple[int, int]]:
        """Begin a pass; return where each part that is drawn begins in the pass, and its number of rows."""
        self._random, self._part, self._drawn, self.code = random, part, deque[tuple[int, int]](), 0
        return self._drawn

    def __iter__(self) -> Iterator[list[Any]]:
        drawn, chosen, count = self._drawn, self._part, 0
        for number, numbers in enumerate(self._parts.numbers(self._random)):
            self.code = zlib.crc32(repr(numbers).encode(), self.code)
            part = chosen(number, len(numbers))
            drawn.append((count + part.start, part.stop - part.start))
            count += len(numbers)
            if part.stop > part.start:
                yield numbers[part]


class _Numbers(Dataset):
    """A data set whose rows are their numbers."""

    def __getitem__(self, number: Any) -> Any:
        return number


def _num_without_repeats(loader: Any) -> int:
    """The number of different rows in a pass over a loader whose sampler repeats the first rows at the end.

    A number that no pass has for any other sampler.
    """
    batches = loader.batch_sampler
    sampler = batches.sampler if type(batches) is BatchSampler else None
    if not isinstance(sampler, DistributedSampler) or type(sampler).__iter__ is not DistributedSampler.__iter__:
        return 2**62
    dataset: Any = sampler.dataset
    return 2**62 if sampler.drop_last else len(range(sampler.rank, len(dataset), sampler.num_replicas))
