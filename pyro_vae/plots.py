"""Pictures, each on matplotlib axes, each answering one question.

Functions draw on ``ax`` and return it; none calls ``plt.show()``. Clusters and methods differ in marker or line style
as well as in colour, so that a picture reads in black and white.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import MaxNLocator
from pyro.infer.inspect import get_model_relations
from torch import Tensor

from pyro_vae import exact
from pyro_vae.gradients import Comparison
from pyro_vae.joint_density import Guide, Problem
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


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots(layout="constrained")[1] if ax is None else ax


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
    ax = _axes(ax)
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
    ax = _axes(ax)
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
    ax = _axes(ax)
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
    ax = _axes(ax)
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
    ax = _axes(ax)
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
    ax = _axes(ax)
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
    ax = _axes(ax)
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(size) + 0.5) / size)
    z = torch.cartesian_prod(quantiles.flip(0), quantiles).flip(1)
    image_grid(decode(z).reshape(-1, *shape), size, ax)
    ax.set_axis_on()
    ax.set(xticks=[], yticks=[], xlabel="$z_1$, at quantiles of the prior", ylabel="$z_2$, at quantiles of the prior")
    return ax


def plate_diagram(
    model: Callable[..., Any], *data: Tensor, guide: Callable[..., Any] | None = None, ax: Axes | None = None
) -> Axes:
    """What depends on what? The model as circles, arrows and plates; the guide as dashed arrows.

    Observed sites are filled, and what is deterministic given its parents has a dashed outline.

    A drawing with matplotlib alone of what ``pyro.render_model`` draws with Graphviz.

    Args:
        model: a Pyro model.
        data: what it takes.
        guide: its guide; dashed arrows go from the observed sites to its latents.
        ax: where to draw.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> sorted(text.get_text() for text in plate_diagram(model, torch.zeros(3)).texts)
    ['data', 'x', 'x ~ Normal', 'z', 'z ~ Normal']
    """
    ax = _axes(ax)
    with seeded(0):
        relations = get_model_relations(model, data, include_deterministic=True)
    parents, kinds = relations["sample_sample"], relations["sample_dist"]
    observed = [name for name in relations["observed"] if kinds[name] != "Deterministic"]
    plates = relations["plate_sample"]
    labels = {
        name: f"{name} = f({', '.join(parents[name])})" if kind == "Deterministic" else f"{name} ~ {kind}"
        for name, kind in kinds.items()
    }
    width = max(1.1, 0.085 * max(map(len, labels.values())))
    places = _layout(parents, plates, width)
    circles = {}
    for name, (column, row) in places.items():
        line = "--" if kinds[name] == "Deterministic" else "-"
        face = "0.8" if name in observed else "white"
        circles[name] = Ellipse((column, row), 0.6, 0.6, facecolor=face, edgecolor="black", linestyle=line)
        ax.add_patch(circles[name])
        ax.text(column, row, name, ha="center", va="center", fontsize=11, style="italic")
        ax.text(column + 0.38, row, labels[name], va="center", fontsize=9)
    for name in places:
        for parent in parents[name]:
            _arrow(ax, circles[parent], circles[name], "-", 0.0)
    if guide is not None:
        with seeded(0):
            latents = get_model_relations(guide, data)["sample_sample"]
        for latent in latents:
            for name in observed:
                _arrow(ax, circles[name], circles[latent], "--", -0.4)
    for plate, members in plates.items():
        inner = sum(set(others) < set(members) for others in plates.values())
        left, bottom, right, top = _box(members, places, width, inner)
        ax.add_patch(FancyBboxPatch((left, bottom), right - left, top - bottom, boxstyle="round,pad=0.05", fill=False))
        ax.text(right, bottom + 0.05, plate, ha="right", va="bottom", fontsize=10)
    ax.set_aspect("equal")
    ax.autoscale_view()
    ax.set_axis_off()
    return ax


def _layout(
    parents: Mapping[str, Sequence[str]], plates: Mapping[str, Sequence[str]], width: float
) -> dict[str, tuple[float, float]]:
    """Each site below all of its parents; side by side, and where a plate would hold another's site, apart."""
    depth: dict[str, int] = {}
    for name in parents:
        depth[name] = 1 + max((depth[parent] for parent in parents[name]), default=-1)
    home = {name: frozenset(plate for plate, members in plates.items() if name in members) for name in parents}

    def place(bands: list[set[frozenset[str]]]) -> dict[str, tuple[float, float]]:
        places, start = {}, 0
        for band in bands:
            levels: dict[int, list[str]] = {}
            for name in (name for name in parents if home[name] in band):
                levels.setdefault(depth[name], []).append(name)
                places[name] = ((0.9 + width) * (start + levels[depth[name]].index(name)), -1.3 * depth[name])
            start += max(len(level) for level in levels.values())
        return places

    compact = place([set(home.values())])
    for plate, members in plates.items():
        left, bottom, right, top = _box(members, compact, width, 0)
        for name in parents:
            if plate not in home[name] and left < compact[name][0] < right and bottom < compact[name][1] < top:
                return place([{plates_of} for plates_of in sorted(set(home.values()), key=len, reverse=True)])
    return compact


def _box(
    members: Sequence[str], places: Mapping[str, tuple[float, float]], width: float, inner: int
) -> tuple[float, float, float, float]:
    """Left, bottom, right and top of a plate, which has ``inner`` others within."""
    columns, rows = zip(*(places[name] for name in members), strict=True)
    left, right = min(columns) - 0.7 - 0.1 * inner, max(columns) + 0.4 + width
    return left, min(rows) - 0.65 - 0.2 * inner, right, max(rows) + 0.45


def _arrow(ax: Axes, start: Ellipse, end: Ellipse, style: str, bend: float) -> None:
    arrow = FancyArrowPatch(
        start.center,
        end.center,
        patchA=start,
        patchB=end,
        arrowstyle="-|>",
        mutation_scale=14,
        linestyle=style,
        color="black",
        connectionstyle=f"arc3,rad={bend}",
    )
    ax.add_patch(arrow)
