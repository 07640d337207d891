"""Estimates of log p(x) against exact answers on the mixture problem."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import guide_of, model_of
from scipy import stats

import pyro_vae as pv
from pyro_vae import exact, guides, likelihoods, networks, priors

SIGMAS = 4.5  # a failure of 7e-6 for one datum
X = pv.datasets.two_gaussians(500, seed=1).x
ROUNDING = 2e-5  # of log-densities in float32


@pytest.fixture(scope="module")
def gaussian():
    """A VAE with one Gaussian latent after short training."""
    torch.manual_seed(0)
    net = networks.mlp([16])
    vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    with pyro.get_param_store().scope():
        pv.fit(vae.model, vae.guide, pv.datasets.two_gaussians(500, seed=0).x, epochs=200, lr=1e-2, seed=0)
    return vae.requires_grad_(False)


def with_scale(vae, factor):
    """The trained guide, wider or narrower."""
    return guide_of(lambda x: dist.Normal(vae.encode(x).mean, factor * vae.encode(x).stddev).to_event(1))


def assert_right(estimate, truth, reliable_share):
    """Where k̂ is reliable, errors are within their standard errors, and standard normal."""
    reliable = estimate.khat < 0.7
    assert reliable.double().mean() > reliable_share
    scores = (estimate.bias_corrected - truth).double() / (estimate.standard_error.double() + ROUNDING)
    assert scores[reliable].abs().max() < SIGMAS
    ratio = (estimate.log_evidence.double() - truth.double()).exp()  # of the mean weight, which is unbiased for p(x)
    scores = (ratio - 1) / (ratio * estimate.standard_error.double() + ROUNDING)
    assert stats.kstest(scores[reliable].numpy(), "norm").pvalue > 1e-5


def test_importance_sampling_and_annealing_from_a_guide_that_is_wide_enough(gaussian):
    truth, model = exact.log_evidence(gaussian.model, X), gaussian.model
    wide, wider = (with_scale(gaussian, factor) for factor in (2.0, 4.0))
    assert_right(pv.log_evidence(model, wide, X, num_samples=4000), truth, 0.95)
    assert_right(pv.log_evidence(model, wider, X, num_samples=4000), truth, 0.95)
    assert_right(pv.annealed_log_evidence(model, wide, X, num_chains=300, num_temperatures=5), truth, 0.95)


def test_a_discrete_latent():
    """The model is near the truth, and the guide wider."""
    centres = torch.tensor([[-1.0, -0.9], [1.0, 0.9]])
    model = model_of(dist.Bernoulli(0.5), lambda z: dist.Normal(centres[z.long()], 0.7).to_event(1))
    guide = guide_of(lambda x: dist.Bernoulli(logits=x @ torch.tensor([0.5, 0.7])))
    estimate = pv.log_evidence(model, guide, X, num_samples=4000)
    assert not estimate.unreliable.any()
    assert_right(estimate, exact.log_evidence(model, X), 0.999)


def test_a_discrete_and_a_continuous_latent_together():
    """k selects the centre, z moves the point along the diagonal: a mixture of two normals in closed form."""
    covariance = 0.09 * torch.ones(2, 2) + 0.25 * torch.eye(2)

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            centre = (2 * k - 1 + 0.3 * z)[..., None].expand(*k.shape, 2)
            pyro.sample("x", dist.Normal(centre, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(logits=x.sum(-1)))
            pyro.sample("z", dist.Normal(0.8 * (x.mean(-1) - 2 * k + 1), 1.2))

    parts = [dist.MultivariateNormal(torch.full((2,), centre), covariance).log_prob(X) for centre in (-1.0, 1.0)]
    truth = torch.stack(parts).logsumexp(0) - math.log(2)
    assert_right(pv.log_evidence(model, guide, X, num_samples=4000), truth, 0.98)


def test_annealing_is_right_for_a_guide_too_narrow(gaussian):
    """Importance sampling with a tenth of the width is wrong for most data, which k̂ shows; annealing is right."""
    truth = exact.log_evidence(gaussian.model, X)[:50]
    narrow = with_scale(gaussian, 0.1)
    sampled = pv.log_evidence(gaussian.model, narrow, X[:50], num_samples=2000)
    annealed = pv.annealed_log_evidence(gaussian.model, narrow, X[:50], num_chains=200, num_temperatures=100)
    errors = [(estimate.bias_corrected - truth).abs().mean() for estimate in (sampled, annealed)]
    assert sampled.unreliable.double().mean() > 0.6
    assert errors[1] < errors[0] / 4


def test_a_trained_guide_misses_mass_without_a_large_khat(gaussian):
    """A limit of k̂: values that a guide draws once in 1e5 have no weight here, and so no part in k̂ or error.

    The estimates of a few data are then slightly too low.
    """
    truth = exact.log_evidence(gaussian.model, X)
    estimate = pv.log_evidence(gaussian.model, gaussian.guide, X, num_samples=10_000)
    scores = (estimate.bias_corrected - truth).double() / (estimate.standard_error.double() + ROUNDING)
    reliable = estimate.khat < 0.7
    assert (scores[reliable].abs() > SIGMAS).double().mean() < 0.05
    assert scores[reliable].max() < SIGMAS
    assert -0.05 < (estimate.bias_corrected - truth)[reliable].mean() < 0
