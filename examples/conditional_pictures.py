"""The pictures of conditional.py."""

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae import plots


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


def draw_bayes(posterior: Tensor, labels: Tensor) -> Figure:
    """How sure Bayes' rule is of each label."""
    shares = torch.stack([posterior[labels == label].mean(0) for label in range(10)]).nan_to_num()
    figure, ax = plt.subplots(figsize=(6, 5), layout="constrained")
    shown = ax.imshow(shares.numpy(), cmap="Greys", vmin=0, vmax=1)
    ax.set(xticks=range(10), yticks=range(10), xlabel="label y", ylabel="true label of the held-out image")
    ax.set_title("p(y|x) = p(y) p(x|y) / p(x), mean over images of each label")
    figure.colorbar(shown, label="probability")
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
