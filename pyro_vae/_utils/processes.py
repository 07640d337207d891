"""Run a function for many numbers, in several processes at once where the machine can fork them."""

import contextvars
import multiprocessing
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from pyro_vae._utils.progress import counted_for_all
from pyro_vae._utils.ranks import one_process, ranks

__all__ = ["can_fork", "default_processes", "run_in_processes"]

_Result = TypeVar("_Result")


def can_fork() -> bool:
    """Whether a copy of this process can compute: on Linux, and without CUDA, whose state no copy can use.

    A daemon, such as a worker of ``multiprocessing.Pool``, may have no children.
    """
    daemon = multiprocessing.current_process().daemon
    return sys.platform.startswith("linux") and not torch.cuda.is_available() and not daemon


def default_processes() -> int:
    """The number of processors that this process may use; 1 where it cannot be forked.

    Ranks on one machine share its processors.
    """
    if not can_fork():
        return 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks().size)) if ranks().size > 1 else 1
    return max(1, len(os.sched_getaffinity(0)) // here)


def run_in_processes(
    run: Callable[[int], _Result], count: int, processes: int, report: Callable[[], object]
) -> list[_Result]:
    """Return ``[run(0), ..., run(count - 1)]``, from at most ``processes`` copies of this process.

    Ranks share the runs, each with as many copies, and return the results of all. Each copy runs on one thread. Where
    there is one process, or no copy can be made, all runs are here, on one thread, too: the results are the same if
    each run is a function of its number alone. It must leave no trace, since what a copy changes is lost. Context
    variables have their defaults, so that no run draws to the progress bar of this process; ``report`` is called here
    after each. Results are pickled; return arrays of NumPy for tensors.

    Raises:
        Exception: the first error of a run, after which the others are ended.
        RuntimeError: if a process ends without a result, as one that the system stops for want of memory.

    >>> run_in_processes(lambda number: number**2, 5, processes=2, report=lambda: None)
    [0, 1, 4, 9, 16]
    """
    group = ranks()
    with counted_for_all(group.size):
        found = _run(run, range(group.rank, count, group.size), processes, report)
    for others in group.gather("the results of processes", found) if group.size > 1 else []:
        found |= others
    return [found[number] for number in range(count)]


def _run(
    run: Callable[[int], _Result], numbers: range, processes: int, report: Callable[[], object]
) -> dict[int, _Result]:
    """Run a function for some numbers, and return its results by number."""
    processes = min(processes, len(numbers)) if can_fork() else 1
    found: dict[int, _Result] = {}
    if processes <= 1:
        with _threads(1):
            for number in numbers:
                found[number] = contextvars.Context().run(_alone, run, number)
                report()
        return found
    with _forked(run, [numbers[first::processes] for first in range(processes)]) as connections:
        while len(found) < len(numbers):
            for connection in wait(connections):
                assert isinstance(connection, Connection)
                try:
                    number, result, error = pickle.loads(connection.recv_bytes())
                except EOFError as ended:
                    raise RuntimeError("a process ended before its results; were it out of memory?") from ended
                if error is not None:
                    raise error
                if number is None:  # this process is done
                    connections.remove(connection)
                else:
                    found[number] = result
                    report()
    return found


@contextmanager
def _forked(run: Callable[[int], Any], shares: Sequence[range]) -> Iterator[list[Connection]]:
    """Start a process for each share of the numbers; inside the block, its results come by a connection."""
    context = multiprocessing.get_context("fork")
    started = []
    try:
        for share in shares:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(run, share, sender), daemon=True)
            with warnings.catch_warnings():
                # Python warns of any thread, such as those of torch, which the copies do not use, and have not.
                warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                process.start()
            sender.close()  # so that the end of the process is the end of the connection
            started.append((process, receiver))
        yield [receiver for _, receiver in started]
    finally:
        for process, receiver in started:
            process.terminate()
            process.join()
            receiver.close()


def _serve(run: Callable[[int], Any], numbers: range, sender: Connection) -> None:
    """Send the result of each run, or its error, and at last that there are no more."""
    torch.set_num_threads(1)
    try:
        for number in numbers:
            sender.send_bytes(pickle.dumps((number, contextvars.Context().run(_alone, run, number), None)))
        sender.send_bytes(pickle.dumps((None, None, None)))
    except Exception as error:
        sender.send_bytes(_pickled(error))


def _alone(run: Callable[[int], _Result], number: int) -> _Result:
    """Run as a process without others: a copy of one of several ranks is none of them."""
    with one_process():
        return run(number)


def _pickled(error: Exception) -> bytes:
    """An error as it is sent; by its words alone if it cannot be pickled and restored."""
    try:
        sent = pickle.dumps((None, None, error))
        pickle.loads(sent)
    except Exception:
        return pickle.dumps((None, None, RuntimeError(f"{type(error).__name__}: {error}")))
    return sent


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
