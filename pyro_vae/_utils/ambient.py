"""The contexts around a call: another thread, gradients turned off, Pyro's handlers, autocast."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.runtime import _PYRO_STACK

__all__ = ["check_gradients_enabled", "check_no_outer_handlers", "fresh_autocast", "one_thread"]

_lock = threading.RLock()


class one_thread:
    """Run a block of one thread at a time: Pyro's handlers and its param store belong to the whole process.

    A second thread is refused at once; the same thread may enter again, as a callback of ``fit`` that evaluates does.
    """

    def __init__(self, name: str):
        self._name = name

    def __enter__(self) -> None:
        if not _lock.acquire(blocking=False):
            raise RuntimeError(
                f"`{self._name}` must not run while another thread of the process trains or evaluates: Pyro's "
                "handlers and its param store belong to the whole process. Run one after the other, or each in a "
                "process of its own"
            )

    def __exit__(self, *exception: Any) -> None:
        _lock.release()


def check_gradients_enabled(name: str) -> None:
    """Raise inside of a context without gradients, where a step would change nothing."""
    if not torch.is_grad_enabled():
        context = "torch.inference_mode()" if torch.is_inference_mode_enabled() else "torch.no_grad()"
        raise ValueError(
            f"`{name}` must be called where gradients are enabled, got a call inside of {context}, where no parameter "
            "can be trained. Call it outside of that block"
        )


def check_no_outer_handlers() -> None:
    """Raise inside of a handler of Pyro that would change the sites of every run, such as an outer plate.

    ``poutine.block`` hides the handlers outside of it, and ``poutine.seed`` has no effect on sites; a trace of
    parameters alone records them.
    """
    for handler in reversed(_PYRO_STACK):
        if isinstance(handler, poutine.block_messenger.BlockMessenger):
            return
        if isinstance(handler, poutine.seed_messenger.SeedMessenger) or getattr(handler, "param_only", False):
            continue
        kind = type(handler).__name__.removesuffix("Messenger").lower()
        name = getattr(handler, "name", None)
        got = f"the plate {name!r}" if kind == "plate" else f"`poutine.{kind}`"
        raise ValueError(
            f"`model` and `guide` must be run outside of Pyro's handlers, got a call inside of {got}, which would "
            "see or change their sites in every run. Put the handler around the model itself, such as "
            "`poutine.condition(model, data=...)`, or call outside of the block"
        )


@contextmanager
def fresh_autocast() -> Iterator[None]:
    """Run a block in which ``torch.autocast`` casts the weights again.

    It keeps the copies that it has cast until its own block ends: later steps would not see that weights have changed,
    and copies that were made without gradients would have none.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
