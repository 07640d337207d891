"""Exact answers against independent ones: scikit-learn, closed forms, Monte Carlo and sums by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_cases import TANH, vae_of
from pairs import gaussian, guide_of, model_of
from sklearn.mixture import GaussianMixture

import pyro_vae as pv
from pyro_vae import exact, guides, likelihoods, networks, priors
from pyro_vae.exact.model_density import ModelDensity
from pyro_vae.model_guide import ModelGuide

KINDS = ["normal", "normal 2-D", "relaxed", "relaxed hard", "gumbel", "gumbel hard", "bernoulli", "one-hot"]


def steep_vae(kind):
    """A VAE with random parameters that are large enough to matter."""
    vae = vae_of(kind, features=2, scale=0.4)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(2.0)
    return vae


@pytest.mark.parametrize("kind", KINDS)
def test_log_evidence_is_elbo_plus_kl_and_both_agree_with_naive_monte_carlo(kind):
    vae, x = steep_vae(kind), torch.randn(20, 2)
    evidence = exact.log_evidence(vae.model, x)
    elbo, kl = exact.elbo(vae.model, vae.guide, x), exact.kl(vae.model, vae.guide, x)
    assert (kl > 0).all()
    assert (elbo < evidence).all()
    assert (evidence - elbo - kl).abs().max() < 3e-4
    with torch.no_grad():
        q, near = vae.encode(x[:4]), 0.5 * x[4:8]
        z = q.sample(torch.Size([20_000]))
        terms = (vae.decode(z).log_prob(x[:4]) + vae.prior().log_prob(z) - q.log_prob(z)).double()
        weights = vae.decode(vae.prior().sample(torch.Size([50_000]))[:, None]).log_prob(near).double().exp()
    assert ((terms.mean(0) - elbo[:4]).abs() < 4.5 * terms.std(0) / 20_000**0.5 + 1e-4).all()
    error = (weights.mean(0) - exact.log_evidence(vae.model, near).exp()).abs()
    assert (error < 4.5 * weights.std(0) / 50_000**0.5).all()


@pytest.mark.parametrize("kind", ["relaxed hard", "gumbel hard"])
def test_a_relaxed_model_with_a_rounded_latent_has_the_evidence_of_its_twin(kind):
    vae, x = steep_vae(kind), torch.randn(10, 2)
    twin = vae.discrete()
    assert torch.allclose(exact.log_evidence(vae.model, x), exact.log_evidence(twin.model, x), atol=1e-4)


def test_enumeration_agrees_with_scikit_learns_gaussian_mixture():
    means = torch.tensor([[-1.0, -0.7], [0.8, 1.2]], dtype=torch.float64)
    scales = torch.tensor([0.3, 0.5], dtype=torch.float64)
    x = torch.randn(500, 2, dtype=torch.float64)
    decoder = likelihoods.Normal(1, 2, networks.linear(), scale="per_dimension", min_scale=0.0)
    vae = pv.VAE(priors.Bernoulli(1, probs=0.3), guides.Bernoulli(2, 1, TANH), decoder).double()
    with torch.no_grad():
        vae.prior.raw.copy_(torch.logit(torch.tensor([0.3], dtype=torch.float64)))
        decoder.network.bias.copy_(means[0])
        decoder.network.weight.copy_((means[1] - means[0])[:, None])
        decoder.family.log_scale.copy_(scales.log())
    mixture = GaussianMixture(2, covariance_type="diag")
    mixture.weights_, mixture.means_ = torch.tensor([0.7, 0.3]).double().numpy(), means.numpy()
    mixture.covariances_ = (scales**2).expand(2, 2).numpy()
    mixture.precisions_cholesky_ = (1 / scales).expand(2, 2).numpy()
    expected = torch.from_numpy(mixture.score_samples(x.numpy()))
    assert (exact.log_evidence(vae.model, x) - expected).abs().max() < 1e-7
    assert (exact.log_evidence(vae.float().model, x.float()) - expected).abs().max() < 1e-5
    responsibilities = torch.from_numpy(mixture.predict_proba(x.numpy()))[:, 1]
    assert torch.allclose(exact.posterior(vae.double().model, x).probs[1], responsibilities, atol=1e-6)


@pytest.mark.parametrize("kind", ["normal", "relaxed", "gumbel"])
def test_a_posterior_by_quadrature_is_normalised_and_its_samples_follow_it(kind):
    vae, x = steep_vae(kind), torch.tensor([[0.3, -0.5]])
    posterior, coordinates = exact.posterior(vae.model, x), ModelDensity(ModelGuide(vae.model, None, x)).coordinates()
    grid = torch.linspace(-80, 80, 200_001, dtype=torch.float64)
    log_prob = torch.cat([posterior.log_prob(coordinates.to_site(part[:, None, None])) for part in grid.split(20_000)])
    density = log_prob[:, 0].double().exp()
    cdf = torch.cumulative_trapezoid(density, grid)
    assert abs(cdf[-1] - 1) < 1e-4
    draws = coordinates.to_points(posterior.sample(torch.Size([4000]))).flatten().sort().values.double()
    reached = cdf[torch.searchsorted(grid, draws).clamp(1, len(cdf)) - 1]
    steps = torch.arange(1, 4001, dtype=torch.float64) / 4000
    assert (reached - steps).abs().max() < 2.4 / 4000**0.5 + 1e-3


def test_a_posterior_of_states_sums_to_one_and_its_samples_follow_it():
    vae, x = steep_vae("one-hot"), torch.randn(3, 2)
    posterior = exact.posterior(vae.model, x)
    states = posterior.enumerate_support()
    assert torch.allclose(posterior.probs.sum(0), torch.ones(3))
    assert torch.allclose(posterior.probs, posterior.log_prob(states).exp(), atol=1e-6)
    assert torch.allclose(posterior.mean, (posterior.probs[..., None, None] * states).sum(0), atol=1e-6)
    draws = posterior.sample(torch.Size([5000]))
    found = (draws[:, None] == states[None]).all(-1).all(-1).double().mean(0)
    error = (posterior.probs * (1 - posterior.probs) / 5000).sqrt()
    assert ((found - posterior.probs).abs() < 5 * error + 1e-3).all()


def test_several_discrete_sites_are_summed_over_jointly():
    probs = torch.tensor([[0.7, 0.2], [0.4, 0.9]])

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.3))
            b = pyro.sample("b", dist.Categorical(torch.tensor([0.2, 0.8])))
            pyro.sample("x", dist.Bernoulli(probs[a.long(), b.long()]), obs=x)

    x = torch.tensor([0.0, 1.0])
    chance = float((torch.tensor([0.7, 0.3])[:, None] * torch.tensor([0.2, 0.8]) * probs).sum())
    expected = torch.tensor([1 - chance, chance]).log()
    assert torch.allclose(exact.log_evidence(model, x), expected)
    joint = torch.tensor([0.7, 0.3])[:, None] * torch.tensor([0.2, 0.8]) * torch.stack([1 - probs, probs])
    marginals = exact.posterior(model, x).marginals
    assert torch.allclose(marginals["a"].T, joint.sum(2) / joint.sum((1, 2))[:, None])
    assert torch.allclose(marginals["b"].T, joint.sum(1) / joint.sum((1, 2))[:, None])


def test_the_box_grows_to_a_datum_far_out_in_the_prior():
    prior, x = dist.Normal(torch.zeros((), dtype=torch.float64), 1.0), torch.tensor([0.5, 20.0], dtype=torch.float64)
    z = torch.linspace(-40, 40, 400_001, dtype=torch.float64)

    def likelihood(z):
        return dist.Normal(z + 1e-3 * z**3, 0.1)

    expected = (prior.log_prob(z) + likelihood(z).log_prob(x[:, None])).logsumexp(1) + math.log(80 / 400_000)
    assert torch.allclose(exact.log_evidence(model_of(prior, likelihood), x), expected, atol=1e-4)


def test_scalar_latents_have_a_posterior_mean():
    model = model_of(dist.Normal(0.0, 1.0), lambda z: dist.Normal(torch.sinh(z), 1.0))
    mean = exact.posterior(model, torch.tensor([0.0, 2.0])).mean
    assert mean.shape == (2,)
    assert abs(mean[0]) < 1e-4 < mean[1]


def test_a_narrow_guide_is_integrated_correctly():
    vae = gaussian(1, 2)
    guide = guide_of(lambda x: dist.Normal(x[:, :1], 1e-3).to_event(1))
    x = torch.randn(3, 2)
    residual = exact.log_evidence(vae.model, x) - exact.elbo(vae.model, guide, x) - exact.kl(vae.model, guide, x)
    assert residual.abs().max() < 1e-3


def test_random_states_and_parameters_do_not_change(random_states):
    vae, x = steep_vae("normal"), torch.randn(5, 2)
    vae.model(x)
    before, stored = random_states(), {name: value.clone() for name, value in pyro.get_param_store().items()}
    exact.log_evidence(vae.model, x)
    exact.elbo(vae.model, vae.guide, x)
    exact.kl(vae.model, vae.guide, x)
    assert random_states() == before
    torch.testing.assert_close(dict(pyro.get_param_store().items()), stored, rtol=0, atol=0)


def test_a_mixture_prior_has_an_exact_answer():
    weights, means = dist.Categorical(torch.tensor([0.3, 0.7])), torch.tensor([[-2.0], [1.0]])
    weight, bias, x = torch.randn(2), torch.randn(2), torch.randn(4, 2)
    prior = dist.MixtureSameFamily(weights, dist.Normal(means, 0.5).to_event(1))
    model = model_of(prior, lambda z: dist.Normal(z * weight + bias, 0.5).to_event(1))
    components = dist.MultivariateNormal(means * weight + bias, 0.25 * (weight.outer(weight) + torch.eye(2)))
    expected = (components.log_prob(x[:, None]) + weights.logits).logsumexp(1)
    assert torch.allclose(exact.log_evidence(model, x), expected, atol=1e-4)
