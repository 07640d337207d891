"""Which process is a rank: one that ``torchrun`` has started, and none of those that it starts itself.

Those have its environment variables, also the number of its rank. The first process of a start that imports the package
is the rank, and leaves a mark for the others; so ``torchrun`` may start a shell script that starts Python.
"""

import multiprocessing
import os

__all__ = ["is_started_by_torchrun", "mark_process"]

_MARK = "PYRO_VAE_RANK"
_START = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT", "RANK")


def is_started_by_torchrun() -> bool:
    """Whether ``torchrun`` has started this very process, as one of several, and no other rank has."""
    return os.getpid() == _rank_process


def mark_process() -> None:
    """Note that this process is a rank, if it is one, and leave a mark of its start for those that it starts."""
    global _rank_process
    start = " ".join(os.environ.get(name, "") for name in _START)
    several = "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not several or multiprocessing.parent_process() is not None or os.environ.get(_MARK) == start:
        return
    os.environ[_MARK] = start  # a mark of another start is that of a rank that has called `torchrun`
    _rank_process = os.getpid()


_rank_process: int | None = None
