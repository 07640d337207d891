"""The pictures of conditional.py."""

from typing import Any

import images
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae import plots


@torch.no_grad()
def of_labels(cvae: Any, vae: Any, x: Tensor, labels: Tensor, posterior: Tensor) -> dict[str, Figure]:
    """Digits on demand, how sure Bayes' rule is of each label, and the codes of held-out digits."""
    each = torch.eye(10)
    p, q = cvae.prior(each[labels]), cvae.encoder(images.beside(x, each[labels]))
    title = "p(y|x) = p(y) p(x|y) / p(x),\nmean over images of each label"
    return {
        "samples_by_label": draw_samples(means(cvae, each[:, None], torch.randn(12, 2))),
        "bayes_rule": images.draw_classes_of_labels(posterior, labels, title, are_labels=True),
        "latent_maps": draw_maps(vae.encode(x).mean, (q.mean - p.mean) / p.stddev, labels),
    }


@torch.no_grad()
def of_halves(cvae: Any, x: Tensor, c: Tensor) -> dict[str, Figure]:
    """Several lower halves that fit to the upper one of each image."""
    return {"completions": draw_completions(x, c, means(cvae, c, torch.randn(6, 1, 2)))}


def means(cvae: Any, c: Tensor, noise: Tensor) -> Tensor:
    """Mean images at z = μ(c) + σ(c) ε, for each ε."""
    p = cvae.prior(c)
    return cvae.decoder(images.beside(p.mean + p.stddev * noise, c)).mean


def draw_samples(means: Tensor) -> Figure:
    """A row for each label."""
    figure, ax = plt.subplots(figsize=(7, 6.4), layout="constrained")
    plots.image_grid(means.reshape(-1, 8, 8), 12, ax)
    ax.set_axis_on()
    ax.set(
        xticks=[],
        yticks=[9 * row + 3.5 for row in range(10)],
        yticklabels=range(10),
        ylabel="label y that was asked for",
    )
    ax.set(
        xlabel="12 draws of the noise ε, the same in every row", title="Digits on demand: z ~ p(z|y), mean of p(x|z, y)"
    )
    return figure


def draw_completions(x: Tensor, c: Tensor, means: Tensor) -> Figure:
    """Under each image its upper half, and several lower halves that fit to it."""
    halves = torch.cat([x[None], torch.full_like(x, 0.3)[None], means])  # grey: not shown to the model
    figure, ax = plt.subplots(figsize=(8, 5.6), layout="constrained")
    plots.image_grid(torch.cat([c.expand_as(halves), halves], -1).reshape(-1, 8, 8), 12, ax)
    ax.set_axis_on()
    rows = ["held-out image", "what is given", *(f"completion {number}" for number in range(1, 7))]
    ax.set(xticks=[], yticks=[9 * row + 3.5 for row in range(8)], yticklabels=rows)
    ax.set_title("What could be below? Each row another z ~ p(z|upper half),\nmean of p(lower half|z, upper half)")
    return figure


def draw_maps(alone: Tensor, told: Tensor, labels: Tensor) -> Figure:
    """Codes where z is all there is, and codes beside a label, in units of its prior."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    plots.latent_map(alone, labels, axes[0])
    axes[0].set_title("not told the label: z has to say which digit")
    plots.latent_map(told, labels, axes[1])
    axes[1].set_title("told the label y: z is left for how it is written")
    axes[1].set(xlabel="$(z_1 - \\mu_1(y)) / \\sigma_1(y)$", ylabel="$(z_2 - \\mu_2(y)) / \\sigma_2(y)$")
    figure.suptitle("Means of the guide for held-out digits, drawn as their labels")
    return figure
