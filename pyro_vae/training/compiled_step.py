"""The step of SVI captured as one graph, loss, gradients and update together, for each shape of its inputs."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae._utils.module_state import buffers_kept
from pyro_vae._utils.rng import preserve_rng_state
from pyro_vae._utils.traces import latent_sites, log_density, observed_sites
from pyro_vae.compilation.adam import CapturableAdam
from pyro_vae.compilation.graph import CaptureError, Forms, Graph, compiling, input_signature
from pyro_vae.training.step import BatchContext, Step, record

__all__ = ["CapturedStep"]

_CHECKED = 3  # replays from the first that are held against an eager run


_EVERY = 1000  # and then every so many


class CapturedStep(Step):
    """A :class:`pyro_vae.training.step.Step` whose first step is eager, and all others a graph's.

    A step whose loss or gradient is not finite changes nothing. Unless it is skipped by choice, nor do those after it:
    the state stays that of the last good step, and :meth:`diagnose_nonfinite` says what was wrong.

    Each graph is held against an eager run at its first replays, and every so often: sites, distributions, shapes and
    log-densities must be those that were captured.

    Args:
        compiles: whether the graph of inputs of these shapes is compiled, or replayed as it is.
        kwargs: as for the eager step.
    """

    def __init__(self, *args: Any, compiles: Callable[..., bool] = lambda *inputs: True, **kwargs: Any):
        super().__init__(*args, **{"make_optimizer": CapturableAdam} | kwargs)
        self.compiles = compiles
        self._graphs: dict[tuple[BatchContext, Forms], _Captured] = {}
        self._all_finite = torch.ones(())
        self._sync_metrics = True  # for parameters that the optimizer does not know

    def __call__(self, take: BatchContext, *inputs: Tensor, validate: bool = False) -> Tensor:
        """As of the eager step, but a step that is not finite does not raise: its first number is 0."""
        if self._sync_metrics and (self.optimizer is None or self.new_parameters()):
            return super().__call__(take, *inputs, validate=validate)
        self._sync_metrics = False
        self.set_schedules(self.count)
        self.count += 1
        key = take, input_signature(inputs)
        captured = self._graphs.get(key)
        if captured is None:
            captured = self._graphs[key] = _Captured(self, take, inputs)
        return captured(take, inputs)

    def diagnose_nonfinite(
        self, take: BatchContext, done: Sequence[Sequence[Tensor]], rewind: Callable[[], None]
    ) -> FloatingPointError:
        """Why the last of some steps was not finite: run eagerly, on the numbers that were drawn for it.

        Args:
            take: as for the steps.
            done: their inputs, of which the last was not finite.
            rewind: puts the random states back to what they were before the first of them.
        """
        rewind()
        self._all_finite.zero_()  # so that the graphs draw their numbers and change nothing
        self.set_schedules(self.count - 1)
        self.tensors.note()
        with pyro.validation_enabled(False), self.gradients_cleared():
            for inputs in done[:-1]:
                if captured := self._graphs.get((take, input_signature(inputs))):
                    captured.step(*inputs)
                else:  # a step that was run eagerly
                    with take(*inputs) as arguments:
                        self.backward(arguments, *inputs)
                    self.tensors.load_model_state()
        quiet = warnings.catch_warnings(action="ignore")
        with quiet, pyro.validation_enabled(False), self.gradients_cleared(), take(*done[-1]) as arguments:
            loss, _ = self.backward(arguments, *done[-1])
            if math.isfinite(loss) and self.norm_of_gradients().isfinite():
                why = "the loss or a gradient is not finite, as it is compiled; run eagerly, it is"
            else:
                why = self._what_is_not_finite(loss, tuple(done[-1]))
        self._all_finite.fill_(1.0)
        self.restore_previous()
        return FloatingPointError(f"step {self.count}: {why}")

    def norm_of_gradients(self) -> Tensor:
        """The norm of all gradients together, in what a compiler makes one loop of."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        squares = [gradient.square().sum() for gradient in gradients]
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())

    def update(self) -> None:
        """The optimizer's step, in the form that can be captured from the first on."""
        with compiling():
            super().update()

    def hold_on_device(self) -> None:
        """Keep what stops the graphs where the parameters are."""
        device = next((parameter.device for parameter in self.parameters.values()), None)
        self._all_finite = self._all_finite.to(device)

    def clear_parameter_cache(self) -> None:
        """Capture anew: some parameters have been frozen or thawed."""
        super().clear_parameter_cache()
        self._graphs.clear()
        self._sync_metrics = True

    def body(self, take: BatchContext, inputs: Sequence[Tensor]) -> Tensor:
        """What the graph is captured from."""
        with self.gradients_cleared(), take(*inputs) as arguments:
            loss, terms = self.backward(arguments, *inputs)
            norm = self.norm_of_gradients()
            self.clip(norm)
            self.update()
            return record(loss.isfinite() & norm.isfinite(), loss, terms)

    def guarded(self, take: BatchContext, inputs: Sequence[Tensor], written: Sequence[Tensor]) -> Tensor:
        """The same, leaving all that it writes as it was where the step is not finite."""
        before = [tensor.detach().clone() for tensor in written]
        row = self.body(take, inputs)
        with torch.no_grad():
            taken = row[0] > 0
            if not self.skips:
                taken = taken & (self._all_finite > 0)
                self._all_finite.copy_(taken)
            for tensor, old in zip(written, before, strict=True):
                tensor.copy_(torch.where(taken, tensor, old))
            return torch.cat([taken.to(row.dtype)[None], row[1:]])


class _Captured:
    """The graphs of inputs of one form: of the step, and of what it is checked by."""

    def __init__(self, step: CapturedStep, take: BatchContext, inputs: Sequence[Tensor]):
        self.owner = step
        self.calls = 0
        step.hold_on_device()
        if isinstance(step.optimizer, CapturableAdam):
            step.optimizer.part()
        found: list[_Sites] = []

        def densities(*inputs: Tensor) -> list[Tensor]:
            found.append(_Sites(step, take, inputs))
            return [found[-1].sums]

        self.densities = Graph(densities, inputs)
        self.sites = found[-1]
        written = Graph(lambda *inputs: [step.body(take, inputs)], inputs).written
        self.step = Graph(lambda *inputs: [step.guarded(take, inputs, written)], inputs)
        if step.compiles(*inputs):
            self.step.compile(inputs)

    def __call__(self, take: BatchContext, inputs: Sequence[Tensor]) -> Tensor:
        if self.calls < _CHECKED or self.calls % _EVERY == 0:
            self._check(take, inputs)
        self.calls += 1
        return self.step(*inputs)[0]

    def _check(self, take: BatchContext, inputs: Sequence[Tensor]) -> None:
        with buffers_kept():  # which the graph changes as well, once the run has told which they are
            with preserve_rng_state(), pyro.validation_enabled():
                sites = _Sites(self.owner, take, inputs)
            with preserve_rng_state():
                (sums,) = self.densities(*inputs)
        if sites.signature != self.sites.signature:
            for now, then in zip(sites.signature, self.sites.signature, strict=False):
                if now != then:
                    break
            raise CaptureError(f"compile: step {self.owner.count} runs {now}, where {then} was captured; {_REMEDY}")
        close = torch.isclose(sites.sums, sums, rtol=1e-3, atol=1e-3, equal_nan=True)
        if not close.all():
            name = sites.signature[int((~close).nonzero()[0])]
            raise CaptureError(
                f"compile: step {self.owner.count} has another log_prob of {name} than the captured operations give; "
                f"{_REMEDY}"
            )


_REMEDY = (
    "what is captured must run the same operations in every step, on numbers in tensors: a number that changes, such "
    "as a weight, is a 0-dim tensor that `schedules` fill. Or leave `compile` out"
)


class _Sites:
    """What an ELBO meets: the sites of guide and model, and their log-densities."""

    def __init__(self, step: Step, take: BatchContext, inputs: Sequence[Tensor]):
        with torch.no_grad(), take(*inputs) as arguments:
            step.run.loss(*arguments)
        self.signature: list[str] = []
        sums: list[Tensor] = []
        for model_trace, guide_trace in step.run.traces:
            for who, trace in (("guide", guide_trace), ("model", model_trace)):
                for name, site in (latent_sites(trace) | observed_sites(trace)).items():
                    density = log_density(site)
                    shape = tuple(site["fn"].batch_shape) + tuple(site["fn"].event_shape)
                    self.signature.append(f"site {name!r} of the {who}, a {_kind(site['fn'])} of shape {shape}")
                    sums.append(density.sum(dtype=torch.float64))
        self.sums = torch.stack(sums)


def _kind(distribution: Any) -> str:
    inside = getattr(distribution, "base_dist", None)
    return type(distribution).__name__ + (f"({_kind(inside)})" if inside is not None else "")
