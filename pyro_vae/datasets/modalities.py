"""Several modalities of the same data: measurements of images, and modalities that are hidden at random."""

from typing import Any

import torch
from torch import Tensor

from pyro_vae._utils.noise import uniform_like
from pyro_vae._utils.validation import describe, image_size, number, real_tensor
from pyro_vae.datasets.pixels import grey

__all__ = ["hide_modalities", "measure_images"]


def hide_modalities(*modalities: Tensor, share: float = 0.5) -> tuple[Tensor, ...]:
    r"""Hide each modality of each datum with the same probability: its entries become NaN.

    Of each datum that has any modality, one is kept: the one that would be hidden last. As a ``transform`` of
    :func:`pyro_vae.fit` it hides other modalities in each step, so that a guide learns to work with any of them, such
    as :class:`pyro_vae.parts.guides.ProductOfExperts`. The likelihoods need ``missing=True``. Then each step has a
    bound on log p of what is not hidden.

    Args:
        modalities: floats, ``(N, ...)`` each. One is missing in a row where all its entries are NaN.
        share: the probability, from 0 to 1.

    Returns:
        New tensors of the same shapes.

    Raises:
        TypeError, ValueError: if there are not two or more modalities of the same data.

    Source: Wu and Goodman 2018, "Multimodal generative models for scalable weakly-supervised learning", section 2.2,
    whose sub-sampled training evaluates the ELBO of random subsets.

    >>> import functools
    >>> image, label = hide_modalities(torch.rand(100, 64), torch.zeros(100, 1), share=0.5)
    >>> bool((image.isnan().all(1) & label.isnan().all(1)).any())
    False
    >>> transform = functools.partial(hide_modalities, share=0.3)
    """
    share = number(share, "share", least=0)
    if share > 1:
        raise ValueError(f"`share` must be a number from 0 to 1, got {share}")
    must = "two or more floats, (N, ...) each, of the same N data"
    if len(modalities) < 2:
        raise ValueError(f"`modalities` must be {must}, got {len(modalities)}")
    for x in modalities:
        if not real_tensor(x, "modalities", must).is_floating_point():
            raise TypeError(f"`modalities` must be {must}, got {describe(x)}")
        if x.dim() < 2 or len(x) != len(modalities[0]):
            raise ValueError(f"`modalities` must be {must}, got shapes {[tuple(one.shape) for one in modalities]}")
    missing = torch.stack([x.isnan().flatten(1).all(1) for x in modalities], 1)
    noise = uniform_like(torch.zeros_like(missing, dtype=torch.get_default_dtype())).masked_fill(missing, -1.0)
    hidden = (noise < share) & (noise < noise.amax(1, keepdim=True))
    return tuple(
        x.masked_fill(one.reshape(-1, *[1] * (x.dim() - 1)), torch.nan)
        for x, one in zip(modalities, hidden.unbind(1), strict=True)
    )


def measure_images(x: Tensor, shape: Any) -> Tensor:
    r"""Measure the ink, slant, width and holes of images with bright strokes on black, such as digits.

    * **ink**: the logarithm of the sum of grey values.
    * **slant**: :math:`-\mathrm{cov}(c, r) / \mathrm{var}(r)`, with rows r and columns c weighted by grey values: how
      many columns strokes move to the right for each row upwards; 0 if only one row is not dark.
    * **width**: the standard deviation of the columns, in widths of the image.
    * **holes**: the number of dark regions, below 0.5, that strokes enclose: 1 in a zero, 2 in an eight.

    Args:
        x: bytes, or grey values in [0, 1], ``(N, D)`` or ``(N, height, width)``, none of them all 0.
        shape: height and width.

    Returns:
        ``(N, 4)``, in the default dtype.

    Raises:
        TypeError, ValueError: for other images, or one that is all 0.

    >>> ring = torch.ones(1, 5, 5)
    >>> ring[:, 1:4, 1:4] = 0.0
    >>> ink, slant, width, holes = measure_images(ring, (5, 5))[0].tolist()
    >>> round(slant, 3) + 0.0, holes
    (0.0, 1.0)
    """
    from scipy import ndimage

    channels, height, width = image_size(shape, "shape")
    must = f"images (N, {channels * height * width}), of `shape`"
    real_tensor(x, "x", must)
    if channels != 1 or x.dim() < 2 or not len(x) or x[0].numel() != height * width:
        raise ValueError(f"`x` must be {must}, got {describe(x)}")
    images = grey(x).double().reshape(-1, height, width)
    mass = images.sum((1, 2))
    if not (mass > 0).all():
        raise ValueError(f"`x` must be {must} that are not all 0, got one in row {int((mass == 0).nonzero()[0])}")
    of_rows, of_columns = images.sum(2) / mass[:, None], images.sum(1) / mass[:, None]
    row, column = (torch.arange(size, dtype=torch.float64, device=images.device) for size in (height, width))
    dr, dc = row - (of_rows @ row)[:, None], column - (of_columns @ column)[:, None]
    covariance = torch.einsum("nij,ni,nj->n", images, dr, dc) / mass
    flat = (of_rows > 0).sum(1) == 1  # then both are zeros, or what rounding leaves of them
    slant = (-covariance / (of_rows * dr**2).sum(1)).masked_fill(flat, 0.0)
    spread = (of_columns * dc**2).sum(1).sqrt() / width
    dark = torch.nn.functional.pad(images < 0.5, (1, 1, 1, 1), value=True).cpu().numpy()
    holes = torch.tensor([ndimage.label(one)[1] - 1 for one in dark], dtype=torch.float64, device=images.device)
    return torch.stack([mass.log(), slant, spread, holes], 1).to(torch.get_default_dtype())
