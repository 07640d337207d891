"""The pictures of the mixture example."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

import pyro_vae as pv
from pyro_vae import plots

VAES = ("Gaussian", "relaxed Bernoulli, relaxed", "Gumbel-softmax, relaxed", "enumerated Bernoulli", "score function")


def data(train: pv.datasets.TwoGaussians) -> Figure:
    """The training points, by cluster."""
    figure, ax = plt.subplots(figsize=(5, 4.6), layout="constrained")
    for label, marker in ((0, "o"), (1, "s")):
        rows = train.x[train.labels == label]
        ax.scatter(rows[:, 0], rows[:, 1], s=10, marker=marker, alpha=0.5, label=f"z = {label}: {len(rows)} points")
    ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal", title="z ~ Bernoulli(½), x ~ N(±(1, 1), 0.1²)")
    ax.legend()
    return figure


def training(histories: Mapping[str, Mapping[str, Sequence[float]]], truth: float) -> Figure:
    """How the ELBO of each method rose."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.5), sharex=True, sharey=True, layout="constrained")
    for ax, (name, history) in zip(axes.flat, histories.items(), strict=True):
        steps = range(1, len(history["elbo"]) + 1)
        ax.axhline(truth, color="0.5", linestyle=":", label=f"log p(x) of the truth on these data, {truth:.3f}")
        ax.plot(steps, history["elbo"], color="black", linewidth=0.6, label="ELBO, or log p(x) where there is no guide")
        ax.set(title=name, ylim=(-6, 2))
        if name == "naive Monte Carlo":
            ax.text(
                0.5,
                0.35,
                "trains on the K-sample bound;\nits ELBO, at q = prior,\nfalls off the scale",
                ha="center",
                transform=ax.transAxes,
            )
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    for ax in axes[-1]:
        ax.set_xlabel("step")
    figure.supylabel("nats per point")
    figure.suptitle("ELBO of each method as it trains, on the training data")
    return figure


def generated(
    fresh: Tensor, drawn: Mapping[str, Tensor], rows: Mapping[str, Mapping[str, float]], truth: float
) -> Figure:
    """Points that each fitted model generates, beside fresh data."""
    panels = {"fresh data": fresh, **drawn}
    figure, axes = plt.subplots(3, 4, figsize=(12, 9.4), sharex=True, sharey=True, layout="constrained")
    for ax, (name, points) in zip(axes.flat, panels.items(), strict=False):
        ax.scatter(points[:1000, 0], points[:1000, 1], s=4, alpha=0.4, color="black", linewidths=0)
        lost = f"\nloses {truth - rows[name]['log_p']:.3f} nats" if name in rows else f"\nthe truth: {truth:.3f} nats"
        ax.set(title=name + lost, xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal")
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    figure.suptitle("1000 points from each fitted model; nats per point that its log p(x) loses on test data")
    return figure


@torch.no_grad()
def latent(vaes: Mapping[str, pv.VAE], test: pv.datasets.TwoGaussians) -> Figure:
    """Where each encoder puts the two clusters: draws from q(z | x), as the decoder reads them."""
    figure, axes = plt.subplots(1, len(vaes), figsize=(15, 3.6), layout="constrained")
    for ax, (name, vae) in zip(axes, vaes.items(), strict=True):
        z = vae.encode(test.x[:500]).sample()
        code = vae.code(z).flatten(1)[:, -1:]
        plots.latent_map(code, test.labels[:500], ax)
        spread = "" if name != "Gaussian" else f"\nsd of the codes {float(code.std()):.2f}, of the prior 1"
        ax.set(title=name + spread, xlabel="code read by the decoder", ylabel="")
    axes[0].set_ylabel("true cluster (with jitter)")
    figure.suptitle("A draw from q(z|x) for each of 500 test points; which code a cluster gets is arbitrary")
    return figure


def posteriors(vaes: Mapping[str, pv.VAE]) -> Figure:
    """q(z | x) drawn on the exact p(z | x), for a point of each cluster and one between them."""
    points = {"x = (-1, -1)": [-1.0, -1.0], "x = (0, 0), where no data are": [0.0, 0.0], "x = (1, 1.1)": [1.0, 1.1]}
    figure, axes = plt.subplots(len(points), len(vaes), figsize=(15, 7.5), layout="constrained")
    for row, (where, point) in zip(axes, points.items(), strict=True):
        for ax, (name, vae) in zip(row, vaes.items(), strict=True):
            plots.posterior(vae.model, vae.guide, torch.tensor([point]), ax=ax)
            ax.set_title(f"{name}\n{where}", fontsize=9)
            ax.get_legend().remove()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.suptitle("Each guide on the exact posterior, for three points")
    return figure


def monte_carlo(sizes: Sequence[int], errors: Mapping[str, Tensor]) -> Figure:
    """The error of K-sample estimates of log p(x), proposals from the prior beside those from q."""
    figure, ax = plt.subplots(figsize=(5.5, 4), layout="constrained")
    ax.loglog(sizes, errors["prior"], "o-", color="black", label="samples from the prior: naive Monte Carlo")
    ax.loglog(sizes, errors["q"], "s--", color="tab:red", label="samples from q(z|x), weighted")
    ax.set(
        xlabel="samples K",
        ylabel="mean |error| of log p(x), nats",
        title="Gaussian VAE: error of log p(x)",
    )
    ax.legend()
    return figure


def plates(vaes: Mapping[str, pv.VAE], x: Tensor) -> Figure:
    """Model and guide of a Gaussian and of a relaxed VAE."""
    figure, axes = plt.subplots(1, len(vaes), figsize=(5 * len(vaes), 4), layout="constrained")
    for ax, (name, vae) in zip(axes, vaes.items(), strict=True):
        plots.plate_diagram(vae.model, x, guide=vae.guide, ax=ax)
        ax.set_title(f"{name.partition(',')[0]}: model solid, guide dashed", fontsize=11)
    return figure
