"""Pyro's own SVI trains every combination of parts, and its losses and gradients are the exact ones."""

from itertools import product

import pairs
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.optim import Adam
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, priors
from pyro_vae.parts.networks import convolutional, deconvolutional, linear

NET = pairs.NET
PROBS = torch.tensor([0.2, 0.5, 0.3])


HARD = {"learnable": True, "straight_through": True}
GUIDES = {
    "normal": lambda: guides.DiagonalNormal(3, 2, NET),
    "relaxed Bernoulli": lambda: guides.RelaxedBernoulli(3, 2, NET, temperature=0.66),
    "Gumbel-softmax": lambda: guides.GumbelSoftmax(3, (2, 3), NET, temperature=0.66),
    "Bernoulli": lambda: guides.Bernoulli(3, 3, NET),
    "one-hot": lambda: guides.OneHotCategorical(3, (2, 3), NET),
}
# prior, guide
CONTINUOUS = {
    "standard normal": (lambda: priors.StandardNormal(2), "normal"),
    "normal": (lambda: priors.Normal(2), "normal"),
    "relaxed Bernoulli": (lambda: priors.RelaxedBernoulli(2, 0.5), "relaxed Bernoulli"),
    "relaxed Bernoulli, hard, learnable": (lambda: priors.RelaxedBernoulli(2, 0.5, **HARD), "relaxed Bernoulli"),
    "Gumbel-softmax": (lambda: priors.GumbelSoftmax((2, 3), 0.5, probs=PROBS), "Gumbel-softmax"),
    "Gumbel-softmax, hard, learnable": (lambda: priors.GumbelSoftmax((2, 3), 0.5, **HARD), "Gumbel-softmax"),
    "logistic prior, normal guide": (lambda: priors.RelaxedBernoulli(2, 0.9), "normal"),
}
DISCRETE = {
    "Bernoulli": (lambda: priors.Bernoulli(3, probs=0.3), "Bernoulli"),
    "Bernoulli, learnable": (lambda: priors.Bernoulli(3, learnable=True), "Bernoulli"),
    "one-hot": (lambda: priors.OneHotCategorical((2, 3), PROBS), "one-hot"),
    "one-hot, learnable": (lambda: priors.OneHotCategorical((2, 3), learnable=True), "one-hot"),
}
LIKELIHOODS = {
    "normal, shared": lambda latent: likelihoods.Normal(latent, 3, NET),
    "normal, per dimension": lambda latent: likelihoods.Normal(latent, 3, NET, scale="per_dimension"),
    "normal, network": lambda latent: likelihoods.Normal(latent, 3, NET, scale="network"),
    "normal, fixed": lambda latent: likelihoods.Normal(latent, 3, NET, scale=0.5),
    "Bernoulli": lambda latent: likelihoods.Bernoulli(latent, 3, NET),
    "soft targets": lambda latent: likelihoods.Bernoulli(latent, 3, NET, soft_targets=True),
    "continuous Bernoulli": lambda latent: likelihoods.ContinuousBernoulli(latent, 3, NET),
}
VECTORIZED = {"num_particles": 3, "vectorize_particles": True}
PARTICLES = pytest.mark.parametrize("particles", [{}, VECTORIZED], ids=["one particle", "vectorized"])
OBJECTIVES = {
    "Trace_ELBO": Trace_ELBO,
    "Trace_ELBO, vectorized": lambda: Trace_ELBO(**VECTORIZED),
    "score function": lambda: Trace_ELBO(num_particles=3),
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceEnum_ELBO": lambda: TraceEnum_ELBO(max_plate_nesting=1),
    "TraceEnum_ELBO, vectorized": lambda: TraceEnum_ELBO(max_plate_nesting=1, **VECTORIZED),
}
COMBINATIONS = [
    *product(CONTINUOUS, LIKELIHOODS, ["Trace_ELBO", "Trace_ELBO, vectorized"]),
    *product(DISCRETE, LIKELIHOODS, ["TraceEnum_ELBO", "TraceEnum_ELBO, vectorized"]),
    *product(DISCRETE, ["Bernoulli"], ["score function"]),
    ("standard normal", "normal, shared", "TraceMeanField_ELBO"),
]


def vae_of(latent, likelihood):
    make_prior, guide = (CONTINUOUS | DISCRETE)[latent]
    prior = make_prior()
    return pv.VAE(prior, GUIDES[guide](), LIKELIHOODS[likelihood](prior.event_shape))


def data(likelihood, rows=6):
    x = torch.rand(rows, 3)
    return x.round() if likelihood == "Bernoulli" else x


@pytest.mark.parametrize(("latent", "likelihood", "objective"), COMBINATIONS)
def test_a_step_updates_every_parameter_of_every_combination(latent, likelihood, objective):
    vae, elbo = vae_of(latent, likelihood), OBJECTIVES[objective]()
    guide = config_enumerate(vae.guide) if isinstance(elbo, TraceEnum_ELBO) else vae.guide
    assert_every_parameter_is_updated(vae, guide, elbo, data(likelihood))


@PARTICLES
def test_convolutional_vaes_take_particles_and_enumerated_states(particles):
    image = (1, 7, 7)
    vae = pv.VAE(
        priors.Bernoulli(2),
        guides.Bernoulli(image, 2, convolutional(image, [2], nn.Tanh)),
        likelihoods.Bernoulli(2, image, deconvolutional(image, [2], nn.Tanh)),
    )
    elbo = TraceEnum_ELBO(max_plate_nesting=1, **particles)
    assert_every_parameter_is_updated(vae, config_enumerate(vae.guide), elbo, torch.rand(4, *image).round())


def assert_every_parameter_is_updated(vae, guide, elbo, x):
    svi = SVI(vae.model, guide, Adam({"lr": 1e-2}), elbo)
    before = {name: parameter.clone() for name, parameter in vae.named_parameters()}
    losses = torch.tensor([svi.step(x) for _ in range(2)])
    assert losses.isfinite().all()
    for name, parameter in vae.named_parameters():
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, before[name]), name


def hand_marginalised_loss(vae, x):
    """Compute -sum_i sum_z q(z | x_i) [log p(z) + log p(x_i | z) - log q(z | x_i)] over a list of all states z."""
    latent = vae.prior.event_shape
    if isinstance(vae.prior, priors.Bernoulli):
        states = torch.tensor(list(product([0.0, 1.0], repeat=latent.numel())), dtype=x.dtype).reshape(-1, *latent)
    else:
        n, k = latent
        states = torch.eye(k, dtype=x.dtype)[torch.tensor(list(product(range(k), repeat=n)))]
    loss = 0
    for state in states:
        z = state.expand(len(x), *latent)
        log_q = vae.encoder(x).log_prob(z)
        log_joint = vae.prior().log_prob(z) + vae.decoder(z).log_prob(x)
        loss = loss - (log_q.exp() * (log_joint - log_q)).sum()
    return loss


def gradients(loss, vae):
    return torch.autograd.grad(loss, list(vae.parameters()))


@PARTICLES
@pytest.mark.parametrize("latent", DISCRETE)
@pytest.mark.parametrize("likelihood", ["normal, per dimension", "Bernoulli"])
def test_enumerated_loss_and_gradients_equal_the_hand_marginalised_ones(latent, likelihood, particles):
    vae = vae_of(latent, likelihood).double()
    x = data(likelihood).double()
    elbo = TraceEnum_ELBO(max_plate_nesting=1, **particles)
    loss = elbo.differentiable_loss(vae.model, config_enumerate(vae.guide), x)
    expected = hand_marginalised_loss(vae, x)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for got, wanted in zip(gradients(loss, vae), gradients(expected, vae), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("latent", DISCRETE)
def test_the_enumerated_elbo_is_exact_and_below_the_evidence(latent):
    vae = vae_of(latent, "normal, shared").double()
    x = data("normal").double()
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(vae.model, config_enumerate(vae.guide), x)
    assert loss == pytest.approx(-pv.exact.elbo(vae.model, vae.guide, x).sum().item(), rel=1e-10)
    assert -loss < pv.exact.log_evidence(vae.model, x).sum().item()


@pytest.mark.parametrize("latent", ["Bernoulli", "one-hot"])
def test_score_function_gradient_is_that_of_the_enumerated_elbo_in_the_mean(latent):
    prior = DISCRETE[latent][0]()
    shape, make = prior.event_shape, guides.Bernoulli if latent == "Bernoulli" else guides.OneHotCategorical
    vae = pv.VAE(prior, make(3, shape, linear(bias=False)), likelihoods.Normal(shape, 3, linear())).double()
    x = data("normal", rows=2).double()
    exact = gradients(hand_marginalised_loss(vae, x), vae)
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    draws = []
    for _ in range(300):
        vae.zero_grad()
        elbo.loss_and_grads(vae.model, vae.guide, x)
        draws.append(torch.cat([parameter.grad.flatten() for parameter in vae.parameters()]))
    draws = torch.stack(draws)
    error = draws.mean(0) - torch.cat([gradient.flatten() for gradient in exact])
    assert (error.abs() < 4.5 * draws.std(0) / len(draws) ** 0.5 + 1e-12).all()


def test_subsampled_rows_give_an_unbiased_loss():
    vae = vae_of("Bernoulli", "Bernoulli").double()
    x = data("Bernoulli").double()
    elbo, guide = TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(vae.guide)
    whole = elbo.loss(vae.model, guide, x)
    parts = []
    for rows in torch.arange(6).split(2):
        with pv.handlers.SubsampleRows("data", rows):
            parts.append(elbo.loss(vae.model, guide, x))
    assert sum(parts) / 3 == pytest.approx(whole, rel=1e-10)


STRAIGHT_THROUGH = {
    "Bernoulli": (1, priors.RelaxedBernoulli, guides.RelaxedBernoulli, 0.3),
    "Gumbel-softmax": ((1, 2), priors.GumbelSoftmax, guides.GumbelSoftmax, torch.tensor([0.3, 0.7])),
}


def straight_through(name, temperature):
    latent, prior, guide, probs = STRAIGHT_THROUGH[name]
    return pv.VAE(
        prior(latent, temperature=0.5, probs=probs, straight_through=True),
        guide(3, latent, NET, temperature=temperature),
        likelihoods.Normal(latent, 3, linear()),
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("latent", STRAIGHT_THROUGH)
def test_a_straight_through_elbo_is_below_that_of_the_discrete_twin_for_each_datum(latent, temperature):
    relaxed, x = straight_through(latent, temperature).double(), 2 * torch.randn(20, 3, dtype=torch.float64)
    twin = relaxed.discrete()
    relaxed_elbo, twin_elbo = (pv.exact.elbo(vae.model, vae.guide, x) for vae in (relaxed, twin))
    evidence = pv.exact.log_evidence(twin.model, x)
    assert (relaxed_elbo <= twin_elbo + 1e-4).all()
    assert (twin_elbo <= evidence + 1e-10).all()
    assert relaxed_elbo.mean() < twin_elbo.mean() < evidence.mean()
    # The decoder receives discrete values, so both models have the same evidence.
    torch.testing.assert_close(pv.exact.log_evidence(relaxed.model, x), evidence, rtol=0, atol=1e-4)


@pytest.mark.parametrize("latent", STRAIGHT_THROUGH)
def test_training_a_relaxed_vae_trains_its_twin(latent):
    relaxed = straight_through(latent, 0.66)
    twin = relaxed.discrete()
    assert [id(p) for p in twin.parameters()] == [id(p) for p in relaxed.parameters()]
    x = torch.randn(20, 3)
    before = pv.exact.log_evidence(twin.model, x).mean()
    svi = SVI(relaxed.model, relaxed.guide, Adam({"lr": 3e-2}), Trace_ELBO(num_particles=10, vectorize_particles=True))
    for _ in range(30):
        svi.step(x)
    assert pv.exact.log_evidence(twin.model, x).mean() > before
    enumerated = SVI(twin.model, config_enumerate(twin.guide), Adam({"lr": 1e-2}), TraceEnum_ELBO(max_plate_nesting=1))
    held = set(pyro.get_param_store().keys())
    enumerated.step(x)
    assert set(pyro.get_param_store().keys()) == held


def test_squared_error_plus_weighted_kl_has_the_gradients_of_its_gaussian_likelihood():
    x, kl_weight = torch.randn(7, 3), 0.2
    vae = pairs.gaussian(decoder=likelihoods.Normal.mse(2, 3, NET, kl_weight))
    parameters = list(vae.parameters())
    torch.manual_seed(1)
    loss = TraceMeanField_ELBO().differentiable_loss(vae.model, vae.guide, x) / len(x)
    torch.manual_seed(1)
    q = vae.encode(x)
    kl = 0.5 * (q.mean**2 + q.variance - 1 - q.variance.log()).sum(1)
    popular = ((x - vae.decode(q.rsample()).mean) ** 2).mean(1) + kl_weight * kl
    expected = torch.autograd.grad(popular.mean(), parameters)
    for found, gradient in zip(torch.autograd.grad(kl_weight * loss, parameters), expected, strict=True):
        torch.testing.assert_close(found, gradient)
