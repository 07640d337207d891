"""The pictures of semi_supervised.py."""

from collections.abc import Mapping
from typing import Any

import images
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae import datasets, plots


@torch.no_grad()
def draw(
    m2: Any, test: datasets.Dataset, histories: Mapping[str, Mapping[str, list[float]]], shape: images.Shape
) -> dict[str, Figure]:
    """All of them: of the M2 that sums over classes, held-out images, and the training of both."""
    posterior = m2.classifier(test.x).mean[:, 0]
    found = "The class that held-out images\nof each label are given: mean q(y|x)"
    training = (
        "Solid: the objective, with alpha taken for 1. Dashed: held-out images without labels, an ELBO of log p(x)"
    )
    return {
        "analogies": draw_analogies(m2, test.x, test.labels, shape),
        "classes": images.draw_classes_of_labels(posterior, test.labels, found, are_labels=True),
        "training": images.draw_training({f"Missing y {name}": each for name, each in histories.items()}, training),
    }


def draw_analogies(m2: Any, x: Tensor, labels: Tensor, shape: images.Shape) -> Figure:
    """Held-out images, each in its style as every class."""
    first = torch.stack([x[labels == digit][0] for digit in labels.unique()])
    y = m2.classifier(first).mean[:, 0].argmax(1)
    z = m2.encoder(images.beside(first, images.one_hot(y))).mean
    means = m2.decoder(images.beside(z[:, None], torch.eye(10))).mean  # (images, 10, pixels)
    shown = torch.cat([first[:, None], torch.zeros_like(means[:, :1]), means], 1).reshape(-1, *shape)
    figure, ax = plt.subplots(figsize=(7, 6.2), layout="constrained")
    plots.image_grid(shown, 12, ax)
    figure.suptitle("Left: held-out images. Right: in the style z of each, the classes y = 0, 1, ... 9")
    return figure
