"""A normal variable squashed onto an interval, for latents in a box."""

import math

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all

from pyro_vae.distributions.base import Parametric
from pyro_vae.distributions.extent import NORMAL_REACH, Extent
from pyro_vae.distributions.properties import clamp_inside

__all__ = ["LogitNormal"]


class LogitNormal(Parametric):
    r"""A variable between a and b whose logit is normal, :math:`y = \log\frac{x - a}{b - x} \sim N(\mu, \sigma^2)`.

    .. math:: \log p(x) = \log N(y; \mu, \sigma^2) + \log(b - a) - \log(x - a) - \log(b - x) .

    Draws lie strictly inside, where rounding would put them on the ends. Mean and variance have no closed form.

    Args:
        loc, scale: :math:`\mu` and :math:`\sigma`, positive.
        low, high: a and b, above a.

    Source: Atchison and Shen 1980, "Logistic-normal distributions: some properties and uses".

    >>> LogitNormal(torch.tensor(0.0), 1.0, low=-1.0, high=1.0).log_prob(torch.tensor(0.0))
    tensor(-0.2258)
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor | float,
        low: Tensor | float = 0.0,
        high: Tensor | float = 1.0,
        validate_args: bool | None = None,
    ):
        self.loc, self.scale, self.low, self.high = broadcast_all(loc, scale, low, high)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.interval(self.low, self.high)

    def rsample(self, sample_shape=()) -> Tensor:
        noise = torch.randn(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        share = (self.loc + self.scale * noise).sigmoid()
        return clamp_inside(self.low + (self.high - self.low) * share, self.low, self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value = clamp_inside(value, self.low, self.high)
        above, below = (value - self.low).log(), (self.high - value).log()
        standardized = (above - below - self.loc) / self.scale
        log_normal = -0.5 * (standardized**2 + math.log(2 * math.pi)) - self.scale.log()
        return log_normal + (self.high - self.low).log() - above - below

    def extent(self) -> Extent:
        """Nine standard deviations of the logit."""
        return Extent.around(self.loc, NORMAL_REACH * self.scale)
