"""Find the modules that run inside a block, to save their tensors, or to restore their buffers and modes."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

__all__ = ["ModuleSnapshot", "ModuleTensors", "before_each_run", "bound_module", "buffers_kept", "evaluation_mode"]


class ModuleTensors:
    """Parameters and buffers of modules that functions, such as a model and a guide, are, are bound to, or run.

    The modules are found when a function runs, not in its code: they may be in closures, globals, handlers, objects.


    >>> network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> tensors = ModuleTensors()
    >>> with tensors.noticed():
    ...     y = network(torch.ones(4, 2))
    >>> list(tensors.named())[:3], network[1].num_batches_tracked
    (['0.weight', '0.bias', '1.weight'], tensor(1))
    >>> tensors.load_model_state()
    >>> network[1].num_batches_tracked
    tensor(0)
    """

    def __init__(self, *functions: Any):
        self._roots: list[nn.Module] = []
        self._seen: set[int] = set()
        self._places: list[tuple[nn.Module, str]] = []
        self._noted: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        for function in functions:
            self._add(bound_module(function))

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Add the modules that this thread runs inside the block, with the values of their buffers before."""
        with before_each_run(self._add):
            yield

    def _add(self, root: nn.Module | None) -> None:
        if root is None or id(root) in self._seen:
            return
        self._roots.append(root)
        for module in root.modules():
            if id(module) not in self._seen:
                self._seen.add(id(module))
                places = [(module, name) for name in module._buffers]
                self._places += places
                self._noted += _values(places)

    def note(self) -> None:
        """Store the present values of the buffers."""
        self._noted = _values(self._places)

    @torch.no_grad()
    def changed(self) -> set[int]:
        """Return the ids of the buffers that differ from their values that were stored last.

        Their versions do not show it: batch normalisation writes to its buffers without a new version.
        """
        return {
            id(module._buffers.get(name))
            for module, name, tensor, value in self._noted
            if module._buffers.get(name) is not tensor or not torch.equal(tensor, value)
        }

    @torch.no_grad()
    def load_model_state(self) -> None:
        """Restore the values of the buffers that were stored last."""
        for module, name, tensor, value in self._noted:
            module._buffers[name] = tensor.copy_(value)

    def named(self) -> dict[str, Tensor]:
        """Parameters and buffers by path, each once; paths of all but the first module begin with its number."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for number, root in enumerate(self._roots):
            for tensors in (root.named_parameters, root.named_buffers):
                for path, tensor in tensors():
                    if id(tensor) not in seen:
                        seen.add(id(tensor))
                        found[f"{number}: {path}" if number else path] = tensor
        return found

    def modules(self) -> list[nn.Module]:
        """All modules, each once."""
        return list({id(module): module for root in self._roots for module in root.modules()}.values())


class ModuleSnapshot:
    """What Python can change in modules and in the param store at any time: tensors, children and their flags.

    Args:
        roots: the modules.
        names: of parameters in Pyro's param store.

    >>> network = nn.Sequential(nn.Linear(2, 3))
    >>> snapshot = ModuleSnapshot([network], [])
    >>> snapshot.has_changed(), network.eval() and snapshot.has_changed()
    (False, True)
    """

    def __init__(self, roots: Iterable[nn.Module], names: Sequence[str]):
        self._names = names
        self._modules = list({id(module): module for root in roots for module in root.modules()}.values())
        dicts: list[dict[str, Any]] = [
            held for module in self._modules for held in (module._parameters, module._buffers, module._modules)
        ]
        self._empty = [held for held in dicts if not held]
        self._views = [held.values() for held in dicts if held]
        self._kept = list(self._held())  # alive, so that no other object gets the same id
        self._tensors = list({id(value): value for value in self._kept if isinstance(value, Tensor)}.values())
        self._before = self._read()

    def has_changed(self) -> bool:
        """Whether anything differs from what it was: this runs at every step, in a few microseconds."""
        return any(self._empty) or self._read() != self._before

    def _held(self) -> Iterator[Any]:
        stored: Any = pyro.get_param_store().named_parameters()
        return chain(*self._views, map(stored.mapping.get, self._names))

    def _read(self) -> list[int]:
        flags, addresses = map(_REQUIRES_GRAD, self._tensors), map(Tensor.data_ptr, self._tensors)
        return [*map(id, self._held()), *flags, *addresses, *map(_TRAINING, self._modules)]


_REQUIRES_GRAD, _TRAINING = attrgetter("requires_grad"), attrgetter("training")


def _values(places: list[tuple[nn.Module, str]]) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Each buffer with its module, its name and a copy of its values."""
    return [
        (module, name, tensor, tensor.detach().clone())
        for module, name in places
        if (tensor := module._buffers.get(name)) is not None
    ]


def bound_module(function: Callable[..., Any]) -> nn.Module | None:
    """The module that a function is or is bound to, inside any partial, decorators and handlers."""
    while not isinstance(function, nn.Module):
        if isinstance(function, partial):
            handled = len(function.args) == 2 and isinstance(function.args[0], Messenger)
            function = function.args[1] if handled else function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            owner = getattr(function, "__self__", None)
            return owner if isinstance(owner, nn.Module) else None
    return function


@contextmanager
def before_each_run(call: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call a function with each module that this thread runs inside the block, before it runs."""
    thread = threading.get_ident()

    def notice(module: nn.Module, _: Any) -> None:
        if thread == threading.get_ident():
            call(module)

    handle = nn.modules.module.register_module_forward_pre_hook(notice)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def buffers_kept(*functions: Any) -> Iterator[None]:
    """Run a block, then restore the buffers of the modules that ran inside, or that a function is or is bound to."""
    tensors = ModuleTensors(*functions)
    try:
        with tensors.noticed():
            yield
    finally:
        tensors.load_model_state()


@contextmanager
def evaluation_mode(*functions: Any) -> Iterator[None]:
    """Run a block with every module that runs inside, or that a function is or is bound to, in evaluation mode.

    The mode of each module, and its buffers, are restored afterwards, at the end of the outermost block that knows it.

    >>> network = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
    >>> with evaluation_mode():
    ...     torch.equal(network(torch.ones(4, 2)), network(torch.ones(4, 2)))
    True
    >>> network.training
    True
    """
    modes: dict[nn.Module, bool] = {}
    seen: set[int] = set()
    outer = list(_modes)

    def switch(root: nn.Module) -> None:
        if id(root) in seen:
            return
        for module in root.modules():  # by the attribute: a method `train` of the user's may do more
            seen.add(id(module))
            if not any(module in held for held in outer):
                inner = next((held for held in _modes if module in held), {})  # one inside may have been the first
                modes[module] = inner.pop(module, module.training)
            module.training = False

    _modes.append(modes)
    try:
        with buffers_kept(*functions), before_each_run(switch):
            for root in filter(None, map(bound_module, functions)):
                switch(root)
            yield
    finally:
        _modes[:] = [held for held in _modes if held is not modes]
        for module, mode in modes.items():
            module.training = mode


_modes: list[dict[nn.Module, bool]] = []  # of the blocks at present, the outermost first
