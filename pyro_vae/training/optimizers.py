"""The optimizer of a training run: made by a class or function of the user, for eager and for captured steps."""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pyro.optim.adagrad_rmsprop import AdagradRMSProp
from pyro.optim.clipped_adam import ClippedAdam
from pyro.optim.dct_adam import DCTAdam
from torch import Tensor

from pyro_vae._utils.rng import preserve_rng_state
from pyro_vae._utils.validation import describe, number
from pyro_vae.compilation.adam import CapturableAdagradRMSProp, CapturableAdam, CapturableClippedAdam
from pyro_vae.compilation.graph import CaptureError, Graph, capturable_optimizers
from pyro_vae.training.schedules import RunSchedule, Schedule, TorchSchedule, described

__all__ = ["IMPLEMENTATION", "MakeOptimizer", "RunOptimizer", "capturable", "copy_state", "set_group", "set_rates"]

MakeOptimizer = Callable[..., torch.optim.Optimizer]
"""From a list of parameters, and the learning rate ``lr`` if it takes one, to their optimizer."""

IMPLEMENTATION = {"capturable", "differentiable", "foreach", "fused"}
"""Settings that choose how torch computes the same numbers."""
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # with one kernel for all parameters on every device
_CAPTURED = "Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Rprop, SGD, ASGD, Adadelta, Adagrad and Pyro's ClippedAdam"
_EXPECTED = "a class of torch.optim, or a function from a list of parameters to their optimizer"


class RunOptimizer:
    """Make the optimizer of a training run. It is tried on a small tensor first, before any work is lost.

    Args:
        make: a class of ``torch.optim``, or a function from a list of parameters to their optimizer.
        lr: the learning rate of the run; the one of the optimizer if ``None``.
        compile: whether steps are captured.
        saves: whether the state of the optimizer is written to checkpoints.
        device: where parameters are.
        argument: the name of the argument that ``make`` comes from, for errors.

    Attributes:
        description: name and settings of the optimizer, without its learning rate.
        rate: the learning rate as a number or a description, to compare it in another process.

    Raises:
        TypeError, ValueError: if ``make`` returns no optimizer, or one that cannot train a VAE, or if ``lr`` is given
            and it sets its own.
        CaptureError: if its captured steps are not its eager ones.

    >>> make = RunOptimizer(partial(torch.optim.SGD, momentum=0.9), lr=0.1)
    >>> weight = torch.ones(2, requires_grad=True)
    >>> make([weight]).param_groups[0]["lr"], make.rate
    (0.1, 0.1)
    >>> make.description
    'SGD(dampening=0, maximize=False, momentum=0.9, nesterov=False, weight_decay=0)'
    """

    def __init__(
        self,
        make: MakeOptimizer,
        lr: float | Schedule | RunSchedule | None,
        compile: bool = False,
        saves: bool = False,
        device: torch.device | str = "cpu",
        argument: str = "optimizer",
    ):
        self._argument, self._must_be = argument, f"`{argument}` must be"
        if not callable(make):
            raise TypeError(f"{self._must_be} {_EXPECTED}, got {describe(make)}")
        self._make, self._compile, self._device = make, compile, device
        self._bare = make.func if isinstance(make, partial) else make
        self._bound = {*make.keywords} if isinstance(make, partial) else set[str]()
        self._name = getattr(self._bare, "__name__", type(self._bare).__name__)
        self._momentum = isinstance(lr, TorchSchedule) and lr.momentum is not None
        self._options: dict[str, Any] = {}
        if lr is not None:
            if "lr" in self._bound or "lr" not in _argument_names(make):
                raise ValueError(
                    "`lr` must be left out where `optimizer` sets the learning rate itself, got "
                    f"{described(lr)} and {self._name}. Set it in one place; a function takes it as its argument `lr`"
                )
            start = lr.start if isinstance(lr, RunSchedule) else lr(0) if callable(lr) else lr
            self._options["lr"] = number(start, "lr: at step 0", least=0)
        groups = self._try(saves)
        self.description = " and ".join(dict.fromkeys(f"{self._name}({_settings(group)})" for group in groups))
        rates = [float(group.get("lr", 0.0)) for group in groups]
        self.rate: Any = described(lr) if lr is not None else rates[0] if len(rates) == 1 else rates
        if compile:
            self._try_captured()

    def __call__(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Make the optimizer of these parameters."""
        optimizer = self._made(parameters)
        return capturable(optimizer, self._momentum) if self._compile else optimizer

    @property
    def is_capturable(self) -> bool:
        """Whether it makes optimizers for captured steps."""
        return self._compile

    def capturable(self, flag: bool = True) -> "RunOptimizer":
        """Return one that makes optimizers for captured steps, or for eager ones."""
        made = copy.copy(self)
        made._compile = flag
        return made

    def continued(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return an optimizer that continues with the state of one of the other kind, for captured or eager steps."""
        if self._compile:
            return self.captured(optimizer)
        new = self._made([parameter for group in optimizer.param_groups for parameter in group["params"]])
        copy_state(optimizer, new)
        return new

    def captured(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return an optimizer for captured steps that continues with the state of an eager one, in copies.

        Raise :class:`pyro_vae.compilation.graph.CaptureError` if its captured steps are not its eager ones.
        """
        if hooks := [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]:
            raise CaptureError(
                f"`compile` must be False where a hook runs at a step of the optimizer, got {hooks[0]!r}"
            )
        self._try_captured()
        copied = copy.copy(optimizer)
        copied.param_groups = [dict(group) for group in optimizer.param_groups]
        copied.state = defaultdict(dict)
        new = capturable(copied, self._momentum)
        if isinstance(new, CapturableAdam | CapturableAdagradRMSProp):
            new.load_torch_states(dict(optimizer.state))
        else:
            states = optimizer.state.items()
            counts = _COUNTS | {
                name for one, state in states for name, value in state.items() if one.dim() and _is_single(value)
            }
            for parameter, state in states:
                new.state[parameter] = {kind: _copied(value, kind in counts) for kind, value in state.items()}
        return new

    def _made(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        options = dict(self._options)
        if not self._compile and self._bare in _FUSED and not IMPLEMENTATION & self._bound:
            options["fused"] = True
        try:
            optimizer = self._make(list(parameters), **options)
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._error(error, f"{self._must_be} {_EXPECTED}, got {self._name}, which raises") from error
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{self._must_be} {_EXPECTED}, got {self._name}, which returns {describe(optimizer)}")
        taken = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if taken != {*map(id, parameters)}:
            raise ValueError(
                f"`{self._argument}` must return an optimizer of the parameters that it gets, got one from "
                f"{self._name} of {len(taken)} tensors, {len(taken & {*map(id, parameters)})} of the {len(parameters)}"
            )
        rates = {float(group.get("lr", 0.0)) for group in optimizer.param_groups}
        if self._options and rates != {self._options["lr"]}:
            raise ValueError(
                f"`{self._argument}` must use the `lr` that it gets, {self._options['lr']}, for all parameters, "
                f"got one from {self._name} with {', '.join(map(str, sorted(rates)))}. With other rates, leave `lr` of "
                "`fit` out"
            )
        return optimizer

    @staticmethod
    def _error(error: Exception, message: str) -> Exception:
        return (TypeError if isinstance(error, TypeError) else ValueError)(f"{message}: {error}")

    def _try(self, saves: bool) -> list[dict[str, Any]]:
        """Take one step on a small tensor; return the groups of the optimizer, as they were before it."""
        weight = torch.ones(2, 2, device=self._device, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        with preserve_rng_state():
            optimizer = self._made([weight])
            groups = [dict(group) for group in optimizer.param_groups]
            if self._momentum and not all({"betas", "momentum"} & group.keys() for group in groups):
                raise ValueError(
                    f"`{self._argument}` must have betas or a momentum, which this `lr` changes, got {self._name}. Use "
                    "another optimizer, or `cycle_momentum=False`"
                )
            closure = inspect.signature(optimizer.step).parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                raise ValueError(
                    f"`{self._argument}` must take a step from one gradient, got {self._name}, which computes the loss "
                    "several times in a step: an ELBO with random draws is another number each time"
                )
            try:
                optimizer.step()
            except (TypeError, ValueError, RuntimeError) as error:
                message = f"`{self._argument}` must take dense gradients, got {self._name}, whose step raises"
                raise self._error(error, message) from error
        for name, value in optimizer.state[weight].items():
            if saves and not isinstance(value, Tensor | bool | int | float):
                raise ValueError(
                    f"`{self._argument}` must keep tensors and numbers in its state with `checkpoints`, got "
                    f"{self._name}, whose {name!r} is {describe(value)}"
                )
        return groups

    def _try_captured(self) -> None:
        """Compare captured steps with eager ones, on small tensors, while learning rate and momentum change."""
        message = f"{self._must_be} one whose steps can be captured with compile=True, such as {_CAPTURED}, got "
        start = torch.tensor([[0.5, -1.0], [2.0, 0.25]], dtype=torch.float64, device=self._device)
        ours, theirs = ([(start * size).requires_grad_() for size in (1.0, -3.0)] for _ in range(2))
        gradients = [[(start + step).sin() * size for size in (1.0, 0.5)] for step in range(5)]

        def step(*gradients: Tensor) -> list[Tensor]:
            for weight, gradient in zip(ours, gradients, strict=True):
                weight.grad = gradient
            with capturable_optimizers():
                captured.step()
            captured.zero_grad(set_to_none=True)
            return [weight.detach().clone() for weight in ours]

        with preserve_rng_state():
            eager = self._made(theirs)
            with capturable_optimizers():
                captured = capturable(self._made(ours), self._momentum)
            if isinstance(captured, CapturableAdam):  # made for that
                return
            graph: Graph | None = None
            for index, given in enumerate(gradients):
                for optimizer in (eager, captured):
                    rate = 0.1 / (1 + index) if self._options else None
                    set_rates(optimizer, rate, 0.9 - 0.1 * index if self._momentum else None)
                for weight, gradient in zip(theirs, given, strict=True):
                    weight.grad = gradient.clone()
                eager.step()
                try:
                    if index == 0:
                        step(*given)
                    else:
                        graph = graph or Graph(step, given)
                        graph(*given)
                except Exception as error:
                    first_line = str(error).partition("\n")[0]
                    raise CaptureError(f"{message}{self._name}: {first_line}") from error
                if not all(map(partial(torch.allclose, rtol=1e-6, atol=1e-6), ours, theirs)):
                    settings = _settings(captured.param_groups[0])
                    raise CaptureError(
                        f"{message}{self._name} with {settings}, whose captured steps differ from its eager ones"
                    )


def capturable(optimizer: torch.optim.Optimizer, momentum: bool = False) -> torch.optim.Optimizer:
    """Return the optimizer for captured steps, in which the learning rate, and the momentum, are tensors.

    Args:
        optimizer: one that has taken no step.
        momentum: whether a schedule changes the momentum.
    """
    groups = [group for group in optimizer.param_groups if group["params"]]
    if type(optimizer) is torch.optim.Adam and not momentum and all(map(CapturableAdam.accepts, groups)):
        return CapturableAdam([{name: group[name] for name in ("params", "lr", "betas", "eps")} for group in groups])
    if type(optimizer) in (ClippedAdam, DCTAdam):
        return CapturableClippedAdam([_plain_adam(group) for group in groups])
    if type(optimizer) is AdagradRMSProp:
        return CapturableAdagradRMSProp(groups)
    optimizer.param_groups[:] = groups
    for group in groups:
        as_tensor = partial(torch.tensor, dtype=torch.float64, device=group["params"][0].device)
        group |= {name: True for name in ("capturable", "foreach") if name in group}
        group |= {name: False for name in ("fused",) if name in group}
        group["lr"] = as_tensor(float(group.get("lr", 0.0)))
        if momentum and "betas" in group:
            group["betas"] = (as_tensor(group["betas"][0]), *group["betas"][1:])
            group["foreach"] = False  # torch's loops over all tensors take a number here
        elif momentum:
            group["momentum"] = as_tensor(group["momentum"])
    return optimizer


@torch.no_grad()
def copy_state(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Set the state and the learning rates of an optimizer, in place, to those of another one of the same parameters.

    One of them is for captured steps, see :meth:`RunOptimizer.captured`.
    """
    for ours, theirs in zip(target.param_groups, source.param_groups, strict=True):
        names = (ours.keys() & theirs.keys()) - IMPLEMENTATION - {"params"}
        changed = {name: _plain_number(theirs[name]) for name in names}
        changed = {name: value for name, value in changed.items() if _plain_number(ours[name]) != value}
        set_group(ours, changed)
        for parameter in theirs["params"]:
            state = source.state[parameter]
            if isinstance(source, CapturableAdam | CapturableAdagradRMSProp):
                state = source.torch_state(parameter, theirs)
            if isinstance(target, CapturableAdam | CapturableAdagradRMSProp):
                target.set_torch_state(parameter, ours, state)
                continue
            held = target.state[parameter]
            for name, value in state.items():
                if isinstance(held.get(name), Tensor):
                    held[name].copy_(value)
                elif isinstance(value, Tensor):  # before the first step of the target
                    held[name] = value.float().clone() if _is_single(value) else value.clone()
                else:
                    held[name] = value


_COUNTS = {"step", "mu_product", "eta", "mu"}
"""The names of numbers in the states of torch's optimizers, which captured steps have in float64."""


def _is_single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def _copied(value: Any, is_count: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.float64, copy=True) if is_count and value.is_floating_point() else value.clone()


def _plain_number(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain_number, value))
    return value.item() if isinstance(value, Tensor) else value


def _plain_adam(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group of ``ClippedAdam``, or one of ``DCTAdam`` for which that takes the same steps."""
    if group.get("subsample_aware") or any(hasattr(parameter, "_pyro_dct_dim") for parameter in group["params"]):
        raise CaptureError(
            "`compile` must be False with DCTAdam for parameters with a time dimension, or with subsample_aware=True: "
            "its steps then depend on attributes of the parameters. Use ClippedAdam, or leave `compile` out"
        )
    return {name: value for name, value in group.items() if name != "subsample_aware"}


def set_rates(optimizer: torch.optim.Optimizer, lr: float | None, momentum: float | None = None) -> None:
    """Set the learning rate, and the momentum or the first of the betas, of all parameters; ``None`` changes nothing.

    >>> optimizer = torch.optim.Adam([torch.ones(2)])
    >>> set_rates(optimizer, 0.1, 0.8)
    >>> optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]
    (0.1, (0.8, 0.999))
    """
    for group in optimizer.param_groups:
        settings: dict[str, Any] = {} if lr is None else {"lr": lr}
        if momentum is not None:
            settings |= {"betas": (momentum, *group["betas"][1:])} if "betas" in group else {"momentum": momentum}
        set_group(group, settings)


def set_group(group: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Set numbers of a group, in the tensors that a captured step reads, if it has some for them."""
    for name, value in settings.items():
        before = group.get(name)
        if name == "momentum" and isinstance(before, Tensor) and value <= 0:  # torch leaves out operations at 0
            raise CaptureError(f"`compile` must be False where a schedule sets the momentum to 0, got {value}")
        if isinstance(value, tuple) and before is not None:
            group[name] = tuple(map(_filled, before, value))
        else:
            group[name] = _filled(before, value)


def _filled(before: Any, value: float) -> Any:
    """Return a number, in the tensor that is there, if it is one that a graph reads."""
    return before.fill_(value) if isinstance(before, Tensor) else value


def _argument_names(make: Callable[..., Any]) -> set[str]:
    try:
        return {*inspect.signature(make).parameters}
    except (TypeError, ValueError):  # some functions in C have no signature
        return set()


def _settings(group: dict[str, Any]) -> str:
    """List the settings of a group that have the same text in every process."""
    values = {name: group[name] for name in sorted(group.keys() - IMPLEMENTATION - {"params", "lr"})}
    return ", ".join(f"{name}={value}" for name, value in values.items() if _is_plain(value))


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str | None) or (isinstance(value, tuple) and all(map(_is_plain, value)))
