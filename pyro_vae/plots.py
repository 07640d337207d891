"""Pictures, each on matplotlib axes, each answering one question.

Functions draw on ``ax`` and return it; none calls ``plt.show()``. Clusters and methods differ in marker or line style
as well as in colour, so that a picture reads in black and white.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyro_vae import exact
from pyro_vae.gradients import Comparison
from pyro_vae.joint_density import Guide, Problem
from pyro_vae.pictures_of_models import axes_or_new, plate_diagram
from pyro_vae.randomness import seeded
from pyro_vae.ranks import Calibration

__all__ = [
    "bias_variance",
    "calibration",
    "image_grid",
    "latent_map",
    "manifold",
    "plate_diagram",
    "posterior",
    "training_curves",
]

_MARKERS = "osv^D<>pP*"
_LINES = ("-", "--", "-.", ":")


def training_curves(
    history: Mapping[str, Sequence[float]],
    ax: Axes | None = None,
    terms: Sequence[str] = ("elbo", "distortion", "rate"),
) -> Axes:
    """Has training converged, and does it overfit? The ELBO is the sum of -distortion and -rate; validation is dashed.

    Args:
        history: that of :class:`pyro_vae.Fitted`.
        ax: where to draw.
        terms: which to draw. Of images, the rate is best seen on axes of its own.

    >>> training_curves({"elbo": [-2.0, -1.0], "distortion": [1.5, 0.5], "rate": [0.5, 0.5]}).get_ylabel()
    'nats per datum'
    """
    ax = axes_or_new(ax)
    bound = "elbo" if "elbo" in history else "surrogate"
    labels = {
        "elbo": (bound, "ELBO" if bound == "elbo" else "surrogate, no bound", 1.0, "black"),
        "distortion": ("distortion", "-distortion", -1.0, "tab:blue"),
        "rate": ("rate", "-rate", -1.0, "tab:orange"),
    }
    unknown = sorted(set(terms) - set(labels))
    if unknown or not terms:
        raise ValueError(f"terms: got {list(terms)}; accepted are one or more of {list(labels)}")
    for name, label, sign, colour in (labels[term] for term in terms):
        for prefix, style, suffix in (("", "-", ""), ("validation_", "--", ", validation")):
            if prefix + name in history:
                values = [sign * value for value in history[prefix + name]]
                marker = "o" if len(values) == 1 else ""
                ax.plot(range(1, len(values) + 1), values, style, marker=marker, color=colour, label=label + suffix)
    ax.set(xlabel="epoch", ylabel="nats per datum")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.legend()
    return ax


def bias_variance(comparison: Comparison, group: str = "all", ax: Axes | None = None) -> Axes:
    """What does each gradient estimator cost, in bias and in noise, relative to the exact gradient?

    Hollow markers at the bottom: no bias that could be told from chance, with the error up to which none was found.
    What has no noise at all, such as enumeration, is not drawn.

    Args:
        comparison: of :func:`pyro_vae.gradients.compare`.
        group: of parameters.
        ax: where to draw.

    >>> from pyro_vae.gradients import Measured
    >>> found = Measured(
    ...     2.0, bias=0.1, bias_error=0.01, variance=4.0, max_z=9.0, num_parameters=3, num_tested=3, repeats=99
    ... )
    >>> bias_variance(Comparison({"relaxed": {"all": found}}, {"relaxed": 1})).get_ylabel()
    'bias / length of the exact gradient'
    """
    ax = axes_or_new(ax)
    shown = {name: row for name, row in comparison.of(group).items() if row.variance > 0 and row.target_norm > 0}
    if not shown:
        raise ValueError("comparison: has no estimator with noise, of a gradient longer than zero, to draw")
    biased = {name for name, row in shown.items() if row.p_value < 1e-3 and row.bias > 0}
    heights = [(row.bias if name in biased else row.bias_error) / row.target_norm for name, row in shown.items()]
    floor = 0.3 * min(heights)
    for index, (name, row) in enumerate(shown.items()):
        noise, sure = row.variance**0.5 / row.target_norm, name in biased
        height = row.bias / row.target_norm if sure else floor
        marker, colour = _MARKERS[index % len(_MARKERS)], f"C{index % 10}"
        face = colour if sure else "none"
        ax.plot(noise, height, marker, color=colour, markerfacecolor=face, markersize=9, linestyle="none", label=name)
        if not sure:
            ax.plot([noise] * 2, [floor, row.bias_error / row.target_norm], ":", color=colour, linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="standard deviation / length of the exact gradient")
    ax.set_ylabel("bias / length of the exact gradient")
    ax.legend(fontsize=8)
    return ax


def calibration(result: Calibration, ax: Axes | None = None) -> Axes:
    """Can draws of q(z | x) be told from the truth? The ranks of the truth, in the band where those of an exact q stay.

    A quantity that leaves the band is drawn with a style and a name of its own, the others thin and grey; log p(x, z),
    which reads the data, is black. Above zero on the left and below on the right: the truth lies far out too often, q
    is too narrow. The other way about it is too wide; above or below zero throughout it is biased.

    Args:
        result: of :func:`pyro_vae.calibrate`.
        ax: where to draw.

    >>> from pyro_vae.ranks import Effects
    >>> ranks = torch.arange(200)[:, None] % torch.tensor([20, 10])
    >>> none = Effects(*torch.zeros(4, 1), (1.0, 0.0, 0.0, 0.0))
    >>> result = Calibration(
    ...     ("z", "log p(x, z)"), ranks, 19, torch.tensor([1.0, 0.0]), none, None, 0.0, 0.0, tolerance=1.4, alpha=1e-3
    ... )
    >>> [text.get_text() for text in calibration(result).get_legend().get_texts()]
    ['within the band: z', 'log p(x, z)', 'band of an exact q']
    """
    ax = axes_or_new(ax)
    *coordinates, joint = range(len(result.names))
    outside = [index for index in coordinates if result.leaves_band(index)]
    within = [index for index in coordinates if index not in outside]
    told = result.names[within[0]] if len(within) == 1 else f"{len(within)} coordinates"
    for index in [*within, *outside, joint]:
        places, difference, lower, upper = result.ecdf_difference(index)
        style: dict[str, Any] = {"color": "black", "linewidth": 2, "label": result.names[index]}
        if index in within:
            first = index == within[0]
            style = {"color": "0.55", "linewidth": 0.8, "label": f"within the band: {told}" if first else None}
        elif index in outside:
            number = outside.index(index)
            style |= {"color": f"C{number % 10}", "linewidth": 1.2, "linestyle": _LINES[1 + number % 3]}
            style |= {"marker": _MARKERS[number % len(_MARKERS)], "markevery": (3 * number % 14, 14), "markersize": 4}
        ax.plot(places, difference, **style)
    ax.fill_between(places, lower, upper, color="0.88", zorder=0, label="band of an exact q")
    ax.set(xlabel="u, the share of draws below the truth", ylabel="share of data below u, less u", xlim=(0, 1))
    ax.legend(fontsize=8, ncols=1 + (len(outside) > 5))
    return ax


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
        marker = f"${label}$" if z.shape[1] > 1 else _MARKERS[index % len(_MARKERS)]
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


def image_grid(images: Tensor, columns: int, ax: Axes | None = None) -> Axes:
    """Images ``(N, height, width)`` with values in [0, 1], row by row, black on white.

    >>> image_grid(torch.rand(6, 8, 8), columns=3).images[0].get_array().shape
    (17, 26)
    """
    ax = axes_or_new(ax)
    count, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.zeros(rows * (height + 1) - 1, columns * (width + 1) - 1)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1), (index % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = image.detach()
    ax.imshow(sheet.numpy(), cmap="gray_r", vmin=0, vmax=1)
    ax.set_axis_off()
    return ax


def manifold(
    decode: Callable[[Tensor], Tensor], shape: tuple[int, int], size: int = 15, ax: Axes | None = None
) -> Axes:
    """What does each place in a latent space of two standard normal dimensions decode to?

    Args:
        decode: from ``(S, 2)`` to mean images, ``(S, height * width)``.
        shape: height and width of an image.
        size: images a side, at the quantiles 1/(2 size), ... of the prior.
        ax: where to draw.

    >>> manifold(lambda z: z.sigmoid()[:, :1].expand(-1, 64), (8, 8), size=3).get_xlabel()
    '$z_1$, at quantiles of the prior'
    """
    ax = axes_or_new(ax)
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(size) + 0.5) / size)
    z = torch.cartesian_prod(quantiles.flip(0), quantiles).flip(1)
    image_grid(decode(z).reshape(-1, *shape), size, ax)
    ax.set_axis_on()
    ax.set(xticks=[], yticks=[], xlabel="$z_1$, at quantiles of the prior", ylabel="$z_2$, at quantiles of the prior")
    return ax
