r"""A spatial mixture: each pixel is drawn from one of several images, as scenes of several objects are."""

import math
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae._utils.validation import broadcasts, describe, positive, real_tensor
from pyro_vae.distributions.base import Parametric

__all__ = ["SpatialMixture"]


class SpatialMixture(Parametric):
    r"""Images of P pixels with C channels, where each pixel shows one of K images, its slots,

    .. math:: p(x) = \prod_{p=1}^{P} \sum_{k=1}^{K} m_{kp} \prod_{c=1}^{C} N(x_{cp};\ \mu_{kcp}, \sigma^2), \qquad
       m_{kp} = \frac{e^{l_{kp}}}{\sum_j e^{l_{jp}}}.

    The slot of each pixel is summed out exactly, pixel by pixel. :meth:`responsibilities` has its posterior, which is
    the segmentation of an observed image.

    Args:
        logits: the logarithms l of the masks, up to a constant for each pixel, ``(*batch, K, P)``.
        loc: the image of each slot, ``(*batch, K, C, P)``.
        scale: standard deviation of each channel of a pixel, a positive number.

    Source: Greff et al. 2017, "Neural expectation maximization", section 2; Burgess et al. 2019, "MONet", equation 2.

    >>> q = SpatialMixture(torch.zeros(2, 4), torch.tensor([0.0, 1.0])[:, None, None].expand(2, 3, 4), 0.1)
    >>> q.event_shape, q.mean[0]
    (torch.Size([3, 4]), tensor([0.5000, 0.5000, 0.5000, 0.5000]))
    >>> q.responsibilities(torch.ones(3, 4))[1]
    tensor([1., 1., 1., 1.])
    """

    arg_constraints = {
        "logits": constraints.independent(constraints.real, 2),
        "loc": constraints.independent(constraints.real, 3),
    }
    support = constraints.independent(constraints.real, 2)

    def __init__(self, logits: Tensor, loc: Tensor, scale: float, validate_args: bool | None = None):
        real_tensor(logits, "logits", "a tensor (*batch, K, P)")
        real_tensor(loc, "loc", "a tensor (*batch, K, C, P)")
        self.scale = positive(scale, "scale")
        if logits.dim() < 2 or loc.dim() < 3 or logits.shape[-2:] != (loc.shape[-3], loc.shape[-1]):
            got = f"shapes {tuple(logits.shape)} and {tuple(loc.shape)}"
            raise ValueError(f"`logits` and `loc` must be (*batch, K, P) and (*batch, K, C, P), got {got}")
        batch = torch.broadcast_shapes(logits.shape[:-2], loc.shape[:-3])
        self.logits, self.loc = logits.expand(*batch, -1, -1), loc.expand(*batch, -1, -1, -1)
        super().__init__(batch, loc.shape[-2:], validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        constant = self.event_shape.numel() * (math.log(self.scale) + 0.5 * math.log(2 * math.pi))
        return self._log_joint(value).logsumexp(-2).sum(-1) - constant

    def responsibilities(self, value: Tensor) -> Tensor:
        r"""The posterior probability of each slot at each pixel of images ``(*, C, P)``, given as ``(*, K, P)``."""
        expected = f"images {(*self.batch_shape, *self.event_shape)}, or such that broadcast with these"
        real_tensor(value, "value", expected)
        if value.shape[-2:] != self.event_shape or not broadcasts(value.shape[:-2], self.batch_shape):
            raise ValueError(f"`value` must be {expected}, got {describe(value)}")
        return self._log_joint(value).softmax(-2)

    def _log_joint(self, value: Tensor) -> Tensor:
        """The log-density of each pixel and its slot, ``(*, K, P)``, without the constant of the normals."""
        squared = ((value[..., None, :, :] - self.loc) / self.scale).square().sum(-2)
        return self.logits.log_softmax(-2) - 0.5 * squared

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            slots = torch.distributions.Categorical(logits=self.logits.mT).sample(torch.Size(sample_shape))
            index = slots[..., None, None, :].expand(*shape[:-2], 1, *shape[-2:])
            loc = self.loc.expand(*shape[:-2], *self.loc.shape[-3:]).gather(-3, index).squeeze(-3)
            return loc + self.scale * torch.randn_like(loc)

    @property
    def masks(self) -> Tensor:
        """The probability of each slot at each pixel, ``(*batch, K, P)``."""
        return self.logits.softmax(-2)

    @property
    def mean(self) -> Tensor:
        return (self.masks[..., None, :] * self.loc).sum(-3)

    @property
    def variance(self) -> Tensor:
        return self.scale**2 + (self.masks[..., None, :] * (self.loc - self.mean[..., None, :, :]) ** 2).sum(-3)
