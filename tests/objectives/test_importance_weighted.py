"""The importance-weighted bound and its gradients against quadrature."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from gradient_estimates import GRADIENTS, SCORES, X, flat, gradients, normal_vae, standard_scores
from pairs import bernoulli, gaussian, guide_of, model_of
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks
from pyro_vae.handlers import WeightKL
from pyro_vae.objectives.importance_weighted import ImportanceWeighted

UNBIASED = [(name, count) for name in GRADIENTS for count in (1, 2) if (name, count) != ("sticking-the-landing", 2)]
Y = X[:, 0]


def gauss_hermite(nodes):
    noise, weights = (torch.as_tensor(value) for value in np.polynomial.hermite_e.hermegauss(nodes))
    return noise, weights / weights.sum()


def exact_bound(vae, num_draws, beta=1.0):
    """The expectation of the K-sample bound, ``(N,)``, by quadrature over the noise of every draw."""
    noise, weights = gauss_hermite(50)
    q = vae.encode(X)
    z = q.mean + q.stddev * noise[:, None, None]
    f = vae.decode(z).log_prob(X) + beta * (vae.prior().log_prob(z) - q.log_prob(z))  # (nodes, N)
    index = torch.tensor(list(itertools.product(range(len(noise)), repeat=num_draws)))
    bound = f[index].logsumexp(1) - torch.tensor(num_draws).log()
    return (weights[index].prod(1)[:, None] * bound).sum(0)


def exact_gradient(vae, num_draws, beta=1.0):
    return flat(torch.autograd.grad(exact_bound(vae, num_draws, beta).mean(), list(vae.parameters())))


def estimates(elbo, vae, beta=1.0):
    model, guide = WeightKL(beta)(vae.model), WeightKL(beta)(vae.guide)
    return gradients(elbo, model, guide, X.repeat(100, 1), list(vae.parameters()))


def test_the_bound_of_one_draw_is_the_elbo_and_grows_with_draws_to_the_truth():
    vae = normal_vae()
    with torch.no_grad():
        bounds = [exact_bound(vae, count) for count in (1, 2, 3)]
    torch.testing.assert_close(bounds[0], pv.exact.elbo(vae.model, vae.guide, X, tolerance=1e-8), rtol=1e-4, atol=1e-4)
    means, errors = [], []
    for count in (1, 2, 3, 300):
        data = X.repeat(20 if count == 300 else 500, 1)
        losses = torch.tensor([ImportanceWeighted(count).loss(vae.model, vae.guide, data) for _ in range(30)])
        means.append(-losses.mean() / len(data))
        errors.append(losses.std() / 30**0.5 / len(data))
    for mean, error, exact in zip(means, errors, bounds, strict=False):
        assert abs(mean - exact.mean()) < 5 * error
    truth = pv.exact.log_evidence(vae.model, X).mean()
    for lower, higher in itertools.pairwise([*(bound.mean() for bound in bounds), means[-1], truth + 5 * errors[-1]]):
        assert lower < higher
    assert truth - means[-1] < 0.2 * (truth - bounds[-1].mean())


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize(("name", "count"), UNBIASED)
def test_gradients_are_unbiased(name, count, beta):
    vae = normal_vae()
    expected = exact_gradient(vae, count, beta)
    assert (expected.abs() > 1e-3).sum() > len(expected) / 2
    assert (standard_scores(estimates(ImportanceWeighted(count, name), vae, beta), expected) < SCORES).all()


def test_sticking_the_landing_with_two_draws_is_biased_in_the_guide_alone():
    vae = normal_vae()
    scores = standard_scores(estimates(ImportanceWeighted(2, GRADIENTS[1]), vae), exact_gradient(vae, 2))
    in_guide = torch.cat([torch.full((p.numel(),), n.startswith("encoder")) for n, p in vae.named_parameters()])
    assert scores[in_guide].max() > 10
    assert (scores[~in_guide] < SCORES).all()


def posterior_pair(off=0.0):
    """A conjugate pair whose guide is the posterior, or ``off`` it."""
    loc = torch.tensor(off).double().requires_grad_()
    scale = (torch.tensor(0.5).double().sqrt() * (1 + off)).requires_grad_()
    model = model_of(dist.Normal(torch.zeros(()).double(), 1.0), lambda z: dist.Normal(z, 1.0))
    return model, guide_of(lambda x: dist.Normal(x / 2 + loc, scale)), [loc, scale]


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", GRADIENTS[1:])
def test_there_is_no_noise_if_the_guide_is_the_posterior(name, count):
    model, guide, parameters = posterior_pair()
    loss = ImportanceWeighted(count, name).differentiable_loss(model, guide, Y)
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(loss, parameters))
    loss = ImportanceWeighted(count).differentiable_loss(model, guide, Y)
    assert torch.autograd.grad(loss, parameters)[1].abs() > 1e-3


def test_the_doubly_reparameterized_signal_grows_with_draws():
    """The pathwise gradient has the same mean, and more noise, which grows with the draws."""
    model, guide, parameters = posterior_pair(off=0.2)

    def signal_to_noise(name, count):
        found = gradients(ImportanceWeighted(count, name), model, guide, Y.repeat(10), parameters)
        return found.mean(0).abs() / found.std(0)

    doubly, pathwise = ([signal_to_noise(name, count) for count in (4, 64)] for name in (GRADIENTS[2], GRADIENTS[0]))
    assert (doubly[1] > 1.5 * doubly[0]).all()
    assert (doubly[1] > 3 * pathwise[1]).all()


def chain():
    """Two latents. In model and guide, the second is drawn given the first."""
    v = torch.tensor([0.7, 0.2, 0.4, -0.3, 0.5]).double().requires_grad_()

    def model(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(torch.zeros(()).double(), 1.0))
            second = pyro.sample("second", dist.Normal(v[0] * first, 1.0))
            pyro.sample("x", dist.Normal(second + torch.tanh(first), v[1].exp()), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(v[2] * x, v[3].exp()))
            pyro.sample("second", dist.Normal(v[4] * x + v[2] * torch.sin(first), v[3].exp()))

    return model, guide, v


def chain_bound(v, x):
    noise, weights = gauss_hermite(40)
    first = v[2] * x + v[3].exp() * noise[:, None, None]
    loc = v[4] * x + v[2] * torch.sin(first)
    second = loc + v[3].exp() * noise[:, None]
    log_q = dist.Normal(v[2] * x, v[3].exp()).log_prob(first) + dist.Normal(loc, v[3].exp()).log_prob(second)
    log_p = dist.Normal(0, 1).log_prob(first) + dist.Normal(v[0] * first, 1).log_prob(second)
    f = log_p + dist.Normal(second + torch.tanh(first), v[1].exp()).log_prob(x) - log_q  # (nodes, nodes, N)
    return (weights[:, None, None] * weights[:, None] * f).sum((0, 1)).mean()


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_a_chain_of_latents_are_unbiased(name):
    model, guide, v = chain()
    (expected,) = torch.autograd.grad(chain_bound(v, Y), v)
    found = gradients(ImportanceWeighted(1, name), model, guide, Y.repeat(300), [v])
    assert (standard_scores(found, expected) < SCORES).all()


def test_gradients_of_a_chain_have_the_same_mean_and_doubly_reparameterized_ones_less_variance():
    model, guide, v = chain()
    elbos = (ImportanceWeighted(4, name) for name in (GRADIENTS[0], GRADIENTS[2]))
    pathwise, doubly = (gradients(elbo, model, guide, Y.repeat(300), [v]) for elbo in elbos)
    error = ((pathwise.var(0) + doubly.var(0)) / len(doubly)).sqrt()
    assert ((pathwise.mean(0) - doubly.mean(0)).abs() < SCORES * error).all()
    assert (doubly.var(0)[2:] < pathwise.var(0)[2:]).all()


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_weighted_kl_is_weighted(name):
    vae, weigh = normal_vae(), WeightKL(0.3)
    pyro.set_rng_seed(1)
    loss = ImportanceWeighted(1, name).loss(weigh(vae.model), weigh(vae.guide), X)
    pyro.set_rng_seed(1)
    q = vae.encode(X)
    z = q.rsample()
    kl = q.log_prob(z) - vae.prior().log_prob(z)
    assert loss == pytest.approx(-(vae.decode(z).log_prob(X) - 0.3 * kl).sum().item())


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("train", ["fit", "SVI"])
def test_training_raises_the_exact_evidence(name, train):
    torch.manual_seed(0)
    x = torch.randn(200, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.3]])
    decoder = likelihoods.Normal(1, 2, networks.linear(), scale="shared")
    vae = gaussian(1, 2, encoder=guides.DiagonalNormal(2, 1, networks.linear()), decoder=decoder)
    before, elbo = float(pv.exact.log_evidence(vae.model, x).mean()), ImportanceWeighted(5, name)
    if train == "fit":
        fitted = pv.fit(vae.model, vae.guide, x, epochs=150, batch_size=100, lr=1e-2, elbo=elbo)
        assert set(fitted.history) == {"elbo", "distortion", "rate"}
    else:
        svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), elbo)
        for _ in range(300):
            svi.step(x)
    assert float(pv.exact.log_evidence(vae.model, x).mean()) > before + 0.3


@pytest.mark.parametrize("name", GRADIENTS)
def test_discrete_latents_are_refused(name):
    vae = bernoulli(2, 2)
    with pytest.raises(ValueError, match=r"needs reparameterised latents, got \['z'\] without .*VIMCO takes any"):
        ImportanceWeighted(2, name).differentiable_loss(vae.model, vae.guide, X.float())


def positive_model(x):
    with pyro.plate("data", len(x)):
        x, z = pyro.subsample(x, event_dim=0), pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("num_particles", [1, 3])
def test_an_autoguide_at_the_posterior_has_the_evidence_and_no_noise(gradient, num_particles):
    x, guide = torch.tensor([0.3, -1.0, 2.0]), AutoNormal(positive_model)
    guide(x)
    with torch.no_grad():
        guide.locs.z.copy_(x / 2)
    guide.scales.z = torch.full_like(x, 0.5).sqrt()  # log z ~ N(x / 2, 1 / 2)
    loss = ImportanceWeighted(num_particles, gradient).differentiable_loss(positive_model, guide, x)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(x).sum()
    assert loss.item() == pytest.approx(-evidence.item(), rel=1e-5)
    slope = torch.autograd.grad(loss, guide.locs.z)[0]
    assert (slope.abs().max() < 1e-5) == (gradient != "pathwise")


def test_batches_train_an_autoguide():
    x, guide = torch.randn(30, generator=torch.Generator().manual_seed(0)), AutoNormal(positive_model)
    pv.fit(positive_model, guide, x, epochs=150, batch_size=10, lr=2e-2, elbo=ImportanceWeighted(2, GRADIENTS[2]))
    torch.testing.assert_close(guide.locs.z, x / 2, atol=0.3, rtol=0)
