"""The importance-weighted bound and its gradients, held against quadrature; free bits."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, objectives, priors
from pyro_vae.handlers import SubsampleRows, WeightKL
from pyro_vae.objectives.importance_weighted import ImportanceWeighted
from pyro_vae.objectives.modified_kl import FreeBits

TANH = networks.mlp([4], activation=nn.Tanh)
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).double()
GRADIENTS = ["pathwise", "sticking-the-landing", "doubly-reparameterized"]
UNBIASED = [(name, count) for name in GRADIENTS for count in (1, 2) if (name, count) != ("sticking-the-landing", 2)]
CALLS = 200
SCORES = 6.5  # of 200 calls: a failure of 1e-9 each


def gaussian_vae():
    torch.manual_seed(0)
    vae = pv.VAE(
        priors.Normal(1), guides.DiagonalNormal(2, 1, TANH), likelihoods.Normal(1, 2, TANH, scale="shared")
    ).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return vae


def flat(values):
    return torch.cat([value.detach().flatten() for value in values])


def gradient(elbo, model, guide, data, parameters):
    """Minus the estimated gradient of the loss, per datum."""
    loss = elbo.differentiable_loss(model, guide, data)
    return -flat(torch.autograd.grad(loss, parameters)) / len(data)


def exact_bound(vae, x, num_draws, beta=1.0, nodes=50):
    """The expectation of the K-sample bound, ``(N,)``, by Gauss-Hermite quadrature over the noise of every draw."""
    noise, weights = (torch.as_tensor(value) for value in np.polynomial.hermite_e.hermegauss(nodes))
    q = vae.encode(x)
    z = q.mean + q.stddev * noise[:, None, None]
    f = vae.decode(z).log_prob(x) + beta * (vae.prior().log_prob(z) - q.log_prob(z))  # (nodes, N)
    chosen = torch.tensor(list(itertools.product(range(nodes), repeat=num_draws)))
    bound = f[chosen].logsumexp(1) - math.log(num_draws)
    mass = (weights / weights.sum())[chosen].prod(1)
    return (mass[:, None] * bound).sum(0)


def exact_gradient(vae, num_draws, beta=1.0):
    return flat(torch.autograd.grad(exact_bound(vae, X, num_draws, beta).mean(), list(vae.parameters())))


def estimates(elbo, vae, copies=100, beta=1.0):
    """Each call sees every datum many times, each with draws of its own."""
    data, parameters = X.repeat(copies, 1), list(vae.parameters())
    model, guide = WeightKL(beta)(vae.model), WeightKL(beta)(vae.guide)
    return torch.stack([gradient(elbo, model, guide, data, parameters) for _ in range(CALLS)])


def scores(found, expected):
    return (found.mean(0) - expected).abs() / (found.std(0) / len(found) ** 0.5 + 1e-10)


# --- The bound -------------------------------------------------------------------------------------------------------


def test_the_bound_of_one_draw_is_the_elbo_and_grows_with_draws_to_the_truth():
    vae = gaussian_vae()
    with torch.no_grad():
        bounds = [exact_bound(vae, X, count) for count in (1, 2, 3)]
    torch.testing.assert_close(bounds[0], pv.exact.elbo(vae.model, vae.guide, X, tolerance=1e-8), rtol=1e-4, atol=1e-4)
    told = []
    for count in (1, 2, 3, 300):
        data = X.repeat(20 if count == 300 else 500, 1)
        calls = torch.tensor([-ImportanceWeighted(count).loss(vae.model, vae.guide, data) for _ in range(30)])
        told.append((calls.mean() / len(data), calls.std() / 30**0.5 / len(data)))
    for (mean, error), exact in zip(told, bounds, strict=False):
        assert abs(mean - exact.mean()) < 5 * error
    truth, (mean, error) = pv.exact.log_evidence(vae.model, X).mean(), told[-1]
    for lower, higher in itertools.pairwise([*(bound.mean() for bound in bounds), mean, truth + 5 * error]):
        assert lower < higher
    assert truth - mean < 0.2 * (truth - bounds[-1].mean())


def test_it_agrees_with_the_estimate_of_log_p():
    vae = gaussian_vae()
    data = X.repeat(50, 1)
    told = -ImportanceWeighted(100).loss(vae.model, vae.guide, data) / len(data)
    other = pv.log_evidence(vae.model, vae.guide, data, num_samples=100).log_evidence.reshape(50, 4).mean(1)
    assert told == pytest.approx(float(other.mean()), abs=7 * float(other.std() / 50**0.5))


@pytest.mark.parametrize("name", GRADIENTS)
def test_loss_and_gradients_are_one_however_they_are_asked_for(name):
    vae, parameters = gaussian_vae(), None
    values = []
    for ask in ("loss", "loss_and_grads", "differentiable_loss"):
        pyro.set_rng_seed(3)
        values.append(
            torch.as_tensor(getattr(ImportanceWeighted(3, name), ask)(vae.model, vae.guide, X), dtype=X.dtype).item()
        )
        parameters = list(vae.parameters())
    assert values == pytest.approx([values[0]] * 3, rel=1e-12)
    pyro.set_rng_seed(3)
    wanted = gradient(ImportanceWeighted(3, name), vae.model, vae.guide, X, parameters)
    torch.testing.assert_close(flat(parameter.grad for parameter in parameters), -len(X) * wanted)


# --- Its gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize(("name", "count"), UNBIASED)
def test_it_has_the_gradient_of_its_own_bound(name, count, beta):
    vae = gaussian_vae()
    expected = exact_gradient(vae, count, beta)
    assert (expected.abs() > 1e-3).sum() > len(expected) / 2
    assert (scores(estimates(ImportanceWeighted(count, name), vae, beta=beta), expected) < SCORES).all()


def test_sticking_the_landing_of_two_draws_is_biased_in_the_guide_alone():
    vae = gaussian_vae()
    found = scores(estimates(ImportanceWeighted(2, "sticking-the-landing"), vae), exact_gradient(vae, 2))
    of_guide = torch.cat([torch.full((p.numel(),), n.startswith("encoder")) for n, p in vae.named_parameters()])
    assert found[of_guide].max() > 10
    assert (found[~of_guide] < SCORES).all()


def posterior_pair(off=0.0):
    """A conjugate pair whose guide is the posterior, or off it."""
    loc = torch.tensor(off).double().requires_grad_()
    scale = (torch.tensor(0.5).double().sqrt() * (1 + off)).requires_grad_()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + loc, scale))

    return model, guide, [loc, scale]


@pytest.mark.parametrize(
    ("name", "count"), [(GRADIENTS[1], 1), (GRADIENTS[1], 5), (GRADIENTS[2], 1), (GRADIENTS[2], 5)]
)
def test_where_the_guide_is_the_posterior_there_is_no_noise(name, count):
    model, guide, parameters = posterior_pair()
    loss = ImportanceWeighted(count, name).differentiable_loss(model, guide, X[:, 0])
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(loss, parameters))
    loss = ImportanceWeighted(count).differentiable_loss(model, guide, X[:, 0])
    assert torch.autograd.grad(loss, parameters)[1].abs() > 1e-3


def test_doubly_reparameterized_has_a_signal_that_grows_with_draws():
    """The pathwise one has the same mean and more noise, the more draws the worse."""
    model, guide, parameters = posterior_pair(off=0.2)

    def signal_to_noise(name, count):
        elbo, data = ImportanceWeighted(count, name), X[:, 0].repeat(10)
        found = torch.stack([gradient(elbo, model, guide, data, parameters) for _ in range(CALLS)])
        return found.mean(0).abs() / found.std(0)

    doubly, pathwise = ([signal_to_noise(name, count) for count in (4, 64)] for name in (GRADIENTS[2], GRADIENTS[0]))
    assert (doubly[1] > 1.5 * doubly[0]).all()
    assert (doubly[1] > 3 * pathwise[1]).all()


def chain():
    """Two latents, the second drawn given the first in model and guide."""
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


def chain_bound(v, x, nodes=40):
    noise, weights = (torch.as_tensor(value) for value in np.polynomial.hermite_e.hermegauss(nodes))
    first = v[2] * x + v[3].exp() * noise[:, None, None]
    loc = v[4] * x + v[2] * torch.sin(first)
    second = loc + v[3].exp() * noise[:, None]
    log_q = dist.Normal(v[2] * x, v[3].exp()).log_prob(first) + dist.Normal(loc, v[3].exp()).log_prob(second)
    log_p = dist.Normal(0, 1).log_prob(first) + dist.Normal(v[0] * first, 1).log_prob(second)
    f = log_p + dist.Normal(second + torch.tanh(first), v[1].exp()).log_prob(x) - log_q  # (nodes, nodes, N)
    mass = weights / weights.sum()
    return (mass[:, None, None] * mass[:, None] * f).sum((0, 1)).mean()


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_chain_of_latents_has_the_gradient_of_its_bound(name):
    model, guide, v = chain()
    (expected,) = torch.autograd.grad(chain_bound(v, X[:, 0]), v)
    data = X[:, 0].repeat(300)
    found = torch.stack([gradient(ImportanceWeighted(1, name), model, guide, data, [v]) for _ in range(CALLS)])
    assert (scores(found, expected) < SCORES).all()


def test_a_chain_has_the_same_mean_either_way():
    model, guide, v = chain()
    data = X[:, 0].repeat(300)
    pathwise, doubly = (
        torch.stack([gradient(ImportanceWeighted(4, name), model, guide, data, [v]) for _ in range(CALLS)])
        for name in ("pathwise", "doubly-reparameterized")
    )
    error = ((pathwise.var(0) + doubly.var(0)) / CALLS).sqrt()
    assert ((pathwise.mean(0) - doubly.mean(0)).abs() < SCORES * error).all()
    assert (doubly.var(0)[2:] < pathwise.var(0)[2:]).all()


# --- Mini-batches, handlers, training --------------------------------------------------------------------------------


class Noise(poutine.messenger.Messenger):
    """Draw z from the guide with this noise, ``(K, B, 1)``."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg):
        if msg["name"] == "z" and msg["value"] is None:
            msg["value"], msg["done"] = msg["fn"].mean + msg["fn"].stddev * self.noise, True


@pytest.mark.parametrize("name", GRADIENTS)
def test_batches_have_on_average_the_loss_and_gradient_of_all_data(name):
    """With the noise of each datum held fixed, exactly: N/B is outside of the logarithm and of the weights."""
    vae = gaussian_vae()
    noise, parameters = torch.randn(3, 4, 1).double(), list(vae.parameters())

    def run(rows):
        rows = torch.tensor(rows)
        with SubsampleRows("data", rows), Noise(noise[:, rows]):
            loss = ImportanceWeighted(3, name).differentiable_loss(vae.model, vae.guide, X)
        return torch.cat([loss.detach()[None], flat(torch.autograd.grad(loss, parameters))])

    for size in (1, 2, 3):
        batches = [run(rows) for rows in itertools.combinations(range(4), size)]
        torch.testing.assert_close(torch.stack(batches).mean(0), run(range(4)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_weighted_kl_is_weighted(name):
    vae, beta = gaussian_vae(), 0.3
    noise, parameters = torch.randn(1, 4, 1).double(), list(vae.parameters())
    with Noise(noise[0]):
        loss = ImportanceWeighted(1, name).differentiable_loss(WeightKL(beta)(vae.model), WeightKL(beta)(vae.guide), X)
    q = vae.encode(X)
    z = q.mean + q.stddev * noise[0]
    kl = q.log_prob(z) - vae.prior().log_prob(z)
    assert loss.item() == pytest.approx(-(vae.decode(z).log_prob(X) - beta * kl).sum().item())
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("train", ["fit", "SVI"])
def test_it_trains_to_the_exact_optimum(name, train):
    torch.manual_seed(0)
    x = torch.randn(200, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.3]])
    vae = pv.VAE(
        priors.StandardNormal(1),
        guides.DiagonalNormal(2, 1, networks.linear()),
        likelihoods.Normal(1, 2, networks.linear(), scale="shared"),
    )
    before = float(pv.exact.log_evidence(vae.model, x).mean())
    elbo = ImportanceWeighted(5, name)
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
    vae = pv.VAE(priors.Bernoulli(2), guides.Bernoulli(2, 2, TANH), likelihoods.Normal(2, 2, TANH))
    with pytest.raises(ValueError, match=r"latents \['z'\] are not drawn pathwise.*VIMCO"):
        ImportanceWeighted(2, name).differentiable_loss(vae.model, vae.guide, X.float())


def test_other_gradients_are_refused():
    with pytest.raises(ValueError, match="`gradient` must be 'pathwise', 'sticking-the-landing', 'doub.*got 'stl'"):
        ImportanceWeighted(2, "stl")


# --- Autoguides ------------------------------------------------------------------------------------------------------


def positive_model(x):
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=0)
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)


def exact_autoguide(x):
    """At the posterior, log z ~ N(x / 2, 1 / 2)."""
    guide = AutoNormal(positive_model)
    guide(x)
    with torch.no_grad():
        guide.locs.z.copy_(x / 2)
    guide.scales.z = torch.full_like(x, 0.5).sqrt()
    return guide


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("num_particles", [1, 3])
def test_an_autoguide_at_the_posterior_has_the_evidence_and_no_noise(gradient, num_particles):
    x = torch.tensor([0.3, -1.0, 2.0])
    guide = exact_autoguide(x)
    elbo = ImportanceWeighted(num_particles, gradient)
    loss = elbo.differentiable_loss(positive_model, guide, x)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(x).sum()
    assert loss.item() == pytest.approx(-evidence.item(), rel=1e-5)
    slope = torch.autograd.grad(loss, guide.locs.z)[0]
    assert (slope.abs().max() < 1e-5) == (gradient != "pathwise")


def test_an_autoguide_is_trained_by_batches_and_has_no_floor_for_each_latent():
    x = torch.randn(30, generator=torch.Generator().manual_seed(0))
    guide = AutoNormal(positive_model)
    pv.fit(positive_model, guide, x, epochs=150, batch_size=10, lr=2e-2, elbo=ImportanceWeighted(2, GRADIENTS[2]))
    torch.testing.assert_close(guide.locs.z, x / 2, atol=0.3, rtol=0)
    with pytest.raises(ValueError, match=r"FreeBits: the guide draws its latents from \['z_unconstrained'\]"):
        FreeBits(0.1).loss(positive_model, guide, x)


# --- Free bits -------------------------------------------------------------------------------------------------------


def wide_vae():
    torch.manual_seed(0)
    return pv.VAE(priors.Normal(3), guides.DiagonalNormal(2, 3, TANH), likelihoods.Normal(3, 2, TANH)).double()


def rates(vae):
    q, p = vae.encode(X).base_dist, vae.prior().base_dist
    return torch.distributions.kl_divergence(q, p)  # (N, 3)


def test_free_bits_are_the_formula():
    vae = wide_vae()
    each = rates(vae).detach()
    floor = float(each.mean(0).sort().values[1]) + 1e-9  # two variables below it, one above
    pyro.set_rng_seed(1)
    loss = FreeBits(floor).loss(vae.model, vae.guide, X)
    pyro.set_rng_seed(1)
    z = poutine.trace(vae.guide).get_trace(X).nodes["z"]["value"]
    distortion = -vae.decode(z).log_prob(X).sum().item()
    kept = each.mean(0) > floor
    assert kept.sum() == 1
    assert loss == pytest.approx(distortion + float(each[:, kept].sum()) + 2 * floor * len(X))


def test_data_under_a_mask_have_no_part_in_the_mean_that_the_floor_is_held_against():
    vae = wide_vae()
    each = rates(vae).detach()
    mask = each[:, 0] >= each[:, 0].sort().values[len(X) // 2]
    assert each[mask, 0].mean() > each[:, 0].mean()
    floor = (0.5 * (each[mask, 0].mean() + each[:, 0].mean())).item()  # below the mean of those that count
    pyro.set_rng_seed(1)
    loss = FreeBits(floor).loss(poutine.mask(vae.model, mask=mask), poutine.mask(vae.guide, mask=mask), X)
    pyro.set_rng_seed(1)
    z = poutine.trace(vae.guide).get_trace(X).nodes["z"]["value"]
    distortion = -vae.decode(z).log_prob(X)[mask].sum().item()
    rate = each[mask].mean(0).clamp(min=floor).sum() * mask.sum()
    assert loss == pytest.approx(distortion + rate.item())


def test_nothing_but_masked_data_costs_nothing():
    vae, none = wide_vae(), torch.zeros(len(X), dtype=torch.bool)
    for mask in (none, False):
        assert FreeBits(0.1).loss(poutine.mask(vae.model, mask=none), poutine.mask(vae.guide, mask=mask), X) == 0


def test_below_the_floor_the_rate_has_no_gradient_and_above_it_all():
    vae = wide_vae()
    parameters = list(vae.encoder.parameters())
    for nats, share in ((1e6, 0.0), (1e-6, 1.0)):
        pyro.set_rng_seed(1)
        loss = FreeBits(nats).differentiable_loss(vae.model, vae.guide, X)
        found = flat(torch.autograd.grad(loss, parameters))
        pyro.set_rng_seed(1)
        z = poutine.trace(vae.guide).get_trace(X).nodes["z"]["value"]
        wanted = -vae.decode(z).log_prob(X).sum() + share * rates(vae).sum()
        torch.testing.assert_close(found, flat(torch.autograd.grad(wanted, parameters)))


def test_free_bits_keep_a_latent_from_collapsing():
    x = pv.datasets.two_gaussians(200, seed=0).x
    found = []
    for elbo in (None, FreeBits(0.5)):
        torch.manual_seed(0)
        vae = pv.VAE(
            priors.StandardNormal(2),
            guides.DiagonalNormal(2, 2, networks.linear()),
            likelihoods.Normal(2, 2, networks.linear(), scale=3.0),  # too noisy to be worth a code
        )
        fitted = pv.fit(vae.model, vae.guide, x, epochs=400, lr=1e-2, elbo=elbo)
        assert set(fitted.history) == {"elbo", "distortion", "rate"}
        found.append(pv.evaluate(vae.model, vae.guide, x, num_samples=100)["rate"])
    assert found[0] < 0.3
    assert found[1] > 0.8


def test_relaxed_latents_have_their_rate_estimated():
    vae = pv.VAE(
        priors.RelaxedBernoulli(2, 0.5), guides.RelaxedBernoulli(2, 2, TANH, 0.66), likelihoods.Normal(2, 2, TANH)
    )
    assert math.isfinite(FreeBits(0.1, num_particles=4).loss(vae.model, vae.guide, X.float()))


def test_latents_that_hang_together_have_no_rate_by_variable():
    vae = pv.VAE(priors.StandardNormal(2), guides.FullRankNormal(2, 2, TANH), likelihoods.Normal(2, 2, TANH))
    with pytest.raises(ValueError, match="FreeBits: site 'z' is a MultivariateNormal in the guide"):
        FreeBits(0.1).loss(vae.model, vae.guide, X.float())


@pytest.mark.parametrize("nats", [0, -1.0, float("nan")])
def test_no_floor_is_refused(nats):
    with pytest.raises(ValueError, match="nats: got"):
        FreeBits(nats)


def test_every_objective_is_in_the_vocabulary():

    from pyro_vae.objectives import importance_weighted, modified_kl, score_function

    parts = (importance_weighted, modified_kl, score_function)
    assert set(objectives.__all__) == {name for part in parts for name in part.__all__}
