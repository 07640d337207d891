"""Files that are written whole or not at all, and the error for files that cannot be read."""

import os
from pathlib import Path

from pyro_vae._utils.files import replacing
from pyro_vae._utils.validation import file_path

__all__ = ["FileFormatError", "read_file", "write_file"]


class FileFormatError(ValueError):
    """A file that is damaged, or of another kind or version. A caller may have an earlier file to use instead."""


def write_file(path: str | os.PathLike[str], content: bytes, keep: Path | None = None) -> None:
    """Write a file. At each moment, the path has either the new content or what it had before.

    What it had is moved to ``keep``, if that is given; for a moment nothing is at the path then.
    Raise ``ValueError`` for a folder or a device, ``FileNotFoundError`` without the folder, ``OSError`` on a full disk.
    """
    path = file_path(path, "path")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"`path` must be in a folder that exists: there is no folder {str(path.parent)!r} for {path.name!r}"
        )
    if path.exists():
        _check_regular(path)
    with replacing(path, keep) as partial, partial.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # before the move: a name without its content would outlive a loss of power


def read_file(path: str | os.PathLike[str], kind: str) -> bytes:
    """Return the content of a file; raise if it is missing, or no file. ``kind`` is what it should be, for errors."""
    path = file_path(path, "path")
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a {kind} file of pyro_vae: there is no file {str(path)!r}")
    _check_regular(path)
    return path.read_bytes()


def _check_regular(path: Path) -> None:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no regular file, but a device or similar"
        raise ValueError(f"`path` must be a file: {str(path)!r} is {found}")
