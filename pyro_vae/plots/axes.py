"""What all pictures share: the axes they are drawn on, and markers that tell lines apart without colour."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation

from pyro_vae._utils.validation import describe

__all__ = ["MARKERS", "axes_or_new", "legend_below"]

MARKERS = "osv^D<>pP*"
"""In their order, again from the first where there are more things than markers."""


def axes_or_new(ax: Axes | None) -> Axes:
    """The axes that were given or, if none were, those of a new figure."""
    if not isinstance(ax, Axes | None):
        raise TypeError(f"`ax` must be matplotlib's axes, such as `plt.subplots()[1]`, got {describe(ax)}")
    return plt.subplots(layout="constrained")[1] if ax is None else ax


def legend_below(ax: Axes, handles: Sequence[Any], columns: int, title: str | None = None) -> None:
    """A legend under the label of the x-axis, where it can't cover anything that is drawn."""
    under = ax.transAxes + ScaledTranslation(0, -42 / 72, ax.figure.dpi_scale_trans)
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "bbox_transform": under}
    look: dict[str, Any] = {"fontsize": 9, "title_fontsize": 9, "frameon": False, "borderaxespad": 0.0}
    ax.legend(handles=handles, ncols=columns, title=title, **place, **look)
