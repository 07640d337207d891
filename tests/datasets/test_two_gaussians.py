"""The mixture has the density and the posterior that it reports."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, kstest, multivariate_normal

from pyro_vae import datasets

UNLIKELY = 1e-6
SCALES = [0.1, 0.7]
UNUSABLE = {"scale": [0.0, -0.1, math.inf, math.nan], "num_points": [0, -1, 2.5, True]}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("label", [0, 1])
def test_each_cluster_is_a_gaussian_whose_standard_deviation_is_the_scale(label, scale):
    data = datasets.two_gaussians(40_000, scale=scale, seed=3)
    noise = (data.x[data.labels == label] - (2.0 * label - 1.0)) / scale
    for column in noise.T:
        assert kstest(column, "norm").pvalue > UNLIKELY
    tolerance = 4.5 / len(noise) ** 0.5
    assert (noise.mean(0).abs() < tolerance).all()
    assert ((noise.std(0) - 1).abs() < tolerance / 2**0.5).all()
    assert (noise[:, 0] * noise[:, 1]).mean().abs() < tolerance


def test_clusters_are_equally_likely_and_labels_name_them():
    data = datasets.two_gaussians(40_000, seed=5)
    assert (data.labels.dtype, set(data.labels.tolist())) == (torch.long, {0, 1})
    assert binomtest(int(data.labels.sum()), len(data)).pvalue > UNLIKELY
    # Apart by 20 standard deviations, the sign of a point is its label.
    assert torch.equal(data.labels == 1, data.x.sum(1) > 0)


@pytest.mark.parametrize("scale", SCALES)
def test_density_and_posterior_are_those_of_bayes_rule(scale):
    x, truth = torch.randn(200, 2, dtype=torch.float64), datasets.two_gaussians(1, scale=scale)
    joint = np.stack([0.5 * multivariate_normal([c, c], scale**2).pdf(x) for c in (-1.0, 1.0)])
    seen = joint.sum(0) > 1e-250  # scipy's densities underflow far away; ours are logarithms
    assert seen.sum() > 100
    np.testing.assert_allclose(truth.log_prob(x)[seen], np.log(joint.sum(0))[seen], rtol=1e-9)
    np.testing.assert_allclose(truth.posterior(x)[seen], (joint[1] / joint.sum(0))[seen], rtol=1e-9, atol=1e-12)


def test_posterior_is_calibrated_where_clusters_overlap():
    data = datasets.two_gaussians(40_000, scale=1.5, seed=6)
    error = data.labels - data.posterior(data.x)
    assert error.mean().abs() < 4.5 * error.std() / len(data) ** 0.5
    unsure = (data.posterior(data.x) - 0.5).abs() < 0.2
    assert unsure.sum() > 1000
    assert error[unsure].mean().abs() < 4.5 * error[unsure].std() / unsure.sum() ** 0.5


def test_expected_log_density_is_the_documented_number():
    data = datasets.two_gaussians(1_000_000, seed=7)
    log_density = data.log_prob(data.x).double()
    expected = -math.log(2 * math.pi * 0.01) - 1 - math.log(2)
    assert expected == pytest.approx(1.0741, abs=5e-5)
    assert (log_density.mean() - expected).abs() < 4.5 * log_density.std() / len(data) ** 0.5


def test_shapes_length_and_dtypes():
    truth, x = datasets.two_gaussians(1), torch.randn(4, 3, 2, dtype=torch.float64)
    for function in (truth.log_prob, truth.posterior):
        assert (function(x).shape, function(x).dtype) == ((4, 3), torch.float64)
        torch.testing.assert_close(function(x)[1, 2], function(x[1, 2]))
    data = datasets.two_gaussians(7)
    assert (data.x.shape, data.labels.shape, len(data), data.scale) == ((7, 2), (7,), 7, 0.1)
    assert data.x.dtype == torch.get_default_dtype()
    assert torch.equal(data.x, datasets.two_gaussians(7, scale=0.1).x)


@pytest.mark.parametrize("scale", SCALES)
def test_one_seed_gives_the_same_data_and_another_fresh_data(scale, random_states):
    before = random_states()
    first, again, other = (datasets.two_gaussians(100, scale=scale, seed=seed) for seed in (0, 0, 1))
    assert random_states() == before
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, other.labels)
    assert not (first.x[:, None] == other.x).any()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in UNUSABLE for value in UNUSABLE[name]])
def test_unusable_numbers_are_refused_with_what_was_given(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be a positive.*got {value}"):
        datasets.two_gaussians(**{"num_points": 10, name: value})
