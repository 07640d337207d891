"""Files that appear whole or not at all, and locks that one process holds at a time."""

import errno
import os
import socket
import sys
import threading
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

__all__ = ["locked", "remove_partial_files", "replacing"]

_HEX = 32  # digits
_HELD_ELSEWHERE = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Give the path of a temporary file in the same folder, and move that file to ``path`` at the end.

    What ``path`` had is then moved to ``keep``, if that is given. After an error or an interruption the temporary file
    is removed, and both paths have what they had before.
    """
    partial = path.with_name(f".{_short(path)}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(path: Path) -> None:
    """Remove the temporary files of processes that were killed in :func:`replacing` this path.

    No other process may write to the path at the same time, see :func:`locked`.
    """
    for partial in path.parent.glob(f".{escape(_short(path))}.{'[0-9a-f]' * _HEX}.partial"):
        partial.unlink(missing_ok=True)


def _short(path: Path) -> str:
    return path.name[:40]  # names of files have a limit of 255 bytes


_held: dict[Path, int] = {}  # the process of each lock: a forked process has a copy of this, but not the locks
_mutex = threading.Lock()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock, a file, inside the block; raise ``BlockingIOError``, with the process that holds it, if one does.

    The system releases the lock of a process that was killed, and the file that it left is taken over.
    """
    key, owner = path.resolve(), os.getpid()
    with _mutex:
        if _held.get(key) == owner:  # a lock of the system is between processes, and not between threads
            raise BlockingIOError(errno.EAGAIN, f"another run in this process, {owner}")
        descriptor = _open_locked(path)
        _held[key] = owner
    try:
        yield
    finally:
        if os.getpid() == owner:  # and not in a process that was forked inside the block
            with _mutex, suppress(OSError):
                del _held[key]
                path.unlink(missing_ok=True)
                os.close(descriptor)


def _open_locked(path: Path) -> int:
    """Open and lock a file, and write into it which process has done so."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno in _HELD_ELSEWHERE:
                with suppress(OSError):
                    holder = os.read(descriptor, 200).decode(errors="replace")
                os.close(descriptor)
                raise BlockingIOError(errno.EAGAIN, holder or "another process") from None
            warnings.warn(f"{str(path.parent)!r} is on a file system without locks: see to it that one run uses it "
                          f"({error.strerror})", stacklevel=2)  # fmt: skip
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:  # else the run before removed it in between
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        os.close(descriptor)


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, 2**20, os.SEEK_SET)  # a byte that nobody reads
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
