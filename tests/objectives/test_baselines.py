"""Baselines of the score function: running averages and networks, trained with the other parameters."""

import math
from copy import deepcopy

import pyro
import pytest
import torch
from gradient_estimates import TANH, X, flat, gradient, neural_baseline, vae_of
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn

import pyro_vae as pv
from pyro_vae import networks
from pyro_vae.objectives.baselines import NeuralBaseline, RunningAverage
from pyro_vae.objectives.score_function import ScoreFunction


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_a_running_average_is_the_weighted_mean_of_the_earlier_steps(decay):
    average, x, means = RunningAverage(decay).double(), torch.zeros(3, 2), torch.zeros(0).double()
    for step in range(6):
        weights = decay ** torch.arange(step - 1, -1, -1).double()
        expected = (weights * means).sum() / weights.sum() if step else torch.zeros(()).double()
        b = average(x)
        torch.testing.assert_close(b, expected, rtol=1e-9, atol=1e-12)
        f = torch.randn(2, 3).double() + 4
        assert average.learn(f, b.expand(3)).eq(0).all()
        means = torch.cat([means, f.mean()[None]])


def test_the_baseline_does_not_depend_on_the_draws_of_its_step():
    """The first step has no baseline: it is the step of Trace_ELBO."""
    vae = vae_of("bernoulli")
    elbo, parameters, b = ScoreFunction(RunningAverage().double()), list(vae.encoder.parameters()), 0.0
    for _ in range(3):
        pyro.set_rng_seed(1)
        z = vae.encode(X).sample()
        log_q = vae.encode(X).log_prob(z)
        f = (vae.prior().log_prob(z) + vae.decode(z).log_prob(X) - log_q).detach()
        expected = flat(torch.autograd.grad(((f - b) * log_q).mean(), parameters))
        pyro.set_rng_seed(1)
        torch.testing.assert_close(gradient(elbo, vae.model, vae.guide, X, parameters), expected)
        b = f.mean()  # all steps have the draws of the first


def test_a_neural_baseline_fits_a_function_of_x():
    torch.manual_seed(0)
    baseline = NeuralBaseline(2, networks.mlp([16], activation=nn.Tanh)).double()
    x, optimizer = torch.randn(200, 2).double(), torch.optim.Adam(baseline.parameters(), lr=1e-2)
    errors = []
    for _ in range(500):
        f = 5 + 3 * x[:, 0] - x[:, 1] + 0.1 * torch.randn(2, 200).double()
        loss = baseline.learn(f, baseline(x))
        assert loss.shape == (200,)
        errors.append(loss.mean().item())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert errors[-1] < 0.2 < 5 < errors[20]


def train_by_fit(vae, elbo, x):
    pv.fit(vae.model, vae.guide, x, epochs=100, lr=1e-2, elbo=elbo)


def train_by_svi(vae, elbo, x):
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), elbo)
    for _ in range(100):
        svi.step(x)


def baseline_error(elbo, vae, x):
    z = vae.encode(x).sample([50])
    f = vae.prior().log_prob(z) + vae.decode(z).log_prob(x) - vae.encode(x).log_prob(z)
    return ((f - elbo.baseline(x)) ** 2).mean().item()


@pytest.mark.parametrize("train", [train_by_fit, train_by_svi])
def test_a_neural_baseline_is_trained_with_the_other_parameters(train):
    x = 3 * torch.randn(50, 2, generator=torch.Generator().manual_seed(3)).double()
    vae, elbo = vae_of("bernoulli"), neural_baseline()
    for parameter in vae.decoder.parameters():
        parameter.requires_grad_(False)
    before = deepcopy(elbo.baseline.state_dict()), baseline_error(elbo, vae, x)
    train(vae, elbo, x)
    after = elbo.baseline.state_dict()
    assert not any(torch.equal(after[name], value) for name, value in before[0].items())
    assert elbo.baseline.centre.steps == 100
    assert baseline_error(elbo, vae, x) < before[1] / 2
    store = pyro.get_param_store()
    assert all(store[f"{elbo.name}$$${name}"] is value for name, value in elbo.baseline.named_parameters())


def test_a_second_baseline_is_trained_under_another_name_and_refused_under_the_same():
    """Pyro's store has the first one's parameters under that name: the second would silently not be trained."""
    vae, first, second, third = vae_of("bernoulli"), *(neural_baseline() for _ in range(3))
    train_by_fit(vae, first, X)
    before = deepcopy(list(second.baseline.parameters()))
    train_by_fit(vae, second, X)
    assert not any(torch.equal(old, new) for old, new in zip(before, second.baseline.parameters(), strict=True))
    third.name = first.name
    with pytest.raises(ValueError, match=rf"name.*param store.*'{first.name}'"):
        train_by_fit(vae, third, X)


@pytest.mark.parametrize("make", [lambda: RunningAverage(0.8), lambda: NeuralBaseline(2, TANH, 0.8)])
def test_a_state_dict_restores_a_baseline(make):
    first, x = make(), X.float()
    for _ in range(3):
        first.learn(torch.randn(2, 4) + 3, first(x).expand(4))
    second = make()
    second.load_state_dict(first.state_dict())
    assert first(x).abs().min() > 0
    assert torch.equal(first(x), second(x))
    f = torch.randn(2, 4)
    for baseline in (first, second):
        baseline.learn(f, baseline(x).expand(4))
    assert torch.equal(first(x), second(x))


def test_evaluation_does_not_change_a_baseline():
    vae, elbo = vae_of("bernoulli"), neural_baseline()
    elbo.loss(vae.model, vae.guide, X)
    pv.evaluate(vae.model, vae.guide, X, elbo=elbo)
    assert elbo.baseline.centre.steps == 0
    pv.fit(vae.model, vae.guide, X, epochs=7, elbo=elbo, validation=X + 1)
    assert elbo.baseline.centre.steps == 7


@pytest.mark.parametrize("baseline", [None, 0.5, nn.Linear(2, 1), RunningAverage])
def test_a_wrong_baseline_is_refused(baseline):
    with pytest.raises(TypeError, match=r"`baseline` must be a module such as baselines.RunningAverage\(\).*got"):
        ScoreFunction(baseline)


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, float("nan")])
def test_a_wrong_decay_is_refused(decay):
    with pytest.raises(ValueError, match=rf"`decay` must be a number from 0 to below 1, got {decay}"):
        RunningAverage(decay)


@pytest.mark.parametrize("method", ["forward", "learn"])
def test_a_baseline_of_another_shape_is_refused(method, monkeypatch):
    monkeypatch.setattr(RunningAverage, method, lambda self, *tensors: torch.zeros(2, 4))
    vae = vae_of("bernoulli")
    expected = rf"`baseline` must return one number .*of shape \(4,\), got shape \(2, 4\) from its `{method}`"
    with pytest.raises(ValueError, match=expected):
        ScoreFunction(RunningAverage(), num_particles=2).loss_and_grads(vae.model, vae.guide, X)


def test_a_network_may_have_another_dtype_but_not_another_number_of_features():
    vae = vae_of("bernoulli")
    assert math.isfinite(ScoreFunction(NeuralBaseline(2, TANH)).loss_and_grads(vae.model, vae.guide, X))
    with pytest.raises(ValueError, match=r"`baseline` must have a network for the 2 features .*, got one for 3"):
        ScoreFunction(NeuralBaseline(3, TANH)).loss_and_grads(vae.model, vae.guide, X)
