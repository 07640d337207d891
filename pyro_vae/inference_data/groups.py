"""The groups of an export: their variables, dimensions, coordinates and attributes."""

import importlib.metadata
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro

from pyro_vae._utils.rng import seeded
from pyro_vae.inference_data.dims import DimensionNames, data_labels
from pyro_vae.inference_data.layouts import SiteLayout
from pyro_vae.inference_data.likelihood import Observations
from pyro_vae.inference_data.sampler import Groups, JointSampler
from pyro_vae.inference_data.settings import as_array

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["GroupLayout", "attributes", "observation_dims", "observed_values", "tree_of"]

_GROUPS = (
    *("posterior", "sample_stats", "log_likelihood", "prior", "posterior_predictive", "prior_predictive"),
    *("predictions", "predictions_constant_data", "observed_data", "constant_data", "guide", "training"),
)


class GroupLayout:
    """Dimensions and coordinates of everything that a sampler draws, and the groups without draws.

    ``dims`` has the dimensions of each drawn variable, without chain and draw, by group and site; ``variables`` the
    name of each site's variable.
    """

    def __init__(self, sampler: JointSampler):
        settings = sampler.settings
        names = self._names = DimensionNames(
            sampler.latents | sampler.deterministic, sampler.observed, settings, labels=data_labels(sampler.pair)
        )
        self.variables, of_statistics = names.variables, names.plate_dims(sampler.units)
        self._attrs = attributes(settings.draws, settings.seed)
        self.dims = {
            group: {name: of_statistics if group == "sample_stats" else names.dims[name] for name in variables}
            for group, variables in sampler.variables.items()
            if group not in ("log_likelihood", "predictions")
        }
        self._new_names = sampler.predictor.names(settings, names) if sampler.predictor else names
        if sampler.predictor:
            self.dims["predictions"] = {name: self._new_names.dims[name] for name in sampler.variables["predictions"]}
        if parts := sampler.likelihood.parts:
            self.dims["log_likelihood"] = {part.name: observation_dims(names, part) for part in parts}
        if sampler.why_no_likelihood:
            self._attrs["why_no_log_likelihood"] = sampler.why_no_likelihood
        with seeded((settings.seed + 1) % 2**32):  # other draws than the export's, with which they are compared
            parametric = sampler.parametric_latents()
        self._static = {
            "observed_data": names.dataset(observed_values(sampler.observed)),
            "constant_data": names.dataset(settings.constants),
            "guide": names.guide(parametric),
            "training": names.training(settings.history),
        }
        if sampler.predictor:
            self._static["predictions_constant_data"] = sampler.predictor.constants(self._new_names)

    def named(self, values: Groups) -> Groups:
        """Return values by the names of their variables."""
        variables = self.variables
        return {group: {variables.get(name, name): of[name] for name in of} for group, of in values.items()}

    def attrs(self, group: str, name: str) -> dict[str, str]:
        """Return the attributes of a drawn variable."""
        return {"units": "nats"} if group in ("sample_stats", "log_likelihood") else self._names.attrs(name)

    def tree(
        self, drawn: Groups | None = None, khat: np.ndarray | None = None, attrs: Mapping[str, Any] | None = None
    ) -> "xr.DataTree":
        """Make the tree of all groups; without values the drawn groups have coordinates alone.

        Args:
            drawn: values by group and name.
            khat: of the weights of each unit.
            attrs: of the likelihood.
        """
        import xarray as xr

        groups = {name: group for name, group in self._static.items() if group}
        for group, variables in self.dims.items():
            dims = {"chain", "draw"}.union(*variables.values())
            arrays: dict[str, Any] = {}
            for name, values in (drawn[group] if drawn else {}).items():
                dimensions = ("chain", "draw", *variables[name])
                arrays[self.variables.get(name, name)] = (dimensions, values, self.attrs(group, name))
            if group == "sample_stats" and khat is not None:
                arrays["khat"] = (variables["log_weight"], khat)
            names = self._new_names if group == "predictions" else self._names
            groups[group] = xr.Dataset(arrays, coords=names.coordinates(dims))
            if group == "log_likelihood":
                groups[group].attrs = dict(attrs or {})
        return tree_of({name: groups[name] for name in _GROUPS if name in groups}, self._attrs)


def observation_dims(names: DimensionNames, part: Observations) -> tuple[str, ...]:
    """The dimensions of a likelihood: the plates, or where some cells are not observed, the others by number."""
    if part.counted is None:
        return names.plate_dims(part.plates)
    return (names.add_dim(f"{names.variables.get(part.name, part.name)}_cell", part.counted.nonzero()[:, 0]),)


def observed_values(observed: Mapping[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return the values of observed sites, with NaN where they are masked."""
    return {name: as_array(SiteLayout(site).values(site)) for name, site in observed.items()}


def tree_of(groups: Mapping[str, "xr.Dataset"], attrs: dict[str, Any]) -> "xr.DataTree":
    """Make a tree of groups, with the same attributes at the root and at each group."""
    import xarray as xr

    tree = xr.DataTree.from_dict({name: group.assign_attrs(attrs | group.attrs) for name, group in groups.items()})
    tree.attrs = attrs
    return tree


def attributes(draws: int, seed: int) -> dict[str, str | int]:
    """Return the attributes that ArviZ reads, and those that say how the draws were made."""
    return {
        "created_at": datetime.now(UTC).isoformat(),
        "creation_library": "pyro_vae",
        "creation_library_version": importlib.metadata.version("pyro-vae"),
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "sampling": "independent draws in one chain, to which r_hat and ess do not apply; use summary(kind='stats')",
        "draws": draws,
        "seed": seed,
    }
