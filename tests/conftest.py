"""Every test starts with an empty param store and a fixed seed, and must not change the global state of the process."""

import os
import random
import sys

os.environ["MPLBACKEND"] = "Agg"

import numpy as np
import pyro
import pytest
import torch

torch.set_num_threads(1)

collect_ignore = ["benchmarks"]  # scripts that import modules of their own folder, one of them JAX


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
    pyro.set_rng_seed(0)
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
    monkeypatch.setattr("pyro_vae.compilation.graph.Graph.compile", lambda self, inputs: None)


HEAVY = (  # each takes seconds more than its like, and runs in `make slow`
    "test_what_fits_is_captured[VampPrior-", "test_what_fits_is_captured[NormalizingFlow-",
    "test_a_seed_gives_the_same_run_twice_to_the_bit[True]", "test_callbacks_may_freeze_and_unfreeze[True]",
    "test_ctrl_c_ends_a_run_that_can_be_resumed[True]", "test_a_hundred_skipped_steps_in_a_row_stop_the_run[True]",
    "test_callbacks_receive_each_epoch_and_may_end_the_run[True]",
    "test_callbacks_may_set_modules_to_evaluation_mode[True]", "[another default device]", "[renyi-16-80]",
    "[particles-16-80]", "[captured-1]", "[Trace_ELBO-standard-mixture]", "[Trace_ELBO-mixture-mixture]",
    "test_a_value_that_changes_in_each_epoch_is_refused", "[45-20-True]",
    "test_the_variance_of_an_average_falls_with_the_number_of_evaluations",
    "test_training_with_a_third_missing_finds_the_parameters_of_the_complete_data",
    "test_a_run_in_another_thread_gives_the_same_numbers[True]",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if any(name in item.nodeid for name in HEAVY):
            item.add_marker(pytest.mark.slow)
