"""Relaxed and enumerable distributions: densities, laws and gradients before shapes."""

import math
from itertools import product

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from torch.distributions import biject_to, transform_to

from pyro_vae.distributions.bernoulli import Bernoulli, SoftTargetBernoulli
from pyro_vae.distributions.product import Product
from pyro_vae.distributions.properties import is_normalized
from pyro_vae.distributions.relaxed import (
    AdditiveLogRatioTransform,
    LogitRelaxedBernoulli,
    LogRelaxedOneHotCategorical,
    log_simplex,
)

LOGITS = st.floats(-100, 100, width=32)
TEMPERATURES = st.floats(0.05, 10)
UNLIKELY = 1e-5
Z_UNLIKELY = 4.5  # two-sided probability 7e-6


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def from_ratios(ratios):
    return AdditiveLogRatioTransform()(ratios)


# --- Bernoulli -------------------------------------------------------------------------------------------------------


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
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_bernoulli_of_shared_logits_keeps_its_digits_and_refuses_grey_values():
    q = Bernoulli(logits=torch.tensor([[60.0], [-60.0]]), validate_args=True).expand([2, 2])
    certain = math.exp(-60)
    expected = torch.tensor([[-60.0, -certain], [-certain, -60.0]], dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(torch.tensor([0.0, 1.0])).double(), expected, rtol=1e-6, atol=0.0)
    with pytest.raises(ValueError, match="is the mass of 0s and 1s"):
        q.log_prob(torch.tensor([0.0, 0.3]))


# --- LogitRelaxedBernoulli -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 10.0])
@pytest.mark.parametrize("logits", [-100.0, 0.0, 3.0])
def test_relaxed_bernoulli_density_integrates_to_one(temperature, logits):
    # With s = temperature * y - logits the density is logistic in s, so this grid holds all but e^-40 of it.
    s = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    y = (s + logits) / temperature
    q = LogitRelaxedBernoulli(doubles(temperature)[0], logits=doubles(logits)[0])
    assert float(q.log_prob(y).exp().sum() * (y[1] - y[0])) == pytest.approx(1, abs=1e-9)


def test_relaxed_bernoulli_agrees_with_torch_where_torch_is_safe():
    temperature, logits = doubles(0.3, 1.0, 4.0), doubles(-2.0, 0.5, 3.0)
    y = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    theirs = torch.distributions.relaxed_bernoulli.LogitRelaxedBernoulli(temperature, logits=logits)
    torch.testing.assert_close(LogitRelaxedBernoulli(temperature, logits).log_prob(y), theirs.log_prob(y))


@given(logits=st.lists(LOGITS, min_size=1, max_size=4), temperature=TEMPERATURES, seed=st.integers(0, 2**16))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_relaxed_bernoulli_log_prob_and_gradients_are_finite_in_float32(logits, temperature, seed):
    torch.manual_seed(seed)
    logits = torch.tensor(logits, requires_grad=True)
    temperature = torch.tensor(temperature, requires_grad=True)
    q = LogitRelaxedBernoulli(temperature, logits)
    for value in (q.sample(), torch.zeros_like(logits)):
        value.requires_grad_()
        assert_finite(q.log_prob(value), logits, value, temperature)
    assert_finite(q.log_prob(q.rsample()), logits, temperature)


@given(logits=st.lists(LOGITS, min_size=2, max_size=5), temperature=TEMPERATURES, seed=st.integers(0, 2**16))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_relaxed_one_hot_log_prob_and_gradients_are_finite_in_float32(logits, temperature, seed):
    torch.manual_seed(seed)
    logits = torch.tensor(logits, requires_grad=True)
    temperature = torch.tensor(temperature, requires_grad=True)
    q = LogRelaxedOneHotCategorical(temperature, logits)
    for value in (q.sample(), torch.zeros_like(logits).log_softmax(-1)):
        value.requires_grad_()
        assert_finite(LogRelaxedOneHotCategorical(temperature, logits).log_prob(value), logits, value, temperature)
    assert_finite(q.log_prob(q.rsample()), logits, temperature)


def assert_finite(log_prob, *inputs):
    assert log_prob.dtype == torch.float32
    assert log_prob.isfinite().all()
    for gradient in torch.autograd.grad(log_prob.sum(), inputs):
        assert gradient.isfinite().all()


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


@pytest.mark.parametrize("logits", [-90.0, 0.0, 90.0])
def test_relaxed_bernoulli_gradients_reach_large_logits(logits):
    logits = torch.tensor(logits, requires_grad=True)
    q = LogitRelaxedBernoulli(0.5, logits)
    assert q.has_rsample
    (gradient,) = torch.autograd.grad(q.rsample((10,)).sum(), logits)
    assert float(gradient) == pytest.approx(10 / 0.5)


def test_relaxed_bernoulli_broadcasts_temperatures_with_logits():
    temperature, logits = doubles(0.1, 1.0, 5.0)[:, None], doubles(-1.0, 2.0)
    q = LogitRelaxedBernoulli(temperature, logits)
    value = q.sample((7,))
    assert q.batch_shape == (3, 2)
    assert value.shape == q.log_prob(value).shape == (7, 3, 2)
    for i, j in product(range(3), range(2)):
        alone = LogitRelaxedBernoulli(temperature[i, 0], logits[j])
        torch.testing.assert_close(q.log_prob(value)[:, i, j], alone.log_prob(value[:, i, j]))


@pytest.mark.parametrize("build", [LogitRelaxedBernoulli, LogRelaxedOneHotCategorical])
def test_relaxed_distributions_refuse_temperatures_and_logits_out_of_range(build):
    with pytest.raises(ValueError, match="temperature"):
        build(torch.tensor(0.0), torch.zeros(2))
    with pytest.raises(ValueError, match="logits"):
        build(torch.tensor(1.0), torch.tensor([0.0, math.nan]))


@pytest.mark.parametrize("build", [LogitRelaxedBernoulli, LogRelaxedOneHotCategorical])
def test_relaxed_distributions_expand_without_changing_the_density(build):
    q = build(torch.tensor(0.5), torch.tensor([[0.3, -1.0]]))
    wide = q.expand((4, *q.batch_shape))
    value = wide.sample()
    assert wide.batch_shape == (4, *q.batch_shape)
    torch.testing.assert_close(wide.log_prob(value), q.log_prob(value))


# --- LogRelaxedOneHotCategorical -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 10.0])
@pytest.mark.parametrize("logits", [(0.0, 0.0), (2.0, -3.0), (-100.0, 100.0)])
def test_relaxed_one_hot_of_two_classes_integrates_to_one(temperature, logits):
    ratios = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    ratios = (ratios + logits[0] - logits[1]) / temperature
    q = LogRelaxedOneHotCategorical(temperature, doubles(*logits))
    density = q.log_prob(from_ratios(ratios[:, None])).exp()
    assert float(density.sum() * (ratios[1] - ratios[0])) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("logits", [(0.0, 0.0, 0.0), (2.0, -1.0, 0.5)])
def test_relaxed_one_hot_of_three_classes_integrates_to_one(temperature, logits):
    axis = torch.linspace(-30, 30, 601, dtype=torch.float64) / temperature
    q = LogRelaxedOneHotCategorical(temperature, doubles(*logits))
    density = q.log_prob(from_ratios(torch.cartesian_prod(axis, axis))).exp()
    assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=1e-9)


def test_relaxed_one_hot_agrees_with_torch_where_torch_is_safe():
    # torch's ExpRelaxedCategorical has the density with respect to the same measure.
    temperature, logits = doubles(0.7)[0], doubles(0.5, -1.0, 2.0)
    y = torch.randn(20, 3, dtype=torch.float64).log_softmax(-1)
    theirs = torch.distributions.relaxed_categorical.ExpRelaxedCategorical(temperature, logits=logits)
    torch.testing.assert_close(LogRelaxedOneHotCategorical(temperature, logits).log_prob(y), theirs.log_prob(y))


def test_relaxed_one_hot_of_two_classes_is_a_relaxed_bernoulli_of_the_log_ratio():
    temperature, logits = doubles(0.4)[0], doubles(1.0, -0.5)
    ratio = torch.linspace(-20, 20, 41, dtype=torch.float64)
    binary = LogitRelaxedBernoulli(temperature, logits[0] - logits[1])
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


def test_relaxed_one_hot_gradients_reach_large_logits():
    logits = torch.tensor([90.0, 0.0, -90.0], requires_grad=True)
    q = LogRelaxedOneHotCategorical(0.5, logits)
    assert q.has_rsample
    y = q.rsample()
    (gradient,) = torch.autograd.grad(y[0] - y[2], logits)
    torch.testing.assert_close(gradient, torch.tensor([2.0, 0.0, -2.0]))


def test_relaxed_one_hot_takes_batched_temperatures():
    temperature, logits = doubles(0.1, 1.0)[:, None], torch.randn(3, 4, dtype=torch.float64)
    q = LogRelaxedOneHotCategorical(temperature, logits)
    value = q.sample((5,))
    assert (q.batch_shape, q.event_shape) == ((2, 3), (4,))
    assert value.shape == (5, 2, 3, 4)
    assert q.log_prob(value).shape == (5, 2, 3)
    for i, j in product(range(2), range(3)):
        alone = LogRelaxedOneHotCategorical(temperature[i, 0], logits[j])
        torch.testing.assert_close(q.log_prob(value)[:, i, j], alone.log_prob(value[:, i, j]))


# --- The log-simplex -------------------------------------------------------------------------------------------------


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


def test_log_simplex_holds_samples_even_at_extreme_arguments():
    q = LogRelaxedOneHotCategorical(torch.tensor(0.05), logits=torch.tensor([100.0, 0.0, -100.0]))
    assert log_simplex.check(q.sample((1000,))).all()


def test_relaxed_one_hot_refuses_values_off_its_manifold():
    q = LogRelaxedOneHotCategorical(torch.tensor(0.5), logits=torch.zeros(3))
    with pytest.raises(ValueError, match="log_simplex"):
        q.log_prob(torch.zeros(3))


# --- Product ---------------------------------------------------------------------------------------------------------


def bernoullis(*shape):
    return dist.Bernoulli(logits=torch.randn(*shape, dtype=torch.float64))


def one_hots(*shape):
    return dist.OneHotCategorical(logits=torch.randn(*shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("base", "num_dims", "count", "event_shape"),
    [
        (bernoullis(3), 1, 8, (3,)),
        (bernoullis(5, 2), 1, 4, (2,)),
        (bernoullis(5, 2, 2), 2, 16, (2, 2)),
        (one_hots(2, 3), 1, 9, (2, 3)),
        (one_hots(5, 1, 4), 1, 4, (1, 4)),
        (one_hots(2, 2, 2), 2, 16, (2, 2, 2)),
    ],
)
def test_product_enumerates_every_state_once_and_its_mass_is_one(base, num_dims, count, event_shape):
    q = Product(base, num_dims)
    states = q.enumerate_support(expand=False)
    assert states.shape == (count, *[1] * len(q.batch_shape), *event_shape)
    assert len(states.flatten(1).unique(dim=0)) == count
    assert q.support.check(states).all()
    full = q.enumerate_support()
    assert full.shape == (count, *q.batch_shape, *event_shape)
    assert torch.equal(full, states.expand(full.shape))
    total = q.log_prob(full).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(q.batch_shape, dtype=torch.float64))
    assert q.has_enumerate_support
    assert full.dtype == torch.float64


def test_product_stays_a_product_when_expanded():
    q = Product(bernoullis(2), 1).expand((5,))
    assert q.enumerate_support().shape == (4, 5, 2)


@pytest.mark.parametrize(
    ("logits", "value", "batch"),
    [
        ((4, 1, 3), (5, 3), (4, 5)),  # data of states
        ((5, 3), (4, 1, 3), (4, 5)),  # states of data
        ((4, 1, 3), (5, 3), (2, 4, 5)),
        ((2, 1, 6, 1, 3), (7, 1, 5, 3), (2, 7, 6, 5)),
        ((4, 1, 2, 3), (5, 2, 3), (4, 5)),
        ((4, 5, 3), (5, 3), (4, 5)),
        ((4, 1, 1), (5, 3), (4, 5)),
        ((3,), (5, 3), (5,)),
    ],
)
def test_product_of_bernoullis_has_the_sum_of_their_log_masses(logits, value, batch):
    torch.manual_seed(0)
    event = value[-2:] if value[-2:] == (2, 3) else value[-1:]
    x = (torch.rand(value, dtype=torch.float64) > 0.5).double()
    found = []
    for kind in (Bernoulli, dist.Bernoulli):
        of = torch.linspace(-40, 40, math.prod(logits), dtype=torch.float64).view(logits).requires_grad_()
        each = kind(logits=of).expand(torch.Size(logits[: -len(event)] + event))
        log_p = Product(each, len(event)).expand(torch.Size(batch)).log_prob(x)
        assert log_p.shape == batch
        found.append([log_p, *torch.autograd.grad(log_p.sum(), [of])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shapes", [((3, 1, 0), (4, 0)), ((0, 1, 3), (4, 3)), ((3, 1, 2), (0, 2))], ids=str)
def test_product_of_bernoullis_takes_what_is_empty(shapes):
    logits, value = map(torch.zeros, shapes)
    log_p = Product(Bernoulli(logits=logits), 1).log_prob(value)
    assert torch.equal(log_p, torch.zeros(torch.broadcast_shapes(logits.shape[:-1], value.shape[:-1])))


def test_product_of_bernoullis_loses_no_digits_under_autocast():
    torch.manual_seed(0)
    q, x = Product(Bernoulli(logits=torch.randn(16, 1, 784)), 1), (torch.rand(8, 784) > 0.5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_p = q.log_prob(x)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p, q.base_dist.log_prob(x).double().sum(-1).float(), rtol=1e-6, atol=0)


def test_product_of_bernoullis_keeps_its_digits_and_refuses_grey_values():
    q = Product(Bernoulli(logits=torch.tensor([[[60.0, 60.0]], [[-60.0, 1e6]]]), validate_args=True), 1).expand([2, 2])
    certain = math.exp(-60)
    expected = torch.tensor([[-60 - certain, -2 * certain], [-certain, -60.0]], dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(torch.tensor([[0.0, 1.0], [1.0, 1.0]])).double(), expected, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="is the mass of 0s and 1s"):
        q.log_prob(torch.tensor([[0.0, 0.3], [0.0, 0.0]]))


def test_product_refuses_more_states_than_its_limit_and_says_how_many():
    assert len(Product(bernoullis(16), 1).enumerate_support(expand=False)) == 2**16
    with pytest.raises(ValueError, match="131072 states"):
        Product(bernoullis(17), 1).enumerate_support()
    with pytest.raises(ValueError, match=str(10**20)):
        Product(one_hots(20, 10), 1).enumerate_support()


# --- Bernoulli and its soft targets ----------------------------------------------------------------------------------


def test_bernoulli_refuses_grey_values_and_names_four_ways_out():
    with pytest.raises(ValueError, match=r"0 to 0\.3") as caught:
        Bernoulli(logits=torch.zeros(2)).log_prob(torch.tensor([0.0, 0.3]))
    for way in ("datasets.binarize(x)", "datasets.resample(x)", "ContinuousBernoulli", "soft_targets=True"):
        assert way in str(caught.value)


def test_bernoulli_is_pyros_on_zeros_and_ones():
    logits, x = torch.randn(6), torch.tensor([0.0, 1.0] * 3)
    assert torch.equal(Bernoulli(logits=logits).log_prob(x), dist.Bernoulli(logits=logits).log_prob(x))


def test_soft_targets_are_the_cross_entropy_and_not_normalized():
    logits = doubles(1.5)
    q = SoftTargetBernoulli(logits=logits)
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    p = logits.sigmoid()
    torch.testing.assert_close(q.log_prob(x), x * p.log() + (1 - x) * (1 - p).log())
    assert float(torch.trapezoid(q.log_prob(x).exp(), x)) < 0.9
    assert not is_normalized(q)
    assert not is_normalized(q.expand((3,)).to_event(1).mask(True))
    assert is_normalized(Bernoulli(logits=logits).to_event(1))
    with pytest.raises(ValueError, match="support"):
        q.log_prob(doubles(1.2))
