"""What a pickle in an archive of torch would do, found without executing it.

:func:`follow` runs the instructions of the pickle on descriptions of objects in place of objects. It raises unless all
that the pickle does is to create objects without their constructors, to set their attributes, and to call the
functions in :data:`CALLS` with arguments that were checked.
"""

import codecs
import functools
import pickletools
import reprlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from pyro_vae._utils.typing import Function

__all__ = ["CALLS", "STORAGES", "Created", "follow", "global_names"]

STORAGES = {
    **dict.fromkeys(["BoolStorage", "ByteStorage", "CharStorage"], 1),
    **dict.fromkeys(["ShortStorage", "HalfStorage", "BFloat16Storage"], 2),
    **dict.fromkeys(["IntStorage", "FloatStorage"], 4),
    **dict.fromkeys(["LongStorage", "DoubleStorage", "ComplexFloatStorage"], 8),
    "ComplexDoubleStorage": 16,
}
"""Bytes of an element, by the name of the storage type in module ``torch``."""


@dataclass(frozen=True)
class Created:
    """An object that a pickle creates: an instance of ``cls``."""

    cls: Any


@dataclass(frozen=True)
class _Reference:
    """A class or function that a pickle names."""

    thing: Any


@dataclass(frozen=True)
class _Storage:
    """Memory of a tensor."""

    nbytes: int
    itemsize: int


def global_names(pickled: bytes) -> set[tuple[str, str]]:
    """Return all classes and functions that a pickle names, as pairs of module and name.

    >>> import pickle
    >>> sorted(global_names(pickle.dumps([nn.Linear, slice], protocol=2)))
    [('__builtin__', 'slice'), ('torch.nn.modules.linear', 'Linear')]
    """
    return {_name(argument) for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL"}


_VALUES: dict[str, Function] = {
    "NONE": lambda argument: None,
    "NEWTRUE": lambda argument: True,
    "NEWFALSE": lambda argument: False,
    "EMPTY_TUPLE": lambda argument: (),
    "EMPTY_LIST": lambda argument: [],
    "EMPTY_DICT": lambda argument: {},
    **dict.fromkeys(["BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"], lambda argument: argument),
}
"""Instructions that add a value to the stack."""

_ZERO = torch.zeros((), device="cpu")
_TAKEN = {
    **dict.fromkeys(["TUPLE1", "APPEND", "BINPERSID", "BUILD", "STOP"], 1),
    **dict.fromkeys(["TUPLE2", "SETITEM", "NEWOBJ", "REDUCE"], 2),
    "TUPLE3": 3,
}
"""How many values an instruction takes from the stack."""


def follow(records: Mapping[str, bytes], things: Mapping[tuple[str, str], Any], limit: int) -> Any:
    """Return a description of what the pickle ``data.pkl`` makes, or raise if it would do something else.

    Args:
        records: of the archive, by name.
        things: what each name in the pickle stands for.
        limit: bytes that one tensor may have.

    Raises:
        ValueError: if it would call, set or allocate something that is not allowed.
        Exception: of another kind, if it is no pickle that torch writes.
    """
    pickled = records["data.pkl"]
    copied = 0  # items that calls and objects copy; in a file that pickle wrote, each item once at most
    stack: list[Any] = []
    outer: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("TUPLE", "APPENDS", "SETITEMS"):  # they take all values since the last mark
            taken, stack = stack, outer.pop()
        else:
            taken = [stack.pop() for _ in range(_TAKEN.get(opcode.name, 0))][::-1]
        match opcode.name:
            case name if name in _VALUES:
                stack.append(_VALUES[name](argument))
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(taken))
            case "APPEND" | "APPENDS":
                _instance(stack[-1], list).extend(taken)
            case "SETITEM" | "SETITEMS":
                for key, value in zip(taken[::2], taken[1::2], strict=True):
                    _instance(stack[-1], dict)[_key(key)] = value
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_Reference(things[_name(argument)]))
            case "BINPERSID":
                stack.append(_storage(taken[0], records))
            case "NEWOBJ":
                stack.append(_new(*taken))
            case "REDUCE":
                copied += sum(map(_length, taken[1]))
                stack.append(_call(taken[0], taken[1], limit))
            case "BUILD":
                copied += _length(taken[0])
                _check_state(stack[-1], taken[0])
            case "STOP":
                return taken[0]
            case name if (name, argument) != ("PROTO", 2):
                raise ValueError(f"it has the instruction {name} {argument!r}")
        if copied > len(pickled):
            raise ValueError("it copies the same items again and again")
    raise ValueError("it has no end")


def _name(argument: Any) -> tuple[str, str]:
    """Return module and name, which an instruction has as one text."""
    module, _, name = str(argument).partition(" ")
    return module, name


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _instance(value: Any, *types: type) -> Any:
    if not isinstance(value, types):
        raise ValueError(f"it has {reprlib.repr(value)} in place of a {types[0].__name__.strip('_').lower()}")
    return value


def _key(key: Any) -> Any:
    """Return a key of a dictionary or a member of a set; others could take very long to hash."""
    for one in key if type(key) is tuple else (key,):
        if type(one) not in (str, int, float, bool, type(None)):
            raise ValueError(f"it has the key {reprlib.repr(key)}")
    return key


def _storage(identity: Any, records: Mapping[str, bytes]) -> _Storage:
    match identity:
        case ("storage", _Reference(str(kind)), str(key), str(), int(count)) if kind in STORAGES:
            if len(records[f"data/{key}"]) == count * STORAGES[kind]:
                return _Storage(count * STORAGES[kind], STORAGES[kind])
    raise ValueError(f"it has the storage {reprlib.repr(identity)}, which does not agree with its record")


def _new(reference: Any, arguments: Any) -> Created:
    cls = _instance(reference, _Reference).thing
    if arguments != () or not isinstance(cls, type) or any(cls is function for function, _ in CALLS.values()):
        raise ValueError(f"it makes {cls!r} with the arguments {reprlib.repr(arguments)}")
    return Created(cls)


def _call(reference: Any, arguments: Any, limit: int) -> Any:
    function = _instance(reference, _Reference).thing
    for allowed, describe in CALLS.values():
        if function is allowed:
            return describe(limit, *_instance(arguments, tuple))
    raise ValueError(f"it calls {function!r} with the arguments {reprlib.repr(arguments)}")


def _check_state(instance: Any, state: Any) -> None:
    cls = _instance(instance, Created).cls
    if cls is functools.partial:
        function, arguments, keywords, attributes = _instance(state, tuple)
        for value, kinds in ((function, _Reference), (arguments, tuple), (keywords, dict), (attributes, type(None))):
            _instance(value, kinds)
        return
    if cls in (torch.Tensor, nn.Parameter, torch.device):
        raise ValueError(f"it sets the state of a {cls.__name__}")
    for one in state if isinstance(state, tuple) and not issubclass(cls, nn.Module) else (state,):
        _instance(one, dict, type(None))
    if issubclass(cls, nn.RNNBase):  # it would make as many names as `num_layers` claims, where names are missing
        for name in (name for layer in _instance(state["_all_weights"], list) for name in _instance(layer, list)):
            _instance(name, str)


def _tensor(limit: int, storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any) -> Created:
    _instance(storage, _Storage)
    numbers = (offset, *_instance(size, tuple), *_instance(stride, tuple))
    if not all(type(number) is int and number >= 0 for number in numbers) or not len(size) == len(stride) <= 64:
        raise ValueError(f"it has a tensor of size {reprlib.repr(size)} and stride {reprlib.repr(stride)}")
    end = offset + 1 + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    if prod(size) and (end * storage.itemsize > storage.nbytes or prod(size) * storage.itemsize > limit):
        raise ValueError(f"it has a tensor of size {size}, which is more than the file has")
    _instance(requires_grad, bool)
    if hooks:
        raise ValueError("it has a tensor with hooks")
    return Created(torch.Tensor)


def _parameter(limit: int, data: Any, requires_grad: Any, hooks: Any) -> Created:
    if _instance(data, Created).cls is not torch.Tensor or type(requires_grad) is not bool or hooks:
        raise ValueError("it has a parameter that is made of no tensor, or with hooks")
    return Created(nn.Parameter)


def _size(limit: int, sizes: Any) -> tuple[int, ...]:
    return tuple(_instance(size, int) for size in _instance(sizes, tuple))


def _set(limit: int, items: Any) -> set[Any]:
    return {_key(item) for item in _instance(items, list)}


def _bytes(limit: int, text: Any, encoding: Any) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"it has bytes in the encoding {reprlib.repr(encoding)}")
    return _instance(text, str).encode("latin1")


def _device(limit: int, kind: Any, index: Any = 0) -> Created:
    _instance(kind, str)
    _instance(index, int)
    return Created(torch.device)


def _partial(limit: int, function: Any) -> Created:
    _instance(function, _Reference)
    return Created(functools.partial)


CALLS: dict[tuple[str, str], tuple[Any, Function]] = {
    ("collections", "OrderedDict"): (OrderedDict, lambda limit: OrderedDict()),
    ("__builtin__", "set"): (set, _set),
    ("_codecs", "encode"): (codecs.encode, _bytes),
    ("functools", "partial"): (functools.partial, _partial),
    ("torch", "Size"): (torch.Size, _size),
    ("torch", "device"): (torch.device, _device),
    ("torch._utils", "_rebuild_tensor_v2"): (_ZERO.__reduce_ex__(2)[0], _tensor),
    ("torch._utils", "_rebuild_parameter"): (nn.Parameter(_ZERO).__reduce_ex__(2)[0], _parameter),
}
"""What a pickle may call, by name, each with a function that checks the arguments and describes the result."""
