"""pyro_vae, compiled or not, or as it decides by itself: a model as users write it, trained by ``pyro_vae.fit``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from cases import Case
from inputs import Inputs, Losses, Tick
from plain_pyro import ACTIVATIONS, copy_weights
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam
from torch import Tensor, nn
from tqdm import tqdm

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, objectives, priors
from pyro_vae._utils.rng import seeded
from pyro_vae.compilation import cost


def train(
    case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int, by_step: bool = False,
    replayed: bool = False, **options: Any,
) -> Losses:  # fmt: skip
    """Train by ``fit``, or by a loop that calls ``step`` of ``pyro.infer.SVI`` or of ``pv.SVI``, which compiles it.

    The ``options`` are those of ``fit`` or ``pv.SVI``: without ``compile`` it decides by itself. It never compiles if
    its steps are to be ``replayed``.
    """
    model, guide, elbo = pair(case, given)
    x = torch.from_numpy(given.x)[:rows]
    if by_step:
        settings = model, guide, Adam({"lr": case.lr}), elbo
        svi = pv.SVI(*settings, **options) if options else SVI(*settings)
        return {case.bound: _train_by_step(svi, case, x, tick, epochs, seed)}
    estimate = patch.object(cost, "compilation_seconds", lambda graph: 1e12) if replayed else nullcontext()
    with estimate, _ticking(tick, epochs, rows // case.batch_size):
        fitted = pv.fit(
            model, guide, x, epochs=epochs, batch_size=case.batch_size, lr=case.lr, elbo=elbo,
            transform=datasets.resample if case.binarized else None, seed=seed, progress=False, **options,
        )  # fmt: skip
    # The history has the ELBO even if the objective is a tighter bound.
    return {"elbo": [-nats for nats in fitted.history["elbo"]]}


def _train_by_step(svi: Any, case: Case, x: Tensor, tick: Tick, epochs: int, seed: int) -> list[float]:
    losses = []
    with seeded(seed):
        for _ in range(epochs):
            total = 0.0
            for index in [None] if case.full_batch else torch.randperm(len(x)).split(case.batch_size):
                batch = x if index is None else x[index]
                total += svi.step(datasets.resample(batch) if case.binarized else batch)
            losses.append(total / len(x))
            tick(len(x) // case.batch_size)
    return losses


@contextmanager
def _ticking(tick: Tick, total: int, work: int) -> Iterator[None]:
    """Call ``tick`` for each update of a run's progress bar, shown or not: `fit` has no other hook."""
    update = tqdm.update

    def update_and_tick(bar: tqdm, n: float | None = 1) -> bool | None:
        shown = update(bar, n)
        if bar.total == total and n != 0:
            tick(work * (1 if n is None else n))
        return shown

    tqdm.update = update_and_tick
    try:
        yield
    finally:
        tqdm.update = update


def vae_of(case: Case, given: Inputs) -> pv.VAE:
    """Make the VAE of a case with the initial weights."""
    activation = ACTIVATIONS[case.activation]
    encode, decode = networks.mlp(case.hidden, activation), networks.mlp(case.hidden[::-1], activation)
    cold, warm = case.temperatures
    if case.guide == "gumbel":
        prior: nn.Module = priors.GumbelSoftmax(case.latent, temperature=cold)
        encoder: nn.Module = guides.GumbelSoftmax(case.features, case.latent, encode, temperature=warm)
    elif case.guide == "bernoulli":
        prior, encoder = priors.Bernoulli(case.latent), guides.Bernoulli(case.features, case.latent, encode)
    else:
        prior, encoder = priors.StandardNormal(case.latent), guides.DiagonalNormal(case.features, case.latent, encode)
    likelihood = {"normal": likelihoods.Normal, "bernoulli": likelihoods.Bernoulli}[case.likelihood]
    decoder = likelihood(case.latent, case.features, decode)
    return pv.VAE(prior, copy_weights(given, "encoder", encoder), copy_weights(given, "decoder", decoder))


def pair(case: Case, given: Inputs) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    vae = vae_of(case, given)
    if case.guide == "bernoulli":
        return vae.model, config_enumerate(vae.guide), TraceEnum_ELBO(max_plate_nesting=1)
    elbo = objectives.ImportanceWeighted(case.particles) if case.particles > 1 else Trace_ELBO()
    return vae.model, vae.guide, elbo


def evaluate(
    case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int, by_step: bool = False,
    replayed: bool = False, **options: Any,
) -> Losses:  # fmt: skip
    """Estimate the mean log p(x). A call that captures has its own graph, so timed calls have more draws then."""
    if by_step or replayed:
        raise NotImplementedError("evaluate: it takes no training steps")
    vae, found = vae_of(case, given), []
    x = binary(given, rows) if case.binarized else torch.from_numpy(given.x)[:rows]
    captures = options.get("compile", True)
    draws = 100 * case.particles if captures and epochs > case.check else case.particles
    given_to_it = {"num_samples": draws, "progress": False} | options
    for number in range(epochs):
        with _ticking(tick, rows * draws, 1) if captures else nullcontext():
            estimate = pv.log_evidence(vae.model, vae.guide, x, seed=seed + number, **given_to_it)
        found.append(-float(estimate.log_evidence.mean()))
        if not captures:
            tick(rows * draws)
    return {case.bound: found}


def export(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int, **options: Any) -> Losses:
    """Export draws of everything as a tree for ArviZ; return the mean square of those of z."""
    if options:
        raise NotImplementedError("export: it decides by itself")
    vae, x, found = vae_of(case, given), torch.from_numpy(given.x)[:rows], []
    for number in range(epochs):
        tree = pv.to_datatree(vae.model, vae.guide, x, draws=case.particles, seed=seed + number, parallel=True)
        found.append(float((tree["posterior"]["z"].to_numpy() ** 2).mean()))
        tick(case.particles)
    return {case.bound: found}


def binary(given: Inputs, rows: int) -> Tensor:
    """Return the first images, binarized by a threshold, so that they are the same for all contestants."""
    return datasets.binarize(torch.from_numpy(given.x[:rows]))
