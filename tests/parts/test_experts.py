"""Guides of several modalities: the closed form of a product, the exact posterior, and any of them missing."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors

SIZES = (2, 3, 4)
PATTERNS = list(itertools.product([True, False], repeat=len(SIZES)))  # which modalities are there


def make_experts(latent=2):
    torch.manual_seed(0)
    return [guides.DiagonalNormal(size, latent, networks.mlp([8])).double() for size in SIZES]


def hide(x, pattern):
    there = torch.cat([torch.full((size,), seen) for size, seen in zip(SIZES, pattern, strict=True)])
    return torch.where(there, x, torch.nan)


def seen_modalities(x, pattern):
    return [part for part, seen in zip(x.split(SIZES, -1), pattern, strict=True) if seen]


X = torch.randn(5, sum(SIZES), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_product_is_the_normalised_product_of_prior_and_observed_experts(pattern):
    experts, prior = make_experts(1), priors.Normal(1).double()
    with torch.no_grad():
        prior.raw.copy_(torch.tensor([0.7, -0.2]))
    q = guides.ProductOfExperts(experts, prior)(hide(X, pattern))
    z = torch.linspace(-15, 15, 6001, dtype=torch.float64)[:, None, None]
    log_product = prior().log_prob(z).expand(-1, len(X))
    for expert, part, seen in zip(experts, X.split(SIZES, -1), pattern, strict=True):
        log_product = log_product + (expert(part).log_prob(z) if seen else 0)
    log_norm = log_product.logsumexp(0) + (z[1] - z[0]).log().squeeze()
    torch.testing.assert_close(q.log_prob(z).exp(), (log_product - log_norm).exp(), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_mixture_has_equal_weights_of_observed_experts_and_is_the_prior_without_any(pattern):
    experts, prior = make_experts(), priors.Normal(2).double()
    q = guides.MixtureOfExperts(experts, prior)(hide(X, pattern))
    z = torch.randn(7, 5, 2, dtype=torch.float64)
    seen = [expert(x).log_prob(z) for expert, x, seen in zip(experts, X.split(SIZES, -1), pattern, strict=True) if seen]
    seen = seen or [prior().log_prob(z)]
    torch.testing.assert_close(q.log_prob(z), torch.stack(seen).logsumexp(0) - math.log(len(seen)))


def linear_gaussian():
    """A model x_m = W_m z + b_m + noise with columns of W_m that are orthogonal, and its exact experts."""
    torch.manual_seed(0)
    scale = 0.6
    decoder = likelihoods.Normal(2, sum(SIZES), networks.linear(), scale=scale, missing=True).double()
    experts = [guides.DiagonalNormal(size, 2, networks.linear()).double() for size in SIZES]
    weights, biases = decoder.network.weight.data, decoder.network.bias.data
    precisions = []
    for expert, rows, bias in zip(experts, weights.split(SIZES), biases.split(SIZES), strict=True):
        rows.copy_(torch.linalg.qr(rows).Q * torch.tensor([1.5, 0.7], dtype=torch.float64))
        gram = (rows**2).sum(0)
        precisions.append(gram / scale**2)
        with torch.no_grad():
            expert.network.weight.zero_()[:2] = (rows / gram).T
            expert.network.bias[:2] = -(rows / gram).T @ bias
            expert.network.bias[2:] = -0.5 * precisions[-1].log()
    return decoder, experts, precisions


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_product_of_exact_experts_is_the_exact_posterior_whatever_is_missing(pattern):
    decoder, experts, _ = linear_gaussian()
    vae = pv.VAE(priors.StandardNormal(2).double(), guides.ProductOfExperts(experts), decoder)
    x = hide(X, pattern)
    covered = ~x.isnan()[0]
    weight, bias = decoder.network.weight.detach()[covered], decoder.network.bias.detach()[covered]
    covariance = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + weight.T @ weight / 0.36)
    exact = dist.MultivariateNormal((x[:, covered] - bias) @ weight @ covariance / 0.36, covariance)
    z = torch.randn(9, 5, 2, dtype=torch.float64)
    torch.testing.assert_close(vae.encode(x).log_prob(z), exact.log_prob(z))
    if any(pattern):
        # The weights of draws from the posterior are all p(x), that of the observed entries alone.
        cov = weight @ weight.T + 0.36 * torch.eye(len(weight), dtype=torch.float64)
        log_p = dist.MultivariateNormal(bias, cov).log_prob(x[:, covered])
        estimate = pv.log_evidence(vae.model, vae.guide, x, num_samples=3)
        torch.testing.assert_close(estimate.log_evidence, log_p)


def test_training_with_hidden_modalities_finds_the_posterior_given_any_of_them():
    decoder, exact_experts, _ = linear_gaussian()
    torch.manual_seed(1)
    experts = [guides.DiagonalNormal(size, 2, networks.linear()) for size in SIZES]
    vae = pv.VAE(priors.StandardNormal(2), guides.ProductOfExperts(experts), decoder.float().requires_grad_(False))
    x = pv.VAE(priors.StandardNormal(2), guides.ProductOfExperts(exact_experts).float(), decoder).generate(400)

    def hide_some(x):
        hidden = torch.rand(len(x), len(SIZES)) < 0.5
        return x.masked_fill(hidden.repeat_interleave(torch.tensor(SIZES), 1), torch.nan)

    for lr in (2e-2, 2e-3):
        pv.fit(vae.model, vae.guide, x, epochs=60, batch_size=100, lr=lr, transform=hide_some, seed=0)
    for pattern in PATTERNS:
        given = hide(x[:50], pattern)
        q, exact = vae.encode(given), guides.ProductOfExperts(exact_experts)(given)
        assert kl_divergence(q, exact).mean() < 0.02, pattern


@pytest.mark.parametrize("make", [guides.ProductOfExperts, guides.MixtureOfExperts])
def test_a_missing_modality_leaves_its_expert_without_a_gradient_and_the_others_without_nan(make):
    experts = make_experts()
    q = make(experts)(hide(X, (True, False, True)).requires_grad_())
    q.log_prob(q.rsample((20,))).sum().backward()
    largest = [max(float(p.grad.abs().max()) for p in expert.parameters()) for expert in experts]
    assert largest[1] == 0
    assert all(0 < size < math.inf for size in (largest[0], largest[2]))


def test_rows_may_miss_different_modalities():
    experts = make_experts()
    x = torch.stack([hide(row, pattern) for row, pattern in zip(X, PATTERNS, strict=False)])
    for make in (guides.ProductOfExperts, guides.MixtureOfExperts):
        q, z = make(experts), torch.randn(5, 2, dtype=torch.float64)
        alone = torch.cat([q(row[None]).log_prob(one) for row, one in zip(x, z, strict=True)])
        torch.testing.assert_close(q(x).log_prob(z), alone)


def test_some_missing_entries_of_a_modality_are_for_its_network():
    torch.manual_seed(0)
    reads = guides.DiagonalNormal(3, 2, networks.with_missing(networks.linear()))
    plain = guides.DiagonalNormal(2, 2, networks.linear())
    x = torch.tensor([[0.5, torch.nan, 1.0, 0.3, 0.2]])
    q = guides.ProductOfExperts([reads, plain])(x)
    assert q.mean.isfinite().all()
    with pytest.raises(ValueError, match=r"network of DiagonalNormal must accept missing entries.*with_missing"):
        guides.ProductOfExperts([plain, reads])(x)


def test_an_expert_that_is_very_sure_decides_alone_without_overflow():
    sure = guides.DiagonalNormal(1, 2, networks.linear())
    with torch.no_grad():
        sure.network.weight.zero_()
        sure.network.bias.copy_(torch.tensor([3.0, -2.0, -50.0, -50.0]))
    q = guides.ProductOfExperts([sure, guides.DiagonalNormal(1, 2, networks.linear())])(torch.zeros(4, 2))
    assert torch.equal(q.mean, torch.tensor([3.0, -2.0]).expand(4, 2))
    assert (q.stddev > 0).all()


def test_a_vae_of_experts_is_saved_and_refined_as_any_other(tmp_path):
    torch.manual_seed(0)
    experts = [guides.DiagonalNormal(size, 2, networks.mlp([8])) for size in SIZES]
    decoder = likelihoods.Normal(2, sum(SIZES), networks.linear(), missing=True)
    x = hide(X.float(), (True, False, True))
    for make in (guides.ProductOfExperts, guides.MixtureOfExperts):
        prior = priors.Normal(2)
        vae = pv.VAE(prior, make(experts, prior), decoder)
        vae.save(tmp_path / "model.pt")
        loaded, z = pv.VAE.load(tmp_path / "model.pt"), torch.randn(5, 2)
        assert torch.equal(loaded.encode(x).log_prob(z), vae.encode(x).log_prob(z))
        assert loaded.encoder.network.prior is loaded.prior
        refined = guides.PerDatum.refining(vae.encoder, x)
        torch.testing.assert_close(refined(x).log_prob(z), vae.encode(x).log_prob(z))


ONE = guides.DiagonalNormal(3, 2, networks.linear())


@pytest.mark.parametrize("make", [guides.ProductOfExperts, guides.MixtureOfExperts])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ONE,), "`experts` must be a list of guides with diagonal normals.*got a DiagonalNormal"),
        (([],), "`experts` must be a list .*got an empty list"),
        (([ONE, guides.FullRankNormal(3, 2, networks.linear())],), "`experts` must be .*got a FullRankNormal"),
        (([ONE, guides.DiagonalNormal(3, 1, networks.linear())],), r"one latent shape, got \(2,\) and \(1,\)"),
        (([ONE], priors.Laplace(2)), "`prior` must be a normal, such as .*got a Laplace"),
        (([ONE], priors.StandardNormal(3)), r"`prior` must have the latent shape of the experts, \(2,\), got \(3,\)"),
    ],
)
def test_what_are_no_experts_is_refused(make, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(*arguments)
