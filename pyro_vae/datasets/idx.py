"""IDX files, the format of MNIST: download from the first mirror that works, checksums, and reading."""

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.validation import file_path

__all__ = ["RemoteFile", "download", "find", "read"]

_UNSIGNED_BYTES, _MAX_DIMS = 0x08, 8
_MAX_RATIO, _SMALL = 100, 2**26  # the content of images is at most so many times the file, or small


@dataclass(frozen=True)
class RemoteFile:
    """A published file and its checksums."""

    name: str  # without .gz
    compressed: str  # SHA-256 of the gzip file on the mirrors
    content: str  # SHA-256 of the file after decompression


def find(file: RemoteFile, folder: str | Path) -> Path:
    """Return the path of a file in a folder, compressed or not; raise, with its name, if it does not exist."""
    for path in (Path(folder) / f"{file.name}.gz", Path(folder) / file.name):
        if path.is_file():
            return path
    what = f"{file.name}.gz or {file.name} in" if Path(folder).is_dir() else "folder"
    raise FileNotFoundError(f"`folder` must be a folder with MNIST's files: there is no {what} {str(folder)!r}")


def download(file: RemoteFile, mirrors: Sequence[str], cache: str | Path, attempts: int = 2) -> Path:
    """Return the path of the compressed file in the cache; download it if it is not there, or is damaged.

    The mirrors, URLs of folders, are tried in turn, each ``attempts`` times.

    Raises:
        OSError: if no mirror gives the file with the published checksum; the message has the error of each.
    """
    import pooch
    import requests

    failures = []
    for mirror in mirrors:
        registry = {f"{file.name}.gz": file.compressed}
        store = pooch.create(cache, mirror.rstrip("/") + "/", registry=registry, retry_if_failed=attempts - 1)
        try:
            return Path(store.fetch(f"{file.name}.gz"))
        except (ValueError, requests.exceptions.RequestException) as error:
            failures.append(f"{mirror}: {error}")
    raise OSError(
        f"`mirrors` must have one that gives {file.name}.gz. Without a network, pass a `folder` with the file, or copy "
        f"it into the cache {str(cache)!r}. The errors of the mirrors: {'; '.join(failures)}"
    )


def read(path: str | Path, content: str | None = None) -> Tensor:
    """Return the array in an IDX file of unsigned bytes, compressed with gzip (``.gz``) or not.

    ``content`` is the SHA-256 that the decompressed file must have; it is not checked if left out.

    Raises:
        FileNotFoundError, ValueError: with its name, if it is missing, corrupted, truncated or of another format.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "two-labels"
    ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    ...     read(path)
    tensor([7, 9], dtype=torch.uint8)
    """
    path = file_path(path, "path")
    if not path.is_file():
        raise FileNotFoundError(f"`path` must be that of an IDX file: there is no file {str(path)!r}")
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            data = _content(path, file, content is None)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"`path` must be a whole gzip file: {str(path)!r} is damaged: {error}") from error
    if content is not None and (found := hashlib.sha256(data).hexdigest()) != content:
        raise ValueError(
            f"`path` must be the published file, whose content has the SHA-256 {content}: {str(path)!r} is damaged "
            f"or another file: its content has {found}"
        )
    return torch.from_numpy(_array(path, data).copy())


def _content(path: Path, file: IO[bytes] | gzip.GzipFile, checked: bool) -> bytes:
    """Return the content, of the size in the header, which is compared with the size of the file before it is read."""
    start = file.read(4)
    count = start[3] if len(start) == 4 and start[3] <= _MAX_DIMS else 0
    start += file.read(4 * count)
    size = prod(_shape(start, count))
    limit = _MAX_RATIO * path.stat().st_size + _SMALL
    if size > limit:
        if not checked:
            return start  # of another file than the published one
        raise ValueError(
            f"`path` must be an IDX file of {len(start) + size} bytes, for its shape is {_shape(start, count)}: "
            f"{str(path)!r} has {path.stat().st_size}"
        )
    return start + file.read(min(limit, size) + 1)


def _shape(data: bytes, count: int) -> list[int]:
    return [int(size) for size in np.frombuffer(data[4 : 4 + 4 * count].ljust(4 * count, b"\0"), dtype=">u4")]


def _array(path: Path, data: bytes) -> np.ndarray:
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UNSIGNED_BYTES or data[3] > _MAX_DIMS:
        raise ValueError(
            f"`path` must be an IDX file of unsigned bytes, 00 00 08, in up to {_MAX_DIMS} dimensions: {str(path)!r} "
            f"begins with {data[:4].hex(' ')}"
        )
    header, shape = 4 + 4 * data[3], _shape(data, data[3])
    if len(data) != header + prod(shape):
        more = "more" if len(data) > header + prod(shape) else len(data)
        raise ValueError(
            f"`path` must be an IDX file of {header + prod(shape)} bytes, for its shape is {shape}: {str(path)!r} has "
            f"{more}"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)
