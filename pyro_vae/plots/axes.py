"""Helpers of all pictures: axes, a legend below them, and markers that distinguish lines without colour."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation

from pyro_vae._utils.validation import describe

__all__ = ["MARKERS", "axes_or_new", "legend_below"]

MARKERS = "osv^D<>pP*"
"""Markers in the order of use; after the last comes the first again."""


def axes_or_new(ax: Axes | None) -> Axes:
    """Return ``ax`` or, if it is ``None``, the axes of a new figure."""
    if not isinstance(ax, Axes | None):
        raise TypeError(f"`ax` must be matplotlib axes, such as `plt.subplots()[1]`, got {describe(ax)}")
    return plt.subplots(layout="constrained")[1] if ax is None else ax


def legend_below(ax: Axes, handles: Sequence[Any], columns: int, title: str | None = None) -> None:
    """Add a legend under the label of the x-axis, where it covers nothing."""
    under = ax.transAxes + ScaledTranslation(0, -42 / 72, ax.figure.dpi_scale_trans)
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "bbox_transform": under}
    options: dict[str, Any] = {"fontsize": 9, "title_fontsize": 9, "frameon": False, "borderaxespad": 0.0}
    ax.legend(handles=handles, ncols=columns, title=title, **place, **options)
