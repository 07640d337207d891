"""What the package reads of any distribution: wrappers, support, normalisation, discrete twin and mean."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from pyro_vae import distributions, tabular
from pyro_vae.distributions import LogitNormal, LogitRelaxedBernoulli, LogRelaxedOneHotCategorical, properties
from pyro_vae.distributions.missing import with_missing

NORMAL = dist.Normal(torch.zeros(3), 1.0)
LOGITS = torch.tensor([[0.3, -1.0, 0.5], [2.0, 0.0, 0.0]])


def test_wrappers_are_taken_off():
    wrapped = NORMAL.mask(torch.tensor(True)).to_event(1)
    assert type(properties.base_distribution(wrapped)) is dist.Normal
    assert type(properties.without_independent(NORMAL.to_event(1))) is dist.Normal
    assert type(properties.without_independent(dist.LogNormal(torch.zeros(3), 1.0).to_event(1))) is dist.LogNormal
    assert properties.is_masked(wrapped)
    assert not properties.is_masked(NORMAL.to_event(1))


def test_soft_targets_and_factors_are_not_normalized():
    soft = distributions.SoftTargetBernoulli(logits=torch.zeros(3))
    for q in (soft, soft.to_event(1).mask(False), with_missing(soft), dist.Unit(torch.zeros(3))):
        assert not properties.is_normalized(q)
    assert properties.is_normalized(NORMAL.to_event(1))


BOX = dist.Uniform(torch.tensor([-1.0, 0.0]), 2.0).to_event(1)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (BOX, LogitNormal(torch.zeros(5, 2), 1.0, torch.tensor([-1.0, 0.0]), 2.0).to_event(1), True),
        (BOX.expand((4,)), BOX, True),
        (BOX, LogitNormal(torch.zeros(2), 1.0, -1.0, 2.0).to_event(1), False),
        (dist.Gamma(torch.ones(2), 1.0), dist.LogNormal(torch.zeros(2), 1.0), True),
        (dist.Gamma(1.0, 1.0), dist.Normal(0.0, 1.0), False),
        (dist.Beta(1.0, 1.0), dist.Uniform(0.0, 1.0), True),
        (NORMAL, LogitRelaxedBernoulli(0.5, torch.zeros(3)), True),
        (NORMAL, dist.Bernoulli(torch.zeros(3)), False),
        (dist.Poisson(torch.ones(1)), dist.Gamma(torch.ones(1), 1.0), False),
        (dist.Binomial(3, torch.tensor(0.5)), tabular.Categorical(torch.ones(4)), True),
        (dist.Binomial(3, torch.tensor(0.5)), tabular.Categorical(torch.ones(3)), False),
        (dist.OneHotCategorical(torch.ones(3)), LogRelaxedOneHotCategorical(0.5, torch.ones(3)), False),
        (dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), NORMAL), NORMAL, True),
    ],
)
def test_supports_are_compared_with_their_bounds(first, second, same):
    assert properties.same_support(first, second) == properties.same_support(second, first) == same


def test_bounds_and_words_of_a_support():
    assert properties.support_bounds(NORMAL.to_event(1)) == (-math.inf, math.inf)
    assert properties.support_bounds(dist.Gamma(1.0, 1.0)) == (0.0, math.inf)
    words = [properties.spell_support(q) for q in (BOX, dist.Gamma(1.0, 1.0), with_missing(dist.Beta(1.0, 1.0)))]
    assert words == ["[-1...0, 2]", "[0, inf]", "[0, 1]"]
    assert properties.base_support(with_missing(NORMAL.to_event(1))) is torch.distributions.constraints.real


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_on_a_bound_move_inside_and_others_stay(dtype):
    x = torch.tensor([-1.0, -0.5, 1e3, 3.0], dtype=dtype)
    for high in (3.0, torch.tensor(3.0)):
        found = properties.clamp_inside(x, -1.0, high)
        assert ((found > -1) & (found < 3)).all()
        assert found[1] == x[1]
    assert torch.equal(properties.clamp_inside(x, -math.inf, math.inf), x)
    assert (properties.clamp_inside(x.double(), -1.0, 3.0, torch.float32).float() < 3).all()


def test_the_mean_of_classes_and_of_relaxed_variables_is_that_of_the_discrete_ones():
    one_hot, relaxed = dist.OneHotCategorical(logits=LOGITS), LogRelaxedOneHotCategorical(0.5, LOGITS)
    for q in (one_hot, relaxed, tabular.Categorical(logits=LOGITS)):
        mean, has_classes = properties.conditional_mean(q.to_event(1))
        torch.testing.assert_close(mean, LOGITS.softmax(-1))
        assert has_classes
    mean, has_classes = properties.conditional_mean(LogitRelaxedBernoulli(0.5, LOGITS).to_event(1))
    torch.testing.assert_close(mean, LOGITS.sigmoid())
    assert not has_classes
    assert kl_divergence(properties.discrete_twin(relaxed.to_event(1)), one_hot).abs().max() < 1e-6
    assert properties.discrete_twin(one_hot) is None


def test_a_mean_that_is_unknown_is_none_and_may_be_infinite():
    assert properties.conditional_mean(LogitNormal(LOGITS, 1.0)) == (None, False)
    assert not properties.conditional_mean(dist.Cauchy(LOGITS, 1.0))[0].isfinite().any()
    assert torch.equal(
        properties.conditional_mean(dist.LogNormal(LOGITS, 1.0).to_event(1))[0], dist.LogNormal(LOGITS, 1.0).mean
    )
