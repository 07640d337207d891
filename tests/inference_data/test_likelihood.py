"""Leave-one-out by ArviZ from draws of a guide equals exact refits, or is marked as not reliable."""

import math
import re
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal
from tree_checks import drawn

import pyro_vae as pv
from pyro_vae.inference_data.likelihood import resampled

N = 8
X = 0.7 * torch.randn(N, generator=torch.Generator().manual_seed(3)).double()
TAU, S, SIGMA = 2.0, 0.8, 0.6  # deviations of the mean, of local latents, and of the noise


def loo(model, guide, *data, **options):
    """elpd of each observation, by ArviZ, and the tree."""
    import arviz as az

    tree = pv.to_datatree(model, guide, *data, **({"draws": 4000, "parallel": True} | options))
    with warnings.catch_warnings(action="ignore"):  # of k̂ of single observations
        return az.loo(pv.to_arviz(tree), pointwise=True).loo_i.values, tree


def exact(x, noise, prior=TAU):
    """log p(x_i | other x) of x_i ~ N(m, noise²), m ~ N(0, prior²), by a refit without each."""
    found = []
    for i in range(len(x)):
        others = torch.cat([x[:i], x[i + 1 :]])
        precision = prior**-2 + len(others) * noise**-2
        mean = others.sum() * noise**-2 / precision
        found.append(dist.Normal(mean, (1 / precision + noise**2) ** 0.5).log_prob(x[i]))
    return torch.stack(found).numpy()


def posterior(x, noise, prior=TAU):
    precision = prior**-2 + len(x) * noise**-2
    return x.sum() * noise**-2 / precision, precision**-0.5


def mean_model(x):
    m = pyro.sample("m", dist.Normal(torch.zeros((), dtype=x.dtype), TAU))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, SIGMA), obs=x)


def mean_guide(shift=0.0, width=1.0):
    def guide(x):
        mean, scale = posterior(X, SIGMA)
        pyro.sample("m", dist.Normal(mean + shift * scale, width * scale))

    return guide


@pytest.mark.parametrize(("shift", "width"), [(0.0, 1.0), (0.3, 1.3)], ids=["posterior", "near it"])
def test_leave_one_out_is_that_of_refits_also_for_a_guide_that_is_not_the_posterior(az, shift, width):
    found, tree = loo(mean_model, mean_guide(shift, width), X)
    np.testing.assert_allclose(found, exact(X, SIGMA), atol=0.02)
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "obs")
    assert tree["log_likelihood"].attrs["reliable"] == 1
    if not shift:  # equal weights leave each draw in its place
        expected = dist.Normal(drawn(tree, "m")[:, None], SIGMA).log_prob(X)
        torch.testing.assert_close(drawn(tree, "x", "log_likelihood"), expected)
    without, _ = loo(mean_model, mean_guide(1.0, 1.3), X, draws=200)
    assert abs(without - exact(X, SIGMA)).max() < 0.2  # a shift by a standard deviation is corrected


def test_a_guide_far_from_the_posterior_is_marked_and_warned_about(az):
    tree = pv.to_datatree(mean_model, mean_guide(0.0, 0.1), X, draws=500, parallel=True)
    assert tree["log_likelihood"].attrs["reliable"] == 0
    with pytest.warns(UserWarning, match=r"az.loo and az.waic .* must not be trusted: k̂ .* above 0.7"):
        pv.to_arviz(tree)


def local_model(x):
    m = pyro.sample("m", dist.Normal(torch.zeros((), dtype=x.dtype), TAU))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, S))
        pyro.sample("x", dist.Normal(z, SIGMA), obs=x)


def local_guide(x):
    """The posterior."""
    mean, scale = posterior(X, math.hypot(S, SIGMA))
    m = pyro.sample("m", dist.Normal(mean, scale))
    with pyro.plate("data", len(x)):
        precision = S**-2 + SIGMA**-2
        pyro.sample("z", dist.Normal((m * S**-2 + x * SIGMA**-2) / precision, precision**-0.5))


def test_the_likelihood_is_marginal_over_latents_of_the_observation(az):
    found, tree = loo(local_model, local_guide, X, draws=2000, local_draws=200)
    np.testing.assert_allclose(found, exact(X, math.hypot(S, SIGMA)), atol=0.04)
    expected = dist.Normal(drawn(tree, "m")[:, None], math.hypot(S, SIGMA)).log_prob(X)
    error = (drawn(tree, "x", "log_likelihood").mean(0) - expected.mean(0)).abs()
    assert error.max() < 0.02
    assert 0 < tree["log_likelihood"].attrs["standard_error"] < 0.1


def test_an_autoguide_of_all_latents_together(az):
    guide = AutoMultivariateNormal(local_model)
    pv.fit(local_model, guide, X, epochs=600, lr=0.03, progress=False, seed=0)
    found, tree = loo(local_model, guide, X, draws=2000)
    assert tree["log_likelihood"].attrs["reliable"] == 1
    np.testing.assert_allclose(found, exact(X, math.hypot(S, SIGMA)), atol=0.1)


@pytest.mark.parametrize("mixed", [False, True], ids=["discrete", "discrete and continuous"])
def test_discrete_latents_of_the_observation_are_summed_out(mixed):
    """p(x | m) is a mixture, also where a continuous latent depends on the discrete one."""

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, TAU).expand([]))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(m + 2 * c, S)) if mixed else m + 2 * c
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    def guide(x):
        pyro.sample("m", dist.Normal(0.1, 0.5))
        with pyro.plate("data", len(x)):
            if mixed:
                pyro.sample("z", dist.Normal(x, 1.0))

    tree = pv.to_datatree(model, guide, X.float(), draws=50, local_draws=2000, parallel=True)
    found, khat = drawn(tree, "x", "log_likelihood"), tree["log_likelihood"].attrs["khat"]
    m = drawn(tree, "m")
    noise = math.hypot(S, SIGMA) if mixed else SIGMA
    parts = dist.Normal(m[:, None, None] + torch.tensor([0.0, 2.0]), noise).log_prob(X.float()[:, None])
    expected = (parts + torch.tensor([0.7, 0.3]).log()).logsumexp(-1)
    # Each draw of the group is one of the posterior's, in another order.
    distance = (found[:, None] - expected).abs().amax(-1)
    assert distance.amin(1).max() < (0.15 if mixed else 1e-4)
    assert math.isfinite(khat)


def test_weights_of_shared_latents_are_those_of_the_marginal_density():
    """They do not vary where q(θ) is p(θ | x), though weights of all latents do."""

    def guide(x):
        mean, scale = posterior(X, math.hypot(S, SIGMA))
        pyro.sample("m", dist.Normal(mean, scale))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.4))

    tree = pv.to_datatree(local_model, guide, X, draws=500, parallel=True, local_draws=400)
    assert tree["log_likelihood"].attrs["khat"] < 0.5
    assert tree["sample_stats"]["khat"] > tree["log_likelihood"].attrs["khat"]


def test_cells_that_are_masked_are_no_observations(az, tmp_path):
    seen = torch.arange(N) % 3 > 0

    def model(x):
        m = pyro.sample("m", dist.Normal(torch.zeros((), dtype=x.dtype), TAU))
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(m, SIGMA), obs=x)

    def guide(x):
        pyro.sample("m", dist.Normal(*posterior(X[seen], SIGMA)))

    found, tree = loo(model, guide, X)
    np.testing.assert_allclose(found, exact(X[seen], SIGMA), atol=0.04)
    np.testing.assert_array_equal(tree["log_likelihood"]["x_cell"], seen.nonzero()[:, 0])


def test_a_datum_has_all_of_its_observed_sites():
    def model(x, y):
        m = pyro.sample("m", dist.Normal(0.0, TAU))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, SIGMA), obs=x)
            with pyro.plate("times", 2, dim=-2):
                pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    x, y = X.float(), X.float().expand(2, -1)
    tree = pv.to_datatree(model, lambda x, y: pyro.sample("m", dist.Normal(0.0, 1.0)), x, y, draws=30)
    index = resampled(drawn(tree, "log_weight", "sample_stats"), 0)
    m = drawn(tree, "m")[index][:, None]
    expected = dist.Normal(m, SIGMA).log_prob(x) + dist.Normal(m, 1.0).log_prob(y[:, None]).sum(0)
    assert tree["log_likelihood"]["observed"].dims == ("chain", "draw", "obs")
    torch.testing.assert_close(drawn(tree, "observed", "log_likelihood").float(), expected, rtol=1e-4, atol=1e-4)


def test_a_nested_plate_is_left_out_cell_by_cell_or_by_group_if_that_is_the_data_plate():
    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 3, dim=-2):
            g = pyro.sample("g", dist.Normal(m, 1.0))
            with pyro.plate("units", 4):
                pyro.sample("y", dist.Normal(g, 1.0), obs=y)

    def guide(y):
        pyro.sample("m", dist.Normal(0.0, 0.6))
        with pyro.plate("groups", 3, dim=-2):
            pyro.sample("g", dist.Normal(y.mean(1, keepdim=True), 0.5))

    y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    options = {"draws": 40, "parallel": True, "local_draws": 2000}
    by_unit = pv.to_datatree(model, guide, y, plate="units", **options)
    assert by_unit["log_likelihood"]["y"].dims == ("chain", "draw", "groups", "obs")
    by_group = pv.to_datatree(model, guide, y, plate="groups", **options)
    assert by_group["log_likelihood"]["y"].dims == ("chain", "draw", "obs")
    covariance = torch.ones(4, 4) + torch.eye(4)
    m = drawn(by_group, "m")[:, None, None]
    expected = dist.MultivariateNormal(m.expand(-1, 3, 4), covariance).log_prob(y)
    distance = (drawn(by_group, "y", "log_likelihood")[:, None] - expected).abs().amax(-1)
    assert distance.amin(1).max() < 0.2


def plated(fn):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", fn(pyro.sample("z", dist.Normal(0.0, 1.0))), obs=x)

    return model


def standard_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_without_a_likelihood_for_leave_one_out_the_reason_is_an_attribute(az):
    def without_plate(x):
        pyro.sample("x", dist.Normal(pyro.sample("m", dist.Normal(0.0, 1.0)), torch.ones(N)).to_event(1), obs=x)

    def one_guide(x):
        pyro.sample("m", dist.Normal(0.0, 1.0))

    cases = [
        (
            plated(lambda z: dist.Normal(z, 1.0)),
            standard_guide,
            r"\['z'\] belongs to one observation.*compare_evidence",
        ),
        (without_plate, one_guide, r"\['x'\] are in no plate"),
        (mean_model, AutoDelta(mean_model), r"a point for \['m'\]"),
    ]
    for model, guide, reason in cases:
        tree = pv.to_datatree(model, guide, X, draws=5)
        assert "log_likelihood" not in tree.children
        assert re.search(reason, tree.attrs["why_no_log_likelihood"])
        with pytest.raises(TypeError, match="log likelihood not found"):  # no attribute is taken for it
            az.loo(pv.to_arviz(tree))


@pytest.mark.parametrize("chunk", [None, 7])
def test_a_file_has_the_same_likelihood(tmp_path, chunk):
    guide = mean_guide(0.3, 1.3)
    path = pv.save_draws(tmp_path / "draws.nc", mean_model, guide, X, draws=40, chunk=chunk)
    tree = pv.to_datatree(mean_model, guide, X, draws=40)
    with xr.open_datatree(path) as loaded:
        xr.testing.assert_allclose(loaded["log_likelihood"].to_dataset(), tree["log_likelihood"].to_dataset())
        assert loaded["log_likelihood"].attrs["khat"] == tree["log_likelihood"].attrs["khat"]


def test_resampled_draws_represent_the_weights():
    """Each draw is taken as often as its weight says, up to rounding."""
    weights = (0.5 * torch.randn(500, generator=torch.Generator().manual_seed(0))).exp()
    counts = torch.bincount(resampled(weights.log(), seed=1), minlength=500)
    assert int(counts.sum()) == 500
    assert (counts - 500 * weights / weights.sum()).abs().max() < 1
