"""Both versions of ArviZ read the files of the package: 0.23 in this process, 1.x in another environment.

ArviZ 1 needs Python 3.12 and other versions of the dependencies. The variable ``PYRO_VAE_ARVIZ1_PYTHON`` names an
interpreter that has it; ``make arviz1`` creates one and runs these tests with it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pairs
import pytest
import torch
import xarray as xr
from export_cases import SHARED, on_data

import pyro_vae as pv

SCRIPT = Path(__file__).with_name("arviz1_script.py")
ARVIZ1 = os.environ.get("PYRO_VAE_ARVIZ1_PYTHON")
HOW = "set PYRO_VAE_ARVIZ1_PYTHON to a Python that has ArviZ 1, or run `make arviz1`"
DRAWS = 60
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])
PAIRS = {
    "gaussian": lambda: on_data(pairs.gaussian()), "relaxed": lambda: on_data(pairs.relaxed()), "own": lambda: SHARED,
}  # fmt: skip
COORDS = {
    "plain": {},
    "labelled": {"label": ("obs", LABELS)},
    "named and labelled": {"obs": list("abcdef"), "label": ("obs", ["cat", "dog", "cat", "fox", "dog", "cat"])},
}


@pytest.fixture(params=PAIRS.values(), ids=PAIRS)
def pair(request):
    return request.param()


@pytest.fixture(params=["plain", "named and labelled"])
def tree(request, pair):
    return tree_of(pair, request.param)


def tree_of(pair, coords):
    model, guide, x = pair
    given = {"history": {"elbo": [-3.0, -2.0]}, "constant_data": {"labels": LABELS}}
    return pv.to_datatree(model, guide, x, draws=DRAWS, coords=COORDS[coords], **given)


def is_blank(pixels):
    """Whether almost no pixel has a colour: axes, ticks and words are black, and data are not."""
    pixels = np.asarray(pixels)[..., :3] / (255 if np.asarray(pixels).dtype == np.uint8 else 1)
    return (pixels.max(-1) - pixels.min(-1) > 0.12).mean() < 1e-3


def test_axes_without_data_are_blank():
    figure, axes = plt.subplots()
    axes.set_title("nothing")
    figure.canvas.draw()
    assert is_blank(figure.canvas.buffer_rgba())
    axes.plot([0, 1], [0, 1])
    figure.canvas.draw()
    assert not is_blank(figure.canvas.buffer_rgba())


def test_arviz_0_has_the_groups_of_the_tree_and_its_numbers_and_summarises_the_draws(az, tree):
    data = pv.to_arviz(tree)
    assert isinstance(data, az.InferenceData)
    assert set(data.groups()) == set(tree.children) >= {"sample_stats", "constant_data", "training"}
    for group in data.groups():
        xr.testing.assert_equal(data[group], tree[group].to_dataset())
    for name, values in tree["posterior"].data_vars.items():
        summary = az.summary(data, var_names=[name], kind="stats", round_to="none")
        draws = values.values.reshape(DRAWS, -1)
        np.testing.assert_allclose(summary["mean"], draws.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(summary["sd"], draws.std(0, ddof=1), rtol=1e-3)


def test_arviz_0_names_each_row_of_its_summary(az):
    tree = tree_of(SHARED, "named and labelled")
    summary = az.summary(pv.to_arviz(tree), kind="stats", round_to="none")
    assert list(summary.index) == ["mu", *(f"{name}[{row}]" for name in ("z", "twice") for row in "abcdef")]
    assert summary.loc["z[c]", "mean"] == pytest.approx(float(tree["posterior"]["z"].sel(obs="c").mean()), rel=1e-4)


PICTURES = {
    "density": lambda az, data, two: az.plot_posterior(data, var_names=["z"], coords=two),
    "density of prior and posterior": lambda az, data, two: az.plot_dist_comparison(data, var_names=["z"], coords=two),
    "forest": lambda az, data, two: az.plot_forest(data),
    "pair": lambda az, data, two: az.plot_pair(data, var_names=["z"], coords=two),
    "posterior predictive": lambda az, data, two: az.plot_ppc(data, num_pp_samples=5),
    "prior predictive": lambda az, data, two: az.plot_ppc(data, group="prior", num_pp_samples=5),
}


@pytest.mark.parametrize("picture", PICTURES)
def test_arviz_0_draws_its_pictures_of_the_data_of_one_label(az, pair, picture):
    data = pv.to_arviz(tree_of(pair, "labelled"))
    ones = {"obs": data.posterior.obs.values[data.posterior.label == 1]}
    assert list(ones["obs"]) == [1, 4]
    figure = np.ravel(PICTURES[picture](az, data, ones))[0].figure
    figure.canvas.draw()
    assert not is_blank(figure.canvas.buffer_rgba())


def test_arviz_1_receives_the_tree_itself(monkeypatch):
    """A substitute for ArviZ 1, which lacks ``from_datatree``; the next test runs the real one."""
    monkeypatch.setitem(sys.modules, "arviz", SimpleNamespace(__version__="1.0"))
    tree = xr.DataTree.from_dict({"posterior": xr.Dataset({"z": (("chain", "draw"), np.zeros((1, 9)))})})
    assert pv.to_arviz(tree) is tree


@pytest.fixture(scope="module")
def arviz1(tmp_path_factory):
    """A function that runs a program with the interpreter that has ArviZ 1; warnings are errors."""
    if not ARVIZ1:
        pytest.skip(f"PYRO_VAE_ARVIZ1_PYTHON is not set: {HOW}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"MPLBACKEND": "Agg", "MPLCONFIGDIR": str(tmp_path_factory.mktemp("matplotlib"))}

    def run(*arguments):
        command = [ARVIZ1, "-W", "error", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    try:
        version = run("-c", "import arviz; print(arviz.__version__)").stdout.strip()
    except OSError as error:
        pytest.skip(f"PYRO_VAE_ARVIZ1_PYTHON: {error}: {HOW}")
    if int(version.partition(".")[0] or 0) < 1:
        pytest.skip(f"PYRO_VAE_ARVIZ1_PYTHON: {ARVIZ1} has {version or 'no ArviZ'}: {HOW}")
    return run


def test_arviz_1_summarises_and_draws_the_file(arviz1, tree, tmp_path):
    path, folder = tmp_path / "run.nc", tmp_path / "pictures"
    folder.mkdir()
    tree.to_netcdf(path, engine="h5netcdf")
    done = arviz1(SCRIPT, path, folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["groups"], found["heavy"]) == (list(tree.children), [])
    assert int(found["version"].partition(".")[0]) >= 1
    assert found["means"].keys() == set(tree["posterior"].data_vars)
    for name, means in found["means"].items():
        draws = tree["posterior"][name].values.reshape(DRAWS, -1)
        np.testing.assert_allclose(means, draws.mean(0), rtol=1e-4, atol=1e-6)
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == (10 if "label" in tree["posterior"].coords else 8)
    assert not any(is_blank(plt.imread(picture)) for picture in pictures)
