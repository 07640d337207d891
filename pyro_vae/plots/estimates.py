"""Pictures of estimates: how far from the truth, how noisy, and whether to be trusted."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pyro_vae._utils.validation import boolean, describe
from pyro_vae.diagnostics.calibration import Calibration
from pyro_vae.diagnostics.gradients import Comparison
from pyro_vae.evidence.importance_sampling import Evidence
from pyro_vae.plots.axes import MARKERS, axes_or_new, legend_below

__all__ = ["bias_variance", "calibration", "evidence_comparison", "khat"]

_LINES = ("-", "--", "-.", ":")


_NAMED = 16  # quantities in a legend


def bias_variance(comparison: Comparison, group: str = "all", ax: Axes | None = None) -> Axes:
    """What does each gradient estimator cost, in bias and in noise, relative to the exact gradient?

    Hollow markers at the bottom: no bias that could be told from chance, with the error up to which none was found.
    What has no noise at all, such as enumeration, is not drawn.

    Args:
        comparison: of :func:`pyro_vae.diagnostics.gradients.compare`.
        group: of parameters.
        ax: where to draw.

    >>> from pyro_vae.diagnostics.gradients import Measured
    >>> found = Measured(
    ...     2.0, bias=0.1, bias_error=0.01, variance=4.0, max_z=9.0, num_parameters=3, num_tested=3, repeats=99
    ... )
    >>> bias_variance(Comparison({"relaxed": {"all": found}}, {"relaxed": 1})).get_ylabel()
    'bias / length of the exact gradient'
    """
    if not isinstance(comparison, Comparison):
        raise TypeError(f"`comparison` must be what gradients.compare returns, got {describe(comparison)}")
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
        marker, colour = MARKERS[index % len(MARKERS)], f"C{index % 10}"
        face = colour if sure else "none"
        ax.plot(noise, height, marker, color=colour, markerfacecolor=face, markersize=9, linestyle="none", label=name)
        if not sure:
            ax.plot([noise] * 2, [floor, row.bias_error / row.target_norm], ":", color=colour, linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="standard deviation / length of the exact gradient")
    ax.set_ylabel("bias / length of the exact gradient")
    if len(biased) < len(shown):
        ax.plot(
            [], [], "o:", color="0.4", markerfacecolor="none", label="hollow: no bias found;\nwith dots up to its error"
        )
    ax.legend(fontsize=8)
    return ax


def khat(evidence: Evidence, sort: bool = False, ax: Axes | None = None) -> Axes:
    r"""Of which data can the estimate of log p(x) be trusted? The k̂ of each, and the line up to which it is reliable.

    Data above the line are crosses. There the guide misses some of the posterior, a few draws carry the estimate, and
    it is mostly too low, by more than its standard error tells. Where k̂ can't be drawn, it is at the edge: minus
    infinity, of weights without a tail, at the bottom, and unknown, for want of draws, at the top.

    Args:
        evidence: of :func:`pyro_vae.log_evidence`.
        sort: from the largest k̂ to the smallest, which shows the share above the line, instead of by number of the
            datum, which shows where they are.
        ax: where to draw.

    Raises:
        TypeError: if ``evidence`` is something else.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry 2024, "Pareto smoothed importance sampling", on k̂ and its threshold.

    >>> import torch
    >>> shapes = torch.tensor([0.1, 0.9, 0.3, 0.2])
    >>> ax = khat(Evidence(torch.zeros(4), ess=torch.ones(4), khat=shapes, num_samples=1000))
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['reliable: 3 of 4 data', 'not reliable: 1 of 4 data (25.0 %)', 'reliable up to 0.67, of 1000 draws each']
    """
    if not isinstance(evidence, Evidence):
        raise TypeError(f"`evidence` must be what pv.log_evidence returns, got a {type(evidence).__name__}")
    boolean(sort, "sort")
    shapes, wrong = evidence.khat.double().numpy(), evidence.unreliable.numpy()
    if sort:
        order = np.argsort(-np.nan_to_num(shapes, nan=np.inf), kind="stable")
        shapes, wrong = shapes[order], wrong[order]
    limit = evidence.reliable_khat
    finite = np.array([0.0, *(number for number in (*shapes, limit) if np.isfinite(number))])
    room = 0.15 * (finite.max() - finite.min() + 0.1)
    bottom, top = finite.min() - room, finite.max() + room
    heights = np.where(np.isnan(shapes), top, shapes).clip(bottom, top)
    count, numbers = len(shapes), np.arange(len(shapes))
    ax = axes_or_new(ax)
    handles: list[Any] = []
    marks: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        f"reliable: {(~wrong).sum()} of {count} data": (~wrong, {"marker": "o", "markersize": 4, "color": "tab:blue"}),
        f"not reliable: {wrong.sum()} of {count} data ({100 * wrong.mean():.1f} %)": (
            wrong,
            {"marker": "x", "markersize": 7, "markeredgewidth": 1.8, "color": "tab:red"},
        ),
    }
    for label, (which, look) in marks.items():
        handles += ax.plot(numbers[which], heights[which], linestyle="none", label=label, clip_on=False, **look)
    if np.isfinite(limit):
        label = f"reliable up to {limit:.2f}, of {evidence.num_samples} draws each"
        handles.append(ax.axhline(limit, color="black", linestyle="--", linewidth=1.2, label=label))
    edges = {bottom: ("no tail", np.isneginf(shapes)), top: ("unknown", np.isnan(shapes))}
    for height, (words, which) in edges.items():
        if which.any():
            ax.axhline(height, color="0.7", linestyle=":", linewidth=1, zorder=0)
            ax.text(1.0, height, f" {words}", transform=ax.get_yaxis_transform(), va="center", fontsize=9)
    where = "data, from the largest to the smallest" if sort else "number of the datum"
    ax.set(xlabel=where, ylabel=r"$\hat{k}$, the shape of the tail of its weights")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    legend_below(ax, handles, 1)
    return ax


def evidence_comparison(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Which model gives held-out data more, and is the difference more than chance? Each beside the best.

    A row is a model, under its name the mean of log p(x). Its difference to the best has a bar of one standard error to
    either side, of the differences datum by datum, and on it a thick one: the part that is of the draws and not of the
    data. Hollow markers are of estimates that are held too low where k̂ is unreliable: the model may be better.

    Args:
        table: of :func:`pyro_vae.compare_evidence`.
        ax: where to draw.

    Raises:
        TypeError, ValueError: if ``table`` is something else, or has no rows.

    >>> import torch, pyro_vae as pv
    >>> x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    >>> normal = torch.distributions.Normal
    >>> exact = {"wide": normal(0.0, 2.0).log_prob(x), "true": normal(0.0, 1.0).log_prob(x)}
    >>> ax = evidence_comparison(pv.compare_evidence(exact))
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['true\\n-1.433 nats', 'wide\\n-1.741 nats']
    """
    needed = ["log_evidence", "difference", "difference_error", "difference_monte_carlo_error", "unreliable"]
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"`table` must be what pv.compare_evidence returns, got a {type(table).__name__}")
    missing = [column for column in needed if column not in table.columns]
    if missing or len(table) == 0:
        what = f"lacks the columns {missing}" if missing else "has no rows"
        raise ValueError(f"`table` must be what pv.compare_evidence returns: {what}")
    ax = axes_or_new(ax)
    handles: dict[str, Any] = {}
    names = []
    for row, (name, entry) in enumerate(table.iterrows()):
        middle, colour = float(entry["difference"]), "black" if row == 0 else "tab:blue"
        doubtful = entry["unreliable"] > 0
        for column, width, label in (
            ("difference_error", 1.5, "± one standard error"),
            ("difference_monte_carlo_error", 5.0, "its part that more draws would take away"),
        ):
            error = float(entry[column])
            if error > 0:
                ends = [middle - error, middle + error]
                (handles[label],) = ax.plot(ends, [row, row], color="0.45", linewidth=width, label=label, zorder=2)
        look: dict[str, Any] = {"marker": "D" if row == 0 else "o", "markersize": 8, "linestyle": "none"}
        label = "the best" if row == 0 else "difference to the best"
        face = "white" if doubtful else colour
        ax.plot(middle, row, color=colour, markerfacecolor=face, label=label, zorder=3, **look)
        handles.setdefault(label, Line2D([], [], color=colour, label=label, **look))
        share = f"\n$\\hat{{k}}$ unreliable: {100 * entry['unreliable']:.2g} %" if doubtful else ""
        names.append(f"{name}\n{entry['log_evidence']:.3f} nats{share}")
    if (table["unreliable"] > 0).any():
        label = "hollow: held too low, may be better"
        look = {"marker": "o", "markersize": 8, "linestyle": "none"}
        handles[label] = Line2D([], [], color="0.45", markerfacecolor="white", label=label, **look)
    ax.axvline(0.0, color="0.7", linestyle=":", linewidth=1, zorder=0)
    ax.set_yticks(range(len(table)), names)
    ax.set(ylim=(len(table) - 0.4, -0.6), xlabel="log p(x) less that of the best, nats per datum", ylabel="")
    legend_below(ax, list(handles.values()), 1)
    return ax


def calibration(result: Calibration, ax: Axes | None = None) -> Axes:
    """Can draws of q(z | x) be told from the truth? The ranks of the truth, in the band where those of an exact q stay.

    A quantity that leaves the band is drawn with a style and, up to 16 of them, a name of its own, the others thin and
    grey; log p(x, z), which reads the data, is black. Above zero on the left and below on the right: the truth lies far
    out too often, q is too narrow. The other way about it is too wide; above or below zero throughout it is biased.

    Args:
        result: of :func:`pyro_vae.calibrate`.
        ax: where to draw.

    >>> import torch
    >>> from pyro_vae.diagnostics.calibration import CalibrationErrors
    >>> ranks = torch.arange(200)[:, None] % torch.tensor([20, 10])
    >>> none = CalibrationErrors(*torch.zeros(4, 1), (1.0, 0.0, 0.0, 0.0))
    >>> result = Calibration(
    ...     ("z", "log p(x, z)"), ranks, 19, torch.tensor([1.0, 0.0]), none, None, 0.0, 0.0, tolerance=1.4, alpha=1e-3
    ... )
    >>> [text.get_text() for text in calibration(result).get_legend().get_texts()]
    ['within the band: z', 'log p(x, z)', 'band of an exact q']
    """
    if not isinstance(result, Calibration):
        raise TypeError(f"`result` must be what pv.calibrate returns, got {describe(result)}")
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
            style |= {"marker": MARKERS[number % len(MARKERS)], "markevery": (3 * number % 14, 14), "markersize": 4}
            if number >= _NAMED:
                style["label"] = f"{len(outside) - _NAMED} further ones" if number == _NAMED else None
        ax.plot(places, difference, **style)
    ax.fill_between(places, lower, upper, color="0.88", zorder=0, label="band of an exact q")
    ax.set(xlabel="u, the share of draws below the truth", ylabel="share of data below u, less u", xlim=(0, 1))
    ax.legend(fontsize=8, ncols=1 + (len(outside) > 5))
    return ax
