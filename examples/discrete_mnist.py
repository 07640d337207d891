"""
Discrete latents on MNIST
=========================

A VAE of 20 categorical latents of 10 classes, or of 200 Bernoulli ones, trained with any gradient estimator: relaxed,
straight-through, or the score function with a baseline, leave-one-out, VIMCO or DisARM. Whatever it is trained with, it
is judged on the discrete graph: a bound on log p(x) of held-out images under the model of hard codes, from 1000 draws.
Several estimators, or ``--estimator all``, are put side by side after the same number of steps.
"""

import argparse

import options

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    parser = options.parser(__doc__, "discrete_mnist", epochs=100)
    options.add_images(parser, default="mnist")
    options.add_training(parser, batch_size=128, lr=2e-3)
    options.add_choice(parser, "--latent", "categorical", "bernoulli", meaning="20 × 10 classes, or 200 bits")
    parser.add_argument("--hidden", type=options.count, nargs="+", default=[512, 256], help="of the encoder; mirrored")
    relaxed = ["discrete-kl", "relaxed", "straight-through-discrete-kl", "straight-through-relaxed"]
    sampled = ["score-function", "running-average", "neural-baseline", "leave-one-out", "vimco", "disarm"]
    options.add_choices(parser, "--estimator", *relaxed, *sampled, meaning="of gradients; several are compared")
    parser.add_argument("--particles", type=options.count, default=None, help="draws a step; the fewest if left out")
    parser.add_argument("--temperature", type=options.positive, default=1.0, help="of a relaxed guide, at first")
    parser.add_argument("--floor", type=options.positive, default=0.5, help="of the temperature")
    parser.add_argument("--rate", type=options.positive, default=3e-5, help="at which it falls: exp(-rate * step)")
    parser.add_argument("--prior-temperature", type=options.positive, default=0.5, help="of a relaxed prior")
    parser.add_argument("--samples", type=options.count, default=1000, help="draws for log p(x) of each image")
    args = parser.parse_args()
    if args.latent == "categorical" and "disarm" in args.estimator:
        args.estimator.remove("disarm")
        if len(args.estimator) < len(relaxed + sampled) - 1:
            parser.error("--estimator disarm is for bits, --latent bernoulli")
    if args.particles and "disarm" in args.estimator and args.particles % 2:
        parser.error(f"--particles {args.particles}: disarm draws in pairs, and takes an even number")
    if args.particles == 1 and {"leave-one-out", "vimco"} & set(args.estimator):
        parser.error("--particles 1: leave-one-out and vimco take 2 or more")

import math
from functools import partial
from typing import Any

import pyro
import runs
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import baselines, datasets, guides, likelihoods, networks, objectives, priors, schedules

RELAXED = {"discrete-kl", "relaxed", "straight-through-discrete-kl", "straight-through-relaxed"}


def parts(args: argparse.Namespace, estimator: str, mean: Tensor) -> tuple[nn.Module, nn.Module]:
    """Prior and guide: relaxed where the estimator is, and discrete where it draws hard codes."""
    encode = networks.standardized(networks.mlp(args.hidden), loc=mean)
    cold, warm, pixels = args.prior_temperature, args.temperature, len(mean)
    hard = estimator.startswith("straight-through")
    match args.latent, estimator in RELAXED:
        case "categorical", True:
            prior: nn.Module = priors.GumbelSoftmax((20, 10), cold, straight_through=hard)
            return prior, guides.GumbelSoftmax(pixels, (20, 10), encode, warm)
        case "bernoulli", True:
            prior = priors.RelaxedBernoulli(200, cold, straight_through=hard)
            return prior, guides.RelaxedBernoulli(pixels, 200, encode, warm)
        case "categorical", False:
            return priors.OneHotCategorical((20, 10)), guides.OneHotCategorical(pixels, (20, 10), encode)
        case _:
            return priors.Bernoulli(200), guides.Bernoulli(pixels, 200, encode)


def discrete_vae(args: argparse.Namespace, estimator: str, mean: Tensor) -> pv.VAE:
    """The VAE. Its decoder reads codes of mean 0 and variance 1 under the prior; at first all give the mean image."""
    prior, encoder = parts(args, estimator, mean)
    on = 0.5 if args.latent == "bernoulli" else 0.1
    decode = networks.standardized(networks.mlp(args.hidden[::-1]), loc=on, scale=math.sqrt(on * (1 - on)))
    decoder = likelihoods.Bernoulli(prior().event_shape, len(mean), decode)
    runs.start_at(decoder, mean)
    return pv.VAE(prior, encoder, decoder)


def objective(args: argparse.Namespace, estimator: str, mean: Tensor) -> Any:
    """The ELBO whose gradients are the estimator's."""
    draws = args.particles or (2 if estimator in {"leave-one-out", "vimco", "disarm"} else 1)
    match estimator.removeprefix("straight-through-"):
        case "relaxed" | "score-function":
            return Trace_ELBO(num_particles=draws, vectorize_particles=draws > 1, max_plate_nesting=1)
        case "discrete-kl":
            return objectives.DiscreteKL(draws)
        case "running-average":
            return objectives.ScoreFunction(baselines.RunningAverage(), draws)
        case "neural-baseline":
            network = networks.standardized(networks.mlp([128]), loc=mean)
            return objectives.ScoreFunction(baselines.NeuralBaseline(len(mean), network), draws)
        case "leave-one-out":
            return objectives.LeaveOneOut(draws)
        case "vimco":
            return objectives.VIMCO(draws)
        case _:
            return objectives.DisARM(draws)


def trained(args: argparse.Namespace, estimator: str, train: Tensor, test: Tensor) -> runs.Run:
    """Train with an estimator, and judge the discrete model."""
    pyro.set_rng_seed(args.seed)
    mean = datasets.grey(train[:10_000]).mean(0)
    vae = discrete_vae(args, estimator, mean)
    cooling = {}
    if estimator in RELAXED:
        temperature = vae.encoder.get_buffer("family.temperature")
        cooling[temperature] = schedules.exponential(args.temperature, args.rate, args.floor, every=500)
    elbo = objective(args, estimator, mean)
    training = runs.fit_resampled(args, vae.model, vae.guide, train, elbo=elbo, schedules=cooling)
    return runs.judged(args, vae.discrete() if estimator in RELAXED else vae, training, test)


def main(args: argparse.Namespace) -> None:
    title, code = f"{args.latent} latents, hard codes", f"{args.latent} codes"
    runs.compare(args, "discrete_mnist", args.estimator, title, code, partial(trained, args))


if __name__ == "__main__":
    main(args)
