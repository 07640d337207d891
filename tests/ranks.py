"""Run a function on several ranks: processes of a group with gloo, which end, or are ended, in bounded time."""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import pyro
import torch
import torch.distributed as dist

from pyro_vae._utils.processes import can_fork


def run_on_ranks(function, size, *args, timeout=90):
    """Return what a function returns on each of ``size`` ranks, in their order.

    The function belongs to a test module, and its results are pickled; those of an error are the text of all ranks. The
    processes are copies of this one where it can be forked, so that they start at once, with all modules.

    Raises:
        RuntimeError: if a rank raises or does not end in ``timeout`` seconds, with what all of them have printed.
    """
    context = multiprocessing.get_context("fork" if can_fork() else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(size):
            process = context.Process(target=_serve, args=(function, rank, size, folder, timeout, args))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                process.start()
            processes.append(process)
        late = _wait(processes, time.monotonic() + timeout)
        found = [_result(Path(folder) / f"{rank}.pickle") for rank in range(size)]
        if any(result is None or not result[0] for result in found):
            texts = []
            for rank, (process, result) in enumerate(zip(processes, found, strict=True)):
                end = "did not end" if rank in late else f"ended with code {process.exitcode}"
                printed = (Path(folder) / f"{rank}.txt").read_text(errors="replace")
                error = "" if result is None or result[0] else result[1]
                texts.append(f"rank {rank} of {size} {end}:\n{printed}{error}")
            raise RuntimeError("\n".join(texts))
    return [result for _, result in found]


def _wait(processes, deadline):
    """Wait for the ends of processes, and end those that are late; return their numbers."""
    running = {process.sentinel: number for number, process in enumerate(processes)}
    while running and (left := deadline - time.monotonic()) > 0:
        for sentinel in wait(list(running), left):
            del running[sentinel]
    for number in running.values():
        processes[number].kill()
    for process in processes:
        process.join()
    return list(running.values())


def _meet(folder, rank, size, name, seconds):
    """Wait until all ranks have come here, for some time.

    A rank that ends closes its connections, at which an exchange of another one fails though it has all of its numbers
    and only waits for a processor. An end before an exchange of others, or after an error, must not wait for them.
    """
    Path(folder, f"{rank}.{name}").touch()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(Path(folder, f"{one}.{name}").exists() for one in range(size)):
        time.sleep(0.002)


def _result(path):
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _serve(function, rank, size, folder, timeout, args):
    """Join the group, run the function, and write its result, or its error, to a file."""
    with Path(folder, f"{rank}.txt").open("w", buffering=1) as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        sys.stdout, sys.stderr = printed, printed
        torch.set_num_threads(1)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.FileStore(f"{folder}/store", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
        dist.barrier()
        _meet(folder, rank, size, "joined", timeout)
        try:
            result = True, function(*args)
            pickle.dumps(result)
        except BaseException:
            result = False, traceback.format_exc()
        partial = Path(folder, f"{rank}.partial")
        partial.write_bytes(pickle.dumps(result))
        partial.rename(Path(folder, f"{rank}.pickle"))
        if result[0]:
            _meet(folder, rank, size, "done", 1.0)
        printed.flush()
        # Without the end of the group, which may wait for ranks that have failed, and those of other tests, whose
        # objects a copy has.
        os._exit(0 if result[0] else 1)
