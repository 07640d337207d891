"""How the examples save what they have found."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import xarray as xr
from matplotlib.figure import Figure


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
