"""Refits of a guide to data drawn from its model: the posterior of global latents is fitted again to each data set."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace

from pyro_vae._utils.module_state import buffers_kept, evaluation_mode
from pyro_vae._utils.param_store import scoped_param_store
from pyro_vae._utils.plates import every_row
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.validation import mapping
from pyro_vae.diagnostics.simulation import Simulation, Simulator
from pyro_vae.draws import Values
from pyro_vae.model_guide import ModelGuide
from pyro_vae.training.fit import fit

__all__ = ["Refits", "check_refit"]

_Result = TypeVar("_Result")
_OURS = ("model", "guide", "data", "plate", "seed", "progress", "checkpoints", "num_data", "validation", "patience")


class Refits:
    """Fits of a guide to data sets that are drawn from its model, each a function of its number alone.

    The parameters of the model stay as they are. Those of the guide start, in each refit, at their present values, and
    have them again after it.

    Attributes:
        model: the model, which observes the values of the present data set where they are in no data tensor.

    Args:
        pair: the model and the guide on the given data, which have run.
        options: of :func:`pyro_vae.fit`; ``None`` for a guide that needs no fit.
        seed: from which, with the number of a data set, its random numbers come.
    """

    def __init__(self, pair: ModelGuide, options: Mapping[str, Any] | None, seed: int):
        self.pair, self.options, self.seed = pair, options, seed
        self.simulator = Simulator(pair.model, pair.guide, pair.data)
        self.values: Values = {}
        self.model = poutine.condition(pair.model, data=self.values) if self.simulator.others else pair.model
        self.fixed, drawn = (_parameters(trace) for trace in (pair.model_trace, pair.guide_trace))
        self.shares = bool(self.fixed & drawn)

    def run(self, number: int, read: Callable[[Simulation], _Result]) -> _Result:
        """Draw a data set, fit the guide to it, and return what ``read`` returns of it, which runs model and guide."""
        seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0])
        with scoped_param_store(), _parameters_kept(), buffers_kept(), seeded(seed):
            with torch.no_grad(), every_row(), evaluation_mode(self.pair.model):
                simulation = self.simulator.draw(check=number == 0)
            self.values.update(simulation.values)
            try:
                if self.options is not None:
                    self._fit(simulation, number, seed, dict(self.options))
                with torch.no_grad(), every_row(), evaluation_mode(self.model, self.pair.guide):
                    return read(simulation)
            finally:
                self.values.clear()

    def _fit(self, simulation: Simulation, number: int, seed: int, options: dict[str, Any]) -> None:
        if "elbo" in options:  # which may learn, as a baseline does
            options["elbo"] = copy.deepcopy(options["elbo"])
        guide, model = self.pair.guide, poutine.block(self.model, hide_types=["param"])  # which are not trained
        if self.shares:
            guide = poutine.block(guide, hide=list(self.fixed))
        try:
            with torch.enable_grad():
                fitted = fit(model, guide, simulation.data, plate=self.pair.plate, seed=seed, progress=False, **options)
        except FloatingPointError as error:
            raise FloatingPointError(f"refit of simulation {number}: {error}") from error
        if fitted.stopped == "interrupted":
            raise KeyboardInterrupt


def check_refit(refit: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options of a refit; raise unless they are arguments of ``fit`` other than model, guide and data."""
    options = mapping(refit, "refit", '{"epochs": 1000, "lr": 0.01}')
    known = [name for name in inspect.signature(fit).parameters if name not in _OURS]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"`refit` must be arguments of `fit`, some of {known}, got {unknown[0]!r}")
    if "epochs" not in options:
        raise ValueError(f'`refit` must have the number of `epochs`, as in {{"epochs": 1000}}, got {dict(options)!r}')
    return options


def _parameters(trace: Trace) -> set[str]:
    """The names of the parameters in a trace."""
    return {name for name, site in trace.nodes.items() if site["type"] == "param"}


@contextmanager
def _parameters_kept() -> Iterator[None]:
    """Run a block, then give the parameters in Pyro's store, and those of modules there, their values again."""
    stored = list(dict(pyro.get_param_store().named_parameters()).values())
    values = [parameter.detach().clone() for parameter in stored]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(stored, values, strict=True):
                parameter.copy_(value)
