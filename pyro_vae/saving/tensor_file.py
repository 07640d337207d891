"""Files of named tensors with a header in JSON: whole or not there, and read without unpickling.

Two lines of text, for people with ``head -n 2``, and what ``torch.save`` makes of the tensors:

.. code-block:: text

    pyro_vae file, version 1, sha256 9f86d081884c7d65...
    {"kind": "model", "header": {...}}
    PK...

The checksum is that of all that follows its line. It is compared before anything else is read, so that a file that was
cut off, or has one bit turned, is refused and not loaded as a slightly different model.
"""

import hashlib
import io
import json
import os
import pickle
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

__all__ = ["FileFormatError", "read", "write"]

VERSION = 1


_FIRST_LINE = "pyro_vae file, version {}, sha256 {}\n"


_PATTERN = re.compile(_FIRST_LINE.format(r"(\d{1,9})", "([0-9a-f]{64})").encode())


_LONGEST = 200  # bytes in which the first line ends


class FileFormatError(ValueError):
    """A file that is damaged, of another kind or version, or not of this package: a caller may have an earlier one."""


def write(path: str | os.PathLike[str], kind: str, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a header and tensors. The path has the new file or what it had before, whatever happens in between.

    It is written beside the path, flushed to the disk, and moved there in the end; after an error or interruption
    nothing is left beside it.

    Args:
        path: the file; its folder must be there. A file that is there is replaced.
        kind: what is in it, such as ``"model"``, which :func:`read` is asked for.
        header: of what JSON has: dictionaries by strings, lists (tuples become lists), strings, truth values,
            ``None``, integers up to some thousands of digits, and floats, of which NaN and the infinities are written
            as Python does.
        tensors: by name, of any dtype and shape, on any device; without gradients. One tensor of two names is written
            once, and is shared again; a part of a larger one is written by itself.

    Raises:
        ValueError: if the path is a folder or device, or something in the header or the tensors cannot be written.
        FileNotFoundError: if there is no such folder.
        OSError: if the disk is full, or writing is not allowed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/run.pt", "run", {"steps": 3, "loss": float("inf")}, {"w": torch.ones(2)})
    ...     read(f"{folder}/run.pt", "run")
    ({'steps': 3, 'loss': inf}, {'w': tensor([1., 1.])})
    """
    path = _as_path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {str(path.parent)!r} for {path.name!r}")
    if path.exists():
        _check_regular(path)
    if not isinstance(header, dict):
        raise TypeError(f"`header` must be a dictionary, got a {type(header).__name__}")
    _check_json(header, "header")
    try:
        line = json.dumps({"kind": kind, "header": header}) + "\n"
    except ValueError as error:  # an integer of more digits than Python spells
        raise ValueError(f"header: {error}") from error
    copies = _writable(tensors)
    beside = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with beside.open("xb+") as file:
            start = file.write(_FIRST_LINE.format(VERSION, "0" * 64).encode())
            file.write(line.encode())
            _save(copies, file)
            file.seek(start)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            file.write(_FIRST_LINE.format(VERSION, digest).encode())
            file.flush()
            os.fsync(file.fileno())  # before the move: a name without its content would outlive a loss of power
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], kind: str, map_location: Any = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file that :func:`write` wrote. Nothing in it is unpickled or run.

    Args:
        path: the file.
        kind: what must be in it.
        map_location: where the tensors go, as in ``torch.load``; the CPU if left out.

    Raises:
        FileFormatError: if the file is damaged, or is not of this package, kind or version. It is a ``ValueError``.
        FileNotFoundError: if there is none.
        ValueError: if the path is a folder or device.
    """
    path = _as_path(path)
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a {kind} file of pyro_vae: there is no file {str(path)!r}")
    _check_regular(path)
    with path.open("rb") as file:
        _check_whole(file, path, kind)
        header = _read_header(file, path, kind)
        where = "cpu" if map_location is None else map_location
        try:
            tensors = torch.load(file, map_location=where, weights_only=True)
        except pickle.UnpicklingError as error:  # of a file with the right checksum: made to do harm, or by mistake
            raise FileFormatError(f"path: {str(path)!r} holds something else than tensors: {error}") from error
    if type(tensors) is not dict or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise FileFormatError(f"path: {str(path)!r} holds something else than tensors by name")
    return header, tensors


def _as_path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"`path` must be the path of a file, a string or a Path, got a {type(path).__name__}")
    return Path(path)


def _check_regular(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"`path` must be a file in one: {str(path)!r} is a folder")
    if not path.is_file():
        raise ValueError(f"`path` must be a file: {str(path)!r} is a device or the like")


def _check_whole(file: io.BufferedReader, path: Path, kind: str) -> None:
    """Read over the first line, and leave the file there; an error if what follows is not what was written."""
    first = _PATTERN.fullmatch(file.readline(_LONGEST))
    if first is None:
        raise FileFormatError(
            f"`path` must be a {kind} file: {str(path)!r} is not a file of pyro_vae, or its beginning is lost"
        )
    if int(first[1]) != VERSION:
        raise FileFormatError(
            f"path: {str(path)!r} is a file of version {int(first[1])}; this pyro_vae reads version {VERSION}"
        )
    start = file.tell()
    if hashlib.file_digest(file, "sha256").hexdigest().encode() != first[2]:
        raise FileFormatError(
            f"path: {str(path)!r} is damaged: cut off, or changed since it was written; its checksum does not agree"
        )
    file.seek(start)


def _read_header(file: io.BufferedReader, path: Path, kind: str) -> dict[str, Any]:
    try:
        document = json.loads(file.readline())
        kind_of_file, header = document["kind"], document["header"]
        payload = file.peek(4)[:4]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise FileFormatError(f"path: {str(path)!r} has no header that can be read: {error!r}") from error
    if kind_of_file != kind:
        raise FileFormatError(f"`path` must be a {kind} file: {str(path)!r} is a {kind_of_file} file")
    if not isinstance(header, dict) or payload != b"PK\3\4":
        raise FileFormatError(f"path: {str(path)!r} lacks a header or tensors")
    return header


def _check_json(value: Any, where: str) -> None:
    """An error where JSON could not bring a value back."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"`{where}` must be strings, got the key {key!r}")
            _check_json(inner, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_json(inner, f"{where}[{index}]")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(
            f"`{where}` must be dictionaries, lists, strings, numbers of Python, truth values and None, got a "
            f"{type(value).__name__}"
        )


def _writable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each once, and without the rest of a larger storage, which would be written with it."""
    copies, by_place = {}, {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"`tensors` must be strings, got the name {name!r}")
        if (
            not isinstance(tensor, Tensor)
            or tensor.layout is not torch.strided
            or tensor.is_meta
            or tensor.is_quantized
        ):
            raise ValueError(f"`tensors[{name!r}]` must be a dense tensor that has values, got {_kind_of(tensor)}")
        place = (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if place not in by_place:
            copy = tensor.detach().cpu().resolve_conj().resolve_neg()
            by_place[place] = copy if copy.untyped_storage().nbytes() == copy.nbytes else copy.clone()
        copies[name] = by_place[place]
    return copies


def _kind_of(value: Any) -> str:
    return f"a {value.layout} tensor on {value.device}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _save(tensors: dict[str, Tensor], file: IO[bytes]) -> None:
    try:
        torch.save(tensors, file)
    except RuntimeError as error:  # torch's own words, when what it tells is that the disk is full
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
