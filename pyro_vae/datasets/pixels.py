"""Conversions of pixels: bytes to grey values, and grey values to zeros and ones."""

import torch
from torch import Tensor

from pyro_vae._utils.noise import uniform_like
from pyro_vae._utils.validation import number, real_tensor

__all__ = ["binarize", "grey", "resample"]


def grey(x: Tensor) -> Tensor:
    """Grey values in [0, 1]: bytes are divided by 255, in the default dtype; grey values are returned as they are.

    They suit likelihoods with a density on [0, 1], such as :class:`pyro_vae.parts.likelihoods.ContinuousBernoulli`.

    >>> grey(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    real_tensor(x, "x", "bytes (torch.uint8), or grey values from 0 to 1")
    if x.dtype == torch.uint8 and x.numel() and x.max() == 1:
        raise ValueError(
            "`x` must be bytes from 0 to 255, or grey values, got bytes that are all 0 or 1: "
            "they are binary as `x.float()`"
        )
    if x.dtype == torch.uint8:
        return x.to(torch.get_default_dtype()) / 255
    if not x.is_floating_point() or not bool(((x >= 0) & (x <= 1)).all()):  # both are false for NaN
        found = f"{x.dtype} from {x.min().item():g} to {x.max().item():g}" if x.numel() else f"no values, {x.dtype}"
        raise ValueError(f"`x` must be bytes (torch.uint8), or grey values from 0 to 1, got {found}")
    return x


def binarize(x: Tensor, *, threshold: float = 0.5) -> Tensor:
    """1 where the grey value is above the threshold, 0 elsewhere.

    >>> binarize(torch.tensor([0, 127, 128], dtype=torch.uint8))
    tensor([0., 0., 1.])
    """
    threshold = number(threshold, "threshold")
    values = grey(x)
    return (values > threshold).to(values.dtype)


def resample(x: Tensor) -> Tensor:
    """Binary draws: 1 with the grey value as probability, from torch's random stream, different in each call.

    As a ``transform``, it binarizes the rows of each batch again. A call draws a key from the random stream; the noise
    of each pixel is a hash of the key and of the pixel's place.

    Source: Burda, Grosse and Salakhutdinov 2016, "Importance weighted autoencoders", section 5, after Salakhutdinov and
    Murray 2008.

    >>> resample(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([0., 1.])
    """
    probs = grey(x)
    return (uniform_like(probs) < probs).to(probs.dtype)
