"""How the examples show and save what they have found."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import xarray as xr
from matplotlib.figure import Figure
from torch import Tensor

import pyro_vae as pv


def table(corner: str, rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str], *notes: str) -> str:
    """Names and numbers in columns, for the eye.

    Args:
        corner: what stands above the names.
        rows: by name, numbers by key.
        columns: by title, how a row is shown, such as ``"{log_p:.2f}"``; nothing where the row has no such number.
        notes: lines beneath.
    """
    cells = [[corner, *columns]]
    cells += [[name, *(_cell(row, column) for column in columns.values())] for name, row in rows.items()]
    first, *others = ([len(cell) for cell in column] for column in zip(*cells, strict=True))
    widths = [max(lengths) + 2 for lengths in others]
    lines = [
        name.ljust(max(first)) + "".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for name, *line in cells
    ]
    return "\n".join([*(line.rstrip() for line in lines), *notes])


def _cell(row: Mapping[str, Any], column: str) -> str:
    try:
        return column.format_map(row)
    except KeyError:
        return ""


def tree(pair: Any, *data: Tensor, draws: int, seed: int, **names: Any) -> xr.DataTree:
    """Draws for ArviZ of a pair, what has a ``model`` and a ``guide``; ``dims`` and ``coords`` say what is what."""
    return pv.to_datatree(pair.model, pair.guide, *data, draws=draws, seed=seed, parallel=True, **names)


def save(
    args: argparse.Namespace,
    results: dict[str, Any],
    figures: Mapping[str, Figure],
    trees: Mapping[str, xr.DataTree],
    table: str | None = None,
) -> None:
    """Write results.json with the settings, a PNG of each figure, a netCDF file of each tree, and a table as text."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    (args.out / "results.json").write_text(json.dumps({"settings": settings} | results, indent=2))
    for name, figure in figures.items():
        figure.savefig(args.out / f"{name}.png", dpi=130)
        plt.close(figure)
    for name, tree in trees.items():
        tree.to_netcdf(args.out / f"{name}.nc", engine="h5netcdf")
    written = ["results.json", *(f"{name}.png" for name in figures), *(f"{name}.nc" for name in trees)]
    if table is not None:
        (args.out / "table.txt").write_text(table + "\n")
        written.append("table.txt")
    print(f"In {args.out}: {', '.join(written)}")
