"""Pictures of the latent space: a map of the codes, and the guide q(z | x) next to the exact posterior p(z | x)."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyro_vae import exact
from pyro_vae._utils.data import data_tensors
from pyro_vae._utils.param_store import without_training
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import (
    class_labels,
    first_index,
    is_integer,
    nonempty_string,
    real_tensor,
)
from pyro_vae.arguments import any_arguments
from pyro_vae.exact.coordinates import LatentCoordinates
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.exact.model_density import ModelDensity
from pyro_vae.exact.quadrature import QuadratureError
from pyro_vae.model_guide import ModelGuide
from pyro_vae.plots.axes import axes_or_new, legend_below, name_rows, wrap
from pyro_vae.plots.colours import EXACT, GUIDE, style

__all__ = ["latent_map", "posterior"]

_EXACT, _GUIDE = "exact $p(z|x)$", "guide $q(z|x)$"
_MASSES, _GREYS = (0.99, 0.9, 0.5), ("0.9", "0.78", "0.6")
_STYLES: tuple[Any, ...] = (":", "--", "-")


def latent_map(z: Tensor, labels: Any, *, name: str = "z", ax: Axes | None = None) -> Axes:
    """Where in the latent space does each class lie? A point for each code, in the colour and marker of its class.

    Codes of one variable have a row for each class, with jitter. Codes of two variables are drawn as they are. Codes of
    more variables are projected on their first two principal components; the axes state their share of the variance.
    If all labels are whole numbers from 0 to 9, each point is drawn as its label.

    Args:
        z: codes, ``(N, D)``, such as ``vae.encode(x).mean``.
        labels: the class of each code, ``(N,)``: whole numbers or names.
        name: what the codes are, on the axes.

    Raises:
        TypeError, ValueError: if codes or labels have another type or shape, or a code is not finite.

    .. plot::
        :include-source:
        :filename-prefix: latent_map

        >>> import torch
        >>> import pyro_vae as pv
        >>> from pyro_vae import guides, likelihoods, networks, priors
        >>> _ = torch.manual_seed(0)
        >>> digits, net = pv.datasets.digits("train"), networks.mlp([64])
        >>> vae = pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(64, 2, net), likelihoods.Bernoulli(2, 64, net))
        >>> x = pv.datasets.binarize(digits.x)
        >>> fitted = pv.fit(vae.model, vae.guide, x, epochs=25, batch_size=100, lr=1e-2)
        >>> ax = pv.plots.latent_map(vae.encode(x[:600]).mean, digits.labels[:600])
        >>> ax.get_xlabel()
        'z[0]'
    """
    expected = "a tensor (N, D) of codes, such as `vae.encode(x).mean`"
    if real_tensor(z, "z", expected).dim() != 2 or 0 in z.shape:
        raise ValueError(f"`z` must be {expected}, got shape {tuple(z.shape)}")
    if (place := first_index(lambda part: ~part.isfinite(), z)) is not None:
        raise ValueError(f"`z` must hold finite numbers, got {z[tuple(place)].item()} at {tuple(place)}")
    nonempty_string(name, "name")
    classes, members = np.unique(class_labels(labels, "labels", len(z)), return_inverse=True)
    classes = classes.tolist()
    numerals = all(is_integer(label) and 0 <= label < 10 for label in classes)
    points, axis_labels = _plane(z.detach().cpu().double(), name)
    new, ax = ax is None, axes_or_new(ax)
    for row, label in enumerate(classes):
        look, rows = style(label if numerals else row), points[members == row]
        jitter = torch.rand(len(rows), generator=torch.Generator("cpu").manual_seed(row), device="cpu") - 0.5
        y, size, marker = row + 0.6 * jitter, 20, look["marker"]
        if points.shape[1] == 2:
            y, size, marker = rows[:, 1], 30, f"${label}$" if numerals else marker
        ax.scatter(
            rows[:, 0], y, s=size, marker=marker, color=look["color"], alpha=0.85, linewidths=0, label=str(label)
        )
    ax.set(**dict(zip(("xlabel", "ylabel"), axis_labels, strict=False)))
    if points.shape[1] == 1:
        ax.set_ylabel("label, with jitter")
        name_rows(ax, [wrap(str(label), 24) for label in classes], grow=new)
    elif not numerals:
        legend_below(ax, grow=new)
    return ax


def _plane(z: Tensor, name: str) -> tuple[Tensor, list[str]]:
    """Return codes of at most two variables, and their names: principal components if there are more."""
    if z.shape[1] <= 2:
        return z, [wrap(name if z.shape[1] == 1 else f"{name}[{index}]", 30) for index in range(z.shape[1])]
    centred = z - z.mean(0)
    _, lengths, directions = torch.linalg.svd(centred, full_matrices=len(z) == 1)
    directions = directions[:2] * torch.where(directions[:2].sum(1, keepdim=True) < 0, -1.0, 1.0)  # a fixed sign
    shares = [*(lengths.square() / lengths.square().sum()).nan_to_num().tolist(), 0.0]
    names = [wrap(f"principal component {i + 1} of {name}", 40) for i in range(2)]
    return centred @ directions.T, [f"{names[i]},\n{100 * shares[i]:.0f} % of the variance" for i in range(2)]


@any_arguments
@torch.no_grad()
@without_training
def posterior(model: Function, guide: Function, *datum: Data, ax: Axes | None = None) -> Axes:
    r"""How close is q(z | x) to the exact p(z | x), for one datum and a latent of one or two variables?

    Each state of a discrete latent has two bars. A continuous latent of one variable has two densities; one of two
    variables has regions of highest density with a probability of 50, 90 and 99 %, filled for p and lines for q. The
    axes are the values of the site or, for Gumbel-softmax variables, the log-ratios of their classes. The title of the
    legend is the gap :math:`\mathrm{KL}(q \Vert p)` in nats, if :func:`pyro_vae.exact.kl` can compute it.

    Args:
        model, guide: a Pyro model with one latent site, and its guide.
        datum: one row of the data, ``(1, *data_shape)``.

    Raises:
        ValueError: if there is more than one row, or the latent has more variables.
        pyro_vae.exact.QuadratureError: if the exact posterior cannot be computed.

    .. plot::
        :include-source:
        :filename-prefix: posterior

        >>> import torch
        >>> import pyro_vae as pv
        >>> from pyro_vae import guides, likelihoods, networks, priors
        >>> _ = torch.manual_seed(0)
        >>> data, net = pv.datasets.two_gaussians(500, seed=0), networks.mlp([16])
        >>> vae = pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(2, 2, net), likelihoods.Normal(2, 2, net))
        >>> fitted = pv.fit(vae.model, vae.guide, data.x, epochs=150, lr=2e-2)
        >>> ax = pv.plots.posterior(vae.model, vae.guide, data.x[:1])
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('z[0]', 'z[1]')
    """
    density = ModelDensity(ModelGuide(model, guide, data_tensors(datum, "datum", model), name="datum"))
    if density.num_data != 1:
        raise ValueError(f"`datum` must have one row, such as `x[:1]`, got {density.num_data} rows")
    density.single_site()
    q = GuideDensity(density)
    planar = not density.is_discrete and density.coordinates().dims == 2
    draw = _regions if planar else _bars if density.is_discrete else _curves
    p = exact.posterior(model, *datum)
    new, ax = ax is None, axes_or_new(ax)
    handles = draw(density, q, p, ax)
    try:
        gap = f"KL(q ‖ p) = {float(exact.kl(model, guide, *datum)):.2g} nats"
    except (QuadratureError, ValueError):  # quadrature needs to know where q is and how heavy its tails are
        gap = None
    legend_below(ax, handles, title=gap, grow=new)
    return ax


def _bars(density: ModelDensity, q: GuideDensity, p: Any, ax: Axes) -> list[Any]:
    name, _ = density.single_site()
    states = p.enumerate_support()
    places = np.arange(len(states))
    truth, guess = (log_prob[:, 0].exp().tolist() for log_prob in (p.log_prob(states), q.log_prob({name: states})))
    exact_bars = ax.bar(places - 0.2, truth, 0.4, label=_EXACT, color=EXACT)
    guide_bars = ax.bar(places + 0.2, guess, 0.4, label=_GUIDE, color=GUIDE, hatch="//")
    ax.set(xlabel=f"state of {name}", ylabel="probability", ylim=(0, 1.05))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return [exact_bars, guide_bars]


def _curves(density: ModelDensity, q: GuideDensity, p: Any, ax: Axes) -> list[Any]:
    chart = density.coordinates()
    (low,), (high,) = _extent(chart, *_draws(q, p, 400))
    grid = torch.linspace(low, high, 600, device=density.data[0].device)
    values = chart.to_site(grid[:, None, None])
    shown = (values.flatten() if chart.is_elementwise else grid).cpu()
    truth, guess = (log_prob[:, 0].exp().cpu() for log_prob in (p.log_prob(values), q.log_prob({chart.name: values})))
    area = ax.fill_between(shown, truth, color=EXACT, label=_EXACT)
    (line,) = ax.plot(shown, guess, "--", color=GUIDE, label=_GUIDE)
    quantity = "value of" if chart.is_elementwise else "log-ratio of the classes of"
    ax.set(xlabel=f"{quantity} {chart.name}", ylabel="density", ylim=(0, None))
    return [area, line]


def _regions(density: ModelDensity, q: GuideDensity, p: Any, ax: Axes) -> list[Any]:
    """Draw regions of highest density: that of mass m is where the density is above the (1 - m)-quantile of draws."""
    chart = density.coordinates()
    draws = _draws(q, p, 4000)
    low, high = _extent(chart, *draws)
    device = density.data[0].device
    across, up = (torch.linspace(start, end, 200, device=device) for start, end in zip(low, high, strict=True))
    nodes = torch.cartesian_prod(up, across).flip(1)
    sites = chart.to_site(nodes[:, None])
    shown = (sites if chart.is_elementwise else nodes).reshape(200, 200, 2).cpu().unbind(-1)
    handles: list[Any] = []
    for log_prob, values in ((p.log_prob, draws[0]), (lambda z: q.log_prob({chart.name: z}), draws[1])):

        def in_chunks(z: Tensor, log_prob: Callable[[Tensor], Tensor] = log_prob) -> Tensor:
            return torch.cat([log_prob(part)[:, 0] for part in z.split(density.chunk)]).double().cpu()

        levels = in_chunks(values).quantile(1 - torch.tensor(_MASSES, dtype=torch.float64, device="cpu")).tolist()
        heights = in_chunks(sites).reshape(200, 200)
        if not handles:
            ax.contourf(*shown, heights, levels=[*levels, math.inf], colors=_GREYS)
            greys = zip(_GREYS, _MASSES, strict=True)
            handles = [Patch(color=grey, label=f"{mass:.0%} of {_EXACT}") for grey, mass in greys]
        else:
            ax.contour(*shown, heights, levels=levels, colors=GUIDE, linestyles=_STYLES)
            styles = zip(_STYLES, _MASSES, strict=True)
            handles += [Line2D([], [], color=GUIDE, ls=ls, label=f"{mass:.0%} of {_GUIDE}") for ls, mass in styles]
    label = "{1}[{0}]" if chart.is_elementwise else "log-ratio {0} of the classes of {1}"
    ax.set(xlabel=label.format(0, chart.name), ylabel=label.format(1, chart.name))
    return handles


def _draws(q: GuideDensity, p: Any, count: int) -> tuple[Tensor, Tensor]:
    """Draw from the exact posterior and the guide; values of the site ``(count, 1, *event)``."""
    with seeded(0):
        return p.sample((count,)), q.site()["fn"].sample((count,))


def _extent(chart: LatentCoordinates, *draws: Tensor) -> tuple[list[float], list[float]]:
    """Return the lowest and highest coordinates to show: those of nearly all draws, with a margin."""
    points = torch.cat([chart.to_points(values) for values in draws]).flatten(0, 1)
    low, high = points.quantile(torch.tensor([0.002, 0.998]).to(points), dim=0)
    return (low - 0.2 * (high - low)).tolist(), (high + 0.2 * (high - low)).tolist()
