"""Dimension names and coordinates of sites, guide parameters, constant data and histories."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyro.distributions as dist
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_vae._utils.data import Columns
from pyro_vae.distributions.mixture import MixtureOfNormals
from pyro_vae.inference_data.layouts import SiteLayout
from pyro_vae.inference_data.settings import ExportSettings
from pyro_vae.model_guide import ModelGuide, same_rows

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["DataLabels", "DimensionNames", "data_labels", "parameters", "variable_names"]

_LATENT_DIMS = {0: (), 1: ("latent",), 2: ("latent", "category")}
_OBSERVED_DIMS = {0: (), 1: ("feature",), 2: ("row", "column"), 3: ("channel", "row", "column")}
_STATISTICS = {"lp", "log_q", "log_weight", "khat"}
_OF_ARVIZ = {"chain", "draw", "sample"}  # its dimensions: those of draws, and of chains and draws in one


class DataLabels(NamedTuple):
    """The labels that data come with: of their rows, and of the columns of observed sites, by name."""

    rows: np.ndarray | None = None
    columns: dict[str, Columns] = {}


def data_labels(pair: ModelGuide) -> DataLabels:
    """Return the labels of the data of a pair: an observed site has those of the tensor that its values are."""
    columns = {
        name: labels
        for name, site in pair.observed.items()
        for tensor, labels in zip(pair.data, pair.data.columns, strict=True)
        if labels is not None and tensor.shape == site["value"].shape and same_rows(tensor, site["value"])
    }
    return DataLabels(pair.data.row_labels, columns)


class DimensionNames:
    """Dimension names and coordinates of the variables of an export.

    Where a site has the name of a dimension, the dimension has ``_dim`` behind its name, ``obs_dim``; see
    :func:`variable_names` for the sites themselves.

    Args:
        unobserved, observed: latent and deterministic sites, and observed sites, by name.
        settings: the user's names, the constant data and the history; an error if they do not fit the variables.
        chains: size of the dimension ``chain``.
        labels: the labels of the data, which are coordinates where the user has no others.

    Attributes:
        variables: name of the variable of each site.
        obs: name of the dimension of the data plate.
        dims, shapes: dimensions of each site and constant, without chain and draw, and their sizes.
        sizes: size of each dimension.
        coords: dimension and values of each coordinate, by name.
    """

    def __init__(
        self,
        unobserved: dict[str, Any],
        observed: dict[str, Any],
        settings: ExportSettings,
        chains: int = 1,
        labels: DataLabels | None = None,
    ):
        labels = labels or DataLabels()
        sites, constants, history = unobserved | observed, settings.constants, settings.history
        self.variables = variable_names(sites)
        self._taken = {*self.variables.values(), *_OF_ARVIZ}
        dims = _checked_dims(settings.dims, [*sites, *constants, *history], {*self.variables.values()})
        self.obs = self._free("obs")
        self._plates = {settings.plate: self.obs}  # the dimension of each plate
        self._taken.add(self.obs)
        layouts = {name: SiteLayout(site) for name, site in sites.items()}
        for plate in (plate for layout in layouts.values() for plate in layout.plates):
            if plate not in self._plates:
                self._plates[plate] = self._free(_allowed(plate))
                self._taken.add(self._plates[plate])
        self.dims: dict[str, tuple[str, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.sizes = {"chain": chains, "draw": settings.draws}
        columns: dict[str, np.ndarray] = {}  # by dimension
        for name, layout in layouts.items():
            plates, shape = layout.plates, layout.event
            of_columns = labels.columns.get(name) if len(shape) == 1 else None
            event = dims.get(name) or self._event_dims(name, shape, name in observed, of_columns, columns)
            if len(event) != len(shape):
                got = f"{list(event)} for {name!r}, whose event shape is {tuple(shape)}"
                raise ValueError(f"`dims` must have one name for each event dimension, got {got}")
            of_plates = (self._plate_dim(name, plate, size) for plate, size in plates.items())
            self._add(name, (*of_plates, *event), (*plates.values(), *shape), drawn=True)
            if of_columns is not None:
                columns[event[0]] = of_columns[1]
        for name, value in constants.items():
            _check_name(name, "constant_data")
            if name in sites or name in self.variables.values():
                raise ValueError(f"`constant_data` must have other names than the sites, got {name!r}")
            self._add(name, self._constant_dims(name, value, dims.get(name)), value.shape)
        self._history_dims: dict[str, tuple[str, ...]] = {}
        for name, value in history.items():
            _check_name(name, "history")
            named = ("epoch",) if name in self.dims else tuple(dims.get(name, ("epoch",)))
            if len(named) != 1:
                raise ValueError(f"`dims` must have one name for {name!r} of the history, got {list(named)}")
            self._add_sizes(name, named, value.shape)
            self._history_dims[name] = named
        self.coords = {dim: (dim, np.arange(size)) for dim, size in self.sizes.items()}
        self.coords |= {dim: (dim, values) for dim, values in columns.items()}
        if labels.rows is not None and self.sizes.get(self.obs) == len(labels.rows):
            self.coords[self.obs] = (self.obs, labels.rows)
        for name, values in settings.coords.items():
            self._add_coordinate(name, values)
        if taken := (self.coords.keys() & constants.keys()) | ({"epoch"} & history.keys()):
            raise ValueError(
                f"`constant_data` and `history` must have other names than dimensions and `coords`, got {min(taken)!r}"
            )

    def _add(self, name: str, dims: tuple[str, ...], shape: tuple[int, ...], drawn: bool = False) -> None:
        every = [*(["chain", "draw"] if drawn else []), *dims]
        if len(set(every)) < len(every):
            raise ValueError(f"`dims` must have different names for the dimensions of {name!r}, got {every}")
        self._add_sizes(name, dims, shape)
        self.dims[name], self.shapes[name] = dims, shape

    def plate_dims(self, frames: Iterable[CondIndepStackFrame]) -> tuple[str, ...]:
        """Return the names of the dimensions of plates."""
        return tuple(self._plates[frame.name] for frame in frames)

    def add_dim(self, dim: str, coordinate: Tensor) -> str:
        """Add a dimension with these coordinates, and return its name."""
        dim = self._free(dim)
        self._taken.add(dim)
        self.sizes[dim], self.coords[dim] = len(coordinate), (dim, coordinate.numpy())
        return dim

    def _plate_dim(self, name: str, plate: str, size: int) -> str:
        """Name the dimension of a plate around a site; plates of one name and several sizes have several dimensions."""
        dim = self._plates[plate]
        if self.sizes.get(dim, size) == size:
            return dim
        return self._free(f"{self.variables[name]}_{dim}")

    def _add_sizes(self, name: str, dims: tuple[str, ...], shape: tuple[int, ...]) -> None:
        for dim, size in zip(dims, shape, strict=True):
            if self.sizes.setdefault(dim, size) != size:
                got = f"{dim!r} of size {size} for {name!r}, and of size {self.sizes[dim]} elsewhere"
                raise ValueError(f"`dims` must have one name for dimensions of one size, got {got}")

    def _event_dims(
        self,
        name: str,
        shape: tuple[int, ...],
        is_observed: bool,
        labels: Columns | None,
        columns: Mapping[str, np.ndarray],
    ) -> tuple[str, ...]:
        defaults = _OBSERVED_DIMS if is_observed else _LATENT_DIMS
        plain = defaults.get(len(shape), tuple(f"dim_{axis}" for axis in range(len(shape))))
        if labels is not None:
            plain = (_allowed(labels[0]),)
            if not np.array_equal(columns.get(self._free(plain[0]), labels[1]), labels[1]):
                return (self._free(f"{self.variables[name]}_{plain[0]}"),)
        dims = tuple(map(self._free, plain))
        clash = any(self.sizes.get(dim, size) != size for dim, size in zip(dims, shape, strict=True))
        return tuple(self._free(f"{self.variables[name]}_{dim}") for dim in plain) if clash else dims

    def _free(self, dim: str) -> str:
        """Return a name for a dimension that no site, no plate, and neither chain nor draw has."""
        while dim in self._taken:
            dim += "_dim"
        return dim

    def _constant_dims(self, name: str, value: np.ndarray, given: Sequence[str] | None) -> tuple[str, ...]:
        """The first axis lies along the data if it has as many entries, unless every axis is named."""
        lead = (self.obs,) if value.ndim and value.shape[0] == self.sizes.get(self.obs) else ()
        if given is None:
            return (*lead, *(self._free(f"{name}_{axis}") for axis in range(len(lead), value.ndim)))
        if len(given) == value.ndim:
            return tuple(given)
        if len(given) + len(lead) != value.ndim:
            must = f"one name for each axis of {name!r} in `constant_data`, of shape {value.shape}"
            raise ValueError(f"`dims` must have {must}, got {list(given)}")
        return (*lead, *given)

    def _add_coordinate(self, name: str, values: Any) -> None:
        dim, values = values if _has_dimension(values) else (name, values)
        coordinate, sizes = np.asarray(values), self.sizes
        _check_name(name, "coords")
        if dim not in sizes and f"{dim}_dim" in sizes:
            raise ValueError(
                f"`coords` must lie along a dimension, of {sizes}, got {name!r} along {dim!r}, which is a site: the "
                f"dimension is called '{dim}_dim'"
            )
        if coordinate.shape != (sizes.get(dim),):
            found = f"{len(coordinate)} entries" if coordinate.ndim == 1 else f"shape {coordinate.shape}"
            along = "" if name == dim else f" along {dim!r}"
            must = f"one entry for each element of a dimension, of {sizes}"
            raise ValueError(f"`coords` must have {must}, got {found} for {name!r}{along}")
        if name in sizes and name != dim:
            raise ValueError(f"`coords` must have the entries of the dimension {name!r} along it, got {dim!r}")
        if name in {*self.variables.values()} | self.dims.keys() | self._history_dims.keys() | _STATISTICS:
            raise ValueError(f"`coords` must have other names than the variables, got {name!r}")
        self.coords[name] = (dim, coordinate)

    def dataset(self, values: Mapping[str, np.ndarray], drawn: bool = False) -> "xr.Dataset":
        """Make a dataset of sites or constants; draws have chains and draws on the left."""
        lead = ("chain", "draw") if drawn else ()
        found = {name: ((*lead, *self.dims[name]), value, self.attrs(name)) for name, value in values.items()}
        return self.named({self.variables.get(name, name): variable for name, variable in found.items()})

    def attrs(self, name: str) -> dict[str, str]:
        """Return the attribute of a site's variable that has another name."""
        return {} if self.variables.get(name, name) == name else {"site": name}

    def training(self, history: Mapping[str, np.ndarray]) -> "xr.Dataset":
        """Make a dataset of a history: a learning rate, and numbers in nats per datum."""
        units = {name: {} if name == "lr" else {"units": "nats per datum"} for name in history}
        return self.named({name: (self._history_dims[name], value, units[name]) for name, value in history.items()})

    def guide(self, latents: Mapping[str, Any]) -> "xr.Dataset":
        """Make a dataset of the parameters of each latent's distribution, without draws."""
        arrays: dict[str, Any] = {}
        for name, site in latents.items():
            fn, shape = site["fn"], self.shapes[name]
            batch = shape[: len(shape) - len(fn.event_shape)]
            if len(batch) > len(SiteLayout(site).plates):
                continue  # the batch has dimensions that are no plates
            for parameter, value in parameters(fn).items():
                value = value.expand((*fn.batch_shape, *value.shape[len(fn.batch_shape) :]))
                value = value.reshape((*batch, *value.shape[len(fn.batch_shape) :]))
                of_components = parameter == "component_logits" or isinstance(fn, MixtureOfNormals)
                dims = self._parameter_dims(name, parameter, value.shape, len(batch), of_components)
                variable = f"{self.variables[name]}_{parameter}"
                while variable in arrays.keys() | self.sizes.keys():
                    variable += "_"
                arrays[variable] = (dims, value.cpu().numpy(), self.attrs(name))
        if taken := sorted(arrays.keys() & self.coords.keys()):
            raise ValueError(f"`coords` must have other names than the parameters of the guide, got {taken[0]!r}")
        return self.named(arrays)

    def _parameter_dims(
        self, name: str, parameter: str, shape: tuple[int, ...], num_batch: int, of_components: bool
    ) -> tuple[str, ...]:
        """The columns of a matrix lie along a second dimension, ``_bis``; axes of another shape are numbered."""
        dims, sizes = self.dims[name], self.shapes[name]
        own, event = tuple(shape[num_batch:]), sizes[num_batch:]
        if own == event[: len(own)] and not of_components:
            return dims[: len(shape)]
        if parameter in _MATRICES and own == 2 * event:
            columns = self._free(f"{dims[-1]}_bis")
            self.coords.setdefault(columns, (columns, self.coords[dims[-1]][1]))
            return (*dims, columns)
        variable = f"{self.variables[name]}_{parameter}"
        numbered = tuple(self._free(f"{variable}_{axis}") for axis in range(num_batch, len(shape)))
        for dim, size in zip(numbered, own, strict=True):
            self.coords.setdefault(dim, (dim, np.arange(size)))
        return (*dims[:num_batch], *numbered)

    def named(self, arrays: Mapping[str, Any]) -> "xr.Dataset":
        """Make a dataset of arrays with their dimensions, and add the coordinates along these."""
        import xarray as xr

        return xr.Dataset(arrays, coords=self.coordinates(dim for array in arrays.values() for dim in array[0]))

    def coordinates(self, dims: Iterable[str]) -> dict[str, tuple[str, np.ndarray]]:
        """Return all coordinates along these dimensions."""
        used = set(dims)
        return {name: (dim, values) for name, (dim, values) in self.coords.items() if dim in used}


_MATRICES = {"covariance_matrix", "precision_matrix", "scale_tril"}
_ALIASES = {"logits": "probs", "precision_matrix": "covariance_matrix", "scale_tril": "covariance_matrix"}


def parameters(fn: Any) -> dict[str, Tensor]:
    """Return the parameters of a distribution, each once; a transformed distribution may have none.

    >>> import torch
    >>> parameters(dist.Normal(torch.zeros(2), 1.0).to_event(1))
    {'loc': tensor([0., 0.]), 'scale': tensor([1., 1.])}
    """
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    names = [name for name in fn.arg_constraints if _ALIASES.get(name) not in fn.arg_constraints]
    values = {name: getattr(fn, name) for name in names if name != "log_density"}
    return {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}


def variable_names(sites: Iterable[str]) -> dict[str, str]:
    """Return the name of each site's variable: the site's own, if a netCDF file and ArviZ accept it.

    Otherwise a character that a file cannot have is a dot: ``a/z``, of ``pyro.contrib.autoname.scope``, is ``a.z``; and
    a site named as one of ArviZ's dimensions has ``_site`` behind it. Where another site has that name, ``_`` follows.

    >>> variable_names(["z", "a/z", "a.z", "draw"])
    {'z': 'z', 'a/z': 'a.z_', 'a.z': 'a.z', 'draw': 'draw_site'}
    """
    sites = list(sites)
    wanted = {name: _allowed(name) + "_site" * (_allowed(name) in _OF_ARVIZ) for name in sites}
    taken = {name for name in sites if wanted[name] == name}
    for name in sites:
        while wanted[name] != name and wanted[name] in taken:
            wanted[name] += "_"
        taken.add(wanted[name])
    return wanted


def _allowed(name: str) -> str:
    """Replace by dots what a name in a netCDF file cannot have: slashes, control characters, spaces at the ends."""
    name = re.sub(r"[/\x00-\x1f\x7f]|^\s|\s$", ".", unicodedata.normalize("NFC", name))
    return name if re.match(r"\w|[^\x00-\x7f]", name) else f"_{name}"


def _check_name(name: str, argument: str) -> None:
    if _allowed(name) != name:
        raise ValueError(f"`{argument}` must have names that a file accepts, such as {_allowed(name)!r}, got {name!r}")


def _has_dimension(values: Any) -> bool:
    """Whether a coordinate is a dimension and its values, ``("obs", labels)``, and not two names."""
    is_pair = isinstance(values, tuple) and len(values) == 2
    return is_pair and isinstance(values[0], str) and not isinstance(values[1], str)


def _checked_dims(
    dims: Mapping[str, Sequence[str]], variables: Sequence[str], taken: set[str]
) -> Mapping[str, Sequence[str]]:
    for name, value in dims.items():
        if not isinstance(value, Sequence) or not all(isinstance(dim, str) and dim for dim in value):
            raise TypeError(f"`dims` must be names, one for each dimension, got {value!r} for {name!r}")
        for dim in value:
            _check_name(dim, "dims")
            if dim in taken:
                raise ValueError(f"`dims` must have other names than the sites, got {dim!r} for {name!r}")
    if unknown := sorted(set(dims) - set(variables)):
        raise ValueError(f"`dims` must have variables as keys, of {sorted(variables)}, got {unknown}")
    return dims
