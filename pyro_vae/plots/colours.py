"""The palette of all pictures: a colour, a marker and a line style for each cluster, class, method or model.

The ten colours differ for readers with any of the common forms of colour blindness, and in lightness, so that they
differ in grey as well. Marker and line style differ too: no picture needs colour to be read.
"""

from typing import Any

from pyro_vae._utils.validation import is_integer

__all__ = ["EXACT", "GUIDE", "LINES", "MARKERS", "MISSING", "PALETTE", "style"]

PALETTE = (
    "#0b41dd", "#f1a002", "#328980", "#2e0b74", "#a174ea", "#543665", "#88cefd", "#8a6003", "#043e17", "#83a964",
)  # fmt: skip
"""Colours in the order of use; after the last comes the first again."""

MARKERS = "osv^D<>pP*"
"""Markers in the order of use."""

LINES = ("-", "--", "-.", ":")
"""Line styles in the order of use."""

EXACT = "0.75"
"""The grey of what is exact: the true posterior, the data, or the generating density."""

MISSING = "#f1a002"
"""The colour of missing pixels."""

GUIDE = "#c8102e"
"""The colour of the guide q, next to what is exact."""


def style(index: int) -> dict[str, Any]:
    """Return colour, marker and line style of one of several things in a picture, as arguments of ``ax.plot``.

    Things with the same index have the same style in every picture. No two of the first 40 have the same one.

    Args:
        index: 0 for the first cluster, class, method or model, 1 for the second, and so on.

    Raises:
        ValueError: if ``index`` is not an integer, 0 or more.

    >>> style(1)
    {'color': '#f1a002', 'marker': 's', 'linestyle': '--'}
    """
    if not is_integer(index) or index < 0:
        raise ValueError(f"`index` must be an integer, 0 or more, got {index!r}")
    turn = index // len(PALETTE)
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": MARKERS[(index + turn) % len(MARKERS)],
        "linestyle": LINES[(index + turn) % len(LINES)],
    }
