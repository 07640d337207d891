"""The pictures of ``gaussian_mixture_vae.py``."""

from collections.abc import Mapping
from typing import Any

import images
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_vae import datasets, plots


@torch.no_grad()
def draw(
    mixture: Any,
    standard: Any,
    test: datasets.Dataset,
    histories: Mapping[str, Mapping[str, list[float]]],
    shape: images.Shape,
) -> dict[str, Figure]:
    """All of them: of the mixture, the VAE that it is held against, held-out images, and the training of both."""
    prior, posterior = mixture.components(), mixture.classifier(test.x).mean[:, 0]
    found = posterior.argmax(1)
    z = torch.cat([prior.mean[None], prior.sample(torch.Size([11]))])
    drawn = mixture.decoder(z).mean.transpose(0, 1)  # (K, 12, pixels)
    title = "Where held-out images\nof each label fall: mean q(y|x)"
    figures = {
        "samples": samples(drawn, found, test.labels, shape),
        "clusters": images.draw_classes_of_labels(posterior, test.labels, title),
        "training": images.draw_training(histories),
    }
    if prior.mean.shape[1] == 2:
        likeliest = one_hot(found, len(prior.mean)).to(test.x.dtype)
        codes = standard.encode(test.x).mean, mixture.encoder(images.beside(test.x, likeliest)).mean
        figures["latent"] = latent(codes, test.labels, prior.mean, prior.stddev)
    return figures


def latent(codes: tuple[Tensor, Tensor], labels: Tensor, loc: Tensor, scale: Tensor) -> Figure:
    """Codes of held-out images under the standard normal and under the mixture, with the priors' ellipses."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6.4), layout="constrained")
    figure.suptitle(
        "Codes of held-out images, each drawn as its true label; ellipses: two standard deviations of the prior"
    )
    plots.latent_map(codes[0], labels, left)
    _ellipses(torch.zeros(1, 2), torch.ones(1, 2), left, numbers=False)
    left.set_title("One standard normal")
    plots.latent_map(codes[1], labels, right)
    _ellipses(loc, scale, right, numbers=True)
    right.set_title(f"A mixture of {len(loc)}, learnt without labels")
    for ax in (left, right):
        ax.set_aspect("equal", adjustable="datalim")
    return figure


def _ellipses(loc: Tensor, scale: Tensor, ax: Axes, numbers: bool) -> None:
    for index, (centre, radius) in enumerate(zip(loc.tolist(), scale.tolist(), strict=True)):
        width, height = 4 * radius[0], 4 * radius[1]
        ax.add_patch(Ellipse((centre[0], centre[1]), width, height, fill=False, color="black", linewidth=1.2))
        if numbers:
            box = {"facecolor": "white", "alpha": 0.8, "pad": 1}
            ax.text(centre[0], centre[1], f"#{index}", weight="bold", ha="center", va="center", bbox=box)


def samples(drawn: Tensor, found: Tensor, labels: Tensor, shape: images.Shape) -> Figure:
    """A row for each component ``(K, 12, pixels)``: the image at its centre, then images at draws from it."""
    size = len(drawn)
    figure, axes = plt.subplots(size, 1, figsize=(9, 0.62 * size + 0.7), layout="constrained")
    for index, ax in enumerate(axes):
        plots.image_grid(drawn[index].reshape(-1, *shape), 12, ax)
        held = labels[found == index]
        label = int(held.mode().values) if len(held) else 0
        most = f"\n{int((held == label).sum())} of label {label}" if len(held) else ""
        ax.text(
            -0.01, 0.5, f"#{index}: {len(held)} images{most}", size=8, ha="right", va="center", transform=ax.transAxes
        )
    figure.suptitle("A row for each component: the image at its centre, then at eleven draws z | y")
    return figure
