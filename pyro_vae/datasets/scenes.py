"""Scenes of several digits on one canvas, as attend, infer, repeat and its successors learn from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pyro_vae._utils.validation import describe, is_integer, positive_int, seed_number
from pyro_vae.datasets.base import Dataset, on_default_device
from pyro_vae.datasets.pixels import grey

__all__ = ["DigitScenes", "digit_scenes"]

_INK = 0.1  # grey value from which a pixel is a part of a digit
_ROUNDS = 1000  # of new places for the digits of scenes in which some overlap


@dataclass(frozen=True, repr=False)
class DigitScenes(Dataset):
    """N scenes with up to K digits each.

    Attributes:
        x: ``(N, size * size)``, grey values in [0, 1].
        labels: ``(N,)``, the number of digits in each scene.
        digits: ``(N, K)``, the label of each digit; -1 where there is none.
        boxes: ``(N, K, 3)``, side, row and column of the centre of each digit's square, in pixels from the upper left
            corner, as :func:`pyro_vae.spatial.place` takes them; NaN where there is no digit.
        size: height and width of a scene.
    """

    digits: Tensor
    boxes: Tensor
    size: int

    def _line(self) -> str:
        return f"{super()._line()}, scenes of {self.size} × {self.size} pixels"


def digit_scenes(
    digits: Dataset, num_scenes: int, *, size: int = 40, sides: Sequence[int] = (18, 24), max_digits: int = 2,
    seed: int = 0,
) -> DigitScenes:  # fmt: skip
    """Draw scenes of digits: each number of digits from 0 to ``max_digits`` is equally frequent.

    A digit is resized to a square whose side is drawn from ``sides``, and put at a place that is drawn uniformly. Sides
    and places of a scene are drawn again until no pixel has ink, a grey value above 0.1, of two digits. Digits may
    touch. The squares, whose margins are empty, may overlap.

    Args:
        digits: images with their labels, such as :func:`mnist`; bytes, or grey values in [0, 1].
        num_scenes: N.
        size: height and width of a scene, in pixels.
        sides: smallest and largest side of a digit's square, in pixels.
        max_digits: K, the largest number of digits.
        seed: seed of the draws.

    Raises:
        ValueError: if images are not square, or the digits of a scene do not find places without overlap.

    Source: the multi-MNIST scenes of Eslami et al. 2016, "Attend, Infer, Repeat", section 3.1, are similar.

    >>> from pyro_vae.datasets import digits
    >>> scenes = digit_scenes(digits("train"), 100, size=20, sides=(8, 10))
    >>> scenes
    DigitScenes(100 data of shape (400,), float32, 3 labels, scenes of 20 × 20 pixels)
    >>> bool(((scenes.digits >= 0).sum(1) == scenes.labels).all())
    True
    """
    images = _square_images(digits)
    least, most = _checked_sides(sides, positive_int(size, "size"))
    positive_int(num_scenes, "num_scenes")
    positive_int(max_digits, "max_digits")
    generator = torch.Generator("cpu").manual_seed(seed_number(seed))
    counts = torch.randint(max_digits + 1, (num_scenes,), generator=generator, device="cpu")
    sources = torch.randint(len(images), (num_scenes, max_digits), generator=generator, device="cpu")
    present = torch.arange(max_digits, device="cpu") < counts[:, None]
    x, boxes = images.new_zeros(num_scenes, size, size), images.new_full((num_scenes, max_digits, 3), torch.nan)
    waiting = torch.arange(num_scenes, device="cpu")
    for _ in range(_ROUNDS):
        sides_drawn = torch.randint(least, most + 1, (len(waiting), max_digits), generator=generator, device="cpu")
        room = (size + 1 - sides_drawn)[..., None]
        corners = (torch.rand(len(waiting), max_digits, 2, generator=generator, device="cpu") * room).long()
        drawn = _put(images[sources[waiting]].flatten(0, 1), sides_drawn.flatten(), corners.flatten(0, 1), size)
        drawn = drawn.unflatten(0, (-1, max_digits)) * present[waiting, :, None, None]
        apart = ((drawn > _INK).sum(1) < 2).flatten(1).all(1)
        placed = waiting[apart]
        x[placed] = drawn.sum(1).clamp(max=1)[apart]
        squares = torch.cat([sides_drawn[..., None], corners + sides_drawn[..., None] / 2], -1).to(boxes)
        boxes[placed] = squares.masked_fill(~present[waiting, :, None], torch.nan)[apart]
        waiting = waiting[~apart]
        if not len(waiting):
            break
    else:
        raise ValueError(f"`size` must leave room for {max_digits} digits of {least} to {most} pixels, got {size}")
    labels = digits.labels.cpu()[sources].masked_fill(~present, -1)
    x, boxes = x.flatten(1).to(torch.get_default_dtype()), boxes.to(torch.get_default_dtype())
    x, counts, labels, boxes = on_default_device(x, counts, labels, boxes)
    return DigitScenes(x, counts, labels, boxes, size)


def _put(images: Tensor, sides: Tensor, corners: Tensor, size: int) -> Tensor:
    """Return canvases ``(M, size, size)``, each with one image, resized to its side, at its upper left corner."""
    canvases = images.new_zeros(len(images), size, size)
    for side in sides.unique().tolist():
        rows = (sides == side).nonzero()[:, 0]
        small = functional.interpolate(images[rows, None], size=(side, side), mode="bilinear", antialias=True)[:, 0]
        down, right = (corners[rows, axis, None] + torch.arange(side, device="cpu") for axis in (0, 1))
        canvases[rows[:, None, None], down[:, :, None], right[:, None, :]] = small.clamp(0, 1)
    return canvases


def _square_images(digits: Dataset) -> Tensor:
    must = "`digits` must be a Dataset of square images, such as datasets.digits()"
    if not isinstance(digits, Dataset):
        raise TypeError(f"{must}, got {describe(digits)}")
    pixels = grey(digits.x).cpu().flatten(1)
    side = round(pixels.shape[1] ** 0.5)
    if not len(pixels) or side**2 != pixels.shape[1] or len(digits.labels) != len(pixels):
        raise ValueError(f"{must}, got {describe(digits.x)} with {len(digits.labels)} labels")
    return pixels.unflatten(1, (side, side)).float()


def _checked_sides(sides: Sequence[int], size: int) -> tuple[int, int]:
    pair = list(sides) if isinstance(sides, Sequence) and not isinstance(sides, str | bytes) else []
    if len(pair) != 2 or not all(map(is_integer, pair)) or not 0 < pair[0] <= pair[1] <= size:
        must = f"two positive integers, the smallest and the largest side, at most the size {size}"
        raise ValueError(f"`sides` must be {must}, got {sides!r}")
    return int(pair[0]), int(pair[1])
