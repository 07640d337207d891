"""What all pictures share: the axes they are drawn on, and markers that tell lines apart without colour."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

__all__ = ["MARKERS", "axes_or_new"]

MARKERS = "osv^D<>pP*"
"""In their order, again from the first where there are more things than markers."""


def axes_or_new(ax: Axes | None) -> Axes:
    """The axes that were given or, if none were, those of a new figure."""
    return plt.subplots(layout="constrained")[1] if ax is None else ax
