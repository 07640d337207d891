"""Scenes of shapes: their masks are what is seen, their pixels mix the colours, and a seed fixes them."""

import pytest
import torch

from pyro_vae import datasets
from pyro_vae.datasets.coloured_scenes import _COLOURS, _coverage


@pytest.fixture(scope="module")
def scenes():
    return datasets.shape_scenes(300, seed=3)


def test_a_seed_fixes_the_scenes_and_leaves_the_random_states_alone(random_states):
    before = random_states()
    one, same, other = (datasets.shape_scenes(20, seed=seed) for seed in (0, 0, 1))
    assert random_states() == before
    assert torch.equal(one.x, same.x)
    assert torch.equal(one.masks, same.masks)
    assert not torch.equal(one.x, other.x)


def test_each_count_is_equally_frequent_and_every_shape_is_seen(scenes):
    assert (scenes.x.shape, scenes.masks.shape) == ((300, 3 * 24 * 24), (300, 24 * 24))
    assert (scenes.x.min() >= 0, scenes.x.max() <= 1, scenes.x.dtype) == (True, True, torch.get_default_dtype())
    counts = scenes.labels.bincount()
    assert counts[:2].tolist() == [0, 0]
    assert bool(((counts[2:] - 100).abs() < 5 * (300 * 2 / 9) ** 0.5).all())
    for mask, count in zip(scenes.masks, scenes.labels.tolist(), strict=True):
        assert mask.unique().tolist() == list(range(count + 1))


def test_the_background_is_one_dark_colour_and_shapes_have_two_bright_ones(scenes):
    pixels, colours = scenes.x.reshape(300, 3, -1), torch.tensor(_COLOURS)
    for image, mask in zip(pixels[:50], scenes.masks[:50], strict=True):
        background = image[:, mask == 0].mode(1).values
        assert background.max() <= 0.35
        for number in range(1, int(mask.max()) + 1):
            inside = image[:, mask == number].T
            pure = {int(index) for index in torch.cdist(inside, colours).lt(1e-3).nonzero()[:, 1]}
            assert len(pure) <= 2
    pure = torch.cdist(pixels.mT.reshape(-1, 3), colours).lt(1e-3).any(1)[(scenes.masks > 0).flatten()]
    assert pure.double().mean() > 0.4  # the others are on an edge


def test_coverage_adds_up_to_the_area_of_the_shape():
    kinds, width, size = torch.tensor([[0, 1, 2]]), torch.full((1, 3), 0.5), 96
    found = _coverage(kinds, torch.zeros(2, 1, 3), width, size).sum((-1, -2))[0] * (2 / size) ** 2
    # A square of side 1, an ellipse with half axes 0.5 and 0.3, a triangle of base 1 and height 1.
    expected = torch.tensor([1.0, torch.pi * 0.5 * 0.3, 0.5])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


def test_a_later_shape_covers_an_earlier_one(scenes):
    """A shape that touches no other has all its pixels; of one that is covered, at least 60 % are seen."""
    sizes = torch.stack([(scenes.masks == number).sum(1) for number in range(1, 5)], 1)
    last = sizes.gather(1, scenes.labels[:, None] - 1)
    assert last.min() >= 0.6 * 0.24**2 * 12**2  # the smallest shape, an ellipse or a triangle, has more
    narrow = datasets.shape_scenes(50, counts=(1, 1), seed=0)
    assert narrow.labels.eq(1).all()


def test_shapes_that_find_no_place_are_refused(monkeypatch):
    monkeypatch.setattr("pyro_vae.datasets.coloured_scenes._ROUNDS", 1)
    with pytest.raises(ValueError, match=r"`counts` must be numbers of shapes that fit into a scene, got \(6, 6\)"):
        datasets.shape_scenes(50, counts=(6, 6))


def test_scenes_have_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert datasets.shape_scenes(2).x.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
