"""A Pyro model or guide for many draws of its latents at once, such that its code sees the shapes of one draw.

A decoder with ``Softmax(dim=1)`` is right on ``(N, D)`` and wrong on ``(C, N, D)``. So the dimension of the draws does
not stand on the left of the data, where the code would see it: ``torch.vmap`` adds it below the code.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pyro
import torch
from pyro.poutine import runtime
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property
from torch.overrides import TorchFunctionMode

from pyro_vae._utils.module_state import ModuleTensors
from pyro_vae._utils.rng import random_states, set_random_states
from pyro_vae.compilation import torch_private
from pyro_vae.compilation.recurrent import RecurrentLayers, lacks_recurrent_rule

__all__ = ["DrawError", "PerDraw", "Results", "Values"]

Values = dict[str, Tensor]
"""Values of latents by site name."""
Run = Callable[[Values], tuple[Mapping[Any, Tensor], Any]]
"""From the values of one draw to tensors by key, and anything else that is the same for each draw."""


class Results(NamedTuple):
    """Tensors of C draws by key, the keys of those that depend on the draw, and what a run of one draw returns besides.

    Tensors that depend on the draw are ``(C, *shape)``, others ``(*shape)``.
    """

    tensors: dict[Any, Tensor]
    stacked: frozenset[Hashable]
    info: Any

    def each(self, key: Hashable, count: int) -> Tensor:
        """Return the results of ``count`` draws, ``(C, *shape)``, also where all are the same."""
        tensor = self.tensors[key]
        return tensor if key in self.stacked else tensor.expand(count, *tensor.shape)


class PerDraw:
    """Run a function once for each of C draws, at once if ``torch.vmap`` can.

    What does not depend on the draw, such as the output of an encoder, is computed once. Code that cannot be vmapped
    (it reads the value of a tensor, packs sequences, indexes by booleans) runs once for each draw; that is found out in
    the first call and remembered. Random numbers differ between draws; the subsample of a plate does not.
    """

    def __init__(self) -> None:
        self.loops = False
        self._vmaps = False
        self._recurrent = False  # whether torch.vmap needs the rule for recurrent layers

    def __call__(self, run: Run, count: int, values: Values | None = None) -> Results:
        """Run a function for ``count`` draws, of the latents' ``values``, ``(C, *shape)``, if there are any.

        Raises:
            ValueError: if a parameter or value of a distribution is outside of its support, where Pyro validates.
        """
        values = values or {}
        if count > 1 and not self.loops:
            before, buffers = None if self._vmaps else random_states(), ModuleTensors()
            try:
                with buffers.noticed() if before else nullcontext():
                    results = self._at_once(run, count, values)
            except (DrawError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # torch.vmap cannot; an error of the code itself is raised again below
                if before is not None:
                    set_random_states(*before)
                    buffers.load_model_state()
                if not self._recurrent and lacks_recurrent_rule(error):
                    self._recurrent = True
                    return self(run, count, values)
                looped = _looped(run, count, values)
                self.loops = True
                return looped
            self._vmaps = True
            return results
        return _looped(run, count, values)

    def _at_once(self, run: Run, count: int, values: Values) -> Results:
        with RecurrentLayers() if self._recurrent else nullcontext():
            return _vmapped(run, count, values)


class DrawError(ValueError):
    """An error of many draws, which a run of one need not show: some parameter or value is outside of its support."""


def _vmapped(run: Run, count: int, values: Values) -> Results:
    same: dict[Any, Tensor] = {}  # tensors that do not depend on the draw
    infos: list[Any] = []
    sites = _SitesOfOneDraw(count, validates=torch.distributions.Distribution._validate_args)

    def one(_: Tensor, values: Values) -> tuple[dict[Any, Tensor], list[Tensor]]:
        # Zero instead of False: a distribution that was made with `validate_args=False` can be told from others.
        with pyro.validation_enabled(0), _outermost(sites):  # type: ignore[arg-type]
            tensors, info = run(values)
        infos.append(info)
        same.update({key: tensor for key, tensor in tensors.items() if not torch_private.is_batched(tensor)})
        checks = [check for _, check in sites.checks if torch_private.is_batched(check)]
        return {key: tensor for key, tensor in tensors.items() if key not in same}, checks

    with torch_private.quiet_vmap():
        stacked, checks = torch.vmap(one, randomness="different")(torch.arange(count, device="cpu"), values)
    _raise_if_invalid(sites.checks, iter(checks))
    return Results(same | stacked, frozenset(stacked), infos[-1])


def _raise_if_invalid(checks: list[tuple[str, Tensor]], batched: Iterator[Tensor]) -> None:
    """Raise the first check that fails; ``batched`` are those that depend on the draw, for all draws."""
    found = [(text, next(batched) if torch_private.is_batched(check) else check) for text, check in checks]
    results = [(text, check.all().cpu()) for text, check in found]  # constants may be on the CPU, data elsewhere
    if results and not torch.stack([valid for _, valid in results]).all():
        raise DrawError(next(text for text, valid in results if not valid))


def _looped(run: Run, count: int, values: Values) -> Results:
    found: list[Mapping[Any, Tensor]] = []
    info, subsamples = None, _SameSubsamples()
    for draw in range(count):
        with _outermost(subsamples) if count > 1 else nullcontext():
            tensors, info = run({name: value[draw] for name, value in values.items()})
        found.append(tensors)
    first = found[0]
    same = {key: tensor for key, tensor in first.items() if all(other[key] is tensor for other in found)}
    if count == 1:  # what depends on the draw is not known
        same = {}
    stacked = {key: torch.stack([other[key] for other in found]) for key in first if key not in same}
    return Results(same | stacked, frozenset(stacked), info)


@contextmanager
def _outermost(messenger: Messenger) -> Iterator[None]:
    """Run a block under a handler to which all others are inside, up to the last that hides statements from it."""
    stack = runtime._PYRO_STACK
    hiding = [place for place, other in enumerate(stack) if isinstance(other, BlockMessenger)]
    stack.insert(hiding[-1] + 1 if hiding else 0, messenger)
    try:
        yield
    finally:
        stack.remove(messenger)


class _SameSubsamples(Messenger):
    """Give all draws the subsamples of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] in self.drawn and not msg["done"]:
            msg["value"], msg["done"] = self.drawn[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.drawn[msg["name"]] = msg["value"]


_IN_PLACE = {
    Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.geometric_, Tensor.cauchy_, Tensor.log_normal_,
}  # fmt: skip


class _RandomNumbersOfEachDraw(TorchFunctionMode):
    """Fill tensors with random numbers of each draw: ``torch.empty(shape).normal_()`` is refused by ``torch.vmap``."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _IN_PLACE or torch_private.is_batched(args[0]):
            return func(*args, **(kwargs or {}))
        with torch_private.outside_vmap() as level:
            drawn = func(args[0].new_empty((self.count, *args[0].shape)), *args[1:], **(kwargs or {}))
        return torch_private.batched(drawn, level)


class _SitesOfOneDraw(Messenger):
    """Draw values inside of ``torch.vmap``, and collect checks of constraints, whose results cannot be read there."""

    def __init__(self, count: int, validates: bool):
        super().__init__()
        self.count, self.validates = count, validates
        self.checks: list[tuple[str, Tensor]] = []

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] not in pyro.get_param_store() and not msg["done"]:  # a new parameter is that of all draws
            with torch_private.outside_vmap():
                msg["value"], msg["done"] = msg["fn"](*msg["args"], **msg["kwargs"]), True

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or msg["value"] is not None:
            return
        if site_is_subsample(msg):
            if msg["fn"].subsample_size is not None and msg["fn"].subsample_size < msg["fn"].size:
                raise NotImplementedError("a subsample is the same for all draws")
            return
        try:
            with _RandomNumbersOfEachDraw(self.count):
                value = msg["fn"](*msg["args"], **msg["kwargs"])
        except RuntimeError:
            if msg["args"]:
                raise
            # Torch has no rule for some distributions. Where the parameters do not depend on the draw, all draws are
            # taken at once outside of vmap; it raises where they do.
            with torch_private.outside_vmap() as level:
                drawn = msg["fn"](torch.Size([self.count]), **msg["kwargs"])
            value = torch_private.batched(drawn, level)
        msg["value"], msg["done"] = value, True

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.validates and not site_is_subsample(msg):
            self.checks += [
                (f"site {msg['name']!r}: {text}", check) for text, check in _checks(msg["fn"], msg["value"])
            ]


def _checks(fn: Any, value: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """The checks that torch does where validation is on: of the parameters, and of a value."""
    if fn._validate_args is False:
        return
    for name in ("base_dist", "mixture_distribution", "component_distribution"):
        if hasattr(fn, name):
            yield from _checks(getattr(fn, name), None)
    for column in getattr(fn, "columns", {}).values():
        yield from _checks(column, None)
    for name, constraint in getattr(fn, "arg_constraints", {}).items():
        lazy = name not in fn.__dict__ and isinstance(getattr(type(fn), name, None), lazy_property)
        if not lazy and not constraints.is_dependent(constraint):
            parameter = torch.as_tensor(getattr(fn, name))
            got = f"but found invalid values of shape {tuple(parameter.shape)}"
            yield (
                f"Expected parameter {name} of {type(fn).__name__} to satisfy {constraint}, {got}",
                constraint.check(parameter),
            )
    if value is not None:
        try:
            check = fn.support.check(value)
        except NotImplementedError:
            return
        yield (
            f"Expected value to be within the support {fn.support} of {type(fn).__name__}, got others",
            check,
        )
