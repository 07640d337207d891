"""Predictions at new covariates have the law of the exact predictive distribution."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from tree_checks import assert_file_holds, drawn

import pyro_vae as pv

SIGMAS, NOISE = 5, 0.5
X = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([1.0, -0.5]) + NOISE * torch.randn(12, generator=torch.Generator().manual_seed(1))
NEW = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        mean = pyro.deterministic("mean", x @ w)
        pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def posterior():
    precision = torch.eye(2) + X.T @ X / NOISE**2
    covariance = torch.linalg.inv(precision)
    return covariance @ X.T @ Y / NOISE**2, covariance


def regression_guide(x, y=None):
    pyro.sample("w", dist.MultivariateNormal(*posterior()))


def assert_moments(draws, mean, variance):
    for values, expected in ((draws, mean), ((draws - mean) ** 2, variance)):
        error = values.double().mean(0) - expected
        assert (error.abs() < SIGMAS * values.double().std(0) / len(draws) ** 0.5).all()


@pytest.mark.parametrize("new", [(NEW, None), NEW, pv.Arguments(NEW), pv.Arguments(x=NEW), NEW.numpy()])
def test_a_regression_has_its_exact_predictive_distribution(new, tmp_path):
    options = {"draws": 3000, "parallel": True, "predictions": new}
    tree = pv.to_datatree(regression, regression_guide, X, Y, **options)
    mean, covariance = posterior()
    spread = ((NEW @ covariance) * NEW).sum(1)
    assert_moments(drawn(tree, "y", "predictions"), NEW @ mean, spread + NOISE**2)
    assert_moments(drawn(tree, "mean", "predictions"), NEW @ mean, spread)
    w = drawn(tree, "w")
    torch.testing.assert_close(drawn(tree, "mean", "predictions"), w @ NEW.T, rtol=1e-4, atol=1e-4)
    assert tree["predictions"]["y"].dims == ("chain", "draw", "obs")
    assert tree["posterior_predictive"]["y"].sizes["obs"] == 12
    np.testing.assert_array_equal(tree["predictions_constant_data"]["x"], NEW)
    assert tree["predictions_constant_data"]["x"].dims[0] == "obs"
    assert_file_holds(tmp_path / "run.nc", tree)


def test_groups_are_those_of_arviz(az):
    options = {"predictions": (NEW, None), "coords": {"obs": range(12)}}
    tree = pv.to_datatree(regression, regression_guide, X, Y, draws=30, **options)
    data = pv.to_arviz(tree)
    assert {"predictions", "predictions_constant_data"} <= set(data.groups())
    assert list(data.predictions["obs"].values) == [0, 1, 2]


def test_latents_of_new_data_are_drawn_from_their_prior_and_of_known_groups_are_kept():
    def model(x, group, y=None):
        with pyro.plate("groups", 2):
            level = pyro.sample("level", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(level[group], 1.0))
            pyro.sample("y", dist.Normal(z + x, NOISE), obs=y)

    def guide(x, group, y=None):
        with pyro.plate("groups", 2):
            pyro.sample("level", dist.Normal(torch.tensor([-20.0, 20.0]), 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(100.0, 1.0))

    group, new = torch.arange(12) % 2, torch.tensor([1, 1, 0])
    tree = pv.to_datatree(
        model, guide, X[:, 0], group, Y, draws=3000, parallel=True, predictions=(torch.zeros(3), new, None)
    )
    mean = torch.tensor([20.0, 20.0, -20.0])
    assert_moments(drawn(tree, "y", "predictions"), mean, torch.full((3,), 0.1**2 + 1 + NOISE**2))
    level = drawn(tree, "level")[:, new]
    residual = drawn(tree, "y", "predictions") - level
    assert_moments(residual, torch.zeros(3), torch.full((3,), 1 + NOISE**2))  # each draw keeps its level


def test_a_file_has_the_same_predictions(tmp_path):
    options = {"draws": 20, "predictions": (NEW, None)}
    path = pv.save_draws(tmp_path / "draws.nc", regression, regression_guide, X, Y, chunk=7, **options)
    tree = pv.to_datatree(regression, regression_guide, X, Y, **options)
    with xr.open_datatree(path) as loaded:
        for group in ("predictions", "predictions_constant_data"):
            xr.testing.assert_equal(loaded[group].to_dataset(), tree[group].to_dataset())


@pytest.mark.parametrize(("new", "message"), [
    ((NEW[:, :1], None), "`predictions` must be arguments that the model takes, got some on which it raises"),
    ((NEW, None, None), "`predictions` must be arguments that the model takes"),
])  # fmt: skip
def test_arguments_that_the_model_does_not_take_are_refused(new, message):
    with pytest.raises((TypeError, ValueError), match=message):
        pv.to_datatree(regression, regression_guide, X, Y, draws=3, predictions=new)


def test_a_model_without_its_observed_site_at_new_arguments_is_refused():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        if y is not None:
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)

    with pytest.raises(ValueError, match=r"has the observed sites \['y'\], got some without \['y'\]"):
        pv.to_datatree(model, regression_guide, X, Y, draws=3, predictions=(NEW, None))
