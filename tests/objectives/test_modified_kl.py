"""Objectives with another rate against their formulas: the KL of discrete twins, free bits, total correlation."""

from itertools import combinations

import pyro
import pyro.distributions as dist
import pytest
import torch
from gradient_estimates import TANH, X, enumerated, flat, gradient, vae_of
from pairs import gaussian, guide_of
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import Adam
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae._utils.traces import latent_sites
from pyro_vae.handlers import WeightKL
from pyro_vae.objectives.modified_kl import DiscreteKL, FreeBits, TotalCorrelation
from pyro_vae.training.elbo_evaluator import ElboEvaluator

MASK = torch.tensor([True, True, False, True])
KINDS = pytest.mark.parametrize("kind", ["relaxed", "gumbel"])


def masked(vae, mask=MASK):
    return poutine.mask(vae.model, mask=mask), poutine.mask(vae.guide, mask=mask)


def run(vae, elbo, model=None, guide=None):
    """The loss, and the draws of z, ``(K, N, *event)``."""
    evaluator = ElboEvaluator(model or vae.model, guide or vae.guide, elbo)
    loss = evaluator.loss(X)
    z = latent_sites(evaluator.traces[0][1])["z"]["value"]
    return loss, z.reshape(elbo.num_particles, len(X), *vae.prior().event_shape)


def twin_rate(vae):
    """The KL of the discrete twin of each datum, as a sum over states."""
    log_q, log_p, _ = enumerated(vae.discrete())
    return (log_q.exp() * (log_q - log_p)).sum(0)


@pytest.mark.parametrize("count", [1, 3])
@KINDS
def test_discrete_kl_is_the_relaxed_distortion_plus_the_rate_of_the_twin(kind, count):
    vae = vae_of(kind)
    loss, z = run(vae, DiscreteKL(count))
    terms = twin_rate(vae) - vae.decode(z).log_prob(X).mean(0)
    assert loss == pytest.approx(terms.sum().item(), rel=1e-10)
    # Masked data have no part in it.
    loss, z = run(vae, DiscreteKL(count), *masked(vae))
    terms = twin_rate(vae) - vae.decode(z).log_prob(X).mean(0)
    assert loss == pytest.approx(terms[MASK].sum().item(), rel=1e-6)


@KINDS
def test_discrete_kl_has_the_gradient_of_its_value(kind):
    vae = vae_of(kind)
    parameters = list(vae.parameters())
    pyro.set_rng_seed(2)
    estimate = gradient(DiscreteKL(), vae.model, vae.guide, X, parameters)
    pyro.set_rng_seed(2)
    z = vae.encode(X).rsample()
    expected = torch.autograd.grad((vae.decode(z).log_prob(X) - twin_rate(vae)).mean(), parameters)
    torch.testing.assert_close(estimate, flat(expected), rtol=1e-9, atol=1e-11)


def test_discrete_kl_weights_the_rate():
    vae, losses = vae_of("relaxed"), []
    for weigh in map(WeightKL, (0.0, 1.0, 3.0)):
        pyro.set_rng_seed(0)
        losses.append(DiscreteKL().loss(weigh(vae.model), weigh(vae.guide), X))
    assert losses[1] > losses[0] + 1e-3
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-9)


@KINDS
def test_histories_have_the_relaxed_elbo_and_not_the_mixed_objective(kind):
    vae, elbo = vae_of(kind), DiscreteKL()
    history = pv.fit(vae.model, vae.guide, X, epochs=1, lr=1e-12, elbo=elbo, seed=4).history
    pyro.set_rng_seed(4)
    z = vae.encode(X).sample()
    distortion = -vae.decode(z).log_prob(X).mean().item()
    rate = (vae.encode(X).log_prob(z) - vae.prior().log_prob(z)).mean().item()
    for name, expected in (("distortion", distortion), ("rate", rate), ("elbo", -distortion - rate)):
        assert history[name][0] == pytest.approx(expected, rel=1e-6)
    pyro.set_rng_seed(4)
    assert history["elbo"][0] != pytest.approx(-elbo.loss(vae.model, vae.guide, X) / 4, rel=1e-3)


@KINDS
def test_svi_trains_with_discrete_kl(kind):
    vae = vae_of(kind)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), DiscreteKL(2))
    losses = [svi.step(X) for _ in range(200)]
    assert sum(losses[-20:]) < sum(losses[:20])


def test_discrete_kl_refuses_discrete_latents_and_masked_distributions():
    vae = vae_of("bernoulli")
    with pytest.raises(ValueError, match=r"DiscreteKL needs relaxed latents.*got a Bernoulli for site 'z'"):
        DiscreteKL().loss(vae.model, vae.guide, X)
    vae = vae_of("relaxed")
    guide = guide_of(lambda x: vae.encode(x).mask(MASK))
    with pytest.raises(ValueError, match=r"site 'z' must be masked by poutine\.mask.*got a masked distribution"):
        DiscreteKL().loss(vae.model, guide, X)


def rates(vae):
    """KL of each variable, ``(N, D)``."""
    return kl_divergence(vae.encode(X).base_dist, vae.prior().base_dist)


def normal_vae():
    torch.manual_seed(0)
    return gaussian(3, 2, prior=priors.Normal(3)).double()


@pytest.mark.parametrize("count", [1, 3])
def test_free_bits_have_a_floor_for_the_mean_rate_of_each_variable(count):
    vae = normal_vae()
    each = rates(vae).detach()
    floor = float(each.mean(0).sort().values[1]) + 1e-9  # two variables are below it, one above
    loss, z = run(vae, FreeBits(floor, count))
    above = each.mean(0) > floor
    assert above.sum() == 1
    distortion = -vae.decode(z).log_prob(X).mean(0).sum().item()
    assert loss == pytest.approx(distortion + float(each[:, above].sum()) + 2 * floor * len(X))


def test_masked_data_have_no_part_in_the_mean_rate():
    vae = normal_vae()
    each = rates(vae).detach()
    mask = each[:, 0] >= each[:, 0].sort().values[len(X) // 2]
    assert each[mask, 0].mean() > each[:, 0].mean()
    floor = (0.5 * (each[mask, 0].mean() + each[:, 0].mean())).item()  # below the mean of the unmasked data
    loss, z = run(vae, FreeBits(floor), *masked(vae, mask))
    distortion = -vae.decode(z[0]).log_prob(X)[mask].sum().item()
    assert loss == pytest.approx(distortion + (each[mask].mean(0).clamp(min=floor).sum() * mask.sum()).item())
    none = torch.zeros(len(X), dtype=torch.bool)
    for mask in (none, False):
        assert FreeBits(0.1).loss(poutine.mask(vae.model, mask=none), poutine.mask(vae.guide, mask=mask), X) == 0


@pytest.mark.parametrize(("nats", "share"), [(1e6, 0.0), (1e-6, 1.0)])
def test_the_rate_has_no_gradient_below_the_floor_and_its_full_gradient_above(nats, share):
    vae = normal_vae()
    parameters = list(vae.encoder.parameters())
    pyro.set_rng_seed(1)
    loss = FreeBits(nats).differentiable_loss(vae.model, vae.guide, X)
    slopes = flat(torch.autograd.grad(loss, parameters))
    pyro.set_rng_seed(1)
    z = poutine.trace(vae.guide).get_trace(X).nodes["z"]["value"]
    expected = -vae.decode(z).log_prob(X).sum() + share * rates(vae).sum()
    torch.testing.assert_close(slopes, flat(torch.autograd.grad(expected, parameters)))


def test_free_bits_keep_a_latent_from_collapsing():
    x, found = pv.datasets.two_gaussians(200, seed=0).x, []
    for elbo in (None, FreeBits(0.5)):
        torch.manual_seed(0)
        decoder = likelihoods.Normal(2, 2, networks.linear(), scale=3.0)  # so noisy that the ELBO uses no latent
        vae = gaussian(2, 2, encoder=guides.DiagonalNormal(2, 2, networks.linear()), decoder=decoder)
        fitted = pv.fit(vae.model, vae.guide, x, epochs=400, lr=1e-2, elbo=elbo)
        assert set(fitted.history) == {"elbo", "distortion", "rate"}
        found.append(pv.evaluate(vae.model, vae.guide, x, num_samples=100)["rate"])
    assert found[0] < 0.3 < 0.8 < found[1]


@KINDS
def test_the_rate_of_relaxed_latents_is_estimated(kind):
    vae = vae_of(kind)
    loss, z = run(vae, FreeBits(1e-6, num_particles=4), *masked(vae))
    rates = (vae.encode(X).base_dist.log_prob(z) - vae.prior().base_dist.log_prob(z))[:, MASK]
    rate = torch.where(rates.mean((0, 1)) > 1e-6, rates, 1e-6).sum(-1)
    assert loss == pytest.approx((rate - vae.decode(z).log_prob(X)[:, MASK]).mean(0).sum().item(), rel=1e-6)


def test_free_bits_refuse_dependent_variables_and_discrete_latents():
    vae = gaussian(2, 2, encoder=guides.FullRankNormal(2, 2, TANH))
    with pytest.raises(ValueError, match=r"FreeBits needs products .* got a MultivariateNormal in the guide and a Nor"):
        FreeBits(0.1).loss(vae.model, vae.guide, X.float())
    vae = vae_of("bernoulli")
    with pytest.raises(ValueError, match=r"FreeBits needs reparameterised latents, got 'z' without pathwise gradients"):
        FreeBits(0.1).loss(vae.model, vae.guide, X)


def total_correlation(vae, x, z):
    """log q(z) minus the sum of log q(z_d), with the mixture over all rows, one by one; ``(K, N)``."""
    q = vae.encode(x).base_dist
    each = torch.stack([dist.Normal(loc, scale).log_prob(z) for loc, scale in zip(q.mean, q.stddev, strict=True)])
    joint = each.sum(-1).exp().mean(0).log()
    return joint - each.exp().mean(0).log().sum(-1)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("weight", [0.0, 1.0, 5.0])
def test_the_total_correlation_of_all_data_is_that_of_the_mixture(weight, count):
    vae = normal_vae()
    loss, z = run(vae, TotalCorrelation(weight, count))
    log_weight = vae.decode(z).log_prob(X) + vae.prior().log_prob(z) - vae.encode(X).log_prob(z)
    expected = (log_weight - (weight - 1) * total_correlation(vae, X, z)).mean(0).sum().item()
    assert loss == pytest.approx(-expected, rel=1e-9)


@pytest.mark.parametrize("factor", [1 / 40, 1 / 12, 3.0])
def test_a_weight_of_the_whole_model_scales_the_total_correlation_as_the_rest(factor):
    vae, rows = normal_vae(), torch.arange(4)

    def model(x):
        with pyro.plate("data", 12, subsample=rows):
            pyro.sample("x", vae.decode(pyro.sample("z", vae.prior().expand([4]))), obs=x)

    def guide(x):
        with pyro.plate("data", 12, subsample=rows):
            pyro.sample("z", vae.encode(x))

    losses = []
    for scale in (1.0, factor):
        pyro.set_rng_seed(0)
        losses.append(TotalCorrelation(5.0).loss(*(poutine.scale(run, scale=scale) for run in (model, guide)), X))
    assert losses[1] == pytest.approx(factor * losses[0], rel=1e-9)


def test_the_density_of_a_mini_batch_has_the_expectation_of_that_of_all_data():
    pyro.set_rng_seed(0)
    means = torch.randn(5, 1, dtype=torch.float64)
    value = torch.randn(5, 1, dtype=torch.float64)
    truth = dist.Normal(means, 1.0).log_prob(value[0]).exp().mean()
    found = []
    for rows in ([0, *others] for others in combinations(range(1, 5), 2)):
        site = {"fn": dist.Normal(means[rows], 1.0).to_event(1), "value": value[rows], "mask": None}
        own, others = TotalCorrelation(2.0).read("z", site, None)["marginals"][0].exp()
        found.append(own / 5 + 4 / 5 * others / 2)
    torch.testing.assert_close(torch.stack(found).mean(), truth)


def test_training_with_more_weight_lowers_the_total_correlation():
    generator = torch.Generator().manual_seed(0)
    x, found = torch.randn(400, 2, generator=generator) @ torch.tensor([[1.0, 0.9], [0.0, 0.45]]), []
    for weight in (1.0, 30.0):
        torch.manual_seed(0)
        vae = gaussian(2, 2, decoder=likelihoods.Normal(2, 2, networks.linear(), scale=0.03))
        fitted = pv.fit(vae.model, vae.guide, x, epochs=60, batch_size=50, lr=1e-2, elbo=TotalCorrelation(weight))
        assert set(fitted.history) == {"elbo", "distortion", "rate"}
        found.append(total_correlation(vae, x, vae.encode(x).sample(torch.Size([20]))).mean().item())
    assert 0 < found[1] < 0.4 * found[0]


def test_total_correlation_refuses_what_it_cannot_estimate():
    vae = gaussian(2, 2, encoder=guides.FullRankNormal(2, 2, TANH))
    with pytest.raises(ValueError, match=r"TotalCorrelation needs .* got a MultivariateNormal for site 'z'"):
        TotalCorrelation(2.0).loss(vae.model, vae.guide, X.float())
    vae = normal_vae()
    with pytest.raises(ValueError, match="TotalCorrelation needs data without a mask, got one at site 'z'"):
        TotalCorrelation(2.0).loss(*masked(vae), X)
    with pytest.raises(ValueError, match="TotalCorrelation needs batches of two rows or more, got 1"):
        TotalCorrelation(2.0).loss(vae.model, vae.guide, X[:1])
