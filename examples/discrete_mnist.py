"""
Discrete latents on MNIST
=========================

A VAE of 20 categorical latents of 10 classes, or of 200 Bernoulli ones, trained with any gradient estimator: relaxed,
straight-through, or the score function with a baseline, leave-one-out, VIMCO or DisARM. Whatever it is trained with, it
is judged on the discrete graph: a bound on log p(x) of held-out images under the model of hard codes, from 1000 draws.
"""

import argparse

import options

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    parser = options.parser(__doc__, "discrete_mnist", epochs=120)
    options.add_images(parser, default="mnist")
    options.add_training(parser, batch_size=128, lr=1e-3)
    options.add_choice(parser, "--latent", "categorical", "bernoulli", meaning="20 × 10 classes, or 200 bits")
    parser.add_argument("--hidden", type=options.count, nargs="+", default=[512, 256], help="of the encoder; mirrored")
    sampled = ["running-average", "neural-baseline", "leave-one-out", "vimco", "disarm"]
    options.add_choice(
        parser, "--estimator", "discrete-kl", "relaxed", "straight-through", *sampled, meaning="of gradients"
    )
    parser.add_argument("--particles", type=options.count, default=None, help="draws a step; the fewest if left out")
    parser.add_argument("--temperature", type=options.positive, default=1.0, help="of a relaxed guide, at first")
    parser.add_argument("--floor", type=options.positive, default=0.5, help="of the temperature")
    parser.add_argument("--rate", type=options.positive, default=3e-5, help="at which it falls: exp(-rate * step)")
    parser.add_argument("--prior-temperature", type=options.positive, default=0.5, help="of a relaxed prior")
    parser.add_argument("--samples", type=options.count, default=1000, help="draws for log p(x) of each image")
    args = parser.parse_args()

import math
from collections.abc import Sequence
from typing import Any

import images
import pyro
import results
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import baselines, datasets, guides, likelihoods, networks, objectives, priors, schedules

RELAXED = {"discrete-kl", "relaxed", "straight-through"}


class Centred(nn.Module):
    """Takes the mean of the training images off."""

    mean: Tensor

    def __init__(self, mean: Tensor):
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, x: Tensor) -> Tensor:
        """``(*, pixels)``, as it came in."""
        return x - self.mean


def centred(mean: Tensor, hidden: Sequence[int]) -> networks.NetworkFactory:
    return lambda *sizes: nn.Sequential(Centred(mean), networks.mlp(hidden)(*sizes))


def parts(args: argparse.Namespace, pixels: int, encode: networks.NetworkFactory) -> tuple[nn.Module, nn.Module]:
    """Prior and guide: relaxed where the estimator is, and discrete where it draws hard codes."""
    relaxed, hard = args.estimator in RELAXED, args.estimator == "straight-through"
    cold, warm = args.prior_temperature, args.temperature
    match args.latent, relaxed:
        case "categorical", True:
            return (
                priors.GumbelSoftmax((20, 10), cold, straight_through=hard),
                guides.GumbelSoftmax(pixels, (20, 10), encode, warm),
            )
        case "bernoulli", True:
            return (
                priors.RelaxedBernoulli(200, cold, straight_through=hard),
                guides.RelaxedBernoulli(pixels, 200, encode, warm),
            )
        case "categorical", False:
            return priors.OneHotCategorical((20, 10)), guides.OneHotCategorical(pixels, (20, 10), encode)
        case _:
            return priors.Bernoulli(200), guides.Bernoulli(pixels, 200, encode)


def discrete_vae(args: argparse.Namespace, mean: Tensor) -> pv.VAE:
    """The VAE, whose decoder at first makes the mean image of every code."""
    prior, encoder = parts(args, len(mean), centred(mean, args.hidden))
    decoder = likelihoods.Bernoulli(prior().event_shape, len(mean), networks.mlp(args.hidden[::-1]))
    *_, last = (module for module in decoder.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        last.bias.copy_(torch.logit(mean.clamp(1e-3, 1 - 1e-3)))
    return pv.VAE(prior, encoder, decoder)


def objective(args: argparse.Namespace, mean: Tensor) -> Any:
    """The ELBO whose gradients are the estimator's."""
    few = {"leave-one-out": 2, "vimco": 2, "disarm": 2}
    draws = args.particles or few.get(args.estimator, 1)
    match args.estimator:
        case "relaxed" | "straight-through":
            return Trace_ELBO(num_particles=draws, vectorize_particles=draws > 1, max_plate_nesting=1)
        case "discrete-kl":
            return objectives.DiscreteKL(draws)
        case "running-average":
            return objectives.ScoreFunction(baselines.RunningAverage(), draws)
        case "neural-baseline":
            return objectives.ScoreFunction(baselines.NeuralBaseline(len(mean), centred(mean, [128])), draws)
        case "leave-one-out":
            return objectives.LeaveOneOut(draws)
        case "vimco":
            return objectives.VIMCO(draws)
        case _:
            return objectives.DisARM(draws)


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, shape = images.load(args.data, args.folder)
    mean = datasets.grey(train.x[:10_000]).mean(0)
    vae = discrete_vae(args, mean)
    steps = args.epochs * math.ceil(len(train) / args.batch_size)
    cooling = {}
    if args.estimator in RELAXED:
        temperature = vae.encoder.get_buffer("family.temperature")
        cooling[temperature] = schedules.exponential(args.temperature, args.rate, args.floor, every=500)
    fitted = pv.fit(
        vae.model,
        vae.guide,
        train.x,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=schedules.decayed(args.lr, steps),
        elbo=objective(args, mean),
        transform=datasets.resample,
        schedules=cooling,
        seed=args.seed,
    )

    judged = vae.discrete() if args.estimator in RELAXED else vae
    x, labels = datasets.resample(test.x)[: args.test_images], test.labels[: args.test_images]
    elbo = pv.evaluate(judged.model, judged.guide, x, num_samples=20, seed=args.seed)["elbo"]
    estimate = pv.log_evidence(judged.model, judged.guide, x, num_samples=args.samples, seed=args.seed)
    log_p = float(estimate.log_evidence.mean())
    error = float(estimate.log_evidence.std() / len(x) ** 0.5)
    report = [
        f"{args.latent}, {args.estimator}: {steps} steps, {fitted.seconds / 60:.1f} minutes.",
        f"On {len(x)} held-out images, in nats per image of {x.shape[1]} pixels, of the discrete model:",
        f"  ELBO     {elbo:8.2f}",
        f"  log p(x) {log_p:8.2f}  at least: {args.samples} draws for each (standard error over images {error:.2f})",
    ]
    print("\n".join(report))
    found = {
        "elbo": elbo,
        "log_p": log_p,
        "log_p_standard_error_over_images": error,
        "steps": steps,
        "seconds": fitted.seconds,
        "history": fitted.history,
    }
    figures = images.pictures(judged, fitted.history, x, labels, shape, f"{args.latent} codes")
    tree = images.tree(judged, x[:20], labels[:20], args.draws, args.seed)
    results.save(args, found, figures, {"discrete_mnist": tree})


if __name__ == "__main__":
    main(args)
