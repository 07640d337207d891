"""
Gumbel-max and Gumbel-softmax
=============================

How a discrete draw is made and relaxed, in two pictures with their numbers. First, the argmax of logits plus Gumbel
noise is a categorical draw; the argmax of logits plus Gaussian noise is not. Second, a softmax instead of the argmax
moves the draws off the corners of the simplex, and at no temperature does it change which entry is the largest. How
gradients pass such a draw is in `gradient_estimators.py`.
"""

import argparse
import math
from typing import Any

import common
import matplotlib.pyplot as plt
import pyro
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Categorical, Gumbel, Normal

import pyro_vae as pv

CLASSES = torch.tensor([1.5, 0.5, 0.0, -1.0, -2.0])
CORNERS = torch.tensor([0.6, 0.0, -0.4])
PLACES = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])  # of the corners, in the picture


def parse_args() -> argparse.Namespace:
    return common.make_parser(__doc__, "gumbel_max", epochs=200, unit="thousands of draws of each kind").parse_args()


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Compute the p-value of Pearson's chi-square test that these counts are draws with these probabilities."""
    expected = counts.sum() * probs.double()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(probs) - 1) / 2, dtype=torch.float64), statistic / 2))


def sample_classes(draws: int) -> dict[str, Any]:
    """Draw classes directly and as the argmax of logits and noise, and test how well they fit the softmax."""
    shape = torch.Size([draws, len(CLASSES)])
    gumbel = Gumbel(torch.tensor(0.0), torch.tensor(1.0))
    ways = {
        "direct": Categorical(logits=CLASSES).sample(shape[:1]),
        "argmax, Gumbel": (CLASSES + gumbel.sample(shape)).argmax(-1),
        "argmax, Gaussian": (CLASSES + Normal(0.0, gumbel.stddev).sample(shape)).argmax(-1),  # the same variance
    }
    counts = {name: torch.bincount(chosen, minlength=len(CLASSES)) for name, chosen in ways.items()}
    return {
        "softmax": CLASSES.softmax(-1).tolist(),
        "share": {name: (count / draws).tolist() for name, count in counts.items()},
        "p_value": {name: p_value(count, CLASSES.softmax(-1)) for name, count in counts.items()},
    }


def sample_simplex(draws: int, seed: int) -> tuple[dict[str, Any], dict[float, Tensor]]:
    """Draw relaxed classes from the same Gumbel noise at each temperature, and count which entry is the largest."""
    rows, points = [], {}
    for temperature in (0.1, 0.5, 1.0, 5.0):
        pyro.set_rng_seed(seed)
        relaxed = pv.distributions.LogRelaxedOneHotCategorical(torch.tensor(temperature), logits=CORNERS)
        y = relaxed.sample(torch.Size([draws]))
        count = torch.bincount(y.argmax(-1), minlength=len(CORNERS))
        row = {"temperature": temperature, "argmax": (count / draws).tolist(), "mean": y.exp().mean(0).tolist()}
        rows.append(row | {"largest": float(y.exp().amax(-1).mean()), "p_value": p_value(count, CORNERS.softmax(-1))})
        points[temperature] = y[:600].exp()
    return {"softmax": CORNERS.softmax(-1).tolist(), "temperatures": rows}, points


def make_tree(points: dict[float, Tensor]) -> xr.DataTree:
    """Make an ArviZ tree of the draws on the simplex."""
    y = torch.stack(list(points.values()), 1)[None]  # (chain, draw, temperature, category)
    coords = {"chain": [0], "draw": range(y.shape[1]), "temperature": list(points), "category": range(y.shape[-1])}
    return xr.DataTree.from_dict({"prior": xr.Dataset({"y": (tuple(coords), y.numpy())}, coords=coords)})


def format_shares(values: list[float]) -> str:
    """Format shares with four digits."""
    return " ".join(f"{value:.4f}" for value in values)


def draw_shares(found: dict[str, Any]) -> Figure:
    """Draw the share of each class next to its probability."""
    figure, ax = plt.subplots(figsize=(8, 4.6), layout="constrained")
    bars = {"softmax of the logits": found["softmax"], **found["share"]}
    for place, ((name, shares), hatch) in enumerate(zip(bars.items(), ("", "//", "..", "xx"), strict=True)):
        where = [index + 1 + 0.2 * (place - 1.5) for index in range(len(shares))]
        ax.bar(where, shares, 0.2, hatch=hatch, edgecolor="white", color=pv.plots.colours.PALETTE[place], label=name)
    ax.set(xlabel="class", ylabel="share of draws", title="Gumbel noise gives the softmax; Gaussian noise does not")
    pv.plots.axes.legend_below(ax)
    return figure


def draw_simplex(points: dict[float, Tensor]) -> Figure:
    """Draw relaxed draws in the triangle of three classes; the dashed lines separate the largest entries."""
    figure, axes = plt.subplots(1, len(points), figsize=(13, 3.6), layout="constrained")
    centre = PLACES.mean(0)
    for ax, (temperature, y) in zip(axes, points.items(), strict=True):
        ax.fill(*PLACES.T, facecolor="none", edgecolor="black")
        for k, corner in enumerate(PLACES):
            ax.plot(*torch.stack([centre, (PLACES.sum(0) - corner) / 2]).T, color="0.5", linestyle="--", linewidth=1)
            look = pv.plots.colours.style(k) | {
                "linestyle": "none",
                "alpha": 0.5,
                "markeredgewidth": 0,
                "markersize": 4,
            }
            ax.plot(*(y[y.argmax(-1) == k] @ PLACES).T, **look)
        ax.set(aspect="equal", title=f"λ = {temperature:g}")
        ax.axis("off")
    figure.suptitle("The same noise at each temperature: a draw stays within its third of the triangle")
    return figure


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    draws = 1000 * args.epochs
    # 1. Draw classes by the argmax of logits plus noise, and relaxed draws by a softmax.
    classes = sample_classes(draws)
    simplex, points = sample_simplex(draws, args.seed)
    # 2. Compare the shares of the classes with the softmax of the logits.
    rows = {
        name: {"shares": format_shares(shares), "p": classes["p_value"][name]}
        for name, shares in classes["share"].items()
    }
    rows = {"softmax of the logits": {"shares": format_shares(classes["softmax"])}} | rows
    columns = {"shares of the classes": "{shares}", "p-value of the fit": "{p:.2g}"}
    text = common.table(f"1. {draws} draws", rows, columns)
    rows = {"softmax of the logits": {"argmax": format_shares(simplex["softmax"])}}
    for row in simplex["temperatures"]:
        shown = {key: format_shares(row[key]) for key in ("argmax", "mean")}
        rows[f"λ = {row['temperature']:g}"] = shown | {"largest": row["largest"], "p": row["p_value"]}
    columns = {"share of the argmax": "{argmax}", "mean of y": "{mean}", "mean largest entry": "{largest:.3f}"}
    text += "\n\n" + common.table("2. relaxed draws y", rows, columns | {"p-value of the fit": "{p:.2g}"})
    print(text)
    found = {"draws": draws, "categorical": classes, "simplex": simplex}
    figures = {"categorical": draw_shares(classes), "simplex": draw_simplex(points)}
    common.save(args, found, figures, {"simplex": make_tree(points)}, text)


if __name__ == "__main__":
    main(parse_args())
