"""Pyro's ``SVI`` for training loops of the user: one optimizer for all parameters, and an optional captured step."""

import inspect
import warnings
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

from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import boolean, positive
from pyro_vae.compilation.adam import CapturableAdam
from pyro_vae.compilation.torch_private import TreeSpec, tree_flatten, tree_unflatten
from pyro_vae.training.compiled_step import CapturedStep
from pyro_vae.training.elbo_evaluator import ElboEvaluator
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
        optim: an optimizer of ``pyro.optim``, such as ``Adam({"lr": 1e-3})``.
        loss: any ELBO of ``pyro.infer`` or of :mod:`pyro_vae.objectives`.
        compile: whether to capture the step as a graph and replay it compiled, again for other shapes or arguments; the
            values of tensors may change. The optimizer must be one of ``torch.optim``.
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
        make_optimizer = partial(_make_optimizer, optim, compile)
        self._step = step_class(self._evaluator, make_optimizer=make_optimizer, clip_norm=clip_norm)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Torch's optimizer, which ``torch.optim.lr_scheduler`` can schedule; ``None`` before the first step."""
        return self._step.optimizer

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one gradient step and return the loss, as ``pyro.infer.SVI.step`` does."""
        leaves, form = tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = tuple(_PLACE if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        call = _CallContext(self._evaluator, form, others)
        before = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered NaN")  # from Pyro; our error names the step and the site
            finite, loss = self._step(call, *inputs, validate=is_validation_enabled()).tolist()
        if not finite and isinstance(self._step, CapturedStep):
            raise self._step.diagnose_nonfinite(call, [inputs], partial(torch.set_rng_state, before))
        return loss

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


def _make_optimizer(optim: PyroOptim, compile: bool, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Make torch's optimizer for Pyro's, with one group per parameter if the settings depend on the parameter."""
    constructor: Any = optim.pt_optim_constructor
    accepted = inspect.signature(constructor).parameters
    name_of = pyro.get_param_store().param_name
    settings: Any = optim.pt_optim_args
    groups = [{"params": [p], **settings(name_of(p))} for p in parameters] if callable(settings) else parameters
    common = {} if callable(settings) else dict(settings)
    if compile and constructor is torch.optim.Adam and settings.keys() <= {"lr", "betas", "eps"}:
        return CapturableAdam(groups, **common)
    if compile:
        common |= {name: value for name, value in {"foreach": True, "capturable": True}.items() if name in accepted}
    elif "fused" in accepted and all(parameter.is_floating_point() for parameter in parameters):
        common.setdefault("fused", True)
    optimizer = constructor(groups, **common)
    for group in optimizer.param_groups if compile else []:
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64, device=parameters[0].device)
    return optimizer
