"""Boxes are cut out and filled as torch's spatial transformer does, and the two functions undo each other."""

import pyro
import pytest
import torch
from torch.nn import functional

import pyro_vae as pv

SHAPE = (11, 17)
BOXES = torch.tensor([[7.0, 5.0, 8.0], [3.3, 2.1, 14.9], [20.0, 9.0, 3.0], [1.5, 10.9, 0.2]], dtype=torch.float64)


def torch_grid(boxes, source, target):
    """The sampling grid of torch: where each target pixel lies in the source, in [-1, 1], in the order column, row."""
    theta = boxes.new_zeros(len(boxes), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = target[:, 0], target[:, 1]
    theta[:, 0, 2], theta[:, 1, 2] = target[:, 2], target[:, 3]
    return functional.affine_grid(theta, [len(boxes), 1, *source], align_corners=False)


def sampled(images, grid):
    return functional.grid_sample(images[:, None], grid, padding_mode="zeros", align_corners=False)[:, 0]


def crop_by_torch(images, boxes, size):
    side, row, column = boxes.T
    (height, width) = images.shape[1:]
    target = torch.stack([side / width, side / height, 2 * column / width - 1, 2 * row / height - 1], 1)
    return sampled(images, torch_grid(boxes, (size, size), target))


def place_by_torch(objects, boxes, shape):
    side, row, column = boxes.T
    (height, width) = shape
    target = torch.stack([width / side, height / side, (width - 2 * column) / side, (height - 2 * row) / side], 1)
    return sampled(objects, torch_grid(boxes, shape, target))


@pytest.mark.parametrize("size", [1, 6])
def test_a_crop_is_that_of_grid_sample_with_its_gradients(size):
    images, boxes = torch.rand(4, *SHAPE, dtype=torch.float64, requires_grad=True), BOXES.clone().requires_grad_()
    found = pv.spatial.crop(images, boxes, size), crop_by_torch(images, boxes, size)
    assert torch.allclose(*found, atol=1e-12)
    weights = torch.rand(4, size, size, dtype=torch.float64)
    gradients = [torch.autograd.grad((one * weights).sum(), [images, boxes]) for one in found]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_a_placed_object_is_that_of_grid_sample_with_its_gradients():
    objects, boxes = torch.rand(4, 6, 6, dtype=torch.float64, requires_grad=True), BOXES.clone().requires_grad_()
    found = pv.spatial.place(objects, boxes, SHAPE), place_by_torch(objects, boxes, SHAPE)
    assert torch.allclose(*found, atol=1e-12)
    weights = torch.rand(4, *SHAPE, dtype=torch.float64)
    gradients = [torch.autograd.grad((one * weights).sum(), [objects, boxes]) for one in found]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_what_is_placed_on_whole_pixels_is_copied_and_cut_out_again():
    objects, box = torch.rand(3, 4, 4), torch.tensor([4.0, 5.0, 9.0])
    canvas = pv.spatial.place(objects, box, SHAPE)
    assert torch.allclose(canvas[:, 3:7, 7:11], objects, atol=1e-6)
    assert torch.allclose(canvas.sum((1, 2)), objects.sum((1, 2)), atol=1e-5)  # and nothing outside of the box
    assert torch.allclose(pv.spatial.crop(canvas, box, 4), objects, atol=1e-6)


def test_around_a_box_an_object_fades_over_half_of_its_own_pixels():
    placed = pv.spatial.place(torch.ones(2, 2), torch.tensor([8.0, 8.0, 8.0]), (16, 16))[8]
    beyond = torch.tensor([0.0, 0.0, 0.125, 0.375])  # two pixels beyond the box, which is from 4 to 12
    assert torch.equal(placed, torch.cat([beyond, 1 - beyond.flip(0), 1 - beyond, beyond.flip(0)]))


def test_dimensions_on_the_left_are_broadcast():
    objects, boxes = torch.rand(2, 1, 4, 4), torch.rand(5, 3) * 5 + 2
    canvas = pv.spatial.place(objects, boxes, SHAPE)
    assert canvas.shape == (2, 5, *SHAPE)
    assert torch.allclose(canvas[1, 3], pv.spatial.place(objects[1, 0], boxes[3], SHAPE))
    assert pv.spatial.crop(canvas, boxes, 4).shape == (2, 5, 4, 4)


def test_under_vmap_and_with_a_side_of_a_batch():
    images, boxes = torch.rand(4, *SHAPE, dtype=torch.float64), BOXES
    one_by_one = torch.vmap(lambda image, box: pv.spatial.crop(image, box, 5))(images, boxes)
    assert torch.allclose(one_by_one, pv.spatial.crop(images, boxes, 5))


def test_a_box_without_a_side_is_refused_where_values_are_validated():
    boxes = torch.tensor([[2.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    with pytest.raises(ValueError, match="`boxes` must have positive sides, got 0"):
        pv.spatial.place(torch.ones(2, 2, 2), boxes, (3, 3))
    with pyro.validation_enabled(False):  # as in a captured step, which cannot read a value
        assert pv.spatial.place(torch.ones(2, 2, 2), boxes, (3, 3)).shape == (2, 3, 3)
    assert pv.spatial.place(torch.ones(0, 2, 2), torch.ones(0, 3), (3, 3)).shape == (0, 3, 3)


def test_intersection_over_union_counts_shared_pixels():
    """Boxes with borders between pixels share and cover whole pixels, which can be counted."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.randint(1, 9, (200, 2, 1), generator=generator)
    corners = torch.randint(0, 8, (200, 2, 2), generator=generator)
    axis = torch.arange(20) + 0.5
    inside = ((axis > corners[..., None]) & (axis < (corners + sides)[..., None])).unbind(2)
    masks = inside[0][..., :, None] & inside[1][..., None, :]
    shared, covered = masks.all(1).sum((1, 2)), masks.any(1).sum((1, 2))
    boxes = torch.cat([sides, corners + sides / 2], -1)
    found = pv.spatial.intersection_over_union(boxes[:, 0], boxes[:, 1])
    assert 20 < (shared == 0).sum() < 180
    torch.testing.assert_close(found, shared / covered)
    assert torch.equal(found, pv.spatial.intersection_over_union(boxes[:, 1], boxes[:, 0]))


def test_intersection_over_union_broadcasts_and_keeps_nan():
    boxes = torch.tensor([[2.0, 3.0, 3.0], [4.0, 3.0, 3.0], [torch.nan] * 3])
    found = pv.spatial.intersection_over_union(boxes[:, None], boxes)
    expected = torch.tensor([[1.0, 0.25, torch.nan], [0.25, 1.0, torch.nan], [torch.nan] * 3])
    torch.testing.assert_close(found, expected, equal_nan=True)
