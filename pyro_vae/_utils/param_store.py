"""Pyro's param store: modules registered by name, scopes, rollback on errors, and whose parameters it holds."""

import weakref
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from pyro_vae._utils.module_state import before_each_run, evaluation_mode
from pyro_vae._utils.plates import every_row
from pyro_vae._utils.rng import preserve_rng_state
from pyro_vae._utils.validation import describe, nonempty_string

__all__ = [
    "check_parameters", "module_registry", "parameters_of", "register", "rollback_params_on_error",
    "scoped_param_store", "without_training",
]  # fmt: skip

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@contextmanager
def scoped_param_store() -> Iterator[None]:
    """Run a block with the parameters of Pyro's store, then remove the parameters that it added."""
    store = pyro.get_param_store()
    try:
        with store.scope(store.get_state()):
            yield
    finally:  # the end of a scope brings back what was removed inside
        for entries in _removed:
            _remove(entries)
        _removed.clear()


def without_training(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Make a function that reports on a model and guide leave both as they are.

    Their modules are in evaluation mode meanwhile, plates have all of their rows, and Pyro's store has no further
    parameters afterwards.
    """

    @wraps(function)
    def reporting(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with scoped_param_store(), every_row(), evaluation_mode(*filter(callable, (*args, *kwargs.values()))):
            return function(*args, **kwargs)

    return reporting


@contextmanager
def rollback_params_on_error() -> Iterator[None]:
    """Run a block; if it raises, remove the parameters that it added to Pyro's store.

    >>> import pyro, torch
    >>> try:
    ...     with rollback_params_on_error():
    ...         w = pyro.param("w", torch.zeros(2))
    ...         raise ValueError
    ... except ValueError:
    ...     "w" in pyro.get_param_store()
    False
    """
    store = pyro.get_param_store()
    before = set(store.keys())
    try:
        yield
    except BaseException:
        _drop(store.keys() - before)
        raise


Registered = dict[str, tuple[nn.Module, str, Tensor]]
"""Modules by name, each with the name and value of one of its parameters."""
_registered: ContextVar[tuple[Registered, bool]] = ContextVar("registered")


@contextmanager
def module_registry(modules: Registered, known: bool) -> Iterator[None]:
    """Make :func:`register` add modules to a dict inside the block.

    With ``known``, it registers one parameter of each module in the dict: a loop knows the others from its first step,
    and one is enough for Pyro's ELBOs to find that there are parameters.
    """
    token = _registered.set((modules, known))
    try:
        yield
    finally:
        _registered.reset(token)


def register(name: str, module: nn.Module) -> None:
    """Register parameters, each once, as ``pyro.module(name, module)`` does, without its warnings of frozen ones.

    Raise if another module has the same name, whose parameters would be trained in place of these.
    """
    nonempty_string(name, "name")
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be a module, such as `networks.linear()(2, 3)`, got {describe(module)}")
    modules, known = _registered.get(({}, False))
    if known and name in modules and modules[name][0] is module:
        pyro.param(*modules[name][1:])
        return
    store = pyro.get_param_store()
    for path, parameter in module.named_parameters():
        key = f"{name}$$${path}"
        if not parameter.requires_grad:
            continue
        if key in store and store[key] is not parameter:
            raise ValueError(
                f"`name` must be one that no other module in Pyro's param store has, got {name!r}, which has another "
                f"{path!r}. Leave the name out to get a unique one, or call pyro.clear_param_store()"
            )
        pyro.param(key, parameter)
        modules[name] = module, key, parameter
        _entries_of(module)[key] = weakref.ref(parameter)


Entries = dict[str, "weakref.ref[Tensor]"]
"""Parameters by their names in Pyro's store."""
_registered_by: "weakref.WeakKeyDictionary[nn.Module, Entries]" = weakref.WeakKeyDictionary()
_removed: list[Entries] = []  # since the last scope ended


def _entries_of(module: nn.Module) -> Entries:
    """The entries of a module, which leave Pyro's store with it."""
    if module not in _registered_by:
        entries: Entries = {}
        _registered_by[module] = entries
        weakref.finalize(module, _release, entries).atexit = False
    return _registered_by[module]


def _release(entries: Entries) -> None:
    _removed.append(entries)
    _remove(entries)


def _remove(entries: Entries) -> None:
    """Remove the entries that Pyro's store still has."""
    params = pyro.get_param_store()._params
    gone = {key: parameter for key, ref in entries.items() if (parameter := ref()) is not None}
    _drop({key for key, parameter in gone.items() if params.get(key) is parameter})


def _drop(names: Set[str]) -> None:
    """Remove parameters from Pyro's store, by a new dict: the garbage is collected at any time.

    A parameter may have two names, of which the store removes it under one alone.
    """
    store = pyro.get_param_store()
    kept = {key: parameter for key, parameter in store._params.items() if key not in names}
    for key in store._params.keys() - kept.keys():
        store._param_to_name.pop(store._params[key], None)
        store._constraints.pop(key, None)
    for key, parameter in kept.items():
        store._param_to_name.setdefault(parameter, key)
    store._params = kept


def parameters_of(trace: Trace) -> dict[str, Tensor]:
    """The unconstrained parameters in a trace, by their names in the param store."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {name: site["value"].unconstrained() for name, site in nodes.items() if site["type"] == "param"}


def check_parameters(run: Callable[[], _Result], again: Callable[[], Any] | None = None) -> _Result:
    """Run a pair; raise if Pyro's store holds parameters of other modules, or of another shape, under its names.

    ``again`` is another run, if the first one must not be repeated.
    """
    modules: list[nn.Module] = []
    with _Statements() as found, before_each_run(modules.append):
        try:
            result = run()
        finally:
            if found.errors:
                raise found.errors[0]
    if found.others:  # `update_module_params` of pyro.module has replaced them by now
        with _Statements() as second, torch.no_grad(), preserve_rng_state():
            (again or run)()
        for name, own in found.others.items():
            if second.others.get(name) is own:
                raise _taken(name)
    for module in dict.fromkeys(modules):
        _check_owner(module)
    return result


class _Statements(Messenger):
    """The param statements that run inside for which Pyro's store has another value than their own.

    Attributes:
        others: their own Parameters, by name, as those of modules.
        errors: of those that have another shape in the store.
    """

    def __init__(self) -> None:
        super().__init__()
        self.others: dict[str, nn.Parameter] = {}
        self.errors: list[ValueError] = []

    def _pyro_param(self, msg: Any) -> None:
        store, name, initial = pyro.get_param_store(), msg["name"], (*msg["args"], None)[1]
        if name not in store or initial is None or (stored := store[name]) is initial:
            return
        if callable(initial):
            with torch.no_grad(), preserve_rng_state():
                initial = initial()
        if isinstance(initial, Tensor) and initial.shape != stored.shape:
            wrong_shape = ValueError(
                f"pyro.param({name!r}) must have the shape of its initial value, {tuple(initial.shape)}, got "
                f"{tuple(stored.shape)} in Pyro's param store, from an earlier run or another model. Call "
                "pyro.clear_param_store() first, or use another name"
            )
            self.errors.append(_taken(name) if isinstance(initial, nn.Parameter) else wrong_shape)
        elif isinstance(initial, nn.Parameter):
            self.others[name] = initial


def _taken(name: str) -> ValueError:
    module, _, path = name.rpartition("$$$")
    statement = f"pyro.module({module!r})" if module else "a PyroModule"
    return ValueError(
        f"{statement} must have its own parameters in Pyro's param store, got those of another module at {path!r}, "
        "such as that of an earlier run of a notebook cell: they would be trained in place of these. Call "
        "pyro.clear_param_store() first, or use another name; to continue with the stored values, call "
        "pyro.module(name, module, update_module_params=True)"
    )


_owners: "WeakIdKeyDictionary" = WeakIdKeyDictionary()  # of PyroParams in the store, the modules that had them first


def _check_owner(root: nn.Module) -> None:
    """Raise if PyroModules, such as autoguides, have taken their parameters from others of the same names."""
    for path, module in root.named_modules() if isinstance(root, PyroModule) else ():
        for name in getattr(module, "_pyro_params", ()):
            parameter = module._parameters.get(f"{name}_unconstrained")
            if parameter is not None and _owners.setdefault(parameter, weakref.ref(module))() is not module:
                raise ValueError(
                    f"{type(root).__name__} must have its own parameters in Pyro's param store, got those of another "
                    f"module of this name at {f'{path}.{name}'.lstrip('.')!r}: training one would change the other. "
                    "Call pyro.clear_param_store() before the first run of the second one, or give each a store of "
                    "its own: `with pyro.get_param_store().scope() as parameters:`"
                )
