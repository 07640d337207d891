"""A file of draws is the tree of the same seed, in a memory that does not grow with it, and whole or not there."""

import json
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, priors
from pyro_vae.inference_data import netcdf
from pyro_vae.inference_data.sampler import JointSampler
from pyro_vae.parts.networks import mlp

NET = mlp([4], nn.Tanh)
N = 6
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(1))
LABELS = ["cat", "dog", "cat", "fox", "dog", "cat"]
NAMED = {
    "dims": {"covariates": ["axis"]},
    "coords": {"obs": list("abcdef"), "label": ("obs", LABELS), "epoch": [1, 2]},
    "constant_data": {"labels": LABELS, "covariates": X[:, :2], "temperature": 0.5},
    "history": {"elbo": [-3.0, -2.0], "validation_elbo": [-3.5, -2.5]},
}


def gaussian():
    vae = pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(3, 2, NET), likelihoods.Normal(2, 3, NET))
    return vae.model, vae.guide, X


def gumbel():
    vae = pv.VAE(
        priors.GumbelSoftmax((1, 2), temperature=0.5),
        guides.GumbelSoftmax(3, (1, 2), NET, temperature=0.66),
        likelihoods.Bernoulli((1, 2), 3, NET),
    )
    return vae.model, vae.guide, (X > 0).float()


def shared():
    """A pair of a user's: a global latent, integers and truth values."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(1.0, 0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
            pyro.deterministic("is_two", z == 2)
            pyro.sample("x", dist.Normal(mu + z, 0.5), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(0.7, 0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=torch.stack([0 * x, x, 2 * x], -1)))

    return model, guide, X[:, 0]


PAIRS = {"gaussian": gaussian, "gumbel": gumbel, "shared": shared}


@pytest.fixture(params=PAIRS.values(), ids=PAIRS)
def pair(request):
    return request.param()


@pytest.fixture(params=[None, "h5netcdf", "netcdf4"])
def engine(request):
    if request.param == "netcdf4":
        pytest.importorskip("netCDF4")
    return request.param


def assert_same(loaded, tree):
    """But for the time at which it was made."""
    for node in (*loaded.subtree, *tree.subtree):
        node.attrs.pop("created_at")
    assert list(loaded.children) == list(tree.children)
    for group in tree.children:
        assert list(loaded[group].data_vars) == list(tree[group].data_vars)
        for name, values in tree[group].data_vars.items():
            assert loaded[group][name].dtype == values.dtype or values.dtype.kind == "U"
    xr.testing.assert_identical(loaded, tree)


# --- The same draws --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, NAMED], ids=["plain", "named"])
@pytest.mark.parametrize("chunk", [None, 1, 7, 100])
def test_a_file_holds_the_tree_of_the_same_seed(pair, chunk, options, tmp_path):
    path = pv.save_draws(tmp_path / "draws.nc", *pair, draws=30, seed=3, chunk=chunk, **options)
    assert path == tmp_path / "draws.nc"
    assert [file.name for file in tmp_path.iterdir()] == ["draws.nc"]
    with xr.open_datatree(path) as loaded:
        assert_same(loaded.load(), pv.to_datatree(*pair, draws=30, seed=3, **options))


def test_every_engine_reads_the_file(pair, engine, tmp_path):
    path = pv.save_draws(str(tmp_path / "draws.nc"), *pair, draws=30, parallel=True, **NAMED)
    with xr.open_datatree(path, engine=engine) as loaded:
        assert_same(loaded.load(), pv.to_datatree(*pair, draws=30, parallel=True, **NAMED))


def test_beside_each_other_the_draws_of_a_seed_hang_on_the_chunk_and_have_the_same_law(tmp_path):
    trees = []
    for chunk in (1500, 4000):
        path = pv.save_draws(tmp_path / f"{chunk}.nc", *gaussian(), draws=4000, chunk=chunk, parallel=True)
        torch.manual_seed(0)
        with xr.open_datatree(path) as loaded:
            trees.append(loaded.load())
    for tree in trees:
        loc, scale = tree["guide"]["z_loc"], tree["guide"]["z_scale"]
        z = tree["posterior"]["z"].isel(chain=0)
        assert (abs(z.mean("draw") - loc) < 5 * scale / 4000**0.5).all()
        noise = ((z - loc) / scale).values.reshape(4000, -1)
        assert (abs((noise[1:] * noise[:-1]).mean(0)) < 5 / 4000**0.5).all(), "chunks repeat draws"


def test_random_states_and_parameters_are_as_before(random_states, tmp_path):
    pair = gaussian()
    state = random_states()
    pv.save_draws(tmp_path / "draws.nc", *pair, draws=30)
    assert random_states() == state


# --- A bounded memory ------------------------------------------------------------------------------------------------

MEMORY = """
import json, resource, sys, time
import numpy as np, torch, xarray as xr
import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors

torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(5000, 4)
vae = pv.VAE(
    priors.StandardNormal(2),
    guides.DiagonalNormal(4, 2, networks.linear()),
    likelihoods.Normal(2, 4, networks.linear()),
)
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pv.save_draws(sys.argv[1], vae.model, vae.guide, x, draws=30, parallel=True)
before, start = peak(), time.perf_counter()
path = pv.save_draws(sys.argv[1], vae.model, vae.guide, x, draws=1000, parallel=True)
after, seconds = peak(), time.perf_counter() - start
with xr.open_datatree(path) as tree:
    rows = slice(0, 50)
    z, loc, scale = tree["posterior"]["z"][0, :, rows], tree["guide"]["z_loc"][rows], tree["guide"]["z_scale"][rows]
    off = float(abs((z.mean("draw") - loc) / scale).max())
    told = {"sizes": dict(tree["posterior_predictive"]["x"].sizes), "off": off, "seconds": seconds}
    told["khat"] = bool(np.isfinite(tree["sample_stats"]["khat"][rows]).all())
print(json.dumps(told | {"bytes": path.stat().st_size, "grown": after - before}))
"""


def test_the_memory_does_not_grow_with_the_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEMORY, tmp_path / "draws.nc"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["sizes"] == {"chain": 1, "draw": 1000, "obs": 5000, "feature": 4}
    assert told["bytes"] > 250 * 2**20
    assert told["grown"] < 120 * 2**20, "a third of the file at most"
    assert told["off"] < 6 / 1000**0.5
    assert told["khat"]


@pytest.mark.parametrize("rows", [5000, 50_000, 500_000])
def test_the_default_chunk_is_of_at_most_64_mebibytes(rows):
    permitted = []
    given = (torch.zeros(rows, 3),), 1000, 0, "data", {}, {}, {}, {}, True, permitted.append
    drawing = JointSampler(*gaussian()[:2], *given)
    assert permitted == [drawing]
    assert 1 <= drawing.chunk <= max(1, 2**26 // (drawing.nbytes // 1000))


# --- Whole or not there ----------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Such as a KeyboardInterrupt."""


def stopping(pair, after):
    """The pair, whose guide stops after some runs."""
    model, guide, x = pair
    left = [after]

    def stops(*data):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return guide(*data)

    return model, stops, x


@pytest.mark.parametrize("before", [None, b"an older file"])
@pytest.mark.parametrize("after", [0, 20])
def test_an_interrupted_export_leaves_what_was_there(before, after, tmp_path):
    path = tmp_path / "draws.nc"
    if before:
        path.write_bytes(before)
    with pytest.raises(Stop):
        pv.save_draws(path, *stopping(gaussian(), after), draws=30, chunk=5)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if before else [])


def test_a_file_that_is_there_is_replaced(tmp_path):
    path = tmp_path / "draws.nc"
    path.write_bytes(b"an older file")
    pv.save_draws(path, *gaussian(), draws=5)
    with xr.open_datatree(path) as loaded:
        assert loaded.attrs["draws"] == 5


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("draws.zarr", {}, ValueError, r"`path` must be a netCDF file, such as 'draws\.nc'.*got '.*draws\.zarr'"),
        (".", {}, ValueError, "path: '.*' is a folder"),
        ("gone/draws.nc", {}, FileNotFoundError, "path: there is no folder '.*gone' for 'draws.nc'"),
        ("draws.nc", {"draws": 10**15}, OSError, r"path: the draws take \d+ bytes, and '.*' has \d+ left"),
        ("draws.nc", {"chunk": 0}, ValueError, "`chunk` must be a positive integer.*got 0"),
        ("draws.nc", {"draws": 0}, ValueError, "`draws` must be .*got 0"),
        ("draws.nc", {"dims": {"y": ["pixel"]}}, ValueError, "dims: names the sites"),
    ],
)
def test_what_will_not_do_is_refused_before_it_is_drawn(path, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        pv.save_draws(tmp_path / path, *gaussian(), **({"draws": 5} | options))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_of_before_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(netcdf.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(OSError, match=r"path: the draws take 2496 bytes, .* has 100 left"):
        pv.save_draws(tmp_path / "draws.nc", *stopping(gaussian(), 3), draws=8)


# --- What is given beside the data -----------------------------------------------------------------------------------


def test_a_history_is_told_by_epoch():
    model, guide, x = gaussian()
    fitted = pv.fit(model, guide, x, epochs=4, validation=x, seed=0)
    for history in (fitted, fitted.history):
        group = pv.to_datatree(model, guide, x, draws=3, history=history)["training"]
        assert set(group.data_vars) == set(fitted.history)
        for name, values in group.data_vars.items():
            assert values.dims == ("epoch",)
            assert values.attrs["units"] == "nats per datum"
            np.testing.assert_array_equal(values, fitted.history[name])
        np.testing.assert_array_equal(group.coords["epoch"], range(4))


def test_constants_lie_along_the_data_and_have_the_users_names():
    tree = pv.to_datatree(*gaussian(), draws=3, **NAMED)
    group = tree["constant_data"]
    assert {name: values.dims for name, values in group.data_vars.items()} == {
        "labels": ("obs",),
        "covariates": ("obs", "axis"),
        "temperature": (),
    }
    assert group["labels"].sel(obs="d").item() == "fox"
    assert list(group.coords["label"].values) == LABELS
    assert list(tree["training"].coords["epoch"].values) == [1, 2]
    assert tree["sample_stats"]["lp"].groupby("label").mean().sizes["label"] == 3


def test_names_of_every_axis_of_a_constant_and_of_a_history():
    dims = {"distances": ["obs", "other"], "knots": ["knot"], "elbo": ["step"]}
    constants = {"distances": np.eye(N), "knots": [1.0, 2.0], "matrix": np.eye(3)}
    tree = pv.to_datatree(
        *gaussian(), draws=3, dims=dims, constant_data=constants, history={"elbo": [1.0]}, coords={"knot": ["a", "b"]}
    )
    assert {name: values.dims for name, values in tree["constant_data"].data_vars.items()} == {
        "distances": ("obs", "other"),
        "knots": ("knot",),
        "matrix": ("matrix_0", "matrix_1"),
    }
    assert list(tree["constant_data"].coords["knot"].values) == ["a", "b"]
    assert tree["training"]["elbo"].dims == ("step",)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"history": 3}, TypeError, "`history` must be what `fit` returned.*got 3"),
        ({"history": {"elbo": 3.0}}, ValueError, r"history: 'elbo' has shape \(\)"),
        ({"history": {"elbo": ["a"]}}, ValueError, "history: 'elbo' has shape .* dtype <U1"),
        ({"history": {"elbo": [1.0], "rate": [1.0, 2.0]}}, ValueError, "dims: 'epoch' of rate has size 2, and 1"),
        ({"constant_data": [1, 2]}, TypeError, "`constant_data` must be a mapping.*got a list"),
        ({"constant_data": {"c": object()}}, TypeError, "constant_data: 'c' is a object"),
        ({"constant_data": {"z": [1.0]}}, ValueError, "constant_data: 'z' is the name of a site"),
        (
            {"constant_data": {"c": np.eye(N)}, "dims": {"c": ["obs", "a", "b"]}},
            ValueError,
            r"dims: names \['obs', 'a', 'b'\] for c of constant_data, whose shape is \(6, 6\)",
        ),
        ({"constant_data": {"c": [1]}, "dims": {"y": ["a"]}}, ValueError, r"dims: .*; constant_data has \['c'\]"),
        ({"coords": {"lp": ("obs", range(N))}}, ValueError, "coords: 'lp' is the name of a variable"),
        ({"max_bytes": 0}, ValueError, "`max_bytes` must be .*got 0"),
        ({"draws": 10**15}, ValueError, f"draws: {10**15} draws .* take {312 * 10**15} bytes; at most {4 * 2**30} "),
        ({"max_bytes": 1000}, ValueError, r"take 1560 bytes; at most 1000 .*fewer draws.*fewer rows.*save_draws"),
    ],
)
def test_what_does_not_fit_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        pv.to_datatree(*gaussian(), **({"draws": 5} | options))
