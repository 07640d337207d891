"""The names of rows and columns of a frame are coordinates of an export, where the user gives no others."""

import numpy as np
import pandas as pd
import polars as pl
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pairs import gaussian
from tree_checks import assert_file_holds, dims_of

import pyro_vae as pv

FRAME = pd.DataFrame(
    np.random.default_rng(0).normal(size=(4, 3)), columns=["mass", "length", "depth"], index=["Ada", "Bo", "Cy", "Di"]
)
X = torch.tensor(FRAME.to_numpy(), dtype=torch.float32)
VAE = gaussian(latent=1)


def tree_of(data, **options):
    return pv.to_datatree(VAE.model, VAE.guide, data, draws=3, **options)


def test_a_tree_has_the_values_of_tensors_and_the_names_of_the_frame():
    tree, plain = tree_of(FRAME), tree_of(X)
    assert dims_of(tree["posterior_predictive"])["x"] == ("chain", "draw", "obs", "column")
    assert tree["observed_data"]["x"].sel(obs="Bo", column="depth").item() == X[1, 2].item()
    assert list(tree["posterior"]["obs"].values) == [*FRAME.index]
    for group in ("posterior", "sample_stats", "posterior_predictive"):
        for name, values in plain[group].data_vars.items():
            np.testing.assert_array_equal(values.values, tree[group][name].values)


@pytest.mark.parametrize(
    "index",
    [
        pd.date_range("2020-01-01", periods=4),
        pd.period_range("2020-01", periods=4, freq="M"),
        pd.CategoricalIndex(["a", "a", "b", "c"]),
        pd.MultiIndex.from_product([["a", "b"], [1, 2]]),
        pd.Index([3, 1, 4, 1]),
        pd.Index([0.5, np.nan, 1.0, 2.0]),
        pd.Index(["x", 1, None, 2.5], dtype=object),
    ],
    ids=lambda index: type(index).__name__,
)
def test_an_index_of_every_kind_goes_to_a_file_and_back(index, tmp_path):
    tree = tree_of(FRAME.set_axis(index))
    assert_file_holds(tmp_path / "tree.nc", tree)
    path = pv.save_draws(tmp_path / "draws.nc", VAE.model, VAE.guide, FRAME.set_axis(index), draws=3)
    with xr.open_datatree(path) as saved:
        xr.testing.assert_equal(saved["posterior"].load(), tree["posterior"])


def test_frames_without_names_of_rows_have_numbers():
    for frame in (FRAME.reset_index(drop=True), pl.from_pandas(FRAME)):
        tree = tree_of(frame)
        assert tree["posterior"]["obs"].values.tolist() == [0, 1, 2, 3]
        assert tree["observed_data"]["column"].values.tolist() == [*FRAME.columns]


def test_names_of_the_user_win():
    names = ["a", "b", "c", "d"]
    tree = tree_of(FRAME, coords={"obs": names, "column": [1, 2, 3], "sex": ("obs", list("fmfm"))})
    assert tree["posterior"]["obs"].values.tolist() == names
    assert tree["observed_data"]["column"].values.tolist() == [1, 2, 3]
    assert tree["posterior"]["sex"].dims == ("obs",)
    named = tree_of(FRAME, dims={"x": ["trait"]})
    assert named["observed_data"]["x"].sel(obs="Cy", trait="mass").item() == X[2, 0].item()


def test_a_reference_has_the_same_names():
    tree = pv.reference(VAE.model, FRAME, draws=3, warmup=3, chains=1)
    assert dims_of(tree["observed_data"])["x"] == ("obs", "column")
    assert tree["posterior"]["obs"].values.tolist() == [*FRAME.index]


def two_frames(x, y):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([len(x), 3]).to_event(1), obs=x)
        pyro.sample("y", dist.Normal(z[..., None], 1.0).expand([len(x), 3]).to_event(1), obs=y)


def two_frames_guide(x, y):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_two_frames_share_a_dimension_only_if_their_columns_are_the_same():
    other = FRAME.rename(columns=str.upper) + 1
    tree = pv.to_datatree(two_frames, two_frames_guide, FRAME, other, draws=3)
    assert dims_of(tree["observed_data"]) == {"x": ("obs", "column"), "y": ("obs", "y_column")}
    assert tree["observed_data"]["y_column"].values.tolist() == ["MASS", "LENGTH", "DEPTH"]
    same = pv.to_datatree(two_frames, two_frames_guide, FRAME, FRAME + 1, draws=3)
    assert dims_of(same["observed_data"]) == {"x": ("obs", "column"), "y": ("obs", "column")}


def test_a_dimension_gives_way_to_a_site_of_its_name():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("column", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([len(x), 3]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("column", dist.Normal(0.0, 1.0))

    tree = pv.to_datatree(model, guide, FRAME, draws=3)
    assert dims_of(tree["observed_data"])["x"] == ("obs", "column_dim")
    assert tree["observed_data"]["column_dim"].values.tolist() == [*FRAME.columns]
