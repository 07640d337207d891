"""Log-densities of draws: they equal those computed by hand for the same draws, and are left out if none exists."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from export_cases import SHARED, SIGMAS, TWO_PLATES, VAES, X, local_pair, on_data, shared_guide, shared_model
from pairs import NET, bernoulli, gaussian
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from tree_checks import drawn

import pyro_vae as pv
from pyro_vae import guides, handlers, likelihoods
from pyro_vae.evidence.pareto import pareto_shape
from pyro_vae.inference_data.sampler import JointSampler
from pyro_vae.inference_data.settings import ExportSettings
from pyro_vae.parts.networks import with_missing

STATISTICS = ["lp", "log_q", "log_weight"]


def statistics(model, guide, *data, **options):
    tree = pv.to_datatree(model, guide, *data, **({"draws": 8} | options))
    names = [name for name, values in tree["sample_stats"].data_vars.items() if "draw" in values.dims]
    return tree, {name: drawn(tree, name, "sample_stats") for name in names}


def assert_densities(found, lp, log_q):
    """The densities are these, and the weight is their difference."""
    assert list(found) == STATISTICS
    for name, expected in (("lp", lp), ("log_q", log_q), ("log_weight", lp - log_q)):
        torch.testing.assert_close(found[name].double(), expected.detach().double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", VAES.values(), ids=VAES)
def test_densities_of_a_vae_at_its_own_draws(make, parallel):
    vae = make()
    tree, found = statistics(vae.model, vae.guide, X, parallel=parallel)
    z = drawn(tree, "z")
    lp = vae.prior().log_prob(z) + vae.decode(z).log_prob(X)
    assert_densities(found, lp, vae.encode(X).log_prob(z))
    for name in STATISTICS:
        assert tree["sample_stats"][name].dims == ("chain", "draw", "obs")
        assert tree["sample_stats"][name].attrs == {"units": "nats"}


def test_missing_entries_do_not_enter_the_densities(parallel):
    encoder, decoder = guides.DiagonalNormal(3, 2, with_missing(NET)), likelihoods.Normal(2, 3, NET, missing=True)
    vae, x = gaussian(encoder=encoder, decoder=decoder), X.clone()
    x[0, 1] = x[3] = torch.nan
    tree, found = statistics(vae.model, vae.guide, x, parallel=parallel)
    z = drawn(tree, "z")
    assert_densities(found, vae.prior().log_prob(z) + vae.decode(z).log_prob(x), vae.encode(x).log_prob(z))
    torch.testing.assert_close(found["lp"][:, 3], vae.prior().log_prob(z[:, 3]))  # a row of missing entries
    assert all(values.isfinite().all() for values in found.values())


def mixed_model(x):
    """A discrete latent and two continuous ones, one of which depends on it."""
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(0.3))
        z, s = pyro.sample("z", dist.Normal(c, 1.0)), pyro.sample("s", dist.LogNormal(0.0, 0.5))
        pyro.sample("x", dist.Normal(z, s), obs=x)


def mixed_guide(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(torch.sigmoid(x)))
        pyro.sample("z", dist.Normal(0.5 * x + c, 0.7))
        pyro.sample("s", dist.LogNormal(0.1, 0.4))


def test_several_latents_of_both_kinds(parallel):
    x = X[:, 0]
    tree, found = statistics(mixed_model, config_enumerate(mixed_guide), x, parallel=parallel)
    c, z, s = (drawn(tree, name) for name in "czs")
    lp = dist.Bernoulli(0.3).log_prob(c) + dist.Normal(c, 1.0).log_prob(z) + dist.LogNormal(0.0, 0.5).log_prob(s)
    lp = lp + dist.Normal(z, s).log_prob(x)
    log_q = dist.Bernoulli(torch.sigmoid(x)).log_prob(c) + dist.Normal(0.5 * x + c, 0.7).log_prob(z)
    assert_densities(found, lp, log_q + dist.LogNormal(0.1, 0.4).log_prob(s))


@pytest.mark.parametrize(("plate", "dims"), [("days", ("people", "obs")), ("people", ("obs", "days"))])
def test_each_cell_of_crossed_plates_that_hold_all_sites_has_its_densities(plate, dims, parallel):
    tree, found = statistics(*TWO_PLATES, plate=plate, parallel=parallel)
    z, x = drawn(tree, "z"), TWO_PLATES[2]
    lp = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
    assert_densities(found, lp, dist.Normal(x, 0.1).log_prob(z))
    assert tree["sample_stats"]["lp"].dims == ("chain", "draw", *dims)


def test_weights_of_an_objective_change_no_density():
    vae = gaussian()
    _, plain = statistics(vae.model, vae.guide, X)
    weight = handlers.WeightKL(0.1)
    _, weighted = statistics(poutine.scale(weight(vae.model), 3.0), weight(vae.guide), X)
    assert all(torch.equal(plain[name], weighted[name]) for name in STATISTICS)


@pytest.mark.parametrize("make", [lambda: gaussian(1), bernoulli], ids=["gaussian", "bernoulli"])
def test_the_mean_weight_is_the_evidence_and_the_mean_log_weight_the_elbo(make):
    vae, draws = make(), 4000
    _, found = statistics(vae.model, vae.guide, X, draws=draws, parallel=True)
    log_weight = found["log_weight"].double()
    weight = (log_weight - log_weight.max(0).values).exp()
    error = weight.std(0) / weight.mean(0) / draws**0.5
    evidence = log_weight.logsumexp(0) - math.log(draws)
    assert ((evidence - pv.exact.log_evidence(vae.model, X)).abs() < SIGMAS * error + 1e-4).all()
    estimate = pv.log_evidence(vae.model, vae.guide, X, num_samples=draws, seed=1)
    assert ((evidence - estimate.log_evidence).abs() < SIGMAS * error.hypot(estimate.standard_error) + 1e-4).all()
    elbo = pv.exact.elbo(vae.model, vae.guide, X)
    assert ((log_weight.mean(0) - elbo).abs() < SIGMAS * log_weight.std(0) / draws**0.5 + 1e-4).all()


def switched_model(x):
    """A discrete latent that a guide may leave out, and a continuous one that depends on it."""
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(0.3))
        z = pyro.sample("z", dist.Normal(2 * c, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def switched_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.6 * x, 0.9))


def test_a_latent_that_the_guide_leaves_out_is_summed_out_of_densities_and_drawn_from_its_conditional():
    x, draws = X[:, 0], 4000
    tree, found = statistics(switched_model, switched_guide, x, draws=draws, parallel=True)
    c, z = drawn(tree, "c"), drawn(tree, "z")
    log_prior = torch.tensor([0.7, 0.3]).log()
    log_z = dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(z[..., None]) + log_prior
    lp = log_z.logsumexp(-1) + dist.Normal(z, 1.0).log_prob(x)
    assert_densities(found, lp, dist.Normal(0.6 * x, 0.9).log_prob(z))
    p = log_z.softmax(-1)[..., 1]  # of c = 1, given z
    assert ((c - p).mean(0).abs() < SIGMAS * (p * (1 - p)).mean(0).sqrt() / draws**0.5).all()
    assert (((c - p) * z).mean(0).abs() < SIGMAS * (p * (1 - p) * z**2).mean(0).sqrt() / draws**0.5).all()
    exact = (dist.Normal(torch.tensor([0.0, 2.0]), 2**0.5).log_prob(x[:, None]) + log_prior).logsumexp(-1)
    weight = found["log_weight"].exp()
    assert ((weight.mean(0) - exact.exp()).abs() < SIGMAS * weight.std(0) / draws**0.5).all()


def test_under_a_guide_without_latents_lp_is_the_evidence(parallel):
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.7, 0.3])))
            pyro.sample("x", dist.Normal(2.0 * c, 1.0), obs=x)

    x = X[:, 0]
    _, found = statistics(model, lambda x: None, x, parallel=parallel)
    exact = dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(x[:, None]) + torch.tensor([0.7, 0.3]).log()
    assert list(found) == ["lp"]
    torch.testing.assert_close(found["lp"].float(), exact.logsumexp(-1).expand(8, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draws", [20, 21, 200])
def test_khat_is_that_of_the_weights_and_needs_21_draws(draws, parallel):
    tree, found = statistics(*on_data(gaussian()), draws=draws, parallel=parallel)
    assert list(tree["sample_stats"].data_vars) == [*STATISTICS, *(["khat"] if draws > 20 else [])]
    if draws > 20:
        assert tree["sample_stats"]["khat"].dims == ("obs",)
        np.testing.assert_array_equal(tree["sample_stats"]["khat"], pareto_shape(found["log_weight"]))


def shared_lp(mu, z):
    local = dist.Normal(mu[:, None], 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(X[:, 0])
    return dist.Normal(1.0, 0.5).log_prob(mu) + local.sum(-1)


def test_with_a_global_latent_the_densities_are_those_of_all_data(parallel):
    tree, found = statistics(*SHARED, parallel=parallel)
    mu, z = drawn(tree, "mu"), drawn(tree, "z")
    log_q = dist.Normal(0.7, 0.3).log_prob(mu) + dist.Normal(0.5 * X[:, 0], 0.4).log_prob(z).sum(-1)
    assert_densities(found, shared_lp(mu, z), log_q)
    assert all(tree["sample_stats"][name].dims == ("chain", "draw") for name in STATISTICS)


def test_with_a_global_latent_the_mean_weight_is_the_evidence_of_all_data():
    x, draws = X[:3, 0], 20_000
    tree, found = statistics(shared_model, shared_guide, x, draws=draws, parallel=True)
    covariance = 0.5**2 + (1 + 0.5**2) * torch.eye(len(x))
    expected = dist.MultivariateNormal(torch.ones(len(x)), covariance).log_prob(x)
    weight = found["log_weight"].exp()
    error = weight.std() / weight.mean() / draws**0.5
    assert abs(weight.mean().log() - expected) < SIGMAS * error
    assert tree["sample_stats"]["khat"].dims == ()
    assert tree["sample_stats"]["khat"].item() == pareto_shape(found["log_weight"][:, None].float()).item()


def positive_model(x):
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        pyro.sample("x", dist.Normal(0.0, s), obs=x)


@pytest.mark.parametrize(("autoguide", "by_datum"), [(AutoNormal, True), (AutoDiagonalNormal, False)])
def test_the_density_of_an_autoguide_is_that_of_the_transformed_latent(autoguide, by_datum):
    x, guide = X[:, 0], autoguide(positive_model, init_scale=0.3)
    guide(x)
    tree, found = statistics(positive_model, guide, x)
    s = drawn(tree, "s")
    loc, scale = (guide.locs.s, guide.scales.s) if by_datum else (guide.loc, guide.scale)
    log_q = dist.LogNormal(loc, scale).log_prob(s)
    lp = dist.LogNormal(0.0, 0.5).log_prob(s) + dist.Normal(0.0, s).log_prob(x)
    assert_densities(found, *((lp, log_q) if by_datum else (lp.sum(-1), log_q.sum(-1))))


def test_a_point_has_no_density():
    guide = AutoDelta(shared_model)
    guide(X[:, 0])
    tree, found = statistics(shared_model, guide, X[:, 0], draws=30)
    assert list(found) == ["lp"]
    torch.testing.assert_close(found["lp"], shared_lp(drawn(tree, "mu"), drawn(tree, "z")).double())


def test_soft_targets_have_no_likelihood():
    vae = gaussian(decoder=likelihoods.Bernoulli(2, 3, NET, soft_targets=True))
    tree, found = statistics(vae.model, vae.guide, X.sigmoid(), draws=30)
    assert list(found) == ["log_q"]
    torch.testing.assert_close(found["log_q"], vae.encode(X.sigmoid()).log_prob(drawn(tree, "z")).detach())


def test_a_latent_that_the_model_does_not_have_leaves_no_weight():
    def guide(x):
        with pyro.plate("data", len(x)):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            pyro.sample("s", dist.LogNormal(shift, 0.4))

    _, found = statistics(positive_model, guide, X[:, 0], draws=30)
    assert list(found) == ["lp", "log_q"]


def test_a_relaxed_draw_has_no_mass_under_a_discrete_prior():
    pair = local_pair(dist.Bernoulli(0.5), lambda x: dist.RelaxedBernoulli(torch.tensor(0.5), logits=x))
    _, found = statistics(*pair, X[:, 0], draws=30)
    assert list(found) == ["log_q"]


@pytest.mark.parametrize("rows", [5000, 50_000, 500_000])
def test_the_default_chunk_takes_at_most_64_mebibytes(rows):
    vae = gaussian()
    found = JointSampler(vae.model, vae.guide, (torch.zeros(rows, 3),), ExportSettings(draws=1000, parallel=True))
    assert 1 <= found.chunk <= max(1, 2**26 // (found.nbytes // 1000))
