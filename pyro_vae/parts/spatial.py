r"""Square boxes of images: cut them out, put objects into them, differentiable in the box, and compare boxes.

A box has a side s and a centre in row r and column c, in pixels from the upper left corner of the image: its rows are
those from r - s/2 to r + s/2. Pixel i of an image is the square from i to i + 1, so that its centre is i + 1/2.

With Pyro's validation, which is on by default, a side that is not positive is refused.

:func:`crop` and :func:`place` are spatial transformers (Jaderberg et al. 2015) without rotation, whose bilinear
interpolation is a product of two matrices, :math:`A_r\, X\, A_c^\top`, one for rows and one for columns.
"""

from collections.abc import Sequence

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_vae._utils.validation import broadcasts, describe, is_integer, positive_int, real_tensor
from pyro_vae.compilation.torch_private import is_batched

__all__ = ["crop", "intersection_over_union", "place"]


def crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut out a box of each image, resized to ``size`` by bilinear interpolation.

    Outside of the image there are zeros, to which the border fades over half a pixel of the image on both sides.

    Args:
        images: ``(*, H, W)``.
        boxes: ``(*, 3)``, side, which is positive, row and column, of the same dtype; dimensions on the left are
            broadcast.
        size: height and width K of the results.

    Returns:
        ``(*, K, K)``.

    >>> image = torch.arange(16.0).reshape(4, 4)
    >>> crop(image, torch.tensor([2.0, 3.0, 3.0]), 2)  # the lower right quarter
    tensor([[10., 11.],
            [14., 15.]])
    """
    _check(images, "images", boxes)
    positive_int(size, "size")
    side, *centre = boxes.unbind(-1)
    steps = (torch.arange(size, dtype=boxes.dtype, device=boxes.device) + 0.5) / size - 0.5
    down, right = (
        _weights(middle[..., None] + side[..., None] * steps - 0.5, length)
        for middle, length in zip(centre, images.shape[-2:], strict=True)
    )
    return down @ images @ right.mT


def place(objects: Tensor, boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """Put each object into a box of an empty canvas, by bilinear interpolation.

    Around the box there are zeros, to which the object fades over half a pixel of its own on both sides of the border:
    an object that is enlarged shines through a little beyond its box.

    Args:
        objects: ``(*, K, L)``.
        boxes: ``(*, 3)``, side, which is positive, row and column, of the same dtype; dimensions on the left are
            broadcast.
        shape: height H and width W of the canvas.

    Returns:
        ``(*, H, W)``.

    >>> place(torch.ones(2, 2), torch.tensor([2.0, 1.0, 2.0]), (3, 4))
    tensor([[0., 1., 1., 0.],
            [0., 1., 1., 0.],
            [0., 0., 0., 0.]])
    """
    _check(objects, "objects", boxes)
    sizes = list(shape) if isinstance(shape, Sequence) else []
    if len(sizes) != 2 or not all(is_integer(length) and length > 0 for length in sizes):
        raise ValueError(f"`shape` must be two positive integers, height and width, got {shape!r}")
    side, *centre = boxes.unbind(-1)
    down, right = (
        _weights(
            (torch.arange(length, dtype=boxes.dtype, device=boxes.device) + 0.5 - middle[..., None])
            * (count / side[..., None])
            + (count - 1) / 2,
            count,
        )
        for middle, length, count in zip(centre, sizes, objects.shape[-2:], strict=True)
    )
    return down @ objects @ right.mT


def intersection_over_union(boxes: Tensor, others: Tensor) -> Tensor:
    r"""Compute how well boxes agree: the area that two boxes A and B share, of the area that they cover together,

    .. math:: \frac{|A \cap B|}{|A \cup B|},

    1 for equal boxes and 0 for boxes that are apart.

    Args:
        boxes: ``(*, 3)``, side, which is positive, row and column.
        others: ``(*, 3)``; dimensions on the left are broadcast.

    Returns:
        ``(*)``, NaN where a box is NaN.

    >>> intersection_over_union(torch.tensor([2.0, 3.0, 3.0]), torch.tensor([[2.0, 3.0, 3.0], [2.0, 3.0, 4.0]]))
    tensor([1.0000, 0.3333])
    """
    _check_boxes(boxes, "boxes")
    _check_boxes(others, "others")
    if not broadcasts(boxes.shape, others.shape):
        got = f"shapes {tuple(boxes.shape)} and {tuple(others.shape)}"
        raise ValueError(f"`boxes` and `others` must have dimensions on the left that broadcast, got {got}")
    (side, centre), (other, target) = (each.split([1, 2], -1) for each in (boxes, others))
    first = torch.maximum(centre - side / 2, target - other / 2)
    last = torch.minimum(centre + side / 2, target + other / 2)
    shared = (last - first).clamp(min=0).prod(-1)
    return shared / (side.square() + other.square() - shared[..., None]).squeeze(-1)


def _weights(points: Tensor, count: int) -> Tensor:
    """Return the weight of each of ``count`` pixels at points of their axis, ``(*, points, count)``."""
    pixels = torch.arange(count, dtype=points.dtype, device=points.device)
    return (1 - (points[..., None] - pixels).abs()).clamp(min=0)


def _check(images: Tensor, name: str, boxes: Tensor) -> None:
    real_tensor(images, name, "floats (*, height, width)")
    if not images.is_floating_point() or images.dim() < 2 or 0 in images.shape[-2:]:
        raise ValueError(f"`{name}` must be floats (*, height, width), got {describe(images)}")
    _check_boxes(boxes, "boxes")
    if boxes.dtype != images.dtype:
        raise ValueError(f"`boxes` must have the dtype of `{name}`, {images.dtype}, got {boxes.dtype}")
    if not broadcasts(images.shape[:-2], boxes.shape[:-1]):
        got = f"{tuple(boxes.shape)} for {name} of shape {tuple(images.shape)}"
        raise ValueError(f"`boxes` must have dimensions on the left that broadcast with `{name}`, got {got}")


def _check_boxes(boxes: Tensor, name: str) -> None:
    real_tensor(boxes, name, "floats (*, 3): side, row and column")
    if not boxes.is_floating_point() or boxes.shape[-1:] != (3,):
        raise ValueError(f"`{name}` must be floats (*, 3): side, row and column, got {describe(boxes)}")
    if is_validation_enabled() and boxes.numel() and not is_batched(boxes):
        side = boxes[..., 0].nan_to_num(nan=torch.inf).min()  # of the boxes that are there
        if side <= 0:
            raise ValueError(f"`{name}` must have positive sides, got {float(side)}")
