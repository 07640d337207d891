"""The training loop: stochastic variational inference with Pyro's ELBOs, any model and guide."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.decomposition import bound_name, elbo_terms, log_density
from pyro_vae.handlers import latent_sites, observed_sites, parameters_of, recorded
from pyro_vae.minibatches import Batcher, following_autoguide, plan
from pyro_vae.randomness import seeded

__all__ = ["Fitted", "evaluate", "fit"]

Function = Callable[..., Any]


@dataclass(frozen=True)
class Fitted:
    """What :func:`fit` returns. The trained parameters are in the networks, and in Pyro's param store.

    Attributes:
        model: the model, as given.
        guide: the guide, as given.
        history: per epoch, in nats per datum: ``elbo``, ``distortion`` and ``rate``, means over the epoch's steps; with
            validation data ``validation_elbo``, ``validation_distortion`` and ``validation_rate`` at its end.
        seed: the seed.
        steps: number of gradient steps.
        seconds: wall-clock time of the training.
    """

    model: Function = field(repr=False)
    guide: Function = field(repr=False)
    history: dict[str, list[float]] = field(repr=False)
    seed: int
    steps: int
    seconds: float


def fit(
    model: Function,
    guide: Function,
    data: Tensor | Sequence[Tensor],
    *,
    epochs: int,
    batch_size: int | None = None,
    lr: float = 1e-3,
    elbo: ELBO | None = None,
    validation: Tensor | Sequence[Tensor] | None = None,
    plate: str = "data",
    seed: int = 0,
    progress: bool | None = None,
) -> Fitted:
    r"""Maximise the ELBO of a Pyro model and guide with Adam.

    A step is that of ``pyro.infer.SVI``, with one fused optimizer instead of one per parameter. Parameters stay in
    the current param store, as ``SVI`` leaves them; random states, default dtype, threads and validation flag are
    afterwards as before.

    Histories hold the ELBO at β = 1, -distortion - rate. If a likelihood is not normalised (soft targets), nothing is
    bounded and the entry is called ``surrogate`` instead of ``elbo``.

    Args:
        model: a Pyro model with a data plate, called as ``model(data)``, or ``model(*data)`` for a sequence.
        guide: its guide, called with the same.
        data: tensor of N rows, or a sequence of tensors with N rows each.
        epochs: passes over the data.
        batch_size: rows per step, drawn anew each epoch; all N if left out. Mini-batches subsample the data plate, see
            :func:`pyro_vae.minibatches.plan`.
        lr: Adam's learning rate.
        elbo: any ELBO of ``pyro.infer``; ``Trace_ELBO()`` if left out. ``TraceEnum_ELBO`` needs
            ``config_enumerate(guide)``.
        validation: held-out data of the same form, evaluated at the end of each epoch.
        plate: name of the data plate.
        seed: of the random numbers of the run and the order of the data.
        progress: whether to show a progress bar; only on a terminal if left out.

    Raises:
        TypeError, ValueError: on unusable arguments, before any training.
        FloatingPointError: if the loss or a gradient is not finite, naming the step and the site or parameter. The
            parameters are then those of the last good step.

    Source: Kingma and Welling 2014; Hoffman et al. 2013, "Stochastic variational inference".

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> x = pv.datasets.two_gaussians(200, seed=0).x
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(1),
    ...     encoder=guides.DiagonalNormal(in_features=2, latent=1, network=networks.mlp([16])),
    ...     decoder=likelihoods.Normal(latent=1, out_features=2, network=networks.mlp([16])),
    ... )
    >>> fitted = pv.fit(vae.model, vae.guide, x, epochs=20, batch_size=50, lr=1e-2)
    >>> fitted.steps, sorted(fitted.history)
    (80, ['distortion', 'elbo', 'rate'])
    """
    tensors = _check_data(data, "data")
    held_out = None if validation is None else _check_like(_check_data(validation, "validation"), tensors)
    _check_positive_int(epochs, "epochs")
    if batch_size is not None:
        _check_positive_int(batch_size, "batch_size")
    if not (isinstance(lr, int | float) and 0 < lr < float("inf")):
        raise ValueError(f"lr: got {lr!r}; accepted is a positive, finite number")
    elbo = Trace_ELBO() if elbo is None else elbo
    num_data = len(tensors[0])
    batch_size = min(batch_size or num_data, num_data)
    history: dict[str, list[float]] = {}
    started = time.perf_counter()
    with seeded(seed), following_autoguide(guide):
        take = (
            plan(model, guide, tensors, batch_size, plate)
            if batch_size < num_data
            else lambda rows: nullcontext(tensors)
        )
        if isinstance(elbo, TraceEnum_ELBO):
            with take(torch.arange(batch_size, device=tensors[0].device)) as arguments:
                _check_enumeration(model, guide, arguments)
    with seeded(seed), following_autoguide(guide):
        step = _Step(model, guide, elbo, plate, lr)
        order = torch.Generator().manual_seed(seed)
        with tqdm(total=epochs, disable=None if progress is None else not progress, unit="epoch") as bar:
            for _ in range(epochs):
                terms = [step(take, rows) for rows in _batches(num_data, batch_size, order, tensors[0].device)]
                record = _mean(terms)
                if held_out is not None:
                    record |= {f"validation_{name}": value for name, value in _held_out(step, held_out, seed).items()}
                for name, value in record.items():
                    history.setdefault(name, []).append(value)
                bar.set_postfix({name: f"{value:.4g}" for name, value in record.items()}, refresh=False)
                bar.update()
    return Fitted(model, guide, history, seed, step.count, time.perf_counter() - started)


def evaluate(
    model: Function,
    guide: Function,
    data: Tensor | Sequence[Tensor],
    *,
    elbo: ELBO | None = None,
    num_samples: int = 1,
    plate: str = "data",
    seed: int = 0,
) -> dict[str, float]:
    """ELBO, distortion and rate of a pair on data, in nats per datum, without training.

    Args:
        model: a Pyro model.
        guide: its guide; must be amortized to take data that it was not trained on.
        data: as for :func:`fit`.
        elbo: as for :func:`fit`; enumerated latents are summed over exactly.
        num_samples: how many draws of the latents to average over.
        plate: name of the data plate.
        seed: of the draws.

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(1),
    ...     encoder=guides.DiagonalNormal(2, 1, networks.linear()),
    ...     decoder=likelihoods.Normal(1, 2, networks.linear()),
    ... )
    >>> sorted(pv.evaluate(vae.model, vae.guide, torch.randn(10, 2), num_samples=5))
    ['distortion', 'elbo', 'rate']
    """
    tensors = _check_data(data, "data")
    _check_positive_int(num_samples, "num_samples")
    step = _Step(model, guide, Trace_ELBO() if elbo is None else elbo, plate)
    with seeded(seed), pyro.validation_enabled():
        return _mean([step.loss(tensors) for _ in range(num_samples)])


class _Step:
    """One step of SVI on some rows, and its terms in nats per datum."""

    def __init__(self, model: Function, guide: Function, elbo: ELBO, plate: str, lr: float = 0.0):
        self.elbo: Any = elbo  # pyro.infer.ELBO declares neither loss nor loss_and_grads
        self.plate = plate
        self.lr = lr
        self.optimizer: torch.optim.Optimizer | None = None
        self.known: set[Tensor] = set()
        self.count = 0
        self._model_traces: list[Trace] = []
        self._guide_traces: list[Trace] = []
        self._model = recorded(model, self._model_traces)
        self._guide = recorded(guide, self._guide_traces)

    def __call__(self, take: Batcher, rows: Tensor) -> dict[str, Tensor]:
        self.count += 1
        # The first step is validated even where validation is off: some libraries turn it off on import.
        validation = pyro.validation_enabled() if self.count == 1 else nullcontext()
        with validation, poutine.trace(param_only=True) as tracer, take(rows) as arguments:
            terms = self._run(self.elbo.loss_and_grads, arguments)
        parameters = parameters_of(tracer.trace)
        self._check_gradients(parameters)
        self._update(list(parameters.values()))
        return terms

    @torch.no_grad()
    def loss(self, arguments: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return self._run(self.elbo.loss, arguments)

    def _run(self, compute: Function, arguments: tuple[Tensor, ...]) -> dict[str, Tensor]:
        self._model_traces.clear()
        self._guide_traces.clear()
        loss = compute(self._model, self._guide, *arguments)
        loss = torch.as_tensor(loss[0] if isinstance(loss, tuple) else loss, dtype=torch.float64)
        # An ELBO may first run the pair once more, to learn its plates: its particles are the last runs.
        used = 1 if self.elbo.vectorize_particles else self.elbo.num_particles
        traces = list(zip(self._model_traces[-used:], self._guide_traces[-used:], strict=True))
        if not loss.isfinite():
            raise FloatingPointError(f"step {self.count}: the loss is {loss.item()}; {_blame(traces)}")
        num_data = _num_data(traces[0][0], self.plate)
        return elbo_terms(traces, num_data) or {bound_name(traces[0][0]): -loss / num_data}

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
            self.optimizer = torch.optim.Adam(new, lr=self.lr, fused=True)
        elif new and self.optimizer is not None:
            self.optimizer.add_param_group({"params": new})
        self.known.update(new)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def _num_data(model_trace: Trace, plate: str) -> int:
    """The size of the data plate: that of all data under subsampling, of the slice where rows are sliced."""
    for site in observed_sites(model_trace).values():
        for frame in site["cond_indep_stack"]:
            if frame.name == plate:
                return frame.full_size or frame.size
    raise ValueError(f"plate: no observed site of the model is in a plate {plate!r}; name the model's data plate")


def _blame(traces: list[tuple[Trace, Trace]]) -> str:
    """The first site whose log-density is not finite, in the order in which the guide and the model ran."""
    for model_trace, guide_trace in traces:
        for who, trace in (("guide", guide_trace), ("model", model_trace)):
            for name, site in (latent_sites(trace) | observed_sites(trace)).items():
                bad = ~log_density(site).isfinite()
                if bad.any():
                    return f"log_prob of site {name!r} in the {who} is not finite at {bad.sum()} of {bad.numel()}"
    return "no single site is to blame"


def _mean(terms: list[dict[str, Tensor]]) -> dict[str, float]:
    return {name: float(torch.stack([term[name] for term in terms]).mean()) for name in terms[0]}


def _held_out(step: _Step, data: tuple[Tensor, ...], seed: int) -> dict[str, float]:
    """Validation draws come from a stream of their own, so that looking does not change the run."""
    with seeded(seed):
        return _mean([step.loss(data)])


def _batches(num_data: int, size: int, order: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    if size == num_data:
        yield torch.arange(num_data, device=device)
    else:
        yield from torch.randperm(num_data, generator=order).to(device).split(size)


def _all_rows(data: tuple[Tensor, ...]) -> Batcher:
    return lambda rows: nullcontext(data)


def _check_enumeration(model: Function, guide: Function, data: tuple[Tensor, ...]) -> None:
    with poutine.block(), torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*data)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*data)
    how = {
        site["infer"].get("enumerate") for trace in (guide_trace, model_trace) for site in latent_sites(trace).values()
    }
    if "sequential" in how:
        raise ValueError("elbo: sites are enumerated one state after another; accepted is enumerate='parallel'")
    if "parallel" not in how:
        raise ValueError(
            "elbo: TraceEnum_ELBO found nothing to enumerate and would only sample. Mark the discrete latents: "
            "`fit(model, config_enumerate(guide), ...)`, or use Trace_ELBO to sample them."
        )


def _check_positive_int(value: object, name: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {value!r}; accepted is a positive integer")


def _check_data(data: Tensor | Sequence[Tensor], name: str) -> tuple[Tensor, ...]:
    tensors = (data,) if isinstance(data, Tensor) else tuple(data)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got a {type(tensor).__name__}; accepted is a tensor, or a sequence of tensors")
        if tensor.dim() == 0 or len(tensor) == 0:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, without rows; accepted is (N, ...) with N >= 1")
        if len(tensor) != len(tensors[0]):
            raise ValueError(
                f"{name}: got tensors of {len(tensors[0])} and {len(tensor)} rows; accepted are equal ones"
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            row, *column = (~tensor.isfinite()).nonzero()[0].tolist()
            value = tensor[(row, *column)].item()
            raise ValueError(f"{name}: holds {value} at row {row}, column {tuple(column)}; accepted are finite numbers")
    if not tensors:
        raise ValueError(f"{name}: got no tensor; accepted is a tensor, or a sequence of tensors")
    return tensors


def _check_like(held_out: tuple[Tensor, ...], data: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    for ours, theirs in zip(held_out, data, strict=True):
        if ours.shape[1:] != theirs.shape[1:] or ours.dtype != theirs.dtype:
            raise ValueError(
                f"validation: got rows of shape {tuple(ours.shape[1:])}, {ours.dtype}; accepted are rows like those of "
                f"data, shape {tuple(theirs.shape[1:])}, {theirs.dtype}"
            )
    return held_out
