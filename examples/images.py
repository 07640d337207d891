"""Images in the examples: where they come from, and what is drawn of them."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import results
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

import pyro_vae as pv
from pyro_vae import datasets, plots

Shape = tuple[int, int]


def load(data: str, folder: Path | None = None) -> tuple[datasets.Dataset, datasets.Dataset, Shape]:
    """Training images, held-out images, and their height and width."""
    if data == "digits":
        return datasets.digits("train"), datasets.digits("test"), (8, 8)
    try:
        return datasets.mnist("train", folder), datasets.mnist("test", folder), (28, 28)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{error}\n\nNo network? `--folder FOLDER` reads MNIST's four IDX files from a folder, and `--data digits` "
            "trains on smaller digits that need no download."
        ) from None


def binarized(args: argparse.Namespace) -> tuple[datasets.Dataset, datasets.Dataset, Shape]:
    """Training images and the first held-out ones, pixels 0 or 1, and height and width: those that the options name."""
    train, test, shape = load(args.data, args.folder)
    few = slice(args.test_images)
    return (
        datasets.Dataset(datasets.binarize(train.x), train.labels),
        datasets.Dataset(datasets.binarize(test.x[few]), test.labels[few]),
        shape,
    )


def hide(labels: Tensor, count: int) -> Tensor:
    """Labels of which so many are left, as many of each digit; the others are -1."""
    left = torch.cat([(labels == digit).nonzero()[: count // 10, 0] for digit in range(10)])
    return torch.full_like(labels, -1).index_copy(0, left, labels[left])


@torch.no_grad()
def pictures(
    vae: pv.VAE, history: Mapping[str, list[float]], x: Tensor, labels: Tensor, shape: Shape, code: str
) -> dict[str, Figure]:
    """Training curves, latent map, reconstructions, samples and, of two Gaussian dimensions, the decoder's manifold.

    Args:
        vae: trained.
        history: of its training.
        x: held-out images as the likelihood takes them.
        labels: theirs.
        shape: height and width.
        code: what an image is reconstructed from, in words.
    """
    figures: dict[str, Figure] = {}

    def canvas(name: str, title: str, size: tuple[float, float]) -> Axes:
        figures[name], ax = plt.subplots(figsize=size, layout="constrained")
        ax.set_title(title)
        return ax

    figures["training"], (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    figures["training"].suptitle("Training: ELBO = -distortion - rate")
    plots.training_curves(history, left, terms=["elbo", "distortion"])
    plots.training_curves(history, right, terms=["rate"])
    means = mean_code(vae, x[:1500])
    labels = labels[:1500]
    title = "Means of q(z|x) of held-out images, by label"
    if means.shape[1] <= 2:
        plots.latent_map(means, labels, canvas("latent_map", title, (7, 6)))
    else:
        ax = canvas("latent_map", f"{title}:\nthe two directions in which they vary most", (7, 6))
        plots.latent_map(principal_components(means), labels, ax)
        ax.set(xlabel="first principal component", ylabel="second principal component")
    ax = canvas("reconstructions", f"Held-out images, above their reconstructions from {code}", (9, 1.9))
    plots.reconstructions(vae.reconstruct, x[:12], shape, ax=ax)
    ax = canvas("samples", "Samples: z from the prior, mean of p(x|z)", (6, 3.4))
    plots.samples(lambda count: vae.generate(count, mean=True), shape, ax=ax)
    if isinstance(vae.prior, pv.priors.StandardNormal) and means.shape[1] == 2:
        ax = canvas("manifold", "What each place in the latent space decodes to", (6, 6.2))
        plots.manifold(lambda z: vae.decode(z).mean, shape, size=15 if shape == (8, 8) else 20, ax=ax)
    return figures


def mean_code(vae: pv.VAE, x: Tensor) -> Tensor:
    """The mean of q(z|x), or of what the decoder reads where z itself has none in closed form, ``(N, D)``."""
    q = vae.encode(x)
    try:
        return q.mean.flatten(1)
    except NotImplementedError:
        return vae.code(q.sample(torch.Size([100]))).mean(0).flatten(1)


def principal_components(values: Tensor) -> Tensor:
    """``(N, D)`` in the two directions in which it varies most, ``(N, 2)``."""
    centred = values - values.mean(0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T


def beside(x: Tensor, y: Tensor) -> Tensor:
    """``(*, D)`` and ``(*, K)`` side by side, ``(*, D + K)``; enumeration gives y a dimension more on the left."""
    shape = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    return torch.cat([x.expand(*shape, -1), y.expand(*shape, -1)], dim=-1)


def one_hot(labels: Tensor) -> Tensor:
    """Labels ``(N,)`` as ``(N, 10)``; of a missing one, which is -1, whatever comes."""
    return functional.one_hot(labels.clamp(min=0), 10).to(torch.get_default_dtype())


def draw_training(histories: Mapping[str, Mapping[str, list[float]]], title: str | None = None) -> Figure:
    """The objective of two pairs, epoch by epoch; a title that says what is solid and dashed replaces the legends."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for ax, (name, history) in zip(axes, histories.items(), strict=True):
        plots.training_curves(history, ax, terms=["elbo"])
        ax.set_title(name)
        if title:
            ax.get_legend().remove()
    figure.suptitle(title or "")
    return figure


def draw_classes_of_labels(posterior: Tensor, labels: Tensor, title: str, are_labels: bool = False) -> Figure:
    """How the images of each label fall into classes, of which they have the probabilities ``(N, K)``.

    Classes of one label stand side by side; those that are labels themselves, in their order.
    """
    table = torch.stack([posterior[labels == label].mean(0) for label in range(10)]).nan_to_num()
    order = (table / table.sum(0)).nan_to_num().argmax(0).argsort()
    what = "number of the class, sorted by the label that it holds most of"
    if are_labels:
        order, what = torch.arange(10), "label that is found"
    figure, ax = plt.subplots(figsize=(0.3 * table.shape[1] + 2.4, 4.2), layout="constrained")
    shown = ax.imshow(table[:, order].numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
    ax.set(xlabel=what, ylabel="label", yticks=range(10))
    ax.set_xticks(range(len(order)), order.tolist(), fontsize=8)
    ax.set_title(title)
    figure.colorbar(shown, label="probability")
    return figure


def tree(pair: Any, x: Tensor, labels: Tensor, draws: int, seed: int, *given: Tensor, **dims: list[str]) -> xr.DataTree:
    """Draws for ArviZ: of held-out images, with their labels along ``obs``.

    Args:
        pair: what has a ``model`` and a ``guide``.
        x: images.
        labels: theirs.
        draws: how many.
        seed: of the draws.
        given: what model and guide take besides.
        dims: names of a latent's dimensions.
    """
    coords = {"label": ("obs", labels)}
    return results.tree(pair, x, *given, draws=draws, seed=seed, dims={"x": ["pixel"]} | dims, coords=coords)
