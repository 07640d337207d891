"""One step of stochastic variational inference: as in ``pyro.infer.SVI``, with one optimizer for all parameters."""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_vae._utils.module_state import ModuleSnapshot, ModuleTensors
from pyro_vae._utils.param_store import Registered, check_parameters, module_registry, parameters_of
from pyro_vae._utils.rng import set_torch_random_states, torch_random_states
from pyro_vae._utils.traces import has_bad_rows
from pyro_vae._utils.validation import number
from pyro_vae.training.elbo_evaluator import ElboEvaluator
from pyro_vae.training.gradient_sum import GradientSum
from pyro_vae.training.optimizers import MakeOptimizer, set_rates
from pyro_vae.training.schedules import Schedule, TorchSchedule
from pyro_vae.training.shared_draws import SharedDraws

__all__ = ["BatchContext", "Step", "metrics_row"]

BatchContext = Callable[..., AbstractContextManager[tuple[Any, ...]]]
"""From the inputs of a step to a context that returns the arguments of model and guide."""


def metrics_row(finite: float | Tensor, loss: Any, terms: list[Tensor]) -> Tensor:
    """Join the results of a step in one tensor of float64, ``(2 + T,)`` for T terms."""
    device = next((value.device for value in (*terms, loss) if isinstance(value, Tensor)), None)
    first = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in (finite, loss)]
    return torch.stack(first + terms)


class Step:
    """One step of SVI on a batch: loss, gradients and update.

    Args:
        make_optimizer: from a list of parameters to their optimizer.
        lr: learning rate, or a schedule of it; the optimizer's own if left out.
        schedules: by 0-dim tensor, the schedule of its value.
        clip_norm: upper bound on the norm of all gradients together, to which they are scaled down.
        skips: whether a step whose loss or gradient is not finite is skipped; otherwise it raises.
        numbered: whether the first input of a step is the numbers of its rows, which errors then name.
        shared: what draws the latents that all ranks share, if there are several ranks.

    Attributes:
        gradient_sum: what makes gradients and metrics those of all ranks, if there are several.
    """

    def __init__(
        self,
        evaluator: ElboEvaluator,
        make_optimizer: MakeOptimizer,
        lr: float | Schedule | None = None,
        schedules: Mapping[Tensor, Schedule] | None = None,
        clip_norm: float | None = None,
        skips: bool = False,
        numbered: bool = False,
        shared: SharedDraws | None = None,
    ):
        self.evaluator, self.shared = evaluator, shared
        self.gradient_sum: GradientSum | None = None
        self.lr: Schedule | None = lr if callable(lr) or lr is None else lambda step: lr
        self.schedules = schedules or {}
        self.make_optimizer = make_optimizer
        self.clip_norm = math.inf if clip_norm is None else clip_norm
        self.skips = skips
        self.numbered = numbered
        self.optimizer: torch.optim.Optimizer | None = None
        self.parameters: dict[str, Tensor] = {}  # by name in Pyro's param store
        self.traced: Collection[str] = ()  # names of the parameters of the last run, but for those of `modules`
        self.names: list[str] = []  # of the terms of the ELBO, after the first step
        self.count = 0  # number of finished steps
        # Those that the optimizer has, if nothing else has changed them:
        self.rates: tuple[float, float | None] | None = None
        self.modules: Registered = {}
        self.snapshot: ModuleSnapshot | None = None  # of these modules and of the parameters, since they were found
        self.tensors = ModuleTensors(evaluator.model, evaluator.guide)  # of all modules that these and the ELBO run
        self._own_error: FloatingPointError | None = None  # of this rank, in the current step

    def __call__(self, batch_context: BatchContext, *inputs: Tensor, validate: bool = False) -> Tensor:
        """Update the parameters on one batch, whose inputs ``batch_context`` turns into arguments of model and guide.

        Return 1, or 0 if the step was skipped; the loss; the terms of :attr:`names`, in nats per datum; float64. Raise
        ``FloatingPointError`` if loss or gradient is not finite. Parameters and buffers are those of the step before.
        A rank without rows gives no inputs; where no rank has any, the step changes nothing.
        """
        self.refresh()
        self.tensors.note()
        self.set_schedules(self.count)
        self.count += 1
        validate = validate or self.count == 1  # some libraries turn validation off on import
        if self.shared is not None:
            self.shared.step = self.count
        context: Any = nullcontext(()) if self.has_no_rows(inputs) else batch_context(*inputs)
        with pyro.validation_enabled(validate), self.discard_gradients(), context as arguments:
            return self.take(partial(self._own, arguments, inputs), inputs)

    def has_no_rows(self, inputs: Sequence[Tensor]) -> bool:
        """Whether this rank has no row of the batch."""
        return self.gradient_sum is not None and not inputs

    def take(self, own: Callable[[], tuple[Any, list[Tensor]]], inputs: tuple[Tensor, ...]) -> Tensor:
        """Update the parameters; ``own`` computes the gradients of this rank and returns the loss and its terms."""
        try:
            loss, terms, norm = self._of_all_ranks(*own(), inputs)
            if not math.isfinite(loss) or not norm.isfinite():
                raise FloatingPointError(f"step {self.count}: {self._describe_nonfinite(loss, inputs)}")
        except FloatingPointError:
            self.restore_previous()
            if not self.skips:
                raise
            return metrics_row(0.0, math.nan, self._no_terms())
        if self.gradient_sum is not None and not self.gradient_sum.rows:
            self.count -= 1
            return metrics_row(0.0, math.nan, self._no_terms())
        self.clip(norm)
        self.update()
        return metrics_row(1.0, loss, terms)

    def _no_terms(self) -> list[Tensor]:
        return [torch.full((), math.nan, dtype=torch.float64, device="cpu")] * len(self.names)

    def _own(self, arguments: tuple[Any, ...], inputs: tuple[Tensor, ...]) -> tuple[Any, list[Tensor]]:
        """Compute the gradients of the rows of this rank; return the loss and its terms."""
        if self.gradient_sum is None:
            return self.backward(arguments, *inputs)
        if self.has_no_rows(inputs):
            return 0.0, []
        self.gradient_sum.begin(len(inputs[0]))
        try:
            return self.backward(arguments, *inputs)
        except FloatingPointError as error:  # of the user's code: the other ranks skip the step, too
            self._own_error = error
            return math.nan, self._no_terms()

    def _of_all_ranks(
        self, loss: Any, terms: list[Tensor], inputs: tuple[Tensor, ...]
    ) -> tuple[Any, list[Tensor], Tensor]:
        """Return loss, terms and norm of the gradients of all ranks, and set these, if they are finite."""
        if self.gradient_sum is None:
            return loss, terms, self.gradient_norm()
        own_loss, own_error, self._own_error = loss, self._own_error, None
        loss, terms, norm = self.gradient_sum(loss, terms)
        if math.isfinite(loss) and norm.isfinite():
            return loss, terms, norm
        cause = None if own_error is None else str(own_error)
        if inputs and cause is None and not (math.isfinite(own_loss) and self.gradient_norm().isfinite()):
            cause = self._describe_nonfinite(own_loss, inputs)
        causes = self.gradient_sum.ranks.gather("a step that is not finite", cause)
        rank, cause = next(
            ((rank, cause) for rank, cause in enumerate(causes) if cause is not None),
            (0, "the sum of the gradients over ranks is not finite"),
        )
        raise FloatingPointError(f"step {self.count}: rank {rank}: {cause}")

    def refresh(self) -> bool:
        """Find the parameters again if modules, their flags or the param store have changed; return whether so."""
        self.rates = None
        changed = self.snapshot is not None and self.snapshot.has_changed()
        if changed:
            self.clear_parameter_cache()
        return changed

    def finish(self) -> None:
        """Do what is due at the end of a training run."""

    def describe(self) -> str:
        """How the steps are computed."""
        return "eager"

    def set_schedules(self, step: int) -> None:
        """Set the learning rate and the values with a schedule to those of a step, counted from 0."""
        for value, schedule in self.schedules.items():
            value.fill_(number(schedule(step), f"schedules: at step {step}"))
        self._set_lr(step)

    def restore_previous(self) -> None:
        """Set buffers and scheduled values to those of the step before: the current one does not count."""
        self.tensors.load_model_state()
        if self.count > 1:
            self.set_schedules(self.count - 2)

    def _set_lr(self, step: int) -> None:
        if self.lr is None or self.optimizer is None:
            return
        momentum = self.lr.momentum if isinstance(self.lr, TorchSchedule) else None
        lr = number(self.lr(step), f"lr: at step {step}", least=0)
        rates = lr, None if momentum is None else momentum(step)
        if rates != self.rates:
            set_rates(self.optimizer, *rates)
            self.rates = rates

    def clear_parameter_cache(self) -> None:
        """Find the parameters again in the next run, after some were frozen, unfrozen, put in or replaced."""
        self.modules.clear()
        self.parameters.clear()
        self.snapshot = None

    def backward(self, arguments: tuple[Any, ...], *inputs: Tensor) -> tuple[Any, list[Tensor]]:
        """Compute the gradients of the parameters; return the loss and its terms.

        Where Pyro's validation raises because rows are not finite, return the loss that is not, as without validation:
        the answer must not depend on whether a step is validated.
        """
        before = torch_random_states() if is_validation_enabled() else None
        try:
            loss = self._loss_and_grads(arguments)
        except ValueError:
            if before is None:
                raise
            loss = self._run_unvalidated(arguments, before)
            finite = math.isfinite(loss) and self.gradient_norm().isfinite()
            if finite or (self.count == 1 and not has_bad_rows(site for _, _, site in self.evaluator.sites())):
                raise
        if not any(parameter.requires_grad for parameter in self.parameters.values()):
            parameters = [one for one in self.tensors.named().values() if isinstance(one, torch.nn.Parameter)]
            if frozen := sum(not parameter.requires_grad for parameter in [*parameters, *self.parameters.values()]):
                raise ValueError(
                    "`model` and `guide` must have a parameter that can be trained, got none: all are frozen "
                    f"({frozen} tensors). Unfreeze some, with `vae.requires_grad_(True)`"
                )
        terms = self.evaluator.terms(loss)
        self.names = list(terms)
        return loss, list(terms.values())

    def _run_unvalidated(self, arguments: tuple[Any, ...], random_states: dict[str, Tensor]) -> Any:
        """Compute the loss again, from the same random states and buffers."""
        set_torch_random_states(random_states)
        self.tensors.load_model_state()
        with pyro.validation_enabled(False), warnings.catch_warnings(action="ignore"):
            return self._loss_and_grads(arguments)

    def _loss_and_grads(self, arguments: tuple[Any, ...]) -> Any:
        """Compute the loss and its gradients, and find the parameters that the run registers."""
        known = bool(self.parameters)
        noticed = nullcontext() if known else self.tensors.noticed()
        shared = nullcontext() if self.shared is None else self.shared
        with shared, poutine.trace(param_only=True) as tracer, module_registry(self.modules, known), noticed:
            try:
                run = partial(self.evaluator.loss_and_grads, *arguments)
                return run() if known else check_parameters(run, partial(self.evaluator.loss, *arguments))
            finally:
                self._add(parameters_of(tracer.trace))

    def _add(self, found: dict[str, Tensor]) -> None:
        """Add each parameter once: a module may be registered under two names."""
        self.traced = found.keys()
        known = {id(parameter) for parameter in self.parameters.values()}
        for name, parameter in found.items():
            if self.parameters.get(name) is not parameter and (name in self.parameters or id(parameter) not in known):
                self.parameters[name] = parameter
                known.add(id(parameter))
                self.snapshot = None
        if self.snapshot is None:
            self.snapshot = ModuleSnapshot([module for module, *_ in self.modules.values()], list(self.parameters))

    def named_tensors(self) -> dict[str, Tensor]:
        """Parameters, frozen ones too, and buffers, by their paths in modules or by Pyro's names outside of them."""
        found = self.tensors.named()  # by path: Pyro's names of modules have numbers that differ between processes
        known = {id(tensor) for tensor in found.values()}
        for name, parameter in self.parameters.items():
            if id(parameter) not in known:
                found[name if name not in found else f"{name} of the param store"] = parameter
        return found

    def gradient_norm(self) -> Tensor:
        """Compute the norm of all gradients together."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device="cpu")

    def clip(self, norm: Tensor) -> None:
        """Scale the gradients, of this norm together, down to ``clip_norm``."""
        if self.clip_norm < math.inf:
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def update(self) -> None:
        """Update the parameters by their gradients."""
        if new := self.new_parameters():
            optimizer = self.make_optimizer(new)
            if self.optimizer is None:
                self.optimizer = optimizer
            else:
                self.optimizer.param_groups += optimizer.param_groups
                self.optimizer.state.update(optimizer.state)
            self.rates = None
            self._set_lr(self.count - 1)
        if self.optimizer is not None:
            self._zero_missing_gradients(self.optimizer)
            may_draw = not type(self.optimizer).__module__.startswith(("torch.", "pyro."))
            with self.shared.stream(2) if self.shared is not None and may_draw else nullcontext():
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _zero_missing_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Give zeros to parameters that this step has, but not its loss: as in Pyro, their momentum moves them on."""
        for name, parameter in self.parameters.items():
            traced = name in self.traced or name.partition("$$$")[0] in self.modules
            if traced and parameter.grad is None and parameter.requires_grad and parameter in optimizer.state:
                parameter.grad = torch.zeros_like(parameter)

    def new_parameters(self) -> list[Tensor]:
        """Return the parameters that the optimizer does not have yet."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        known = {parameter for group in groups for parameter in group["params"]}
        return [parameter for parameter in self.parameters.values() if parameter not in known]

    @contextmanager
    def discard_gradients(self) -> Iterator[None]:
        """Run a block and remove the gradients that it leaves, which the next step would add to its own."""
        try:
            yield
        finally:
            for parameter in self.parameters.values():
                parameter.grad = None

    def _rows(self, inputs: tuple[Tensor, ...]) -> Tensor | None:
        return inputs[0] if self.numbered else None

    def _describe_nonfinite(self, loss: float, inputs: tuple[Tensor, ...]) -> str:
        if not math.isfinite(loss):
            site = self.evaluator.first_nonfinite_site(self._rows(inputs))
            return f"the loss is {loss}; {site or 'log_prob of every site is finite'}"
        gradients = {name.replace("$$$", "."): parameter.grad for name, parameter in self.parameters.items()}
        bad = [name for name, grad in gradients.items() if grad is not None and not grad.isfinite().all()]
        return f"the gradient is not finite in {', '.join(bad) or 'its norm'}"
