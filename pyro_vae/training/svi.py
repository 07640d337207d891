"""Pyro's ``SVI`` for training loops of the user: one optimizer for all parameters, and an optional captured step."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_vae._utils.ambient import check_gradients_enabled, one_thread
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import boolean, positive
from pyro_vae.compilation.adam import CapturableAdam
from pyro_vae.compilation.torch_private import TreeSpec, tree_flatten, tree_unflatten
from pyro_vae.training.compiled_step import CapturedStep
from pyro_vae.training.elbo_evaluator import ElboEvaluator
from pyro_vae.training.optimizers import IMPLEMENTATION, capturable
from pyro_vae.training.preflight import check_has_loss
from pyro_vae.training.step import Step

__all__ = ["SVI"]

_PLACE = "<tensor>"


class SVI:
    """Stochastic variational inference, with the interface of ``pyro.infer.SVI``.

    A step runs the same estimator on the same random numbers. One optimizer updates all parameters, where Pyro has one
    for each. A step whose loss or gradient is not finite raises an error and changes nothing.

    Args:
        model, guide: a Pyro model and its guide.
        optim: an optimizer of ``pyro.optim``, such as ``Adam({"lr": 1e-3})``. Its state is used, and its ``get_state``
            returns that of these steps, for any other SVI.
        loss: any ELBO of ``pyro.infer`` or of :mod:`pyro_vae.objectives`.
        compile: whether to capture the step as a graph and replay it compiled, again for other shapes or arguments, and
            after a change of modules, flags, Python numbers, ``param_groups`` or the param store; the values of tensors
            may change. The optimizer must be one of ``torch.optim``.
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
        loss: ELBO,
        compile: bool = False,
        clip_norm: float | None = None,
    ):
        if not isinstance(loss, ELBO):
            raise TypeError(
                f"`loss` must be an ELBO of pyro.infer or pyro_vae.objectives, such as Trace_ELBO(), got {loss!r}"
            )
        check_has_loss(loss, "loss")
        boolean(compile, "compile")
        if clip_norm is not None:
            positive(clip_norm, "clip_norm")
        _check_optim(optim, compile)
        self._evaluator = ElboEvaluator(model, guide, loss)
        step_class = CapturedStep if compile else Step
        self._step = step_class(self._evaluator, make_optimizer=self._make_optimizer, clip_norm=clip_norm)
        self._optim, self._compile = optim, compile
        self._calls: dict[tuple[object, ...], _CallContext] = {}  # of tensors alone, by their number and names

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Torch's optimizer, which ``torch.optim.lr_scheduler`` can schedule; ``None`` before the first step."""
        return self._step.optimizer

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one gradient step and return the loss, as ``pyro.infer.SVI.step`` does."""
        check_gradients_enabled("SVI.step")
        call, inputs = self._split(args, kwargs)
        before = torch.get_rng_state()
        with one_thread("SVI.step"):
            finite, loss = self._step(call, *inputs, validate=is_validation_enabled()).tolist()
            if not finite and isinstance(self._step, CapturedStep):
                raise self._step.diagnose_nonfinite(call, [inputs], partial(torch.set_rng_state, before))
        return loss

    def _split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "tuple[_CallContext, list[Tensor]]":
        """Separate the tensors of a call from the rest; a call of tensors alone is one seen before, which is faster."""
        values, key = [*args, *kwargs.values()], (len(args), *kwargs)
        only_tensors = {Tensor}.issuperset(map(type, values))
        if only_tensors and key in self._calls:
            return self._calls[key], values
        leaves, form = tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = tuple(_PLACE if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        call = _CallContext(self._evaluator, form, others)
        if only_tensors:
            self._calls[key] = call
        return call, inputs

    def _make_optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Make torch's optimizer for Pyro's, with its state, and a group for the parameters of the same settings."""
        optim = self._optim
        constructor: Any = optim.pt_optim_constructor
        accepted = inspect.signature(constructor).parameters
        groups: dict[str, dict[str, Any]] = {}
        states = {parameter: _take_state(optim, parameter) for parameter in parameters}
        for parameter, (state, _) in states.items():
            (saved,) = state.get("param_groups", [{}])
            settings = _settings(optim, parameter)
            settings |= {name: saved[name] for name in (saved.keys() & accepted.keys()) - IMPLEMENTATION - {"params"}}
            groups.setdefault(repr(sorted(settings.items())), {"params": [], **settings})["params"].append(parameter)
        fused = "fused" in accepted and all(parameter.is_floating_point() for parameter in parameters)
        implementation: dict[str, Any] = {"fused": True} if fused and not self._compile else {}
        optimizer: Any = constructor([{**implementation, **group} for group in groups.values()])
        if self._compile:
            optimizer = capturable(optimizer)
        _load_states(optimizer, states)
        optim.optim_objs.update({parameter: ParameterOptimizer(self, parameter) for parameter in parameters})
        optim.grad_clip.update(dict.fromkeys(parameters))
        return optimizer

    @torch.no_grad()
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Compute the loss without updating parameters."""
        self._evaluator.keywords = kwargs
        return float(self._evaluator.loss(*args))


@dataclass(frozen=True)
class _CallContext:
    """The arguments of a step without its tensors, which are the inputs that it turns into the arguments."""

    evaluator: ElboEvaluator
    form: TreeSpec
    others: tuple[Any, ...]

    def __call__(self, *inputs: Tensor) -> AbstractContextManager[tuple[Any, ...]]:
        tensors = iter(inputs)
        leaves = [next(tensors) if other is _PLACE else other for other in self.others]
        args, self.evaluator.keywords = tree_unflatten(leaves, self.form)
        return nullcontext(args)

    def __hash__(self) -> int:
        return hash((self.form.num_leaves, repr(self.others)))


def _check_optim(optim: Any, compile: bool) -> None:
    if not isinstance(optim, PyroOptim):
        raise TypeError(f'`optim` must be an optimizer of pyro.optim, such as `Adam({{"lr": 1e-3}})`, got {optim!r}')
    if optim.pt_clip_args:
        raise ValueError(
            "`optim` must have no clip_args, which clip each tensor by itself, got some; use `SVI(..., clip_norm=)`"
        )
    if hasattr(optim, "pt_scheduler_constructor"):
        raise ValueError(
            f"`optim` must be an optimizer, got {type(optim).__name__}, a scheduler. Use a scheduler of "
            "torch.optim.lr_scheduler on `svi.optimizer` after the first step"
        )
    constructor: Any = optim.pt_optim_constructor
    if compile and not getattr(constructor, "__module__", "").startswith("torch.optim"):
        raise ValueError(
            "`optim` must be an optimizer of torch.optim with compile=True, such as Adam, AdamW, RMSprop or SGD, got "
            f"{getattr(constructor, '__name__', constructor)}, which counts its steps outside of tensors"
        )


class ParameterOptimizer:
    """What ``pyro.optim`` keeps for one parameter: its part of the optimizer of a :class:`SVI`.

    ``get_state`` and ``save`` of the ``pyro.optim`` object read it, and changes of its ``param_groups`` are those of
    the whole group. The state has the form of torch's optimizer of one parameter, which any other SVI can load.
    """

    def __init__(self, svi: SVI, parameter: Tensor):
        self._svi, self._parameter = svi, parameter

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        assert self._svi.optimizer is not None
        return self._svi.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The group of the parameter."""
        groups = self._optimizer.param_groups
        return [group for group in groups if any(one is self._parameter for one in group["params"])]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """The optimizer's tensors of the parameter."""
        return {self._parameter: self._optimizer.state[self._parameter]}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizer of this parameter alone would."""
        (group,), state = self.param_groups, self.state[self._parameter]
        if isinstance(self._optimizer, CapturableAdam):
            state = self._optimizer.torch_state(self._parameter, group)
        optim = self._svi._optim
        constructor: Any = optim.pt_optim_constructor
        (settings,) = constructor([self._parameter], **_settings(optim, self._parameter)).state_dict()["param_groups"]
        settings |= {name: group[name] for name in (settings.keys() & group.keys()) - IMPLEMENTATION - {"params"}}
        settings["lr"] = float(settings["lr"])
        copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
        return {"state": {0: copies} if copies else {}, "param_groups": [settings]}

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Raise: the whole optimizer takes the step."""
        raise RuntimeError(
            "`optim` must be an optimizer of its own for each SVI of pyro.infer, got one whose parameters a "
            "pyro_vae.SVI trains. Make a new one, and give it the state: `new.set_state(optim.get_state())`"
        )


def _settings(optim: PyroOptim, parameter: Tensor) -> dict[str, Any]:
    return dict(optim._get_optim_args(parameter))


def _take_state(optim: PyroOptim, parameter: Tensor) -> tuple[dict[str, Any], Any]:
    """The state that ``optim`` has for a parameter, as a state dict, and its optimizer, if it took steps here."""
    name = pyro.get_param_store().param_name(parameter)
    if (known := optim.optim_objs.get(parameter)) is not None:
        return known.state_dict(), known
    return optim._state_waiting_to_be_consumed.pop(name, None) or {}, None


def _load_states(optimizer: torch.optim.Optimizer, states: dict[Tensor, tuple[dict[str, Any], Any]]) -> None:
    """Give an optimizer the states of parameters; what two eager optimizers have of one parameter, they share."""
    tensors = {parameter: state.get("state", {}).get(0, {}) for parameter, (state, _) in states.items()}
    if isinstance(optimizer, CapturableAdam):
        optimizer.load_torch_states(tensors)
        return
    for parameter, (_, known) in states.items():
        if known is not None and not isinstance(getattr(known, "_optimizer", None), CapturableAdam):
            optimizer.state[parameter] = known.state[parameter]
        elif tensors[parameter]:
            optimizer.state[parameter] = {
                name: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                for name, value in tensors[parameter].items()
            }
