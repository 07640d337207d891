"""Bernoulli distributions compared with torch, and the continuous Bernoulli with formulas of fifty digits."""

import math

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import kstest

from pyro_vae.distributions.bernoulli import Bernoulli, ContinuousBernoulli, SoftTargetBernoulli
from pyro_vae.distributions.properties import is_normalized

mpmath.mp.dps = 50

THRESHOLDS = [0.3, 0.1, 1e-3]
LOGITS = [0.0, 1e-8, 5e-4, 0.02, 0.2, 1.0, 5.0, 20.0, 80.0]
LOGITS += [factor * threshold for threshold in THRESHOLDS for factor in (1 - 1e-9, 1 + 1e-9)]
LOGITS += [-logit for logit in LOGITS[1:]]


def log_c(logit):
    l = mpmath.mpf(logit)  # noqa: E741
    return mpmath.log(2) if l == 0 else mpmath.log(l / mpmath.tanh(l / 2))


def mean(logit):
    l = mpmath.mpf(logit)  # noqa: E741
    return mpmath.mpf(1) / 2 if l == 0 else 1 / (1 - mpmath.exp(-l)) - 1 / l


def icdf(logit, u):
    l, u = mpmath.mpf(logit), mpmath.mpf(u)  # noqa: E741
    return u if l == 0 else mpmath.log1p(u * mpmath.expm1(l)) / l


def log_prob(logit, x):
    return mpmath.mpf(x) * mpmath.mpf(logit) - mpmath.log1p(mpmath.exp(mpmath.mpf(logit))) + log_c(logit)


@pytest.mark.parametrize("kind", [Bernoulli, SoftTargetBernoulli])
@pytest.mark.parametrize("batch", [None, (4, 5, 3), (2, 4, 5, 3)], ids=["as it is", "expanded", "expanded beyond"])
def test_a_bernoulli_of_logits_that_many_data_share_is_that_of_torch(kind, batch):
    torch.manual_seed(0)
    x = (torch.rand(5, 3, dtype=torch.float64) > 0.5).double()
    if kind is SoftTargetBernoulli:
        x[0] = torch.rand(3, dtype=torch.float64)
    found = []
    for of in (kind, torch.distributions.Bernoulli):
        logits = torch.linspace(-40, 40, 12, dtype=torch.float64).view(4, 1, 3).requires_grad_()
        value = x.clone().requires_grad_()
        q = of(logits=logits, validate_args=False)
        log_p = (q if batch is None else q.expand(batch)).log_prob(value)
        found.append([log_p, *torch.autograd.grad(log_p.sum(), [logits, value])])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_a_bernoulli_of_shared_logits_keeps_its_digits_and_refuses_grey_values():
    q = Bernoulli(logits=torch.tensor([[60.0], [-60.0]]), validate_args=True).expand([2, 2])
    certain = math.exp(-60)
    expected = torch.tensor([[-60.0, -certain], [-certain, -60.0]], dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(torch.tensor([0.0, 1.0])).double(), expected, rtol=1e-6, atol=0.0)
    ways = [r"datasets\.binarize\(x\)", r"datasets\.resample\(x\)", "ContinuousBernoulli", "soft_targets=True"]
    for grey in (q, Bernoulli(logits=torch.zeros(2))):
        with pytest.raises(ValueError, match=r"must be 0s and 1s, got 0 to 0\.3.*" + ".*".join(ways)):
            grey.log_prob(torch.tensor([0.0, 0.3]))


def test_bernoulli_is_pyros_on_zeros_and_ones():
    logits, x = torch.randn(6), torch.tensor([0.0, 1.0] * 3)
    assert torch.equal(Bernoulli(logits=logits).log_prob(x), dist.Bernoulli(logits=logits).log_prob(x))


def test_soft_targets_are_the_cross_entropy_and_not_normalized():
    logits = torch.tensor([1.5], dtype=torch.float64)
    q = SoftTargetBernoulli(logits=logits)
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    p = logits.sigmoid()
    torch.testing.assert_close(q.log_prob(x), x * p.log() + (1 - x) * (1 - p).log())
    assert float(torch.trapezoid(q.log_prob(x).exp(), x)) < 0.9
    assert not is_normalized(q)
    assert not is_normalized(q.expand((3,)).to_event(1).mask(True))
    assert is_normalized(Bernoulli(logits=logits).to_event(1))
    with pytest.raises(ValueError, match="support"):
        q.log_prob(torch.tensor([1.2], dtype=torch.float64))


@pytest.fixture(params=LOGITS, ids="{:.10g}".format)
def logit(request):
    return request.param


@pytest.fixture
def p(logit):
    return ContinuousBernoulli(torch.tensor(logit, dtype=torch.float64))


def test_every_quantity_equals_its_formula_and_the_density_integrates_to_one(p, logit):
    assert float(p.log_normalizer) == pytest.approx(float(log_c(logit)), rel=1e-10, abs=1e-10)
    assert float(p.mean) == pytest.approx(float(mean(logit)), rel=1e-12, abs=1e-12)
    for u in (1e-6, 0.1, 0.5, 0.9, 1 - 1e-6):
        assert float(p.icdf(torch.tensor(u, dtype=torch.float64))) == pytest.approx(float(icdf(logit, u)), abs=1e-10)
    for x in (0.0, 0.1, 0.5, 0.9, 1.0):
        found = float(p.log_prob(torch.tensor(x, dtype=torch.float64)))
        assert found == pytest.approx(float(log_prob(logit, x)), rel=1e-10, abs=1e-10)
    node, weight = map(torch.from_numpy, np.polynomial.legendre.leggauss(200))
    assert float((p.log_prob((node + 1) / 2).exp() * weight / 2).sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("quantity", ["log_normalizer", "mean", "icdf", "slope"])
def test_series_and_formula_meet_without_a_step(quantity, threshold):
    near = threshold * torch.tensor([1 - 1e-12, 1 + 1e-12], dtype=torch.float64).requires_grad_()
    p = ContinuousBernoulli(near)
    if quantity == "slope":
        (values,) = torch.autograd.grad(p.log_normalizer.sum(), near)
    elif quantity == "icdf":
        values = p.icdf(torch.tensor(0.3, dtype=torch.float64))
    else:
        values = getattr(p, quantity)
    below, above = values.tolist()
    assert below == pytest.approx(above, abs=1e-9)


def test_float32_log_prob_and_its_gradient_keep_their_digits(logit):
    logits = torch.tensor(logit, requires_grad=True)
    single = float(logits.detach())  # the number that float32 holds
    for x in (0.0, 0.25, 0.9, 1.0):
        x = float(torch.tensor(x))
        value = ContinuousBernoulli(logits).log_prob(torch.tensor(x))
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.item() == pytest.approx(float(log_prob(single, x)), rel=1e-5, abs=2e-6)
        # d/dl log p(x) = x - mean: the score has mean zero.
        assert gradient.item() == pytest.approx(x - float(mean(single)), rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("logits", [-60.0, -2.0, 0.0, 5e-4, 0.2, 3.0, 60.0])
def test_samples_follow_the_cdf(logits):
    samples = ContinuousBernoulli(torch.tensor(logits)).sample((20_000,)).double().numpy()

    def cdf(x):
        return x if logits == 0 else np.expm1(logits * x) / np.expm1(logits)

    assert kstest(samples, cdf).pvalue > 1e-5


def test_reparameterised_gradient_is_that_of_the_mean():
    # E[dx/dl] = d mean / dl = variance of x.
    logits = torch.tensor([-5.0, 0.0, 0.05, 2.0], dtype=torch.float64, requires_grad=True)
    n = 20_000
    repeated = logits.detach().expand(n, 4).clone().requires_grad_()
    p = ContinuousBernoulli(repeated)
    assert p.has_rsample
    (slopes,) = torch.autograd.grad(p.rsample().sum(), repeated)
    (expected,) = torch.autograd.grad(ContinuousBernoulli(logits).mean.sum(), logits)
    assert ((slopes.mean(0) - expected).abs() < 4.5 * slopes.std(0) / n**0.5).all()


def test_values_outside_the_unit_interval_are_refused():
    with pytest.raises(ValueError, match="support"):
        ContinuousBernoulli(torch.zeros(())).log_prob(torch.tensor(1.5))
