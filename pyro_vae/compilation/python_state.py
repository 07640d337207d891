"""The Python values that the code of a function can read, which a captured graph keeps as they were.

A graph holds the operations of one run. A number in an attribute, a closure or a global, an item of a list, a module
that was replaced: what changes later is not seen by a replay. This module finds the places of such values, and whether
they have changed, in a few microseconds.
"""

import functools
import random
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from operator import call
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["PythonState"]

_LIBRARIES = {"numpy", "pyro", "pyro_vae", "scipy", "torch", "torchvision", *sys.stdlib_module_names} - {"__main__"}
_MOST_ITEMS, _MOST_OBJECTS = 1000, 10_000
_ENTRIES = {"__call__", "__enter__", "__exit__", "forward", "_pyro_sample"}  # methods that run without being named
_NOT_RUN = {"__init__", "__repr__", "extra_repr", "reset_parameters"}
_WRITTEN = {"plates"}  # attributes of Pyro's guides that each run of theirs makes again
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_ATOMS = (bool, int, float, complex, str, bytes, type(None))


class PythonState:
    """The values whose names occur in the code of some functions and of what these call, with their places.

    Code of torch and Pyro is not followed; of their objects, the attributes are read. Tensors are not watched: a graph
    reads their present values.

    Args:
        roots: functions, methods, modules or other objects.
        tensors: whether tensors are watched, too, in the places that the user's code may write to: attributes of its
            objects, globals, closures, lists and dictionaries. Objects of libraries are then left out.

    Attributes:
        sources: where iterators and random generators stand, whose next value is another one each time.
    """

    def __init__(self, *roots: Any, tensors: bool = False):
        self._tensors = tensors
        found = _Places(roots, tensors)
        self.sources = found.sources
        attributes = found.attributes()
        self._gets = [held.get for _, held, keys in attributes for _ in keys]
        self._keys = [key for _, _, keys in attributes for key in keys]
        self._cells = [cell for _, cell in found.cells]
        self._containers = found.containers
        self._items = [dict.values(held) if isinstance(held, dict) else held for _, held in found.containers]
        self._names = [f"{label}.{key}".lstrip(".") for label, _, keys in attributes for key in keys]
        self._names += [label for label, _ in found.cells]
        self._ignored: set[str] = set()
        self.rebase()

    def rebase(self) -> None:
        """Compare with the present values from now on."""
        self._kept = list(self._values())  # alive, so that no other object gets an id of theirs
        self._ids = list(map(id, self._kept))
        self._before = self._labelled()

    def has_changed(self) -> bool:
        """Whether a value is not the same object as before."""
        return list(map(id, self._values())) != self._ids

    def changes(self) -> dict[str, tuple[Any, Any]]:
        """Return values that differ, before and now, by the place where they stand."""
        now = self._labelled()
        both = {label: (self._before.get(label), now.get(label)) for label in self._before | now}
        return {label: pair for label, pair in both.items() if label not in self._ignored and self._differ(*pair)}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are watched, by the place where they stand."""
        return {label: value for label, value in self._labelled().items() if isinstance(value, Tensor)}

    def ignore(self, labels: Iterable[str]) -> None:
        """Stop watching places that the code itself writes to."""
        self._ignored |= set(labels)

    def _differ(self, before: Any, now: Any) -> bool:
        if isinstance(before, _ATOMS) and type(before) is type(now):
            return before != now and not (before != before and now != now)
        both = isinstance(before, Tensor | None) and isinstance(now, Tensor | None)
        return before is not now and (self._tensors or not both)

    def _values(self) -> Iterator[Any]:
        return chain(map(call, self._gets, self._keys), map(_content, self._cells), *self._items)

    def _labelled(self) -> dict[str, Any]:
        single = chain(map(call, self._gets, self._keys), map(_content, self._cells))
        found = dict(zip(self._names, single, strict=True))
        for label, container in self._containers:
            pairs = container.items() if isinstance(container, dict) else enumerate(container)
            found |= {f"{label}[{key!r}]": value for key, value in pairs}
        return found


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _is_library(module: Any) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in _LIBRARIES


class _Places:
    """Follow functions to the objects that they name, and these to theirs."""

    def __init__(self, roots: Iterable[Any], tensors: bool = False):
        self._tensors = tensors
        self.cells: list[tuple[str, Any]] = []
        self.containers: list[tuple[str, Any]] = []
        self.sources: list[str] = []
        self._holders: list[tuple[str, Any, Mapping[str, Any]]] = []  # objects and namespaces with their attributes
        self._names: set[str] = set(_ENTRIES)  # that occur in the user's code
        self._seen: dict[int, Any] = {}  # by id; kept alive
        for root in roots:
            self._visit(root, getattr(root, "__name__", type(root).__name__))
        size = (-1, -1)
        while size != (
            size := (len(self._names), len(self._seen))
        ):  # a new name may be that of an attribute seen before
            for _, owner, _ in list(self._holders):
                self._visit_methods(owner)
            for label, owner, held, keys in self._attributes():
                for key in keys:
                    self._visit(held.get(key), f"{label}.{key}".lstrip("."), _is_users(owner))

    def attributes(self) -> list[tuple[str, Mapping[str, Any], list[str]]]:
        """Return label, namespace, and the names in it that occur in code."""
        found = self._attributes()
        return [(label, held, keys) for label, owner, held, keys in found if not self._tensors or _is_users(owner)]

    def _attributes(self) -> list[tuple[str, Any, Mapping[str, Any], list[str]]]:
        found = []
        for label, owner, held in self._holders:
            cls: Any = type(owner)
            names = self._names | _library_names(cls)
            defaults = {key for cls in _user_classes(owner) for key in vars(cls) if not callable(vars(cls)[key])}
            if isinstance(owner, nn.Module):
                names = {name for name in names if not name.startswith("_") and name != "training"}
            keys = sorted(
                key
                for key in names & (held.keys() | defaults)
                if self._tensors or not isinstance(held.get(key), Tensor)
            )
            if keys:
                found.append((label, owner, held, keys))
        return found

    def _visit(self, value: Any, label: str, users: bool = True) -> None:
        """Follow a value; ``users``: whether it stands at a place of the user, and not inside of a library's object."""
        if isinstance(value, (*_ATOMS, Tensor)) or id(value) in self._seen:
            return
        if len(self._seen) >= _MOST_OBJECTS:
            return
        self._seen[id(value)] = value
        if users and (isinstance(value, _GENERATORS) or hasattr(type(value), "__next__")):
            self.sources.append(label)
        if isinstance(value, types.FunctionType):
            self._visit_function(value, label)
        elif isinstance(value, types.MethodType):
            self._visit(value.__self__, type(value.__self__).__name__)
            self._visit(value.__func__, label)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self._visit(part, label, users)
        elif isinstance(value, list | tuple | dict):
            if len(value) <= _MOST_ITEMS:
                if not isinstance(value, tuple) and (users or not self._tensors):
                    self.containers.append((label, value))
                for item in value.values() if isinstance(value, dict) else value:
                    self._visit(item, label, users)
        elif isinstance(value, types.ModuleType | type):
            if not _is_library(getattr(value, "__module__", value.__name__)):
                self._holders.append((label, value, vars(value)))
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._holders.append((label, value, vars(value)))
            for cls in _user_classes(value):
                self._visit(cls, cls.__name__)
            if isinstance(value, nn.Module):
                for name, child in value._modules.items():
                    self._visit(child, f"{label}.{name}")

    def _visit_function(self, function: types.FunctionType, label: str) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if not _is_library(function.__module__) if self._tensors else not isinstance(_content(cell), Tensor):
                self.cells.append((name, cell))
            self._visit(_content(cell), name)
        self._visit(function.__defaults__ or (), label)
        self._visit(function.__kwdefaults__ or {}, label)
        if function.__dict__:
            self._holders.append((label, function, function.__dict__))
        if not _is_library(function.__module__):
            names = _names_in(function.__code__)
            self._names |= names
            if names & function.__globals__.keys() and id(function.__globals__) not in self._seen:
                self._seen[id(function.__globals__)] = function.__globals__
                self._holders.append(("", function, function.__globals__))

    def _visit_methods(self, owner: Any) -> None:
        for cls in _user_classes(owner):
            for name in self._names & vars(cls).keys():
                member = vars(cls)[name]
                self._visit(getattr(member, "fget", None) or getattr(member, "__func__", member), name)


def _is_users(owner: Any) -> bool:
    """Whether an object, or a function whose names are watched, is not from a library."""
    if isinstance(owner, types.FunctionType):
        return not _is_library(owner.__module__)
    return isinstance(owner, types.ModuleType) or bool(_user_classes(owner))


def _user_classes(owner: Any) -> list[type]:
    """The classes of an object, or the class itself, that are not from a library."""
    if isinstance(owner, types.FunctionType | types.ModuleType):
        return []
    classes = (owner if isinstance(owner, type) else type(owner)).__mro__
    return [cls for cls in classes if not _is_library(cls.__module__)]


@functools.cache
def _library_names(cls: Any) -> frozenset[str]:
    """The names in the methods that a class has from libraries, apart from its construction and its picture.

    What ``nn.Module`` itself holds, children, tensors and the mode, :class:`ModuleSnapshot` watches.
    """
    methods = [
        member
        for base in cls.__mro__
        if _is_library(base.__module__) and base not in (nn.Module, object, types.FunctionType, types.ModuleType, type)
        for name, member in vars(base).items()
        if isinstance(member, types.FunctionType) and name not in _NOT_RUN
    ]
    return frozenset[str]().union(*(_names_in(method.__code__) for method in methods)) - _WRITTEN


def _names_in(code: types.CodeType) -> set[str]:
    """The names of attributes and globals in code and in the functions inside of it."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)
