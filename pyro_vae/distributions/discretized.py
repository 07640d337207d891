"""Distributions of numbers that are stored in levels, such as the 256 levels of a pixel's colour."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_vae._utils.validation import is_integer
from pyro_vae.distributions.base import Parametric

__all__ = ["DiscretizedLogisticMixture"]

_LEVELS_AT_ONCE = 16  # of the sums over all levels, whose terms are as large as the parameters


class DiscretizedLogisticMixture(Parametric):
    r"""Levels 0, ..., k - 1: a mixture of logistic variables, rounded to levels and clipped to the last ones.

    .. math:: P(x) = \sum_i \pi_i \Big[\sigma\Big(\frac{x + 1/2 - \mu_i}{s_i}\Big)
              - \sigma\Big(\frac{x - 1/2 - \mu_i}{s_i}\Big)\Big],

    where :math:`\sigma` of the upper end is 1 at the level k - 1, and that of the lower end is 0 at the level 0: the
    masses sum to one. With the ends a and b, :math:`\sigma(b) - \sigma(a) = \sigma(b)\,\sigma(-a)\,(1 - e^{a - b})`;
    the logarithm of the product has all digits in both tails. ``mean`` and ``variance`` are sums over all levels.

    Args:
        logits: those of the weights :math:`\pi`, ``(*, components)``.
        loc: :math:`\mu`, likewise, in levels.
        scale: :math:`s`, positive, likewise, in levels. The standard deviation of a logistic variable is 1.81 s.
        num_levels: k.

    Source: Salimans, Karpathy, Chen and Kingma 2017, "PixelCNN++", section 2.1.

    >>> q = DiscretizedLogisticMixture(torch.zeros(2), torch.tensor([0.0, 3.0]), torch.tensor([0.1, 0.1]), num_levels=4)
    >>> q.log_prob(torch.arange(4.0)).exp(), q.mean
    (tensor([0.4967, 0.0033, 0.0033, 0.4967]), tensor(1.5000))
    """

    arg_constraints = {
        "logits": constraints.real_vector,
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }
    has_enumerate_support = True

    def __init__(
        self, logits: Tensor, loc: Tensor, scale: Tensor, num_levels: int = 256, validate_args: bool | None = None
    ):
        if not is_integer(num_levels) or num_levels < 2:
            raise ValueError(f"`num_levels` must be an integer of 2 or more, got {num_levels!r}")
        self.num_levels = int(num_levels)
        self.logits, self.loc, self.scale = torch.broadcast_tensors(logits, loc, scale)
        super().__init__(self.loc.shape[:-1], validate_args=validate_args)

    @property
    def support(self) -> Any:
        return constraints.integer_interval(0, self.num_levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        x = value[..., None]
        above, below = (x + 0.5 - self.loc) / self.scale, (x - 0.5 - self.loc) / self.scale
        inside = torch.log(-torch.expm1(-1 / self.scale))
        lower = torch.where(x < self.num_levels - 1, logsigmoid(above), 0.0)
        upper = torch.where(x > 0, logsigmoid(-below), 0.0)
        each = lower + upper + torch.where((x > 0) & (x < self.num_levels - 1), inside, 0.0)
        return torch.logsumexp(self.logits.log_softmax(-1) + each, -1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        component = dist.Categorical(logits=self.logits, validate_args=False).sample(torch.Size(sample_shape))
        wide = (each.expand(*shape, -1) for each in (self.loc, self.scale))
        loc, scale = (each.gather(-1, component[..., None])[..., 0] for each in wide)
        uniform = torch.rand_like(loc)
        drawn = loc + scale * (uniform.log() - torch.log1p(-uniform))
        return drawn.round().clamp(0, self.num_levels - 1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        levels = torch.arange(self.num_levels, dtype=self.loc.dtype, device=self.loc.device)
        levels = levels.reshape(-1, *[1] * len(self.batch_shape))
        return levels.expand(-1, *self.batch_shape) if expand else levels

    @property
    def mean(self) -> Tensor:
        return self._sum_of_tails(self.loc.new_ones(self.num_levels - 1, dtype=torch.float64)).to(self.loc.dtype)

    @property
    def variance(self) -> Tensor:
        odd = 2 * self._levels_above_0() - 1  # the sum of the first j odd numbers is j squared
        squared = self._sum_of_tails(self.loc.new_ones(self.num_levels - 1, dtype=torch.float64)).square()
        return (self._sum_of_tails(odd) - squared).to(self.loc.dtype)

    def _levels_above_0(self) -> Tensor:
        return torch.arange(1, self.num_levels, dtype=torch.float64, device=self.loc.device)

    def _sum_of_tails(self, weights: Tensor) -> Tensor:
        """The sum over the levels j above 0 of a weight times P(x >= j), in float64.

        The mean square and the squared mean are up to 65,025: their difference, near 0.01, has no digits in float32.
        """
        loc, scale = self.loc.double(), self.scale.double()
        total, levels = torch.zeros_like(loc), self._levels_above_0()
        for several, weight in zip(levels.split(_LEVELS_AT_ONCE), weights.split(_LEVELS_AT_ONCE), strict=True):
            ends = several - 0.5
            tails = ((loc[..., None] - ends) / scale[..., None]).sigmoid()
            total = total + (tails * weight).sum(-1)
        return (total * self.logits.double().softmax(-1)).sum(-1)
