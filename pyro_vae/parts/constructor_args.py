"""Recipes: how a module was made, kept with it, so that it can be made again from a file.

Classes that derive from :class:`Recorded`, as all parts and families do, keep the arguments of their constructors.
Functions under :func:`factory` return network factories that keep theirs.
"""

import copy
import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Factory", "Recipe", "Recorded", "Unknown", "factory", "kept", "made_by", "recipe_of"]

P = ParamSpec("P")


M = TypeVar("M", bound=nn.Module)


_KEY = "_recipe"


class Unknown(NamedTuple):
    """An argument that is not kept: what it was, in words."""

    what: str


class Recipe:
    """A call: what was called, and its arguments as they were then.

    Tensors are copied and containers too; parameters and modules are kept themselves, since parts may share them. What
    no file could hold is not kept alive: of it there is an :class:`Unknown`.
    """

    def __init__(self, maker: Any, args: tuple, kwargs: dict[str, Any]):
        self.maker = maker
        self.args: tuple = kept(args)
        self.kwargs: dict[str, Any] = kept(kwargs)

    def __deepcopy__(self, memo: dict) -> "Recipe":
        return Recipe(self.maker, copy.deepcopy(self.args, memo), copy.deepcopy(self.kwargs, memo))

    def __reduce__(self) -> tuple:
        """A module that could be pickled still can: of functions without a name to import them by, the name is lost."""
        return Recipe, (_portable(self.maker), _portable(self.args), _portable(self.kwargs))


class Recorded:
    """Base of modules that keep their recipe: the class, and the arguments of its constructor.

    >>> class Shift(Recorded, nn.Module):
    ...     def __init__(self, by):
    ...         super().__init__()
    >>> recipe_of(Shift(3)).args
    (3,)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        if _KEY not in vars(self):  # the first is that of the class itself, and then come those of its bases
            vars(self)[_KEY] = Recipe(type(self), args, kwargs)
        init(self, *args, **kwargs)

    return recording


class Factory:
    """A network factory that knows how it was made.

    >>> from pyro_vae import networks
    >>> networks.standardized(networks.mlp([32], activation=nn.Tanh), loc=0.5)
    standardized(mlp([32], activation=Tanh), loc=0.5)
    """

    def __init__(self, recipe: Recipe, build: Callable[[int, int], nn.Module]):
        self.recipe = recipe
        self._build = build

    def __call__(self, in_features: int, out_features: int) -> nn.Module:
        """The network for these sizes."""
        return made_by(self._build(in_features, out_features), self, in_features, out_features)

    def __repr__(self) -> str:
        words = [_spelled(value) for value in self.recipe.args]
        words += [f"{name}={_spelled(value)}" for name, value in self.recipe.kwargs.items()]
        return f"{self.recipe.maker.__name__}({', '.join(words)})"

    def __deepcopy__(self, memo: dict) -> "Factory":
        return self  # nothing in it changes

    def __reduce__(self) -> tuple:
        return _call, (self.recipe.maker, self.recipe.args, self.recipe.kwargs)


def factory(function: Callable[P, Callable[[int, int], nn.Module]]) -> Callable[P, Callable[[int, int], nn.Module]]:
    """Decorate a function that returns network factories: they then know the arguments that they were made with.

    A model with such a network can be saved, see :meth:`pyro_vae.VAE.save`.

    >>> @factory
    ... def wide(width):
    ...     return lambda in_features, out_features: nn.Sequential(
    ...         nn.Linear(in_features, width), nn.Tanh(), nn.Linear(width, out_features)
    ...     )
    >>> wide(width=64)
    wide(width=64)
    """

    @functools.wraps(function)
    def remembering(*args: P.args, **kwargs: P.kwargs) -> Callable[[int, int], nn.Module]:
        return Factory(Recipe(remembering, args, kwargs), function(*args, **kwargs))

    remembering.__dict__["returns_factories"] = True
    return remembering


def made_by(module: M, maker: Any, *args: Any) -> M:
    """The module, with its recipe, if it has none of its own."""
    vars(module).setdefault(_KEY, Recipe(maker, args, {}))
    return module


def recipe_of(module: nn.Module) -> Recipe | None:
    """How a module was made; ``None`` where that is not known."""
    if isinstance(module, Recorded) and type(module).__init__ is nn.Module.__init__:
        return Recipe(type(module), (), {})
    return vars(module).get(_KEY)


def kept(value: Any) -> Any:
    """What a recipe keeps of an argument."""
    if isinstance(value, nn.Parameter | nn.Module | Factory | FunctionType | type | functools.partial | Unknown):
        return value
    if isinstance(value, Tensor) and not value.is_meta:
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.tensor(value)
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return value.item()
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, list | range):
        return [kept(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(kept(inner) for inner in value)
    if isinstance(value, dict):
        return {kept(key): kept(inner) for key, inner in value.items()}
    return Unknown(f"a {type(value).__name__}")


def _portable(value: Any) -> Any:
    """Without the functions that pickle cannot find again."""
    if isinstance(value, list | tuple) and not isinstance(value, Unknown):
        return type(value)(_portable(inner) for inner in value)
    if isinstance(value, dict):
        return {key: _portable(inner) for key, inner in value.items()}
    return value if _is_importable(value) else Unknown(f"{_spelled(value)}, which pickling has lost")


def _is_importable(value: Any) -> bool:
    if isinstance(value, FunctionType | type):
        return getattr(sys.modules.get(value.__module__), value.__qualname__, None) is value
    if isinstance(value, Factory):
        return _is_importable([value.recipe.maker, value.recipe.args, value.recipe.kwargs])
    if isinstance(value, functools.partial):
        return _is_importable([value.func, value.args, value.keywords])
    if isinstance(value, list | tuple):
        return all(_is_importable(inner) for inner in value)
    return _is_importable(list(value.values())) if isinstance(value, dict) else True


def _call(maker: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    return maker(*args, **kwargs)


def _spelled(value: Any) -> str:
    return value.__name__ if isinstance(value, FunctionType | type) else repr(value)
