"""Priors: their arguments, what the decoder reads, the VampPrior, and exact evidence under heavy tails."""

import math

import pyro
import pytest
import torch
from pairs import NET, gaussian

import pyro_vae as pv
from pyro_vae import guides, priors

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double()
DIAGONAL = guides.DiagonalNormal(3, 2, NET)


@pytest.mark.parametrize("probs", [0.0, 1.0, -0.1, math.nan, torch.tensor([0.5, 1.0])])
def test_bernoulli_probabilities_out_of_range_are_refused(probs):
    for build in (lambda: priors.Bernoulli(2, probs), lambda: priors.RelaxedBernoulli(2, 0.5, probs)):
        with pytest.raises(ValueError, match="`probs` must be strictly between 0 and 1, got"):
            build()


@pytest.mark.parametrize("probs", [(0.5, 0.6), (0.0, 1.0), (1.5, -0.5), (math.nan, 0.5)])
def test_class_probabilities_that_are_none_are_refused(probs):
    probs = torch.tensor(probs)
    for build in (lambda: priors.OneHotCategorical((1, 2), probs), lambda: priors.GumbelSoftmax((1, 2), 0.5, probs)):
        with pytest.raises(ValueError, match="`probs` must be positive probabilities that sum to one by row, got"):
            build()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_any_precision_give_a_prior_of_the_default_one(dtype):
    pair = torch.tensor([0.25, 0.75], dtype=dtype)
    for prior in (
        priors.Bernoulli(2, pair),
        priors.RelaxedBernoulli(2, 0.5, pair).discrete(),
        priors.OneHotCategorical((1, 2), pair),
        priors.GumbelSoftmax((1, 2), 0.5, pair).discrete(),
    ):
        assert prior().mean.dtype == torch.get_default_dtype()
        torch.testing.assert_close(prior().mean.flatten(), pair.float())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: priors.Gamma(2, concentration=0.0), r"`concentration` must be positive, finite numbers, got 0\.0"),
        (lambda: priors.Gamma(2, rate=torch.tensor([1.0, -1.0])), "`rate` must be positive, finite numbers, got"),
        (lambda: priors.Gamma(2, rate=torch.ones(3)), r"`rate` must expand to shape \(2,\), got shape \(3,\)"),
        (lambda: priors.Uniform(2, 1.0, 1.0), "`low` must be below `high`, got"),
        (lambda: priors.Uniform(2, 0.0, math.inf), "`high` must be finite, got inf"),
        (lambda: priors.Uniform(2, torch.zeros(3)), r"`low` must expand to \(2,\), got shape \(3,\)"),
        (lambda: guides.LogitNormal(3, 2, NET, low=2.0), "`low` must be below `high`, got"),
    ],
)
def test_bounds_and_parameters_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_standard_normal_has_nothing_to_learn_and_normal_starts_there_and_the_decoder_reads_the_value():
    fixed, learnable = priors.StandardNormal(2), priors.Normal(2)
    value = torch.randn(9, 2)
    assert [len(list(prior.parameters())) for prior in (fixed, learnable)] == [0, 1]
    assert torch.equal(fixed().log_prob(value), learnable().log_prob(value))
    assert fixed.read(value) is value


def test_a_learnable_gamma_starts_at_its_arguments_and_learns_those_of_the_data():
    torch.manual_seed(0)
    prior = priors.Gamma(1, concentration=1.5, rate=0.5, learnable=True)
    assert prior().mean.item() == pytest.approx(3.0)
    z = torch.distributions.Gamma(4.0, 2.0).sample((20_000, 1))
    optimizer = torch.optim.LBFGS(prior.parameters(), max_iter=100)

    def loss():
        optimizer.zero_grad()
        value = -prior().log_prob(z).mean()
        value.backward()
        return value

    optimizer.step(loss)
    # The mean is 2 and its standard error 1 / sqrt(20,000) = 0.007; that of the concentration is about 0.04.
    assert prior().mean.item() == pytest.approx(2.0, abs=0.04)
    assert prior().base_dist.concentration.item() == pytest.approx(4.0, abs=0.2)


def vamp_vae():
    torch.manual_seed(0)
    encoder = guides.DiagonalNormal(3, 2, NET)
    vae = gaussian(prior=priors.VampPrior(encoder, X[:4].float()), encoder=encoder).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return vae


def test_a_vamp_prior_is_the_average_of_the_guide_and_draws_from_it():
    vae = vamp_vae()
    p, q = vae.prior(), vae.encode(vae.prior.pseudo_data)
    z = torch.randn(50, 2).double()
    average = q.log_prob(z[:, None]).logsumexp(-1) - math.log(4)
    torch.testing.assert_close(p.log_prob(z), average)
    torch.testing.assert_close(p.mean, q.mean.mean(0))


def test_a_vamp_priors_encoder_is_registered_once_under_its_own_name():
    vae = vamp_vae()
    names = [name for name, _ in vae.named_parameters()]
    assert [name for name in names if name.startswith("prior")] == ["prior.pseudo_data"]
    assert len({id(parameter) for parameter in vae.parameters()}) == len(names)
    vae.model(X)
    vae.guide(X)
    assert {name.rpartition("$$$")[2] for name in pyro.get_param_store()} == set(names)


@pytest.mark.slow
def test_the_optimal_prior_is_the_average_of_the_guide_over_the_data():
    """With all data as pseudo-data no prior has a lower rate."""
    torch.manual_seed(0)
    encoder, x = guides.DiagonalNormal(3, 2, NET), 3 * X.float()
    vaes = gaussian(prior=priors.VampPrior(encoder, x), encoder=encoder), gaussian(encoder=encoder)
    best, standard = (pv.evaluate(vae.model, vae.guide, x, num_samples=4000)["rate"] for vae in vaes)
    assert 0 <= best < standard
    assert best < math.log(6)  # no more than which of the six it was


@pytest.mark.parametrize(
    ("encoder", "pseudo_data", "message"),
    [
        (DIAGONAL, torch.randn(3), r"`pseudo_data` must be .*got shape \(3,\)"),
        (DIAGONAL, torch.randn(4, 2), r"`pseudo_data` must be \(K, 3\), K >= 1, got shape \(4, 2\)"),
        (DIAGONAL, torch.randn(0, 3), "K >= 1, got"),
        (guides.Bernoulli(3, 2, NET), torch.randn(4, 3), "`encoder` must be .*got a Bern"),
        (
            guides.RelaxedBernoulli(3, 2, NET, 0.5),
            torch.randn(4, 3),
            "`encoder` must be a guide of continuous latents .*got a RelaxedBernoulli",
        ),
    ],
)
def test_what_is_no_vamp_prior_is_refused(encoder, pseudo_data, message):
    with pytest.raises(ValueError, match=message):
        priors.VampPrior(encoder, pseudo_data)


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (lambda: priors.Laplace(1, learnable=True), 1e-4),
        (lambda: priors.Laplace(2), 5e-3),  # around q the cusp of the prior is inside a panel
        (lambda: priors.StudentT(1, df=3.0, learnable=True), 1e-4),
    ],
    ids=["Laplace", "Laplace 2-D", "t3"],
)
def test_priors_with_heavy_tails_have_the_evidence_of_a_long_sum(make, tolerance):
    torch.manual_seed(0)
    prior = make()
    size = prior.event_shape[0]
    vae = gaussian(size, prior=prior).double()
    exact = pv.exact.log_evidence(vae.model, X, tolerance=tolerance)
    chunks = [vae.decode(vae.prior().sample((100_000, 1))).log_prob(X).logsumexp(0) for _ in range(10)]
    sampled = torch.stack(chunks) - math.log(100_000)
    error = sampled.std(0) / 10**0.5
    assert ((sampled.mean(0) - exact).abs() < 7 * error + 1e-3).all()
    bound, gap = (f(vae.model, vae.guide, X, tolerance=tolerance) for f in (pv.exact.elbo, pv.exact.kl))
    assert (exact - bound - gap).abs().max() < 2e-3 + tolerance


def test_the_evidence_under_a_cauchy_prior_is_the_mean_likelihood_over_its_quantiles():
    vae = gaussian(1, prior=priors.StudentT(1, df=1.0)).double()
    quantiles = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    with torch.no_grad():
        log_likelihood = vae.decoder((math.pi * (quantiles - 0.5)).tan()[:, None, None]).log_prob(X)
    expected = log_likelihood.logsumexp(0) - math.log(200_000)
    torch.testing.assert_close(pv.exact.log_evidence(vae.model, X), expected, atol=1e-4, rtol=0)
