"""Pyro's ``SVI`` for training loops of the user: one optimizer for all parameters, and an optional captured step."""

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any
from weakref import WeakSet

import numpy as np
import pyro
import torch
from pyro import infer
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.optim import PyroOptim
from pyro.optim.horovod import HorovodOptimizer
from torch import Tensor

from pyro_vae._utils.ambient import check_gradients_enabled, one_thread
from pyro_vae._utils.rng import set_torch_random_states, torch_random_states
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import boolean, positive
from pyro_vae.compilation.adam import CapturableAdagradRMSProp, CapturableAdam
from pyro_vae.compilation.graph import CaptureError
from pyro_vae.compilation.precision import check_precision
from pyro_vae.compilation.recorder import is_recording
from pyro_vae.compilation.torch_private import TreeSpec, tree_flatten, tree_unflatten
from pyro_vae.training.compiled_step import CapturedStep
from pyro_vae.training.elbo_evaluator import ElboEvaluator, FunctionLoss
from pyro_vae.training.optimizers import IMPLEMENTATION, RunOptimizer, capturable, set_group
from pyro_vae.training.preflight import check_has_loss
from pyro_vae.training.step import Step

__all__ = ["SVI"]

_PLACE, _NUMBER = "<tensor>", "<number>"
_MOST_VALUES = 5  # of a number that is a constant of the graph: each takes seconds to compile
_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type, Enum)
_MOST_OBJECTS = 3  # at one place in the arguments of a captured step, which takes seconds to compile for each


class SVI(infer.SVI):
    """Stochastic variational inference, with the interface of ``pyro.infer.SVI``.

    A step runs the same estimator on the same random numbers. One optimizer updates all parameters, where Pyro has one
    for each. A step whose loss or gradient is not finite raises an error and changes nothing.

    Args:
        model, guide: a Pyro model and its guide.
        optim: an optimizer of ``pyro.optim``, such as ``Adam({"lr": 1e-3})``, with its ``clip_args``, or a scheduler,
            such as ``ExponentialLR``, whose ``step`` is called as in Pyro. Its state is used, and its ``get_state``
            returns that of these steps, for any other SVI.
        loss: any ELBO of ``pyro.infer`` or of :mod:`pyro_vae.objectives`, or a function ``loss(model, guide, *args,
            **kwargs)`` that returns a tensor to differentiate.
        loss_and_grads: a function of the same arguments that computes the gradients itself and returns the loss.
        num_samples, num_steps: of ``run``, deprecated in Pyro.
        compile: whether to capture the step as a graph and replay it compiled, again for other shapes or arguments, and
            after a change of modules, flags, Python numbers, ``param_groups`` or the param store; the values of tensors
            may change. The optimizer must be one whose steps can be captured: those of ``torch.optim`` and Pyro can.
        precision: ``"bf16-mixed"`` for steps with large products of networks in bfloat16, as in :func:`pyro_vae.fit`;
            ``evaluate_loss`` is in float32.
        clip_norm: upper bound on the norm of all gradients together, to which they are scaled down.

    Raises:
        TypeError, ValueError: if an argument cannot be used; in a step, the ``ValueError``
            :class:`pyro_vae.compilation.graph.CaptureError` if steps do not run the same operations.
        FloatingPointError: in a step, if loss or gradient is not finite, with the step and the site or parameter.

    >>> from pyro.infer import Trace_ELBO
    >>> from pyro.optim import Adam
    >>> from pyro_vae import VAE, priors, guides, likelihoods, networks
    >>> net = networks.linear()
    >>> vae = VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), Trace_ELBO())
    >>> losses = [svi.step(torch.randn(10, 2)) for _ in range(3)]
    """

    def __init__(
        self,
        model: Function,
        guide: Function,
        optim: PyroOptim,
        loss: ELBO | Function,
        loss_and_grads: Function | None = None,
        num_samples: int = 0,
        num_steps: int = 0,
        *,
        compile: bool = False,
        precision: str | None = None,
        clip_norm: float | None = None,
    ):
        boolean(compile, "compile")
        check_precision(precision)
        evaluated = _check_loss(loss, loss_and_grads, compile)
        if clip_norm is not None:
            positive(clip_norm, "clip_norm")
        _check_optim(optim, compile)
        super().__init__(model, guide, optim, loss, loss_and_grads, num_samples, num_steps)
        self._evaluator = ElboEvaluator(model, guide, evaluated, precision=precision)
        self._evaluator.read.append(optim.pt_clip_args)
        step_class = CapturedStep if compile else Step
        self._step = step_class(self._evaluator, make_optimizer=self._make_optimizer, clip_norm=clip_norm)
        self._compile = compile
        self._calls: dict[tuple[object, ...], _CallContext] = {}  # of tensors alone, by their number and names
        self._objects: dict[tuple[int, type], list[Any]] = {}  # in the arguments of captured steps, by place and type
        self._numbers: dict[_CallContext, _Numbers] = {}  # of calls that differ in numbers alone
        self._parts: dict[Tensor, ParameterOptimizer] = {}
        self._noted: dict[ParameterOptimizer, dict[str, Any]] = {}  # settings that others have read, and may change
        self._superseded = False  # by another SVI, which has continued with a copy of the optimizer's state

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Torch's optimizer, which ``torch.optim.lr_scheduler`` can schedule; ``None`` before the first step."""
        return self._step.optimizer

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take one gradient step and return the loss, as ``pyro.infer.SVI.step`` does.

        ``ReweightedWakeSleep`` has two losses, of the model and of the guide, which are returned in a tuple.
        """
        check_gradients_enabled("SVI.step")
        call, inputs = self._split(args, kwargs)
        if any(part.settings != noted for part, noted in self._noted.items()):
            self._follow_settings()
        if self._superseded:
            raise ValueError(
                "`optim` must be an optimizer of its own for this SVI, got one with which another SVI of the other "
                "`compile` has continued. Use the same `compile` for both"
            )
        before = torch_random_states()
        with one_thread("SVI.step"):
            try:
                row = self._step(call, *inputs, validate=is_validation_enabled())
            except CaptureError as error:
                if _NUMBER not in call.others:
                    raise
                self._numbers[call.without_numbers()].error = error  # Python reads a number: a constant from now on
                call, inputs = self._split(args, kwargs)
                row = self._step(call, *inputs, validate=is_validation_enabled())
            finite, *losses = row.tolist()
            if not finite and isinstance(self._step, CapturedStep):
                raise self._step.diagnose_nonfinite(call, [inputs], partial(set_torch_random_states, before))
        return losses[0] if len(losses) == 1 else tuple(losses)

    @torch.no_grad()
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss, or losses in a tuple, without updating parameters."""
        evaluator = self._evaluator.in_float32()
        evaluator.keywords = kwargs
        evaluator.loss(*args)
        losses = tuple(map(float, evaluator.losses))
        return losses[0] if len(losses) == 1 else losses

    def _split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "tuple[_CallContext, list[Tensor]]":
        """Separate the tensors of a call from the rest; a call of tensors alone is one seen before, which is faster."""
        values, key = [*args, *kwargs.values()], (len(args), *kwargs)
        only_tensors = {Tensor}.issuperset(map(type, values))
        if only_tensors and key in self._calls:
            return self._calls[key], values
        leaves, form = tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = tuple(_PLACE if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if self._compile and not only_tensors:
            self._check_objects(leaves)
        call = _CallContext(self._evaluator, form, others)
        if only_tensors:
            self._calls[key] = call
        elif self._compile and any(map(_is_number, others)):
            known = self._numbers.setdefault(call.without_numbers(), _Numbers(others))
            if changing := known.changing(others):
                tensors = [*inputs, *self._step.parameters.values()]
                double = any(tensor.dtype == torch.float64 for tensor in tensors)
                floating = torch.float64 if double else torch.get_default_dtype()
                for place in changing:
                    dtype = floating if type(others[place]) is float else None
                    leaves[place] = torch.tensor(leaves[place], dtype=dtype, device="cpu")  # as any number is
                call = replace(call, others=tuple(_NUMBER if i in changing else one for i, one in enumerate(others)))
                inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return call, inputs

    def _check_objects(self, leaves: list[Any]) -> None:
        """Raise for arguments whose numbers a captured step would keep, or that need another capture in each step."""
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, np.ndarray):
                raise CaptureError(
                    "`compile` must be False where an argument of a step is an array of NumPy, which the captured step "
                    "would keep, got one. Pass a tensor, `torch.as_tensor(x)`"
                )
            if isinstance(leaf, (*_VALUES, Tensor)):
                continue
            seen = self._objects.setdefault((place, type(leaf)), [])
            if not any(one is leaf for one in seen):
                seen.append(leaf)
            if len(seen) > _MOST_OBJECTS:
                raise CaptureError(
                    "`compile` must be False where an argument is another object again and again, got more than "
                    f"{_MOST_OBJECTS} of {type(leaf).__name__}: the step is captured for each. Pass its tensors, in "
                    "a list, a tuple, a named tuple or a dictionary"
                )

    def _make_optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Make torch's optimizer for Pyro's, with its state, and a group for the parameters of the same settings."""
        optim: Any = self.optim
        states, schedules = {}, {}
        for parameter in parameters:
            known = optim.optim_objs.get(parameter)
            part = getattr(known, "optimizer", known)
            if isinstance(part, ParameterOptimizer):
                states[parameter] = part.join(self)
            else:
                part = ParameterOptimizer(self, parameter)
                states[parameter], schedule = _take_state(optim, parameter)
                known = optim.optim_objs[parameter] = part
                if _is_scheduler(optim):
                    known = optim.optim_objs[parameter] = optim.pt_scheduler_constructor(part, **optim.kwargs)
                    if schedule is not None:
                        known.load_state_dict(schedule)
                part.load(states[parameter])
                optim.grad_clip[parameter] = optim._get_grad_clip(parameter)
            self._parts[parameter] = part
            if part in self._noted or part.is_shared:
                self._noted[part] = dict(part.settings)
            schedules[parameter] = repr(sorted(known.state_dict().items())) if known is not part else ""
        return self._join(states, schedules)

    def _join(self, states: Mapping[Tensor, "_State"], schedules: Mapping[Tensor, str]) -> torch.optim.Optimizer:
        """Make one optimizer of parameters with these states, with a group for those of one setting and schedule."""
        groups: dict[tuple[str, str], list[Tensor]] = {}
        for parameter in states:
            key = repr(sorted(self._parts[parameter].arguments.items())), schedules.get(parameter, "")
            groups.setdefault(key, []).append(parameter)
        optimizer: Any = None
        for group in groups.values():
            made = self._construct(group, states)
            if optimizer is None:
                optimizer = made
            else:
                optimizer.param_groups += made.param_groups
                optimizer.state.update(made.state)
        if self.optim.pt_clip_args:
            optimizer.register_step_pre_hook(self._clip_each)
        return optimizer

    def _construct(self, group: list[Tensor], states: Mapping[Tensor, "_State"]) -> torch.optim.Optimizer:
        constructor: Any = self.optim.pt_optim_constructor
        part = self._parts[group[0]]
        implementation = {}
        if not self._compile and "fused" in _accepted(constructor) and all(map(torch.is_floating_point, group)):
            implementation["fused"] = True
        optimizer = constructor(group, **part.arguments, **implementation)
        if self._compile:
            _check_captured(constructor, part.arguments)
            optimizer = capturable(optimizer, momentum=part.has_scheduled_momentum)
        _load_states(optimizer, {parameter: states[parameter] for parameter in group})
        return optimizer

    @torch.no_grad()
    def _clip_each(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Clip the gradient of each parameter by itself, by the ``clip_args`` of Pyro's optimizer."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                bounds = self._parts[parameter].clip_args
                if (norm := bounds.get("clip_norm")) is not None:
                    gradient.mul_((norm / (gradient.norm() + 1e-6)).clamp(max=1.0))  # as torch.nn.utils computes it
                if (value := bounds.get("clip_value")) is not None:
                    gradient.clamp_(-value, value)

    def _follow_settings(self) -> None:
        """Give the optimizer the settings of single parameters that were changed since the last step."""
        optimizer = self._step.optimizer
        assert optimizer is not None
        for group in optimizer.param_groups:
            parts = [self._parts[parameter] for parameter in group["params"]]
            first, *others = map(self._changes, parts)
            changed = any("betas" in changes for changes in (first, *others))
            if self._compile and changed and any(part.is_shared for part in parts):
                raise CaptureError("`compile` must be False where betas change and two SVIs share an optimizer")
            if any(changes != first for changes in others):
                self._regroup(optimizer)
                break
            set_group(group, first)
        self._noted = {part: dict(part.settings) for part in self._noted}

    def _changes(self, part: "ParameterOptimizer") -> dict[str, Any]:
        noted = self._noted.get(part, part.settings)
        names = part.defaults.keys() - IMPLEMENTATION
        return {name: part.settings[name] for name in names if part.settings[name] != noted[name]}

    def _regroup(self, optimizer: torch.optim.Optimizer) -> None:
        """Form the groups again, after parameters of one group got different settings."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        new = self._join({parameter: self._parts[parameter].own_state() for parameter in parameters}, {})
        if type(new) is not type(optimizer):
            raise CaptureError(
                f"`compile` must be False where {type(new).__name__} gets a setting later. Give it to Pyro's optimizer "
                "at the start"
            )
        optimizer.param_groups[:] = new.param_groups
        optimizer.state.clear()
        optimizer.state.update(new.state)

    def _shares_captured_state(self, parameter: Tensor) -> None:
        """Let another SVI update the optimizer's tensors of a parameter; a captured step is captured again."""
        if isinstance(self.optimizer, CapturableAdam):
            self.optimizer.untie(parameter)
        self._step.clear_parameter_cache()


@dataclass(frozen=True)
class _CallContext:
    """The arguments of a step without its tensors, which are the inputs that it turns into the arguments."""

    evaluator: ElboEvaluator
    form: TreeSpec
    others: tuple[Any, ...]

    def __call__(self, *inputs: Tensor) -> AbstractContextManager[tuple[Any, ...]]:
        tensors = iter(inputs)
        leaves: list[Any] = []
        for other in self.others:
            leaf = next(tensors) if other in (_PLACE, _NUMBER) else other
            leaves.append(leaf.item() if other == _NUMBER and not is_recording() else leaf)
        args, self.evaluator.keywords = tree_unflatten(leaves, self.form)
        return nullcontext(args)

    def without_numbers(self) -> "_CallContext":
        """Return the context of all calls that differ from this one in numbers alone."""
        return replace(self, others=tuple(_NUMBER if _is_number(other) else other for other in self.others))

    def __hash__(self) -> int:
        return hash((self.form.num_leaves, repr(self.others)))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


class _Numbers:
    """The numbers among the arguments of a step, of which those that have changed are inputs of the captured graph."""

    def __init__(self, first: tuple[Any, ...]):
        self.error: CaptureError | None = None  # of a capture with numbers as inputs
        self._first = first
        self._changing: set[int] = set()
        self._values: set[tuple[Any, ...]] = set()  # of numbers that are constants

    def changing(self, others: tuple[Any, ...]) -> set[int]:
        """Return the places of numbers that have changed, none if they must be constants; raise after many of these."""
        numbers = {place: other for place, other in enumerate(others) if _is_number(other)}
        if self.error is None:
            self._changing |= {
                place for place, number in numbers.items()
                if type(number) is not type(self._first[place]) or number != self._first[place]
            }  # fmt: skip
            return self._changing
        self._values.add(tuple(numbers.values()))
        if len(self._values) > _MOST_VALUES:
            raise CaptureError(
                "`compile` must be False where Python reads a number among the arguments that changes from step to "
                f"step, got {len(self._values)} different ones. Compute with it by torch's operations alone, such as "
                "`torch.clamp` for `min`, or leave `compile` out"
            ) from self.error
        return set()


def _check_loss(loss: Any, loss_and_grads: Any, compile: bool) -> ELBO | FunctionLoss:
    """Return what a step evaluates; raise for what is no loss of ``pyro.infer.SVI``."""
    if loss_and_grads is not None and not callable(loss_and_grads):
        raise TypeError(f"`loss_and_grads` must be a function, or None, got {loss_and_grads!r}")
    if not isinstance(loss, ELBO):
        if isinstance(loss, type) or not callable(loss):
            raise TypeError(
                "`loss` must be an ELBO of pyro.infer or pyro_vae.objectives, such as Trace_ELBO(), or a function "
                f"loss(model, guide, *args, **kwargs), got {loss!r}"
            )
        return FunctionLoss(loss, loss_and_grads)
    if loss_and_grads is not None:
        raise ValueError(
            f"`loss_and_grads` must be None where `loss` is an ELBO, which has its own, got one with {loss!r}"
        )
    if compile and type(loss).__name__.startswith("Jit"):
        raise ValueError(
            f"`loss` must be the ELBO of the same name without Jit with compile=True, got {type(loss).__name__}, which "
            "TorchScript compiles: a step is compiled once"
        )
    check_has_loss(loss, "loss")
    return loss


def _check_optim(optim: Any, compile: bool) -> None:
    if not isinstance(optim, PyroOptim):
        raise TypeError(f'`optim` must be an optimizer of pyro.optim, such as `Adam({{"lr": 1e-3}})`, got {optim!r}')
    if isinstance(optim, HorovodOptimizer):
        raise ValueError(
            "`optim` must be an optimizer of one process, got HorovodOptimizer, which averages the gradients of each "
            "parameter over processes. Use pyro.infer.SVI with it"
        )
    if compile and not callable(optim.pt_optim_args):
        _check_captured(optim.pt_optim_constructor, optim.pt_optim_args)


def _check_captured(constructor: Any, settings: dict[str, Any]) -> None:
    """Raise for an optimizer whose captured steps are not its eager ones; those of torch and Pyro are tested."""
    if not getattr(constructor, "__module__", "").startswith(("torch.optim.", "pyro.optim.")):
        RunOptimizer(partial(constructor, **settings), lr=None, compile=True, argument="optim")


def _accepted(constructor: Any) -> set[str]:
    return {*inspect.signature(constructor).parameters}


def _is_scheduler(optim: PyroOptim) -> bool:
    return hasattr(optim, "pt_scheduler_constructor")


_State = dict[str, Any]
"""The state dict of an optimizer of one parameter, or what another SVI has of it, as ``{"shared": ...}``."""


class ParameterOptimizer(torch.optim.Optimizer):
    """What ``pyro.optim`` keeps for one parameter: its part of the optimizer of a :class:`SVI`.

    ``get_state`` and ``save`` of the ``pyro.optim`` object read it, and torch's schedulers and the user may change its
    ``param_groups``: the next step follows them. The state has the form of torch's optimizer of one parameter, which
    any other SVI can load.

    Attributes:
        settings: of the parameter, in the form of a group of torch's optimizer.
        clip_args: the bounds of its gradient, ``clip_norm`` and ``clip_value``.
    """

    def __init__(self, svi: SVI, parameter: Tensor):
        self._svi, self._parameter = svi, parameter
        self._others: WeakSet[SVI] = WeakSet()  # that train the parameter with the same optimizer of Pyro
        self._opt_called = True  # torch's schedulers warn where they come before the first step: this is in it
        constructor: Any = svi.optim.pt_optim_constructor
        self._given = dict(svi.optim._get_optim_args(parameter))
        self.clip_args: dict[str, Any] = svi.optim._get_grad_clip_args(parameter)
        made = constructor([parameter], **self._given)
        self.defaults = made.defaults
        (self.settings,) = made.param_groups

    def load(self, state: _State) -> None:
        """Take over the settings of a state dict."""
        for saved in state.get("param_groups", ()):
            self.settings |= {name: saved[name] for name in saved.keys() - IMPLEMENTATION - {"params"}}

    def join(self, svi: SVI) -> _State:
        """Let another SVI train the parameter; return the state for it.

        Two eager SVIs, or two captured ones, share the state, as in Pyro; else the first one may take no further step.
        """
        before, state = self._svi, self.state_dict()
        if before._compile is svi._compile:
            if self.settings.get("lrd", 1.0) != 1.0:
                raise ValueError(
                    "`optim` must have lrd=1.0 where two SVIs share it, whose steps would both let the rate decay, got "
                    f"{self.settings['lrd']}. Make an optimizer for each"
                )
            self._others.add(before)
            state = self.own_state()
        else:
            before._superseded = True
        self._svi = svi
        return state

    @property
    def is_shared(self) -> bool:
        """Whether several SVIs train the parameter by the same optimizer of Pyro."""
        return len(self._others) > 0

    def own_state(self) -> _State:
        """Return the state for another optimizer: the tensors themselves where several share them, else copies."""
        if not self.is_shared:
            return self.state_dict()
        for user in (self._svi, *self._others):
            user._shares_captured_state(self._parameter)
        return {"shared": self.state[self._parameter]}

    @property
    def arguments(self) -> dict[str, Any]:
        """The settings with which an optimizer of the parameter is made."""
        constructor: Any = self._svi.optim.pt_optim_constructor
        names = (self.settings.keys() & _accepted(constructor)) | self._given.keys()
        return {name: self.settings.get(name, self._given.get(name)) for name in names - IMPLEMENTATION - {"params"}}

    @property
    def has_scheduled_momentum(self) -> bool:
        """Whether a scheduler changes the momentum, or the first of the betas."""
        return "max_momentum" in self.settings

    def _group(self) -> dict[str, Any]:
        """The group of the parameter in the optimizer of all parameters, empty before it is there."""
        groups = [] if self._svi.optimizer is None else self._svi.optimizer.param_groups
        return next((group for group in groups if any(one is self._parameter for one in group["params"])), {})

    def _read_settings(self) -> None:
        """Read the settings from the optimizer, unless they were changed here and no step has followed yet."""
        users = [self._svi, *self._others]
        if all(user._noted.get(self, self.settings) == self.settings for user in users):
            group = self._group()
            names = (group.keys() & self.settings.keys()) - IMPLEMENTATION - {"params"}
            self.settings |= {name: _number(group[name]) for name in names}
            for user in users:
                user._noted[self] = dict(self.settings)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The settings of the parameter, which may be changed."""
        self._read_settings()
        return [self.settings]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:  # type: ignore[override]
        """The optimizer's tensors of the parameter."""
        assert self._svi.optimizer is not None
        return {self._parameter: self._svi.optimizer.state[self._parameter]}

    def state_dict(self) -> _State:
        """Return the state as torch's optimizer of this parameter alone would."""
        self._read_settings()
        optimizer, state = self._svi.optimizer, self.state[self._parameter]
        if isinstance(optimizer, CapturableAdam | CapturableAdagradRMSProp):
            state = optimizer.torch_state(self._parameter, self._group())
        copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
        return {"state": {0: copies} if copies else {}, "param_groups": [self.settings | {"params": [0]}]}

    def step(self, closure: Any = None) -> Any:
        """Raise: the whole optimizer takes the step."""
        raise RuntimeError(
            "`optim` must be an optimizer of its own for each SVI of pyro.infer, got one whose parameters a "
            "pyro_vae.SVI trains. Make a new one, and give it the state: `new.set_state(optim.get_state())`"
        )


def _number(setting: Any) -> Any:
    if isinstance(setting, tuple):
        return tuple(map(_number, setting))
    return setting.item() if isinstance(setting, Tensor) else setting


def _take_state(optim: PyroOptim, parameter: Tensor) -> tuple[_State, Any]:
    """The state that ``optim`` has for a parameter, as state dicts of its optimizer and of its scheduler, if any."""
    known: Any = optim.optim_objs.get(parameter)
    if known is not None and hasattr(known, "optimizer"):
        return known.optimizer.state_dict(), known.state_dict()
    if known is not None:
        return known.state_dict(), None
    name = pyro.get_param_store().param_name(parameter)
    saved = optim._state_waiting_to_be_consumed.pop(name, None) or {}
    if saved and ("scheduler" in saved) != _is_scheduler(optim):
        kinds = ("an optimizer", "a scheduler")
        raise ValueError(
            f"`optim` must be {kinds['scheduler' in saved]}, as the one whose state it got by set_state or load, got "
            f"{kinds[_is_scheduler(optim)]}"
        )
    return (saved["optimizer"], saved["scheduler"]) if "scheduler" in saved else (saved, None)


def _load_states(optimizer: Any, states: Mapping[Tensor, _State]) -> None:
    """Give an optimizer the states of its parameters: copies, or what it shares with another one."""
    found = {parameter: state.get("state", {}).get(0, {}) for parameter, state in states.items()}
    if isinstance(optimizer, CapturableAdam | CapturableAdagradRMSProp):
        optimizer.load_torch_states(found)
    else:
        for parameter, state in found.items():
            if state:
                optimizer.state[parameter] = {
                    name: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                    for name, value in state.items()
                }
    optimizer.state.update({parameter: state["shared"] for parameter, state in states.items() if "shared" in state})
