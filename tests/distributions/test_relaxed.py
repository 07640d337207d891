"""Relaxed distributions: densities, laws and gradients before shapes."""

import math
from itertools import product

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from torch.distributions import biject_to, transform_to

from pyro_vae.distributions import LogitRelaxedBernoulli, LogRelaxedOneHotCategorical, log_simplex
from pyro_vae.distributions.relaxed import AdditiveLogRatioTransform

LOGITS = st.floats(-100, 100, width=32)
TEMPERATURES = st.floats(0.05, 10)
UNLIKELY = 1e-5
Z_UNLIKELY = 4.5  # two-sided probability 7e-6


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def from_ratios(ratios):
    return AdditiveLogRatioTransform()(ratios)


BOTH = pytest.mark.parametrize("build", [LogitRelaxedBernoulli, LogRelaxedOneHotCategorical])


@BOTH
@given(logits=st.lists(LOGITS, min_size=2, max_size=5), temperature=TEMPERATURES, seed=st.integers(0, 2**16))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_log_prob_and_gradients_are_finite_in_float32(build, logits, temperature, seed):
    torch.manual_seed(seed)
    logits = torch.tensor(logits, requires_grad=True)
    temperature = torch.tensor(temperature, requires_grad=True)
    middle = torch.zeros_like(logits) if build is LogitRelaxedBernoulli else torch.zeros_like(logits).log_softmax(-1)
    for value in (build(temperature, logits).sample(), middle, None):
        q = build(temperature, logits)
        log_prob = q.log_prob(q.rsample() if value is None else value.requires_grad_())
        assert log_prob.dtype == torch.float32
        assert log_prob.isfinite().all()
        inputs = [logits, temperature, *([] if value is None else [value])]
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(log_prob.sum(), inputs))


@BOTH
@pytest.mark.parametrize("size", [-90.0, 0.0, 90.0])
def test_draws_carry_gradients_at_large_logits(build, size):
    logits = torch.tensor([size, 0.0, -size], requires_grad=True)
    y = build(0.5, logits).rsample()
    (gradient,) = torch.autograd.grad(y[0] - y[2], logits)
    torch.testing.assert_close(gradient, torch.tensor([2.0, 0.0, -2.0]))


@BOTH
def test_the_discrete_twin_has_the_same_logits(build):
    q = build(torch.tensor(0.5), torch.randn(4, 3).log_softmax(-1))
    assert q.discrete().has_enumerate_support
    torch.testing.assert_close(q.discrete().logits, q.logits)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 10.0])
@pytest.mark.parametrize("logits", [-100.0, 0.0, 3.0])
def test_relaxed_bernoulli_density_integrates_to_one(temperature, logits):
    # With s = temperature * y - logits the density is logistic in s, so this grid holds all but e^-40 of it.
    s = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    y = (s + logits) / temperature
    q = LogitRelaxedBernoulli(doubles(temperature)[0], logits=doubles(logits)[0])
    assert float(q.log_prob(y).exp().sum() * (y[1] - y[0])) == pytest.approx(1, abs=1e-9)


def test_densities_agree_with_those_of_torch_where_torch_is_safe():
    temperature, logits = doubles(0.3, 1.0, 4.0), doubles(-2.0, 0.5, 3.0)
    y = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    theirs = torch.distributions.relaxed_bernoulli.LogitRelaxedBernoulli(temperature, logits=logits)
    torch.testing.assert_close(LogitRelaxedBernoulli(temperature, logits).log_prob(y), theirs.log_prob(y))
    # torch's ExpRelaxedCategorical has the density with respect to the same measure.
    y = torch.randn(20, 3, dtype=torch.float64).log_softmax(-1)
    theirs = torch.distributions.relaxed_categorical.ExpRelaxedCategorical(temperature[0], logits=logits)
    torch.testing.assert_close(LogRelaxedOneHotCategorical(temperature[0], logits).log_prob(y), theirs.log_prob(y))


@given(logits=LOGITS, temperature=TEMPERATURES, seed=st.integers(0, 2**16))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_relaxed_bernoulli_float32_log_prob_keeps_its_digits(logits, temperature, seed):
    torch.manual_seed(seed)
    q = LogitRelaxedBernoulli(torch.tensor(temperature), torch.tensor(logits))
    y = q.sample()
    exact = LogitRelaxedBernoulli(q.temperature.double(), q.logits.double()).log_prob(y.double())
    # |logits - temperature * y| is at most about 17, from terms of at most about 120.
    assert float(q.log_prob(y)) == pytest.approx(float(exact), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 10.0])
@pytest.mark.parametrize("logits", [-3.0, 0.0, 1.0, 40.0])
def test_relaxed_bernoulli_read_hard_has_the_law_of_its_twin(temperature, logits):
    n, p = 100_000, 1 / (1 + math.exp(-logits))
    hard = LogitRelaxedBernoulli(temperature, torch.tensor(logits)).sample((n,)) > 0
    standard_error = math.sqrt(n * p * (1 - p))
    assert abs(float(hard.sum()) - n * p) <= Z_UNLIKELY * standard_error + 1e-3


@pytest.mark.parametrize("temperature", [0.05, 0.7, 10.0])
@pytest.mark.parametrize("logits", [-60.0, 0.0, 2.0])
def test_relaxed_bernoulli_samples_follow_the_analytic_cdf(temperature, logits):
    q = LogitRelaxedBernoulli(temperature, torch.tensor(logits))
    standard = temperature * q.sample((20_000,)).double() - logits
    assert kstest(standard.numpy(), lambda s: 1 / (1 + math.e**-s)).pvalue > UNLIKELY


@pytest.mark.parametrize(
    ("build", "logits", "event_shape"),
    [(LogitRelaxedBernoulli, doubles(-1.0, 2.0), ()), (LogRelaxedOneHotCategorical, torch.eye(2, 4).double(), (4,))],
)
def test_temperatures_broadcast_with_logits(build, logits, event_shape):
    temperature = doubles(0.1, 1.0, 5.0)[:, None]
    q = build(temperature, logits)
    value = q.sample((7,))
    assert (q.batch_shape, q.event_shape, value.shape) == ((3, 2), event_shape, (7, 3, 2, *event_shape))
    for i, j in product(range(3), range(2)):
        alone = build(temperature[i, 0], logits[j])
        torch.testing.assert_close(q.log_prob(value)[:, i, j], alone.log_prob(value[:, i, j]))


@BOTH
def test_relaxed_distributions_refuse_temperatures_and_logits_out_of_range(build):
    with pytest.raises(ValueError, match="temperature"):
        build(torch.tensor(0.0), torch.zeros(2))
    with pytest.raises(ValueError, match="logits"):
        build(torch.tensor(1.0), torch.tensor([0.0, math.nan]))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("logits", [(0.0, 0.0, 0.0), (2.0, -1.0, 0.5)])
def test_relaxed_one_hot_of_three_classes_integrates_to_one(temperature, logits):
    axis = torch.linspace(-30, 30, 601, dtype=torch.float64) / temperature
    q = LogRelaxedOneHotCategorical(temperature, doubles(*logits))
    density = q.log_prob(from_ratios(torch.cartesian_prod(axis, axis))).exp()
    assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("temperature", [0.1, 0.4, 1.0, 10.0])
@pytest.mark.parametrize("logits", [(0.0, 0.0), (1.0, -0.5), (2.0, -3.0), (-100.0, 100.0)])
def test_relaxed_one_hot_of_two_classes_is_a_relaxed_bernoulli_of_the_log_ratio(temperature, logits):
    logits = doubles(*logits)
    ratio = (torch.linspace(-40, 40, 41, dtype=torch.float64) + logits[0] - logits[1]) / temperature
    binary = LogitRelaxedBernoulli(doubles(temperature)[0], logits[0] - logits[1])
    one_hot = LogRelaxedOneHotCategorical(temperature, logits)
    torch.testing.assert_close(one_hot.log_prob(from_ratios(ratio[:, None])), binary.log_prob(ratio))


@pytest.mark.parametrize("temperature", [0.05, 1.0, 10.0])
def test_relaxed_one_hot_read_hard_has_the_law_of_its_twin(temperature):
    logits = torch.tensor([1.0, -1.0, 0.0, 0.5])
    n = 100_000
    index = LogRelaxedOneHotCategorical(temperature, logits).sample((n,)).argmax(-1)
    expected = n * logits.double().softmax(-1)
    assert chisquare(torch.bincount(index, minlength=4).numpy(), expected.numpy()).pvalue > UNLIKELY


@pytest.mark.parametrize("temperature", [0.05, 0.7, 10.0])
def test_relaxed_one_hot_log_ratios_are_logistic(temperature):
    logits = torch.tensor([1.0, -1.0, 0.0])
    y = LogRelaxedOneHotCategorical(temperature, logits).sample((20_000,)).double()
    for i, j in [(0, 1), (1, 2), (2, 0)]:
        standard = temperature * (y[:, i] - y[:, j]) - (logits[i] - logits[j])
        assert kstest(standard.numpy(), lambda s: 1 / (1 + math.e**-s)).pvalue > UNLIKELY


def test_additive_log_ratios_go_to_the_log_simplex_and_back():
    to_simplex = AdditiveLogRatioTransform()
    v = 5 * torch.randn(10, 3, dtype=torch.float64)
    y = to_simplex(v)
    assert log_simplex.check(y).all()
    torch.testing.assert_close(to_simplex.inv(y), v)
    torch.testing.assert_close(y[..., :-1] - y[..., -1:], v)
    assert (to_simplex.forward_shape(v.shape), to_simplex.inverse_shape(y.shape)) == (y.shape, v.shape)
    assert torch.equal(to_simplex.log_abs_det_jacobian(v, y), torch.zeros(10, dtype=torch.float64))


@pytest.mark.parametrize("registry", [biject_to, transform_to])
def test_log_simplex_is_reached_from_unconstrained_numbers(registry):
    independent = dist.constraints.independent(log_simplex, 1)
    assert isinstance(registry(log_simplex), AdditiveLogRatioTransform)
    assert independent.check(registry(independent)(torch.randn(2, 4, 3))).all()


def test_log_simplex_holds_samples_at_extreme_arguments_and_no_other_values():
    q = LogRelaxedOneHotCategorical(torch.tensor(0.05), logits=torch.tensor([100.0, 0.0, -100.0]))
    assert log_simplex.check(q.sample((1000,))).all()
    with pytest.raises(ValueError, match="log_simplex"):
        q.log_prob(torch.zeros(3))
