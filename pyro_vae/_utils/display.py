"""How results show themselves: a line of words and numbers, and a small table in a notebook."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from textwrap import shorten
from typing import Any, NamedTuple

__all__ = ["Result", "Table", "count_of", "per_cell", "spark_line"]

_MAX_ROWS = 20
_MAX_CELL = 300  # characters
_MAX_POINTS = 120  # of a spark line
_MAX_LINE = 60  # characters of a cell that stay on one line
_SIZE = (160, 32)  # width and height of a spark line, in pixels


class Table(NamedTuple):
    """A table whose first column names the rows, with a note below."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""

    def limited(self, most: int) -> "Table":
        """Return a table of at most so many rows: the first ones and the last one, and a note that says so."""
        if len(self.rows) <= most:
            return self
        note = f"The first {most - 1} and the last of {len(self.rows)} rows. {self.note}"
        return Table(self.head, [*self.rows[: most - 1], self.rows[-1]], note.strip())


class Result:
    """Shows itself without its tensors: ``repr`` is a line of words and numbers, ``_repr_html_`` a small table.

    A subclass has :meth:`_line` and :meth:`_table`; a dataclass needs ``repr=False``.
    """

    def _line(self) -> str:
        """Return the main numbers, with their units, in one line, or a few."""
        raise NotImplementedError

    def _table(self) -> Table:
        """Return the main numbers as a table."""
        raise NotImplementedError

    def _curves(self) -> Mapping[str, Sequence[float]]:
        """Return the curves of a spark line by name, if there are any."""
        return {}

    def __repr__(self) -> str:
        try:
            lines = [_short(line) for line in self._line().splitlines()]
            shown = lines[0] if len(lines) == 1 else "\n  ".join(["", *lines]) + "\n"
            return f"{type(self).__name__}({shown})"
        except Exception:  # made by hand from other values: an error message or a debugger must be able to show it
            return object.__repr__(self)

    def _repr_html_(self) -> str:
        table, curves = self._table().limited(_MAX_ROWS), self._curves()
        head = [_cell(cell, 'th scope="col"') for cell in table.head]
        rows = [
            [_cell(name, 'th scope="row"', ";font-weight:normal"), *(_cell(cell, "td") for cell in cells)]
            for name, *cells in table.rows
        ]
        body = [f"<tr>{''.join(row)}</tr>" for row in rows]
        return (
            f'<div style="overflow-x:auto"><b>{escape(type(self).__name__)}</b>{spark_line(curves) if curves else ""}'
            f'<table style="color:inherit;border-collapse:separate;border-spacing:1em 0;margin:0">'
            f"<thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(body)}</tbody></table>"
            f"<small>{escape(table.note)}</small></div>"
        )


def count_of(number: int, noun: str, plural: str = "") -> str:
    """Spell a number of things.

    >>> count_of(1, "datum", "data"), count_of(1000, "epoch")
    ('1 datum', '1,000 epochs')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def per_cell(plates: Sequence[str] | None) -> str:
    """Spell what a number of nats is of: a datum for ``None``, else a cell of some plates, or all data without plates.

    >>> per_cell(None), per_cell(["group"]), per_cell([])
    ('per datum', "per cell of 'group'", 'of all data')
    """
    if plates is None:
        return "per datum"
    return f"per cell of {' × '.join(map(repr, plates))}" if plates else "of all data"


def spark_line(curves: Mapping[str, Sequence[float]]) -> str:
    """Draw curves as a small SVG in the colour of the text, so that it is readable on light and on dark.

    The first curve is solid, further ones are dashed. The vertical axis begins at the smallest value after the first
    tenth of each curve: the jump of the first epochs would flatten the rest. Values that are not finite are left out.
    """
    width, height = _SIZE
    kept = {name: [float(value) for value in values] for name, values in curves.items()}
    late = [value for values in kept.values() for value in values[len(values) // 10 :] if math.isfinite(value)]
    if not late:
        return ""
    low, high = min(late), max(value for values in kept.values() for value in values if math.isfinite(value))
    lines = []
    for index, values in enumerate(kept.values()):
        step = max(1, math.ceil(len(values) / _MAX_POINTS))
        chosen = sorted({*range(0, len(values), step), len(values) - 1})
        points = [
            (
                2 + (width - 4) * place / max(1, len(values) - 1),
                height - 2 - (height - 4) * (max(values[place], low) - low) / ((high - low) or 1),
            )
            for place in chosen
            if math.isfinite(values[place])
        ]
        if len(points) == 1:
            points *= 2  # a point of a round cap
        dashes = ' stroke-dasharray="3 3"' if index else ""
        shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        lines.append(f'<polyline points="{shown}"{dashes}/>')
    label = escape(", ".join(kept) + " by epoch", quote=True)
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}" '
        f'style="margin-left:1em;vertical-align:middle"><title>{label}</title><g fill="none" stroke="currentColor" '
        f'stroke-width="1.5" stroke-linecap="round">{"".join(lines)}</g></svg>'
    )


def _short(text: str) -> str:
    return shorten(text, _MAX_CELL, placeholder=" ...")


def _cell(value: Any, tag: str, style: str = "") -> str:
    """Return a cell of a table, whose text breaks into lines only if it is long."""
    text = _short(str(value))
    style += "" if len(text) > _MAX_LINE else ";white-space:nowrap"
    return f'<{tag} style="text-align:left{style}">{escape(text)}</{tag.split()[0]}>'
