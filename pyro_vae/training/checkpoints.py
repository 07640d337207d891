"""Checkpoints of a training run: its state, written to files while it trains, from which a killed run resumes."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae._utils.files import locked, remove_partial_files
from pyro_vae._utils.ranks import each_rank, ranks
from pyro_vae._utils.validation import positive, positive_int, with_article, writable
from pyro_vae._utils.warn import warn_user
from pyro_vae.saving.files import FileFormatError
from pyro_vae.saving.tensor_file import read, write

__all__ = ["Checkpoints", "Contents", "contents_of_first", "misfits"]

Contents = tuple[dict[str, Any], dict[str, Tensor]]
"""The header and the tensors of a checkpoint."""
_KIND, _KIND_OF_BEST = "checkpoint", "best parameters"


class Checkpoints:
    """A folder that a run writes its state to, and resumes from if it has one. Each run needs a folder of its own.

    The folder holds ``last.safetensors``, ``previous.safetensors``, and with validation data ``best.safetensors``, the
    parameters of the best epoch. Each file is written whole or not at all, and has a checksum. A file that cannot be
    written, on a full disk, leaves the one before; the run continues with a warning, and tries again at the next one.

    While a run trains the folder has ``.lock``, and a second run in it is refused. A process that is killed leaves the
    file, but not the lock.

    On several ranks, rank 0 alone uses the folder, and the others get from it what it has read.

    Args:
        folder: is made if it does not exist.
        every_steps: number of steps between two checkpoints.
        every_seconds: number of seconds between two; 60 if neither is given. The end of the run writes one in any case.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints = Checkpoints(folder, every_steps=100)
    ...     checkpoints.due(99), checkpoints.due(200), checkpoints.load()
    (False, True, None)
    """

    def __init__(
        self, folder: str | os.PathLike[str], every_steps: int | None = None, every_seconds: float | None = None
    ):
        if not isinstance(folder, str | os.PathLike) or not str(folder):
            got = "an empty string" if isinstance(folder, str) else with_article(type(folder).__name__)
            raise TypeError(f"`folder` must be the path of a folder, got {got}")
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"`folder` must be a folder, or a path to make one at, got the file {str(folder)!r}")
        self.last, self.previous, self.best = (
            self.folder / f"{name}.safetensors" for name in ("last", "previous", "best")
        )
        self.every_steps = None if every_steps is None else positive_int(every_steps, "every_steps")
        default = 60.0 if every_steps is None else float("inf")
        self.every_seconds = default if every_seconds is None else positive(every_seconds, "every_seconds")
        self._written = time.monotonic()
        self._damaged = False  # whether the last one is: it must not replace the previous one

    def due(self, steps: int) -> bool:
        """Whether to write a checkpoint after this number of steps."""
        by_steps = self.every_steps is not None and steps % self.every_steps == 0
        return by_steps or time.monotonic() - self._written >= self.every_seconds

    @classmethod
    @contextmanager
    def opened(cls, folder: "Checkpoints | str | os.PathLike[str]") -> "Iterator[Checkpoints]":
        """Yield checkpoints, made if a folder is given; make the folder, lock it, and remove half-written checkpoints.

        Raises:
            BlockingIOError: if another run uses the folder.
            OSError: if nothing can be written in it.
        """
        try:
            checkpoints = folder if isinstance(folder, Checkpoints) else cls(folder)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`checkpoints`: {error}") from error
        try:
            checkpoints.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(
                f"`checkpoints` must be a folder in which files can be written: the folder "
                f"{str(checkpoints.folder)!r} cannot be made ({error.strerror})"
            ) from error
        writable(checkpoints.last, "checkpoints")
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(checkpoints.folder / ".lock"))
            except BlockingIOError as error:
                raise BlockingIOError(
                    f"`checkpoints` must be a folder of its own for each run, got {str(checkpoints.folder)!r}, which "
                    f"{error.strerror} uses: wait for its end, or give another folder"
                ) from None
            for path in (checkpoints.last, checkpoints.best):
                remove_partial_files(path)
            yield checkpoints

    def save(self, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> bool:
        """Write the last checkpoint, and keep the one before it as the previous one; see :meth:`_write`."""
        self._written = time.monotonic()
        done = self._write(self.last, _KIND, header, tensors, None if self._damaged else self.previous)
        self._damaged = self._damaged and not done
        return done

    def save_best(self, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> bool:
        """Write the parameters of the best epoch; see :meth:`_write`."""
        return self._write(self.best, _KIND_OF_BEST, header, tensors)

    def _write(self, path: Path, *contents: Any) -> bool:
        """Write a file, and return whether that was possible; warn if not, since hours of training are in memory."""
        try:
            write(path, *contents)
        except OSError as error:
            warn_user(
                f"`checkpoints`: {str(path)!r} could not be written ({error.strerror or error}). The run continues, "
                "the files before are as they were, and the next checkpoint is tried again"
            )
            return False
        return True

    @each_rank("a checkpoint")
    def load(self, check: Callable[..., None] = lambda header, tensors: None) -> Contents | None:
        """Return header and tensors of the newest checkpoint that can be used, or ``None``; raise if none can.

        ``check`` raises for what cannot be used. On several ranks all of them call this, and get what rank 0 has read.
        """
        return contents_of_first(lambda: self.read(check))

    def read(self, check: Callable[..., None]) -> Contents | None:
        """Return what :meth:`load` does, on one rank."""
        errors: list[str] = []
        for path in (self.last, self.previous, self.folder / "last.ckpt"):  # the name before version 0.1.0
            if not path.exists():
                continue
            try:
                contents = read(path, _KIND)
                _check(path, partial(check, *contents))
            except FileFormatError as error:
                errors.append(str(error).partition(": ")[2])  # without the name of the argument
                continue
            if errors:
                warn_user(f"`checkpoints`: {errors[0]}. The previous checkpoint is used")
            self._damaged = bool(errors)
            return contents
        if errors:
            raise FileFormatError(
                f"`checkpoints` must be an empty folder, or one with a checkpoint that can be read: {errors[0]}"
            )
        return None

    @each_rank("load_best")
    @torch.no_grad()
    def load_best(self, module: nn.Module) -> int:
        """Copy the parameters and buffers of the best epoch to a module, such as a VAE; return the epoch's number.

        On several ranks all of them call this: rank 0 reads the file.

        Raises:
            FileNotFoundError: if there is no best epoch yet: the run had no validation data, or was too short.
            FileFormatError: if the file is damaged.
            ValueError: if the file is of another model, with the names and shapes that differ.
        """
        contents = contents_of_first(self._read_best)
        assert contents is not None
        header, tensors = contents
        own = dict(module.named_parameters()) | dict(module.named_buffers())
        if lines := misfits(tensors, own):
            raise ValueError(f"`module` must be the model of {str(self.best)!r}: {'; '.join(lines)}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        return header["epoch"]

    def _read_best(self) -> Contents:
        header, tensors = read(self.best, _KIND_OF_BEST)
        _check(self.best, lambda: header["epoch"])
        return header, tensors


def contents_of_first(read: Callable[[], Contents | None]) -> Contents | None:
    """Return what a function returns on rank 0, where alone it is called; the others need no file."""
    group = ranks()
    contents = read() if group.is_first else None
    header = group.from_first("a checkpoint", None if contents is None else contents[0])
    if header is None:
        return None
    return header, group.tensors_from_first("a checkpoint", {} if contents is None else contents[1])


def _check(path: Path, check: Callable[[], Any]) -> None:
    try:
        check()
    except Exception as error:  # of a file with the right checksum, made by hand or by another version
        reason = f"it has no {error}" if isinstance(error, KeyError) else f"{error}"
        raise FileFormatError(
            f"`path` must be a whole checkpoint file: {str(path)!r} cannot be used: {reason}"
        ) from error


def misfits(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Return a sentence for each name, shape or dtype in which saved tensors differ from those of a model.

    >>> misfits({"w": torch.zeros(2), "b": torch.zeros(1)}, {"w": torch.zeros(3)})
    ['b (1,) float32 is not in the model', 'w is (2,) float32 in the file and (3,) float32 in the model']
    """
    theirs, ours = (
        {name: f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in tensors.items()}
        for tensors in (saved, own)
    )
    lines = [f"{name} {theirs[name]} is not in the model" for name in theirs if name not in ours]
    lines += [f"{name} {ours[name]} is not in the file" for name in ours if name not in theirs]
    for name in ours.keys() & theirs.keys():
        if ours[name] != theirs[name]:
            lines.append(f"{name} is {theirs[name]} in the file and {ours[name]} in the model")
    return sorted(lines)
