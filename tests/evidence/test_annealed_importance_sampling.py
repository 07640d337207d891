"""Annealed importance sampling: right for guides that are too narrow, and unbiased for any length of its chains."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_cases import conjugate, conjugate_evidence, vae_of
from pairs import guide_of, model_of

import pyro_vae as pv
from pyro_vae import exact
from pyro_vae.evidence import annealed_importance_sampling, importance_sampling

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
Y = X[:, 0]
SIGMAS = 5  # 4.5 is a failure probability of 7e-6, and there are tens of data in a test


def scores(estimate, expected):
    """Errors in standard errors, with room for the rounding of float32."""
    return (estimate.bias_corrected - expected).double() / (estimate.standard_error + 2e-5)


def test_a_guide_that_is_far_too_narrow():
    """Importance sampling is too low by more than a nat, which its k̂ shows; chains from the same guide are right."""
    x, narrow = Y.clamp(-2, 2).double(), conjugate(0.5, 0.05)
    sampled = pv.log_evidence(*narrow, x, num_samples=20_000)
    assert sampled.khat.median() > 0.7
    assert sampled.unreliable.double().mean() > 0.8
    assert (sampled.log_evidence - conjugate_evidence(x)).mean() < -0.7
    annealed = pv.annealed_log_evidence(*narrow, x, num_chains=300, num_temperatures=150)
    assert (annealed.khat < 0.7).double().mean() > 0.8
    assert scores(annealed, conjugate_evidence(x)).abs().max() < SIGMAS
    assert (annealed.log_evidence - conjugate_evidence(x)).mean().abs() < 0.05


@pytest.mark.parametrize("kind", ["normal", "normal 2-D", "linear 8-D", "relaxed", "gumbel"])
def test_the_estimate_is_the_exact_evidence_within_its_standard_error(kind):
    vae = vae_of(kind, scale=0.4)
    estimate = pv.annealed_log_evidence(vae.model, vae.guide, X, num_chains=100, num_temperatures=50)
    assert scores(estimate, exact.log_evidence(vae.model, X)).abs().max() < SIGMAS
    sampled = pv.log_evidence(vae.model, vae.guide, X, num_samples=100)
    assert estimate.ess.median() > sampled.ess.median()


def test_a_positive_latent_moves_in_its_logarithm():
    """A gamma rate of counts: x is negative binomial."""
    model, guide = model_of(dist.Gamma(2.0, 1.0), dist.Poisson), guide_of(lambda x: dist.LogNormal(0.0, 0.5))
    x = torch.arange(6.0)
    expected = torch.distributions.NegativeBinomial(2.0, probs=torch.tensor(0.5)).log_prob(x)
    estimate = pv.annealed_log_evidence(model, guide, x, num_chains=200, num_temperatures=40)
    assert scores(estimate, expected).abs().max() < SIGMAS


def test_two_latents_of_different_supports_and_shapes():
    """A location and an independent probability; in the guide, one site depends on the other."""

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


@pytest.mark.parametrize("temperatures", [1, 2, 4])
def test_its_exponential_is_unbiased_for_any_number_of_temperatures(temperatures):
    """Each datum occurs often, each time with other step sizes."""
    repeats, x = 2000, Y[:4].double()
    sizes = {"num_chains": 2, "num_temperatures": temperatures, "num_leapfrog_steps": 2}
    estimate = pv.annealed_log_evidence(*conjugate(0.2, 0.7), x.repeat_interleave(repeats), **sizes)
    found = estimate.log_evidence.exp().reshape(4, repeats)
    error = found.mean(1) - conjugate_evidence(x).exp()
    assert (error.abs() < SIGMAS * found.std(1) / repeats**0.5).all()


def test_one_temperature_is_importance_sampling():
    x, pair = Y.double(), conjugate(0.4, 0.9)
    annealed = pv.annealed_log_evidence(*pair, x, num_chains=5000, num_temperatures=1)
    sampled = pv.log_evidence(*pair, x, num_samples=5000, seed=1)
    error = torch.hypot(annealed.standard_error, sampled.standard_error)
    assert ((annealed.log_evidence - sampled.log_evidence) / error).abs().max() < SIGMAS
    torch.testing.assert_close(annealed.ess, sampled.ess, rtol=0.05, atol=0)


def test_all_weights_of_the_exact_posterior_are_p_of_x():
    estimate = pv.annealed_log_evidence(*conjugate(0.5, 0.5**0.5), Y.double(), num_chains=30, num_temperatures=3)
    torch.testing.assert_close(estimate.log_evidence, conjugate_evidence(Y.double()), rtol=0, atol=1e-9)
    assert (estimate.khat == -math.inf).all()


def test_more_temperatures_leave_less_error():
    few, many = (
        pv.annealed_log_evidence(*conjugate(0.0, 0.3), Y, num_chains=100, num_temperatures=count).standard_error
        for count in (5, 40)
    )
    assert many.mean() < 0.6 * few.mean()


def test_chains_may_start_at_the_prior_and_run_in_chunks_and_batches(monkeypatch):
    estimate = pv.annealed_log_evidence(*conjugate(0.0, 1.0), Y, num_chains=100, num_temperatures=30)
    assert scores(estimate, conjugate_evidence(Y)).abs().max() < SIGMAS
    monkeypatch.setattr(importance_sampling, "_BUDGET", 64 * len(Y) * 7)
    monkeypatch.setattr(importance_sampling, "_ROWS", 6)
    estimate = pv.annealed_log_evidence(*conjugate(0.4, 0.6), Y, num_chains=60, num_temperatures=10)
    assert estimate.num_samples == 60
    assert scores(estimate, conjugate_evidence(Y)).abs().max() < SIGMAS


def test_seeds_streams_parameters_and_validation(random_states):
    vae = vae_of("normal", scale=0.4)
    before = random_states()
    first, again, other = (
        pv.annealed_log_evidence(vae.model, vae.guide, X, num_chains=3, num_temperatures=3, seed=seed).log_evidence
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).all()
    assert random_states() == before
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert not first.requires_grad


def test_diverging_trajectories_are_rejected(monkeypatch):
    """If exp(z) overflows, the density is undefined, and validation of arguments would raise."""
    monkeypatch.setattr(annealed_importance_sampling, "_ACCEPTANCE", 0.2)  # steps so large that most fail
    overflows = []

    def counts(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            overflows.append(bool((~z.exp().isfinite()).any()))
            pyro.sample("x", dist.Poisson((3 * z).exp()), obs=x)

    x = torch.arange(6.0)
    expected = exact.log_evidence(counts, x, tolerance=1e-3)
    overflows.clear()
    estimate = pv.annealed_log_evidence(counts, conjugate(0.2, 1.0)[1], x, num_chains=200, num_temperatures=20)
    assert any(overflows)
    assert scores(estimate, expected).abs().max() < SIGMAS


def test_latents_keep_their_precision_next_to_a_sum_over_states():
    """The sum over states is in float64, and a network of the user takes float32."""
    decode = torch.nn.Linear(1, 3)

    def mixed(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z) + 2 * y[..., None], 0.7).to_event(1), obs=x)

    def mixed_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 0.8).to_event(1))

    weight, loc = decode.weight.detach(), decode.bias.detach()
    given = [dist.MultivariateNormal(loc + 2 * y, weight @ weight.T + 0.49 * torch.eye(3)).log_prob(X) for y in (0, 1)]
    expected = torch.logaddexp(given[0] + math.log(0.7), given[1] + math.log(0.3))
    estimate = pv.annealed_log_evidence(mixed, mixed_guide, X, num_chains=100, num_temperatures=20)
    assert scores(estimate, expected).abs().max() < SIGMAS


def test_progress_is_shown_on_request(capsys):
    arguments = {"num_chains": 2, "num_temperatures": 3}
    pv.annealed_log_evidence(*conjugate(0.5, 0.4), Y, **arguments)
    assert capsys.readouterr().err == ""
    pv.annealed_log_evidence(*conjugate(0.5, 0.4), Y, progress=True, **arguments)
    assert "100%" in capsys.readouterr().err


def test_a_point_and_no_leapfrog_steps_are_refused():
    model, guide = conjugate(0.5, 0.4)
    with pytest.raises(ValueError, match=r"`guide` must have a density .*, got a point .* for 'z'"):
        pv.annealed_log_evidence(model, guide_of(lambda x: dist.Delta(0.5 * x)), Y)
    with pytest.raises(ValueError, match=r"`num_leapfrog_steps` must be a positive integer, got 0"):
        pv.annealed_log_evidence(model, guide, Y, num_leapfrog_steps=0)
