"""Names of dimensions and their coordinates: of sites, guide parameters, constants and histories."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
import xarray as xr
from torch import Tensor

__all__ = ["DimensionNames", "parameters"]

_LATENT_DIMS = {0: (), 1: ("latent",), 2: ("latent", "category")}


_STATISTICS = {"lp", "log_q", "log_weight", "khat"}


_OBSERVED_DIMS = {0: (), 1: ("feature",), 2: ("row", "column"), 3: ("channel", "row", "column")}


class DimensionNames:
    """Dimension names and coordinates of sites, constants and histories.

    Args:
        unobserved: sites of latents and of what is deterministic given them, by name.
        observed: observed sites.
        plate: name of the data plate, whose dimension is called ``obs``.
        dims: the user's names of event dimensions, by variable.
        coords: the user's coordinates.
        draws: size of the dimension ``draw``.
        constants: further data; along ``obs`` where their first axis has as many entries.
        history: values by epoch.
        chains: size of the dimension ``chain``.

    Attributes:
        dims: of each site and constant, without chain and draw.
        shapes: their sizes.
        sizes: of every dimension.
        coords: along which dimension, and the values, by name.
    """

    def __init__(
        self,
        unobserved: dict[str, Any],
        observed: dict[str, Any],
        plate: str,
        dims: Mapping[str, Sequence[str]],
        coords: Mapping[str, Any],
        draws: int,
        constants: Mapping[str, np.ndarray],
        history: Mapping[str, np.ndarray],
        chains: int = 1,
    ):
        sites = unobserved | observed
        self._check_dims(dims, sites, constants, history)
        self.dims: dict[str, tuple[str, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.sizes = {"chain": chains, "draw": draws}
        for name, site in sites.items():
            frames = sorted((frame for frame in site["cond_indep_stack"] if frame.vectorized), key=lambda f: f.dim)
            batch = {"obs" if frame.name == plate else frame.name: frame.size for frame in frames}
            event_shape = _event_shape(site, batch)
            event = dims.get(name) or self._event_dims(name, event_shape, name in observed)
            if len(event) != len(event_shape):
                raise ValueError(f"dims: names {list(event)} for {name}, whose event shape is {tuple(event_shape)}")
            self._take(name, (*batch, *event), (*batch.values(), *event_shape), drawn=True)
        for name, value in constants.items():
            if name in sites:
                raise ValueError(f"`constant_data` must be another: {name!r} is the name of a site")
            self._take(name, self._constant_dims(name, value, dims.get(name)), value.shape)
        self.history_dims: dict[str, tuple[str, ...]] = {}
        for name, value in history.items():
            named = ("epoch",) if name in self.dims else tuple(dims.get(name, ("epoch",)))
            if len(named) != 1:
                raise ValueError(f"`dims` must be one dimension: names {list(named)} for {name} of the history")
            self._measure(name, named, value.shape)
            self.history_dims[name] = named
        self.coords: dict[str, tuple[str, np.ndarray]] = {
            dim: (dim, np.arange(size)) for dim, size in self.sizes.items()
        }
        for name, values in coords.items():
            self._name_coordinate(name, values)

    @staticmethod
    def _check_dims(dims: Mapping[str, Sequence[str]], sites: Any, constants: Any, history: Any) -> None:
        unknown = sorted(set(dims) - set(sites) - set(constants) - set(history))
        for name, value in dims.items():
            if not isinstance(value, Sequence) or not all(isinstance(dim, str) and dim for dim in value):
                raise TypeError(f"`dims` must be names, one for each dimension, got {value!r} for {name}")
        if unknown:
            further = "".join(
                f"; {name} has {sorted(names)}"
                for name, names in (("constant_data", constants), ("history", history))
                if names
            )
            raise ValueError(f"dims: names the sites {unknown}; the model has {sorted(sites)}{further}")

    def _take(self, name: str, dims: tuple[str, ...], shape: tuple[int, ...], drawn: bool = False) -> None:
        lead = ["chain", "draw"] if drawn else []
        if len({*lead, *dims}) < len(lead) + len(dims):
            raise ValueError(f"dims: {name} would have a dimension twice: {[*lead, *dims]}")
        self._measure(name, dims, shape)
        self.dims[name], self.shapes[name] = dims, shape

    def _measure(self, name: str, dims: tuple[str, ...], shape: tuple[int, ...]) -> None:
        for dim, size in zip(dims, shape, strict=True):
            if self.sizes.setdefault(dim, size) != size:
                raise ValueError(f"dims: {dim!r} of {name} has size {size}, and {self.sizes[dim]} elsewhere")

    def _constant_dims(self, name: str, value: np.ndarray, told: Sequence[str] | None) -> tuple[str, ...]:
        """Along the data where the first axis has as many entries, unless every axis is named."""
        lead = ("obs",) if value.ndim and value.shape[0] == self.sizes.get("obs") else ()
        if told is None:
            return (*lead, *(f"{name}_{axis}" for axis in range(len(lead), value.ndim)))
        if len(told) == value.ndim:
            return tuple(told)
        if len(told) + len(lead) != value.ndim:
            raise ValueError(f"dims: names {list(told)} for {name} of constant_data, whose shape is {value.shape}")
        return (*lead, *told)

    def _name_coordinate(self, name: str, values: Any) -> None:
        dim, values = values if _is_along(values) else (name, values)
        coordinate, sizes = np.asarray(values), self.sizes
        if coordinate.shape != (sizes.get(dim),):
            along = "" if name == dim else f", along {dim!r},"
            found = f"{len(coordinate)} entries" if coordinate.ndim == 1 else f"shape {coordinate.shape}"
            raise ValueError(f"`coords` must be {sizes}: {name!r}{along} has {found}")
        if name in sizes and name != dim:
            raise ValueError(f"coords: {name!r} is a dimension, and its coordinate cannot lie along {dim!r}")
        if name in self.dims.keys() | self.history_dims.keys() | _STATISTICS:
            kind = "a site" if name in self.dims else "a variable"
            raise ValueError(f"`coords` must be another: {name!r} is the name of {kind}")
        self.coords[name] = (dim, coordinate)

    def _event_dims(self, name: str, shape: torch.Size, is_observed: bool) -> tuple[str, ...]:
        defaults = _OBSERVED_DIMS if is_observed else _LATENT_DIMS
        dims = defaults.get(len(shape), tuple(f"dim_{axis}" for axis in range(len(shape))))
        clash = any(self.sizes.get(dim, size) != size for dim, size in zip(dims, shape, strict=True))
        return tuple(f"{name}_{dim}" for dim in dims) if clash else dims

    def dataset(self, values: Mapping[str, np.ndarray], drawn: bool = False) -> xr.Dataset:
        """Values of sites or constants; those that are drawn with chains and draws on the left."""
        lead = ("chain", "draw") if drawn else ()
        return self.named({name: ((*lead, *self.dims[name]), value) for name, value in values.items()})

    def training(self, history: Mapping[str, np.ndarray]) -> xr.Dataset:
        """A history, in nats per datum."""
        units = {"units": "nats per datum"}
        return self.named({name: (self.history_dims[name], value, units) for name, value in history.items()})

    def guide(self, latents: Mapping[str, Any]) -> xr.Dataset:
        """The parameters of each latent's distribution, without draws."""
        arrays = {}
        for name, site in latents.items():
            fn, shape = site["fn"], self.shapes[name]
            batch = shape[: len(shape) - len(fn.event_shape)]
            for parameter, value in parameters(fn).items():
                if value.dim() < len(fn.batch_shape):
                    value = value.expand(fn.batch_shape)
                value = value.reshape((*batch, *value.shape[len(fn.batch_shape) :]))
                arrays[f"{name}_{parameter}"] = (
                    self._parameter_dims(name, parameter, value.shape, len(batch)),
                    value.cpu().numpy(),
                )
        taken = sorted(arrays.keys() & self.coords.keys())
        if taken:
            raise ValueError(f"`coords` must be another: {taken[0]!r} is the name of a parameter of the guide")
        return self.named(arrays)

    def _parameter_dims(self, name: str, parameter: str, shape: tuple[int, ...], num_batch: int) -> tuple[str, ...]:
        """Those of the site; the columns of a matrix along a second, ``_bis``; any other shape by number."""
        dims, sizes = self.dims[name], self.shapes[name]
        own, event = tuple(shape[num_batch:]), sizes[num_batch:]
        if own == event[: len(own)] and parameter != "component_logits":
            return dims[: len(shape)]
        if parameter in _MATRICES and own == 2 * event:
            columns = f"{dims[-1]}_bis"
            self.coords.setdefault(columns, (columns, self.coords[dims[-1]][1]))
            return (*dims, columns)
        numbered = tuple(f"{name}_{parameter}_{axis}" for axis in range(num_batch, len(shape)))
        for dim, size in zip(numbered, own, strict=True):
            self.coords.setdefault(dim, (dim, np.arange(size)))
        return (*dims[:num_batch], *numbered)

    def named(self, arrays: Mapping[str, Any]) -> xr.Dataset:
        """Arrays with their dimensions, as ``xarray.Dataset`` takes them, and the coordinates along these."""
        return xr.Dataset(arrays, coords=self.coordinates(dim for array in arrays.values() for dim in array[0]))

    def coordinates(self, dims: Iterable[str]) -> dict[str, tuple[str, np.ndarray]]:
        """All coordinates along these dimensions."""
        used = set(dims)
        return {name: (dim, values) for name, (dim, values) in self.coords.items() if dim in used}


def _is_along(values: Any) -> bool:
    """Whether values of a coordinate are told with their dimension, ``("obs", labels)``, and are not two names."""
    return (
        isinstance(values, tuple) and len(values) == 2 and isinstance(values[0], str) and not isinstance(values[1], str)
    )


_MATRICES = {"covariance_matrix", "precision_matrix", "scale_tril"}


_ALIASES = {"logits": "probs", "precision_matrix": "covariance_matrix", "scale_tril": "covariance_matrix"}


def parameters(fn: Any) -> dict[str, Tensor]:
    """What a distribution was made from, each once; nothing of a transformed one that has no parameters of its own."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    names = [name for name in fn.arg_constraints if _ALIASES.get(name) not in fn.arg_constraints]
    values = {name: getattr(fn, name) for name in names if name != "log_density"}
    return {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}


def _event_shape(site: dict[str, Any], batch: Mapping[str, int]) -> torch.Size:
    """``pyro.deterministic`` takes all dimensions for the event's, unless told; the plates' are none."""
    shape = site["fn"].event_shape
    told = not site["infer"].get("_deterministic") or len(shape) < site["value"].dim()
    return shape if told or tuple(shape[: len(batch)]) != tuple(batch.values()) else shape[len(batch) :]
