"""One step of stochastic variational inference: that of ``pyro.infer.SVI``, with one optimizer for all parameters."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.decomposition import bound_name, elbo_terms, log_density
from pyro_vae.handlers import latent_sites, observed_sites, parameters_of, recorded
from pyro_vae.minibatches import Batcher
from pyro_vae.schedules import Schedule

__all__ = ["Step"]

Function = Callable[..., Any]


class Step:
    """One step of SVI on some rows, and its terms in nats per datum."""

    def __init__(
        self,
        model: Function,
        guide: Function,
        elbo: ELBO,
        plate: str,
        lr: float | Schedule = 0.0,
        schedules: Mapping[Tensor, Schedule] | None = None,
    ):
        self.elbo: Any = elbo  # pyro.infer.ELBO declares neither loss nor loss_and_grads
        self.plate = plate
        self.lr: Schedule = lr if callable(lr) else lambda step: lr
        self.schedules = schedules or {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.known: set[Tensor] = set()
        self.count = 0
        self._model_traces: list[Trace] = []
        self._guide_traces: list[Trace] = []
        self._model = recorded(model, self._model_traces)
        self._guide = recorded(guide, self._guide_traces)

    def __call__(self, take: Batcher, rows: Tensor) -> dict[str, Tensor]:
        """Loss, gradients and update on these rows; the terms, in nats per datum."""
        for value, schedule in self.schedules.items():
            value.fill_(schedule(self.count))
        self.count += 1
        # The first step is validated even where validation is off: some libraries turn it off on import.
        validation = pyro.validation_enabled() if self.count == 1 else nullcontext()
        with poutine.trace(param_only=True) as tracer:
            try:
                with validation, take(rows) as arguments:
                    terms = self._run(self.elbo.loss_and_grads, arguments)
                self._check_gradients(parameters_of(tracer.trace))
            except BaseException:  # Ctrl-C too: half a gradient would be added to the next run's first
                for parameter in parameters_of(tracer.trace).values():
                    parameter.grad = None
                raise
        self._update(list(parameters_of(tracer.trace).values()))
        return terms

    @torch.no_grad()
    def loss(self, arguments: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The terms alone."""
        return self._run(self.elbo.loss, arguments)

    def _run(self, compute: Function, arguments: tuple[Tensor, ...]) -> dict[str, Tensor]:
        self._model_traces.clear()
        self._guide_traces.clear()
        try:
            loss = compute(self._model, self._guide, *arguments)
        except ValueError as error:
            if self.count > 1 and (blamed := self._blamed_without_validation(arguments)):
                raise FloatingPointError(f"step {self.count}: the loss is not finite; {blamed}") from error
            raise
        loss = torch.as_tensor(loss[0] if isinstance(loss, tuple) else loss, dtype=torch.float64)
        traces = self._traces()
        if not loss.isfinite():
            where = f"step {self.count}" if self.count else "data"
            raise FloatingPointError(
                f"{where}: the loss is {loss.item()}; {_blame(traces) or 'no one site is to blame'}"
            )
        model_trace, guide_trace = traces[0]
        site, frame = _data_site(model_trace, self.plate)
        terms = elbo_terms(traces, frame.full_size or frame.size)
        # What the loss weighs the data by: all of them under subsampling, and any scale that the model was given.
        return terms or {bound_name(model_trace, guide_trace): -loss / (site["scale"] * frame.size)}

    def _traces(self) -> list[tuple[Trace, Trace]]:
        """An ELBO may first run the pair once more, to learn its plates: its particles are the last runs."""
        used = 1 if self.elbo.vectorize_particles else self.elbo.num_particles
        return list(zip(self._model_traces[-used:], self._guide_traces[-used:], strict=True))

    @torch.no_grad()
    def _blamed_without_validation(self, arguments: tuple[Tensor, ...]) -> str | None:
        """Validation stops at a distribution whose parameters are NaN, before it has a site: run on, to name that."""
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.elbo.loss(self._model, self._guide, *arguments)
        return _blame(self._traces())

    def _check_gradients(self, parameters: dict[str, Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
        if gradients and not torch.nn.utils.get_total_norm(gradients).isfinite():
            bad = [
                name.replace("$$$", ".")
                for name, parameter in parameters.items()
                if parameter.grad is not None and not parameter.grad.isfinite().all()
            ]
            raise FloatingPointError(f"step {self.count}: the gradient is not finite in {', '.join(bad) or 'its norm'}")

    def _update(self, parameters: list[Tensor]) -> None:
        new = [parameter for parameter in parameters if parameter not in self.known]
        if new and self.optimizer is None:
            self.optimizer = torch.optim.Adam(new, fused=True)
        elif new and self.optimizer is not None:
            self.optimizer.add_param_group({"params": new})
        self.known.update(new)
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr(self.count - 1)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def _data_site(model_trace: Trace, plate: str) -> tuple[dict[str, Any], Any]:
    """An observed site in the data plate, and its frame there."""
    for site in observed_sites(model_trace).values():
        for frame in site["cond_indep_stack"]:
            if frame.name == plate:
                return site, frame
    raise ValueError(f"plate: no observed site of the model is in a plate {plate!r}; name the model's data plate")


def _blame(traces: list[tuple[Trace, Trace]]) -> str | None:
    """The first site whose log-density is not finite, in the order in which the guide and the model ran."""
    for model_trace, guide_trace in traces:
        for who, trace in (("guide", guide_trace), ("model", model_trace)):
            for name, site in (latent_sites(trace) | observed_sites(trace)).items():
                bad = ~log_density(site).isfinite()
                if bad.any():
                    return f"log_prob of site {name!r} in the {who} is not finite at {bad.sum()} of {bad.numel()}"
    return None
