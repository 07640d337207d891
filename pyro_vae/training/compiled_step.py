"""The step of SVI captured as one graph, with loss, gradients and update, for each signature of its inputs."""

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae._utils.module_state import buffers_kept
from pyro_vae._utils.rng import preserve_rng_state
from pyro_vae._utils.traces import log_density
from pyro_vae.compilation.adam import CapturableAdam
from pyro_vae.compilation.graph import CaptureError, Graph, InputSignature, capturable_optimizers, input_signature
from pyro_vae.training.step import BatchContext, Step, metrics_row

__all__ = ["CapturedStep"]

_FIRST_CHECKS = 3  # replays that are compared with an eager run
_CHECK_EVERY = 1000  # replays between two later comparisons
_REMEDY = (
    "Keep a number that changes, such as a weight, in a 0-dim tensor that `schedules` fill, or leave `compile` out"
)


class CapturedStep(Step):
    """A :class:`pyro_vae.training.step.Step` that runs its first step eagerly, and replays graphs in all others.

    A step whose loss or gradient is not finite changes nothing. If ``skips`` is false, later steps change nothing
    either: the state stays that of the last good step, and :meth:`diagnose_nonfinite` finds the cause.

    The first replays of each graph, and every thousandth one, are compared with an eager run: sites, distributions,
    shapes and log-densities must be those of the capture. ``compiles`` returns whether the graph for some inputs is
    compiled, or replayed as it is; other arguments are those of the eager step.
    """

    def __init__(self, *args: Any, compiles: Callable[..., bool] = lambda *inputs: True, **kwargs: Any):
        super().__init__(*args, **{"make_optimizer": CapturableAdam} | kwargs)
        self.compiles = compiles
        self._graphs: dict[tuple[BatchContext, InputSignature], _StepGraphs] = {}
        self._all_finite = torch.ones((), device="cpu")  # read and written by the graphs
        self._may_have_new_parameters = True

    def __call__(self, batch_context: BatchContext, *inputs: Tensor, validate: bool = False) -> Tensor:
        """Update the parameters on one batch; return 0 first, and raise nothing, if a replayed step is not finite."""
        if self._may_have_new_parameters and (self.optimizer is None or self.new_parameters()):
            return super().__call__(batch_context, *inputs, validate=validate)
        self._may_have_new_parameters = False
        self.set_schedules(self.count)
        self.count += 1
        key = batch_context, input_signature(inputs)
        if key not in self._graphs:
            self._graphs[key] = _StepGraphs(self, batch_context, inputs)
        return self._graphs[key](batch_context, inputs)

    def diagnose_nonfinite(
        self, batch_context: BatchContext, done: Sequence[Sequence[Tensor]], rewind: Callable[[], None]
    ) -> FloatingPointError:
        """Find out, by an eager run, why the last of the steps with inputs ``done`` was not finite."""
        rewind()  # to the random states before the first of these steps
        self._all_finite.zero_()  # the graphs then draw their random numbers and change nothing
        self.set_schedules(self.count - 1)
        self.tensors.note()
        with pyro.validation_enabled(False), self.discard_gradients():
            for inputs in done[:-1]:
                if graphs := self._graphs.get((batch_context, input_signature(inputs))):
                    graphs.step(*inputs)
                else:  # an eager step
                    with batch_context(*inputs) as arguments:
                        self.backward(arguments, *inputs)
                    self.tensors.load_model_state()
        quiet = warnings.catch_warnings(action="ignore")
        with quiet, pyro.validation_enabled(False), self.discard_gradients(), batch_context(*done[-1]) as arguments:
            loss, _ = self.backward(arguments, *done[-1])
            if math.isfinite(loss) and self.gradient_norm().isfinite():
                cause = "the loss or a gradient is not finite in the compiled step, but it is in an eager one"
            else:
                cause = self._describe_nonfinite(loss, tuple(done[-1]))
        self._all_finite.fill_(1.0)
        self.restore_previous()
        return FloatingPointError(f"step {self.count}: {cause}")

    def gradient_norm(self) -> Tensor:
        """Compute the norm of all gradients together, by operations that a compiler joins in one loop."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        squares = [gradient.square().sum() for gradient in gradients]
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), device="cpu")

    def update(self) -> None:
        """Update the parameters, from the first step on by operations that can be captured."""
        with capturable_optimizers():
            super().update()

    def prepare_capture(self) -> None:
        """Move the flag that the graphs read to the device, and untie the optimizer's frozen parameters."""
        device = next((parameter.device for parameter in self.parameters.values()), None)
        self._all_finite = self._all_finite.to(device)
        if isinstance(self.optimizer, CapturableAdam):
            self.optimizer.untie_frozen()

    def clear_parameter_cache(self) -> None:
        """Find the parameters and capture the step again, after some were frozen or unfrozen."""
        super().clear_parameter_cache()
        self._graphs.clear()
        self._may_have_new_parameters = True

    def unguarded(self, batch_context: BatchContext, inputs: Sequence[Tensor]) -> Tensor:
        """Run the operations of the step, for a capture."""
        with self.discard_gradients(), batch_context(*inputs) as arguments:
            loss, terms = self.backward(arguments, *inputs)
            norm = self.gradient_norm()
            self.clip(norm)
            self.update()
            return metrics_row(loss.isfinite() & norm.isfinite(), loss, terms)

    def guarded(self, batch_context: BatchContext, inputs: Sequence[Tensor], written: Sequence[Tensor]) -> Tensor:
        """Run the operations of the step, then undo all that it has written if it is not finite, for a capture."""
        before = [tensor.detach().clone() for tensor in written]
        row = self.unguarded(batch_context, inputs)
        with torch.no_grad():
            taken = row[0] > 0
            if not self.skips:
                taken = taken & (self._all_finite > 0)
                self._all_finite.copy_(taken)
            for tensor, old in zip(written, before, strict=True):
                tensor.copy_(torch.where(taken, tensor, old))
            return torch.cat([taken.to(row.dtype)[None], row[1:]])


class _StepGraphs:
    """The graphs for inputs of one signature: of the step, and of the log-densities that it is checked by."""

    def __init__(self, step: CapturedStep, batch_context: BatchContext, inputs: Sequence[Tensor]):
        self.owner, self.calls = step, 0
        step.prepare_capture()
        found: list[_Sites] = []

        def log_probs(*inputs: Tensor) -> list[Tensor]:
            found.append(_Sites(step, batch_context, inputs))
            return [found[-1].log_probs]

        self.log_probs = Graph(log_probs, inputs)
        self.sites = found[-1]
        written = Graph(lambda *inputs: [step.unguarded(batch_context, inputs)], inputs).written
        self.step = Graph(lambda *inputs: [step.guarded(batch_context, inputs, written)], inputs)
        if step.compiles(*inputs):
            self.step.compile(inputs)

    def __call__(self, batch_context: BatchContext, inputs: Sequence[Tensor]) -> Tensor:
        if self.calls < _FIRST_CHECKS or self.calls % _CHECK_EVERY == 0:
            self._check(batch_context, inputs)
        self.calls += 1
        return self.step(*inputs)[0]

    def _check(self, batch_context: BatchContext, inputs: Sequence[Tensor]) -> None:
        with buffers_kept():  # the eager run finds the modules whose buffers the graph changes as well
            with preserve_rng_state(), pyro.validation_enabled():
                sites = _Sites(self.owner, batch_context, inputs)
            with preserve_rng_state():
                (log_probs,) = self.log_probs(*inputs)
        changed = f"`compile` must be False where steps run different operations: step {self.owner.count} "
        if sites.descriptions != self.sites.descriptions:
            pairs = zip_longest(sites.descriptions, self.sites.descriptions, fillvalue="no further site")
            now, captured = next(pair for pair in pairs if pair[0] != pair[1])
            raise CaptureError(f"{changed}runs {now}, but {captured} was captured. {_REMEDY}")
        close = torch.isclose(sites.log_probs, log_probs, rtol=1e-3, atol=1e-3, equal_nan=True)
        if not close.all():
            site = sites.descriptions[int((~close).nonzero()[0])]
            raise CaptureError(f"{changed}has another log_prob of {site} than its captured operations. {_REMEDY}")


class _Sites:
    """The sites of guide and model in an evaluation of the ELBO, and the sum of each one's log-densities."""

    def __init__(self, step: Step, batch_context: BatchContext, inputs: Sequence[Tensor]):
        with torch.no_grad(), batch_context(*inputs) as arguments:
            step.evaluator.loss(*arguments)
        sites = list(step.evaluator.sites())
        self.descriptions = [
            f"site {name!r} of the {owner}, a {_class_name(site['fn'])} of shape "
            f"{tuple(site['fn'].batch_shape + site['fn'].event_shape)}"
            for owner, name, site in sites
        ]
        self.log_probs = torch.stack([log_density(site).sum(dtype=torch.float64) for _, _, site in sites])


def _class_name(distribution: Any) -> str:
    base = getattr(distribution, "base_dist", None)
    return type(distribution).__name__ + (f"({_class_name(base)})" if base is not None else "")
