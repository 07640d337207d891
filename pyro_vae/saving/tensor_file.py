"""Files of named tensors with a header: safetensors files, which hold no code, with a checksum.

The metadata are ``kind``, ``version``, ``header`` (JSON), ``names`` (JSON: under which name the tensor of each
name is stored, since names may share one) and ``sha256``: the checksum of the file with zeros in its place. Any program
with safetensors reads the tensors.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pyro_vae._utils.validation import describe
from pyro_vae.saving.files import FileFormatError, read_file, write_file

__all__ = ["read", "write"]

_VERSION = "2"
_CHECKSUM = re.compile(rb'"sha256":"([0-9a-f]{64})"')
"""As it stands among the metadata. Within the header, quotes have a backslash."""


def write(
    path: str | os.PathLike[str],
    kind: str,
    header: dict[str, Any],
    tensors: Mapping[str, Tensor],
    keep: Path | None = None,
) -> None:
    """Write a header and tensors. At each moment, the path has either the new file or what it had before.

    Args:
        path: the file, in a folder that exists.
        kind: what is in it, such as ``"checkpoint"``; :func:`read` checks it.
        header: what JSON can hold (tuples become lists), NaN and the infinities included.
        tensors: by name. A tensor with two names is written once, and shared again when read; a slice is written alone.
        keep: the path to which an older file is moved, once the new one is complete.

    Raises:
        ValueError: if the header or a tensor cannot be written; and errors of ``write_file``.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/run.safetensors", "run", {"steps": 3, "loss": float("inf")}, {"w": torch.ones(2)})
    ...     read(f"{folder}/run.safetensors", "run")
    ({'steps': 3, 'loss': inf}, {'w': tensor([1., 1.])})
    """
    if not isinstance(header, dict):
        raise TypeError(f"`header` must be a dictionary, got {describe(header)}")
    _check_json(header, "header")
    try:
        text = json.dumps(header)
    except ValueError as error:  # an integer of more digits than Python prints
        raise ValueError(f"`header` must be printable: {error}") from error
    stored, names = _stored(tensors)
    metadata = {"kind": kind, "version": _VERSION, "header": text, "names": json.dumps(names), "sha256": "0" * 64}
    try:
        content = safetensors.torch.save(stored, metadata)
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"`tensors` must have names and data types that safetensors can store: {error}") from error
    found = _CHECKSUM.search(content)
    assert found is not None
    start, end = found.span(1)
    write_file(path, content[:start] + hashlib.sha256(content).hexdigest().encode() + content[end:], keep)


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors, on the CPU, of a file of this kind that :func:`write` wrote.

    Raise ``FileFormatError`` if it is damaged, or of another program, kind or version; and as ``read_file``.
    """
    content, name = read_file(path, kind), repr(os.fspath(path))
    if content.startswith(b"pyro_vae file, version 1,"):
        raise FileFormatError(
            f"`path` must be a {kind} file of version {_VERSION}: {name} has version 1, which pyro_vae wrote "
            "before 0.1.0"
        )
    size = int.from_bytes(content[:8], "little")
    found = _CHECKSUM.search(content, 8, min(8 + size, len(content)))
    if found is None:
        raise FileFormatError(f"`path` must be a {kind} file: {name} is no file of pyro_vae, or its checksum is lost")
    start, end = found.span(1)
    if hashlib.sha256(content[:start] + b"0" * 64 + content[end:]).hexdigest().encode() != found[1]:
        raise FileFormatError(
            f"`path` must be a whole {kind} file: {name} is damaged (cut off, or changed since it was written): its "
            "checksum does not agree"
        )
    try:
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
        kind_of_file, version = metadata["kind"], metadata["version"]
        header, names = json.loads(metadata["header"]), json.loads(metadata["names"])
        stored = safetensors.torch.load(content)
        tensors = {name: stored[place] for name, place in names.items()}
    except Exception as error:  # of a file with the right checksum, made by hand
        raise FileFormatError(f"`path` must be a {kind} file: {name} cannot be read: {error!r}") from error
    if (kind_of_file, version) != (kind, _VERSION) or not isinstance(header, dict):
        raise FileFormatError(
            f"`path` must be a {kind} file of version {_VERSION}: {name} is a {kind_of_file} file of version {version}"
        )
    return header, tensors


def _check_json(value: Any, where: str) -> None:
    """Raise where JSON could not bring a value back."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"`{where}` must have strings as keys, got {key!r}")
            _check_json(inner, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_json(inner, f"{where}[{index}]")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(
            f"`{where}` must be a dictionary, list, string, Python number, Boolean or None, got {describe(value)}"
        )


def _stored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to store, each once, and for each name the name under which its tensor is stored."""
    stored: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    by_place: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"`tensors` must have strings as names, got {name!r}")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"`tensors[{name!r}]` must be a tensor, got {describe(tensor)}")
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ValueError(
                f"`tensors[{name!r}]` must be a dense tensor that has values, got a {tensor.layout} tensor on "
                f"{tensor.device}"
            )
        place = (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        key = names[name] = by_place.setdefault(place, name)
        if key == name:
            copy = tensor.detach().cpu().resolve_conj().resolve_neg()
            stored[name] = copy.clone(memory_format=torch.contiguous_format)
    return stored, names
