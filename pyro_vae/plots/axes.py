"""Helpers of all pictures: axes, and a legend below them."""

from collections.abc import Sequence
from textwrap import fill
from typing import Any, cast

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from pyro_vae._utils.validation import describe

__all__ = ["axes_or_new", "fit_figure", "grow_figure", "legend_below", "name_rows", "wrap"]

_LEGEND_HEIGHT = 0.9  # inches of a legend for which a figure of the default size has room
_LINE_HEIGHT, _LINES = 0.17, 16  # inches of a line of a name, and lines for which such a figure has room


def axes_or_new(ax: Axes | None) -> Axes:
    """Return ``ax`` or, if it is ``None``, the axes of a new figure, in which nothing is cut off."""
    if not isinstance(ax, Axes | None):
        raise TypeError(f"`ax` must be matplotlib axes, such as `plt.subplots()[1]`, got {describe(ax)}")
    return plt.subplots(layout="constrained")[1] if ax is None else ax


def legend_below(
    ax: Axes, handles: Sequence[Any] | None = None, *, title: str | None = None, grow: bool = False
) -> None:
    """Add a legend under the label of the x-axis, where it covers nothing.

    It has as many columns as the axes are wide. A name that is wider than the axes is broken into lines. The figure
    needs ``layout="constrained"``, which makes room for the legend.

    Args:
        ax: the axes, whose content is complete.
        handles: the artists to list; by default those of the axes that have a label.
        title: title of the legend.
        grow: whether to make the figure higher for a high legend, so that the axes keep their size.
    """
    handles = ax.get_legend_handles_labels()[0] if handles is None else list(handles)
    if not handles:
        return
    if grow:
        cast(Figure, ax.figure).draw_without_rendering()  # the layout, and with it the width of the axes
    box = ax.get_window_extent()
    axis_box = ax.xaxis.get_tightbbox()
    below_axes = 0.0 if axis_box is None else box.y0 - axis_box.y0
    under = ax.transAxes + ScaledTranslation(0, -below_axes / ax.figure.dpi - 0.08, ax.figure.dpi_scale_trans)
    options: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "bbox_transform": under}
    options |= {"fontsize": 9, "title_fontsize": 9, "frameon": False, "borderaxespad": 0.0, "title": title}
    for columns in range(min(4, len(handles)), 0, -1):
        legend = ax.legend(handles=handles, ncols=columns, **options)
        if legend.get_window_extent().width <= box.width:
            break
    else:
        for width in range(max(len(text.get_text()) for text in legend.get_texts()), 11, -4):
            for text in legend.get_texts():
                text.set_text(wrap(text.get_text().replace("\n", " "), width))
            if legend.get_window_extent().width <= box.width:
                break
    if grow:
        height = legend.get_window_extent().height / ax.figure.dpi
        grow_figure(ax, height - _LEGEND_HEIGHT)


def grow_figure(ax: Axes, inches: float) -> None:
    """Make the figure of the axes higher, if ``inches`` is positive."""
    figure = cast(Figure, ax.figure)
    figure.set_figheight(figure.get_figheight() + max(0.0, inches))


def name_rows(ax: Axes, names: Sequence[str], *, grow: bool = False) -> None:
    """Write a name at each whole number of the y-axis, in a figure that is high enough for their lines."""
    ax.set_yticks(range(len(names)), names)
    if grow:
        lines = len(names) * max(name.count("\n") + 1.5 for name in names)
        grow_figure(ax, _LINE_HEIGHT * (lines - _LINES))


def fit_figure(ax: Axes, height: float, width: float) -> None:
    """Give the figure of the axes the height of an image, in proportion to its width, and room for labels."""
    figure = cast(Figure, ax.figure)
    figure.set_figheight(min(max(0.9 * figure.get_figwidth() * height / width, 0.6), 9.0) + 0.7)


def wrap(name: str, width: int) -> str:
    """Break a name into lines of at most ``width`` characters, but for a formula, which stays whole."""
    return name if "$" in name else fill(name, width)
