"""The pictures of two_layers.py."""

from typing import Any

import images
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyro_vae import datasets, plots


def draw(
    two: dict[str, Any],
    rows: dict[str, dict[str, float]],
    histories: dict[str, dict[str, list[float]]],
    test: datasets.Dataset,
    shape: images.Shape,
) -> dict[str, Figure]:
    """All of them: of the models of two layers, the table's rows, the training, and held-out images."""
    return {
        "training": draw_training(histories),
        "rates": draw_rates(rows),
        "latent_maps": draw_maps(two, test.x, test.labels),
        "samples_by_layer": draw_samples(two, shape),
    }


def draw_training(histories: dict[str, dict[str, list[float]]]) -> Figure:
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, style in zip(histories, ["k-", "C0-", "C0--", "C1-", "C1--"], strict=True):
        curve = histories[name]["validation_elbo"]
        ax.plot(range(1, len(curve) + 1), curve, style, label=name)
    ends = [history["validation_elbo"][-1] for history in histories.values()]
    ax.set(xlabel="epoch", ylabel="ELBO, nats per held-out image", ylim=(min(ends) - 8, max(ends) + 2))
    ax.set_title("ELBO of held-out images; during a warm-up another objective is trained")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return figure


def draw_rates(rows: dict[str, dict[str, float]]) -> Figure:
    """Stacked: what each layer carries."""
    figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    first, second = ([row.get(f"rate_{name}", 0.0) for row in rows.values()] for name in ("z1", "z2"))
    ax.barh(list(rows), second, color="tab:orange", hatch="//", edgecolor="white", label="z2")
    ax.barh(list(rows), first, left=second, color="tab:blue", label="z1")
    ax.invert_yaxis()
    ax.set(
        xlabel="rate, nats per held-out image",
        title="Which layer is used? A layer without a bar has fallen onto its prior",
    )
    ax.legend(loc="lower right")
    return figure


@torch.no_grad()
def draw_maps(two: dict[str, Any], x: Tensor, labels: Tensor) -> Figure:
    """Means of q(z2|x), or of q(z2|z1) at the mean of q(z1|x)."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 9.4), layout="constrained")
    for ax, (name, pair) in zip(axes.flat, two.items(), strict=True):
        means = pair.q_z2(pair.q_z1(x).mean if pair.bottom_up else x).mean
        plots.latent_map(means if means.shape[1] <= 2 else images.principal_components(means), labels, ax)
        ax.set(title=name, xlabel="z2, first direction", ylabel="z2, second direction")
    figure.suptitle("What the top layer knows: means of q(z2|·) of held-out images, drawn as their labels")
    return figure


@torch.no_grad()
def draw_samples(two: dict[str, Any], shape: images.Shape) -> Figure:
    """Rows of one z2 each: alike within a row where z2 says what is drawn, and z1 only how."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 8.4), layout="constrained")
    for ax, (name, pair) in zip(axes.flat, two.items(), strict=True):
        z1 = pair.p_z1(pair.p_z2().sample(torch.Size([8]))).sample(torch.Size([10])).transpose(0, 1)
        plots.image_grid(pair.p_x(z1).mean.reshape(-1, *shape), 10, ax)
        ax.set_title(name)
    figure.suptitle("Samples by layer: each row one z2 ~ p(z2), along it ten z1 ~ p(z1|z2), mean of p(x|z1)")
    return figure
