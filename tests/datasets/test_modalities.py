"""Hidden modalities, and measurements of images whose answers are known."""

import math
from functools import partial

import pyro
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, priors


def test_each_modality_is_hidden_as_often_as_said_but_one_is_kept():
    torch.manual_seed(0)
    n, share, modalities = 20_000, 0.4, [torch.rand(20_000, 3), torch.rand(20_000, 2, 2), torch.rand(20_000, 1)]
    found = datasets.hide_modalities(*modalities, share=share)
    hidden = torch.stack([x.isnan().flatten(1).all(1) for x in found], 1)
    for x, before in zip(found, modalities, strict=True):
        kept = ~x.isnan()
        assert torch.equal(x[kept], before[kept])
        assert torch.equal(kept.flatten(1).any(1), kept.flatten(1).all(1)), "a modality is hidden whole"
    assert not hidden.all(1).any()
    # All three would be hidden with probability share³; then each is the one that is kept in a third of the cases.
    expected = share - share**3 / 3
    assert (hidden.double().mean(0) - expected).abs().max() < 5 * math.sqrt(expected * (1 - expected) / n)


def test_what_is_missing_stays_missing_and_is_not_the_one_that_is_kept():
    first, second = torch.rand(100, 2), torch.rand(100, 1)
    first[:50] = torch.nan
    found = datasets.hide_modalities(first, second, share=1.0)
    assert found[0][:50].isnan().all()
    assert not found[1][:50].isnan().any()
    assert (found[0][50:].isnan().all(1) != found[1][50:].isnan().all(1)).all()
    nothing = datasets.hide_modalities(first, second, share=0.0)
    torch.testing.assert_close(nothing, (first, second), equal_nan=True)
    empty = datasets.hide_modalities(*(torch.full((3, 2), torch.nan) for _ in range(2)))
    assert all(x.isnan().all() for x in empty)


class Pair(nn.Module):
    """Two modalities of one latent, with a product of experts."""

    def __init__(self):
        super().__init__()
        net = networks.linear()
        self.a, self.b = (likelihoods.Normal(1, size, net, scale=0.5, missing=True) for size in (2, 3))
        self.q = guides.ProductOfExperts([guides.DiagonalNormal(size, 1, net) for size in (2, 3)])

    def model(self, a, b):
        pyro.module("pair", self)
        with pyro.plate("data", len(a)):
            a, b = (pyro.subsample(x, event_dim=1) for x in (a, b))
            z = pyro.sample("z", priors.StandardNormal(1)())
            pyro.sample("a", self.a(z), obs=a)
            pyro.sample("b", self.b(z), obs=b)

    def guide(self, a, b):
        pyro.module("pair", self)
        with pyro.plate("data", len(a)):
            pyro.sample("z", self.q(torch.cat([pyro.subsample(x, event_dim=1) for x in (a, b)], 1)))


def test_a_guide_that_is_trained_on_hidden_modalities_is_the_posterior_given_any_of_them():
    torch.manual_seed(0)
    pair, z = Pair(), torch.randn(300, 1)
    data = [(part(2 * z).sample()) for part in (pair.a, pair.b)]
    hide = partial(datasets.hide_modalities, share=0.5)
    for lr in (2e-2, 2e-3):
        pv.fit(pair.model, pair.guide, data, epochs=60, batch_size=100, lr=lr, transform=hide)
    for given in (data, (data[0], data[1] * torch.nan), (data[0] * torch.nan, data[1])):
        assert pv.exact.kl(pair.model, pair.guide, *given).mean() < 0.02


def test_measurements_of_images_that_are_drawn_by_hand():
    images = torch.zeros(5, 12, 10)
    images[0, 2:10, 4] = 1.0  # an upright stroke
    for row in range(2, 10):
        images[1, row, 10 - row] = 1.0  # one column to the right for each row upwards
    images[2, 2:9, 2:7] = 1.0
    images[2, 3:8, 3:6] = 0.0  # a ring
    images[3, 1:10, 2:7] = 1.0
    images[3, 2:5, 3:6] = images[3, 6:9, 3:6] = 0.0  # two rings, one above the other
    images[4] = 0.25  # constant
    ink, slant, width, holes = datasets.measure_images(images, (12, 10)).T
    torch.testing.assert_close(ink.exp(), images.sum((1, 2)))
    torch.testing.assert_close(slant, torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]), atol=1e-6, rtol=0)
    spread = math.sqrt((8**2 - 1) / 12) / 10  # of eight columns in a row
    torch.testing.assert_close(width[:2], torch.tensor([0.0, spread]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(width[4], torch.tensor(math.sqrt((10**2 - 1) / 12) / 10))
    assert holes.tolist() == [0, 0, 1, 2, 0]


def test_an_image_of_a_single_row_has_no_slant():
    images = torch.zeros(3, 8, 8)
    images[0, 7], images[1, 3, 2:5], images[2, 5, 5] = 0.7, torch.tensor([0.1, 0.3, 0.9]), 1.0
    assert datasets.measure_images(images, (8, 8))[:, 1].tolist() == [0, 0, 0]


def test_measurements_are_of_bytes_and_grey_values_alike_and_mirror_the_slant():
    x = datasets.digits("test").x[:50]
    measured = datasets.measure_images(x, (8, 8))
    torch.testing.assert_close(datasets.measure_images(x.reshape(-1, 8, 8), (8, 8)), measured)
    as_bytes = datasets.measure_images((255 * x).round().to(torch.uint8), (8, 8))
    torch.testing.assert_close(as_bytes[:, :3], measured[:, :3], atol=2e-3, rtol=2e-3)
    mirrored = datasets.measure_images(x.reshape(-1, 8, 8).flip(2), (8, 8))
    torch.testing.assert_close(mirrored, measured * torch.tensor([1.0, -1.0, 1.0, 1.0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: datasets.hide_modalities(torch.rand(3, 2)), "`modalities` must be two or more floats, .*got 1"),
        (lambda: datasets.hide_modalities(torch.rand(3, 2), torch.rand(4, 2)), r"same N data, got shapes .*\(4, 2\)"),
        (lambda: datasets.hide_modalities(torch.rand(3, 2), torch.ones(3, 1).long()), "must be two or more floats"),
        (lambda: datasets.hide_modalities(torch.rand(3, 2), torch.rand(3, 2), share=1.5), "`share` must be .*got 1.5"),
        (lambda: datasets.measure_images(torch.rand(3, 60), (8, 8)), r"`x` must be images \(N, 64\)"),
        (lambda: datasets.measure_images(torch.zeros(3, 64), (8, 8)), "`x` must be .*not all 0, got one in row 0"),
    ],
)
def test_what_are_no_modalities_or_images_is_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
