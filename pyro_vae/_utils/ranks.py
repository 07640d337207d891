"""The ranks of a run on several processes, and how they exchange numbers without one that waits for ever.

A script that ``torchrun`` starts runs as K processes, the ranks 0 to K - 1. Each rank runs the same functions in the
same order. :func:`ranks` returns their group; in a script without others, a group of one, whose exchanges are free.

Each exchange begins with a sum of a few numbers over all ranks, see :meth:`Ranks.exchange`. One of them counts the
ranks that have failed. A rank that raises takes part in the next exchange of the others, wherever they are; then all
raise.
"""

import atexit
import builtins
import json
import os
import pickle
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from hashlib import sha256
from typing import Any, NoReturn, ParamSpec, TypeVar
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pyro_vae._utils.rank_process import is_started_by_torchrun

__all__ = ["OnEveryRank", "Ranks", "each_rank", "fingerprint", "form", "is_shared", "one_process", "ranks", "share_of"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_SLOTS = 16  # numbers in an exchange, besides the three that it needs itself
_SUM = "a sum of tensors"
_REDUCED_AS_THEY_ARE = ("cpu", "cuda")  # device types whose tensors the backends know; others go through the CPU


class Ranks:
    """The ranks of torch's default process group, or a group of one.

    Args:
        rank: the number of this process.
        size: the number of processes, K.
        control: a group that adds up tensors on the CPU, if the default one does not. No other group is kept here:
            torch ends the threads of a group only if nothing refers to it at the end of the process.
    """

    def __init__(self, rank: int = 0, size: int = 1, control: Any = None):
        self.rank, self.size, self._control = rank, size, control

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """The share of this rank in the ``count`` rows of a batch.

        No share is a single row of several, which batch normalisation refuses and ``squeeze`` mistakes for none: a
        batch of fewer than 2K rows has fewer shares, and the last ranks have no row. Others differ by one row at most.

        >>> [Ranks(rank, 3).share(5) for rank in range(3)]
        [slice(0, 3, None), slice(3, 5, None), slice(5, 5, None)]
        """
        num_shares = min(self.size, max(1, count // 2))
        return share_of(count, self.rank, num_shares) if self.rank < num_shares else slice(count, count)

    def largest_share(self, count: int) -> int:
        """The number of rows of the largest share in ``count`` rows, that of rank 0."""
        return Ranks(0, self.size).share(count).stop

    def seed(self, seed: int) -> int:
        """A seed of random numbers of this rank alone; that of rank 0 is ``seed``.

        >>> Ranks().seed(3)
        3
        """
        return seed if self.is_first else int(np.random.SeedSequence([seed, self.rank]).generate_state(1)[0])

    def exchange(self, place: str, values: Sequence[float] = (), error: BaseException | None = None) -> list[float]:
        """Return the sums of numbers over ranks; ``place`` is the name of what runs, the same on all ranks.

        Raises:
            RuntimeError: if ranks run different functions.
            Exception: of the kind and with the message of the first rank that gave an ``error``.
        """
        if self.size == 1:
            return list(values)
        if len(values) > _SLOTS:
            raise ValueError(f"`values` must be at most {_SLOTS} numbers, got {len(values)}")
        padded = [error is not None, *_code(f"{place} {len(values)}"), *values, *[0.0] * (_SLOTS - len(values))]
        sums = torch.tensor(padded, dtype=torch.float64, device="cpu")
        with self._connected(place):
            self._add_up(sums)
        failed, *found = sums.tolist()
        if failed:
            self._raise_first(error)
            return found[2 : 2 + len(values)]  # of the rank whose error it is, which is under way
        codes, found = found[:2], found[2:]
        if not self._are_equal(codes):
            places = self._gathered(place, place)
            others = ", ".join(f"{name} on rank {number}" for number, name in enumerate(places))
            raise _shared(
                RuntimeError(
                    f"every rank must run the same functions in the same order, got {others}. A call on one rank alone "
                    "belongs in `with pyro_vae.parallel.one_process():`"
                )
            )
        return found[: len(values)]

    def _add_up(self, numbers: Tensor) -> None:
        """Add up a few numbers over ranks, in place: rank 0 collects them, and sends their sums.

        These are 1 + log2(K) messages one after another, where a ring has 2(K - 1).
        """
        parts = [torch.empty_like(numbers) for _ in range(self.size)] if self.is_first else None
        dist.gather(numbers, parts, group=self._control)
        if parts is not None:
            numbers.copy_(torch.stack(parts).sum(0))
        dist.broadcast(numbers, src=0, group=self._control)

    def _are_equal(self, sums: Sequence[float]) -> bool:
        """Whether all ranks have given the same codes, see :func:`_code`."""
        pairs = zip(sums[::2], sums[1::2], strict=True)
        return all(self.size * squares == total * total for total, squares in pairs)

    def _raise_first(self, error: BaseException | None) -> None:
        """Raise the error of the first rank that has one, unless this rank has one: its own is under way."""
        mine = None if error is None else _described(error)
        errors = self._gathered("an error", mine)
        if error is not None:
            _shared(error)
            return
        rank, found = next((rank, found) for rank, found in enumerate(errors) if found is not None)
        raise _shared(_as_error(rank, *found))

    def _gathered(self, place: str, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with self._connected(place):
            dist.all_gather_object(found, value, group=self._control)
        return found

    @contextmanager
    def _connected(self, place: str) -> Iterator[None]:
        """Run a block that exchanges numbers with other ranks; raise an error of ours if one of them is gone."""
        try:
            yield
        except RuntimeError as error:
            raise _shared(
                RuntimeError(
                    f"rank {self.rank} of {self.size} could not go on with {place}: another rank has ended, or has not "
                    "answered in time. Its own output has the reason, if it could write one"
                )
            ) from error

    def leave(self, error: BaseException) -> NoReturn:
        """Raise an error of this rank that the others have, too, or need not hear of."""
        raise _shared(error)

    def gather(self, place: str, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        self.exchange(place)
        return self._gathered(place, value)

    def to_first(self, place: str, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order, on rank 0, and nothing on the others."""
        if self.size == 1:
            return [value]
        self.exchange(place)
        found: list[Any] = [None] * self.size if self.is_first else []
        dist.gather_object(value, found if self.is_first else None, dst=0, group=self._control)
        return found

    def from_first(self, place: str, value: Any) -> Any:
        """Return the value of rank 0."""
        if self.size == 1:
            return value
        self.exchange(place)
        held = [value if self.is_first else None]
        with self._connected(place):
            dist.broadcast_object_list(held, src=0, group=self._control)
        return held[0]

    def check_same(self, place: str, values: Mapping[str, Any], remedy: str = "") -> None:
        """Raise unless values are the same on all ranks; the error has the first other name.

        They are tensors, the same ones to rounding, such as parameters that processors of several kinds have computed,
        or what JSON can hold.
        """
        if self.size == 1:
            return
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        texts = {
            name: fingerprint(value) if name in tensors else json.dumps(value, default=repr, sort_keys=True)
            for name, value in values.items()
        }
        text = json.dumps(texts)
        if self._are_equal(self.exchange(place, [*_code(text), *_code(text[::-1])])):
            return
        found = self._gathered(place, (texts, {name: _sketch(tensor) for name, tensor in tensors.items()}))
        first, sketches = found[0]
        for name in {name: None for texts, _ in found for name in texts}:
            for rank, (texts, others) in enumerate(found):
                if texts.get(name) != first.get(name) and not _are_close(sketches.get(name), others.get(name)):
                    raise _shared(
                        ValueError(
                            f"`{name}` must be the same on every rank, got {first.get(name, 'nothing')} on rank 0 and "
                            f"{texts.get(name, 'nothing')} on rank {rank}{remedy}"
                        )
                    )

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to add up a tensor over ranks, in place; the function that is returned waits for the end.

        The tensors must come in the same order on all ranks, of which none may have failed, see :meth:`exchange`.
        """
        direct = tensor.device.type in _REDUCED_AS_THEY_ARE
        sent = tensor if direct else tensor.cpu()
        with self._connected(_SUM):
            work = dist.all_reduce(sent, group=None if sent.is_cuda else self._control, async_op=True)

        def finish() -> None:
            with self._connected(_SUM):
                work.wait()
            if sent is not tensor:
                tensor.copy_(sent)

        return finish

    @torch.no_grad()
    def copy_from_first(self, place: str, tensors: Sequence[Tensor]) -> None:
        """Set tensors, in place, to those of rank 0."""
        if self.size == 1:
            return
        self.check_same(place, {f"tensor {number} of {place}": form(tensor) for number, tensor in enumerate(tensors)})
        for tensor in tensors:
            sent = tensor.detach().to("cpu", copy=True).contiguous()
            with self._connected(place):
                dist.broadcast(sent, src=0, group=self._control)
            tensor.copy_(sent)

    def tensors_from_first(self, place: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of rank 0, of any dtype, by name; names may share one. On other ranks they are on the CPU.

        >>> Ranks().tensors_from_first("an example", {"a": torch.zeros(1)})
        {'a': tensor([0.])}
        """
        if self.size == 1:
            return dict(tensors)
        firsts: dict[Any, str] = {}
        forms = {
            name: (
                firsts.setdefault((one.data_ptr(), one.shape, one.dtype) if one.numel() else name, name),
                one.shape,
                one.dtype,
            )
            for name, one in (tensors.items() if self.is_first else ())
        }
        found = dict(tensors) if self.is_first else {}
        for name, (first, shape, dtype) in self.from_first(place, forms).items():
            if not self.is_first:
                found[name] = found[first] if first in found else torch.empty(shape, dtype=dtype, device="cpu")
            if first == name and found[name].numel():
                part = found[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                with self._connected(place):
                    dist.broadcast(part, src=0, group=self._control)
        return found

    @contextmanager
    def together(self, place: str) -> Iterator[None]:
        """Run a block on all ranks: if it raises on one of them, all raise, at their next exchange or at its end."""
        if self.size == 1:
            yield
            return
        self.exchange(place)
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise
        self.exchange(f"the end of {place}")

    def on_first(self, place: str, function: Callable[[], object]) -> None:
        """Call a function on rank 0 alone, as in a process without others, which wait for its end."""
        with self.together(place):
            if self.is_first:
                with one_process():
                    function()

    def fail(self, error: BaseException) -> None:
        """Let all ranks raise an error of this one, unless they do already or the group is gone."""
        if self.size == 1 or is_shared(error):
            return
        try:
            self.exchange("an error", error=error)
        except RuntimeError as lost:  # the other processes have ended
            error.add_note(f"the other ranks do not know of this error: {lost}")


def _code(text: str) -> tuple[float, float]:
    """A number of a text, and its square: sums of both show whether it is the same number on all ranks."""
    code = float(zlib.crc32(text.encode()) % 2**20)
    return code, code * code


def form(tensor: Tensor) -> str:
    """The shape and dtype of a tensor, wherever it is.

    >>> form(torch.zeros(2, 3))
    '(2, 3) float32'
    """
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def fingerprint(tensor: Tensor) -> str:
    """The shape and dtype of a tensor, and a checksum of its numbers.

    >>> fingerprint(torch.zeros(2)), fingerprint(torch.ones(2))
    ('(2,) float32 with checksum 6522df69', '(2,) float32 with checksum d5065190')
    """
    numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{form(tensor)} with checksum {zlib.crc32(numbers.numpy().tobytes()):08x}"


def _sketch(tensor: Tensor) -> tuple[str, list[float], float]:
    """What shows whether two tensors are the same to rounding: sums with several weights, and one of magnitudes."""
    numbers = tensor.detach().cpu().flatten()
    numbers = torch.view_as_real(numbers).flatten() if numbers.is_complex() else numbers
    numbers = numbers.double()
    places = torch.arange(len(numbers), dtype=torch.float64, device="cpu")
    sums = [float((numbers * (places * frequency).cos()).sum()) for frequency in (0.0, 1.0, 2.0)]
    return form(tensor), sums, float(numbers.abs().sum())


def _are_close(ours: tuple[str, list[float], float] | None, theirs: tuple[str, list[float], float] | None) -> bool:
    """Whether two sketches are those of the same floats, to rounding."""
    if ours is None or theirs is None or ours[0] != theirs[0] or "float" not in ours[0]:
        return False
    return all(abs(one - other) <= 1e-5 * ours[2] for one, other in zip(ours[1], theirs[1], strict=True))


def _shared(error: Any) -> Any:
    """Mark an error that all ranks raise."""
    error._pyro_vae_shared = True
    return error


def is_shared(error: BaseException) -> bool:
    return getattr(error, "_pyro_vae_shared", False)


def _described(error: BaseException) -> tuple[bytes, str, str | None, str]:
    """An error for other ranks: its pickle, the names of its kind and of the nearest kind of Python's own, its text.

    There is no pickle of an error whose arguments are not those of its kind, and no nearest kind of an interruption.
    """
    packed = b""
    with suppress(Exception):
        packed = pickle.dumps(error)
    own = (kind for kind in type(error).__mro__ if kind.__module__ == "builtins" and issubclass(kind, Exception))
    nearest = next((kind.__name__ for kind in own if not issubclass(kind, UnicodeError)), None)
    return packed, type(error).__name__, nearest, str(error)


def _as_error(rank: int, packed: bytes, name: str, nearest: str | None, message: str) -> BaseException:
    """An error of another rank: of its kind, or else of the nearest one that is Python's own."""
    if nearest is None:
        return RuntimeError(f"rank {rank} raised {name}: {message}")
    try:
        error = pickle.loads(packed)
    except Exception:
        error = getattr(builtins, nearest)()
    error.args = (f"rank {rank}: {message}",)
    return error


def share_of(count: int, rank: int, size: int) -> slice:
    """Return which of ``count`` rows, in order, belong to a rank.

    >>> [share_of(7, rank, 3) for rank in range(3)]
    [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
    """
    least, more = divmod(count, size)
    start = rank * least + min(rank, more)
    return slice(start, start + least + (rank < more))


_ALONE = Ranks()
_blocks: list[None] = []  # of one_process that have begun and not ended, in any thread
_groups: dict[int, Ranks] = {}  # one at most, by the identity of torch's default group
_inherited: list[Any] = []  # the group of the process of which this one is a copy: its connections are not ours


@contextmanager
def one_process() -> Iterator[None]:
    """Run a block as a process without others: nothing inside is shared with other ranks.

    That is so for all threads of the process, since what the block calls may use some.
    """
    _blocks.append(None)
    try:
        yield
    finally:
        _blocks.pop()


def _begin_copy() -> None:
    """Let a forked copy of this process be none of the ranks; a group that it makes of its own is another one."""
    _groups.clear()
    if dist.is_available() and dist.is_initialized():
        _inherited[:] = [dist.group.WORLD]


def _is_inherited() -> bool:
    return any(dist.group.WORLD is one for one in _inherited)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_copy)


class OnEveryRank:
    """A callback of a training run that runs on every rank."""

    def __init__(self, callback: Callable[..., Any]):
        self.callback = callback

    def __call__(self, *args: Any) -> Any:
        return self.callback(*args)


def ranks() -> Ranks:
    """The ranks that the current block runs on.

    >>> ranks().size
    1
    """
    if _blocks or not dist.is_available():
        return _ALONE
    if not dist.is_initialized():
        if not is_started_by_torchrun():
            return _ALONE
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, number, count = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=_of_this_start(store, number, count), rank=number, world_size=count)
        atexit.register(_leave)
    if _is_inherited() or (size := dist.get_world_size()) == 1:
        return _ALONE
    group = id(dist.group.WORLD)
    if group not in _groups:
        adds_on_cpu = "gloo" in dist.get_backend_config()
        _groups.clear()
        _groups[group] = Ranks(dist.get_rank(), size, None if adds_on_cpu else dist.new_group(backend="gloo"))
    return _groups[group]


def _of_this_start(store: Any, rank: int, size: int) -> Any:
    """Return the part of a store that only the processes of this start of the script use.

    After a restart by ``torchrun`` its store still has the addresses of the processes before, to which no rank could
    connect. Each rank therefore writes a name of its own. All of them together are the name of the start, once every
    rank has read the same ones.
    """
    store.set(f"start of rank {rank}", uuid4().hex)
    joined, deadline = "", time.monotonic() + dist.default_pg_timeout.total_seconds()
    while time.monotonic() < deadline:
        name = sha256(b" ".join(store.get(f"start of rank {number}") for number in range(size))).hexdigest()
        if name != joined:
            store.add(name, 1)
            joined = name
        if store.add(name, 0) == size:
            return dist.PrefixStore(name, store)
        time.sleep(0.01)
    raise RuntimeError(f"rank {rank} of {size} has waited for {dist.default_pg_timeout} for the start of the others")


def _leave() -> None:
    """Leave the group at the end of the script."""
    _groups.clear()
    if dist.is_initialized() and not _is_inherited():
        dist.destroy_process_group()


def each_rank(name: str) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Make a function run on all ranks together: an error on one of them is raised on all."""

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @wraps(function)
        def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            with ranks().together(name):
                return function(*args, **kwargs)

        return run

    return decorate
