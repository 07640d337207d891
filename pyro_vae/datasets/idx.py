"""IDX files, the form in which MNIST is published: downloaded once, held against their checksums, read as bytes."""

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.validation import file_path

__all__ = ["RemoteFile", "download", "find", "read"]

_UNSIGNED_BYTES = 0x08


_MAX_DIMS = 8


@dataclass(frozen=True)
class RemoteFile:
    """A published file and its checksums.

    Attributes:
        name: without ``.gz``.
        packed: SHA-256 of the gzip file that mirrors hold.
        content: SHA-256 of what it unpacks to.
    """

    name: str
    packed: str
    content: str


def find(file: RemoteFile, folder: str | Path) -> Path:
    """The file in a folder, packed or not.

    Raises:
        FileNotFoundError: if it is not there, naming it.
    """
    for path in (Path(folder) / f"{file.name}.gz", Path(folder) / file.name):
        if path.is_file():
            return path
    what = f"holds neither {file.name}.gz nor {file.name}" if Path(folder).is_dir() else "is no folder"
    raise FileNotFoundError(f"folder: {str(folder)!r} {what}")


def download(file: RemoteFile, mirrors: Sequence[str], cache: str | Path, attempts: int = 2) -> Path:
    """The packed file in the cache; fetched from the first mirror that gives the published bytes, if not yet there.

    A file reaches the cache whole and verified, or not at all; a spoilt one there is fetched again.

    Args:
        file: what to fetch.
        mirrors: URLs of folders, tried in turn.
        cache: folder for the file.
        attempts: how often each mirror is asked.

    Raises:
        OSError: if no mirror gives the file, with what each said.
    """
    import pooch
    import requests

    failures = []
    for mirror in mirrors:
        store = pooch.create(
            path=cache, base_url=mirror.rstrip("/") + "/", registry={f"{file.name}.gz": file.packed},
            retry_if_failed=attempts - 1,
        )  # fmt: skip
        try:
            return Path(store.fetch(f"{file.name}.gz"))
        except (ValueError, requests.exceptions.RequestException) as error:
            failures.append(f"{mirror}: {error}")
    raise OSError(
        f"{file.name}.gz: no mirror gave it. Without a network, hand over a `folder` that holds the file, or put it "
        f"into the cache, {str(cache)!r}. What the mirrors said: {'; '.join(failures)}"
    )


def read(path: str | Path, content: str | None = None) -> Tensor:
    """The array in an IDX file of unsigned bytes, packed with gzip or not.

    Args:
        path: of the file.
        content: SHA-256 that the unpacked bytes must have; unchecked if left out.

    Raises:
        ValueError: if the file is corrupted, truncated or of another form, naming it; nothing of it is then used.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "two-images"
    >>> _ = path.write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3]) + bytes(range(6)))
    >>> read(path)
    tensor([[[0, 1, 2]],
    <BLANKLINE>
            [[3, 4, 5]]], dtype=torch.uint8)
    """
    path = file_path(path, "path")
    if not path.is_file():
        raise FileNotFoundError(f"`path` must be that of an IDX file: there is no file {str(path)!r}")
    raw = path.read_bytes()
    try:
        data = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: is truncated or corrupted, and not used: {error}") from error
    if content is not None and (found := hashlib.sha256(data).hexdigest()) != content:
        raise ValueError(
            f"{path}: is truncated, corrupted or another file, and not used: its content has the SHA-256 {found}, "
            f"the published one {content}"
        )
    return torch.from_numpy(_array(path, data).copy())


def _array(path: Path, data: bytes) -> np.ndarray:
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UNSIGNED_BYTES or data[3] > _MAX_DIMS:
        raise ValueError(
            f"`{path}` must be an IDX file of unsigned bytes, 00 00 08, in up to {_MAX_DIMS} dimensions: begins with "
            f"{data[:4].hex(' ')}"
        )
    header = 4 + 4 * data[3]
    shape = [int(size) for size in np.frombuffer(data[4:header].ljust(header - 4, b"\0"), dtype=">u4")]
    if len(data) != header + prod(shape):
        raise ValueError(f"{path}: holds {len(data)} bytes; its header tells of {header + prod(shape)}, shape {shape}")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)
