"""The data sets: the mixture has the law that it tells, the digits are scikit-learn's, and grey becomes 0 or 1."""

import math

import numpy as np
import pyro
import pytest
import torch
from scipy.stats import binomtest, kstest, multivariate_normal
from sklearn.datasets import load_digits

from pyro_vae import datasets

UNLIKELY = 1e-6
SCALES = [0.1, 0.7]


def centred(data):
    """What is left of each point without the centre of its cluster."""
    return data.x - (2.0 * data.labels - 1.0)[:, None]


# --- Two Gaussians ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("label", [0, 1])
def test_each_cluster_is_a_gaussian_whose_standard_deviation_is_the_scale(label, scale):
    data = datasets.two_gaussians(40_000, scale=scale, seed=3)
    noise = centred(data)[data.labels == label] / scale
    for column in noise.T:
        assert kstest(column, "norm").pvalue > UNLIKELY
    count = len(noise)
    assert (noise.mean(0).abs() < 4.5 / count**0.5).all()
    assert ((noise.std(0) - 1).abs() < 4.5 / (2 * count) ** 0.5).all()
    assert (noise[:, 0] * noise[:, 1]).mean().abs() < 4.5 / count**0.5


def test_the_default_scale_of_a_tenth_is_a_standard_deviation_and_no_variance():
    data = datasets.two_gaussians(40_000, seed=4)
    assert data.scale == 0.1
    assert centred(data).std().item() == pytest.approx(0.1, abs=4.5 * 0.1 / (2 * 80_000) ** 0.5)


def test_clusters_are_equally_likely_and_labels_name_them():
    data = datasets.two_gaussians(40_000, seed=5)
    assert data.labels.dtype == torch.long
    assert set(data.labels.tolist()) == {0, 1}
    assert binomtest(int(data.labels.sum()), len(data)).pvalue > UNLIKELY
    # Apart by 20 standard deviations, the sign of a point is its label.
    assert torch.equal(data.labels == 1, data.x.sum(1) > 0)


@pytest.mark.parametrize("scale", SCALES)
def test_density_integrates_to_one(scale):
    axis = torch.linspace(-1 - 8 * scale, 1 + 8 * scale, 801, dtype=torch.float64)
    cell = (axis[1] - axis[0]) ** 2
    density = datasets.two_gaussians(1, scale=scale).log_prob(torch.cartesian_prod(axis, axis)).exp()
    assert (density.sum() * cell).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("scale", SCALES)
def test_density_and_posterior_are_those_of_bayes_rule(scale):
    x = torch.randn(200, 2, dtype=torch.float64)
    truth = datasets.two_gaussians(1, scale=scale)
    joint = np.stack([0.5 * multivariate_normal([c, c], scale**2).pdf(x) for c in (-1.0, 1.0)])
    seen = joint.sum(0) > 1e-250  # scipy's densities underflow far away; ours are logarithms
    assert seen.sum() > 100
    np.testing.assert_allclose(truth.log_prob(x)[seen], np.log(joint.sum(0))[seen], rtol=1e-9)
    np.testing.assert_allclose(truth.posterior(x)[seen], (joint[1] / joint.sum(0))[seen], rtol=1e-9, atol=1e-12)


def test_posterior_log_odds_are_linear_in_x():
    x = 0.1 * torch.randn(50, 2, dtype=torch.float64)
    truth = datasets.two_gaussians(1, scale=0.3)
    torch.testing.assert_close(truth.posterior(x).logit(), 2 * x.sum(-1) / 0.3**2, rtol=1e-8, atol=1e-8)


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


def test_log_prob_and_posterior_keep_leading_dimensions_and_dtype():
    truth = datasets.two_gaussians(1)
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    for function in (truth.log_prob, truth.posterior):
        assert function(x).shape == (4, 3)
        assert function(x).dtype == torch.float64
        torch.testing.assert_close(function(x)[1, 2], function(x[1, 2]))


@pytest.mark.parametrize("scale", SCALES)
def test_one_seed_gives_the_same_data_and_another_fresh_data(scale):
    first, again, other = (datasets.two_gaussians(100, scale=scale, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, other.labels)
    assert not (first.x[:, None] == other.x).any()


def test_shapes_and_length():
    data = datasets.two_gaussians(7)
    assert (data.x.shape, data.labels.shape, len(data)) == ((7, 2), (7,), 7)
    assert data.x.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("make", [lambda: datasets.two_gaussians(10), lambda: datasets.digits("test")])
def test_the_users_random_streams_are_untouched(make, random_states):
    before = random_states()
    make()
    assert random_states() == before


@pytest.mark.parametrize("scale", [0.0, -0.1, math.inf, math.nan])
def test_an_unusable_scale_is_refused_with_what_was_given(scale):
    with pytest.raises(ValueError, match=rf"`scale` must be .*got {scale}"):
        datasets.two_gaussians(10, scale=scale)


@pytest.mark.parametrize("num_points", [0, -1, 2.5, True])
def test_an_unusable_number_of_points_is_refused_with_what_was_given(num_points):
    with pytest.raises(ValueError, match=rf"`num_points` must be a positive.*got {num_points}"):
        datasets.two_gaussians(num_points)


# --- Digits ----------------------------------------------------------------------------------------------------------


def images(dataset):
    """Each image as a row of numbers that can be compared, with its label."""
    return [(*(16 * row).int().tolist(), label) for row, label in zip(dataset.x, dataset.labels.tolist(), strict=True)]


def test_digits_are_those_of_scikit_learn_each_with_its_label():
    bunch = load_digits()
    theirs = sorted((*row.astype(int).tolist(), label) for row, label in zip(bunch.data, bunch.target, strict=True))
    assert sorted(images(datasets.digits())) == theirs


def test_the_split_is_disjoint_and_complete():
    train, test, everything = (datasets.digits(split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (1500, 297, 1797)
    assert images(train) + images(test) == images(everything)
    assert not set(images(train)) & set(images(test))


def test_every_digit_is_in_both_parts_of_the_split():
    for split in ("train", "test"):
        shares = datasets.digits(split).labels.bincount() / len(datasets.digits(split))
        assert len(shares) == 10
        assert shares.min() > 0.05


def test_grey_values_are_sixteenths_between_0_and_1():
    x = datasets.digits().x
    assert x.shape == (1797, 64)
    assert x.dtype == torch.get_default_dtype()
    assert torch.equal(16 * x, (16 * x).round())
    assert (x.min(), x.max()) == (0, 1)


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5])
def test_pixels_strictly_above_the_threshold_are_1(threshold):
    grey = datasets.digits("test").x
    binary = datasets.binarize(grey, threshold=threshold)
    assert torch.equal(binary == 1, grey > threshold)
    assert torch.equal(binary == 0, grey <= threshold)
    assert binary.dtype == grey.dtype


@pytest.mark.parametrize(
    ("make", "accepted"), [(datasets.digits, "'train', 'test', 'all'"), (datasets.mnist, "'train', 'test'")]
)
def test_an_unknown_split_is_refused_with_the_known_ones(make, accepted):
    with pytest.raises(ValueError, match=rf"`split` must be {accepted}$.*got 'valid'"):
        make("valid")


# --- What a likelihood takes -----------------------------------------------------------------------------------------

BYTES = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
RECIPES = [datasets.grey, datasets.binarize, datasets.resample]


def test_grey_values_of_bytes_are_their_255ths():
    values = datasets.grey(BYTES)
    assert values.dtype == torch.get_default_dtype()
    torch.testing.assert_close(values, torch.arange(256).reshape(2, 128) / 255, rtol=0, atol=0)
    assert torch.equal((255 * values).round().to(torch.uint8), BYTES)


def test_grey_values_are_of_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert datasets.grey(BYTES).dtype == datasets.binarize(BYTES).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_grey_values_that_are_already_there_stay_as_they_are(dtype):
    values = torch.rand(5, 3).to(dtype)
    assert torch.equal(datasets.grey(values), values)
    assert datasets.grey(values).dtype == datasets.binarize(values).dtype == datasets.resample(values).dtype == dtype


def test_bytes_are_split_in_the_middle():
    assert torch.equal(datasets.binarize(BYTES), (BYTES >= 128).float())


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_and_their_grey_values_are_alike(recipe):
    pyro.set_rng_seed(1)
    of_bytes = recipe(BYTES)
    pyro.set_rng_seed(1)
    assert torch.equal(of_bytes, recipe(datasets.grey(BYTES)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_data_stay_as_they_were(recipe):
    data = BYTES.clone()
    result = recipe(data)
    assert torch.equal(data, BYTES)
    assert result.shape == data.shape


def test_resampled_pixels_are_0_or_1_with_the_grey_value_as_mean():
    grey = datasets.grey(BYTES)
    draws = datasets.resample(BYTES.expand(20_000, *BYTES.shape))
    assert set(draws.unique().tolist()) == {0, 1}
    # 256 means, each within 5.5 standard errors: a failure of probability 1e-5 in all; black and white are certain.
    assert ((draws.mean(0) - grey).abs() <= 5.5 * (grey * (1 - grey) / 20_000) ** 0.5).all()
    assert (draws[:, 0, 0] == 0).all()
    assert (draws[:, -1, -1] == 1).all()


def test_resampled_pixels_are_independent():
    draws = datasets.resample(torch.full((40_000, 8), 0.3))
    correlation = torch.corrcoef(draws.T) - torch.eye(8)
    assert correlation.abs().max() < 5.5 / 40_000**0.5


def test_resampling_draws_anew_each_time_and_again_with_the_same_seed():
    pyro.set_rng_seed(3)
    first, second = datasets.resample(BYTES), datasets.resample(BYTES)
    pyro.set_rng_seed(3)
    again = datasets.resample(BYTES)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("recipe", [datasets.grey, datasets.binarize])
def test_nothing_is_drawn_where_nothing_is_random(recipe, random_states):
    before = random_states()
    recipe(BYTES)
    assert random_states() == before


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.tensor([0, 255]), "torch.int64 from 0 to 255"),
        (torch.tensor([0, 127], dtype=torch.int8), "torch.int8 from 0 to 127"),
        (torch.tensor([0.0, 255.0]), "torch.float32 from 0 to 255"),
        (torch.tensor([-0.5, 1.0]), "torch.float32 from -0.5 to 1"),
        (torch.tensor([False, True]), "torch.bool from 0 to 1"),
    ],
)
def test_what_is_neither_bytes_nor_grey_values_is_refused_with_what_was_given(recipe, x, found):
    with pytest.raises(ValueError, match=rf"`x` must be bytes \(torch.uint8\), or grey values.*got {found}"):
        recipe(x)


@pytest.mark.parametrize("recipe", RECIPES)
def test_grey_values_that_are_no_numbers_are_refused(recipe):
    with pytest.raises(ValueError, match=r"`x` must be .*got torch\.float32"):
        recipe(torch.tensor([0.5, math.nan]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_that_are_0_and_1_are_refused(recipe):
    """As grey values they would be black all over."""
    x = torch.tensor([[0, 1, 1]], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"`x` must be .*got bytes that are 0 and 1, .* binary as `x\.float\(\)`"):
        recipe(x)
    recipe(0 * x)  # a black image is one


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_values_at_all_are_grey_or_refused_by_their_type(recipe):
    for dtype in (torch.uint8, torch.float32):
        assert recipe(torch.zeros(0, 3, dtype=dtype)).shape == (0, 3)
        assert recipe(torch.zeros(3, 0, dtype=dtype)).shape == (3, 0)
    with pytest.raises(ValueError, match=r"`x` must be bytes.*got no values, torch\.int64"):
        recipe(torch.zeros(0, 3, dtype=torch.int64))


def test_a_threshold_is_told_by_name():
    """As a transform of two tensors, ``binarize`` would take the second for it."""
    with pytest.raises(TypeError, match="positional"):
        datasets.binarize(torch.rand(3), torch.rand(3))
