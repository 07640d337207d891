"""Draws of the observed sites of a model at new arguments, given latents that do not belong to its data."""

import inspect
from collections.abc import Mapping
from copy import copy
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import deterministic_sites, set_plate_sizes
from pyro_vae._utils.typing import Data
from pyro_vae.arguments import new_arguments, unbound
from pyro_vae.handlers import ResampleObserved
from pyro_vae.inference_data.dims import DimensionNames
from pyro_vae.inference_data.layouts import SiteLayout
from pyro_vae.inference_data.settings import ExportSettings, as_array
from pyro_vae.model_guide import ModelGuide

__all__ = ["Predictor"]


class Predictor:
    """A model at new arguments: latents of the data plate are drawn again from their prior, others are given.

    Args:
        pair: the model on its data.
        arguments: the new ones.
        seed: of the run that finds the sites.

    Attributes:
        given: the names of the latents that have the values of a draw: those outside of the data plate whose shape is
        the
            same at the new arguments.
        sites: what is drawn, observed and deterministic sites, by name.
        layouts: of their values.

    Raises:
        TypeError, ValueError: if the model does not run on the arguments, or lacks an observed site there.
    """

    def __init__(self, pair: ModelGuide, arguments: Data, seed: int):
        model = unbound(pair.model)
        self.args, self.kwargs = new_arguments(arguments, "predictions", model)
        self._function, self._model = model, ResampleObserved()(model)
        with seeded(seed), poutine.block(), torch.no_grad():
            try:
                trace = poutine.trace(self._model).get_trace(*self.args, **self.kwargs)
            except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
                must, name = "`predictions` must be arguments that the model takes", type(error).__name__
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{must}, got some on which it raises {name}: {error}") from error
        set_plate_sizes(trace)
        nodes: dict[str, Any] = dict(trace.nodes)
        if lacking := sorted(pair.observed.keys() - nodes.keys()):
            raise ValueError(
                f"`predictions` must be arguments with which the model has the observed sites {list(pair.observed)}, "
                f"got some without {lacking}; for unknown values, the model can call `pyro.sample(..., obs=None)`"
            )
        self.given = [
            name
            for name, site in pair.latents.items()
            if name in nodes and not pair.is_local(site) and nodes[name]["value"].shape == site["value"].shape
        ]
        functions = deterministic_sites(trace)
        self.functions = {name: functions[name] for name in pair.deterministic if name in functions}
        self.observed = {name: nodes[name] for name in pair.observed}
        self.layouts = {name: SiteLayout(site) for name, site in (self.observed | self.functions).items()}

    def draw(self, nodes: Mapping[str, Any]) -> dict[str, Tensor]:
        """Draw once, given the values of latents among the sites of a trace."""
        values = {name: nodes[name]["value"] for name in self.given}
        model = poutine.condition(self._model, data=values)
        found: dict[str, Any] = dict(poutine.trace(model).get_trace(*self.args, **self.kwargs).nodes)
        return {name: layout.values(found[name]) for name, layout in self.layouts.items()}

    def names(self, settings: ExportSettings, known: DimensionNames) -> DimensionNames:
        """Name the dimensions, as those of the data where they are the same, but for their rows."""
        own = copy(settings)
        own.constants, own.history = self._constants(), {}
        own.dims = {name: dims for name, dims in settings.dims.items() if name in self.layouts}
        own.coords = {}
        names = DimensionNames(self.functions, self.observed, own)
        for name, (dim, values) in known.coords.items():
            if dim not in ("chain", "draw", names.obs) and names.sizes.get(dim) == len(values):
                names.coords[name] = dim, values
        return names

    def constants(self, names: DimensionNames) -> Any:
        """Make a dataset of the arguments that are arrays."""
        return names.dataset(self._constants())

    def _constants(self) -> dict[str, np.ndarray]:
        """The tensors and arrays among the arguments, by the names of the model's parameters."""
        try:
            bound = inspect.signature(self._function).bind(*self.args, **self.kwargs).arguments
        except (TypeError, ValueError):  # of code without a signature
            bound = {f"argument_{place}": value for place, value in enumerate(self.args)} | self.kwargs
        found: dict[str, np.ndarray] = {}
        for name, value in _flat(bound):
            if isinstance(value, Tensor | np.ndarray):
                array = as_array(value)
                if array.dtype.kind in "biufUS":
                    found[f"{name}_data" if name in self.layouts else name] = array
        return found


def _flat(arguments: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names and values of arguments; those in dictionaries, lists and tuples have names of their own."""
    found: list[tuple[str, Any]] = []
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            found += _flat({str(key): one for key, one in value.items()})
        elif isinstance(value, list | tuple):
            found += _flat({f"{name}_{place}": one for place, one in enumerate(value)})
        else:
            found.append((name, value))
    return found
