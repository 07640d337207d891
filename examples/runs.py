"""How the examples fit a pair of model and guide and judge it; several VAEs of the same images side by side."""

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import images
import matplotlib.pyplot as plt
import pyro
import results
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, priors, schedules
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import latent_sites, log_density

Function = Callable[..., Any]


def fit(args: argparse.Namespace, model: Function, guide: Function, data: Any, **options: Any) -> pv.Fitted:
    """:func:`pyro_vae.fit` for as many epochs, with such batches, learning rate and seed as the example was told."""
    told = {name: getattr(args, name) for name in ("epochs", "batch_size", "lr", "seed", "compile")}
    return pv.fit(model, guide, data, **told | options)


def evaluate(
    pair: Any,
    *data: Tensor,
    seed: int,
    samples: int = 1000,
    elbo: ELBO | None = None,
    exact: Function | None = None,
    compile: bool = False,
) -> dict[str, float]:
    """The ELBO, its distortion and rate, and log p(x), of held-out data, in nats per datum.

    Args:
        pair: what has a ``model`` and a ``guide``.
        data: what both take.
        seed: of the draws.
        samples: draws of each datum for log p(x); the ELBO takes 20.
        elbo: which sums over what the guide enumerates.
        exact: a model of two latent dimensions at most, which are integrated for log p(x) in the place of draws.
        compile: whether draws are weighted by a compiled graph.
    """
    if exact is None:
        estimate = pv.log_evidence(pair.model, pair.guide, *data, num_samples=samples, seed=seed, compile=compile)
        log_p = estimate.log_evidence
    else:
        log_p = exact_log_p(exact, *data)
    return {
        **pv.evaluate(pair.model, pair.guide, data, elbo=elbo, num_samples=20, seed=seed),
        "log_p": log_p.mean().item(),
        "log_p_standard_error_over_images": log_p.std().item() / len(log_p) ** 0.5,
    }


def exact_log_p(model: Function, x: Tensor) -> Tensor:
    """Exact log p(x) of two latent dimensions, in parts: one hard image does not refine the quadrature of all."""
    return torch.cat([pv.exact.log_evidence(model, rows, tolerance=1e-2) for rows in x.split(50)])


@torch.no_grad()
def judge_layers(
    pair: Any, x: Tensor, seed: int, samples: int, than: Tensor | None = None
) -> tuple[dict[str, float], Tensor]:
    """ELBO, log p(x) and the rate of each latent, E_q[log q - log p], in nats per datum; log p(x) of each datum.

    ``than`` is the latter of another pair: the mean gain over it, and its standard error, are then found as well.
    """
    with seeded(seed), pyro.plate("draws", 50, dim=-2):
        q = poutine.trace(pair.guide).get_trace(x)
        p = poutine.trace(poutine.replay(pair.model, q)).get_trace(x)
    rates = {
        name: (log_density(site) - log_density(p.nodes[name])).mean().item() for name, site in latent_sites(q).items()
    }
    log_p = pv.log_evidence(pair.model, pair.guide, x, num_samples=samples, seed=seed).log_evidence
    elbo = log_density(p.nodes["x"]).mean().item() - sum(rates.values())
    found = {"log_p": log_p.mean().item(), "elbo": elbo} | {f"rate_{name}": rate for name, rate in rates.items()}
    if than is not None:
        gain = log_p - than
        found |= {"gain": gain.mean().item(), "gain_error": gain.std().item() / len(gain) ** 0.5}
    return found, log_p


def plain_vae(pixels: int, latent: int, network: networks.NetworkFactory) -> pv.VAE:
    """A VAE of binary pixels with one standard normal for a prior: what the others are held against."""
    encoder, decoder = guides.DiagonalNormal(pixels, latent, network), likelihoods.Bernoulli(latent, pixels, network)
    return pv.VAE(priors.StandardNormal(latent), encoder, decoder)


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


def steps_of_epoch(args: argparse.Namespace, data: Tensor) -> int:
    """Mini-batches that each row is in once."""
    return math.ceil(len(data) / args.batch_size)


def fit_resampled(
    args: argparse.Namespace, model: Function, guide: Function, train: Tensor, **options: Any
) -> pv.Fitted:
    """Fit to bytes whose pixels are drawn anew each time, with a learning rate that falls over the second half."""
    falling = schedules.decayed(args.lr, args.epochs * steps_of_epoch(args, train))
    return fit(args, model, guide, train, lr=falling, transform=datasets.resample, **options)


def judged(args: argparse.Namespace, vae: pv.VAE, training: pv.Fitted, test: Tensor) -> Run:
    """What came of a VAE, judged on held-out images."""
    found = evaluate(vae, test, seed=args.seed, samples=args.samples, compile=args.compile)
    return Run(vae, training.history, found | {"steps": training.steps, "seconds": training.seconds})


def table(args: argparse.Namespace, title: str, runs: dict[str, Run], test: Tensor) -> str:
    """A line for each."""
    columns = {
        "steps": "{steps}",
        "minutes": "{minutes:.1f}",
        "ELBO": "{elbo:.2f}",
        "log p(x)": "{log_p:.2f} +- {log_p_standard_error_over_images:.2f}",
    }
    rows = {name: run.found | {"minutes": run.found["seconds"] / 60} for name, run in runs.items()}
    return "\n".join(
        [
            f"{title}; {len(test)} held-out images, nats per image of {test.shape[1]} pixels;",
            f"log p(x), in expectation at least: by {args.samples} draws of each image, +- standard error over images.",
            results.table(" " * 28, rows, columns),
        ]
    )


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
