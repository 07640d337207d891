"""Annealed importance sampling: right where importance sampling is not, and unbiased however short its chains are."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae import exact, guides, likelihoods, networks, priors

TANH = networks.mlp([8], activation=nn.Tanh)
X = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
Y = X[:, 0]
SIGMAS = 5  # 4.5 is a failure of 7e-6, and there are tens of data in a test


def model(x):
    """z ~ N(0, 1), x ~ N(z, 1)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of(slope, scale):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, scale))

    return guide


def evidence_of(x):
    """log N(x; 0, 2)."""
    return -(x**2) / 4 - 0.5 * math.log(4 * math.pi)


def scores(estimate, expected):
    """In standard errors, and float32's rounding."""
    return (estimate.bias_corrected - expected).double() / (estimate.standard_error + 2e-5)


# --- Right -----------------------------------------------------------------------------------------------------------


def test_of_a_guide_far_too_narrow():
    """Importance sampling is too low by more than a nat, and its k̂ tells; chains from the same guide are right."""
    x, narrow = Y.clamp(-2, 2).double(), guide_of(0.5, 0.05)
    sampled = pv.log_evidence(model, narrow, x, num_samples=20_000)
    assert sampled.khat.median() > 0.7
    assert sampled.unreliable.double().mean() > 0.8
    assert (sampled.log_evidence - evidence_of(x)).mean() < -0.7
    annealed = pv.annealed_log_evidence(model, narrow, x, num_chains=300, num_temperatures=150)
    assert (annealed.khat < 0.7).double().mean() > 0.8
    assert scores(annealed, evidence_of(x)).abs().max() < SIGMAS
    assert (annealed.log_evidence - evidence_of(x)).mean().abs() < 0.05


def vae_of(kind):
    latent = {"normal 2-D": 2, "linear 8-D": 8, "gumbel": (1, 2)}.get(kind, 1)
    prior, encoder = {
        "normal": (priors.Normal(1), guides.DiagonalNormal(3, 1, TANH)),
        "normal 2-D": (priors.StandardNormal(2), guides.DiagonalNormal(3, 2, TANH)),
        "linear 8-D": (priors.StandardNormal(8), guides.DiagonalNormal(3, 8, TANH)),
        "relaxed": (priors.RelaxedBernoulli(1, 0.5, probs=0.3), guides.RelaxedBernoulli(3, 1, TANH, 0.66)),
        "gumbel": (priors.GumbelSoftmax((1, 2), 0.5), guides.GumbelSoftmax(3, (1, 2), TANH, 0.66)),
    }[kind]
    torch.manual_seed(0)
    network = networks.linear() if kind.startswith("linear") else TANH
    return pv.VAE(prior, encoder, likelihoods.Normal(latent, 3, network, scale=0.4))


@pytest.mark.parametrize("kind", ["normal", "normal 2-D", "linear 8-D", "relaxed", "gumbel"])
def test_it_is_the_exact_evidence_within_its_standard_error(kind):
    vae = vae_of(kind)
    estimate = pv.annealed_log_evidence(vae.model, vae.guide, X, num_chains=100, num_temperatures=50)
    assert scores(estimate, exact.log_evidence(vae.model, X)).abs().max() < SIGMAS
    sampled = pv.log_evidence(vae.model, vae.guide, X, num_samples=100)
    assert estimate.ess.median() > sampled.ess.median()


def test_from_the_prior_as_wu_et_al():
    estimate = pv.annealed_log_evidence(model, guide_of(0.0, 1.0), Y, num_chains=100, num_temperatures=30)
    assert scores(estimate, evidence_of(Y)).abs().max() < SIGMAS


def test_a_positive_latent_moves_in_its_logarithm():
    """A gamma rate of counts: x is negative binomial."""

    def counts(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal(0.0, 0.5))

    x = torch.arange(6.0)
    expected = torch.distributions.NegativeBinomial(2.0, probs=torch.tensor(0.5)).log_prob(x)
    estimate = pv.annealed_log_evidence(counts, guide, x, num_chains=200, num_temperatures=40)
    assert scores(estimate, expected).abs().max() < SIGMAS


def test_two_latents_of_different_supports_and_shapes():
    """A location and a probability of its own, with one site hanging on the other in the guide."""

    def both(x):
        with pyro.plate("data", len(x)):
            share = pyro.sample("share", dist.Beta(2.0, 2.0))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + 0 * share, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.2 * x[..., None], 0.4).expand([len(x), 2]).to_event(1))
            pyro.sample("share", dist.Beta(1.0 + z[..., 0].sigmoid(), 1.5))

    estimate = pv.annealed_log_evidence(both, guide, Y, num_chains=100, num_temperatures=60)
    assert scores(estimate, dist.Normal(0.0, 3**0.5).log_prob(Y)).abs().max() < SIGMAS


# --- Unbiased --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperatures", [1, 2, 4])
def test_its_exponential_is_unbiased_however_few_temperatures(temperatures):
    """Each datum occurs often, each time with step sizes of its own."""
    repeats, x = 2000, Y[:4].double()
    estimate = pv.annealed_log_evidence(
        model,
        guide_of(0.2, 0.7),
        x.repeat_interleave(repeats),
        num_chains=2,
        num_temperatures=temperatures,
        num_leapfrog_steps=2,
    )
    found = estimate.log_evidence.exp().reshape(4, repeats)
    error = found.mean(1) - evidence_of(x).exp()
    assert (error.abs() < SIGMAS * found.std(1) / repeats**0.5).all()


def test_one_temperature_is_importance_sampling():
    x, guide = Y.double(), guide_of(0.4, 0.9)
    annealed = pv.annealed_log_evidence(model, guide, x, num_chains=5000, num_temperatures=1)
    sampled = pv.log_evidence(model, guide, x, num_samples=5000, seed=1)
    error = torch.hypot(annealed.standard_error, sampled.standard_error)
    assert ((annealed.log_evidence - sampled.log_evidence) / error).abs().max() < SIGMAS
    torch.testing.assert_close(annealed.ess, sampled.ess, rtol=0.05, atol=0)


def test_of_the_exact_posterior_each_weight_is_p_of_x():
    estimate = pv.annealed_log_evidence(model, guide_of(0.5, 0.5**0.5), Y.double(), num_chains=30, num_temperatures=3)
    torch.testing.assert_close(estimate.log_evidence, evidence_of(Y.double()), rtol=0, atol=1e-9)
    assert (estimate.khat == -math.inf).all()


def test_more_temperatures_leave_less_error():
    errors = [
        pv.annealed_log_evidence(model, guide_of(0.0, 0.3), Y, num_chains=100, num_temperatures=count).standard_error
        for count in (5, 40)
    ]
    assert errors[1].mean() < 0.6 * errors[0].mean()


# --- Draws, seeds and what is left as it was -------------------------------------------------------------------------


def test_chunks_and_batches_are_of_one_law(monkeypatch):
    monkeypatch.setattr(pv.evidence, "_BUDGET", 64 * len(Y) * 7)
    monkeypatch.setattr(pv.evidence, "_ROWS", 6)
    estimate = pv.annealed_log_evidence(model, guide_of(0.4, 0.6), Y, num_chains=60, num_temperatures=10)
    assert estimate.num_samples == 60
    assert scores(estimate, evidence_of(Y)).abs().max() < SIGMAS


def test_seeds_streams_parameters_and_validation(random_states):
    vae = vae_of("normal")
    before = random_states()
    runs = [
        pv.annealed_log_evidence(vae.model, vae.guide, X, num_chains=3, num_temperatures=3, seed=seed).log_evidence
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.isclose(runs[0], runs[2]).all()
    assert random_states() == before
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert not any(values.requires_grad for values in runs)


def test_trajectories_that_go_astray_are_rejected(monkeypatch):
    """Where exp(z) overflows the model has no answer, and would stop the run if it checked its arguments."""
    monkeypatch.setattr(pv.annealing, "_ACCEPTED", 0.2)  # steps so large that most fail
    astray = []

    def counts(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            astray.append(bool((~z.exp().isfinite()).any()))
            pyro.sample("x", dist.Poisson((3 * z).exp()), obs=x)

    x = torch.arange(6.0)
    expected = exact.log_evidence(counts, x, tolerance=1e-3)
    astray.clear()
    estimate = pv.annealed_log_evidence(counts, guide_of(0.2, 1.0), x, num_chains=200, num_temperatures=20)
    assert any(astray)
    assert scores(estimate, expected).abs().max() < SIGMAS


def test_progress_is_shown_if_asked_for(capsys):
    arguments = {"num_chains": 2, "num_temperatures": 3}
    pv.annealed_log_evidence(model, guide_of(0.5, 0.4), Y, **arguments)
    assert capsys.readouterr().err == ""
    pv.annealed_log_evidence(model, guide_of(0.5, 0.4), Y, progress=True, **arguments)
    assert "100%" in capsys.readouterr().err


# --- What is refused -------------------------------------------------------------------------------------------------


def test_discrete_latents_are_refused():
    vae = pv.VAE(priors.Bernoulli(2), guides.Bernoulli(3, 2, TANH), likelihoods.Normal(2, 3, TANH))
    with pytest.raises(ValueError, match=r"model: its latent 'z' is discrete, and annealing moves .* pv\.exact"):
        pv.annealed_log_evidence(vae.model, vae.guide, X)


@pytest.mark.parametrize("argument", ["num_chains", "num_temperatures", "num_leapfrog_steps"])
def test_numbers_that_are_none_are_refused(argument):
    with pytest.raises(ValueError, match=rf"`{argument}` must be a positive integer.*got 0"):
        pv.annealed_log_evidence(model, guide_of(0.5, 0.4), Y, **{argument: 0})


def test_a_point_is_refused():
    def point(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(0.5 * x))

    with pytest.raises(ValueError, match=r"guide: its latent 'z' is a point"):
        pv.annealed_log_evidence(model, point, Y)
