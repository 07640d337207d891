"""A file of draws equals the tree of the same seed, needs no memory of its own size, and is complete or not there."""

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from export_cases import N, X, on_data
from tree_checks import dims_of, run_program

import pyro_vae as pv
from pyro_vae.inference_data import netcdf

LABELS = ["cat", "dog", "cat", "fox", "dog", "cat"]
NAMED = {
    "dims": {"covariates": ["axis"]},
    "coords": {"obs": list("abcdef"), "label": ("obs", LABELS), "epoch": [1, 2]},
    "constant_data": {"labels": LABELS, "covariates": X[:, :2], "temperature": 0.5},
    "history": {"elbo": [-3.0, -2.0], "validation_elbo": [-3.5, -2.5]},
}


def gaussian():
    return on_data(pairs.gaussian())


def shared():
    """A user's pair with a global latent, integers and booleans."""

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


PAIRS = {"gaussian": gaussian, "gumbel": lambda: on_data(pairs.gumbel()), "shared": shared}


@pytest.fixture(params=PAIRS.values(), ids=PAIRS)
def pair(request):
    return request.param()


def assert_same(loaded, tree):
    """Compare everything except the time of creation."""
    for node in (*loaded.subtree, *tree.subtree):
        node.attrs.pop("created_at")
    assert list(loaded.children) == list(tree.children)
    for group in tree.children:
        assert list(loaded[group].data_vars) == list(tree[group].data_vars)
        for name, values in tree[group].data_vars.items():
            assert loaded[group][name].dtype == values.dtype or values.dtype.kind == "U"
    xr.testing.assert_identical(loaded, tree)


@pytest.mark.parametrize("options", [{}, NAMED], ids=["plain", "named"])
@pytest.mark.parametrize("chunk", [None, 1, 7, 100])
def test_a_file_holds_the_tree_of_the_same_seed(pair, chunk, options, tmp_path):
    path = pv.save_draws(tmp_path / "draws.nc", *pair, draws=30, seed=3, chunk=chunk, **options)
    assert (path, [file.name for file in tmp_path.iterdir()]) == (tmp_path / "draws.nc", ["draws.nc"])
    with xr.open_datatree(path) as loaded:
        assert_same(loaded.load(), pv.to_datatree(*pair, draws=30, seed=3, **options))


@pytest.mark.parametrize("engine", [None, "h5netcdf", "netcdf4"])
def test_every_engine_reads_the_file_which_replaces_an_older_one(pair, engine, tmp_path):
    if engine == "netcdf4":
        pytest.importorskip("netCDF4")
    (tmp_path / "draws.nc").write_bytes(b"an older file")
    path = pv.save_draws(str(tmp_path / "draws.nc"), *pair, draws=30, parallel=True, **NAMED)
    with xr.open_datatree(path, engine=engine) as loaded:
        assert_same(loaded.load(), pv.to_datatree(*pair, draws=30, parallel=True, **NAMED))


@pytest.mark.parametrize("chunk", [1500, 4000])
def test_parallel_draws_have_the_same_law_for_every_chunk_and_chunks_differ(chunk, tmp_path):
    path = pv.save_draws(tmp_path / "draws.nc", *gaussian(), draws=4000, chunk=chunk, parallel=True)
    with xr.open_datatree(path) as tree:
        loc, scale = tree["guide"]["z_loc"], tree["guide"]["z_scale"]
        z = tree["posterior"]["z"].isel(chain=0)
        assert (abs(z.mean("draw") - loc) < 5 * scale / 4000**0.5).all()
        noise = ((z - loc) / scale).values.reshape(4000, -1)
        assert (abs((noise[1:] * noise[:-1]).mean(0)) < 5 / 4000**0.5).all(), "chunks repeat draws"


MEMORY = """
import json, resource, sys
import numpy as np, torch, xarray as xr
import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors

torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(5000, 4)
net = networks.linear()
vae = pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(4, 2, net), likelihoods.Normal(2, 4, net))
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pv.save_draws(sys.argv[1], vae.model, vae.guide, x, draws=30, parallel=True)
before = peak()
path = pv.save_draws(sys.argv[1], vae.model, vae.guide, x, draws=1000, parallel=True)
after = peak()
with xr.open_datatree(path) as tree:
    rows = slice(0, 50)
    z, loc, scale = tree["posterior"]["z"][0, :, rows], tree["guide"]["z_loc"][rows], tree["guide"]["z_scale"][rows]
    off = float(abs((z.mean("draw") - loc) / scale).max())
    found = {"sizes": dict(tree["posterior_predictive"]["x"].sizes), "off": off}
    found["khat"] = bool(np.isfinite(tree["sample_stats"]["khat"][rows]).all())
print(json.dumps(found | {"bytes": path.stat().st_size, "grown": after - before}))
"""


def test_the_memory_does_not_grow_with_the_file(tmp_path):
    found = run_program(MEMORY, tmp_path / "draws.nc")
    assert found["sizes"] == {"chain": 1, "draw": 1000, "obs": 5000, "feature": 4}
    assert found["bytes"] > 250 * 2**20
    assert found["grown"] < 120 * 2**20, "a third of the file at most"
    assert found["off"] < 6 / 1000**0.5
    assert found["khat"]


class Stop(BaseException):
    """Such as a KeyboardInterrupt."""


def stopping(pair, after):
    """A pair whose guide stops after some runs."""
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
def test_an_interrupted_export_leaves_an_older_file_unchanged(before, after, tmp_path):
    path = tmp_path / "draws.nc"
    if before:
        path.write_bytes(before)
    with pytest.raises(Stop):
        pv.save_draws(path, *stopping(gaussian(), after), draws=30, chunk=5)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if before else [])


def test_a_disk_that_is_too_small_is_refused_before_the_first_draw(tmp_path, monkeypatch):
    monkeypatch.setattr(netcdf.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(OSError, match=r"`path` must be on a disk with 2496 free bytes .*, got 100 in"):
        pv.save_draws(tmp_path / "draws.nc", *stopping(gaussian(), 3), draws=8)
    assert list(tmp_path.iterdir()) == []


def test_a_history_lies_along_epochs():
    model, guide, x = gaussian()
    fitted = pv.fit(model, guide, x, epochs=4, validation=x, seed=0)
    for history in (fitted, fitted.history):
        group = pv.to_datatree(model, guide, x, draws=3, history=history)["training"]
        assert set(group.data_vars) == set(fitted.history)
        for name, values in group.data_vars.items():
            assert (values.dims, values.attrs["units"]) == (("epoch",), "nats per datum")
            np.testing.assert_array_equal(values, fitted.history[name])
        np.testing.assert_array_equal(group.coords["epoch"], range(4))


def test_constants_lie_along_the_data_and_every_axis_has_the_users_name():
    tree = pv.to_datatree(*gaussian(), draws=3, **NAMED)
    group = tree["constant_data"]
    assert dims_of(group) == {"labels": ("obs",), "covariates": ("obs", "axis"), "temperature": ()}
    assert (group["labels"].sel(obs="d").item(), list(group.coords["label"].values)) == ("fox", LABELS)
    assert list(tree["training"].coords["epoch"].values) == [1, 2]
    assert tree["sample_stats"]["lp"].groupby("label").mean().sizes["label"] == 3
    dims = {"distances": ["obs", "other"], "knots": ["knot"], "elbo": ["step"]}
    constants = {"distances": np.eye(N), "knots": [1.0, 2.0], "matrix": np.eye(3)}
    options = {"dims": dims, "constant_data": constants, "history": {"elbo": [1.0]}, "coords": {"knot": ["a", "b"]}}
    tree = pv.to_datatree(*gaussian(), draws=3, **options)
    expected = {"distances": ("obs", "other"), "knots": ("knot",), "matrix": ("matrix_0", "matrix_1")}
    assert dims_of(tree["constant_data"]) == expected
    assert list(tree["constant_data"].coords["knot"].values) == ["a", "b"]
    assert tree["training"]["elbo"].dims == ("step",)
