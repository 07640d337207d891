"""Distributions for tables: compared with SciPy and torch in float64, then the precision of float32."""

import math

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import nn

from pyro_vae import tabular

COUNTS = torch.tensor([0.0, 1.0, 7.0, 300.0, 10_000.0], dtype=torch.float64)


@pytest.mark.parametrize("log_rate", [-3.0, 0.0, 5.0, 9.2])
def test_poisson_agrees_with_scipy(log_rate):
    p = tabular.Poisson(torch.tensor(log_rate, dtype=torch.float64))
    torch.testing.assert_close(p.log_prob(COUNTS).numpy(), scipy.stats.poisson.logpmf(COUNTS, math.exp(log_rate)))


@pytest.mark.parametrize("dispersion", [1e-4, 0.3, 8.0])
@pytest.mark.parametrize("mean", [0.02, 3.0, 5000.0])
def test_negative_binomial_agrees_with_scipy_and_torch(mean, dispersion):
    mean, dispersion = torch.tensor([mean, dispersion], dtype=torch.float64)
    p = tabular.NegativeBinomial(mean.log(), dispersion)
    theirs = dist.NegativeBinomial(1 / dispersion, logits=(dispersion * mean).log())
    reference = scipy.stats.nbinom.logpmf(COUNTS, 1 / dispersion, 1 / (1 + dispersion * mean))
    torch.testing.assert_close(p.log_prob(COUNTS).numpy(), reference, rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(p.log_prob(COUNTS), theirs.log_prob(COUNTS))
    torch.testing.assert_close((p.mean, p.variance), (theirs.mean, theirs.variance))


def test_negative_binomial_without_dispersion_is_poisson():
    log_mean = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    x = torch.arange(20, dtype=torch.float64)[:, None]
    near = torch.stack([tabular.NegativeBinomial(log_mean, d).log_prob(x) for d in (1e-2, 1e-4, 1e-6)])
    gaps = (near - tabular.Poisson(log_mean).log_prob(x)).abs().amax((1, 2))
    assert gaps[0] > 50 * gaps[1] > 2500 * gaps[2]
    assert gaps[2] < 1e-3


@pytest.mark.parametrize("dispersion", [1e-9, 1e-11, 1e-15, 1e-30])
def test_at_vanishing_dispersion_it_is_poisson_to_the_last_digits(dispersion):
    log_mean = torch.tensor([-30.0, -1.0, 2.0, 8.0], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([0.0, 1.0, 7.0, 3000.0], dtype=torch.float64)[:, None]
    found, limit = tabular.NegativeBinomial(log_mean, dispersion).log_prob(x), tabular.Poisson(log_mean).log_prob(x)
    correction = 0.5 * dispersion * ((x - log_mean.exp()) ** 2 - x)  # the first order in the dispersion
    torch.testing.assert_close(found, limit + correction, rtol=1e-9, atol=1e-7)
    slopes = [torch.autograd.grad(f.sum(), log_mean, retain_graph=True)[0] for f in (found, limit)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("df", [1e4, 1e8, 1e12, 1e16, 1e30])
def test_student_t_of_many_degrees_of_freedom_is_a_normal(df):
    df = torch.tensor(df, requires_grad=True)
    x = torch.tensor([-4.0, 0.0, 1.0])
    found = tabular.StudentT(df, 0.0, 1.0).log_prob(x)
    torch.testing.assert_close(found, dist.Normal(0.0, 1.0).log_prob(x), rtol=0, atol=60 / df.item() + 3e-6)
    assert torch.autograd.grad(found.sum(), df)[0].isfinite()


@pytest.mark.parametrize("df", [0.5, 1.0, 3.0, 40.0, 1e6])
def test_student_t_agrees_with_scipy(df):
    x = torch.tensor([-1e8, -30.0, -1.0, 0.2, 5.0], dtype=torch.float64)
    p = tabular.StudentT(torch.tensor(df, dtype=torch.float64), 0.2, 1.5)
    torch.testing.assert_close(p.log_prob(x).numpy(), scipy.stats.t.logpdf(x, df, 0.2, 1.5), rtol=1e-8, atol=1e-8)


def test_float32_keeps_the_digits_that_torch_loses():
    count, log_rate = torch.tensor(10_000.0), torch.tensor(10_000.0).log()
    exact = scipy.stats.poisson.logpmf(10_000, float(log_rate.double().exp()))
    ours, theirs = tabular.Poisson(log_rate).log_prob(count), dist.Poisson(log_rate.exp()).log_prob(count)
    assert abs(float(ours) - exact) < 1e-6
    assert abs(float(theirs) - exact) > 3e-4
    x, df = torch.tensor(1.0), torch.tensor(1e6)
    exact = scipy.stats.t.logpdf(1.0, 1e6)
    assert abs(float(tabular.StudentT(df, 0.0, 1.0).log_prob(x)) - exact) < 1e-5
    assert abs(float(dist.StudentT(df, 0.0, 1.0).log_prob(x)) - exact) > 1e-2


def test_a_rate_is_the_exponential_and_then_its_tangent_and_never_loses_its_gradient():
    raw = torch.tensor([-2.0, 15.999, 16.0, 17.0, 1e6], requires_grad=True)
    log_rate = tabular.log_of_bounded_exp(raw)
    rate = log_rate.exp()
    above = math.exp(16) * (1 + (raw - 16).clamp(min=0))
    torch.testing.assert_close(rate, torch.where(raw > 16, above, raw.exp()), rtol=1e-4, atol=0)
    (slope,) = torch.autograd.grad(rate.sum(), raw)
    torch.testing.assert_close(slope, raw.detach().clamp(max=16).exp(), rtol=1e-3, atol=0)


def test_counts_of_a_large_mean_are_drawn_as_they_are_scored():
    p = tabular.Poisson(torch.tensor(25.0))
    x = p.sample((20_000,)).double()
    mean = math.exp(25)
    assert ((x >= 0) & (x == x.round())).all()
    assert abs(x.mean() - mean) < 5 * (mean / len(x)) ** 0.5 + mean * 1e-7
    assert abs(x.var() / mean - 1) < 5 * (2 / len(x)) ** 0.5 + 1e-2


def test_counts_of_two_parameters_are_gamma_mixed():
    p = tabular.NegativeBinomial(torch.tensor(20.0).log(), 0.5)
    x = p.sample((50_000,))
    assert abs(x.mean() - p.mean) < 5 * (p.variance / len(x)) ** 0.5
    assert abs(x.var() / p.variance - 1) < 0.1


def test_classes_by_number_are_those_of_pyro_by_one_hot_vector():
    logits = torch.randn(5, 4)
    ours, theirs = tabular.Categorical(logits=logits), dist.OneHotCategorical(logits=logits)
    x = torch.tensor([0, 3, 1, 1, 2])
    expected = theirs.log_prob(nn.functional.one_hot(x, 4).float())
    for value in (x, x.float(), x.to(torch.uint8)):
        torch.testing.assert_close(ours.log_prob(value), expected)
    assert torch.equal(ours.mode, logits.argmax(-1).float())


LOGITS = torch.tensor([-90.0, -8.0, -1.0, 0.0, 0.7, 8.0, 90.0], dtype=torch.float64)


@pytest.mark.parametrize("base", [tabular.Poisson(torch.tensor(0.4)), tabular.NegativeBinomial(torch.tensor(0.4), 1.5)])
def test_more_zeros_are_a_mixture_of_a_point_and_the_counts(base):
    p = tabular.ZeroInflated(base, LOGITS.float())
    x = torch.arange(400.0)[:, None]
    pi = LOGITS.sigmoid()
    expected = pi * (x == 0) + (1 - pi) * base.log_prob(x).double().exp()
    mass = p.log_prob(x).double().exp()
    torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(mass.sum(0), torch.ones_like(pi), rtol=0, atol=1e-5)
    mean = (x * mass).sum(0)
    torch.testing.assert_close(p.mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(p.variance.double(), (x**2 * mass).sum(0) - mean**2, rtol=1e-4, atol=1e-5)
    draws = p.sample((20_000,))
    assert ((draws.mean(0) - p.mean).abs() <= 6 * (p.variance / len(draws)).sqrt() + 1e-6).all()
    error = (mass[0] * (1 - mass[0]) / len(draws)).clamp(min=0).sqrt()
    assert (((draws == 0).double().mean(0) - mass[0]).abs() <= 6 * error + 1e-5).all()


def test_a_gate_keeps_the_digits_of_both_probabilities_in_float32():
    logits = torch.tensor([-1e6, -100.0, 100.0, 1e6], requires_grad=True)
    counts = tabular.Poisson(torch.tensor(1.0))
    p = tabular.ZeroInflated(counts, logits)
    for x in (torch.tensor(0.0), torch.tensor(2.0)):
        log_prob = p.log_prob(x)
        assert log_prob[:2].tolist() == pytest.approx([float(counts.log_prob(x))] * 2, rel=1e-6)
        assert torch.autograd.grad(log_prob.sum(), logits)[0].isfinite().all()
    assert p.log_prob(torch.tensor(0.0))[2:].tolist() == pytest.approx([0.0, 0.0], abs=1e-40)


def test_a_density_is_not_inflated_with_zeros():
    classes = tabular.Categorical(torch.ones(3))
    for base in (dist.Normal(0.0, 1.0), dist.LogNormal(0.0, 1.0), dist.Bernoulli(0.5), classes):
        with pytest.raises(ValueError, match="`base` must be a distribution of single counts"):
            tabular.ZeroInflated(base, torch.tensor(0.0))


def test_levels_are_differences_of_the_logistic_distribution_function():
    torch.manual_seed(0)
    loc = 3 * torch.randn(50, dtype=torch.float64)
    cuts = torch.randn(50, 4, dtype=torch.float64).sort(-1).values
    p = tabular.Ordinal(loc, cuts)
    below = scipy.stats.logistic.cdf(cuts, loc=loc[:, None])
    expected = [below[:, 0], *(below[:, j] - below[:, j - 1] for j in (1, 2, 3)), 1 - below[:, 3]]
    for level, mass in enumerate(expected):
        found = p.log_prob(torch.tensor(float(level), dtype=torch.float64)).exp()
        torch.testing.assert_close(found.numpy(), mass, rtol=1e-8, atol=1e-14)
    wide = p.expand((2, 50))
    assert (wide.loc.shape, wide.cuts.shape, wide.sample().shape) == ((2, 50), (2, 50, 4), (2, 50))


@pytest.mark.parametrize("loc", [-200.0, -60.0, 0.0, 60.0, 200.0])
def test_levels_keep_their_digits_in_both_tails_in_float32(loc):
    loc, cuts = torch.tensor(loc, requires_grad=True), torch.tensor([-1.0, 0.5, 0.5 + 2**-13])
    found = tabular.Ordinal(loc, cuts).log_prob(torch.arange(4.0))
    assert found.double().exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.autograd.grad(found.sum(), loc)[0].isfinite()
    if loc.abs() >= 60:  # sigma(b) - sigma(a) is e^b - e^a on the left, e^-a - e^-b on the right
        a, b = (ends.double() - loc.detach() for ends in (cuts[:-1], cuts[1:]))
        tail = torch.where(a > 0, -a, b) + torch.log(-torch.expm1(a - b))
        torch.testing.assert_close(found[1:3].detach().double(), tail, rtol=1e-5, atol=0)


def test_amounts_agree_with_scipy_and_zeros_are_refused_with_the_alternatives():
    x = torch.tensor([1e-20, 0.3, 1.0, 50.0, 1e20], dtype=torch.float64)
    p = tabular.LogNormal(torch.tensor(0.7, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64))
    reference = scipy.stats.lognorm.logpdf(x, 1.3, scale=math.exp(0.7))
    torch.testing.assert_close(p.log_prob(x).numpy(), reference, rtol=1e-12, atol=0)
    for value in (0.0, -2.0):
        with pytest.raises(
            ValueError, match=rf"must be positive numbers, got {value:g}. Alternatives: .*zero-inflated"
        ):
            p.log_prob(torch.tensor(value))
