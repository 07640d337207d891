"""Data that come in batches: loaders and iterable data sets of torch. A pass over all batches is an epoch."""

import json
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
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
    without_infinity,
)
from pyro_vae._utils.ranks import Ranks, ranks
from pyro_vae._utils.rng import RandomStream
from pyro_vae._utils.validation import describe, positive_int

__all__ = ["Source", "Stream", "as_source", "check_no_batch_size"]

_RESUMABLE = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Stream:
    """Batches of a loader, as they come, on the device of the model.

    What the loader draws at random, such as its order and the augmentations of its data set, has a random stream of its
    own in each pass, from a seed. So a pass can be repeated, and a run has the same draws as on tensors.

    Args:
        loader: of torch. Its batches are tensors, or tuples of them for several arguments.
        name: of the data in errors.
        to: dtype and device of the model.
        num_data: N; by default the length of the data set, or of a sampler of a subset, or the rows of one pass.

    Attributes:
        data: the first batch, as data of N rows that come in no order, see :class:`pyro_vae._utils.data.LazyData`.
        batch_size: number of rows in the first batch.
    """

    def __init__(self, loader: Any, name: str, to: Placement, num_data: int | None = None):
        self._loader, self._name, self._to = loader, name, to
        samplers = self._samplers()
        generators = [loader.generator, *(getattr(sampler, "generator", None) for sampler in samplers)]
        self._generators = list({id(one): one for one in generators if isinstance(one, torch.Generator)}.values())
        self._first: tuple[Tensor, ...] = ()
        states, batches = self.generator_states(), self.batches(0)
        first = next(batches, ())[1:]
        batches.close()
        self.set_generator_states(states)
        if not first:
            raise ValueError(f"`{name}` must give batches of one row or more, got {describe(loader)} without any")
        self._first, num_data = first, self._count(num_data)
        self.batch_size = len(first[0])
        if self.batch_size > num_data:
            raise ValueError(
                f"`num_data` must be the number of rows in a pass over the stream, got {num_data} and a batch of "
                f"{self.batch_size} rows"
            )
        self.data = LazyData([FirstBatch(first, num_data)], to.device)
        without_infinity(self.data, name)

    def _samplers(self) -> list[Any]:
        """The samplers of the loader, the one of batches first; none for an iterable data set."""
        if isinstance(self._loader.dataset, IterableDataset):
            return []
        batches = self._loader.batch_sampler
        nested = [getattr(batches, "sampler", None), self._loader.sampler]
        return [one for one in (batches, *nested) if one is not None]

    def _count(self, num_data: int | None) -> int:
        """Return N; read a pass where nothing else says it."""
        if num_data is not None:
            return positive_int(num_data, "num_data")
        loader = self._loader
        if isinstance(loader.sampler, SubsetRandomSampler):
            return len(loader.sampler)
        if loader.batch_size is not None or loader.batch_sampler is not None:  # else items are batches
            with suppress(TypeError):
                return len(loader.dataset)
        states = self.generator_states()
        count = sum(len(rows) for rows, *_ in self.batches(0))
        self.set_generator_states(states)
        return count

    def generator_states(self) -> list[Tensor]:
        """Return the states of the generators of the user, from which the order of the next pass is drawn."""
        return [generator.get_state() for generator in self._generators]

    def set_generator_states(self, states: list[Tensor]) -> None:
        """Set the generators of the user to states that :meth:`generator_states` returned."""
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)

    def sampler_state(self) -> Any:
        """Return the state of a sampler of the user, ``None`` where it has none."""
        return next((one.state_dict() for one in self._samplers() if hasattr(one, "state_dict")), None)

    def set_sampler_state(self, state: Any) -> None:
        """Set the sampler to a state that :meth:`sampler_state` returned."""
        for sampler in self._samplers():
            if hasattr(sampler, "load_state_dict"):
                sampler.load_state_dict(state)
                return

    def check_resumable(self) -> None:
        """Raise unless a run that was killed can read the same batches again."""
        remedy = "Leave `checkpoints` out, or pass a map-style Dataset with `batch_size`, whose order is in them"
        must = "`checkpoints` need data whose batches come again in the same order"
        if not (samplers := self._samplers()):
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

    def batches_on_ranks(self, seed: int) -> tuple[bool, Iterator[tuple[Tensor, ...]]]:
        """Return whether each rank has batches of its own, as those of a ``DistributedSampler``, and the batches.

        Else all ranks read the same ones, as from the same loader in the same script. The first batches show it; all of
        them are compared at the end of the pass.
        """
        group = ranks()
        if group.size == 1:
            return False, self.batches(seed)
        own = len(set(group.gather("the first batch of a loader", _checksum(self._first)))) > 1
        return own, self.batches(seed) if own else self._compared(seed, group)

    def _compared(self, seed: int, group: Ranks) -> Iterator[tuple[Tensor, ...]]:
        """Yield batches that must be those of all ranks."""
        checksum = 0
        for rows, *tensors in self.batches(seed):
            checksum = _checksum(tensors, checksum)
            yield (rows, *tensors)
        if len(set(group.gather("the batches of a loader", checksum))) > 1:
            raise ValueError(
                f"`{self._name}` must have the same batches on all ranks, or other ones from the first one on, got the "
                "same first batch and then others"
            )

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

    Raises:
        TypeError, ValueError: as :func:`pyro_vae._utils.data.data_tensors`; if ``batch_size`` is left out for an
            iterable data set; if ``num_data`` is given for data of a known number of rows.
    """
    stream = _as_stream(data, name, placement(model, keep_integers), batch_size, num_data)
    if stream is not None:
        return Source(stream.data, stream)
    return Source(data_tensors(data, name, model, keep_integers=keep_integers, lazy=True), None)


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
        return Stream(DataLoader(data, batch_size=positive_int(batch_size, "batch_size")), name, to, num_data)
    if num_data is not None:
        raise ValueError(f"`num_data` must be left out for data that have N rows, got {num_data!r}; it is of a stream")
    return None
