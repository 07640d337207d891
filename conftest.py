"""Every test and doctest starts with an empty param store and a fixed seed, and must not change the global state."""

import gc
import os
import random
import sys

os.environ["MPLBACKEND"] = "Agg"

import numpy as np
import pyro
import pytest
import torch

from pyro_vae._utils.rng import seed_all

torch.set_num_threads(1)

collect_ignore = ["tests/benchmarks", "tests/quality"]  # scripts that import modules of their own folders, some JAX


def pytest_collection_finish():
    """Let the collector of garbage pass over what was imported and collected, which stays until the end."""
    gc.collect()
    gc.freeze()


def _global_switches():
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "grad enabled": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's distribution validation": torch.distributions.Distribution._validate_args,
        "pyro.settings": pyro.settings.get(),
    }


@pytest.fixture(autouse=True)
def _clean_process():
    pyro.clear_param_store()
    seed_all(0)
    before = _global_switches()
    yield
    after = _global_switches()
    pyro.clear_param_store()
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    assert after == before


@pytest.fixture
def random_states():
    """A function that returns the state of every random stream that a library could change."""

    def states():
        numpy_state = np.random.get_state()  # noqa: NPY002
        return (
            tuple(torch.get_rng_state().tolist()),
            random.getstate(),
            tuple(numpy_state[1].tolist()),
            numpy_state[2:],
        )

    return states


@pytest.fixture
def uncompiled(monkeypatch):
    """Replay graphs without compiling them, which takes seconds."""
    graph = "pyro_vae.compilation.graph"
    monkeypatch.setattr(f"{graph}.Graph.compile", lambda self, *inputs: None)
    monkeypatch.setattr(f"{graph}.Compilation.start", lambda self: self)
    monkeypatch.setattr(f"{graph}.Compilation.finish", lambda self: None)
