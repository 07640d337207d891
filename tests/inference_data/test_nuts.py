"""The reference by NUTS equals the exact posterior where there is one, and changes nothing else."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from export_cases import SIGMAS
from pairs import gaussian, relaxed
from pyro import poutine
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods
from pyro_vae.parts.networks import linear, mlp

X = torch.tensor([[0.5, -1.0, 0.2], [1.5, 0.3, -0.4], [-2.0, 0.1, 0.9]])


def linear_vae():
    torch.manual_seed(0)
    return gaussian(encoder=guides.DiagonalNormal(3, 2, linear()), decoder=likelihoods.Normal(2, 3, linear()))


def nonlinear_vae():
    torch.manual_seed(1)
    net = mlp([4], nn.Tanh)
    return gaussian(1, encoder=guides.DiagonalNormal(3, 1, net), decoder=likelihoods.Normal(1, 3, net, scale=0.7))


@pytest.fixture(scope="module")
def trees():
    makes = (linear_vae, nonlinear_vae)
    with pyro.get_param_store().scope():
        return {make: pv.reference(make().model, X, draws=250, chains=2, warmup=100) for make in makes}


@pytest.mark.parametrize("make", [linear_vae, nonlinear_vae])
def test_mean_and_deviation_are_those_of_the_exact_posterior(trees, make):
    z = torch.from_numpy(trees[make]["posterior"]["z"].values).double()
    assert (split_gelman_rubin(z) < 1.05).all()
    truth = pv.exact.posterior(make().model, X)
    drawn = truth.sample((200_000,)).double()
    for ours, theirs in ((z, drawn), ((z - drawn.mean(0)) ** 2, (drawn - drawn.mean(0)) ** 2)):
        mcse = ours.flatten(0, 1).std(0) / effective_sample_size(ours).sqrt()
        assert ((ours.flatten(0, 1).mean(0) - theirs.mean(0)).abs() < SIGMAS * mcse + 0.01).all()


def test_chains_have_random_numbers_of_their_own_and_one_seed_reproduces_them(trees):
    z = trees[linear_vae]["posterior"]["z"].values
    assert not np.isclose(z[0], z[1]).all(-1).any()
    first, again, other = (pv.reference(linear_vae().model, X[:1], draws=8, warmup=8, seed=seed) for seed in (3, 3, 4))
    assert first["posterior"].to_dataset().equals(again["posterior"].to_dataset())
    assert not first["posterior"].to_dataset().equals(other["posterior"].to_dataset())


def test_names_are_those_of_the_tree_of_a_guide(trees):
    vae, tree = linear_vae(), trees[linear_vae]
    of_guide, z = pv.to_datatree(vae.model, vae.guide, X, draws=4), tree["posterior"]["z"]
    assert z.dims == of_guide["posterior"]["z"].dims
    assert dict(z.sizes) == {"chain": 2, "draw": 250, "obs": 3, "latent": 2}
    np.testing.assert_array_equal(tree["observed_data"]["x"], X)
    assert tree["sample_stats"]["diverging"].dims == ("chain", "draw")
    assert not tree["sample_stats"]["diverging"].all()
    for node in tree.children.values():
        for dim, size in node.sizes.items():
            np.testing.assert_array_equal(node.coords[dim], np.arange(size))
    assert {"created_at", "warmup", "acceptance_rate"} <= set(tree.attrs)


def test_lp_is_the_log_of_the_joint_density(trees):
    vae, tree = linear_vae(), trees[linear_vae]
    z = torch.from_numpy(tree["posterior"]["z"].values)
    with torch.no_grad():
        lp = (vae.prior().log_prob(z) + vae.decode(z).log_prob(X)).sum(-1)
    np.testing.assert_allclose(tree["sample_stats"]["lp"], lp, rtol=1e-4, atol=1e-3)


def test_a_file_gives_back_the_same_tree(trees, tmp_path):
    trees[nonlinear_vae].to_netcdf(tmp_path / "reference.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "reference.nc") as loaded:
        xr.testing.assert_equal(loaded.load(), trees[nonlinear_vae])


def test_arviz_computes_r_hat_and_draws_the_guide_next_to_its_reference(trees, az):
    assert (az.summary(pv.to_arviz(trees[nonlinear_vae]), round_to="none")["r_hat"] < 1.05).all()
    vae = nonlinear_vae()
    q = pv.to_datatree(vae.model, vae.guide, X, draws=50)
    pair = [pv.to_arviz(tree) for tree in (q, trees[nonlinear_vae])]
    (ax,) = az.plot_forest(pair, model_names=["q", "NUTS"], var_names=["z"], combined=True).ravel()
    points = [line for line in ax.lines if line.get_marker() == "o"]
    assert len(points) == 2 * q["posterior"]["z"][0, 0].size, "one of each model for every latent of every datum"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(labels) == ["NUTS", "q"]


def test_deterministic_sites_are_computed_from_the_draws():
    vae, names = relaxed(1), {"dims": {"z": ["bit"]}, "coords": {"obs": ["a", "b"]}}
    tree = pv.reference(vae.model, X[:2], draws=10, chains=2, warmup=10, **names)
    z, code = (torch.from_numpy(tree["posterior"][name].values) for name in ("z", "code"))
    torch.testing.assert_close(code, vae.code(z))
    assert tree["posterior"]["z"].dims == ("chain", "draw", "obs", "bit")
    assert list(tree["posterior"].coords["obs"].values) == ["a", "b"]


def assert_moments(draws, mean, variance):
    """Draws of chains, ``(chain, draw)``, have this mean and variance, within their Monte Carlo errors."""
    draws = torch.as_tensor(draws).double()
    for values, expected in ((draws, mean), ((draws - mean) ** 2, variance)):
        mcse = values.std() / effective_sample_size(values[..., None])[0].sqrt()
        assert abs(float(values.mean()) - expected) < SIGMAS * mcse + 1e-3


def test_a_global_latent_without_a_plate_has_its_posterior_and_exact_leave_one_out(az):
    y = torch.tensor([1.0, 2.0, 0.5, 1.2])

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    tree = pv.reference(model, y, draws=250, chains=2, warmup=80)
    precision = 2.0**-2 + len(y)
    assert_moments(tree["posterior"]["m"].values, float(y.sum() / precision), 1 / precision)
    m = torch.from_numpy(tree["posterior"]["m"].values)
    expected = dist.Normal(m[..., None], 1.0).log_prob(y)
    np.testing.assert_allclose(tree["log_likelihood"]["y"], expected, rtol=1e-5)
    lp = dist.Normal(0.0, 2.0).log_prob(m) + expected.sum(-1)
    np.testing.assert_allclose(tree["sample_stats"]["lp"], lp, rtol=1e-5)
    found = az.loo(pv.to_arviz(tree), pointwise=True).loo_i.values
    for i in range(len(y)):
        others = 2.0**-2 + len(y) - 1
        mean = (y.sum() - y[i]) / others
        assert found[i] == pytest.approx(float(dist.Normal(mean, (1 + 1 / others) ** 0.5).log_prob(y[i])), abs=0.08)
    assert {"r_hat", "ess_bulk"} <= set(az.summary(pv.to_arviz(tree)).columns)


def test_masked_latents_are_nan_and_change_nothing_else():
    """The padded steps of a sequence would have no density, and a sampler would leave with them for infinity."""
    x, lengths = torch.tensor([[1.0, 0.5], [2.0, 0.0]]), torch.tensor([2, 1])

    def model(x, lengths):
        with pyro.plate("data", len(x)):
            z = torch.zeros(2)
            for t in range(2):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                    pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    tree = pv.reference(model, x, lengths, draws=250, chains=2, warmup=80)
    assert bool(tree["posterior"]["z_1"].isel(obs=1).isnull().all())
    assert bool(tree["posterior"]["z_1"].isel(obs=0).notnull().all())
    assert_moments(tree["posterior"]["z_0"].isel(obs=1).values, 1.0, 0.5)
    covariance = torch.linalg.inv(torch.tensor([[3.0, -1.0], [-1.0, 2.0]]))
    mean = covariance @ x[0]
    assert_moments(tree["posterior"]["z_0"].isel(obs=0).values, float(mean[0]), float(covariance[0, 0]))


def test_a_mask_that_depends_on_a_discrete_latent_hides_draws_of_its_states():
    """As objects of a scene that are not there: n is 0 or 1, and with 1 there is a z."""
    x = torch.tensor([0.3, 2.5])

    def model(x):
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Categorical(torch.tensor([0.5, 0.5])))
            with poutine.mask(mask=n > 0):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(n * z, 1.0), obs=x)

    tree = pv.reference(model, x, draws=250, chains=1, warmup=80, processes=1)
    n, z = tree["posterior"]["n"].values, tree["posterior"]["z"].values
    joint = torch.stack([dist.Normal(0.0, scale).log_prob(x) for scale in (1.0, 2.0**0.5)])
    for row, expected in enumerate(joint.softmax(0)[1].tolist()):
        assert n[..., row].mean() == pytest.approx(expected, abs=0.12)
    assert (np.isnan(z) == (n == 0)).all()
    present = z[..., 1][n[..., 1] == 1]
    assert present.mean() == pytest.approx(1.25, abs=0.2)
    assert present.var() == pytest.approx(0.5, abs=0.25)


@pytest.mark.parametrize("kind", ["mask", "mean"])
def test_a_latent_with_a_value_for_each_state_is_refused(kind):
    def model(x):
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Categorical(torch.tensor([0.5, 0.5])))
            prior = dist.Normal(0.0, 1.0).mask(n > 0) if kind == "mask" else dist.Normal(n.float(), 1.0)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(n * z, 1.0), obs=x)

    message = r"`model` must have continuous latents of one value for all states of \['n'\].*'z': \(2, 3\)"
    with pytest.raises(ValueError, match=message):
        pv.reference(model, torch.zeros(3), draws=2, chains=1, warmup=2)


def test_a_discrete_latent_is_summed_out_and_drawn_back():
    x = torch.tensor([-0.5, 2.5, 1.0])

    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 0.5))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.6, 0.4])))
            pyro.sample("x", dist.Normal(shift + 2.0 * c, 1.0), obs=x)

    tree = pv.reference(model, x, draws=250, chains=2, warmup=80)
    grid = torch.linspace(-4, 4, 4001).double()
    parts = dist.Normal(grid[:, None, None] + torch.tensor([0.0, 2.0]), 1.0).log_prob(x[:, None])
    parts = parts + torch.tensor([0.6, 0.4]).log()
    joint = parts.logsumexp(-1).sum(-1) + dist.Normal(0.0, 0.5).log_prob(grid)
    p = joint.softmax(0)
    mean = float((p * grid).sum())
    assert_moments(tree["posterior"]["shift"].values, mean, float((p * (grid - mean) ** 2).sum()))
    classes = (p[:, None] * parts.softmax(-1)[..., 1]).sum(0)
    c = torch.from_numpy(tree["posterior"]["c"].values).double()
    for i in range(3):
        assert_moments(c[..., i], float(classes[i]), float(classes[i] * (1 - classes[i])))
    shift = torch.from_numpy(tree["posterior"]["shift"].values).double()
    expected = dist.Normal(shift[..., None, None] + torch.tensor([0.0, 2.0]), 1.0).log_prob(x[:, None])
    expected = (expected + torch.tensor([0.6, 0.4]).log()).logsumexp(-1)
    np.testing.assert_allclose(tree["log_likelihood"]["x"], expected, rtol=1e-4)
    lp = expected.sum(-1) + dist.Normal(0.0, 0.5).log_prob(shift)
    np.testing.assert_allclose(tree["sample_stats"]["lp"], lp, rtol=1e-4)


def test_processes_change_nothing():
    one, two = (pv.reference(own_model, torch.tensor([2.0]), draws=8, warmup=8, processes=number) for number in (1, 2))
    assert one["posterior"].to_dataset().equals(two["posterior"].to_dataset())


def test_a_chain_starts_elsewhere_where_draws_of_the_prior_have_no_density():
    def model(x):
        z = pyro.sample("z", dist.Normal(1e30, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.clamp(max=1e3) * 1e20, 1e-3), obs=x)

    def milder(x):
        z = pyro.sample("z", dist.LogNormal(0.0, 60.0))  # overflows in most draws
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, z.square()), obs=x)

    tree = pv.reference(milder, torch.tensor([0.3, -0.2]), draws=10, warmup=20, processes=1)
    assert np.isfinite(tree["posterior"]["z"]).all()
    with pytest.raises(ValueError, match="`model` must have a finite log p"):
        pv.reference(model, torch.zeros(2), draws=5, warmup=5, processes=1)


def eight_schools(sigma, y):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


@pytest.mark.slow
def test_eight_schools_has_the_moments_of_quadrature_over_mu_and_tau():
    """Rubin 1981. Given mu and tau, the effects are normal: a grid over both is an independent answer."""
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    tree = pv.reference(eight_schools, sigma, y, draws=1500, chains=2, warmup=500)
    mu, log_tau = torch.linspace(-25, 35, 601).double(), torch.linspace(-8, 6, 1401).double()
    tau = log_tau.exp()
    total = (tau[:, None] ** 2 + sigma**2).sqrt()
    joint = dist.Normal(mu[:, None, None], total).log_prob(y).sum(-1) + dist.Normal(0.0, 5.0).log_prob(mu)[:, None]
    joint = joint + dist.HalfCauchy(5.0).log_prob(tau) + log_tau
    p = joint.flatten().softmax(0).reshape(joint.shape)
    expected = {"mu": (p.sum(1) * mu).sum(), "tau": (p.sum(0) * tau).sum()}
    for name, mean in expected.items():
        draws = torch.from_numpy(tree["posterior"][name].values).double()
        assert (split_gelman_rubin(draws[..., None]) < 1.03).all()
        mcse = draws.std() / effective_sample_size(draws[..., None])[0].sqrt()
        assert abs(draws.mean() - mean) < SIGMAS * mcse
    precision = tau[:, None] ** -2 + sigma**-2
    theta = (mu[:, None, None] * tau[:, None] ** -2 + y * sigma**-2) / precision
    draws = torch.from_numpy(tree["posterior"]["theta"].values).double()
    for i in range(len(y)):
        mcse = draws[..., i].std() / effective_sample_size(draws[..., i : i + 1])[0].sqrt()
        assert abs(draws[..., i].mean() - (p * theta[..., i]).sum()) < SIGMAS * mcse


def own_model(x):
    """A model with a parameter in the store."""
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def test_parameters_random_streams_and_gradients_are_unchanged(random_states):
    vae = linear_vae()
    vae.register()
    next(vae.decoder.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in vae.parameters()]
    pyro.param("scale", torch.tensor(0.05), constraint=dist.constraints.positive)
    stored = {name: value.clone() for name, value in pyro.get_param_store().named_parameters()}
    state = random_states()
    pv.reference(vae.model, X[:1], draws=5, chains=1, warmup=5)
    tree = pv.reference(own_model, torch.tensor([2.0]), draws=100, chains=1, warmup=50)
    assert float(tree["posterior"]["z"].mean()) == pytest.approx(2.0, abs=0.1), "the stored value is used"
    assert random_states() == state
    after = dict(pyro.get_param_store().named_parameters())
    assert after.keys() == stored.keys()
    assert all(torch.equal(after[name], value) for name, value in stored.items())
    assert [parameter.requires_grad for parameter in vae.parameters()] == flags
    assert all(parameter.grad is None for parameter in vae.parameters())
    unregistered = linear_vae()
    pv.reference(unregistered.model, X[:1], draws=2, chains=1, warmup=2)
    assert set(dict(pyro.get_param_store().named_parameters())) == stored.keys()
