"""Descriptions: what modules are made of, in JSON and tensors, and the modules made again from that.

A description holds names and arguments, no code. What may be called to follow it is what the reader says, by name: a
vocabulary, and what its user hands over.
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from pyro_vae.parts.constructor_args import Factory, Recipe, Recorded, Unknown, kept, recipe_of
from pyro_vae.saving.tensor_file import FileFormatError

__all__ = ["Reader", "Writer", "is_recorded", "of_users"]

_ACCEPTED = (
    "accepted are parts, families and networks of pyro_vae, functions and classes of your own that have a name (of "
    "modules, those that derive from pyro_vae.parts.base.Part), tensors, numbers, strings, and lists of these"
)


_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)
"""Of a call with arguments that are not for it."""


def is_recorded(thing: Any) -> bool:
    """Whether it is a class or function whose calls are recorded, see :mod:`pyro_vae.parts.constructor_args`."""
    if isinstance(thing, type):
        return issubclass(thing, Recorded)
    return isinstance(thing, FunctionType) and "returns_factories" in vars(thing)


def of_users(using: Iterable[Any]) -> dict[str, Any]:
    """Classes and functions by their names, or an error if there are two of one name.

    >>> of_users([nn.Linear])
    {'Linear': <class 'torch.nn.modules.linear.Linear'>}
    """
    things: dict[str, Any] = {}
    if not isinstance(using, Iterable):
        raise TypeError(f"`using` must be a list of classes and functions, such as [MyPrior], got {using!r}")
    for thing in using:
        if not isinstance(thing, FunctionType | type):
            raise TypeError(f"`using` must be a list of classes and functions, such as [MyPrior], got {thing!r}")
        if things.setdefault(thing.__name__, thing) is not thing:
            raise ValueError(f"`using` must be one of each name, got two things named {thing.__name__!r}")
    return things


class Writer:
    """Describes modules and what they were made with.

    Args:
        vocabulary: what has names that need not be handed over: classes and functions.
        places: names of tensors that are written anyway, by ``id``.

    Attributes:
        used: what else is needed, by name.
        tensors: tensors that the description refers to, and that are not in ``places``.
    """

    def __init__(self, vocabulary: Mapping[str, Any], places: Mapping[int, str]):
        self.used: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._names = {id(thing): name for name, thing in vocabulary.items()}
        self._places = dict(places)
        self._seen: dict[int, tuple[int, str]] = {}  # by id: the number of a described module, and the path in it
        self._count = 0

    def describe(self, value: Any, where: str) -> Any:
        """What JSON holds of a value; ``where`` it is, for errors.

        Raises:
            ValueError: if there is something in it that cannot be described.
        """
        if isinstance(value, bool | int | float | str | None):
            return value
        if isinstance(value, list):
            return [self.describe(inner, f"{where}[{index}]") for index, inner in enumerate(value)]
        if isinstance(value, Unknown):
            raise ValueError(f"{where}: got {value.what}, which a file cannot hold; {_ACCEPTED}")
        if isinstance(value, tuple):
            return {"tuple": self.describe(list(value), where)}
        if isinstance(value, dict):
            where_in = {key: f"{where}[{key!r}]" for key in value}
            return {
                "dict": [
                    [self.describe(key, where_in[key]), self.describe(inner, where_in[key])]
                    for key, inner in value.items()
                ]
            }
        if id(value) in self._seen:
            return {"same": list(self._seen[id(value)])}
        if isinstance(value, nn.Module):
            return self._module(value, where)
        if isinstance(value, Tensor):
            return {"parameter" if isinstance(value, nn.Parameter) else "tensor": self._tensor(value)}
        if isinstance(value, Factory):
            return self._call("make", value.recipe, where)
        if isinstance(value, functools.partial):
            return self._call("partial", Recipe(value.func, value.args, value.keywords), where)
        return {"name": self._name(value, where)}

    def _module(self, module: nn.Module, where: str) -> Any:
        recipe = recipe_of(module)
        if recipe is None:
            raise ValueError(
                f"{where}: got a {type(module).__name__}, and a file cannot tell how it was made; {_ACCEPTED}"
            )
        description = self._call("make", recipe, where)
        number, self._count = self._count, self._count + 1
        for inside in (module.named_modules(), module.named_parameters()):
            for path, value in inside:
                self._seen.setdefault(id(value), (number, path))
        return description

    def _call(self, word: str, recipe: Recipe, where: str) -> Any:
        maker = recipe.maker
        made = isinstance(maker, Factory | functools.partial | Unknown)
        name = self.describe(maker, where) if made else self._name(maker, where)
        if word == "partial":  # of whose arguments some are still to come
            return {word: name, "args": self.describe([list(recipe.args), recipe.kwargs], where)}
        try:
            bound = inspect.signature(maker).bind(*recipe.args, **recipe.kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: got {maker!r} with arguments that it does not take: {error}") from error
        if id(maker) in self._names:
            bound.apply_defaults()  # those of now: a later version may have others
        arguments = {key: self.describe(kept(value), f"{where}.{key}") for key, value in bound.arguments.items()}
        return {word: name, "with": arguments}

    def _tensor(self, tensor: Tensor) -> str:
        name = self._places.setdefault(id(tensor), f"argument {len(self.tensors)}")
        if name.startswith("argument "):
            self.tensors[name] = tensor
        return name

    def _name(self, thing: Any, where: str) -> str:
        if id(thing) in self._names:
            return self._names[id(thing)]
        name = thing.__name__ if isinstance(thing, FunctionType | type) else f"<{type(thing).__name__}>"
        if not name.isidentifier():  # a lambda is one named "<lambda>"
            raise ValueError(f"{where}: got a {name.strip('<>')}, which has no name; {_ACCEPTED}")
        if self.used.setdefault(name, thing) is not thing:
            raise ValueError(f"{where}: got {thing!r}, and {self.used[name]!r} is there by the same name; rename one")
        return name


class Reader:
    """Makes again what was described.

    Args:
        vocabulary: what may be called or named, and nothing else.
        tensors: those that the description refers to, by name.
        path: of the file, for errors.
    """

    def __init__(self, vocabulary: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str):
        self._vocabulary = vocabulary
        self._tensors = tensors
        self._path = path
        self._parameters: dict[str, nn.Parameter] = {}
        self._made: list[nn.Module] = []

    def make(self, node: Any) -> Any:
        """What a node of a description stands for.

        Raises:
            FileFormatError: if it is no description.
            ValueError: if it needs a class or function that the vocabulary lacks.
        """
        try:
            return self._make(node)
        except RecursionError as error:
            raise self._foreign("it is nested too deeply") from error

    def _foreign(self, why: str) -> FileFormatError:
        return FileFormatError(f"path: {self._path!r} describes no model: {why}")

    def _make(self, node: Any) -> Any:
        match node:
            case list():
                return [self._make(inner) for inner in node]
            case {"tuple": [*values]}:
                return tuple(self._make(inner) for inner in values)
            case {"dict": [*pairs]} if all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
                return {self._key(key): self._make(inner) for key, inner in pairs}
            case {"name": str(name)}:
                return self._named(name)
            case {"tensor": str(name)} if name in self._tensors:
                return self._tensors[name].cpu().clone()
            case {"parameter": str(name)} if name in self._tensors:
                return self._parameter(name)
            case {"same": [int(number), str(path)]} if 0 <= number < len(self._made):
                module = self._made[number]
                inside = {**dict(module.named_modules()), **dict(module.named_parameters())}
                if path in inside:
                    return inside[path]
            case {"partial": maker, "args": [[*args], {"dict": [*pairs]} as kwargs]} if all(
                isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
            ):
                return functools.partial(self._maker(maker), *self._make(args), **self._make(kwargs))
            case {"make": maker, "with": dict(described)}:
                return self._called(self._maker(maker), described)
            case bool() | int() | float() | str() | None:
                return node
        raise self._foreign(f"it has {str(node)[:100]}")

    def _key(self, node: Any) -> Any:
        key = self._make(node)
        if not isinstance(key, str | int | float | bool | None):
            raise self._foreign(f"it has {str(node)[:100]} for a key")
        return key

    def _parameter(self, name: str) -> nn.Parameter:
        if name not in self._parameters:
            tensor = self._tensors[name].cpu().clone()
            floating = tensor.is_floating_point() or tensor.is_complex()
            self._parameters[name] = nn.Parameter(tensor, requires_grad=floating)
        return self._parameters[name]

    def _called(self, maker: Callable[..., Any], described: dict[str, Any]) -> Any:
        name = getattr(maker, "__name__", repr(maker))
        try:
            signature = inspect.signature(maker)
        except (TypeError, ValueError) as error:  # of a partial with arguments that are not for it
            raise self._foreign(f"{name} takes no such arguments: {error}") from error
        arguments = inspect.BoundArguments(signature, OrderedDict())
        arguments.arguments.update({key: self._make(value) for key, value in described.items()})
        unknown = described.keys() - signature.parameters.keys()
        if unknown:
            raise ValueError(
                f"path: {self._path!r} gives {sorted(unknown)} to {name}, which takes {list(signature.parameters)}: it "
                "is of another version"
            )
        try:
            made = maker(*arguments.args, **arguments.kwargs)
        except _ERRORS as error:
            raise ValueError(f"path: {self._path!r} calls {name}, which says: {error}") from error
        if isinstance(made, nn.Module):
            self._made.append(made)
        return made

    def _maker(self, node: Any) -> Callable[..., Any]:
        if isinstance(node, str):
            return self._named(node)
        maker = self._make(node)
        if not isinstance(maker, Factory | functools.partial):
            raise self._foreign(f"it calls a {type(maker).__name__}")
        return maker

    def _named(self, name: str) -> Any:
        if name not in self._vocabulary:
            raise ValueError(
                f"`using` must be your class or function of that name, as in `using=[{name}]`, if you trust the file "
                f"to call it: {self._path!r} needs {name!r}, which is not of this pyro_vae"
            )
        return self._vocabulary[name]
