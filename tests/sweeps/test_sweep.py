"""A sweep in one process: its folder, its later calls, and how it ends; test_engines.py has other processes."""

import os
import re
import signal

import numpy as np
import pyro
import pytest
import torch
from swept import OPTIONS, TRAINING, VALIDATION, make_vae

import pyro_vae as pv
from pyro_vae._utils.files import locked
from pyro_vae.sweeps import sweep as module
from pyro_vae.sweeps.run import elbo_of_rows

SPACE = {"latent": [1, 2], "lr": [0.1, 0.01]}


@pytest.fixture
def swept(tmp_path):
    """A function that sweeps in this process."""

    def run(make=make_vae, space=SPACE, data=TRAINING, **options):
        folder = {"folder": tmp_path / "sweep", "engine": None, "epochs": 2}
        return pv.sweep(make, space, data, **OPTIONS | {"validation": VALIDATION, **folder} | options)

    return run


def times(result):
    paths = {path for runs in result.runs for run in runs for path in run.folder.iterdir() if path.is_file()}
    return {path: path.stat().st_mtime_ns for path in paths}


def test_a_later_call_with_more_seeds_or_settings_uses_the_runs_that_are_there(swept):
    first = swept(seeds=[3], num_settings=2)
    before = times(first)
    again = swept(seeds=[3], num_settings=2)
    assert (again.table.equals(first.table), times(again)) == (True, before)
    more = swept(seeds=[3, 5], num_settings=3)
    assert {path: time for path, time in times(more).items() if path in before} == before
    assert len(more.table) == 3
    assert [run.seed for run in more.runs[0]] == [3, 5]
    for runs in first.runs:
        (same,) = [others for others in more.runs if others[0].settings == runs[0].settings]
        assert (same[0].elbo, same[0].status) == (runs[0].elbo, "complete")


@pytest.mark.parametrize(("argument", "value", "message"), [
    ("space", {"latent": [1, 3], "lr": [0.1, 0.01]}, r"`space` must be that of the sweep in `folder`, \{'latent'"),
    ("data", TRAINING + 1, r"`data` must be that of the sweep in `folder`, \['\(100, 2\) float32, checksum"),
    ("validation", VALIDATION * 2, "`validation` must be that of the sweep"),
    ("num_samples", 11, "`num_samples` must be that of the sweep in `folder`, 10, got 11"),
    ("epochs", 3, "`options` must be that of the sweep in `folder`, .*'epochs': 2.*, got .*'epochs': 3"),
    ("seed", 1, "`seed` must be that of the sweep in `folder`, 0, got 1: give another folder for another sweep"),
])  # fmt: skip
def test_a_later_call_with_other_arguments_is_refused_with_both(swept, argument, value, message):
    swept(space={"latent": [1], "lr": [0.1]})
    with pytest.raises(ValueError, match=message):
        swept(**{"space": {"latent": [1], "lr": [0.1]}} | {argument: value})


def test_a_folder_that_another_sweep_uses_is_refused(swept, tmp_path):
    (tmp_path / "sweep").mkdir()
    with (
        locked(tmp_path / "sweep" / ".lock"),
        pytest.raises(BlockingIOError, match="`folder` must be a folder of its own"),
    ):
        swept()
    swept(space={"latent": [1], "lr": [0.1]})


def test_a_run_of_the_table_is_loaded_with_its_parameters(swept):
    result = swept(seeds=2, num_settings=3, epochs=1)
    pyro.clear_param_store()
    for row, seed in ((0, None), (2, 1)):
        fitted = result.load(row, seed)
        run = result.runs[row][0 if seed is None else seed]
        rows = elbo_of_rows(fitted.model, fitted.guide, VALIDATION, num_samples=OPTIONS["num_samples"], seed=run.seed)
        assert np.array_equal(rows.numpy(), run.rows)
        assert dict(fitted.history) == run.history
        pyro.clear_param_store()


def test_a_sweep_leaves_the_param_store_the_threads_and_all_random_states(swept, random_states):
    kept = pyro.param("kept", torch.ones(2))
    before, threads = random_states(), torch.get_num_threads()
    swept(space={"latent": [1], "lr": [0.1]}, threads=2)
    assert (random_states(), torch.get_num_threads()) == (before, threads)
    assert dict(pyro.get_param_store().items()).keys() == {"kept"}
    assert pyro.param("kept") is kept


def test_ctrl_c_ends_a_sweep_and_a_later_call_resumes_it(swept):
    pressed = []

    def press(epoch):
        if epoch.number == 1 and not pressed:
            pressed.append(os.kill(os.getpid(), signal.SIGINT))

    def make(latent, lr):
        return make_vae(latent, lr, callbacks=[press])

    with pytest.warns(UserWarning, match="interrupted after"), pytest.raises(KeyboardInterrupt):
        swept(make)
    result = swept(make)
    assert result.table["status"].tolist() == ["complete"] * 4


def test_if_all_settings_fail_the_first_error_is_raised_and_else_they_are_in_the_table(swept):
    def wrong(latent, lr):
        raise LookupError(f"no prior {latent}")

    first = (
        "all 4 settings of the sweep failed, the first, latent 1, lr 0.1, with seed 0: LookupError: no prior 1. See "
    )
    with pytest.raises(RuntimeError, match=re.escape(first)):
        swept(wrong)
    assert swept().table["status"].tolist() == ["complete"] * 4  # failed runs are tried again


def test_a_run_without_epochs_fails_with_the_name_of_the_argument(swept):
    with pytest.raises(RuntimeError, match="`epochs` must be a positive integer, got 0"):
        swept(epochs=0)


def test_on_several_ranks_a_sweep_is_refused(swept, monkeypatch):
    monkeypatch.setattr(module, "ranks", lambda: type("Ranks", (), {"size": 4}))
    with pytest.raises(RuntimeError, match=r"`sweep` must be called in one process, .* got a call on 4 ranks"):
        swept()
