"""A netCDF file that draws are written to piece by piece, and that is there when it is whole."""

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import h5netcdf
import numpy as np
import xarray as xr

from pyro_vae._utils.validation import file_path, writable

__all__ = ["DrawFile", "check_space", "new_path", "writing"]

Groups = Mapping[str, Mapping[str, np.ndarray]]


def new_path(path: str | os.PathLike[str]) -> Path:
    """The path, if a netCDF file can be written there.

    Raises:
        ValueError: if it is a folder, or of another format by its name.
        FileNotFoundError: if its folder is not there.
        PermissionError: if nothing can be written in it.
    """
    path = file_path(path, "path")
    if path.suffix == ".zarr":
        raise ValueError(f"`path` must be a netCDF file, such as 'draws.nc': zarr is not written, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"`path` must be a file in one, such as 'draws.nc': {str(path)!r} is a folder")
    return writable(path, "path")


def check_space(path: Path, num_bytes: int) -> None:
    """Raise an ``OSError`` if the disk has not as many bytes left."""
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise OSError(f"path: the draws take {num_bytes} bytes, and {str(path.parent)!r} has {free} left")


class DrawFile:
    """A file whose groups have their dimensions and coordinates, and get their variables.

    Layout and attributes are those that ``xarray`` gives a whole tree.
    """

    def __init__(self, file: h5netcdf.File):
        self._file = file

    def add(self, group: str, name: str, dims: tuple[str, ...], dtype: np.dtype, attrs: Mapping[str, str]) -> None:
        """A variable, whose values are still to be written."""
        floating, boolean = dtype.kind == "f", dtype.kind == "b"
        variable = self._file[group].create_variable(
            name, dims, np.dtype(np.int8) if boolean else dtype, fillvalue=dtype.type(np.nan) if floating else None
        )
        variable.attrs.update({"dtype": "bool"} if boolean else {})
        variable.attrs.update(attrs)

    def write(self, draws: slice, values: Groups) -> None:
        """Some draws of the one chain."""
        for group, variables in values.items():
            for name, value in variables.items():
                self._file[group][name][0, draws] = value

    def put(self, group: str, name: str, dims: tuple[str, ...], values: np.ndarray) -> None:
        """A variable without draws, with its values."""
        self.add(group, name, dims, values.dtype, {})
        self._file[group][name][...] = values


@contextmanager
def writing(path: Path, template: xr.DataTree) -> Iterator[DrawFile]:
    """Write beside the path, and move there in the end; after an error or interruption nothing is left."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        template.to_netcdf(beside, engine="h5netcdf")
        with h5netcdf.File(beside, "a") as file:
            yield DrawFile(file)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
