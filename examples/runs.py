"""Several VAEs of the same images side by side: how each is judged, and the table and picture of them all."""

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import images
import matplotlib.pyplot as plt
import results
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import datasets, schedules

Function = Callable[..., Any]


@dataclass
class Run:
    """What came of one of them: the VAE that was trained, its history, and how it was judged."""

    vae: pv.VAE
    history: dict[str, list[float]]
    found: dict[str, float]


def start_at(decoder: nn.Module, mean: Tensor) -> None:
    """Let a Bernoulli decoder start with the mean image as its answer to every code."""
    *_, last = (module for module in decoder.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        last.bias.copy_(torch.logit(mean.clamp(1e-3, 1 - 1e-3)))


def steps_of_epoch(args: argparse.Namespace, train: Tensor) -> int:
    """Mini-batches that each image is in once."""
    return math.ceil(len(train) / args.batch_size)


def fitted(args: argparse.Namespace, model: Function, guide: Function, train: Tensor, **options: Any) -> pv.Fitted:
    """Fit to bytes whose pixels are drawn anew each time, with a learning rate that falls over the second half."""
    return pv.fit(
        model,
        guide,
        train,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=schedules.decayed(args.lr, args.epochs * steps_of_epoch(args, train)),
        transform=datasets.resample,
        seed=args.seed,
        **options,
    )


def judged(args: argparse.Namespace, vae: pv.VAE, training: pv.Fitted, test: Tensor) -> Run:
    """ELBO and log p(x) of held-out images, in nats per image."""
    estimate = pv.log_evidence(vae.model, vae.guide, test, num_samples=args.samples, seed=args.seed).log_evidence
    found = {
        "elbo": pv.evaluate(vae.model, vae.guide, test, num_samples=20, seed=args.seed)["elbo"],
        "log_p": float(estimate.mean()),
        "log_p_standard_error_over_images": float(estimate.std() / len(test) ** 0.5),
        "steps": training.steps,
        "seconds": training.seconds,
    }
    return Run(vae, training.history, found)


def table(args: argparse.Namespace, title: str, runs: dict[str, Run], test: Tensor) -> str:
    """A line for each."""
    lines = [
        f"{title}; {len(test)} held-out images, nats per image of {test.shape[1]} pixels;",
        f"log p(x) is a lower bound from {args.samples} draws of each image, +- its standard error over images.",
        f"{'':30s}{'steps':>7s}{'minutes':>9s}{'ELBO':>10s}{'log p(x)':>10s}",
    ]
    for name, run in runs.items():
        row = run.found
        lines.append(
            f"{name:30s}{row['steps']:7.0f}{row['seconds'] / 60:9.1f}{row['elbo']:10.2f}{row['log_p']:10.2f}"
            f" +- {row['log_p_standard_error_over_images']:.2f}"
        )
    return "\n".join(lines)


def side_by_side(runs: dict[str, Run]) -> Figure:
    """ELBO and log p(x) of each, the best above."""
    figure, ax = plt.subplots(figsize=(7, 1.5 + 0.35 * len(runs)), layout="constrained")
    order = sorted(runs, key=lambda name: runs[name].found["log_p"])
    for place, name in enumerate(order):
        elbo, log_p = (runs[name].found[key] for key in ("elbo", "log_p"))
        ax.plot([elbo, log_p], [place, place], color="0.7", zorder=1)
        ax.scatter(elbo, place, color="C0", label="ELBO" if place == 0 else None)
        ax.scatter(log_p, place, color="C1", label="log p(x), at least" if place == 0 else None)
    ax.set_yticks(range(len(order)), order)
    ax.set(xlabel="nats per held-out image", title="After the same number of steps, on held-out images")
    ax.legend()
    return figure


def compare(
    args: argparse.Namespace,
    example: str,
    names: Iterable[str],
    title: str,
    code: str,
    train: Callable[[str, Tensor, Tensor], Run],
) -> None:
    """Train and judge each by its name, ``train(name, images, held-out images)``; print and save what came of it.

    Args:
        args: its options.
        example: its name.
        names: what to train.
        title: of the table.
        code: what an image is reconstructed from, in words.
        train: which trains one of them and judges it.
    """
    data, test, shape = images.load(args.data, args.folder)
    torch.manual_seed(args.seed)
    x, labels = datasets.resample(test.x)[: args.test_images], test.labels[: args.test_images]
    runs = {}
    for name in names:
        runs[name] = train(name, data.x, x)
        print(table(args, title, {name: runs[name]}, x).splitlines()[-1], flush=True)
    report = table(args, title, runs, x)
    print(report)
    best = max(runs, key=lambda name: runs[name].found["log_p"])
    vae = runs[best].vae
    figures = images.pictures(vae, runs[best].history, x, labels, shape, code)
    if len(runs) > 1:
        figures["side_by_side"] = side_by_side(runs)
    found = {"best": best, "runs": {name: run.found | {"history": run.history} for name, run in runs.items()}}
    tree = images.tree(vae, x[:20], labels[:20], args.draws, args.seed)
    results.save(args, found, figures, {example: tree}, report)
