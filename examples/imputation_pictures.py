"""The pictures of the imputation example."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import torch
from imputed import LEVELS, Imputed, Table
from matplotlib.figure import Figure
from torch import Tensor

COLUMNS = ("mean radius", "mean texture", "mean smoothness", "mean concavity", "worst area", "worst symmetry")
STYLES = ("k:", "k--", "r-.", "b-", "g.-")


def draw(
    test: Table, best: Imputed, covered: Mapping[str, Tensor], rows: Mapping[str, Mapping[str, float]]
) -> dict[str, Figure]:
    """All of them: of held-out rows, what the best VAE has imputed, and the coverage and errors of every method."""
    return {
        "table": tables(test, best.guess),
        "intervals": intervals(test, best.draws),
        "calibration": calibration(LEVELS, covered),
        "errors": errors(rows),
    }


def tables(test: Table, guess: Tensor) -> Figure:
    """Some held-out rows: as the model sees them, with its best guesses, and as they are."""
    rows = slice(0, 40)
    missing = test.x[rows].isnan()
    filled = torch.where(missing, guess[rows], test.complete[rows])
    panels = {
        "what the model sees\n(black: hidden)": test.x[rows],
        "hidden entries filled in": filled,
        "the truth": test.complete[rows],
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 6), sharex=True, sharey=True, layout="constrained")
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        shown = ax.imshow(values.numpy(), cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
        ax.set(title=title, xlabel="measurement (column)", facecolor="black")
    axes[0].set_ylabel("held-out tumour (row)")
    figure.colorbar(shown, ax=axes, label="standard deviations from the column's mean")
    figure.suptitle("A table with holes, filled in by a VAE with a Student-t likelihood")
    return figure


def intervals(test: Table, draws: Tensor) -> Figure:
    """What was hidden against what is imputed, in the units of the measurement."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.5), layout="constrained")
    for ax, name in zip(axes.flat, COLUMNS, strict=True):
        column = test.names.index(name)
        hidden = test.x[:, column].isnan()
        in_units = draws[:, hidden, column] * test.scale[column] + test.loc[column]
        low, middle, high = in_units.float().quantile(torch.tensor([0.05, 0.5, 0.95]), dim=0)
        truth = (test.complete[hidden, column] * test.scale[column] + test.loc[column]).float()
        inside = (truth >= low) & (truth <= high)
        kinds = ((inside, "tab:blue", "o", "the interval holds the truth"), (~inside, "tab:red", "s", "it does not"))
        for which, colour, marker, label in kinds:
            ax.errorbar(
                truth[which],
                middle[which],
                torch.stack([middle - low, high - middle])[:, which],
                fmt=marker,
                markersize=3,
                linewidth=0.8,
                color=colour,
                label=label,
            )
        ends = torch.tensor([truth.min(), truth.max()])
        ax.plot(ends, ends, color="black", linewidth=0.8)
        ax.set(title=f"{name}: {int(inside.sum())} of {len(inside)} held", xlabel="hidden truth", ylabel="imputed")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("Each hidden entry: median and 90 % interval of its draws. On the line the guess is right")
    return figure


def calibration(levels: Tensor, covered: Mapping[str, Tensor]) -> Figure:
    """The share of hidden entries that intervals hold, against the share that they should."""
    figure, ax = plt.subplots(figsize=(5.6, 6.4), layout="constrained")
    ax.plot([0, 100], [0, 100], color="0.7", linewidth=4, label="as it should be")
    for style, (name, shares) in zip(STYLES, covered.items(), strict=True):
        ax.plot(100 * levels, 100 * shares, style, label=name)
    ax.text(62, 25, "below the line:\ntoo sure of itself")
    ax.text(5, 75, "above the line:\nwider than need be")
    ax.set(
        xlabel="nominal level of the interval, %",
        ylabel="hidden entries inside it, %",
        aspect="equal",
        title="Do the intervals hold what they promise?",
    )
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def errors(rows: Mapping[str, Mapping[str, float]]) -> Figure:
    """How far off the guesses are, and how likely the truth was thought to be."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), sharey=True, layout="constrained")
    places = range(len(rows), 0, -1)
    left.barh(places, [row["rmse"] for row in rows.values()], color="0.7")
    nats, error = ([row[key] for row in rows.values()] for key in ("log_density", "log_density_error"))
    right.errorbar(nats, places, xerr=[2 * each for each in error], fmt="o", color="black", capsize=3)
    left.set(
        yticks=places,
        yticklabels=rows,
        xlabel="root mean squared error,\nstandard deviations of a column",
        title="How far off? (left is better)",
    )
    right.set(xlabel="nats per hidden entry, ± 2 standard errors", title="log-density of the truth (right is better)")
    right.grid(axis="x", alpha=0.3)
    figure.suptitle("Hidden entries of held-out rows")
    return figure
