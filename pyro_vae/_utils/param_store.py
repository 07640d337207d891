"""Pyro's param store: modules registered by name, scopes, and rollback on errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pyro
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_vae._utils.validation import describe, nonempty_string

__all__ = ["module_registry", "parameters_of", "register", "rollback_params_on_error", "scoped_param_store"]


@contextmanager
def scoped_param_store() -> Iterator[None]:
    """Run a block with the parameters of Pyro's store, then remove the parameters that it added."""
    store = pyro.get_param_store()
    with store.scope(store.get_state()):
        yield


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
        for name in set(store.keys()) - before:
            del store[name]
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


def parameters_of(trace: Trace) -> dict[str, Tensor]:
    """The unconstrained parameters in a trace, by their names in the param store."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {name: site["value"].unconstrained() for name, site in nodes.items() if site["type"] == "param"}
