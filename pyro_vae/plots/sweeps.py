"""The picture of a sweep: its settings, compared with the best."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from pyro_vae._utils.validation import describe, positive_int
from pyro_vae.plots.axes import axes_or_new, legend_below, name_rows, wrap
from pyro_vae.plots.colours import PALETTE
from pyro_vae.sweeps.result import Sweep
from pyro_vae.sweeps.space import settings_text

__all__ = ["sweep"]

_NAME_WIDTH = 28  # characters in a line of a name at the y-axis


def sweep(result: Sweep, *, most: int = 12, ax: Axes | None = None) -> Axes:
    """Which settings have the highest held-out ELBO, and are the differences larger than their errors?

    Each row is a settings, the best at the top, with its ELBO under its name. The bar is the difference to the best, ±
    one standard error of the difference. The small grey points are the differences of each seed. Settings that did not
    complete are counted in the title.

    Args:
        result: the result of :func:`pyro_vae.sweep`.
        most: number of settings that are drawn, the best ones.

    Raises:
        TypeError, ValueError: if ``result`` is something else, or no settings is complete.

    .. plot::
        :include-source:
        :filename-prefix: sweep

        >>> import tempfile
        >>> import pyro_vae as pv
        >>> from pyro_vae import guides, likelihoods, networks, priors
        >>> def make(latent, lr):
        ...     net = networks.mlp([8])
        ...     encoder, decoder = guides.DiagonalNormal(2, latent, net), likelihoods.Normal(latent, 2, net)
        ...     return pv.VAE(priors.StandardNormal(latent), encoder, decoder), {"lr": lr}
        >>> x, space = pv.datasets.two_gaussians(300, seed=0).x, {"latent": [1, 2], "lr": [0.03]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     options = {"folder": folder, "seeds": 2, "epochs": 20, "engine": None}
        ...     result = pv.sweep(make, space, x[:200], validation=x[200:], **options)
        ...     ax = pv.plots.sweep(result)
        >>> ax.get_xlabel()
        'held-out ELBO minus that of the best, nats per datum'
    """
    if not isinstance(result, Sweep):
        raise TypeError(f"`result` must be a result of `pv.sweep`, got {describe(result)}")
    positive_int(most, "most")
    complete = result.table[result.table["status"] == "complete"]
    if complete.empty:
        raise ValueError("`result` must have settings that are complete, got none")
    new, ax = ax is None, axes_or_new(ax)
    handles: dict[str, Any] = {}
    names = []
    best = [run.elbo for run in result.runs[0]]
    for row, (_, entry) in enumerate(complete.head(most).iterrows()):
        runs, first = result.runs[row], row == 0
        seeds = [run.elbo - other for run, other in zip(runs, best, strict=True)]
        if len(seeds) > 1 and not first:
            options: dict[str, Any] = {"marker": ".", "markersize": 5, "linestyle": "none", "color": "0.6"}
            ax.plot(seeds, [row] * len(seeds), zorder=1, **options)
            handles["a seed"] = Line2D([], [], label="a seed", **options)
        middle, error = float(entry["difference"]), float(entry["difference_error"])
        if error > 0:
            label, ends = "± one standard error", [middle - error, middle + error]
            (handles[label],) = ax.plot(ends, [row, row], color="0.45", linewidth=1.5, label=label, zorder=2)
        label = "the best" if first else "difference to the best"
        options = {"marker": "D" if first else "o", "markersize": 8, "linestyle": "none"}
        options["color"] = "black" if first else PALETTE[0]
        ax.plot(middle, row, zorder=3, **options)
        handles.setdefault(label, Line2D([], [], label=label, **options))
        spread = f" ± {entry['standard_error']:.3f}" if math.isfinite(entry["standard_error"]) else ""
        names.append(f"{wrap(settings_text(runs[0].settings), _NAME_WIDTH)}\n{entry['elbo']:.3f}{spread} nats")
    counts = result.table["status"].value_counts().to_dict() | {"complete": len(complete) - len(names)}
    left_out = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    if left_out:
        ax.set_title(f"not shown: {left_out}", fontsize=10)
    ax.axvline(0.0, color="0.7", linestyle=":", linewidth=1, zorder=0)
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel="held-out ELBO minus that of the best, nats per datum", ylabel="")
    name_rows(ax, names, grow=new)
    legend_below(ax, list(handles.values()), grow=new)
    return ax
