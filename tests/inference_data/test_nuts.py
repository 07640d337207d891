"""The reference by NUTS equals the exact posterior where there is one, and changes nothing else."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from export_cases import SIGMAS
from pairs import gaussian, relaxed
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
