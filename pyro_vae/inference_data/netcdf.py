"""A netCDF file to which draws are written piece by piece, and which appears only when it is complete."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae._utils.files import replacing
from pyro_vae._utils.validation import file_path, writable

if TYPE_CHECKING:
    import h5netcdf
    import xarray as xr

__all__ = ["DrawFile", "check_space", "new_path", "writing"]

Groups = Mapping[str, Mapping[str, np.ndarray]]


def new_path(path: str | os.PathLike[str]) -> Path:
    """Return the path; raise if it is a folder, the name is that of another format, or its folder is not writable."""
    path = file_path(path, "path")
    if path.suffix == ".zarr":
        raise ValueError(f"`path` must be a netCDF file, such as 'draws.nc', and not a zarr store, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"`path` must be a file, such as 'draws.nc', got the folder {str(path)!r}")
    return writable(path, "path")


def check_space(path: Path, num_bytes: int) -> None:
    """Raise an ``OSError`` if the disk has fewer free bytes."""
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        must = f"on a disk with {num_bytes} free bytes for the draws"
        raise OSError(f"`path` must be {must}, got {free} in {str(path.parent)!r}")


class DrawFile:
    """An open file, whose groups have their dimensions and coordinates; its layout is that of ``xarray``."""

    def __init__(self, file: "h5netcdf.File"):
        self._file = file

    def add(self, group: str, name: str, dims: tuple[str, ...], dtype: np.dtype, attrs: Mapping[str, str]) -> None:
        """Create a variable whose values will be written later."""
        boolean, fill = dtype.kind == "b", dtype.type(np.nan) if dtype.kind == "f" else None
        stored = np.dtype(np.int8) if boolean else dtype
        variable = self._file[group].create_variable(name, dims, stored, fillvalue=fill)
        variable.attrs.update({"dtype": "bool"} if boolean else {})
        variable.attrs.update(attrs)

    def write(self, draws: slice, values: Groups) -> None:
        """Write some draws of the one chain."""
        for group, variables in values.items():
            for name, value in variables.items():
                self._file[group][name][0, draws] = value

    def take(self, group: str, draws: np.ndarray, attrs: Mapping[str, Any]) -> None:
        """Replace the draws of a group by some of them, in another order, and add attributes to it."""
        for name, variable in self._file[group].variables.items():
            if variable.dimensions[:2] == ("chain", "draw"):
                self._file[group][name][0] = self._file[group][name][0][draws]
        self._file[group].attrs.update(attrs)

    def put(self, group: str, name: str, dims: tuple[str, ...], values: np.ndarray) -> None:
        """Create a variable without draws, and write its values."""
        self.add(group, name, dims, values.dtype, {})
        self._file[group][name][...] = values


@contextmanager
def writing(path: Path, template: "xr.DataTree") -> Iterator[DrawFile]:
    """Write to a temporary file in the same folder and move it to the path; after an error the path is unchanged."""
    import h5netcdf

    with replacing(path) as partial:
        template.to_netcdf(partial, engine="h5netcdf")
        with h5netcdf.File(partial, "a") as file:
            yield DrawFile(file)
