"""The arguments of a Pyro program: any values, of which some tensors have a row for each datum.

The package runs model and guide on rows of tensors, all of them or some. Other arguments (keywords, dictionaries,
numbers, ``None``, tensors that are no rows) are the same in each run: :func:`bind` puts them into model and guide.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pyro_vae._utils.data import data_tensors, is_data, placement
from pyro_vae._utils.module_state import evaluation_mode
from pyro_vae._utils.param_store import scoped_param_store
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import data_plate_size, set_plate_sizes
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import describe

__all__ = ["Arguments", "Bound", "LatentsOf", "Program", "any_arguments", "bind", "new_arguments", "unbound"]

_Entry = TypeVar("_Entry", bound=Callable[..., Any])


class Arguments:
    """The arguments of model and guide, in the place of ``data``: ``model(*args, **kwargs)``.

    It is needed for keywords, and for tensors whose rows are not in the first dimension. Other values than tensors can
    be passed as they are: ``fit(model, guide, (x, None), ...)`` calls ``model(x, None)``, and ``fit(model, guide,
    {"x": x}, ...)`` calls ``model({"x": x})``.

    A list has an argument in each item, as a tuple has, unless the model takes one argument alone.

    In lists, tuples and dictionaries, however nested, the tensors and arrays with as many rows as the data plate has
    are rows, which may be taken in mini-batches. Everything else is the same in each run. Without a data plate, the
    rows are those of the first tensor.

    >>> import pyro
    >>> import pyro.distributions as dist
    >>> def model(x, scale=1.0):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, scale), obs=x)
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_vae import fit
    >>> fit(model, AutoNormal(model), Arguments(torch.randn(20), scale=2.0), epochs=3).steps
    3
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.args, self.kwargs = args, kwargs

    def __repr__(self) -> str:
        shown = [describe(value) for value in self.args]
        shown += [f"{name}={describe(value)}" for name, value in self.kwargs.items()]
        return f"Arguments({', '.join(shown)})"


class Bound:
    """A model or guide as a function of rows alone: it puts them into its other arguments.

    Args:
        function: the model or guide.
        form: of its arguments.
        leaves: their values; those of rows are replaced.
        rows: the places of the rows among them; none for a program that is given no rows.
    """

    __signature__ = inspect.Signature([inspect.Parameter("rows", inspect.Parameter.VAR_POSITIONAL)])

    def __init__(self, function: Function, form: TreeSpec, leaves: Sequence[Any], rows: Sequence[int]):
        self.__wrapped__ = function
        self.form, self.leaves, self.rows = form, list(leaves), tuple(rows)

    def arguments(self, *rows: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments, positional ones and keywords, with these rows."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.rows, rows, strict=False):  # without rows, it is given their numbers
            leaves[place] = tensor
        return tree_unflatten(leaves, self.form)

    @property
    def constants(self) -> list[Any]:
        """The arguments that are no rows."""
        return [leaf for place, leaf in enumerate(self.leaves) if place not in self.rows]

    def __call__(self, *rows: Tensor) -> Any:
        args, kwargs = self.arguments(*rows)
        return self.__wrapped__(*args, **kwargs)


class LatentsOf:
    """A guide whose runs show its latent sites alone, and not the sites that it observes.

    A guide of :class:`pyro.poutine.guide.GuideMessenger`, such as ``AutoNormalMessenger``, runs the model itself, with
    its observed sites. A guide may also observe sites to train a regression in it, as that of ``pyro.contrib.cevae``.
    """

    def __init__(self, guide: Function):
        self.__wrapped__ = guide
        self._run = poutine.block(guide, hide_fn=_is_observed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


def _is_observed(msg: Any) -> bool:
    """Whether a statement is one of data; ``pyro.factor`` counts into the density of a guide."""
    return msg["type"] == "sample" and msg["is_observed"] and not isinstance(msg["fn"], dist.Unit)


def unbound(function: Any) -> Any:
    """Return the model or guide that the user gave."""
    while isinstance(function, Bound | LatentsOf):
        function = function.__wrapped__
    return function


class Program(NamedTuple):
    """A model and its guide, or ``None``, as functions of the rows of data."""

    model: Any
    guide: Any
    data: Any


def bind(
    model: Any,
    guide: Any,
    data: Data,
    plate: str = "data",
    name: str = "data",
    keep_integers: bool = False,
) -> Program:
    """Return a program whose arguments are tensors of N rows alone, from one with any arguments.

    With such arguments already, nothing changes. Else the program is run once, to find N: the size of the data plate,
    or where there is none, the number of rows of the first tensor. Without tensors of N rows, the numbers of the rows
    are the data.

    Args:
        model, guide: a Pyro model, and its guide or ``None``.
        data: their arguments, :class:`Arguments`, a sequence of them, or the only one.
        plate: name of the data plate.
        name: of the data in errors.
        keep_integers: whether the integers of arrays stay integers, for a transform.

    Raises:
        TypeError, ValueError: if the program does not run on arguments that are more than tensors of N rows.
    """
    if isinstance(poutine.unwrap(guide), Messenger):
        guide = LatentsOf(guide)
    args, kwargs, given = _given(data, name, model)
    if not given and _are_rows(args):
        return Program(model, guide, list(args) if _is_wrapped(data) else data)
    converted = [_as_tensors(value, name, model, keep_integers) for value in args]
    args = tuple(value for values in converted for value in values)
    leaves, form = tree_flatten((args, kwargs))
    leaves = [_as_tensor(leaf, name, model, keep_integers) for leaf in leaves]
    sizes = [len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else 0 for leaf in leaves]
    try:
        trace = _run(model, guide, *tree_unflatten(leaves, form))
    except Exception as error:
        raise _explained(args, kwargs, name, model, error) from error
    size = data_plate_size(trace, plate, sizes) or next(filter(None, sizes), 1)
    rows = [place for place, found in enumerate(sizes) if found == size]
    found = [leaves[place] for place in rows] or [torch.arange(size, device=_device(leaves, model))]
    tensors = data_tensors(found, name, model, keep_integers=keep_integers, lazy=True)
    bound = Bound(model, form, leaves, rows)
    return Program(bound, None if guide is None else Bound(guide, form, leaves, rows), tensors)


def new_arguments(data: Data, name: str, model: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional arguments and keywords from arguments in any form, with arrays and frames as tensors.

    >>> new_arguments((np.array([1.0, 2.0]), None), "predictions", lambda x, y: None)
    ((tensor([1., 2.]), None), {})
    """
    args, kwargs, _ = _given(data, name, model)
    converted = [value for one in args for value in _as_tensors(one, name, model, False)]
    leaves, form = tree_flatten((tuple(converted), kwargs))
    return tree_unflatten([_as_tensor(leaf, name, model, False) for leaf in leaves], form)


def any_arguments(entry: _Entry) -> _Entry:
    """Let a function of ``model``, ``guide`` and ``data``, or ``datum``, take any arguments, see :func:`bind`."""
    signature = inspect.signature(entry)
    name = next(name for name in signature.parameters if name in ("data", "datum"))
    variable = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL

    @functools.wraps(entry)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return entry(*args, **kwargs)  # which raises the same
        values = given.arguments
        guide, data, plate = values.get("guide"), values.get(name, ()), values.get("plate", "data")
        keeps = values.get("transform") is not None
        program = bind(values["model"], guide, data, plate, name, keeps)
        values["model"] = program.model
        if program.data is not data:
            values[name] = (program.data,) if variable else program.data
        if "guide" in values:
            values["guide"] = program.guide
        return entry(*given.args, **given.kwargs)

    return call  # type: ignore[return-value]


def _items(data: Data) -> tuple[Any, ...]:
    return tuple(data) if isinstance(data, Sequence) and not isinstance(data, str | bytes) else (data,)


def _is_wrapped(data: Data) -> bool:
    return any(isinstance(item, Arguments) for item in _items(data))


def _positional_and_keywords(data: Data, name: str) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """The arguments in data of any form, and whether they are ``Arguments``; a sequence has one in each item."""
    items = _items(data)
    if len(items) == 1 and isinstance(items[0], list | tuple):  # `f(model, guide, (x, y))` for `f(..., x, y)`
        items = tuple(items[0])
    if len(items) == 1 and isinstance(items[0], Arguments):
        return items[0].args, items[0].kwargs, True
    if any(isinstance(item, Arguments) for item in items):
        raise TypeError(f"`{name}` must be one Arguments(...), with all arguments in it, got others next to it")
    return items, {}, False


def _given(data: Data, name: str, model: Any) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """The arguments as above; a list is one argument of a model that takes one and not its items."""
    args, kwargs, given = _positional_and_keywords(data, name)
    if not given and (listed := _list_of(data)) is not None and not _takes(model, args) and _takes(model, [listed]):
        return (listed,), {}, True
    return args, kwargs, given


def _list_of(data: Data) -> list[Any] | None:
    """The list that is the only value of data, which may be one argument, or has one in each item."""
    items = _items(data)
    if isinstance(data, list):
        return data
    return items[0] if len(items) == 1 and isinstance(items[0], list) else None


def _takes(model: Any, args: Sequence[Any]) -> bool:
    """Whether a model can be called with these arguments, by its signature; ``True`` where it has none."""
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*args)
    except TypeError:
        return False
    return True


def _are_rows(args: Sequence[Any]) -> bool:
    """Whether arguments are data of rows: neither other values, nor tensors or arrays of several lengths."""
    arrays = [value for value in args if isinstance(value, Tensor | np.ndarray)]
    lengths = {len(value) if value.ndim else None for value in arrays}
    return bool(args) and all(map(is_data, args)) and len(lengths) < 2 and None not in lengths


def _as_tensors(value: Any, name: str, model: Any, keep_integers: bool) -> list[Any]:
    """Return the arguments that one value of data stands for, such as those of a data set; else the value."""
    if isinstance(value, Tensor | np.ndarray) or not is_data(value):
        return [value]
    return list(data_tensors(value, name, model, keep_integers=keep_integers))


def _as_tensor(value: Any, name: str, model: Any, keep_integers: bool) -> Any:
    """Return an array of numbers, or other data that are one tensor, as a tensor; any other value as it is."""
    if isinstance(value, Tensor) or not is_data(value):
        return value
    if isinstance(value, np.ndarray) and (not value.ndim or value.dtype.kind not in "fiub"):
        return value
    tensors = data_tensors(value, name, model, keep_integers=keep_integers)
    return tensors[0] if len(tensors) == 1 else value


def _run(model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Run a program once, without a trace left; a guide that is a module sets itself up in its first run."""
    with (
        scoped_param_store(),
        evaluation_mode(),
        poutine.block(),
        torch.no_grad(),
        seeded(0),
        pyro.validation_enabled(False),
        warnings.catch_warnings(action="ignore"),
    ):
        drawn = Trace()
        if guide is not None and not isinstance(unbound(guide), nn.Module):
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        trace = poutine.trace(poutine.replay(model, drawn)).get_trace(*args, **kwargs)
        set_plate_sizes(trace)
        trace.compute_log_prob()
    return trace


def _explained(args: Sequence[Any], kwargs: dict[str, Any], name: str, model: Any, error: Exception) -> Exception:
    """The error for arguments that are more than rows, and on which the program raises another one."""
    reason = f"{type(error).__name__}: {error}"
    try:
        data_tensors(list(args), name, model)
    except (TypeError, ValueError) as form:
        return type(form)(f"{form}. As arguments of model and guide, they raise {reason}")
    shown = repr(Arguments(*args, **kwargs))
    return TypeError(f"`{name}` must be arguments that model and guide take, got {shown}, which raise {reason}")


def _device(leaves: Sequence[Any], model: Any) -> torch.device:
    return next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), placement(model).device)
