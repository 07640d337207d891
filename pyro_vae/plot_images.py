"""Pictures of images: what a model of them makes of a code, of a datum, and of its prior."""

from collections.abc import Callable

import torch
from matplotlib.axes import Axes
from torch import Tensor

from pyro_vae.plot_axes import axes_or_new

__all__ = ["image_grid", "manifold"]


def image_grid(images: Tensor, columns: int, ax: Axes | None = None) -> Axes:
    """Images ``(N, height, width)`` with values in [0, 1], row by row, black on white.

    >>> image_grid(torch.rand(6, 8, 8), columns=3).images[0].get_array().shape
    (17, 26)
    """
    ax = axes_or_new(ax)
    count, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.zeros(rows * (height + 1) - 1, columns * (width + 1) - 1)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1), (index % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = image.detach()
    ax.imshow(sheet.numpy(), cmap="gray_r", vmin=0, vmax=1)
    ax.set_axis_off()
    return ax


def manifold(
    decode: Callable[[Tensor], Tensor], shape: tuple[int, int], size: int = 15, ax: Axes | None = None
) -> Axes:
    """What does each place in a latent space of two standard normal dimensions decode to?

    Args:
        decode: from ``(S, 2)`` to mean images, ``(S, height * width)``.
        shape: height and width of an image.
        size: images a side, at the quantiles 1/(2 size), ... of the prior.
        ax: where to draw.

    >>> manifold(lambda z: z.sigmoid()[:, :1].expand(-1, 64), (8, 8), size=3).get_xlabel()
    '$z_1$, at quantiles of the prior'
    """
    ax = axes_or_new(ax)
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(size) + 0.5) / size)
    z = torch.cartesian_prod(quantiles.flip(0), quantiles).flip(1)
    image_grid(decode(z).reshape(-1, *shape), size, ax)
    ax.set_axis_on()
    ax.set(xticks=[], yticks=[], xlabel="$z_1$, at quantiles of the prior", ylabel="$z_2$, at quantiles of the prior")
    return ax
