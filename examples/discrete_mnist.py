"""
Discrete latents on MNIST
=========================

A VAE with 20 categorical latents of 10 classes, or with 200 Bernoulli latents, trained with any gradient estimator:
relaxed, straight-through, or the score function with a baseline, leave-one-out, VIMCO or DisARM. The evaluation is
the same for all: a bound on log p(x) of held-out images under the model with hard codes, from 1000 draws. Several
estimators, or ``--estimator all``, are compared after the same number of steps.
"""

import argparse
import math
from typing import Any

import common
import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import baselines, datasets, guides, likelihoods, networks, objectives, priors, schedules

RELAXED = ["discrete-kl", "relaxed", "straight-through-discrete-kl", "straight-through-relaxed"]
SAMPLED = ["score-function", "running-average", "neural-baseline", "leave-one-out", "vimco", "disarm"]


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "discrete_mnist", epochs=100)
    common.add_images(parser, default="mnist")
    common.add_training(parser, batch_size=128, lr=2e-3)
    count, positive, every = common.positive_int, common.positive_float, [*RELAXED, *SAMPLED]
    latents = {"choices": ["categorical", "bernoulli"], "default": "categorical"}
    parser.add_argument("--latent", **latents, help="20 × 10 classes, or 200 bits")  # type: ignore[arg-type]
    sizes = "units of the encoder's hidden layers; the decoder has them in reverse order"
    parser.add_argument("--hidden", type=count, nargs="+", default=[512, 256], help=sizes)
    estimators = "gradient estimators; several are compared"
    parser.add_argument("--estimator", nargs="+", choices=[*every, "all"], default=every[:1], help=estimators)
    parser.add_argument("--particles", type=count, default=None, help="draws in a step; default: the fewest possible")
    parser.add_argument("--temperature", type=positive, default=1.0, help="temperature of a relaxed guide at the start")
    parser.add_argument("--floor", type=positive, default=0.5, help="lowest temperature")
    parser.add_argument("--rate", type=positive, default=3e-5, help="decay of the temperature: exp(-rate * step)")
    parser.add_argument("--prior-temperature", type=positive, default=0.5, help="temperature of a relaxed prior")
    parser.add_argument("--samples", type=count, default=1000, help="draws for log p(x) of each image")
    args = parser.parse_args()
    if "all" in args.estimator:
        args.estimator = every if args.latent == "bernoulli" else every[:-1]
    args.estimator = list(dict.fromkeys(args.estimator))
    if args.latent == "categorical" and "disarm" in args.estimator:
        parser.error("--estimator disarm requires --latent bernoulli, got categorical")
    if args.particles and "disarm" in args.estimator and args.particles % 2:
        parser.error(f"--particles must be even for disarm, which draws pairs, got {args.particles}")
    if args.particles == 1 and {"leave-one-out", "vimco"} & set(args.estimator):
        parser.error("--particles must be 2 or more for leave-one-out and vimco, got 1")
    return args


def make_parts(args: argparse.Namespace, estimator: str, mean: Tensor) -> tuple[nn.Module, nn.Module]:
    """Make prior and guide: relaxed for a relaxed estimator, discrete for an estimator that draws hard codes."""
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


# 1. Prior and guide with discrete or relaxed codes, and a decoder that reads scaled codes.
def discrete_vae(args: argparse.Namespace, estimator: str, mean: Tensor) -> pv.VAE:
    """Make the VAE. Its decoder reads codes scaled to mean 0 and variance 1 under the prior."""
    prior, encoder = make_parts(args, estimator, mean)
    on = 0.5 if args.latent == "bernoulli" else 0.1
    decode = networks.starting_at(networks.mlp(args.hidden[::-1]), torch.logit(mean, eps=1e-3))
    decode = networks.standardized(decode, loc=on, scale=math.sqrt(on * (1 - on)))
    decoder = likelihoods.Bernoulli(prior().event_shape, len(mean), decode)
    return pv.VAE(prior, encoder, decoder)


def make_objective(args: argparse.Namespace, estimator: str, mean: Tensor) -> Any:
    """Make the ELBO with the gradients of the estimator."""
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


# 2. Train with the estimator. A relaxed VAE is returned as its discrete twin, the model with hard codes.
def train(args: argparse.Namespace, estimator: str, data: Tensor) -> tuple[pv.VAE, pv.Fitted]:
    """Train with an estimator, and return the discrete model."""
    pyro.set_rng_seed(args.seed)
    mean = datasets.grey(data[:10_000]).mean(0)
    vae = discrete_vae(args, estimator, mean)
    cooling = {}
    if estimator in RELAXED:
        temperature = vae.encoder.get_buffer("family.temperature")
        cooling[temperature] = schedules.exponential(args.temperature, args.rate, args.floor, every=500)
    options = common.training_options(args) | {"lr": schedules.decayed(args.lr)}
    elbo = make_objective(args, estimator, mean)
    fitted = pv.fit(vae.model, vae.guide, data, transform=datasets.resample, elbo=elbo, schedules=cooling, **options)
    return vae.discrete() if estimator in RELAXED else vae, fitted


if __name__ == "__main__":
    options = parse_args()
    common.compare(options, "discrete_mnist", options.estimator, train)
