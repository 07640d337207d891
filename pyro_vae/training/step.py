"""One step of stochastic variational inference: that of ``pyro.infer.SVI``, with one optimizer for all parameters."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae._utils.module_state import ModuleTensors
from pyro_vae._utils.param_store import Registered, module_registry, parameters_of
from pyro_vae._utils.validation import number
from pyro_vae.training.elbo_evaluator import ElboEvaluator
from pyro_vae.training.schedules import Schedule

__all__ = ["BatchContext", "MakeOptimizer", "Step", "adam", "record"]

BatchContext = Callable[..., AbstractContextManager[tuple[Any, ...]]]
"""From the inputs of a step to the arguments to call model and guide with, within a context."""


MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
"""From parameters to their optimizer."""


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Adam, in one kernel for all parameters."""
    return torch.optim.Adam(parameters, fused=True)


def record(taken: float | Tensor, loss: Any, terms: list[Tensor]) -> Tensor:
    """What a step returns, in one tensor."""
    device = next((value.device for value in (*terms, loss) if isinstance(value, Tensor)), None)
    first = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in (taken, loss)]
    return torch.stack(first + terms)


class Step:
    """One step of SVI on some rows, and its terms in nats per datum.

    Args:
        run: the ELBO of a model and guide.
        lr: learning rate, or a schedule of it; that of the optimizer if left out.
        schedules: of 0-dim tensors.
        make_optimizer: called at the first step.
        clip_norm: to which the norm of all gradients together is scaled down.
        skips: whether a step whose loss or gradient is not finite is left out; otherwise it raises.
        numbered: whether its input is the numbers of the rows, which an error names.

    Attributes:
        names: of the terms, once a step has been done.
        count: of the steps that are done.
        parameters: by name in Pyro's param store.
        modules: that have been registered.
        tensors: of the modules that model, guide and ELBO run.
    """

    def __init__(
        self,
        run: ElboEvaluator,
        lr: float | Schedule | None = None,
        schedules: Mapping[Tensor, Schedule] | None = None,
        make_optimizer: MakeOptimizer = adam,
        clip_norm: float | None = None,
        skips: bool = False,
        numbered: bool = False,
    ):
        self.run = run
        self.lr: Schedule | None = lr if callable(lr) or lr is None else lambda step: lr
        self.schedules = schedules or {}
        self.make_optimizer = make_optimizer
        self.clip_norm = math.inf if clip_norm is None else clip_norm
        self.skips = skips
        self.numbered = numbered
        self.optimizer: torch.optim.Optimizer | None = None
        self.parameters: dict[str, Tensor] = {}
        self.names: list[str] = []
        self.count = 0
        self.modules: Registered = {}
        self.tensors = ModuleTensors(run.model, run.guide)

    def __call__(self, take: BatchContext, *inputs: Tensor, validate: bool = False) -> Tensor:
        """Loss, gradients and update on what ``take`` makes of the inputs.

        Returns:
            1, or 0 if the step was skipped; the loss; the terms that :attr:`names` names, ``(2 + T,)`` in float64.

        Raises:
            FloatingPointError: if loss or gradient is not finite. Parameters and buffers are those of the step before.
        """
        self.tensors.note()
        self.set_schedules(self.count)
        self.count += 1
        # The first step is validated even where validation is off: some libraries turn it off on import.
        with pyro.validation_enabled(validate or self.count == 1), self.gradients_cleared(), take(*inputs) as arguments:
            try:
                loss, terms = self.backward(arguments, *inputs)
                norm = self.norm_of_gradients()
                if not math.isfinite(loss) or not norm.isfinite():
                    raise FloatingPointError(f"step {self.count}: {self._what_is_not_finite(loss, inputs)}")
            except FloatingPointError:
                self.restore_previous()
                if not self.skips:
                    raise
                return torch.tensor([0.0] + [math.nan] * (1 + len(self.names)), dtype=torch.float64)
            self.clip(norm)
            self.update()
        return record(1.0, loss, terms)

    def set_schedules(self, step: int) -> None:
        """Give the values that have a schedule that of a step, counted from 0."""
        for value, schedule in self.schedules.items():
            value.fill_(number(schedule(step), f"schedules: at step {step}"))
        self._set_lr(step)

    def restore_previous(self) -> None:
        """Give buffers and scheduled values those of the step before, where this one must not count."""
        self.tensors.load_model_state()
        if self.count > 1:
            self.set_schedules(self.count - 2)

    def _set_lr(self, step: int) -> None:
        if self.lr is None or self.optimizer is None:
            return
        lr = number(self.lr(step), f"lr: at step {step}", least=0)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def clear_parameter_cache(self) -> None:
        """Look for parameters anew in the next run: some have been frozen or thawed."""
        self.modules.clear()
        self.parameters.clear()

    def backward(self, arguments: tuple[Any, ...], *inputs: Tensor) -> tuple[Any, list[Tensor]]:
        """The loss and its terms; the gradients are left in the parameters."""
        known = bool(self.parameters)
        noticed = nullcontext() if known else self.tensors.noticed()
        with poutine.trace(param_only=True) as tracer, module_registry(self.modules, known), noticed:
            try:
                loss = self.run.loss_and_grads(*arguments)
            except ValueError as error:
                if self.count > 1 and (
                    blamed := self.run.first_nonfinite_site_unvalidated(arguments, self._rows(inputs))
                ):
                    raise FloatingPointError(f"step {self.count}: the loss is not finite; {blamed}") from error
                raise
            finally:
                self._add(parameters_of(tracer.trace))
        terms = self.run.terms(loss)
        self.names = list(terms)
        return loss, list(terms.values())

    def _add(self, found: dict[str, Tensor]) -> None:
        """Each once: a module may be registered under two names."""
        known = {id(parameter) for parameter in self.parameters.values()}
        for name, parameter in found.items():
            if name in self.parameters or id(parameter) not in known:
                self.parameters[name] = parameter
                known.add(id(parameter))

    def norm_of_gradients(self) -> Tensor:
        """The norm of all gradients together."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())

    def clip(self, norm: Tensor) -> None:
        """Scale the gradients down to the norm that is allowed."""
        if self.clip_norm < math.inf:
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def update(self) -> None:
        """The optimizer's step."""
        new = self.new_parameters()
        if new:
            if self.optimizer is None:
                self.optimizer = self.make_optimizer(new)
            else:
                self.optimizer.add_param_group({"params": new})
            self._set_lr(self.count - 1)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def new_parameters(self) -> list[Tensor]:
        """The parameters that no step has updated yet."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        known = {parameter for group in groups for parameter in group["params"]}
        return [parameter for parameter in self.parameters.values() if parameter not in known]

    @contextmanager
    def gradients_cleared(self) -> Iterator[None]:
        """Leave no gradient behind, if the block breaks off or leaves one: it would be added to the next."""
        try:
            yield
        finally:
            for parameter in self.parameters.values():
                parameter.grad = None

    def _rows(self, inputs: tuple[Tensor, ...]) -> Tensor | None:
        return inputs[0] if self.numbered else None

    def _what_is_not_finite(self, loss: float, inputs: tuple[Tensor, ...]) -> str:
        if not math.isfinite(loss):
            return (
                f"the loss is {loss}; {self.run.first_nonfinite_site(self._rows(inputs)) or 'no one site is to blame'}"
            )
        bad = [
            name.replace("$$$", ".")
            for name, parameter in self.parameters.items()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
        return f"the gradient is not finite in {', '.join(bad) or 'its norm'}"
