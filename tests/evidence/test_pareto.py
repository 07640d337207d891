"""The Pareto shape of weights against ArviZ, against known distributions, and for special weights."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch.distributions import Cauchy, Normal, StudentT

import pyro_vae as pv
from pyro_vae.evidence.pareto import pareto_shape, reliable_shape, shape_error, tail_length

with warnings.catch_warnings():  # ArviZ 0.23 warns on import of changes in version 1
    warnings.simplefilter("ignore")
    import arviz


def of_arviz(log_weights):
    """``psislw`` of version 0.23, of each datum. (That of 1.x takes minus the log-weights.)"""
    rows = np.ascontiguousarray(log_weights.double().T.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(arviz.psislw(rows)[1])


def normals(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DISTRIBUTIONS = {
    "Pareto": lambda u: -torch.linspace(0.1, 1.5, u.shape[1]).double() * u.log(),
    "light": lambda u: u.log(),
    "normal under a narrower one": lambda u: 3 * (2 * u - 1).erfinv() ** 2,
    "far below the range of floats": lambda u: -1e5 - 0.5 * u.log(),
    "of wide range": lambda u: 300 * u.log(),
    "with ties": lambda u: (-4 * u.log()).round() / 4,
    "with zeros": lambda u: torch.where(u < 0.97, -math.inf, -0.5 * u.log()),
}


@pytest.mark.skipif(not hasattr(arviz, "psislw"), reason="ArviZ 1.x rounds the length of the tail down, not up")
@pytest.mark.parametrize("count", [21, 26, 100, 225, 226, 1000, 5000])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_shape_of_each_datum_is_that_of_arviz(name, count):
    uniform = (normals((count, 30)) / 2**0.5).erf() / 2 + 0.5
    log_weights = DISTRIBUTIONS[name](uniform)
    ours, theirs = pareto_shape(log_weights), of_arviz(log_weights)
    compared = theirs.isfinite() & ours.isfinite()
    assert (ours == math.inf).logical_or(compared | (ours == -math.inf)).all()
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    torch.testing.assert_close(ours[compared], theirs[compared], rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [0.1, 0.4, 0.7, 1.0])
def test_the_mean_over_data_is_the_shape_of_a_pareto_distribution(k):
    """The tail of u^-k is exactly generalised Pareto, and the effect of the prior of ten draws is known."""
    uniform = (normals((4000, 2000)) / 2**0.5).erf() / 2 + 0.5
    tail = tail_length(4000)
    found = (pareto_shape(-k * uniform.log()) * (tail + 10) - 5) / tail
    assert abs(float(found.mean()) - k) < 0.02
    assert abs(float(found.std()) - (1 + k) / tail**0.5) < 0.3 * (1 + k) / tail**0.5  # of maximum likelihood


def test_proposals_of_known_tails():
    """The weights of a Cauchy under a Student-t of 3 degrees have shape 2/3; those of a normal under a Cauchy none."""
    torch.manual_seed(0)
    heavy, light = Cauchy(0.0, 1.0), StudentT(3.0)
    z = light.sample((100_000, 20))
    assert abs(float(pareto_shape((heavy.log_prob(z) - light.log_prob(z)).double()).mean()) - 2 / 3) < 0.1
    z = heavy.sample((100_000, 20))
    assert (pareto_shape((Normal(0.0, 1.0).log_prob(z) - heavy.log_prob(z)).double()) < 0).all()


def test_the_largest_weights_are_enough_in_any_order():
    log_weights = -0.6 * normals((1000, 7)).abs().log()
    top = log_weights.topk(tail_length(1000) + 1, dim=0).values
    shuffled = top[torch.randperm(len(top))]
    assert torch.equal(pareto_shape(shuffled, 1000), pareto_shape(log_weights))
    assert torch.equal(pareto_shape(log_weights.topk(300, dim=0).values, 1000), pareto_shape(log_weights))


def test_scale_and_order_of_data_make_no_difference():
    log_weights = normals((500, 9))
    found = pareto_shape(log_weights)
    torch.testing.assert_close(pareto_shape(log_weights + 1000.0), found, rtol=1e-9, atol=0)
    torch.testing.assert_close(pareto_shape(log_weights.flip(1)), found.flip(0), rtol=0, atol=1e-12)


def test_equal_weights_have_no_tail():
    noise = 1e-7 * normals((200, 3)).float()
    for level in (0.0, -100.0, 1e4):
        assert (pareto_shape(torch.full((200, 3), level)) == -math.inf).all()
        assert (pareto_shape(level + noise * (1 + abs(level))) == -math.inf).all()  # the rounding of an exact guide


def test_two_values_by_how_often_the_larger_one_is_drawn():
    log_weights = torch.zeros(100, 5).double()
    for datum, often in enumerate((3, 10, 19, 20, 50)):
        log_weights[:often, datum] = 1.0
    found = pareto_shape(log_weights)
    assert found[0] == math.inf  # seen three times
    assert (found[1:4] < 0.5).all()  # the fit is a distribution with an upper bound
    assert found[1:4].isfinite().all()
    assert found[4] == -math.inf
    # 100 equal exceedances have a grid of 40 points, of which one is b = 0.
    assert pareto_shape(torch.tensor([1.0] * 100 + [0.0] * 1900).double()[:, None]).isfinite().all()


def test_zeros_infinities_and_few_draws():
    log_weights = normals((100, 5))
    log_weights[:, 0] = log_weights[3:, 1] = -math.inf
    log_weights[0, 2:4] = torch.tensor([math.nan, math.inf])
    found = pareto_shape(log_weights)
    assert (found[:2] == math.inf).all()
    assert found[2:4].isnan().all()
    assert found[4].isfinite()
    for few in (1, 2, 5, 20):
        assert pareto_shape(normals((few, 4))).isnan().all()
    assert pareto_shape(normals((21, 4))).isfinite().all()


def test_thresholds():
    assert [tail_length(count) for count in (1, 20, 21, 225, 226, 1000)] == [1, 4, 5, 45, 46, 95]
    shapes = [reliable_shape(count) for count in (1, 10, 1000, 10**6)]
    assert shapes == [-math.inf, 0.0, pytest.approx(2 / 3), 0.7]


def test_too_few_weights_are_refused():
    with pytest.raises(ValueError, match=r"`log_weights` must be at least the 96 largest of 1000, got 90"):
        pareto_shape(torch.zeros(90, 2), 1000)


@pytest.mark.parametrize("num_samples", [100, 1000, 10_000])
def test_the_error_of_a_shape_is_the_spread_of_shapes_over_data(num_samples):
    """Of weights u^-k, whose tail is a generalised Pareto distribution at any cutoff."""
    uniform = 1 - torch.rand(num_samples, 1000, generator=torch.Generator().manual_seed(0)).double()
    for shape in (0.2, 0.5, 0.9):
        found = pareto_shape(-shape * uniform.log())
        error = shape_error(found, num_samples)
        assert float(error.mean() / found.std()) == pytest.approx(1, abs=0.15)
    edges = shape_error(torch.tensor([-math.inf, math.inf, math.nan]), num_samples)
    assert edges.tolist()[:2] == [0.0, math.inf]
    assert edges[2].isnan()


@pytest.mark.parametrize(("scale", "least", "most"), [
    (0.3, 0.0, 0.08), (0.1, 0.0, 0.06), (0.9, 0.97, 1.0), (1.2, 1.0, 1.0),
])  # fmt: skip
def test_weights_near_the_threshold_are_not_trusted_and_light_tails_are(scale, least, most):
    """Of a normal guide of s times the width of the posterior, with a tail of shape 1 - s^2: 0.91, 0.99, 0.19 and none.

    Without the error of k̂, a fifth of the data is trusted at 0.91, and most of these are off by 4 standard errors.
    """
    z = scale * normals((1000, 2000))
    evidence = pv.Evidence(torch.zeros(2000), torch.ones(2000), pareto_shape(0.5 * z**2 * (scale**-2 - 1)), 1000)
    assert least <= float((~evidence.unreliable).double().mean()) <= most
    assert bool((evidence.khat > evidence.reliable_khat).any()) <= bool(evidence.unreliable.any())
