"""Evaluate an ELBO, or a loss function, on a model and guide: its loss, its terms, and the first site not finite."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.ops.provenance import detach_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vae._utils.ambient import fresh_autocast
from pyro_vae._utils.rng import seeded, set_torch_random_states, torch_random_states
from pyro_vae._utils.traces import (
    latent_sites,
    log_density,
    observed_sites,
    plate_scale,
    set_plate_sizes,
)
from pyro_vae._utils.typing import Function
from pyro_vae.compilation.precision import bfloat16_products
from pyro_vae.objectives.elbo_terms import elbo_terms, weights_removed

__all__ = ["ElboEvaluator", "FunctionLoss", "rows_that_fit"]

_BUDGET = 2**24  # numbers in the largest tensor of an evaluation of some rows, of which there are several
_FEW_ROWS = (4, 8)  # on which it is found how the tensors grow with rows


class FunctionLoss:
    """A loss function of ``pyro.infer.SVI``, ``loss(model, guide, *args, **kwargs)``, with the methods of an ELBO.

    Args:
        loss: returns the loss, a tensor with one number or a Python number.
        loss_and_grads: adds the gradients to those of the parameters and returns the loss, or several in a tuple; by
            default, the loss is differentiated.
    """

    def __init__(self, loss: Function, loss_and_grads: Function | None = None):
        self._loss, self._loss_and_grads = loss, loss_and_grads

    def loss(self, model: Function, guide: Function, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss."""
        return _detached(self._loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Function, guide: Function, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss, and add its gradients to those of the parameters."""
        if self._loss_and_grads is not None:
            return _detached(self._loss_and_grads(model, guide, *args, **kwargs))
        loss = self._loss(model, guide, *args, **kwargs)
        if getattr(loss, "requires_grad", False):
            loss.backward(retain_graph=True)  # as in Pyro: a part of it may be used in the next step again
        return _detached(loss)


def _detached(loss: Any) -> Any:
    if isinstance(loss, tuple):
        return tuple(map(_detached, loss))
    return torch.as_tensor(loss).detach().reshape(())


class ElboEvaluator:
    """An ELBO, or a loss function, of a model and guide that keeps the traces of its last evaluation.

    ``bound`` is the name of its terms' sum: ``"elbo"``, or ``"surrogate"`` of a pair for which it is no bound, see
    :attr:`pyro_vae.model_guide.ModelGuide.bound`. ``precision`` is that of networks, see
    :mod:`pyro_vae.compilation.precision`.
    """

    def __init__(
        self,
        model: Function,
        guide: Function,
        elbo: ELBO | FunctionLoss,
        plate: str | None = None,
        precision: str | None = None,
    ):
        self.model, self.guide, self.plate = model, guide, plate
        self.precision = precision
        self.elbo: Any = elbo  # pyro.infer.ELBO declares neither loss nor loss_and_grads
        self.bound = "elbo"
        self.model_masks = False  # whether the masks of the model hold for the guide in the terms
        self.keywords: dict[str, Any] = {}  # of model and guide, besides the arguments of an evaluation
        self.traces: list[tuple[Trace, Trace]] = []  # (model, guide), a pair for each particle that is not in a plate
        self.losses: tuple[Any, ...] = ()  # all that the last evaluation returned, of which the first one is the loss
        self.read: list[Any] = [model, guide, elbo]  # what the code of a step can read
        self._recorder: _Recorder | None = _Recorder()  # of the sites, where the loss makes no traces

    def of(self, model: Function, guide: Function) -> "ElboEvaluator":
        """Return an evaluator of the same ELBO for the pair with other arguments."""
        other = copy(self)
        other.model, other.guide = model, guide
        return other

    def in_float32(self) -> "ElboEvaluator":
        """Return an evaluator of the same ELBO and pair without mixed precision, which has traces of its own."""
        other = copy(self)
        other.precision = None
        return other

    def loss(self, *args: Any) -> Any:
        """Compute the loss: a number, or a tensor during a capture."""
        return self._evaluate(self.elbo.loss, args)

    def validated_loss(self, *args: Any) -> Any:
        """Compute the loss with Pyro's validation; where it raises and the loss is not finite, without."""
        before = torch_random_states()
        try:
            with pyro.validation_enabled():
                return self.loss(*args)
        except ValueError:
            set_torch_random_states(before)
            with pyro.validation_enabled(False), warnings.catch_warnings(action="ignore"):
                loss = self.loss(*args)
            if math.isfinite(loss):
                raise
            return loss

    def loss_and_grads(self, *args: Any) -> Any:
        """Compute the loss and add its gradients to those of the parameters."""
        return self._evaluate(self.elbo.loss_and_grads, args)

    def _evaluate(self, compute: Function, args: tuple[Any, ...]) -> Any:
        self.traces = []
        products = nullcontext() if self.precision is None else bfloat16_products()
        with fresh_autocast(), products, self._capture_traces():
            loss = compute(self.model, self.guide, *args, **self.keywords)
        for traces in self.traces:
            set_plate_sizes(*traces)
        if self.traces:
            self._recorder = None
        elif self._recorder is not None:
            set_plate_sizes(*self._recorder.traces)
        losses = loss if isinstance(loss, tuple) else (loss,)
        self.losses = tuple(map(detach_provenance, losses))  # TraceGraph_ELBO wraps tensors
        return self.losses[0]

    @contextmanager
    def _capture_traces(self) -> Iterator[None]:
        """Keep the traces that the ELBO makes, which hold the log-densities that it computes."""
        recording = self._recorder or nullcontext()
        if isinstance(self.elbo, FunctionLoss):
            with recording:
                yield
            return
        make = self.elbo._get_trace

        def keep(*args: Any) -> tuple[Trace, Trace]:
            self.traces.append(make(*args))
            return self.traces[-1]

        self.elbo._get_trace = keep
        try:
            with recording:
                yield
        finally:
            del self.elbo._get_trace

    def terms(self, loss: Any) -> dict[str, Tensor]:
        """Return ELBO, distortion and rate of the last evaluation, in nats per datum.

        Where the ELBO does not split into distortion and rate, return the bound alone. Where no observed site is in the
        plate, they are nats of all data. Without a plate, return the further losses of the evaluation, such as that of
        the guide in ``ReweightedWakeSleep``.
        """
        if self.plate is None:
            further = {f"loss {number}": loss for number, loss in enumerate(self.losses[1:], 2)}
            return {name: torch.as_tensor(loss, dtype=torch.float64) for name, loss in further.items()}
        traces = [self.traces[0][0]] if self.traces else self._recorder.traces if self._recorder is not None else []
        frames = [
            frame
            for trace in traces
            for site in observed_sites(trace).values()
            for frame in site["cond_indep_stack"]
            if frame.name == self.plate
        ]
        size = frames[0].full_size or frames[0].size if frames else 1
        closed_form = isinstance(self.elbo, TraceMeanField_ELBO)
        options = {"closed_form": closed_form, "model_masks": self.model_masks}
        terms = elbo_terms(self.traces, size, self.bound, **options) if self.traces else None
        return {self.bound: -self._unweighted(loss) / size} if terms is None else terms

    @torch.no_grad()
    def _unweighted(self, loss: Any) -> Tensor:
        """Compute the loss of the last evaluation with every site at weight 1, from its traces."""
        weights = [site["scale"] / plate_scale(site) for _, _, site in self.sites()]
        common = not any(isinstance(weight, Tensor) for weight in weights) and math.isclose(min(weights), max(weights))
        if common or not isinstance(self.elbo, TraceEnum_ELBO):  # N / B of slices, or a scale of the whole model
            return torch.as_tensor(loss, dtype=torch.float64) / torch.as_tensor(weights[-1]).double().mean()
        elbo: Any = copy(self.elbo)
        elbo._get_traces = lambda *args: weights_removed(self.traces)
        return torch.as_tensor(elbo.loss(self.model, self.guide), dtype=torch.float64)

    def sites(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield owner, name and site of all latent and observed sites of the last evaluation, the guide's first."""
        for model_trace, guide_trace in self.traces:
            for owner, trace in (("guide", guide_trace), ("model", model_trace)):
                for name, site in (latent_sites(trace) | observed_sites(trace)).items():
                    yield owner, name, site
        for trace in [] if self._recorder is None else self._recorder.traces:
            for name, site in (latent_sites(trace) | observed_sites(trace)).items():
                try:
                    with torch.no_grad():
                        site["unscaled_log_prob"] = log_density({**site, "mask": None})
                except NotImplementedError:  # a loss may do without the density
                    continue
                yield "model or guide", name, site

    @torch.no_grad()
    def first_nonfinite_site(self, rows: Tensor | None = None) -> str | None:
        """Describe the first site of the last evaluation, of these rows, that is not finite, or return ``None``."""
        for owner, name, site in self.sites():
            bad = ~log_density(site).isfinite()
            if bad.any():
                where = f"at {bad.sum()} of {bad.numel()}{self._rows(bad, site, rows)}"
                return f"log_prob of site {name!r} in the {owner} is not finite {where}"
        return None

    def _rows(self, bad: Tensor, site: dict[str, Any], rows: Tensor | None) -> str:
        """Name the rows of the data with a bad log-density."""
        dims = [frame.dim for frame in site["cond_indep_stack"] if frame.name == self.plate]
        if not dims or bad.dim() < -dims[0]:
            return ""
        found = bad.movedim(dims[0], 0).reshape(bad.shape[dims[0]], -1).any(1).nonzero().flatten()
        if rows is not None and len(rows) == bad.shape[dims[0]]:
            found = rows.to(found.device)[found]
        shown = ", ".join(map(str, found[:5].tolist()))
        return f", in rows {shown}{', ...' if len(found) > 5 else ''} of the data"


@torch.no_grad()
def rows_that_fit(evaluator: ElboEvaluator, take: Function, device: torch.device, most: int) -> int:
    """Return how many rows are evaluated together, at most so many: their particles and states fit a budget.

    ``take`` is :attr:`pyro_vae.model_guide.ModelGuide.take`. What a row needs is found on a few rows.
    """
    if most <= _FEW_ROWS[1]:
        return most
    sizes = []
    for count in _FEW_ROWS:
        with seeded(0), take(torch.arange(count, device=device)) as arguments, _LargestTensor() as found:
            evaluator.loss(*arguments)
        sizes.append(found.numbers)
    of_row = (sizes[1] - sizes[0]) / (_FEW_ROWS[1] - _FEW_ROWS[0])
    return min(most, max(1, int(_BUDGET / max(1.0, of_row))))


class _LargestTensor(TorchFunctionMode):
    """Record how many numbers the largest tensor has that the operations inside return."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


class _Recorder(Messenger):
    """Keep the sites that run inside, in one trace for each run of a program: a name that comes again starts one."""

    def __init__(self) -> None:
        super().__init__()
        self.traces: list[Trace] = []

    def __enter__(self) -> Any:
        self.traces = [Trace()]
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.traces[-1]:
            self.traces.append(Trace())
        self.traces[-1].add_node(msg["name"], **msg.copy())
