"""Files that appear whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["remove_partial_files", "replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a temporary file in the same folder, and move that file to ``path`` at the end.

    After an error or an interruption the temporary file is removed, and ``path`` has what it had before.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files of processes that were killed in :func:`replacing`."""
    for partial in folder.glob(f".{'[0-9a-f]' * 32}.partial"):
        partial.unlink(missing_ok=True)
