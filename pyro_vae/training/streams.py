"""Data that come in batches: loaders and iterable data sets of torch. A pass over all batches is an epoch."""

import json
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from pyro_vae._utils.data import (
    DataTensors,
    FirstBatch,
    LazyData,
    Placement,
    as_tensors,
    data_tensors,
    placement,
    read_only_arrays,
    to_device,
    without_infinity,
)
from pyro_vae._utils.ranks import Ranks, ranks, share_of
from pyro_vae._utils.rng import RandomStream
from pyro_vae._utils.validation import describe, positive_int
from pyro_vae.training.loader_parts import LoaderParts, named_ranks, reads_by_number

__all__ = ["Source", "Stream", "as_source", "check_no_batch_size"]

_RESUMABLE = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)
_PLACE = "the batches of a loader"
_NUM_COMPARED = 8  # rows that ranks compare besides those of the first batch


class Stream:
    """Batches of a loader, as they come, on the device of the model.

    What the loader draws at random, such as its order and the augmentations of its data set, has a random stream of its
    own in each pass, from a seed. So a pass can be repeated, and a run has the same draws as on tensors.

    On several ranks, each has rows of its own, as of a ``DistributedSampler`` or of its own files, or all of them read
    the same batches, of which each takes a part, see :mod:`pyro_vae.training.loader_parts`.

    Args:
        loader: of torch. Its batches are tensors, or tuples of them for several arguments.
        name: of the data in errors.
        to: dtype and device of the model.
        num_data: N of all ranks; by default the length of the data set, or of a sampler of a subset, or the rows of
            one pass.
        shares_size: whether the batch size of the loader is that of all ranks, also if each has rows of its own.

    Attributes:
        ranks: those that read the loader.
        has_own_rows: whether each rank has rows of its own.
        data: the first batch, as data of N rows that come in no order, see :class:`pyro_vae._utils.data.LazyData`. A
            rank without rows has that of another one.
        batch_size: number of rows in the first batch of all ranks.
        num_first: number of rows in the first batch of this rank.
    """

    def __init__(self, loader: Any, name: str, to: Placement, num_data: int | None = None, shares_size: bool = False):
        self._loader, self._name, self._to, self.ranks = loader, name, to, ranks()
        self._samplers = self._find_samplers()
        generators = [loader.generator, *(getattr(sampler, "generator", None) for sampler in self._samplers)]
        self._generators = list({id(one): one for one in generators if isinstance(one, torch.Generator)}.values())
        self._with_epochs = [one for one in (*self._samplers, loader.dataset) if callable(getattr(one, "set_epoch", 0))]
        self._epochs: list[int] = []  # those that were set for the current pass
        shared = self.ranks.size > 1
        self._parts = LoaderParts(loader, self.ranks) if shared and reads_by_number(loader) else None
        self._first: tuple[Tensor, ...] = ()
        self._code, self.has_own_rows = 0, False  # the code of the rows of a pass
        states = self.generator_states()
        numbers, first = self._read_first()
        owned = self._compare_ranks(numbers, first) if shared else None
        self.has_own_rows = owned is not None
        if self._parts is not None:
            self._parts.has_own_rows = self.has_own_rows
        if self.has_own_rows and shares_size:
            first = self._share_size(first)
        self.set_generator_states(states)
        sizes = self.ranks.gather(_PLACE, len(first[0]) if first else 0)
        if not sum(sizes):
            raise ValueError(f"`{name}` must give batches of one row or more, got {describe(loader)} without any")
        self._first = first if all(sizes) else self._lent(first, sizes)
        self.batch_size, self.num_first = sum(sizes) if self.has_own_rows else sizes[0], len(self._first[0])
        form = [(tuple(tensor.shape[1:]), str(tensor.dtype)) for tensor in self._first]
        self.ranks.check_same(_PLACE, {name: form, "num_data": num_data})
        num_data = positive_int(num_data, "num_data") if num_data is not None else self._count_all(owned)
        if self.batch_size > num_data:
            raise ValueError(
                f"`num_data` must be the number of rows in a pass over the stream, got {num_data} and a batch of "
                f"{self.batch_size} rows"
            )
        self.data = LazyData([FirstBatch(self._first, num_data)], to.device)
        without_infinity(self.data, name)

    @property
    def most_rows(self) -> int:
        """The number of rows of the first batch that a rank takes in training, or this one of rows of its own."""
        return self.num_first if self.has_own_rows else self.ranks.largest_share(self.batch_size)

    def _find_samplers(self) -> list[Any]:
        """The samplers of the loader, the one of batches first; none for an iterable data set."""
        if isinstance(self._loader.dataset, IterableDataset):
            return []
        batches = self._loader.batch_sampler
        nested = [getattr(batches, "sampler", None), self._loader.sampler]
        return [one for one in (batches, *nested) if one is not None]

    def _read_first(self) -> tuple[list[Any], tuple[Tensor, ...]]:
        """Return the first batch, empty if there is none, and the numbers of its rows, if the loader reads by them."""
        if self._parts is None:
            batches = self.batches(0)
            first = next(batches, ())[1:]
            batches.close()
            return [], first
        found = self._parts.numbers(RandomStream(0))
        numbers = next(filter(None, found), [])
        found.close()
        return numbers, self._read_rows(numbers) if numbers else ()

    def _read_rows(self, numbers: list[Any]) -> tuple[Tensor, ...]:
        assert self._parts is not None
        with RandomStream(0), read_only_arrays():
            batch = self._parts.read(numbers)
        return self._as_batch(batch)

    # What the ranks have

    def _compare_ranks(self, numbers: list[Any], first: tuple[Tensor, ...]) -> str | None:
        """Find out whether each rank has rows of its own, and how; ``None`` if all read the same batches.

        ``"sampler"``: a sampler chooses the rows of each rank, by its number. ``"numbers"``: the ranks read other rows
        of one data set. ``"content"``: the data are others.
        """
        group, name = self.ranks, self._name
        named = group.gather(_PLACE, named_ranks([*self._samplers, self._loader.dataset]))
        if any(named):
            if sorted(one or (0, 0) for one in named) != [(group.size, rank) for rank in range(group.size)]:
                found = ", ".join("all rows" if one is None else f"rows of rank {one[1]} of {one[0]}" for one in named)
                raise ValueError(f"`{name}` must have a sampler for each of the {group.size} ranks, got {found}")
            return "sampler"
        by_number = all(group.gather(_PLACE, self._parts is not None))
        all_numbers = group.gather(_PLACE, numbers) if by_number else []
        probes = group.gather(_PLACE, self._spread(numbers)) if by_number else []
        probe: list[list[Any]] = next(filter(None, probes), [])
        code = self._codes_of(probe) if by_number else _checksum(first) if first else None
        codes = group.gather(_PLACE, code)
        known = [one for one in codes if one is not None]
        if known and all(one == known[0] for one in codes):
            return None if all(one == numbers for one in all_numbers) else "numbers"
        if by_number:
            _check_repeatable(group, name, self._codes_of(probe) == code)
        if any(one in known[:place] for place, one in enumerate(known)):
            ranks_of = [[rank for rank, one in enumerate(codes) if one == other] for other in known]
            raise ValueError(
                f"`{name}` must have the same rows on all ranks, or others on each, got the same ones on the ranks "
                f"{max(ranks_of, key=len)} of {group.size}"
            )
        return "content"

    def _spread(self, numbers: list[Any]) -> list[list[Any]]:
        """Numbers of rows to compare with those of other ranks: of the first batch, and a few of all rows."""
        with suppress(TypeError):  # a data set without a length
            if numbers and all(isinstance(number, int) for number in numbers):
                count = len(self._loader.dataset)
                return [numbers, list(range(0, count, -(-count // _NUM_COMPARED)))]
        return [numbers] if numbers else []

    def _codes_of(self, probe: list[list[Any]]) -> list[int | None] | None:
        """Checksums of rows; ``None`` if the data set does not have those of the first batch."""
        codes: list[int | None] = []
        for numbers in probe:
            try:
                codes.append(_checksum(self._read_rows(numbers)))
            except Exception:  # of the user's data set, which another rank has in another form
                codes.append(None)  # its own rows are read later
        return codes if codes and codes[0] is not None else None

    def _share_size(self, first: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Let the batches of all ranks together have the size of those of the loader."""
        if (size := self._loader.batch_size) < self.ranks.size:
            raise ValueError(
                f"`batch_size` must be at least the number of ranks, {self.ranks.size}, where each has rows of its "
                f"own, got {size}"
            )
        part = share_of(size, self.ranks.rank, self.ranks.size)
        self._loader = DataLoader(self._loader.dataset, batch_size=part.stop - part.start)
        return tuple(tensor[: part.stop - part.start] for tensor in first)

    def _lent(self, first: tuple[Tensor, ...], sizes: list[int]) -> tuple[Tensor, ...]:
        """Return the first batch, that of another rank if this one has none."""
        lender = next(rank for rank, size in enumerate(sizes) if size)
        sent = tuple(tensor.cpu() for tensor in first) if self.ranks.rank == lender else None
        lent = self.ranks.gather(_PLACE, sent)[lender]
        return first or tuple(to_device(tensor, self._to.device) for tensor in lent)

    def _count_all(self, owned: str | None) -> int:
        """Return N, of the rows of all ranks."""
        if owned is None:
            return self._count()
        sampler, dataset = self._loader.sampler, self._loader.dataset
        if owned == "sampler" and not isinstance(dataset, IterableDataset):
            self.ranks.check_same(_PLACE, {f"len({self._name}.dataset)": len(dataset)})
            return len(dataset)
        if owned == "numbers" and not isinstance(sampler, SubsetRandomSampler):
            raise ValueError(
                f"`num_data` must be given where ranks read other rows of one data set by {describe(sampler)}, which "
                "may have all rows or some. A sampler with `num_replicas` and `rank`, a Subset for each rank, or the "
                "same order on all ranks need none"
            )
        return sum(self.ranks.gather(_PLACE, self._count()))

    def _count(self) -> int:
        """Return the number of rows of the loader; read a pass where nothing else says it."""
        loader, iterates = self._loader, isinstance(self._loader.dataset, IterableDataset)
        if isinstance(loader.sampler, SubsetRandomSampler):
            return len(loader.sampler)
        is_length_of_all = iterates and self.has_own_rows
        if (loader.batch_size is not None or loader.batch_sampler is not None) and not is_length_of_all:
            with suppress(TypeError):  # else items are batches
                return len(loader.dataset)
        states, count, code = self.generator_states(), 0, None
        for rows, *tensors in self.batches(0):
            code = _checksum(tensors) if code is None and self.has_own_rows else code
            count += len(rows)
        self.set_generator_states(states)
        if code is not None and code != _checksum(self._first):
            raise ValueError(
                f"`num_data` must be given where `{self._name}` has other rows in each pass after the same seed, so "
                "that nothing shows whether ranks have the same data"
            )
        return count

    def start_pass(self, number: int) -> None:
        """Call ``set_epoch`` of samplers and data sets, as a loop of torch does, from the epoch that they have.

        An epoch that the user has set since the pass before stays. All ranks have that of rank 0.
        """
        found = [getattr(one, "epoch", None) for one in self._with_epochs]
        found = self.ranks.from_first(_PLACE, [one if isinstance(one, int) else None for one in found])
        if self._epochs:
            pairs = zip(found, self._epochs, strict=True)
            self._epochs = [number if one is None else one + (one == last) for one, last in pairs]
        else:
            self._epochs = [number if one is None else one + number for one in found]
        for one, epoch in zip(self._with_epochs, self._epochs, strict=True):
            one.set_epoch(epoch)

    @contextmanager
    def epochs_kept(self) -> Iterator[None]:
        """Set the epochs of samplers and data sets at the end of a block to those before it."""
        before = [getattr(one, "epoch", None) for one in self._with_epochs]
        try:
            yield
        finally:
            for one, epoch in zip(self._with_epochs, before, strict=True):
                if isinstance(epoch, int):
                    one.set_epoch(epoch)

    # Passes

    def generator_states(self) -> list[Tensor]:
        """Return the states of the generators of the user, from which the order of the next pass is drawn."""
        return [generator.get_state() for generator in self._generators]

    def set_generator_states(self, states: list[Tensor]) -> None:
        """Set the generators of the user to states that :meth:`generator_states` returned."""
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)

    def sampler_state(self) -> Any:
        """Return the state of a sampler of the user, ``None`` where it has none."""
        return next((one.state_dict() for one in self._samplers if hasattr(one, "state_dict")), None)

    def set_sampler_state(self, state: Any) -> None:
        """Set the sampler to a state that :meth:`sampler_state` returned."""
        for sampler in self._samplers:
            if hasattr(sampler, "load_state_dict"):
                sampler.load_state_dict(state)
                return

    def check_resumable(self) -> None:
        """Raise unless a run that was killed can read the same batches again."""
        remedy = "Leave `checkpoints` out, or pass a map-style Dataset with `batch_size`, whose order is in them"
        must = "`checkpoints` need data whose batches come again in the same order"
        if not (samplers := self._samplers):
            raise ValueError(f"{must}, got {describe(self._loader.dataset)}, an iterable data set. {remedy}")
        if self._loader.persistent_workers:
            raise ValueError(f"{must}, got workers that keep their random states, `persistent_workers`. {remedy}")
        for sampler in samplers:
            if type(sampler) in (*_RESUMABLE, BatchSampler):
                continue
            if not (hasattr(sampler, "state_dict") and hasattr(sampler, "load_state_dict")):
                raise ValueError(
                    f"{must}, got {describe(sampler)} without `state_dict` and `load_state_dict`. {remedy}"
                )
            state = sampler.state_dict()
            try:
                json.dumps(state)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{must}, got {describe(sampler)}, whose `state_dict` holds more than numbers and text: {error}"
                ) from error
            if not isinstance(state, dict):
                raise ValueError(f"{must}, got {describe(sampler)}, whose `state_dict` is {describe(state)}")

    def batches(self, seed: int, done: int = 0) -> Generator[tuple[Tensor, ...], None, None]:
        """Yield numbers of rows in this pass and the rows of each batch, without the first ``done`` batches."""
        random, count = RandomStream(seed), 0
        with random:
            loaded = iter(self._loader)
        while True:
            with random, read_only_arrays():
                try:
                    batch = next(loaded)
                except StopIteration:
                    break
            tensors = self._as_batch(batch)
            rows = torch.arange(count, count + len(tensors[0]), device=self._to.device)
            count += len(rows)
            if done:
                done -= 1
                continue
            yield (rows, *tensors)

    def parts(self, seed: int, done: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield what this rank has of each batch, as :meth:`batches`; nothing of a batch without rows of this rank."""
        if self._parts is not None:
            return self._read_parts(self._parts.batches(seed), done)
        if self.ranks.size == 1 or self.has_own_rows:
            return self.batches(self.ranks.seed(seed), done)
        return self._cut_parts(seed, done)

    def _read_parts(self, parts: Iterable[tuple[int, Any]], done: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield the rows that were read of each batch, with their numbers."""
        for number, (start, batch) in enumerate(parts):
            if number < done:
                continue
            tensors = () if batch is None else self._as_batch(batch)
            rows = [torch.arange(start, start + len(tensors[0]), device=self._to.device)] if tensors else []
            yield (*rows, *tensors)

    def _cut_parts(self, seed: int, done: int) -> Iterator[tuple[Tensor, ...]]:
        """Take the rows of this rank from the batches that all ranks read."""
        self._code = 0
        for number, inputs in enumerate(self.batches(seed)):
            self._code = _checksum([tensor[[0, -1]] for tensor in inputs[1:]], self._code)
            if number >= done:
                part = self.ranks.share(len(inputs[0]))
                yield tuple(tensor[part] for tensor in inputs) if part.stop > part.start else ()

    def end_pass(self, count: int) -> None:
        """Raise if no rank had a batch in the pass, or if batches that all ranks read were not the same.

        Args:
            count: how many batches this rank had.
        """
        code = self._code if self._parts is None else self._parts.code
        counts, codes = zip(*self.ranks.gather(_PLACE, (count, code)), strict=True)
        if not any(counts):
            raise ValueError(
                f"`{self._name}` must give batches in each pass, got none in a later one: `__iter__` of an iterable "
                "data set must begin again each time, and not return one iterator that is used up"
            )
        if not self.has_own_rows and len(set(codes)) > 1:
            raise ValueError(
                f"`{self._name}` must have the same batches on all ranks, or other ones from the first one on, got the "
                "same first batch and then others"
            )

    def batches_on_ranks(self, seed: int, repeats: int) -> tuple[bool, Iterator[tuple[Tensor, ...]]]:
        """Return whether each rank has batches of its own, and the batches, whose chunks ranks compute in turn.

        Each batch is ``repeats`` chunks, see :func:`pyro_vae._utils.chunks.in_chunks`. One without a chunk of this rank
        is empty if it need not be read.
        """
        return self.has_own_rows, self._whole_pass(seed, repeats)

    def _whole_pass(self, seed: int, repeats: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield all batches, or those of this rank, and compare the pass with those of the others."""
        size, rank = self.ranks.size, self.ranks.rank

        def whole_or_none(number: int, count: int) -> slice:
            computes = any(chunk % size == rank for chunk in range(number * repeats, (number + 1) * repeats))
            return slice(0, count if computes else 0)

        batches: Iterable[tuple[Tensor, ...]]
        if self.has_own_rows:
            batches = filter(None, self.parts(seed))
        elif self._parts is not None:
            batches = self._read_parts(self._parts.batches(seed, whole_or_none))
        else:
            batches = self.batches(seed)
        count = code = 0
        for inputs in batches:
            count += 1
            code = _checksum(inputs[1:], code) if size > 1 and not self.has_own_rows and self._parts is None else 0
            yield inputs
        self._code = code
        self.end_pass(count)

    def _as_batch(self, batch: Any) -> tuple[Tensor, ...]:
        """Convert a batch, and compare it with the first one."""
        tensors = as_tensors(batch, self._name, self._to)
        sizes = [len(tensor) if tensor.dim() else 0 for tensor in tensors]
        if not sizes or min(sizes) < 1 or min(sizes) != max(sizes):
            raise ValueError(
                f"`{self._name}` must give batches of tensors with the same number of rows, one or more, got "
                f"{', '.join(map(describe, tensors)) or 'no tensor'}"
            )
        first = self._first or tensors
        ours, theirs = ([(tensor.shape[1:], tensor.dtype) for tensor in batch] for batch in (first, tensors))
        if ours != theirs:
            raise ValueError(
                f"`{self._name}` must give batches of one form, {', '.join(map(describe, first))} at first, got "
                f"{', '.join(map(describe, tensors))}"
            )
        return tensors


def _check_repeatable(group: Ranks, name: str, is_same: bool) -> None:
    """Raise if rows that are read twice are not the same on a rank, which a comparison of the ranks needs."""
    if not all(group.gather(_PLACE, is_same)):
        raise ValueError(
            f"`{name}` must give the same rows again after the same seed, for a comparison of the ranks, got other "
            "ones. Draw with torch, NumPy's global state or `random` in the data set, whose seeds are those of the "
            "run, or use a DistributedSampler"
        )


def _check_same_rows(data: DataTensors, name: str) -> None:
    """Raise unless data have the same form on all ranks and, where only some rows are checked, the same rows.

    These are a few of all rows, evenly spaced.
    """
    group = ranks()
    if group.size == 1:
        return

    def text() -> str:
        if data.num_checked == (count := len(data[0])):
            return data.form  # what all ranks compute with is compared later
        with RandomStream(0):
            rows = data.rows(torch.arange(0, count, -(-count // _NUM_COMPARED), device="cpu"))
        return f"{data.form}, checksum {_checksum(rows):08x} of {len(rows[0])} rows"

    ours = text()
    texts = group.gather("the rows of data", ours)
    if any(one != texts[0] for one in texts):
        _check_repeatable(group, name, text() == ours)
        remedy = ". Ranks that have rows of their own must pass a DataLoader each"
        group.check_same("the rows of data", {name: ours}, remedy)


def _checksum(tensors: Iterable[Tensor], before: int = 0) -> int:
    """A number of the values of tensors, after those of others."""
    for tensor in tensors:
        before = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), before)
    return before


class Source(NamedTuple):
    """Data to run a pair on, and the stream that they come in, if their rows cannot be read in any order."""

    data: DataTensors
    stream: Stream | None


def as_source(
    data: Any,
    name: str,
    model: Any,
    keep_integers: bool = False,
    batch_size: int | None = None,
    num_data: int | None = None,
) -> Source:
    """Return data of any form, from which batches can be taken, on the device of the model.

    Ranks share the checks of rows that are read on demand, and must have the same ones.

    Raises:
        TypeError, ValueError: as :func:`pyro_vae._utils.data.data_tensors`; if ``batch_size`` is left out for an
            iterable data set; if ``num_data`` is given for data of a known number of rows.
    """
    stream = _as_stream(data, name, placement(model, keep_integers), batch_size, num_data)
    if stream is not None:
        return Source(stream.data, stream)
    checked_by = ranks().rank, ranks().size
    tensors = data_tensors(data, name, model, keep_integers=keep_integers, lazy=True, checked_by=checked_by)
    _check_same_rows(tensors, name)
    return Source(tensors, None)


def check_no_batch_size(data: Any, batch_size: int | None) -> None:
    """Raise for a ``batch_size`` next to a loader, which makes its own batches."""
    if isinstance(data, DataLoader) and batch_size is not None:
        raise ValueError(
            f"`batch_size` must be left out where a DataLoader makes the batches, got {batch_size!r}; set it in the "
            "loader, or pass its data set"
        )


def _as_stream(data: Any, name: str, to: Placement, batch_size: int | None, num_data: int | None) -> Stream | None:
    """The stream of a loader or an iterable data set; ``None`` for data whose rows can be read in any order."""
    if isinstance(data, DataLoader):
        return Stream(data, name, to, num_data)
    if isinstance(data, IterableDataset):
        if batch_size is None:
            raise ValueError(
                f"`{name}` must come in batches, with `batch_size` or from a DataLoader, got {describe(data)}, an "
                "iterable data set, whose rows cannot all be used at once"
            )
        loader = DataLoader(data, batch_size=positive_int(batch_size, "batch_size"))
        return Stream(loader, name, to, num_data, shares_size=True)
    if num_data is not None:
        raise ValueError(f"`num_data` must be left out for data that have N rows, got {num_data!r}; it is of a stream")
    return None
