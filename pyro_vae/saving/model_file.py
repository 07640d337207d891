"""Files of models: what ``torch.save`` writes of a module, and ``torch.load`` reads with an allow-list.

The comment at the end of the archive has the kind and version of the file, and a SHA-256 checksum of all bytes before.

A pickle has the modules as they *are*; a record of how each one was made would miss what is changed later.

What is guaranteed:

- A file is written whole or not at all. Damage is found before anything else is read.
- A file cannot run code. Every name in its pickle must be in the allow-list: modules of torch, zuko and pyro_vae, a few
  plain types, and what the user lists in ``using``. :mod:`pyro_vae.saving.pickle_check` finds out without executing the
  pickle. Then ``torch.load(weights_only=True)`` reads the file, and is given these names alone.
- A file cannot claim more memory than it has bytes: no record is compressed, and no tensor is larger than the file.
  A loaded model can still take long, or need much memory, when it is *run*.
- A file that was written can be read: :func:`save` makes the same checks as :func:`load`.

What is not guaranteed: that later versions read the file. It names classes and attributes, which may be renamed. To
keep a model for years, keep its ``state_dict`` and the code that makes it.

``weights_only=True`` alone is not enough: a file may then call each allowed class with any arguments, such as
``bytearray(10**12)`` or ``nn.Linear(10**6, 10**6)``.
"""

import hashlib
import importlib
import io
import os
import re
import struct
import sys
import zipfile
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.distributions.constraints import Constraint

from pyro_vae.distributions.flow import import_zuko
from pyro_vae.saving.files import FileFormatError, read_file, write_file
from pyro_vae.saving.pickle_check import CALLS, STORAGES, Created, follow, global_names

__all__ = ["load", "save"]

_VERSION = 2
_COMMENT = "pyro_vae model file, version {}, sha256 {}"
_PATTERN = re.compile(_COMMENT.format(r"(\d{1,9})", r"([0-9a-f]{64})\Z").encode())


def save(path: str | os.PathLike[str], module: nn.Module) -> None:
    """Write a module to a file, or replace it; raise for an attribute, named, that cannot be stored (a lambda)."""
    content = _pickled(module)
    # An archive without a comment ends with the size 0.
    content = content[:-2] + struct.pack("<H", len(_COMMENT.format(_VERSION, "0" * 64)))
    digest = hashlib.sha256(content).hexdigest()
    write_file(path, content + _COMMENT.format(_VERSION, digest).encode())


def load(path: str | os.PathLike[str], base: type[nn.Module], map_location: Any, using: Iterable[Any]) -> Any:
    """Return the module in a file, an instance of ``base``; ``map_location`` as in ``torch.load``, ``None`` is the CPU.

    Raises:
        FileFormatError: if the file is damaged, of another kind or version, or would call or allocate something.
        ValueError: if it needs classes or functions of the user that are not in ``using``.
    """
    users = _by_name(using)
    content, name = read_file(path, "model"), repr(os.fspath(path))
    _check_whole(content, name)
    try:
        records = _records(content)
        names = global_names(records["data.pkl"])
    except Exception as error:  # of a file with the right checksum, made by hand
        raise FileFormatError(f"`path` must be a model file: {name} is no archive of torch: {error!r}") from error
    things = {key: _resolve(*key, users) for key in names}
    if missing := sorted(f"{module}.{attribute}" for (module, attribute), thing in things.items() if thing is None):
        wanted = ", ".join(one.rpartition(".")[2] for one in missing)
        raise ValueError(
            f"`using` must have your classes and functions that the model is made of, as in `using=[{wanted}]`, if you "
            f"trust the file to use them: {name} needs {', '.join(missing)}"
        )
    try:
        root = follow(records, things, len(content))
    except Exception as error:
        raise FileFormatError(f"`path` must be a model file: {name} is not used: {error}") from error
    if not (isinstance(root, Created) and issubclass(root.cls, base)):
        raise FileFormatError(f"`path` must be a model file: {name} holds no {base.__name__}")
    return _unpickle(records, things, "cpu" if map_location is None else map_location, name)


def _by_name(using: Iterable[Any]) -> dict[str, Any]:
    """Return classes and functions by their names."""
    things: dict[str, Any] = {}
    listed = list(using) if isinstance(using, Iterable) else [using]
    for thing in listed:
        if not isinstance(using, Iterable) or not isinstance(thing, FunctionType | type):
            raise TypeError(f"`using` must be a list of classes and functions, such as [MyPrior], got {thing!r}")
        if things.setdefault(thing.__name__, thing) is not thing:
            raise ValueError(f"`using` must have one thing of each name, got two that are named {thing.__name__!r}")
    return things


def _pickled(module: nn.Module) -> bytes:
    try:
        return _checked_pickle(module)
    except Exception as error:
        for path, child in module.named_modules():
            for key, value in {"__class__": type(child), **vars(child)}.items():
                if isinstance(value, nn.Module) or key == "_modules":
                    continue
                try:
                    _checked_pickle(value)
                except Exception as reason:
                    where = f"{path}.{key}".removesuffix(".__class__").removeprefix(".") or "the model"
                    raise ValueError(
                        f"`{where}` must be something that a file can hold: tensors, numbers, strings, lists, tuples, "
                        "dictionaries, modules, and classes and functions that are defined at the top level of a "
                        f"Python module (no lambda), got {value!r} ({reason})"
                    ) from error
        raise ValueError(f"the model cannot be stored in a file: {error}") from error


def _checked_pickle(value: Any) -> bytes:
    """Return what ``torch.save`` writes, if :func:`load` can read it."""
    torch.save(value, buffer := io.BytesIO())
    content = buffer.getvalue()
    records = _records(content)
    things: dict[tuple[str, str], Any] = {}
    users: dict[str, Any] = {}
    for module, name in global_names(records["data.pkl"]):
        thing = things[module, name] = _resolve(module, name, {})
        if thing is not None:
            continue
        thing = things[module, name] = getattr(sys.modules.get(module), name, None)
        if not isinstance(thing, FunctionType | type) or module == "builtins":
            raise ValueError(f"it needs {module}.{name}, which is not a class or function of Python code")
        if users.setdefault(name, thing) is not thing:
            raise ValueError(f"two classes or functions are named {name!r}: rename one")
    follow(records, things, len(content))
    return content


def _check_whole(content: bytes, name: str) -> None:
    if content.startswith(b"pyro_vae file, version 1,"):
        raise FileFormatError(
            f"`path` must be a model file of version {_VERSION}: {name} has version 1, which pyro_vae wrote before "
            "0.1.0. Load the model with that pyro_vae, and save its `state_dict()` with `torch.save`"
        )
    found = _PATTERN.search(content[-200:])
    if found is None:
        raise FileFormatError(f"`path` must be a model file: {name} is another file, or its end is lost")
    if int(found[1]) != _VERSION:
        raise FileFormatError(f"`path` must be a model file of version {_VERSION}: {name} has version {int(found[1])}")
    if hashlib.sha256(content[: -len(found[0])]).hexdigest().encode() != found[2]:
        raise FileFormatError(f"`path` must be a whole model file: {name} is damaged, its checksum does not agree")


def _records(content: bytes) -> dict[str, bytes]:
    """Return the records of an archive by their names, without the folder that all are in."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it has compressed records")
        if sum(entry.file_size for entry in entries) > len(content):
            raise ValueError("its records claim more bytes than the file has")
        return {entry.filename.partition("/")[2]: archive.read(entry) for entry in entries}


def _resolve(module: str, name: str, users: Mapping[str, Any]) -> Any:
    """Return what a name in a pickle stands for; ``None`` if it is not allowed."""
    if (module, name) in CALLS:
        return CALLS[module, name][0]
    if module == "torch" and (name in STORAGES or isinstance(getattr(torch, name, None), torch.dtype)):
        return name
    package = module.partition(".")[0]
    if package in ("pyro_vae", "zuko") or module.startswith(("torch.nn.modules.", "torch.distributions.constraints")):
        if package == "zuko":
            import_zuko()
        try:
            thing = getattr(importlib.import_module(module), name, None)
        except (ImportError, ValueError):  # there is no such module, or its name is no name
            return None
        inert = (nn.Module, Constraint, torch.distributions.Transform)
        if isinstance(thing, type) and issubclass(thing, inert) and thing.__module__ == module:
            return thing
    return users.get(name)


def _unpickle(records: Mapping[str, bytes], things: Mapping[tuple[str, str], Any], where: Any, name: str) -> Any:
    """Read the records that were checked, packed again, so that no other reading of the file is possible."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for record, data in records.items():
            if record in ("data.pkl", "byteorder", "version") or record.startswith("data/"):
                archive.writestr(f"archive/{record}", data)
    allowed = [(thing, f"{module}.{attribute}") for (module, attribute), thing in things.items() if callable(thing)]
    known = torch.serialization.get_safe_globals()

    def unpickle(location: Any) -> Any:
        buffer.seek(0)
        with torch.serialization.safe_globals([one for one in allowed if one not in known]):
            return torch.load(buffer, map_location=location, weights_only=True)

    try:
        return unpickle(where)
    except Exception as error:
        try:
            unpickle("cpu")
        except Exception:
            raise FileFormatError(f"`path` must be a model file: {name} cannot be read: {error}") from error
        raise  # the file is sound, and `map_location` is what failed
