"""Pictures of estimates: their bias, their noise, and whether they can be trusted."""

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pyro_vae._utils.validation import boolean, describe, nonempty_string
from pyro_vae.diagnostics.calibration import Calibration
from pyro_vae.diagnostics.gradients import Comparison
from pyro_vae.evidence.importance_sampling import Evidence
from pyro_vae.plots.axes import axes_or_new, legend_below, name_rows, wrap
from pyro_vae.plots.colours import PALETTE, style

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["bias_variance", "calibration", "evidence_comparison", "khat"]

_MAX_NAMED = 16  # quantities in a legend
_NAME_WIDTH = 24  # characters in a line of a name at the y-axis


def bias_variance(comparison: Comparison, *, group: str = "all", ax: Axes | None = None) -> Axes:
    """How large are the bias and the noise of each gradient estimator, relative to the exact gradient?

    A hollow marker means that no significant bias was found: it is drawn at the floor, and its height is no number; the
    dots end at the standard error of the bias. Estimators without noise, such as enumeration, are not drawn.

    Args:
        comparison: the result of :func:`pyro_vae.diagnostics.gradients.compare`.
        group: the group of parameters.

    Raises:
        TypeError, ValueError: if ``comparison`` is something else, or no estimator has noise and a gradient.

    .. plot::
        :include-source:
        :filename-prefix: bias_variance

        >>> import torch
        >>> import pyro_vae as pv
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_vae import guides, likelihoods, networks, objectives, priors
        >>> from pyro_vae.gradients import Estimator, compare
        >>> _ = torch.manual_seed(0)
        >>> vae = pv.VAE(
        ...     priors.RelaxedBernoulli(3, temperature=3.0),
        ...     guides.RelaxedBernoulli(4, 3, networks.linear(), temperature=3.0),
        ...     likelihoods.Normal(3, 4, networks.linear()),
        ... )
        >>> twin = vae.discrete()
        >>> hard = {"score function": Trace_ELBO(), "DisARM": objectives.DisARM(2)}
        >>> estimators = {name: Estimator(twin.model, twin.guide, elbo) for name, elbo in hard.items()}
        >>> estimators["relaxed"] = Estimator(vae.model, vae.guide, Trace_ELBO(), target=(twin.model, twin.guide))
        >>> ax = pv.plots.bias_variance(compare(estimators, torch.randn(10, 4), evaluations=4, repeats=40))
        >>> ax.get_ylabel()
        'bias / length of the exact gradient'
    """
    if not isinstance(comparison, Comparison):
        raise TypeError(f"`comparison` must be a result of `gradients.compare`, got {describe(comparison)}")
    nonempty_string(group, "group")
    shown = {name: row for name, row in comparison.of(group).items() if row.variance > 0 and row.target_norm > 0}
    if not shown:
        raise ValueError(
            f"`comparison` must have an estimator with noise, and a gradient that is not zero, got none in {group!r}"
        )
    new, ax = ax is None, axes_or_new(ax)
    biased = {name for name, row in shown.items() if row.p_value < 1e-3 and row.bias > 0}
    heights = [(row.bias if name in biased else row.bias_error) / row.target_norm for name, row in shown.items()]
    floor = 0.3 * min(heights)
    for index, (name, row) in enumerate(shown.items()):
        noise, significant = row.variance**0.5 / row.target_norm, name in biased
        height = row.bias / row.target_norm if significant else floor
        options = style(index) | {"linestyle": "none", "markersize": 9, "label": name}
        if not significant:
            options["markerfacecolor"] = "none"
            ax.plot([noise] * 2, [floor, row.bias_error / row.target_norm], ":", color=options["color"], linewidth=1)
        ax.plot(noise, height, **options)
    ax.set(xscale="log", yscale="log", xlabel="standard deviation / length of the exact gradient")
    ax.set_ylabel("bias / length of the exact gradient")
    if len(biased) < len(shown):
        label = "hollow, at the floor: no significant bias; dots end at its standard error"
        ax.plot([], [], "o:", color="0.4", markerfacecolor="none", label=label)
    legend_below(ax, grow=new)
    return ax


def khat(evidence: Evidence, *, sort: bool = False, ax: Axes | None = None) -> Axes:
    r"""For which data is the estimate of log p(x) reliable? The k̂ of each datum, its error, and the threshold.

    Bars are k̂ ± its standard error. Data with k̂ plus its error above the threshold are crosses. There the guide misses
    a part of the posterior, the estimate depends on a few draws, and it is usually too low, by more than its standard
    error. If k̂ is not finite, it is drawn at the edge: minus infinity, for weights without a tail, at the bottom;
    unknown, from too few draws, at the top.

    Args:
        evidence: the result of :func:`pyro_vae.log_evidence`.
        sort: whether to sort the data from the largest k̂ to the smallest, which shows the fraction above the
            threshold. By default they are in the order of the data.


    Source: Vehtari, Simpson, Gelman, Yao and Gabry 2024, "Pareto smoothed importance sampling", on k̂ and its threshold.

    .. plot::
        :include-source:
        :filename-prefix: khat

        >>> import torch
        >>> import pyro_vae as pv
        >>> from pyro_vae import guides, likelihoods, networks, priors
        >>> _ = torch.manual_seed(0)
        >>> data, net = pv.datasets.two_gaussians(500, seed=0), networks.mlp([16])
        >>> vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
        >>> fitted = pv.fit(vae.model, vae.guide, data.x, epochs=150, lr=2e-2)
        >>> ax = pv.plots.khat(pv.log_evidence(vae.model, vae.guide, data.x[:60], num_samples=500), sort=True)
        >>> ax.get_legend().get_texts()[-1].get_text()
        'reliable up to 0.63 (500 draws each)'
    """
    if not isinstance(evidence, Evidence):
        raise TypeError(f"`evidence` must be a result of `pv.log_evidence`, got {describe(evidence)}")
    boolean(sort, "sort")
    columns = (evidence.khat.double(), evidence.khat_error.double(), evidence.unreliable)
    shapes, errors, unreliable = (column.detach().cpu().flatten().numpy() for column in columns)
    if sort:
        order = np.argsort(-np.nan_to_num(shapes, nan=np.inf), kind="stable")
        shapes, errors, unreliable = shapes[order], errors[order], unreliable[order]
    limit = evidence.reliable_khat
    finite = np.array([0.0, *(number for number in (*(shapes + errors), *shapes, limit) if np.isfinite(number))])
    room = 0.15 * (finite.max() - finite.min() + 0.1)
    bottom, top = finite.min() - room, finite.max() + room
    heights = np.where(np.isnan(shapes), top, shapes).clip(bottom, top)
    count, numbers = len(shapes), np.arange(len(shapes))
    new, ax = ax is None, axes_or_new(ax)
    groups: list[tuple[Any, dict[str, Any]]] = [(~unreliable, {"marker": "o", "markersize": 4, "color": PALETTE[0]})]
    groups += [(unreliable, {"marker": "x", "markersize": 7, "markeredgewidth": 1.8, "color": PALETTE[1]})]
    bars = np.where(np.isfinite(shapes), errors, 0.0)
    ax.vlines(numbers, heights - bars, heights + bars, color="0.75", linewidth=0.8, zorder=0)
    handles: list[Any] = []
    for words, (which, look) in zip(("reliable", "not reliable"), groups, strict=True):
        share = f" ({100 * which.mean():.1f} %)" if words == "not reliable" else ""
        options = look | {"linestyle": "none", "clip_on": not which.any()}  # points at the edge are drawn whole
        options["label"] = f"{words}: {which.sum()} of {count} data{share}"
        handles += ax.plot(numbers[which], heights[which], **options)
    if np.isfinite(limit):
        label = f"reliable up to {limit:.2f} ({evidence.num_samples} draws each)"
        handles.append(ax.axhline(limit, color="black", linestyle="--", linewidth=1.2, label=label))
    edges = {bottom: ("no tail", np.isneginf(shapes)), top: ("unknown", np.isnan(shapes))}
    for height, (words, which) in edges.items():
        if which.any():
            ax.axhline(height, color="0.7", linestyle=":", linewidth=1, zorder=0)
            ax.text(1.0, height, f" {words}", transform=ax.get_yaxis_transform(), va="center", fontsize=9)
    xlabel = r"data, sorted by $\hat{k}$" if sort else "index of the datum"
    ax.set(xlabel=xlabel, ylabel=r"$\hat{k}$, tail shape of the importance weights")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    legend_below(ax, handles, grow=new)
    return ax


def evidence_comparison(table: "pd.DataFrame", *, ax: Axes | None = None) -> Axes:
    """Which model has the highest log p(x) of held-out data, and are the differences significant?

    Each row is a model, with the mean of log p(x) under its name. The thin bar is the difference to the best model, ±
    one standard error of the differences per datum. The thick bar is the part of the error due to the draws. A hollow
    marker means that k̂ is unreliable for some data: the estimate may be too low, and the model better.

    Args:
        table: the result of :func:`pyro_vae.compare_evidence`.

    .. plot::
        :include-source:
        :filename-prefix: evidence_comparison

        >>> import torch
        >>> import pyro_vae as pv
        >>> x = torch.randn(500, generator=torch.Generator().manual_seed(0))
        >>> normal = torch.distributions.Normal
        >>> exact = {f"normal of scale {scale:g}": normal(0.0, scale).log_prob(x) for scale in (0.8, 1.0, 2.0)}
        >>> ax = pv.plots.evidence_comparison(pv.compare_evidence(exact))
        >>> [label.get_text() for label in ax.get_yticklabels()][0]
        'normal of scale 1\\n-1.433 nats'
    """
    import pandas as pd

    needed = ["log_evidence", "difference", "difference_error", "difference_monte_carlo_error", "unreliable"]
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"`table` must be a result of `pv.compare_evidence`, got {describe(table)}")
    missing = [column for column in needed if column not in table.columns]
    if missing or len(table) == 0:
        got = f"a table without the columns {missing}" if missing else "a table without rows"
        raise ValueError(f"`table` must be a result of `pv.compare_evidence`, got {got}")
    new, ax = ax is None, axes_or_new(ax)
    handles: dict[str, Any] = {}
    names = []
    for row, (name, entry) in enumerate(table.iterrows()):
        middle, colour = float(entry["difference"]), "black" if row == 0 else PALETTE[0]
        unreliable = entry["unreliable"] > 0
        for column, width, label in (
            ("difference_error", 1.5, "± one standard error"),
            ("difference_monte_carlo_error", 5.0, "part of it due to the draws (a marker may hide it)"),
        ):
            error = float(entry[column])
            if error > 0:
                ends = [middle - error, middle + error]
                (handles[label],) = ax.plot(ends, [row, row], color="0.45", linewidth=width, label=label, zorder=2)
        options: dict[str, Any] = {"marker": "D" if row == 0 else "o", "markersize": 8, "linestyle": "none"}
        label = "the best" if row == 0 else "difference to the best"
        face = "white" if unreliable else colour
        options |= {"color": colour, "markerfacecolor": face, "label": label}
        ax.plot(middle, row, zorder=3, **options)
        if label not in handles or not unreliable:
            handles[label] = Line2D([], [], **options)
        percent = float(f"{100 * entry['unreliable']:.2g}")  # 100, not 1e+02
        share = f"\nunreliable by $\\hat{{k}}$: {percent:g} %" if unreliable else ""
        names.append(f"{wrap(str(name), _NAME_WIDTH)}\n{entry['log_evidence']:.3f} nats{share}")
    if (table["unreliable"] > 0).any():
        label = "hollow: unreliable for that share of data, may be better"
        options = {"marker": "o", "markersize": 8, "linestyle": "none"}
        handles[label] = Line2D([], [], color="0.45", markerfacecolor="white", label=label, **options)
    ax.axvline(0.0, color="0.7", linestyle=":", linewidth=1, zorder=0)
    ax.set(ylim=(len(table) - 0.4, -0.6), xlabel="log p(x) minus that of the best, nats per datum", ylabel="")
    name_rows(ax, names, grow=new)
    legend_below(ax, list(handles.values()), grow=new)
    return ax


def calibration(result: Calibration, *, ax: Axes | None = None) -> Axes:
    """Is q(z | x) calibrated? The ranks of the truth among draws of q, and the band that contains them if q is exact.

    A quantity that leaves the band has its own line style and, for the first 16, its own name; the others are thin and
    grey. log p(x, z), which depends on the data, is black. If a curve is above zero on the left and below zero on the
    right, the truth is too often in the tails of q: q is too narrow. In the opposite case q is too wide. A curve on one
    side of zero means that q is biased. The title is the verdict, with the coverage of the worst coordinate.

    Args:
        result: the result of :func:`pyro_vae.calibrate`.

    .. plot::
        :include-source:
        :filename-prefix: calibration

        >>> import torch
        >>> import pyro_vae as pv
        >>> from pyro_vae import guides, likelihoods, networks, priors
        >>> _ = torch.manual_seed(0)
        >>> data, net = pv.datasets.two_gaussians(500, seed=0), networks.mlp([16])
        >>> vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
        >>> fitted = pv.fit(vae.model, vae.guide, data.x, epochs=150, lr=2e-2)
        >>> ax = pv.plots.calibration(pv.calibrate(vae.model, vae.guide, data.x[:10], num_simulations=500))
        >>> ax.get_xlabel()
        'u, fraction of draws below the truth'
    """
    if not isinstance(result, Calibration):
        raise TypeError(f"`result` must be a result of `pv.calibrate`, got {describe(result)}")
    new, ax = ax is None, axes_or_new(ax)
    *coordinates, joint = range(len(result.names))
    outside = [index for index in coordinates if result.leaves_band(index)]
    within = [index for index in coordinates if index not in outside]
    inside = result.names[within[0]] if len(within) == 1 else f"{len(within)} coordinates"
    for index in [*within, *outside, joint]:
        places, difference, lower, upper = result.ecdf_difference(index)
        options: dict[str, Any] = {"color": "black", "linewidth": 2, "label": result.names[index]}
        if index in within:
            first = index == within[0]
            options = {"color": "0.55", "linewidth": 0.8, "label": f"within the band: {inside}" if first else None}
        elif index in outside:
            number = outside.index(index)
            options |= {"color": style(number)["color"], "linewidth": 1.2, "linestyle": ("--", "-.", ":")[number % 3]}
            options |= {"marker": style(number)["marker"], "markevery": (3 * number % 14, 14), "markersize": 4}
            if number >= _MAX_NAMED:
                options["label"] = f"{len(outside) - _MAX_NAMED} more" if number == _MAX_NAMED else None
        ax.plot(places, difference, **options)
    ax.fill_between(places, lower, upper, color="0.88", zorder=0, label="band if q is exact")
    ax.set(xlabel="u, fraction of draws below the truth", ylabel="fraction of data below u, minus u", xlim=(0, 1))
    worst = max(result.coverage(0.9)[0][:-1].tolist(), key=lambda share: abs(share - 0.9))
    ax.set_title(f"{result.verdict}: 90 % intervals cover {100 * worst:.0f} %", fontsize=10)
    legend_below(ax, grow=new)
    return ax
