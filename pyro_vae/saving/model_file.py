"""Models in files: a description of the parts, and their parameters and buffers."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import activation

from pyro_vae._utils.rng import seeded
from pyro_vae.parts import base as base_parts
from pyro_vae.parts import families, guides, likelihoods, networks, priors
from pyro_vae.parts.constructor_args import kept
from pyro_vae.parts.families import multivariate
from pyro_vae.saving import tensor_file
from pyro_vae.saving.description import Reader, Writer, is_recorded, of_users
from pyro_vae.saving.tensor_file import FileFormatError

__all__ = ["ROLES", "load", "save"]

ROLES = ("prior", "encoder", "decoder")
"""The parts of a model, in the order of the story."""


_ROOMS = (families, guides, likelihoods, multivariate, networks, base_parts, priors)


_VOCABULARY = {
    f"{room.__name__.rpartition('.')[2]}.{name}": getattr(room, name)
    for room in _ROOMS
    for name in room.__all__
    if is_recorded(getattr(room, name))
} | {f"nn.{name}": getattr(activation, name) for name in activation.__all__}
"""What a file may call without being asked: what describes a distribution or a network, and torch's activations."""


_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def save(path: str | os.PathLike[str], whole: nn.Module, data_shape: Sequence[int]) -> None:
    """Write the prior, the encoder and the decoder of ``whole``.

    They are made again once, in memory, to see that they can be: a file that is written can be read.

    Raises:
        ValueError: if something in the parts cannot be described, or they are no longer what they were made as.
    """
    parts = nn.ModuleDict({role: whole.get_submodule(role) for role in ROLES})
    extra = [name for name in parts.state_dict() if name.rpartition(".")[2] == "_extra_state"]
    if extra:
        raise ValueError(f"{extra[0]}: modules with a state of their own beside tensors cannot be saved")
    state = _tensors(parts)
    writer = Writer(_VOCABULARY, {id(tensor): name for name, tensor in state.items()})
    described = {role: writer.describe(part, role) for role, part in parts.items()}
    tensors = {name: tensor.detach() for name, tensor in {**state, **writer.tensors}.items()}
    modules = {**dict(parts.named_modules()), "": whole}
    header = {
        "parts": described,
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "data_shape": list(data_shape),
        "evaluating": [name for name, module in modules.items() if not module.training],
        "frozen": [name for name, parameter in parts.named_parameters() if not parameter.requires_grad],
    }
    _check_same(parts, _made(header, tensors, {**_VOCABULARY, **writer.used}, os.fspath(path)))
    tensor_file.write(path, "model", header, tensors)


def load(path: str | os.PathLike[str], map_location: Any, using: Iterable[Any]) -> tuple[nn.ModuleDict, torch.Size]:
    """The prior, the encoder and the decoder, and the shape of a datum.

    Raises:
        FileFormatError: if the file is damaged, of another kind, or describes no model.
        ValueError: if it needs a class or function that is not in ``using``, or its tensors do not fit what those make.
    """
    own = of_users(using)
    header, tensors = tensor_file.read(path, "model", map_location)
    parts = _made(header, tensors, {**_VOCABULARY, **own}, os.fspath(path))
    state = _tensors(parts)
    saved = {name: tensor for name, tensor in tensors.items() if not name.startswith("argument ")}
    _check_fit(state, saved, os.fspath(path))
    for name, tensor in state.items():
        tensor.data = saved[name]  # of the dtype and on the device of what was read
    for name, module in parts.named_modules():
        module.training = name not in header["evaluating"]
    for name, parameter in parts.named_parameters():
        parameter.requires_grad = name not in header["frozen"]
    return parts, torch.Size(header["data_shape"])


def _tensors(whole: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once, by the first of its names; buffers that no ``state_dict`` has, too."""
    return {**dict(whole.named_parameters()), **dict(whole.named_buffers())}


def _made(
    header: dict[str, Any], tensors: Mapping[str, Tensor], vocabulary: Mapping[str, Any], path: str
) -> nn.ModuleDict:
    """The modules that a header describes, with parameters as at their start."""
    described, shape = header.get("parts"), header.get("data_shape")
    dtype = _DTYPES.get(str(header.get("dtype")))
    lists = isinstance(header.get("evaluating"), list) and isinstance(header.get("frozen"), list)
    if not lists or dtype is None or not isinstance(described, dict) or described.keys() != set(ROLES):
        raise FileFormatError(f"path: {path!r} describes no model: its header has {list(header)}")
    if not isinstance(shape, list) or not all(isinstance(size, int) for size in shape):
        raise FileFormatError(f"path: {path!r} describes no model: its data are of shape {shape!r}")
    reader = Reader(vocabulary, tensors, path)
    with seeded(0), torch.device("cpu"), _default_dtype(dtype):
        made = {role: reader.make(node) for role, node in described.items()}
    for role, module in made.items():
        if not isinstance(module, nn.Module):
            raise FileFormatError(f"path: {path!r} describes no model: its {role} is a {type(module).__name__}")
    return nn.ModuleDict({role: made[role] for role in ROLES})


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _check_fit(state: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: str) -> None:
    faults = [f"{name} is only in the file" for name in saved.keys() - state.keys()]
    faults += [f"{name} is only in the model that it describes" for name in state.keys() - saved.keys()]
    faults += [
        f"{name} is {tuple(saved[name].shape)} in the file and {tuple(tensor.shape)} in the model that it describes"
        for name, tensor in state.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    if faults:
        raise ValueError(
            f"path: the tensors in {path!r} do not fit: {'; '.join(sorted(faults))}. Were the classes and functions in "
            "`using` changed since?"
        )


def _check_same(whole: nn.Module, again: nn.Module) -> None:
    """An error if modules are not what they are when made again: changed by hand, or made differently each time."""
    ours, theirs = _structure(whole), _structure(again)
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if repr(ours.get(name)) != repr(theirs.get(name)):
            raise ValueError(
                f"`{name}` must be parts that have not been changed since but for their parameters and buffers, and "
                f"networks by functions that make the same each time: it is {ours.get(name, 'not there')}, and "
                f"{theirs.get(name, 'not there')} when its part is made again from the arguments that it was made with"
            )


def _structure(whole: nn.Module) -> dict[str, Any]:
    """By path: of each module its class and settings, of each tensor its shape, or of what it is another name."""
    structure: dict[str, Any] = {}
    first: dict[int, str] = {}
    for name, module in whole.named_modules(remove_duplicate=False):
        shared = first.setdefault(id(module), name) != name
        structure[name] = f"the same as {first[id(module)]}" if shared else f"a {type(module).__name__}"
        for key, value in vars(module).items():
            if not shared and _is_setting(module, key, value):
                structure[f"{name}.{key}"] = kept(value)
    for named in (whole.named_parameters, whole.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            shared = first.setdefault(id(tensor), name) != name
            structure[name] = f"the same as {first[id(tensor)]}" if shared else f"a tensor of {tuple(tensor.shape)}"
    return structure


def _is_setting(module: nn.Module, key: str, value: Any) -> bool:
    """Of classes of a user's own, an attribute may be a counter or a cache."""
    known = type(module).__module__.partition(".")[0] in ("torch", "pyro_vae")
    plain = isinstance(value, bool | Number | str | tuple | None)
    return known and plain and not key.startswith("_") and key != "training"
