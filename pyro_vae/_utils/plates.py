"""Plates that a program subsamples by itself, with all of their rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro.poutine.subsample_messenger import SubsampleMessenger

__all__ = ["every_row", "own_subsamples"]

_found: list[dict[str, tuple[int, int]]] = []  # of the blocks that run


@contextmanager
def every_row() -> Iterator[dict[str, tuple[int, int]]]:
    """Give each plate all of its rows inside the block, in order; yield size and own subsample size by name.

    A plate with ``subsample_size=`` or ``subsample=`` takes some rows, and scales its sites to all of them. That is
    right in training; a number that is reported is that of all rows. A subsample that a handler sets stays, such as
    that of :class:`pyro_vae.handlers.SubsampleRows`.

    >>> import pyro
    >>> with every_row() as found:
    ...     with pyro.plate("data", 5, subsample_size=2) as rows:
    ...         print(rows.tolist())
    [0, 1, 2, 3, 4]
    >>> found
    {'data': (5, 2)}
    """
    found: dict[str, tuple[int, int]] = {}
    given = SubsampleMessenger.__dict__["_subsample"]

    def subsample(
        name: str, size: Any = None, subsample_size: Any = None, subsample: Any = None, *device: Any
    ) -> tuple[Any, Any, Any]:
        if size is not None and (subsample_size is not None or subsample is not None):
            count = len(subsample) if subsample_size is None else int(subsample_size)
            if count < size:
                found[name] = int(size), count
            subsample_size = subsample = None
        return given.__func__(name, size, subsample_size, subsample, *device)

    owner: Any = SubsampleMessenger
    owner._subsample = staticmethod(subsample)
    _found.append(found)
    try:
        yield found
    finally:
        _found.remove(found)
        owner._subsample = given


def own_subsamples() -> dict[str, tuple[int, int]]:
    """The plates that took a subsample of their own inside :func:`every_row`, with its size and theirs; by name."""
    return _found[-1] if _found else {}
