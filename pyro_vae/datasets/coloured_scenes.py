"""Scenes of several coloured shapes that cover each other, with the shape that is seen at each pixel."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae._utils.validation import is_integer, positive_int, seed_number
from pyro_vae.datasets.base import Dataset, on_default_device
from pyro_vae.datasets.colours import FINE, coverage

__all__ = ["ShapeScenes", "shape_scenes"]

_COLOURS = [(0.9, 0.15, 0.15), (0.15, 0.75, 0.2), (0.2, 0.35, 0.95), (0.95, 0.85, 0.2), (0.85, 0.3, 0.85)]
_COLOURS += [(0.2, 0.85, 0.85)]
_BRIGHTEST = 0.35  # each channel of the background is uniform from 0 to this
_WIDTHS = 0.24, 0.48  # smallest and largest half width of a shape, in units of half the scene
_CORE = 0.5  # half width of the core, in units of that of the shape
_VISIBLE = 0.6  # smallest share of a shape that is seen
_BLOCK = 250  # scenes that are drawn at once
_ROUNDS = 1000  # of new places for the shapes of scenes in which one is hidden


@dataclass(frozen=True, repr=False)
class ShapeScenes(Dataset):
    """N scenes with up to K shapes each.

    Attributes:
        x: ``(N, 3 * size * size)``, values in [0, 1]: the channels red, green and blue.
        labels: ``(N,)``, the number of shapes in each scene.
        masks: ``(N, size * size)``, integers: the shape that is seen at each pixel, from 1; 0 is the background.
        size: height and width of a scene.
    """

    masks: Tensor
    size: int

    def _line(self) -> str:
        return f"{super()._line()}, scenes of {self.size} × {self.size} pixels"


def shape_scenes(num_scenes: int, *, size: int = 24, counts: Sequence[int] = (2, 4), seed: int = 0) -> ShapeScenes:
    """Draw scenes of coloured shapes on a plain, dark background; each number of shapes is equally frequent.

    A shape is a square, an ellipse or a triangle with a core of another colour, so that a region of one colour is no
    object; two shapes of a scene may have the same colours. Later shapes cover earlier ones. Widths and places of a
    scene are drawn again until 60 % of the pixels of each shape are seen. Edges are smooth: a pixel mixes the colours
    by its coverage, in 1/16, and belongs to the last shape that covers half of it.

    Args:
        num_scenes: N.
        size: height and width of a scene, in pixels, 12 or more.
        counts: smallest and largest number of shapes, 1 to 6.
        seed: seed of the draws.

    Raises:
        ValueError: if a number is out of its range.

    Source: Multi-dSprites (Kabra et al. 2019, "Multi-object datasets") has scenes of this kind, with shapes of one
    colour.

    >>> scenes = shape_scenes(100)
    >>> scenes
    ShapeScenes(100 data of shape (1728,), float32, 3 labels, scenes of 24 × 24 pixels)
    >>> bool((scenes.masks.amax(1) == scenes.labels).all())
    True
    """
    positive_int(num_scenes, "num_scenes")
    if positive_int(size, "size") < 12:
        raise ValueError(f"`size` must be 12 or more, for shapes of a few pixels, got {size}")
    least, most = _checked_counts(counts)
    generator = torch.Generator("cpu").manual_seed(seed_number(seed))
    numbers = torch.randint(least, most + 1, (num_scenes,), generator=generator, device="cpu")
    drawn = [_draw(block, most, size, generator) for block in numbers.split(_BLOCK)]
    if any(block is None for block in drawn):
        raise ValueError(f"`counts` must be numbers of shapes that fit into a scene, got {counts!r}")
    x, masks = (torch.cat(parts).flatten(1) for parts in zip(*filter(None, drawn), strict=True))
    x, numbers, masks = on_default_device(x.to(torch.get_default_dtype()), numbers, masks)
    return ShapeScenes(x, numbers, masks, size)


def _draw(numbers: Tensor, most: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
    """Draw the images and masks of scenes with these numbers of shapes, or None if some find no place."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device="cpu", dtype=torch.float32)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device="cpu")

    outer = integers(0, len(_COLOURS), len(numbers), most)
    core = (outer + integers(1, len(_COLOURS), len(numbers), most)) % len(_COLOURS)
    background = _BRIGHTEST * uniform(len(numbers), 3)
    order = torch.arange(most, device="cpu")
    covered = torch.zeros(2, len(numbers), most, size, size, device="cpu", dtype=torch.float32)
    waiting = torch.arange(len(numbers), device="cpu")
    for _ in range(_ROUNDS):
        kind, width = integers(0, 3, len(waiting), most), uniform(len(waiting), most)
        width = _WIDTHS[0] * (_WIDTHS[1] / _WIDTHS[0]) ** width
        place = (2 * uniform(2, len(waiting), most) - 1) * (1 - width)
        drawn = torch.stack([_coverage(kind, place, scale * width, size) for scale in (1, _CORE)])
        drawn = drawn * (order < numbers[waiting, None])[..., None, None]
        whole = (drawn[0] >= 0.5).sum((-1, -2))
        seen = (_masks(drawn[0])[:, None] == order[:, None, None] + 1).sum((-1, -2))
        good = (seen >= _VISIBLE * whole).all(1)
        covered[:, waiting[good]] = drawn[:, good]
        waiting = waiting[~good]
        if not len(waiting):
            return _paint(covered, background, outer, core), _masks(covered[0])
    return None


def _coverage(kind: Tensor, place: Tensor, width: Tensor, size: int) -> Tensor:
    """Compute the share of each pixel inside of shapes ``(N, K)`` at places ``(2, N, K)``: ``(N, K, size, size)``."""
    axis = (torch.arange(size * FINE, device="cpu", dtype=torch.float32) + 0.5) / (size * FINE) * 2 - 1
    kind, width, right, down = (value[..., None, None] for value in (kind, width, *place))
    return coverage(kind, (axis - right) / width, (axis[:, None] - down) / width)


def _masks(covered: Tensor) -> Tensor:
    """Return the last shape that covers half of each pixel, from 1, or 0: ``(N, K, H, W)`` to ``(N, H, W)``."""
    numbers = torch.arange(1, covered.shape[1] + 1, device="cpu")[:, None, None]
    return torch.where(covered >= 0.5, numbers, 0).amax(1)


def _paint(covered: Tensor, background: Tensor, outer: Tensor, core: Tensor) -> Tensor:
    """Paint shape over shape: coverage ``(2, N, K, H, W)`` and colours ``(N, K)`` to images ``(N, 3, H, W)``."""
    colours = torch.tensor(_COLOURS, device="cpu", dtype=torch.float32)[..., None, None]
    x = background[..., None, None].expand(-1, -1, *covered.shape[-2:])
    for index in range(covered.shape[2]):
        for share, colour in zip(covered[:, :, index, None], (outer, core), strict=True):
            x = x + share * (colours[colour[:, index]] - x)
    return x


def _checked_counts(counts: Sequence[int]) -> tuple[int, int]:
    pair = list(counts) if isinstance(counts, Sequence) and not isinstance(counts, str | bytes) else []
    if len(pair) != 2 or not all(map(is_integer, pair)) or not 0 < pair[0] <= pair[1] <= 6:
        raise ValueError(f"`counts` must be two integers from 1 to 6, smallest and largest, got {counts!r}")
    return int(pair[0]), int(pair[1])
