"""The contest of seconds to a target: its judge is right, and its contestants reach the same; no time is asserted."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae import schedules

FOLDERS = [str(Path(__file__).parent / name) for name in ("quality", "benchmarks")]
sys.path += FOLDERS
try:
    inputs, problems, judge = map(importlib.import_module, ("inputs", "problems", "judge"))
finally:
    for folder in FOLDERS:
        sys.path.remove(folder)
HAS = {name: importlib.util.find_spec(name) is not None for name in ("numpyro", "pythae")}


@pytest.fixture(autouse=True)
def _folders_on_path(monkeypatch):
    """The contest imports modules of its own folder and of the benchmarks."""
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(folder)


def written(name, folder, **changes):
    """Write the inputs of a short problem, and return it with them."""
    problem = replace(problems.shortened(problems.PROBLEMS[name]), **changes)
    problems.write_inputs(problem, folder)
    return problem, inputs.read(problem, folder)


def trained(module, problem, given, folder, **options):
    """Train a contestant in this process, and return the file of its last weights."""
    reports = []

    def report(steps, weights):
        reports.append(steps)
        np.savez(folder / f"{module}.npz", **weights())

    train = inputs.runner(module, "train")
    with torch.random.fork_rng(devices=()):
        train(problem, given, report, epochs=problem.epochs, seed=1, **options)
    assert reports == [problem.steps_of_epoch] * problem.epochs
    return folder / f"{module}.npz"


@pytest.mark.parametrize("name", ["mnist", pytest.param("gumbel", marks=pytest.mark.slow)])  # the other is below
def test_contestants_train_to_the_target(name, tmp_path):
    problem, given = written(name, tmp_path)
    value = judge.Judge(problem, tmp_path)
    assert value(tmp_path / "weights.npz") < problem.target
    for module, options in (("by_pyro_vae", {"compile": False}), ("by_pyro", {})):
        assert value(trained(module, problem, given, tmp_path, **options)) > problem.target


def batch_of(problem, folder):
    """Return a batch, and weights in ``folder`` with codes that depend on the data, so that the KL is not small."""
    weights = dict(inputs.read(problem, folder).weights)
    last = f"encoder.{len(problem.hidden)}.weight"
    weights[last] = 5 * weights[last]
    np.savez(folder / "weights.npz", **weights)
    return np.load(folder / "held_out.npz")["x"][:20], inputs.read(problem, folder)


def losses(module, problem, given, x, draws):
    """Return the loss of draws of a contestant's objective, in nats per datum, from its program."""
    _, model, guide, elbo, *_ = importlib.import_module(module).program(problem, given)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        return np.array([elbo.loss(model, guide, torch.from_numpy(x)) for _ in range(draws)]) / len(x)


def assert_same_mean(first, second):
    error = (first.var() / len(first) + second.var() / len(second)) ** 0.5
    assert first.mean() == pytest.approx(second.mean(), abs=5 * error + 1e-5 * abs(first.mean())), error


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_contestants_have_the_same_objective(name, tmp_path):
    problem, _ = written(name, tmp_path)
    x, given = batch_of(problem, tmp_path)
    ours, plain = (losses(module, problem, given, x, 60) for module in ("by_pyro_vae", "by_pyro"))
    assert_same_mean(ours, plain)
    assert problem.guide == "bernoulli" or 0 < ours.std() < 0.02 * ours.mean()


NUMPYRO = """
import json, sys
from pathlib import Path
import jax, numpy as np
import by_numpyro, inputs
from problems import PROBLEMS, shortened

found = {}
for name in PROBLEMS:
    problem, folder = shortened(PROBLEMS[name]), Path(sys.argv[1]) / name
    x = np.load(folder / "held_out.npz")["x"][:20]
    svi = by_numpyro.program(problem, inputs.read(problem, folder))
    options = by_numpyro.options_of(problem, 0)
    state = svi.init(jax.random.key(0), x, *options)
    loss = jax.jit(lambda key: svi.evaluate(state._replace(rng_key=key), x, *options) / len(x))
    found[name] = [float(loss(key)) for key in jax.random.split(jax.random.key(1), 100)]
print(json.dumps(found))
"""


@pytest.mark.skipif(not HAS["numpyro"], reason="needs the extra `quality`")
def test_numpyro_has_the_same_objective(tmp_path):
    batches = {}
    for name in problems.PROBLEMS:
        problem, _ = written(name, tmp_path / name)
        batches[name] = (problem, *batch_of(problem, tmp_path / name))
    command = [sys.executable, "-c", NUMPYRO, str(tmp_path)]  # in a separate process, since JAX starts threads
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*FOLDERS, *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout).items():
        problem, x, given = batches[name]
        assert_same_mean(losses("by_pyro_vae", problem, given, x, 60), np.array(found))


def test_the_judge_agrees_with_the_library(tmp_path):
    problem, given = written("mnist", tmp_path, draws=500, first_draws=500)
    vae = importlib.import_module("by_pyro_vae").vae_of(problem, given)
    x = torch.from_numpy(np.load(tmp_path / "held_out.npz")["x"])
    estimate = pv.log_evidence(vae.model, vae.guide, x, num_samples=1000, seed=3)
    error = float(estimate.standard_error.square().sum().sqrt()) / len(x)
    assert judge.Judge(problem, tmp_path)(tmp_path / "weights.npz") == pytest.approx(
        float(estimate.log_evidence.mean()), abs=10 * error + 1e-3
    )


def test_the_judge_of_hard_codes_agrees_with_a_sum_over_all_codes(tmp_path):
    problem, given = written("gumbel", tmp_path, draws=5000, first_draws=5000)
    vae = importlib.import_module("by_pyro_vae").vae_of(problem, given).discrete()
    x = torch.from_numpy(np.load(tmp_path / "held_out.npz")["x"])
    exact = float(pv.exact.log_evidence(vae.model, x).mean())
    assert judge.Judge(problem, tmp_path)(tmp_path / "weights.npz") == pytest.approx(exact, abs=0.02)


def test_the_true_mixture_is_at_zero_nats(tmp_path):
    problem, given = written("mixture", tmp_path)
    weights = {name: np.zeros_like(value) for name, value in given.weights.items()}
    weights["decoder.0.weight"][0], weights["decoder.0.bias"][0] = 40.0, -20.0  # its tanh is -1 or 1
    weights["decoder.1.weight"][:, 0] = 1.0
    weights["log_scale"] = np.log(np.float32(0.1 - 1e-3))
    np.savez(tmp_path / "true.npz", **weights)
    value = judge.Judge(problem, tmp_path)
    assert value(tmp_path / "true.npz") == pytest.approx(0.0, abs=1e-4)
    weights["log_scale"] += 0.1
    np.savez(tmp_path / "worse.npz", **weights)
    assert value(tmp_path / "worse.npz") < -0.005


def test_learning_rates_are_those_of_the_schedule():
    problem = problems.PROBLEMS["mnist"]
    schedule = schedules.decayed(problem.lr, problem.epochs, problem.hold)
    assert [problem.rate(epoch) for epoch in range(problem.epochs)] == pytest.approx(
        [schedule(epoch) for epoch in range(problem.epochs)]
    )


def test_the_short_form(tmp_path, capsys):
    names = ["eager", "pyro", *(name for name in ("numpyro", "pythae") if HAS[name])]
    spec = importlib.util.spec_from_file_location("quality_main", Path(FOLDERS[0]) / "__main__.py")
    contest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(contest)
    options = ["--tiny", "--threads", "1", "--out", str(tmp_path), "--problems", "mixture"]
    status = contest.main(contest.parse([*options, "--contestants", *names, "--extrapolate", "pyro"]))
    printed = capsys.readouterr().out
    assert status == 0, f"{printed}\n{(tmp_path / 'log.txt').read_text()}"
    assert (tmp_path / "results.md").read_text().count("\n## ") == printed.count("## ") == 1
    results = json.loads((tmp_path / "results.json").read_text())["problems"]["mixture"]["contestants"]
    assert set(results) == set(names)
    for name in set(names) - {"pyro", "pythae"}:
        last = results[name]["checks"][-1]
        assert results[name]["reached"]
        assert last["value"] >= -1.0
        assert last["seconds"] > 0
        assert last["processor"] > 0
    extrapolated = results["pyro"]["extrapolated"]
    assert extrapolated["steps"] == results["eager"]["checks"][-1]["steps"]
    assert extrapolated["seconds"] > 0
    assert "pythae" not in names or "not_available" in results["pythae"]
