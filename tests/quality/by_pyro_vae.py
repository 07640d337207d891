"""pyro_vae: a VAE of its parts, trained by ``pv.fit``."""

from collections.abc import Callable
from typing import Any

import ours
import torch
from inputs import Inputs
from plain_pyro import ACTIVATIONS, copy_weights
from problems import Problem
from pyro.infer import TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from reports import Report, of_module
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, objectives, priors
from pyro_vae.handlers import WeightKL


def vae_of(problem: Problem, given: Inputs) -> pv.VAE:
    """Make the VAE of images, its inputs standardized."""
    activation = ACTIVATIONS[problem.activation]
    fixed = {name: torch.from_numpy(value) for name, value in given.weights.items()}
    encode = networks.standardized(networks.mlp(problem.hidden, activation), fixed["encoder.loc"])
    decode = networks.mlp(problem.hidden[::-1], activation)
    if problem.guide == "gumbel":
        decode = networks.standardized(decode, fixed["decoder.loc"], fixed["decoder.scale"])
        cold, warm = problem.temperatures
        prior: nn.Module = priors.GumbelSoftmax(problem.latent, cold)
        encoder: nn.Module = guides.GumbelSoftmax(problem.features, problem.latent, encode, warm)
    else:
        prior = priors.StandardNormal(problem.latent)
        encoder = guides.DiagonalNormal(problem.features, problem.latent, encode)
    decoder = likelihoods.Bernoulli(problem.latent, problem.features, decode)
    return pv.VAE(prior, copy_weights(given, "encoder", encoder), copy_weights(given, "decoder", decoder))


def program(problem: Problem, given: Inputs) -> tuple[Any, Any, Any, Any, dict[Tensor, Any]]:
    """Make a VAE, its model, guide and objective, and the numbers that change, each with a function of the epoch."""
    vae = vae_of(problem, given) if problem.binarized else ours.vae_of(problem, given)
    if problem.guide == "bernoulli":
        return vae, vae.model, config_enumerate(vae.guide), TraceEnum_ELBO(max_plate_nesting=1), {}
    if problem.guide == "gumbel":
        temperature = vae.encoder.get_buffer("family.temperature")
        return vae, vae.model, vae.guide, objectives.DiscreteKL(), {temperature: problem.temperature}
    weight = torch.tensor(problem.kl_weight(0))
    weighted = WeightKL(weight)
    return vae, weighted(vae.model), weighted(vae.guide), TraceMeanField_ELBO(), {weight: problem.kl_weight}


def train(problem: Problem, given: Inputs, report: Report, *, epochs: int, seed: int, **options: Any) -> None:
    """Train, and report after each epoch of the problem."""
    vae, model, guide, elbo, changing = program(problem, given)
    x, steps = torch.from_numpy(given.x)[: problem.rows], problem.steps_of_epoch
    passes = steps if problem.full_batch else 1  # over the data, in an epoch of the problem

    def in_steps(value: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: value(step // steps)

    def after(epoch: Any) -> None:
        if epoch.number % passes == 0:
            report(steps, lambda: of_module(given, vae))

    pv.fit(
        model, guide, x, epochs=epochs * passes, batch_size=problem.batch_size, lr=in_steps(problem.rate),
        schedules={number: in_steps(value) for number, value in changing.items()}, seed=seed, elbo=elbo,
        transform=datasets.resample if problem.binarized else None, callbacks=[after], **options,
    )  # fmt: skip
