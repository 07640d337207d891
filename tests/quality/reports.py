"""Reports of a contestant after an epoch: its steps, and its weights as arrays, under the names of the inputs."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from inputs import Inputs

Weights = Mapping[str, np.ndarray]
Report = Callable[[int, Callable[[], Weights]], None]


def fixed(given: Inputs) -> dict[str, np.ndarray]:
    """Return the weights that are not trained: those that standardize the inputs of a network."""
    return {name: value for name, value in given.weights.items() if name.endswith((".loc", ".scale"))}


def of_module(given: Inputs, vae: Any) -> dict[str, np.ndarray]:
    """Read the weights of a module of torch with an ``encoder`` and a ``decoder``."""
    from torch import nn  # here, since the process of JAX needs no torch

    found = fixed(given)
    for part in ("encoder", "decoder"):
        layers = [layer for layer in getattr(vae, part).modules() if isinstance(layer, nn.Linear)]
        for number, layer in enumerate(layers):
            found[f"{part}.{number}.weight"] = layer.weight.detach().numpy()
            found[f"{part}.{number}.bias"] = layer.bias.detach().numpy()
    for name, parameter in vae.named_parameters():
        if name.split(".")[-1] == "log_scale":
            found["log_scale"] = parameter.detach().numpy()
    return found
