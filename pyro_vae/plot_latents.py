"""Pictures of the latent space: where codes lie, and how close the guide is to the posterior."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pyro_vae import exact
from pyro_vae.joint_density import Guide, Problem
from pyro_vae.plot_axes import MARKERS, axes_or_new
from pyro_vae.randomness import seeded

__all__ = ["latent_map", "posterior"]


def latent_map(z: Tensor, labels: Tensor, ax: Axes | None = None) -> Axes:
    """Where in the latent space does each class lie? Each point is drawn as its label.

    Args:
        z: ``(N, 2)``, or ``(N, 1)``: then each class is a row of points, jittered.
        labels: ``(N,)``.
        ax: where to draw.

    >>> latent_map(torch.randn(20, 2), torch.arange(20) % 2).get_xlabel()
    '$z_1$'
    """
    if z.dim() != 2 or z.shape[1] > 2:
        raise ValueError(f"z: got shape {tuple(z.shape)}; accepted is (N, 1) or (N, 2), such as two chosen columns")
    ax = axes_or_new(ax)
    for index, label in enumerate(labels.unique().tolist()):
        rows = z[labels == label]
        marker = f"${label}$" if z.shape[1] > 1 else MARKERS[index % len(MARKERS)]
        jitter = torch.rand(len(rows), generator=torch.Generator().manual_seed(index)) - 0.5
        across = rows[:, 1] if z.shape[1] > 1 else index + 0.6 * jitter
        size = 30 if z.shape[1] > 1 else 9
        colour = f"C{int(label) % 10}"  # a label has its colour in every picture, whichever others are there
        ax.scatter(rows[:, 0], across, s=size, marker=marker, color=colour, alpha=0.7, linewidths=0)
    if z.shape[1] > 1:
        ax.set(xlabel="$z_1$", ylabel="$z_2$")
    else:
        classes = labels.unique().tolist()
        ax.set(xlabel="$z$", ylabel="label (with jitter)", yticks=range(len(classes)), yticklabels=classes)
    return ax


@torch.no_grad()
def posterior(model: Callable[..., Any], guide: Callable[..., Any], *datum: Tensor, ax: Axes | None = None) -> Axes:
    """How close is q(z | x) to the exact p(z | x)? Both, for one datum and a latent of one variable.

    A discrete latent is drawn as bars, one for each state; a continuous one as densities, over the value of its site
    or, of a Gumbel-softmax of two classes, over the log-ratio of the two.

    Args:
        model: a Pyro model of one latent site of one variable.
        guide: its guide.
        datum: one row of the data, ``(1, *data_shape)``.
        ax: where to draw.

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(1),
    ...     encoder=guides.DiagonalNormal(2, 1, networks.linear()),
    ...     decoder=likelihoods.Normal(1, 2, networks.linear()),
    ... )
    >>> posterior(vae.model, vae.guide, torch.zeros(1, 2)).get_ylabel()
    'density'
    """
    ax = axes_or_new(ax)
    problem = Problem(model, datum, "data")
    if problem.num_data != 1:
        raise ValueError(f"datum: got {problem.num_data} rows; accepted is one, `x[:1]`")
    q = Guide(problem, guide)
    p = exact.posterior(model, *datum)
    name, _ = problem.single_site()
    if problem.is_discrete:
        states = p.enumerate_support()
        places = np.arange(len(states))
        ax.bar(places - 0.2, p.log_prob(states)[:, 0].exp().tolist(), 0.4, label="exact $p(z|x)$", color="0.75")
        ax.bar(
            places + 0.2,
            q.log_prob({name: states})[:, 0].exp().tolist(),
            0.4,
            label="guide $q(z|x)$",
            color="tab:red",
            hatch="//",
        )
        ax.set(xlabel=f"state of ${name}$", ylabel="probability", xticks=places, ylim=(0, 1.05))
        return ax
    chart = problem.chart()
    if chart.dims != 1:
        raise ValueError(f"model: its latent {name!r} has {chart.dims} dimensions; accepted is one variable")
    with seeded(0):
        drawn = [chart.to_points(draws.sample((400,))) for draws in (p, q.site()["fn"])]
    low, high = torch.cat(drawn).quantile(torch.tensor([0.002, 0.998])).tolist()
    grid = torch.linspace(low - 0.2 * (high - low), high + 0.2 * (high - low), 600)
    values = chart.to_site(grid[:, None, None])
    ax.fill_between(grid, p.log_prob(values)[:, 0].exp(), color="0.75", label="exact $p(z|x)$")
    ax.plot(grid, q.log_prob({name: values})[:, 0].exp(), "--", color="tab:red", label="guide $q(z|x)$")
    label = f"log-ratio of the classes of ${name}$" if chart.on_simplex else f"value of site ${name}$"
    ax.set(xlabel=label, ylabel="density", ylim=(0, None))
    return ax
