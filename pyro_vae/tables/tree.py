"""The tree of draws of a table, with a variable for each column."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.inference_data.dims import variable_names
from pyro_vae.inference_data.groups import tree_of

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["by_column"]

_OF_DATA = ("posterior_predictive", "prior_predictive", "observed_data")


def by_column(tree: "xr.DataTree", columns: Sequence[Any]) -> "xr.DataTree":
    """Split the site ``x`` of a table into a variable for each column, and add the group ``imputed``."""
    groups = {name: child.to_dataset() for name, child in tree.children.items()}
    taken = {str(name) for group in groups.values() for name in (*group.variables, *group.dims)} - {"x"}
    names = _variables([column.name for column in columns], taken)
    for group in _OF_DATA:
        groups[group] = _split(groups[group], columns, names)
    if imputed := _missing_entries(groups["observed_data"], groups["posterior_predictive"]):
        groups["imputed"] = imputed
    return tree_of(groups, {str(name): value for name, value in tree.attrs.items()})


def _variables(columns: Sequence[str], taken: set[str]) -> list[str]:
    """Names of variables that files and ArviZ accept, and that no site, dimension or coordinate has."""
    found = variable_names(columns)
    for column in columns:
        while found[column] in taken:
            found[column] += "_column"
    return [found[column] for column in columns]


def _split(data: "xr.Dataset", columns: Sequence[Any], names: Sequence[str]) -> "xr.Dataset":
    feature = data["x"].dims[-1]
    parts = {}
    for place, (column, name) in enumerate(zip(columns, names, strict=True)):
        values = data["x"].isel({feature: place}, drop=True)
        attrs = {"kind": column.kind} | ({} if name == column.name else {"column": column.name})
        if column.levels:
            attrs["levels"] = ", ".join(map(str, column.levels))
        parts[name] = values.copy(data=column.in_units(np.asarray(values.data, dtype=float))).assign_attrs(attrs)
    return data.drop_vars(["x", feature], errors="ignore").assign(parts)


def _missing_entries(observed: "xr.Dataset", drawn: "xr.Dataset") -> "xr.Dataset | None":
    """The draws of the entries that are missing in the observed data: one dimension for each column."""
    import xarray as xr

    parts, coords = {}, {}
    for name, values in observed.data_vars.items():
        obs = values.dims[0]
        holes = np.flatnonzero(np.isnan(values.data))
        if holes.size:
            dim = f"{name}_missing"
            chosen = drawn[name].isel({obs: holes})
            parts[name] = (("chain", "draw", dim), chosen.data, values.attrs)
            coords[dim] = values[obs].data[holes]
    if not parts:
        return None
    return xr.Dataset(parts, coords | {key: drawn[key] for key in ("chain", "draw")})
