"""The training loop: stochastic variational inference with Pyro's ELBOs, any model and guide."""

import copy
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_vae._utils.amortization import is_amortized
from pyro_vae._utils.module_state import buffers_kept
from pyro_vae._utils.param_store import rollback_params_on_error, scoped_param_store
from pyro_vae._utils.rng import preserve_rng_state, seeded
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import boolean, data_tensors, function, positive, positive_int, rows_like, tqdm_disable
from pyro_vae.distributions.missing import check_model, first_missing
from pyro_vae.training.checkpoints import Checkpoints
from pyro_vae.training.compiled_step import CapturedStep
from pyro_vae.training.elbo_evaluator import ElboEvaluator
from pyro_vae.training.loop import Batches, Callback, Loop, RunCheckpoints
from pyro_vae.training.minibatches import Batcher, Transform, following_autoguide, make_batcher, transformed
from pyro_vae.training.preflight import check_elbo, check_pair, explain_shape_mismatch
from pyro_vae.training.schedules import Schedule, check_schedules
from pyro_vae.training.state import data_fingerprint
from pyro_vae.training.step import BatchContext, Step

__all__ = ["Fitted", "evaluate", "fit"]


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
        stopped: why it ended: ``"epochs"`` are done, ``"patience"``, ``"callback"`` or ``"interrupted"``.
        skipped: steps that were left out, as they were not finite.
    """

    model: Function = field(repr=False)
    guide: Function = field(repr=False)
    history: dict[str, list[float]] = field(repr=False)
    seed: int
    steps: int
    seconds: float
    stopped: str = "epochs"
    skipped: int = 0


def fit(
    model: Function,
    guide: Function,
    data: Tensor | Sequence[Tensor],
    *,
    epochs: int,
    batch_size: int | None = None,
    lr: float | Schedule = 1e-3,
    elbo: ELBO | None = None,
    validation: Tensor | Sequence[Tensor] | None = None,
    transform: Transform | None = None,
    schedules: Mapping[Tensor, Schedule] | None = None,
    plate: str = "data",
    seed: int = 0,
    progress: bool | None = None,
    compile: bool = False,
    clip_norm: float | None = None,
    nonfinite: str = "stop",
    patience: int | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
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
        epochs: passes over the data; without ``batch_size``, each is one step.
        batch_size: rows per step, drawn anew each epoch; all N if left out. Mini-batches subsample the data plate, see
            :func:`pyro_vae.training.minibatches.make_batcher`.
        lr: Adam's learning rate, or a schedule of it (see :mod:`pyro_vae.training.schedules`).
        elbo: any ELBO of ``pyro.infer``; ``Trace_ELBO()`` if left out. ``TraceEnum_ELBO`` needs
            ``config_enumerate(guide)``.
        validation: held-out data of the same form, evaluated at the end of each epoch, with the networks in the mode
            (training or evaluation) that they are in.
        transform: what to make of the rows of each step, such as :func:`pyro_vae.datasets.pixels.resample` of bytes: called
            with the rows of each data tensor, once a step and once with the validation data, and a few times before to
            see that it fits. Model and guide see the same rows. It must make new tensors.
        schedules: values that change as training goes on: 0-dim tensors, such as the ``temperature`` of a relaxed
            family, each with its schedule (see :mod:`pyro_vae.training.schedules`), called with the number of the step, from 0.
            Take the tensor after ``vae.to(...)``, which puts another in its place.
        plate: name of the data plate.
        seed: of the random numbers of the run and the order of the data. Weights are drawn when parts are built: call
            ``torch.manual_seed`` before that. To fit again goes on from where the parameters are.
        progress: whether to show a progress bar; only on a terminal if left out.
        compile: whether to capture the step as one graph and replay it compiled, see
            :mod:`pyro_vae.training.compiled_step`: the same numbers, many times faster, after some seconds in a C++ compiler.
            Model and guide must run the same operations in every step.
        clip_norm: to which the norm of all gradients together is scaled down, where it is larger.
        nonfinite: what to do with a step whose loss or gradient is not finite: ``"stop"``, or ``"skip"`` it; a hundred
            in a row stop the run too.
        patience: epochs without a better validation ELBO after which training ends. The parameters are then those of
            the best epoch, as they are if ``epochs`` are over before.
        callbacks: functions called at the end of each epoch with an :class:`pyro_vae.training.loop.Epoch`; training ends if
            one returns ``True``.
        checkpoints: :class:`pyro_vae.Checkpoints`, or their folder, to which the state of the run is written. If it
            has one, the run goes on from there, to the same numbers as if it had not been stopped.

    Ctrl-C ends the run after the step that it falls in, with a warning; what was learnt is kept.

    Raises:
        TypeError, ValueError: on unusable arguments, before any training; :class:`pyro_vae.compilation.graph.CaptureError` is
            one, if the step is not the same each time.
        FloatingPointError: if the loss or a gradient is not finite, naming the step and the site, with the rows, or
            the parameter. The parameters are then those of the last good step.

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
    function(model, "model")
    function(guide, "guide")
    tensors = data_tensors(data, "data")
    held_out = None if validation is None else rows_like(data_tensors(validation, "validation"), tensors, "validation")
    positive_int(epochs, "epochs")
    lr = lr if callable(lr) else positive(lr, "lr")
    schedules = check_schedules({} if schedules is None else schedules)
    if clip_norm is not None:
        positive(clip_norm, "clip_norm")
    if patience is not None and held_out is None:
        raise ValueError("`patience` must be `validation=` beside it, got no validation data to lose it on")
    if patience is not None:
        positive_int(patience, "patience")
    if nonfinite not in ("stop", "skip"):
        raise ValueError(f"`nonfinite` must be 'stop' and 'skip', got {nonfinite!r}")
    boolean(compile, "compile")
    if not isinstance(callbacks, Sequence) or not all(callable(call) for call in callbacks):
        raise TypeError(f"`callbacks` must be a sequence of functions of an Epoch, got {callbacks!r}")
    tqdm_disable(progress)
    num_data = len(tensors[0])
    batch_size = num_data if batch_size is None else min(positive_int(batch_size, "batch_size"), num_data)
    elbo = check_elbo(Trace_ELBO() if elbo is None else elbo)
    if checkpoints is not None:
        checkpoints = checkpoints if isinstance(checkpoints, Checkpoints) else Checkpoints(checkpoints)
        checkpoints.prepare()
    device = tensors[0].device
    run_config = {
        "batch_size": batch_size,
        "seed": seed,
        "elbo": type(elbo).__name__,
        "compile": compile,
        "data": data_fingerprint(tensors),
        "validation": None if held_out is None else data_fingerprint(held_out),
    }
    run = ElboEvaluator(model, guide, elbo, plate)
    settings: dict[str, Any] = {"clip_norm": clip_norm, "skips": nonfinite == "skip", "numbered": True}
    if compile:
        settings["compiles"] = lambda rows: len(rows) == batch_size
    step = (CapturedStep if compile else Step)(run, lr, schedules, **settings)
    started = time.perf_counter()
    with following_autoguide(guide):
        with rollback_params_on_error(), seeded(seed), buffers_kept():
            _check_missing(model, tensors, "data", transform)
            _check_missing(model, held_out or (), "validation", transform)
            take = _prepare(model, guide, tensors, elbo, batch_size, plate, held_out is not None, transform)
            held_out = held_out and transformed(held_out, transform)
        with seeded(seed):
            loop = Loop(
                step,
                Batches(take, num_data, batch_size, seed, device),
                validate=None if held_out is None else partial(_held_out, run, held_out, seed),
                patience=patience,
                callbacks=callbacks,
                checkpoints=None if checkpoints is None else RunCheckpoints(checkpoints, run_config),
            )
            with rollback_params_on_error():
                loop.resume()
                if compile and step.count == 0:
                    _validate(ElboEvaluator(model, guide, copy.copy(elbo), plate), take, num_data, batch_size, device)
            loop.run(epochs, progress)
    state = loop.state
    if state.stop_reason == "interrupted":
        warnings.warn(f"fit: interrupted after {step.count} steps; what was learnt is kept", stacklevel=2)
    return Fitted(
        model, guide, state.history, seed, step.count, time.perf_counter() - started, state.stop_reason, state.skipped
    )


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
    function(model, "model")
    function(guide, "guide")
    tensors = data_tensors(data, "data")
    positive_int(num_samples, "num_samples")
    check_model(model, tensors, "data")
    run = ElboEvaluator(model, guide, check_elbo(Trace_ELBO() if elbo is None else elbo), plate)
    comparing = explain_shape_mismatch(model, guide, tensors)
    with seeded(seed), buffers_kept(), scoped_param_store(), poutine.block(), comparing:
        check_pair(model, guide, run.elbo, tensors, plate, transforms=False)
    with seeded(seed), buffers_kept(), pyro.validation_enabled():
        return _terms(run, tensors, "data", num_samples)


def _check_missing(model: Function, data: tuple[Tensor, ...], name: str, transform: Transform | None) -> None:
    """Refuse NaN that the model does not accept, as the transform leaves it."""
    if first_missing(data) is not None:
        check_model(model, transformed(tuple(tensor.clone() for tensor in data), transform), name)


def _prepare(
    model: Function,
    guide: Function,
    data: tuple[Tensor, ...],
    elbo: ELBO,
    batch_size: int,
    plate: str,
    held_out: bool,
    transform: Transform | None,
) -> Batcher:
    """How rows are taken; refuses what the run could not do right, before it begins."""

    transformed(tuple(tensor[:batch_size].clone() for tensor in data), transform)  # refused before it touches the data

    def all_rows(rows: Tensor) -> AbstractContextManager[tuple[Tensor, ...]]:
        return nullcontext(transformed(data, transform))

    with explain_shape_mismatch(model, guide, data, transform):
        take = (
            all_rows if batch_size == len(data[0]) else make_batcher(model, guide, data, batch_size, plate, transform)
        )
        with poutine.block(), take(torch.arange(batch_size, device=data[0].device)) as arguments:
            check_pair(model, guide, elbo, arguments, plate, transform is not None)
    if held_out and not is_amortized(guide, transformed(tuple(tensor[:4] for tensor in data), transform), plate):
        raise ValueError(
            "validation: the guide is not amortized: it has parameters of its own for each datum, and none for data "
            "that it was not trained on"
        )
    return take


@torch.no_grad()
def _terms(run: ElboEvaluator, data: tuple[Tensor, ...], name: str, num_samples: int = 1) -> dict[str, float]:
    """Means of some runs on the data of that name, in nats per datum."""
    found: list[dict[str, Tensor]] = []
    for _ in range(num_samples):
        loss = run.loss(*data)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{name}: the loss is {loss}; {run.first_nonfinite_site() or 'no one site is to blame'}"
            )
        found.append(run.terms(loss))
    return {name: float(torch.stack([terms[name] for terms in found]).mean()) for name in found[0]}


def _held_out(run: ElboEvaluator, data: tuple[Tensor, ...], seed: int) -> dict[str, float]:
    """Validation draws come from a stream of their own, so that looking does not change the run."""
    with seeded(seed):
        return _terms(run, data, "validation")


def _validate(run: ElboEvaluator, take: BatchContext, num_data: int, batch_size: int, device: torch.device) -> None:
    """Run the pair once on all rows, with Pyro's validation: a captured step has none."""
    with torch.no_grad(), preserve_rng_state(), buffers_kept(), pyro.validation_enabled():
        for rows in torch.arange(num_data, device=device).split(batch_size):
            with take(rows) as arguments:
                run.loss(*arguments)
