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
from dataclasses import dataclass
from typing import Any

import images
import matplotlib.pyplot as plt
import pyro
import results
import torch
from matplotlib.figure import Figure
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
    *_, last = (module for module in decoder.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        last.bias.copy_(torch.logit(mean.clamp(1e-3, 1 - 1e-3)))
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


@dataclass
class Run:
    """What came of one estimator: the discrete VAE that was trained, its history, and how it was judged."""

    vae: pv.VAE
    history: dict[str, list[float]]
    found: dict[str, float]


def trained(args: argparse.Namespace, estimator: str, train: Tensor, test: Tensor, mean: Tensor) -> Run:
    """Train with an estimator, and judge the discrete model."""
    pyro.set_rng_seed(args.seed)
    vae = discrete_vae(args, estimator, mean)
    cooling = {}
    if estimator in RELAXED:
        temperature = vae.encoder.get_buffer("family.temperature")
        cooling[temperature] = schedules.exponential(args.temperature, args.rate, args.floor, every=500)
    fitted = pv.fit(
        vae.model,
        vae.guide,
        train,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=schedules.decayed(args.lr, args.epochs * math.ceil(len(train) / args.batch_size)),
        elbo=objective(args, estimator, mean),
        transform=datasets.resample,
        schedules=cooling,
        seed=args.seed,
    )
    judged = vae.discrete() if estimator in RELAXED else vae
    estimate = pv.log_evidence(judged.model, judged.guide, test, num_samples=args.samples, seed=args.seed).log_evidence
    found = {
        "elbo": pv.evaluate(judged.model, judged.guide, test, num_samples=20, seed=args.seed)["elbo"],
        "log_p": float(estimate.mean()),
        "log_p_standard_error_over_images": float(estimate.std() / len(test) ** 0.5),
        "steps": fitted.steps,
        "seconds": fitted.seconds,
    }
    return Run(judged, fitted.history, found)


def table(args: argparse.Namespace, runs: dict[str, Run], test: Tensor) -> str:
    """A line for each estimator."""
    lines = [
        f"{args.latent} latents; {len(test)} held-out images, nats per image of {test.shape[1]} pixels, hard codes;",
        f"log p(x) is a lower bound from {args.samples} draws of each image, +- its standard error over images.",
        f"{'estimator':30s}{'steps':>7s}{'minutes':>9s}{'ELBO':>10s}{'log p(x)':>10s}",
    ]
    for name, run in runs.items():
        row = run.found
        lines.append(
            f"{name:30s}{row['steps']:7.0f}{row['seconds'] / 60:9.1f}{row['elbo']:10.2f}{row['log_p']:10.2f}"
            f" +- {row['log_p_standard_error_over_images']:.2f}"
        )
    return "\n".join(lines)


def side_by_side(runs: dict[str, Run]) -> Figure:
    """ELBO and log p(x) of each estimator's discrete model, the best above."""
    figure, ax = plt.subplots(figsize=(7, 1.5 + 0.35 * len(runs)), layout="constrained")
    order = sorted(runs, key=lambda name: runs[name].found["log_p"])
    for place, name in enumerate(order):
        elbo, log_p = (runs[name].found[key] for key in ("elbo", "log_p"))
        ax.plot([elbo, log_p], [place, place], color="0.7", zorder=1)
        ax.scatter(elbo, place, color="C0", label="ELBO" if place == 0 else None)
        ax.scatter(log_p, place, color="C1", label="log p(x), at least" if place == 0 else None)
    ax.set_yticks(range(len(order)), order)
    ax.set(xlabel="nats per held-out image", title="After the same number of steps, on the discrete model")
    ax.legend()
    return figure


def main(args: argparse.Namespace) -> None:
    train, test, shape = images.load(args.data, args.folder)
    pyro.set_rng_seed(args.seed)
    mean = datasets.grey(train.x[:10_000]).mean(0)
    x, labels = datasets.resample(test.x)[: args.test_images], test.labels[: args.test_images]
    runs = {}
    for name in args.estimator:
        runs[name] = trained(args, name, train.x, x, mean)
        print(table(args, {name: runs[name]}, x).splitlines()[-1])
    report = table(args, runs, x)
    print(report)
    best = max(runs, key=lambda name: runs[name].found["log_p"])
    vae, history = runs[best].vae, runs[best].history
    figures = images.pictures(vae, history, x, labels, shape, f"{args.latent} codes")
    if len(runs) > 1:
        figures["estimators"] = side_by_side(runs)
    found = {
        "best": best,
        "estimators": {name: run.found | {"history": run.history} for name, run in runs.items()},
    }
    tree = images.tree(vae, x[:20], labels[:20], args.draws, args.seed)
    results.save(args, found, figures, {"discrete_mnist": tree}, report)


if __name__ == "__main__":
    main(args)
