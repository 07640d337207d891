"""Shapes are drawn as their factors state; patches are those of the photographs, and none of two splits meet."""

import colorsys
import math

import pytest
import torch
from sklearn.datasets import load_sample_images

from pyro_vae import datasets


def test_shapes_are_deterministic_and_other_seeds_are_others(random_states):
    before = random_states()
    one, again, other = datasets.shapes(300), datasets.shapes(300, seed=0), datasets.shapes(300, seed=1)
    assert random_states() == before
    assert torch.equal(one.x, again.x)
    assert not torch.equal(one.x, other.x)
    assert torch.equal(datasets.shapes(10).labels, datasets.shapes(10).factors["shape"].long())
    assert "values of each factor" in one._repr_html_()


def test_noise_has_its_standard_deviation_and_leaves_the_factors_as_they_are():
    clean, noisy = datasets.shapes(100), datasets.shapes(100, noise=8.0)
    assert all(torch.equal(clean.factors[name], noisy.factors[name]) for name in clean.factors)
    inner = (clean.x > 40) & (clean.x < 215)  # far from the ends, where noise is clipped
    difference = (noisy.x.double() - clean.x.double())[inner]
    error = (64 + 1 / 12) ** 0.5 / (2 * len(difference)) ** 0.5
    assert abs(difference.std().item() - (64 + 1 / 12) ** 0.5) < 5 * error
    assert abs(difference.mean().item()) < 5 * 8 / len(difference) ** 0.5
    assert noisy.x.min() == 0


def test_factors_are_uniform_and_independent():
    factors = datasets.shapes(4000).factors
    codes = {name: values.unique(return_inverse=True)[1] for name, values in factors.items()}
    for name, code in codes.items():
        counts = code.bincount()
        assert ((counts - 4000 / len(counts)).abs() < 6 * (4000 / len(counts)) ** 0.5).all()
        for other, second in codes.items():
            if name < other:
                correlation = torch.corrcoef(torch.stack([code, second]).double())[0, 1]
                assert abs(correlation) < 6 / 4000**0.5


def test_each_image_has_the_colours_the_place_and_the_area_of_its_factors():
    data = datasets.shapes(200)
    images = data.x.reshape(-1, 3, 32, 32).double()
    factors = {name: values.double() for name, values in data.factors.items()}
    grey = 255 * factors["background"]
    pure = torch.tensor([colorsys.hsv_to_rgb(hue, 1, 1) for hue in factors["hue"].tolist()]).double()
    corner = images[:, :, 0, 0]
    torch.testing.assert_close(corner, grey.round()[:, None].expand(-1, 3))
    # A channel that differs most between colour and background gives the coverage of each pixel.
    difference = 255 * pure - grey[:, None]
    channel = difference.abs().argmax(1)
    rows = torch.arange(200)
    coverage = (images[rows, channel] - grey[:, None, None]) / difference[rows, channel][:, None, None]
    torch.testing.assert_close(16 * coverage, (16 * coverage).round(), rtol=0, atol=0.1)
    size = factors["size"] * 16  # in pixels
    area = {0: 4.0, 1: math.pi * 0.6, 2: 2.0}  # of each shape with the half width 1
    expected = size**2 * torch.tensor([area[label] for label in data.labels.tolist()])
    found = coverage.sum((1, 2))
    assert ((found - expected).abs() <= size).all()  # an eighth of a pixel, half the step of points, along the edge
    assert abs((found / expected).mean() - 1) < 0.01
    axis = torch.arange(32) + 0.5 - 16
    centre = torch.stack([(coverage * axis).sum((1, 2)), (coverage * axis[:, None]).sum((1, 2))]) / coverage.sum((1, 2))
    lower = torch.where(data.labels == 2, size * (0.8 - 2.0 / 3), 0.0)  # a triangle's centre of mass, along its axis
    angle = factors["angle"] * math.pi / 180
    torch.testing.assert_close(centre[0], 16 * factors["x"] - lower * angle.sin(), rtol=0, atol=0.12)
    torch.testing.assert_close(centre[1], 16 * factors["y"] + lower * angle.cos(), rtol=0, atol=0.12)


def test_the_angle_turns_the_long_axis_of_an_ellipse():
    data = datasets.shapes(400)
    chosen = data.labels == 1
    factors = {name: values[chosen].double() for name, values in data.factors.items()}
    images = data.x[chosen].reshape(-1, 3, 32, 32).double()
    weight = (images - images[:, :, :1, :1]).abs().sum(1)
    axis = (torch.arange(32) + 0.5) / 16 - 1
    right, down = axis - factors["x"][:, None, None], axis[:, None] - factors["y"][:, None, None]
    moments = [(weight * each).sum((1, 2)) for each in (right**2, right * down, down**2)]
    found = 0.5 * torch.atan2(2 * moments[1], moments[0] - moments[2])
    torch.testing.assert_close(found, factors["angle"] * math.pi / 180, rtol=0, atol=0.06)


@pytest.mark.parametrize("stride", [8, 32])
def test_patches_are_those_of_the_photographs_and_the_splits_share_no_pixel(stride):
    marked = [torch.zeros(427, 640, dtype=torch.long) for _ in range(2)]
    for bit, split in ((1, "train"), (2, "test")):
        data = datasets.photograph_patches(split, stride=stride)
        assert data.labels.unique().tolist() == [0, 1]
        places = iter(data.x.reshape(-1, 3, 32, 32))
        for label, photograph in enumerate(load_sample_images().images):
            pixels = torch.tensor(photograph).movedim(2, 0)
            step = 32 if split == "test" else stride
            windows = pixels.unfold(1, 32, stride).unfold(2, 32, step)
            count = int((data.labels == label).sum())
            for patch in [next(places) for _ in range(count)][:: max(1, count // 12)]:
                rows = (windows == patch[:, None, None]).all(0).all((-1, -2)).nonzero()
                assert len(rows) >= 1
                top, left = rows[0, 0] * stride, rows[0, 1] * step
                marked[label][top : top + 32, left : left + 32] |= bit
    assert not any((each == 3).any() for each in marked)


def test_a_wrong_split_or_stride_names_what_is_accepted():
    with pytest.raises(ValueError, match="`split` must be one of 'train', 'test', got 'all'"):
        datasets.photograph_patches("all")
    with pytest.raises(ValueError, match="`stride` must be an integer from 1 to 32, got 33"):
        datasets.photograph_patches(stride=33)
