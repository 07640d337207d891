"""Mixtures of discretised logistics: compared with SciPy and with ordered levels; sums, moments, and float32."""

import math

import pytest
import scipy.stats
import torch

from pyro_vae import families, tabular
from pyro_vae.distributions import DiscretizedLogisticMixture


def mixture(size=(), components=3, num_levels=256, dtype=torch.float64, spread=100.0):
    generator = torch.Generator().manual_seed(0)
    logits, loc, log_scale = torch.randn(3, *size, components, generator=generator, dtype=dtype)
    return DiscretizedLogisticMixture(logits, 120 + spread * loc, (2 * log_scale).exp(), num_levels)


def test_masses_are_differences_of_the_logistic_distribution_and_exact_at_the_ends():
    q = mixture()
    levels = torch.arange(256, dtype=torch.float64)
    ends = (levels[1:, None] - 0.5).numpy()
    below = scipy.stats.logistic.cdf(ends, q.loc.numpy(), q.scale.numpy()) @ q.logits.softmax(-1).numpy()
    expected = torch.cat([torch.zeros(1), torch.as_tensor(below), torch.ones(1)]).double().diff()
    torch.testing.assert_close(q.log_prob(levels).exp(), expected, rtol=1e-9, atol=1e-14)


def test_one_component_is_an_ordinal_variable_with_evenly_spaced_cut_points():
    loc, scale = torch.tensor([3.0, -20.0], dtype=torch.float64), torch.tensor([0.7, 4.0], dtype=torch.float64)
    q = DiscretizedLogisticMixture(torch.zeros(2, 1), loc[:, None], scale[:, None], num_levels=8)
    cuts = (torch.arange(1, 8) - 0.5) / scale[:, None]
    levels = torch.arange(8, dtype=torch.float64)[:, None]
    torch.testing.assert_close(q.log_prob(levels), tabular.Ordinal(loc / scale, cuts).log_prob(levels))


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_mean_and_variance_are_those_of_the_masses(num_levels):
    q = mixture((4,), num_levels=num_levels)
    levels = q.enumerate_support()
    mass = q.log_prob(levels).exp()
    mean = (levels * mass).sum(0)
    torch.testing.assert_close(q.mean, mean)
    torch.testing.assert_close(q.variance, ((levels - mean) ** 2 * mass).sum(0))


@pytest.mark.parametrize("scale", [0.05, 0.1, 0.3])
def test_the_variance_in_float32_has_its_digits_where_nearly_all_mass_is_on_one_high_level(scale):
    loc = torch.arange(256.0)[:, None]
    q = DiscretizedLogisticMixture(torch.zeros(256, 1), loc, torch.full((256, 1), scale))
    tail = torch.tensor(-0.5 / scale, dtype=torch.float64).sigmoid().item()  # of one level beyond the next edge
    variance = sum((2 * j - 1) * torch.tensor((0.5 - j) / scale).sigmoid().item() for j in range(1, 60)) * 2
    assert variance == pytest.approx(2 * tail, rel=0.2)
    torch.testing.assert_close(q.variance[100:150], torch.full((50,), variance), rtol=1e-4, atol=0)
    assert (q.variance > 0).all()
    assert q.variance.dtype == q.mean.dtype == torch.float32


@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0, 1e4, 1e8])
@pytest.mark.parametrize("loc", [-1e6, 0.0, 127.5, 254.9, 1e6])
def test_masses_in_float32_sum_to_one_at_any_parameters_and_have_finite_gradients(loc, scale):
    parameters = [torch.tensor([value, value], requires_grad=True) for value in (30.0, loc, scale)]
    q = DiscretizedLogisticMixture(*parameters)
    log_prob = q.log_prob(torch.arange(256.0))
    assert log_prob.isfinite().all()
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=2e-5)
    gradients = torch.autograd.grad(log_prob.sum(), parameters)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_tails_keep_their_digits_in_float32():
    q = DiscretizedLogisticMixture(torch.zeros(1), torch.tensor([10.0]), torch.tensor([0.5]))
    exact = -(199.5 - 10) / 0.5 + math.log(1 - math.exp(-1 / 0.5))  # far out, the logistic tail is an exponential
    assert q.log_prob(torch.tensor(200.0)).item() == pytest.approx(exact, rel=1e-6)


def test_levels_start_spread_over_the_range_and_outputs_come_as_channels_do():
    family = families.DiscretizedLogisticMixture((3, 2, 2), num_components=4)
    q = family(torch.zeros(family.num_raw)).base_dist
    torch.testing.assert_close(q.loc[0, 0, 0], 255 * torch.tensor([1.0, 3.0, 5.0, 7.0]) / 8)
    assert q.log_prob(torch.arange(256.0)[:, None, None, None]).exp().min() > 1 / 256 / 8
    raw = torch.randn(5, family.num_raw)
    channels = raw.reshape(5, 3, 4, 3, 2, 2)  # kinds, components, and the image
    found = family(raw).base_dist
    torch.testing.assert_close(found.logits, channels[:, 0].movedim(1, -1))
    torch.testing.assert_close(found.loc - q.loc, 127.5 * channels[:, 1].movedim(1, -1), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("value", [-1.0, 0.5, 256.0, torch.nan])
def test_what_is_no_level_is_refused(value):
    with pytest.raises(ValueError, match=r"support|IntegerInterval"):
        mixture().log_prob(torch.tensor(value, dtype=torch.float64))
