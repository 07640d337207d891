"""Checkpoints of a training run: written while it goes on, so that it can be killed at any moment and go on later."""

import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae._utils.validation import positive, positive_int, writable
from pyro_vae.saving.tensor_file import FileFormatError, read, write

__all__ = ["Checkpoints", "misfits"]

_KIND = "checkpoint"


_KIND_OF_BEST = "best parameters"


_SECONDS = 60.0


Contents = tuple[dict[str, Any], dict[str, Tensor]]


class Checkpoints:
    """A folder that a run writes its state to, and goes on from if it has one. It is for one run at a time.

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
            raise TypeError(f"`folder` must be the path of a folder, got a {type(folder).__name__}")
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"`folder` must be a folder, which is made if it is not there: {str(folder)!r} is a file")
        self.every_steps = None if every_steps is None else positive_int(every_steps, "every_steps")
        if every_seconds is None:
            every_seconds = _SECONDS if every_steps is None else float("inf")
        else:
            positive(every_seconds, "every_seconds")
        self.every_seconds = every_seconds
        self._written = time.monotonic()
        self._damaged = False  # the last one, which then must not take the place of the one before

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

    @classmethod
    def at(cls, folder: "Checkpoints | str | os.PathLike[str]") -> "Checkpoints":
        """Return checkpoints in a folder, or as they are, whose folder is there and can be written to."""
        checkpoints = folder if isinstance(folder, Checkpoints) else cls(folder)
        checkpoints.prepare()
        return checkpoints

    def prepare(self) -> None:
        """Make the folder, and clear away what a run left there that was killed while it wrote.

        Raises:
            OSError: if nothing can be written there.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(
                f"`checkpoints` must be a folder in which files can be written: the folder {str(self.folder)!r} "
                f"cannot be made ({error.strerror})"
            ) from error
        writable(self.last, "checkpoints")
        for partial in self.folder.glob(".*.partial"):
            partial.unlink(missing_ok=True)

    def save(self, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write the newest, and keep the one before it."""
        if self.last.exists() and not self._damaged:
            os.replace(self.last, self.previous)
        write(self.last, _KIND, header, tensors)
        self._damaged = False
        self._written = time.monotonic()

    def save_best(self, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write the best."""
        write(self.best, _KIND_OF_BEST, header, tensors)

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
                    warnings.warn(f"checkpoints: {_told(errors[0])}. The previous one is used", stacklevel=5)
                self._damaged = bool(errors)
                return contents
        if errors:
            raise FileFormatError(
                f"checkpoints: none of those in {str(self.folder)!r} can be read: {_told(errors[0])}. Another folder "
                "is accepted, or this one when it is empty"
            )
        return None

    @torch.no_grad()
    def load_best(self, module: nn.Module) -> int:
        """Give a module, such as a VAE, the parameters and buffers of the best epoch, and return its number.

        Raises:
            FileNotFoundError: if there is no best yet: the run had no validation data, or was too short.
            FileFormatError: if it is damaged.
            ValueError: if it is of another model, with the names and shapes that differ.
        """
        header, tensors = read(self.best, _KIND_OF_BEST)
        own = dict(module.named_parameters()) | dict(module.named_buffers())
        if lines := misfits(tensors, own):
            raise ValueError(f"module: {str(self.best)!r} is of another model: {'; '.join(lines)}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        return header["epoch"]


def _told(error: FileFormatError) -> str:
    return str(error).removeprefix("path: ")


def misfits(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """In what names, shapes and dtypes saved tensors differ from those of a model, in words.

    >>> misfits({"w": torch.zeros(2), "b": torch.zeros(1)}, {"w": torch.zeros(3)})
    ['b (1,) float32 is not in the model', 'w is (2,) float32 in the file and (3,) float32 in the model']
    """
    lines = [f"{name} {_form(saved[name])} is not in the model" for name in saved if name not in own]
    lines += [f"{name} {_form(own[name])} is not in the file" for name in own if name not in saved]
    for name in own.keys() & saved.keys():
        if _form(own[name]) != _form(saved[name]):
            lines.append(f"{name} is {_form(saved[name])} in the file and {_form(own[name])} in the model")
    return sorted(lines)


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
