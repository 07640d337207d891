"""pyro_vae, compiled and eager: a model as users write it, trained by ``pyro_vae.fit``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cases import Case
from inputs import Inputs, Losses, Tick
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam
from torch import Tensor, nn
from tqdm.auto import tqdm

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, objectives, priors
from pyro_vae._utils.rng import seeded


def runner(task: str, compiled: bool = False, by_step: bool = False) -> Callable[..., Losses]:
    """Return the function that performs the task.

    Args:
        task: the task of a case.
        compiled: whether the step is captured and compiled.
        by_step: whether the caller's loop calls ``step`` of ``pyro.infer.SVI``, or of ``pyro_vae.SVI``.
    """
    if task == "train":
        return _stepper(compiled) if by_step else _fitter(compiled)
    if by_step or (compiled and task == "export"):
        raise NotImplementedError(f"{task}: it takes no training steps")
    return {"evaluate": evaluate_captured if compiled else evaluate, "export": export}[task]


def _fitter(compiled: bool) -> Callable[..., Losses]:
    options = {"compile": True} if compiled else {}

    def train(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> Losses:
        model, guide, elbo = pair(case, given)
        with _ticking(tick, epochs, rows // case.batch_size):
            fitted = pv.fit(
                model,
                guide,
                torch.from_numpy(given.x)[:rows],
                epochs=epochs,
                batch_size=case.batch_size,
                lr=case.lr,
                elbo=elbo,
                transform=datasets.resample if case.binarized else None,
                seed=seed,
                progress=False,
                **options,
            )
        # The history has the ELBO even if the objective is a tighter bound.
        return {"elbo": [-nats for nats in fitted.history["elbo"]]}

    return train


def _stepper(compiled: bool) -> Callable[..., Losses]:
    def train(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> Losses:
        model, guide, elbo = pair(case, given)
        x = torch.from_numpy(given.x)[:rows]
        settings = model, guide, Adam({"lr": case.lr}), elbo
        svi = pv.SVI(*settings, compile=True) if compiled else SVI(*settings)
        losses = []
        with seeded(seed):
            for _ in range(epochs):
                total = 0.0
                for index in [None] if case.full_batch else torch.randperm(rows).split(case.batch_size):
                    batch = x if index is None else x[index]
                    total += svi.step(datasets.resample(batch) if case.binarized else batch)
                losses.append(total / rows)
                tick(rows // case.batch_size)
        return {case.bound: losses}

    return train


@contextmanager
def _ticking(tick: Tick, total: int, work: int) -> Iterator[None]:
    """Call ``tick`` for each update of a run's progress bar, shown or not: `fit` has no other hook."""
    update = tqdm.update

    def update_and_tick(bar: tqdm, n: float | None = 1) -> bool | None:
        shown = update(bar, n)
        if bar.disable:  # such a bar counts nothing, and the loop reads the count
            bar.n += 1 if n is None else n
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
    activation = {"tanh": nn.Tanh, "relu": nn.ReLU}[case.activation]
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
    vae = pv.VAE(prior, encoder, likelihood(case.latent, case.features, decode))
    with torch.no_grad():
        for part, module in (("encoder", vae.encoder), ("decoder", vae.decoder)):
            for number, layer in enumerate(layer for layer in module.modules() if isinstance(layer, nn.Linear)):
                layer.weight.copy_(torch.from_numpy(given.weights[f"{part}.{number}.weight"]))
                layer.bias.copy_(torch.from_numpy(given.weights[f"{part}.{number}.bias"]))
    return vae


def pair(case: Case, given: Inputs) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """Return model, guide and objective of a case."""
    vae = vae_of(case, given)
    if case.guide == "bernoulli":
        return vae.model, config_enumerate(vae.guide), TraceEnum_ELBO(max_plate_nesting=1)
    elbo = objectives.ImportanceWeighted(case.particles) if case.particles > 1 else Trace_ELBO()
    return vae.model, vae.guide, elbo


def evaluate(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> Losses:
    """Estimate the mean log p(x) by importance weighting."""
    vae = vae_of(case, given)
    x = binary(given, rows)
    found = []
    for number in range(epochs):
        options = {"num_samples": case.particles, "seed": seed + number, "progress": False}
        estimate = pv.log_evidence(vae.model, vae.guide, x, **options)
        found.append(-float(estimate.log_evidence.mean()))
        tick(rows * case.particles)
    return {case.bound: found}


def evaluate_captured(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> Losses:
    """Estimate it with a compiled graph. Each call captures its own graph, so timed calls have more draws."""
    vae = vae_of(case, given)
    draws = case.particles if epochs <= case.check else 100 * case.particles
    found = []
    for number in range(epochs):
        with _ticking(tick, rows * draws, 1):
            options = {"num_samples": draws, "seed": seed + number, "progress": False, "compile": True}
            estimate = pv.log_evidence(vae.model, vae.guide, binary(given, rows), **options)
        found.append(-float(estimate.log_evidence.mean()))
    return {case.bound: found}


def export(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> Losses:
    """Export draws of everything as a tree for ArviZ; return the mean square of those of z."""
    vae = vae_of(case, given)
    x = torch.from_numpy(given.x)[:rows]
    found = []
    for number in range(epochs):
        tree = pv.to_datatree(vae.model, vae.guide, x, draws=case.particles, seed=seed + number, parallel=True)
        found.append(float((tree["posterior"]["z"].to_numpy() ** 2).mean()))
        tick(case.particles)
    return {case.bound: found}


def binary(given: Inputs, rows: int) -> Tensor:
    """Return the first images, binarized by a threshold, so that they are the same for all contestants."""
    return datasets.binarize(torch.from_numpy(given.x[:rows]))
