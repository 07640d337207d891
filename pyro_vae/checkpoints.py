"""Checkpoints of a training run: written while it goes on, so that it can be killed at any moment and go on later."""

import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_vae.checks import positive, positive_int
from pyro_vae.tensor_files import FileFormatError, read, write

__all__ = ["Checkpoints"]

_KIND = "checkpoint"
_SECONDS = 60.0

Contents = tuple[dict[str, Any], dict[str, Tensor]]


class Checkpoints:
    """A folder that a run writes its state to, and goes on from if it has one.

    The folder holds ``last.ckpt``, ``previous.ckpt``, and with validation data ``best.ckpt``, the parameters of the
    best epoch. Each is written beside its place and moved there: it is whole or not there.

    Args:
        folder: made if it is not there.
        every_steps: how many steps lie between two checkpoints.
        every_seconds: how many seconds; 60 if neither is given. A last one is written at the end of the run.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints = Checkpoints(folder, every_steps=100)
    ...     checkpoints.due(99), checkpoints.due(200), checkpoints.load()
    (False, True, None)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        every_steps: int | None = None,
        every_seconds: float | None = None,
    ):
        if not isinstance(folder, str | os.PathLike):
            raise TypeError(f"folder: got a {type(folder).__name__}; accepted is the path of a folder")
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(
                f"folder: {str(folder)!r} is a file; accepted is a folder, which is made if it is not there"
            )
        self.every_steps = None if every_steps is None else positive_int(every_steps, "every_steps")
        if every_seconds is None:
            every_seconds = _SECONDS if every_steps is None else float("inf")
        else:
            positive(every_seconds, "every_seconds")
        self.every_seconds = every_seconds
        self._written = time.monotonic()

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "last.ckpt"

    @property
    def previous(self) -> Path:
        """The one before it."""
        return self.folder / "previous.ckpt"

    @property
    def best(self) -> Path:
        """The parameters of the epoch with the best validation ELBO."""
        return self.folder / "best.ckpt"

    def due(self, steps: int) -> bool:
        """Whether it is time for one, after so many steps."""
        by_steps = self.every_steps is not None and steps % self.every_steps == 0
        return by_steps or time.monotonic() - self._written >= self.every_seconds

    def save(self, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write the newest, and keep the one before it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.last.exists():
            os.replace(self.last, self.previous)
        write(self.last, _KIND, header, tensors)
        self._written = time.monotonic()

    def save_best(self, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write the best."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write(self.best, _KIND, header, tensors)

    def load(self) -> Contents | None:
        """The newest that can be read; ``None`` if there is none.

        Raises:
            FileFormatError: if there are some and none can be read.
        """
        errors: list[FileFormatError] = []
        for path in (self.last, self.previous):
            if path.exists():
                try:
                    contents = read(path, _KIND)
                except FileFormatError as error:
                    errors.append(error)
                    continue
                if errors:
                    warnings.warn(f"checkpoints: {errors[0]}. The previous one is used", stacklevel=2)
                return contents
        if errors:
            raise FileFormatError(
                f"checkpoints: none of those in {str(self.folder)!r} can be read. {errors[0]}. To begin anew, remove it"
            )
        return None
