"""Latents outside the data plate, which all ranks of a run must draw alike: each rank has other rows of one batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae._utils.rng import RandomStream
from pyro_vae.compilation.recorder import CaptureError, from_outside, is_recording

__all__ = ["SharedDraws"]


class SharedDraws(Messenger):
    """Draw the sites outside of a plate from a random stream that is the same on all ranks.

    The stream of each step begins with a seed of its own, so that a step can be run again, in a comparison or after
    a restart, to the same draws. All else is drawn from the stream of the rank.

    In a capture, the noise of such a site is a tensor that :meth:`refill` fills before each replay.

    Args:
        plate: the name of the data plate; ``None`` where one rank has all rows, whose sites are all its own.
        seed: of the run.
    """

    def __init__(self, plate: str | None, seed: int):
        super().__init__()
        self.plate, self.step, self._seed = plate, 0, seed
        self._stream: RandomStream | None = None
        self._fills: list[Callable[[], Any]] = []

    def __enter__(self) -> Any:
        self._stream = None  # a run begins
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        known = self.plate is None or msg["done"] or msg["is_observed"] or site_is_subsample(msg)
        if known or any(frame.name == self.plate for frame in msg["cond_indep_stack"]):
            return
        with self._noise():
            msg["value"], msg["done"] = msg["fn"](*msg["args"], **msg["kwargs"]), True

    @contextmanager
    def _noise(self) -> Iterator[None]:
        """Run a block whose random numbers are those of the stream."""
        if is_recording():
            with _AsTensors(self._fills):
                yield
            return
        self._stream = self._stream or self.stream()
        with self._stream:
            yield

    def stream(self, number: int = 1) -> RandomStream:
        """A random stream of the current step that is the same on all ranks; another one for each ``number``."""
        return RandomStream(int(np.random.SeedSequence([self._seed, number, self.step]).generate_state(1)[0]))

    @contextmanager
    def captured(self) -> Iterator[list[Callable[[], Any]]]:
        """Run a block with a capture; yield a list for what fills the noise of its last run."""
        self._fills = []
        yield self._fills

    def refill(self, fills: Sequence[Callable[[], Any]]) -> None:
        """Draw the noise of a captured run."""
        if fills:
            with self.stream(), torch.no_grad():
                for fill in fills:
                    fill()


class _AsTensors(TorchDispatchMode):
    """Replace random numbers in a capture by tensors, and add to a list what fills these."""

    def __init__(self, fills: list[Callable[[], Any]]):
        super().__init__()
        self._fills = fills

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        written, *others = args if func._schema.is_mutable else (None, *args)
        if any(isinstance(one, Tensor) for one in others):
            raise CaptureError(
                f"`compile` must be False where {func} draws a latent outside the data plate, whose noise ranks share"
            )
        if written is None:
            noise = from_outside(lambda: func(*args, **kwargs))
            self._fills.append(lambda: noise.copy_(func(*args, **kwargs)))
            return noise.clone()
        noise = from_outside(lambda: torch.empty_like(written))
        self._fills.append(lambda: func(noise, *others, **kwargs))
        return written.copy_(noise)
