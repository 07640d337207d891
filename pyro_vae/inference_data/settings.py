"""The settings that all exports of draws share, validated when they are made."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.validation import boolean, mapping, positive_int, with_article
from pyro_vae.training.fit import Fitted, as_history

__all__ = ["ExportSettings", "as_array"]


class ExportSettings:
    """The arguments of :func:`pyro_vae.to_datatree` that are no functions and no data, validated; arrays by name.

    >>> ExportSettings(history={"elbo": [-3.0, -2.0]}).history
    {'elbo': array([-3., -2.])}
    """

    def __init__(
        self,
        draws: int = 1000,
        seed: int = 0,
        plate: str = "data",
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Any] | None = None,
        history: Fitted | Mapping[str, Sequence[float]] | None = None,
        constant_data: Mapping[str, Any] | None = None,
        parallel: bool = False,
        local_draws: int = 100,
        predictions: Any = None,
    ):
        epochs = {} if history is None else as_history(history)
        self.draws = positive_int(draws, "draws")
        self.local_draws = positive_int(local_draws, "local_draws")
        self.predictions = predictions
        self.seed, self.plate, self.parallel = seed, plate, boolean(parallel, "parallel")
        self.dims: Mapping[str, Sequence[str]] = mapping(dims, "dims", "{'x': ['height', 'width']}")
        self.coords = mapping(coords, "coords", "{'obs': names}")
        self.history = {name: as_array(value) for name, value in epochs.items()}
        constants = mapping(constant_data, "constant_data", "{'labels': labels}")
        self.constants = {name: _constant(name, value) for name, value in constants.items()}


def as_array(value: Any) -> np.ndarray:
    """Convert a tensor or numbers to an array; ``bfloat16``, which NumPy lacks, to single precision."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _constant(name: str, value: Any) -> np.ndarray:
    try:
        array = as_array(value)
    except ValueError as error:
        raise ValueError(f"`constant_data` must have rows of one length, got {name!r}: {error}") from error
    if array.dtype.kind not in "biufUSM":
        got = f"{name!r}, {with_article(type(value).__name__)} of dtype {array.dtype}"
        raise TypeError(f"`constant_data` must have numbers, booleans or strings, got {got}")
    return array
