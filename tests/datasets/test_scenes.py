"""Scenes have the digits, numbers and boxes that they report."""

import pytest
import torch
from scipy.stats import chisquare

import pyro_vae as pv
from pyro_vae import datasets

UNLIKELY = 1e-6


def make(num=200, **options):
    return datasets.digit_scenes(datasets.digits("train"), num, **{"size": 24, "sides": (8, 10)} | options)


def test_each_number_of_digits_is_equally_frequent():
    scenes = make(3000, max_digits=3)
    assert chisquare(scenes.labels.bincount()).pvalue > UNLIKELY
    present = scenes.digits >= 0
    assert torch.equal(present.sum(1), scenes.labels)
    assert torch.equal(present, ~scenes.boxes[..., 0].isnan())
    assert chisquare(scenes.digits[present].bincount()).pvalue > UNLIKELY / 100  # the digits themselves are nearly so


def test_a_box_at_its_own_size_has_the_pixels_of_one_digit():
    digits = datasets.digits("train")
    scenes = datasets.digit_scenes(digits, 300, size=24, sides=(8, 8), max_digits=1)
    images, there = scenes.x.reshape(-1, 24, 24), scenes.labels == 1
    cut = pv.spatial.crop(images[there], scenes.boxes[there, 0], 8).flatten(1)
    distances = torch.cdist(cut, digits.x, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(1).values.max() < 1e-5
    assert torch.equal(digits.labels[distances.argmin(1)], scenes.digits[there, 0])
    assert (scenes.x[~there] == 0).all()
    assert torch.allclose(scenes.x[there].sum(1), cut.sum(1), rtol=1e-5)  # there is no ink outside of the box


def test_digits_share_no_pixel_and_all_sides_occur():
    scenes = make(400)
    two = scenes.labels == 2
    sides = scenes.boxes[..., 0]
    assert set(sides[~sides.isnan()].tolist()) == {8.0, 9.0, 10.0}
    low = scenes.boxes[two, :, 1:] - scenes.boxes[two, :, :1] / 2
    assert (low >= 0).all()
    assert (low + scenes.boxes[two, :, :1] <= 24).all()
    assert scenes.x.max() <= 1


def test_a_seed_gives_the_same_scenes_and_another_seed_others():
    before = torch.get_rng_state()
    one, same, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.x, same.x)
    assert torch.equal(one.labels, same.labels)
    assert not torch.equal(one.x, other.x)


def test_bytes_are_grey_values():
    digits = datasets.digits("train")
    stored = datasets.Dataset((digits.x * 255).round().to(torch.uint8), digits.labels)
    found, expected = (datasets.digit_scenes(one, 50, size=24, sides=(8, 10)).x for one in (stored, digits))
    assert torch.allclose(found, expected, atol=0.01)


def test_scenes_have_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        scenes = make()
    finally:
        torch.set_default_dtype(torch.float32)
    assert scenes.x.dtype == scenes.boxes.dtype == torch.float64


def test_digits_that_find_no_place_are_refused():
    full = datasets.Dataset(torch.ones(1, 64), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="`size` must leave room for 2 digits of 8 to 8 pixels, got 10"):
        datasets.digit_scenes(full, 20, size=10, sides=(8, 8))


@pytest.mark.parametrize("sides", [(8,), (10, 8), (0, 8), (8, 25), 8, "ab", (8.0, 9.0)])
def test_sides_are_two_integers_that_fit(sides):
    with pytest.raises(ValueError, match="`sides` must be two positive integers, the smallest and the largest side"):
        make(sides=sides)


def test_images_must_be_square():
    with pytest.raises(ValueError, match=r"`digits` must be a Dataset of square images, .*\(3, 5\) with 3 labels"):
        datasets.digit_scenes(datasets.Dataset(torch.zeros(3, 5), torch.zeros(3)), 3)
