"""A script on several ranks: the processes that ``torchrun`` starts, or of a process group of torch.

The script stays as it is. ``torchrun --nproc-per-node=4 script.py`` runs it in four processes, the ranks 0 to 3, and
:func:`pyro_vae.fit` and what evaluates a model share the rows of the data among them. See the page
"Past one machine".

>>> from pyro_vae import parallel
>>> parallel.rank(), parallel.num_ranks()
(0, 1)
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from pyro_vae._utils import ranks as _ranks
from pyro_vae._utils.validation import describe

__all__ = ["num_ranks", "on_every_rank", "one_process", "rank"]


def rank() -> int:
    """Return the number of this process, from 0; also before the first function of the package has run.

    >>> if rank() == 0:
    ...     print("one line for all ranks")
    one line for all ranks
    """
    return _ranks.ranks().rank


def num_ranks() -> int:
    """Return the number of processes that share the work; 1 in a script that runs alone."""
    return _ranks.ranks().size


def one_process() -> AbstractContextManager[None]:
    """Run a block on this rank alone, as in a process without others.

    Every function of the package that is called on some ranks only belongs in it: it would wait for the other ranks.
    The block holds for all threads of the process. Processes that a rank starts, such as the workers of a
    ``DataLoader``, are always alone.

    >>> with one_process():
    ...     num_ranks()
    1
    """
    return _ranks.one_process()


def on_every_rank(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Make a callback of :func:`pyro_vae.fit` run on every rank. Others run on rank 0 alone, in :func:`one_process`.

    A callback that evaluates a large data set belongs on every rank, since the ranks then share its rows. The run ends
    if the callback returns ``True`` on any rank.

    >>> shown = on_every_rank(lambda epoch: print(epoch.record))
    """
    if not callable(callback):
        raise TypeError(f"`callback` must be a function of an Epoch, got {describe(callback)}")
    return _ranks.OnEveryRank(callback)
