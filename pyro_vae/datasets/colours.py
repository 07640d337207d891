"""Images in colour, 32 × 32 pixels: shapes that are drawn from known factors, and patches of two photographs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae._utils.display import Table
from pyro_vae._utils.validation import number, positive_int, seed_number
from pyro_vae.datasets.base import Dataset, on_default_device
from pyro_vae.datasets.images import check_split

__all__ = ["FINE", "Shapes", "coverage", "photograph_patches", "shapes"]

_SIZE = 32
FINE = 4  # points along each side of a pixel, of which the share inside the shape is the pixel's coverage
_FACTORS = {
    "shape": torch.arange(3.0, device="cpu"),
    "hue": torch.arange(8, device="cpu") / 10,  # from red to violet: a line, and not a circle, whose ends meet
    "size": torch.linspace(0.22, 0.42, 5, device="cpu"),
    "x": torch.linspace(-0.4, 0.4, 9, device="cpu"),
    "y": torch.linspace(-0.4, 0.4, 9, device="cpu"),
    "angle": torch.linspace(-36, 36, 5, device="cpu"),
    "background": torch.linspace(0, 0.6, 4, device="cpu"),
}
_BLOCK = 4  # images that are drawn at once, whose points fit into the cache of a processor


@dataclass(frozen=True, repr=False)
class Shapes(Dataset):
    """Drawn images with the factors that they were drawn from.

    Attributes:
        x: ``(N, 3072)``, bytes: the channels red, green and blue of 32 × 32 pixels.
        labels: ``(N,)``, 0 for a square, 1 for an ellipse, 2 for a triangle.
        factors: the value of each factor by name, ``(N,)`` each, independent and uniform on a few values: ``shape``,
            as the labels; ``hue``, 0 (red) to 0.7 (violet); ``size``, the half width, in units of half the image;
            ``x`` and ``y``, the centre, from -0.4 (left, top) to 0.4; ``angle``, in degrees, clockwise; and
            ``background``, its grey value.
    """

    factors: Mapping[str, Tensor]

    def _table(self) -> Table:
        table = super()._table()
        counts = [f"{name}: {len(values.unique())}" for name, values in self.factors.items()]
        return Table(table.head, [*table.rows, ("values of each factor", ", ".join(counts))], table.note)


def shapes(num_images: int, *, noise: float = 0.0, seed: int = 0) -> Shapes:
    """Draw coloured shapes whose factors are known: a square, an ellipse or a triangle on a grey background.

    Each pixel is a mixture of both colours by its coverage, in 1/16, so that edges are smooth. Another seed gives an
    independent test set. As floats, ``x.float()``, the bytes suit
    :class:`pyro_vae.parts.likelihoods.DiscretizedLogisticMixture`.

    Args:
        num_images: N.
        noise: standard deviation, in levels, of normal noise on each colour, rounded to levels and clipped to 0 to 255.
            Without it, a model can put nearly all mass on one level, and its bits depend on the last digits.
        seed: seed of the factors and the noise.

    >>> data = shapes(100)
    >>> data.x.shape, data.x.dtype, list(data.factors)
    (torch.Size([100, 3072]), torch.uint8, ['shape', 'hue', 'size', 'x', 'y', 'angle', 'background'])
    """
    positive_int(num_images, "num_images")
    noise = number(noise, "noise", least=0)
    generator = torch.Generator("cpu").manual_seed(seed_number(seed))
    factors = {
        name: values[torch.randint(len(values), (num_images,), generator=generator, device="cpu")]
        for name, values in _FACTORS.items()
    }
    rows = torch.stack(list(factors.values()), 1).split(_BLOCK)
    x = torch.cat([_draw(dict(zip(factors, block.double().T, strict=True))) for block in rows])
    if noise:
        x = (x + noise * torch.randn(x.shape, generator=generator, device="cpu")).round().clamp(0, 255).to(torch.uint8)
    x, labels, *values = on_default_device(x, factors["shape"].long(), *factors.values())
    return Shapes(x, labels, dict(zip(factors, values, strict=True)))


def _draw(factors: Mapping[str, Tensor]) -> Tensor:
    """Draw the images of factors ``(N,)``, ``(N, 3072)``."""
    axis = (torch.arange(_SIZE * FINE, dtype=torch.float64, device="cpu") + 0.5) / (_SIZE * FINE) * 2 - 1
    shape, size, angle = (factors[name][:, None, None] for name in ("shape", "size", "angle"))
    right, down = axis - factors["x"][:, None, None], axis[:, None] - factors["y"][:, None, None]
    cos, sin = (angle * math.pi / 180).cos(), (angle * math.pi / 180).sin()
    u, v = (cos * right + sin * down) / size, (cos * down - sin * right) / size
    share = coverage(shape, u, v)[:, None]
    colour, grey = _colour(factors["hue"])[..., None, None], factors["background"][:, None, None, None]
    return (255 * (share * colour + (1 - share) * grey)).round().to(torch.uint8).flatten(1)


def coverage(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Compute the share of each pixel inside of a square (0), an ellipse (1) or a triangle (2).

    Args:
        shape: ``(*, 1, 1)``.
        u, v: right and down of the centre, in half widths of the shape, ``(*, 4 H, 4 W)``: 16 points in each pixel.

    Returns:
        ``(*, H, W)``, in 1/16.
    """
    square = torch.maximum(u.abs(), v.abs()) <= 1
    ellipse = u.square() + (v / 0.6).square() <= 1
    triangle = torch.maximum(2 * u.abs() - 1.2 - v, v - 0.8) <= 0
    inside = torch.where(shape == 0, square, torch.where(shape == 1, ellipse, triangle))
    return torch.nn.functional.avg_pool2d(inside.to(u.dtype), FINE)


def _colour(hue: Tensor) -> Tensor:
    """The fully saturated red, green and blue of hues ``(N,)`` between 0 and 1, ``(N, 3)``."""
    from_pure = (6 * hue[:, None] - torch.tensor([0.0, 2.0, 4.0], dtype=hue.dtype, device="cpu") + 3).remainder(6) - 3
    return (2 - from_pure.abs()).clamp(0, 1)


def photograph_patches(split: str = "train", *, stride: int = 8) -> Dataset:
    """Patches of 32 × 32 pixels in colour from the two photographs that scikit-learn contains: no download.

    Each photograph is cut into columns of 32 pixels. Test patches lie in each fifth of them, training patches in the
    others: no pixel is in both.

    Args:
        split: ``"train"`` or ``"test"``.
        stride: step between patches in pixels, 1 to 32, in both directions for training patches, and down the columns
            for test patches. Below 32 they overlap.

    Returns:
        ``x`` of shape ``(N, 3072)``, bytes: the channels red, green and blue; ``labels``, 0 for the Summer Palace in
        Beijing, 1 for a flower.

    Source: scikit-learn, ``load_sample_images``: photographs by Yann Forget and by Daniel Schwen, CC BY.

    >>> len(photograph_patches("train")), len(photograph_patches("test", stride=16))
    (5200, 200)
    """
    check_split(split, ("train", "test"))
    if positive_int(stride, "stride") > _SIZE:
        raise ValueError(f"`stride` must be an integer from 1 to {_SIZE}, got {stride}")
    from sklearn.datasets import load_sample_images

    x, labels = [], []
    for label, photograph in enumerate(load_sample_images().images):
        pixels = torch.from_numpy(photograph.copy()).movedim(2, 0)
        lefts, tops = _lefts(split, pixels.shape[2], stride), range(0, pixels.shape[1] - _SIZE + 1, stride)
        x += [pixels[:, top : top + _SIZE, left : left + _SIZE].flatten() for left in lefts for top in tops]
        labels += [label] * (len(lefts) * len(tops))
    return Dataset(*on_default_device(torch.stack(x), torch.tensor(labels, device="cpu")))


def _lefts(split: str, width: int, stride: int) -> list[int]:
    """The left ends of patches that lie in the columns of a split."""
    if split == "test":
        return list(range(4 * _SIZE, width - _SIZE + 1, 5 * _SIZE))
    ends = ((left, left + _SIZE - 1) for left in range(0, width - _SIZE + 1, stride))
    return [left for left, right in ends if left // _SIZE % 5 != 4 and right // _SIZE % 5 != 4]
