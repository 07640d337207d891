"""The particle filter: unbiased for p(x) of a Kalman filter and the forward algorithm, for any proposal."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import pyro_vae as pv
from pyro_vae.evidence import particle_filter

SIGMAS = 5
RHO, STEP, NOISE = 0.9, 0.6, 0.5
X = 0.8 * torch.randn(12, 6, generator=torch.Generator().manual_seed(0)).cumsum(1)
LENGTHS = torch.tensor([6, 1, 2, 3, 4, 5, 6, 6, 2, 5, 3, 6])


def chain(x, lengths):
    """A linear Gaussian chain, seen with noise, of sequences of different lengths."""
    z = torch.zeros(len(x))
    with pyro.plate("data", len(x)):
        x, lengths = pyro.subsample(x, event_dim=1), pyro.subsample(lengths, event_dim=0)
        z = z[: len(x)]
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Normal(RHO * z, STEP))
                pyro.sample(f"x_{t}", dist.Normal(z, NOISE), obs=x[:, t])


def guide(x, lengths):
    """A proposal that looks at the observation of its step, and is too wide."""
    with pyro.plate("data", len(x)):
        x, lengths = pyro.subsample(x, event_dim=1), pyro.subsample(lengths, event_dim=0)
        z = torch.zeros(len(x))
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Normal((RHO * z + x[:, t]) / 2, 0.6))


def kalman(x, lengths):
    """log p(x) of each sequence by a Kalman filter."""
    mean, variance = torch.zeros(len(x)).double(), torch.zeros(len(x)).double()
    total = torch.zeros(len(x)).double()
    for t in range(x.shape[1]):
        mean, variance = RHO * mean, RHO**2 * variance + STEP**2
        log_p = dist.Normal(mean, (variance + NOISE**2).sqrt()).log_prob(x[:, t].double())
        total = total + torch.where(t < lengths, log_p, 0.0)
        gain = variance / (variance + NOISE**2)
        mean, variance = mean + gain * (x[:, t] - mean), (1 - gain) * variance
    return total


def assert_unbiased(found, expected, sigmas=SIGMAS):
    error = (found.bias_corrected.double() - expected) / (found.standard_error.double() + 2e-5)
    assert error.abs().max() < sigmas
    assert found.standard_error.max() < 0.2


@pytest.mark.parametrize("proposal", [guide, None], ids=["guide", "prior"])
def test_a_kalman_filter_of_ragged_sequences(proposal):
    found = pv.particle_log_evidence(chain, proposal, X, LENGTHS, num_particles=60, num_filters=60)
    assert (found.log_evidence.shape, found.num_samples, found.plates) == ((12,), 60, None)
    assert_unbiased(found, kalman(X, LENGTHS))


@pytest.mark.parametrize("proposal", [guide, None], ids=["guide", "prior"])
def test_the_mean_of_filters_of_few_particles_is_unbiased(proposal):
    """Two particles: the logarithm is far too low, and the mean of the estimates themselves is right."""
    x, lengths, filters = X[:1], LENGTHS[:1], 20_000
    found = pv.particle_log_evidence(chain, proposal, x, lengths, num_particles=2, num_filters=filters)
    ratio = (found.log_evidence.double() - kalman(x, lengths)).exp()
    assert float((ratio - 1).abs() / (ratio * found.standard_error)) < SIGMAS
    many = x.expand(300, -1), lengths.expand(300)
    one = pv.particle_log_evidence(chain, proposal, *many, num_particles=2, num_filters=1)
    assert one.log_evidence.mean() < kalman(x, lengths) - 0.1


def test_particles_that_are_drawn_again_are_better_than_the_same_number_of_draws():
    """The error of weighted draws from the prior grows exponentially with the steps, that of a filter does not."""
    x = 0.8 * torch.randn(3, 25, generator=torch.Generator().manual_seed(1)).cumsum(1).clamp(-3, 3)
    lengths = torch.full((3,), 25)
    expected = kalman(x, lengths)
    prior = particle_filter._prior(chain)
    weighted = pv.log_evidence(chain, prior, x, lengths, num_samples=2000).log_evidence
    found = pv.particle_log_evidence(chain, None, x, lengths, num_particles=100, num_filters=20).log_evidence
    assert ((found - expected).abs() < 0.5).all()
    assert weighted.mean() < found.mean() - 2


def hidden_markov(x):
    with pyro.plate("data", len(x)):
        state = torch.zeros(len(x), dtype=torch.long)
        for t in range(x.shape[1]):
            state = pyro.sample(f"state_{t}", dist.Categorical(TRANSITION[state]))
            pyro.sample(f"x_{t}", dist.Bernoulli(EMISSION[state]), obs=x[:, t])


TRANSITION = torch.tensor([[0.8, 0.15, 0.05], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]])
EMISSION = torch.tensor([0.1, 0.5, 0.9])


def test_the_forward_algorithm_of_discrete_states():
    x = (torch.rand(8, 7, generator=torch.Generator().manual_seed(3)) < 0.5).float()
    forward = TRANSITION[0].expand(8, 3)
    for t in range(7):
        forward = forward if t == 0 else forward @ TRANSITION
        forward = forward * torch.where(x[:, t, None] == 1, EMISSION, 1 - EMISSION)
    found = pv.particle_log_evidence(hidden_markov, None, x, num_particles=40, num_filters=60)
    assert_unbiased(found, forward.sum(1).double().log())


def test_states_that_depend_on_all_of_the_past():
    """z_t adds to a sum over all earlier latents, and an observation to the next latent; the program runs as it is."""

    def model(x):
        with pyro.plate("data", len(x)):
            total = torch.zeros(len(x))
            for t in range(4):
                total = total + pyro.sample(f"z_{t}", dist.Normal(0.3 * x[:, t - 1] if t else 0.0 * total, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(total, 0.7), obs=x[:, t])

    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(4))
    before = torch.cat([torch.zeros(5, 1), 0.3 * x[:, :-1]], 1).cumsum(1)
    time = torch.arange(1.0, 5)
    covariance = torch.minimum(time, time[:, None]) + 0.49 * torch.eye(4)
    expected = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(x - before)
    found = pv.particle_log_evidence(model, None, x, num_particles=100, num_filters=40)
    assert_unbiased(found, expected.double())


def test_one_sequence_without_a_plate_and_a_latent_of_all_steps():
    """A level that all steps share belongs to the first step; log p(x) is one number."""

    def model(x):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        for t in range(len(x)):
            z = pyro.sample(f"z_{t}", dist.Normal(level, 0.5))
            pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[t])

    x = torch.tensor([0.5, -0.2, 1.0])
    expected = dist.MultivariateNormal(torch.zeros(3), torch.ones(3, 3) + 0.5 * torch.eye(3)).log_prob(x)
    found = pv.particle_log_evidence(model, None, x, num_particles=300, num_filters=50)
    assert found.log_evidence.shape == ()
    assert_unbiased(found, expected.double())


def test_batches_of_rows_and_any_seed(monkeypatch):
    monkeypatch.setattr(pv.evidence.importance_sampling, "_ROWS", 5)
    expected = kalman(X, LENGTHS)
    one, again, other = (
        pv.particle_log_evidence(chain, guide, X, LENGTHS, num_particles=60, num_filters=40, seed=seed).log_evidence
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert (one - expected).abs().max() < 0.3


def test_an_impossible_observation_has_probability_zero():
    """In one sequence no state can show what is observed; in the other one state of two can, in each step."""
    log_table = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).log()

    def model(x):
        with pyro.plate("data", len(x)):
            for t in range(3):
                z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2) / 2))
                pyro.sample(f"x_{t}", dist.Categorical(logits=log_table[z]), obs=x[:, t])

    x = torch.tensor([[0, 2, 0], [0, 1, 1]])
    found = pv.particle_log_evidence(model, None, x, num_particles=50, num_filters=30).log_evidence
    assert found[0] == -math.inf
    assert found[1] == pytest.approx(3 * math.log(0.5), abs=0.1)


def test_systematic_resampling_takes_each_particle_as_often_as_its_weight_up_to_one():
    torch.manual_seed(0)
    weight = torch.rand(3, 50, 4).double() ** 3
    weight = weight / weight.sum(1, keepdim=True)
    index = particle_filter._systematic(weight)
    counts = torch.zeros_like(weight).scatter_add(1, index, torch.ones_like(weight))
    assert (counts - 50 * weight).abs().max() < 1
    many = torch.stack([
        torch.zeros_like(weight).scatter_add(1, particle_filter._systematic(weight), torch.ones_like(weight))
        for _ in range(2000)
    ])  # fmt: skip
    assert ((many.mean(0) - 50 * weight).abs() < SIGMAS * 0.5 / 2000**0.5).all()


def backwards(x, lengths):
    with pyro.plate("data", len(x)):
        for t in reversed(range(x.shape[1])):
            pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))


def all_first(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(y, 1.0), obs=x)


def test_programs_that_have_no_steps_or_another_order_are_refused():
    with pytest.raises(ValueError, match=r"`guide` must draw the latents of the steps in the order of the model, got"):
        pv.particle_log_evidence(chain, poutine.mask(backwards, mask=LENGTHS > 0), X[:, :3], LENGTHS.clamp(min=3))
    with pytest.raises(ValueError, match=r"`model` must observe data between its latents.*\['z', 'y'\]"):
        pv.particle_log_evidence(all_first, None, X[:, 0])
    auto = AutoNormal(chain)
    with pytest.raises(ValueError, match=r"`guide` must draw each latent itself, got one that computes"):
        pv.particle_log_evidence(chain, auto, X, LENGTHS.clamp(min=6))
    with pytest.raises(ValueError, match=r"`guide` must draw all latents of the model, got one without"):
        pv.particle_log_evidence(
            pyro.infer.config_enumerate(hidden_markov, "parallel"), lambda x: None, (X > 0).float()[:, :2]
        )
