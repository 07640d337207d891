"""The plate diagram of a model and its guide, drawn by matplotlib without Graphviz."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch
from pyro.infer.inspect import get_model_relations

from pyro_vae._utils.data import data_tensors
from pyro_vae._utils.param_store import without_training
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import function, taking_data
from pyro_vae.arguments import any_arguments
from pyro_vae.plots.axes import axes_or_new

__all__ = ["plate_diagram"]


@any_arguments
@without_training
def plate_diagram(model: Function, guide: Function | None, *data: Data, ax: Axes | None = None) -> Axes:
    """Which sites depend on which? The model as circles, arrows and plates; the guide as dashed arrows.

    Observed sites are filled. Deterministic sites have a dashed outline. ``pyro.render_model`` uses Graphviz instead.

    Args:
        model: a Pyro model.
        guide: its guide, or ``None``. Dashed arrows go from the observed sites to its latents.
        data: the arguments of both.

    .. plot::
        :include-source:
        :filename-prefix: plate_diagram

        >>> import torch
        >>> import pyro_vae as pv
        >>> from pyro_vae import guides, likelihoods, networks, priors
        >>> net = networks.linear()
        >>> vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
        >>> ax = pv.plots.plate_diagram(vae.model, vae.guide, torch.zeros(3, 2))
        >>> sorted(text.get_text() for text in ax.texts)
        ['data', 'x', 'x ~ Normal', 'z', 'z ~ Normal']
    """
    model, guide = function(model, "model"), None if guide is None else function(guide, "guide")
    data = data_tensors(data, "data", model) if data else data
    ax = axes_or_new(ax)
    with seeded(0), taking_data(model, "model", data):
        relations = get_model_relations(model, data, include_deterministic=True)
    if not relations["sample_sample"]:
        raise ValueError("`model` must have sites, got one without `pyro.sample`")
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
        with seeded(0), taking_data(guide, "guide", data):
            latents = get_model_relations(guide, data)["sample_sample"]
        for latent, name in product(latents, observed):
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
    """Place each site below its parents, and sites of different plates apart if a plate would enclose other sites."""
    depth: dict[str, int] = {}
    for name in parents:
        depth[name] = 1 + max((depth[parent] for parent in parents[name]), default=-1)
    plates_of = {name: frozenset(plate for plate, members in plates.items() if name in members) for name in parents}

    def place(bands: list[set[frozenset[str]]]) -> dict[str, tuple[float, float]]:
        places, start = {}, 0
        for band in bands:
            levels: dict[int, list[str]] = {}
            for name in (name for name in parents if plates_of[name] in band):
                levels.setdefault(depth[name], []).append(name)
                places[name] = ((0.9 + width) * (start + levels[depth[name]].index(name)), -1.3 * depth[name])
            start += max(len(level) for level in levels.values())
        return places

    compact = place([set(plates_of.values())])
    for plate, members in plates.items():
        left, bottom, right, top = _box(members, compact, width, 0)
        for name in parents:
            x, y = compact[name]
            if plate not in plates_of[name] and left < x < right and bottom < y < top:
                return place([{own} for own in sorted(set(plates_of.values()), key=len, reverse=True)])
    return compact


def _box(
    members: Sequence[str], places: Mapping[str, tuple[float, float]], width: float, inner: int
) -> tuple[float, float, float, float]:
    """Return left, bottom, right and top of a plate that encloses ``inner`` other plates."""
    columns, rows = zip(*(places[name] for name in members), strict=True)
    left, right = min(columns) - 0.7 - 0.1 * inner, max(columns) + 0.4 + width
    return left, min(rows) - 0.65 - 0.2 * inner, right, max(rows) + 0.45


def _arrow(ax: Axes, start: Ellipse, end: Ellipse, style: str, bend: float) -> None:
    options: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 14, "linestyle": style, "color": "black"}
    options |= {"patchA": start, "patchB": end, "connectionstyle": f"arc3,rad={bend}"}
    ax.add_patch(FancyArrowPatch(start.center, end.center, **options))
