r"""Distributions for tables: counts, classes and levels by number, amounts, and numbers with outliers.

They are finite in float32 at any output of a network.

The terms of the log-mass of a count cancel: :math:`\log 10000!` is 82,000 nats, which float32 holds to one decimal
only. They are computed in float64, and rounded at the end.
"""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid, relu

from pyro_vae._utils.validation import describe
from pyro_vae.distributions.base import Parametric, named_arguments
from pyro_vae.distributions.properties import base_support

__all__ = ["Categorical", "LogNormal", "NegativeBinomial", "Ordinal", "Poisson", "StudentT", "ZeroInflated"]
__all__ += ["log_of_bounded_exp"]

_BEND = 16.0  # e^16 = 9e6: far above it, float32 cannot represent neighbouring counts
_STIRLING = 1e4  # above it, the series is exact to 1e-22; a difference of log-gammas is not
_NORMAL = 2.0**24  # a mean above which a count is drawn as a rounded normal


def log_of_bounded_exp(raw: Tensor) -> Tensor:
    r"""The logarithm of :math:`e^r` up to :math:`r = 16`, and of its tangent :math:`e^{16}(1 + r - 16)` beyond.

    As the mean of counts it does not overflow in float32 at any output of a network, and its gradient does not vanish.

    >>> log_of_bounded_exp(torch.tensor([-3.0, 16.0, 1e6]))
    tensor([-3.0000, 16.0000, 29.8155])
    """
    return raw.clamp(max=_BEND) + relu(raw - _BEND).log1p()


def _log_gamma_ratio(theta: Tensor, x: Tensor | float) -> Tensor:
    r""":math:`\log\Gamma(\theta + x) - \log\Gamma(\theta)` in float64, by Stirling's series where the two are large."""
    large = theta > _STIRLING
    near, far = torch.where(large, 1.0, theta), torch.where(large, theta, _STIRLING)
    series = (far - 0.5) * torch.log1p(x / far) + x * (far + x).log() - x
    series = series + (1 / (far + x) - 1 / far) / 12 - ((far + x) ** -3 - far**-3) / 360
    return torch.where(large, series, (near + x).lgamma() - near.lgamma())


def _draw_counts(mean: Tensor) -> Tensor:
    """Draw Poisson counts; rounded normals for a large mean, where float32 cannot show the difference."""
    counts = torch.poisson(mean.clamp(max=_NORMAL))
    if (mean <= _NORMAL).all():
        return counts
    return torch.where(mean <= _NORMAL, counts, (mean + mean.sqrt() * torch.randn_like(mean)).round())


class Poisson(Parametric):
    r"""Poisson counts, :math:`\log p(x) = x\,l - e^l - \log x!` with the log-rate :math:`l`.

    >>> Poisson(torch.tensor([-200.0, 0.0, 80.0])).log_prob(torch.tensor([1.0, 2.0, 3.0]))
    tensor([-2.0000e+02, -1.6931e+00, -5.5406e+34])
    """

    arg_constraints = {"log_rate": constraints.real}
    support = constraints.nonnegative_integer

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None):
        self.log_rate = torch.as_tensor(log_rate)
        super().__init__(self.log_rate.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.log_rate.exp()

    variance = mean

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        return _draw_counts(self.mean.expand(self._extended_shape(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        x, log_rate = value.double(), self.log_rate.double()
        return (x * log_rate - log_rate.exp() - (x + 1).lgamma()).to(self.log_rate.dtype)


class NegativeBinomial(Parametric):
    r"""Overdispersed counts: a Poisson variable whose rate is gamma-distributed.

    With mean :math:`\mu` and dispersion :math:`\alpha`, the variance is :math:`\mu + \alpha\mu^2`. With
    :math:`\theta = 1/\alpha`, the ``total_count`` of torch, and its logits :math:`l = \log \alpha\mu`,

    .. math:: \log p(x) = \log\frac{\Gamma(x + \theta)}{\Gamma(\theta)\,x!}
              - \theta\,\mathrm{softplus}(l) - x\,\mathrm{softplus}(-l) .

    As :math:`\alpha` goes to 0 it becomes Poisson.

    >>> q = NegativeBinomial(torch.tensor(2.0).log(), dispersion=torch.tensor(0.5))
    >>> q.mean, q.variance, q.log_prob(torch.tensor(3.0)).exp()
    (tensor(2.), tensor(4.), tensor(0.1250))
    """

    arg_constraints = {"log_mean": constraints.real, "dispersion": constraints.positive}
    support = constraints.nonnegative_integer

    def __init__(self, log_mean: Tensor, dispersion: Tensor | float, validate_args: bool | None = None):
        self.log_mean, self.dispersion = broadcast_all(log_mean, dispersion)
        super().__init__(self.log_mean.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.log_mean.exp()

    @property
    def variance(self) -> Tensor:
        return self.mean + self.dispersion * self.mean**2

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        scale = (self.dispersion * self.mean).expand(shape)
        shape_parameter = (1 / self.dispersion).expand(shape).contiguous()
        return _draw_counts(dist.Gamma(shape_parameter, 1.0, validate_args=False).sample() * scale)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        x, dispersion = value.double(), self.dispersion.double()
        theta, logits = 1 / dispersion, self.log_mean.double() + dispersion.log()
        ways = _log_gamma_ratio(theta, x) - (x + 1).lgamma()
        return (ways + theta * logsigmoid(-logits) + x * logsigmoid(logits)).to(self.log_mean.dtype)


class ZeroInflated(Parametric):
    r"""Counts with more zeros than those of a base distribution: zero with the probability :math:`\pi`, else its count.

    .. math:: p(0) = \pi + (1 - \pi)\,p_\mathrm{base}(0), \qquad p(x) = (1 - \pi)\,p_\mathrm{base}(x), \quad x > 0.

    The logarithms are those of :math:`\sigma(\pm l)` for the gate's logits :math:`l = \mathrm{logit}\,\pi`, which keep
    the digits of both at any logits.

    Args:
        base: single counts, event shape ``()``.
        gate_logits: logits of the probability of a zero that is not the base's, of the batch shape of ``base``.

    Source: Lambert 1992, "Zero-inflated Poisson regression".

    >>> q = ZeroInflated(Poisson(torch.tensor(0.0)), gate_logits=torch.tensor(0.0))
    >>> q.log_prob(torch.tensor([0.0, 1.0])).exp(), q.mean
    (tensor([0.6839, 0.1839]), tensor(0.5000))
    """

    arg_constraints = {"gate_logits": constraints.real}
    support = constraints.nonnegative_integer

    def __init__(self, base: dist.TorchDistribution, gate_logits: Tensor, validate_args: bool | None = None):
        if base.event_shape or base_support(base) is not constraints.nonnegative_integer:
            what = f"a {type(base).__name__} on {base.support}, of event shape {tuple(base.event_shape)}"
            raise ValueError(f"`base` must be a distribution of single counts, such as a Poisson, got {what}")
        self.gate_logits = torch.as_tensor(gate_logits)
        batch = torch.broadcast_shapes(base.batch_shape, self.gate_logits.shape)
        self.base, self.gate_logits = base.expand(batch), self.gate_logits.expand(batch)
        super().__init__(batch, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ZeroInflated":
        new = super().expand(batch_shape, _instance)
        new.base = self.base.expand(torch.Size(batch_shape))
        return new

    @property
    def gate(self) -> Tensor:
        r"""The probability :math:`\pi`."""
        return self.gate_logits.sigmoid()

    @property
    def mean(self) -> Tensor:
        return (-self.gate_logits).sigmoid() * self.base.mean

    @property
    def variance(self) -> Tensor:
        return (-self.gate_logits).sigmoid() * (self.base.variance + self.gate * self.base.mean**2)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        counts = self.base.sample(torch.Size(sample_shape))
        return torch.where(torch.rand_like(counts) < self.gate, 0.0, counts)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        counted = logsigmoid(-self.gate_logits) + self.base.log_prob(value)
        return torch.where(value == 0, torch.logaddexp(logsigmoid(self.gate_logits), counted), counted)


class Categorical(dist.Categorical):
    """Pyro's Categorical on class numbers 0, ..., k - 1 in the dtype of its logits, for an encoder to read.

    ``log_prob`` takes integers of any dtype. ``mean`` and ``variance`` are those of the class *number*, useful where
    the classes are ordered; ``mode`` is the likeliest class.

    >>> q = Categorical(logits=torch.tensor([0.2, 0.3, 0.5]).log())
    >>> q.log_prob(torch.tensor(2.0)).exp(), q.log_prob(torch.tensor(2)).exp(), q.sample().dtype
    (tensor(0.5000), tensor(0.5000), torch.float32)
    """

    @property
    def mean(self) -> Tensor:
        return (self.probs * self._numbers).sum(-1)

    @property
    def variance(self) -> Tensor:
        return (self.probs * (self._numbers - self.mean[..., None]) ** 2).sum(-1)

    @property
    def mode(self) -> Tensor:
        return super().mode.to(self.logits.dtype)

    @property
    def _numbers(self) -> Tensor:
        return torch.arange(self.logits.shape[-1], dtype=self.logits.dtype, device=self.logits.device)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return super().sample(torch.Size(sample_shape)).to(self.logits.dtype)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        return super().enumerate_support(expand).to(self.logits.dtype)


@named_arguments
class Ordinal(Categorical):
    r"""Ordered levels 0, ..., k - 1: where a logistic variable around a location lies among k - 1 cut points.

    .. math:: P(x \le j) = \sigma(c_{j+1} - \eta), \qquad c_1 < \dots < c_{k-1},

    the cumulative logit or proportional-odds model. The mass of a level between the cut points a and b is
    :math:`\sigma(b) - \sigma(a) = \sigma(b)\,\sigma(-a)\,(1 - e^{a - b})`; the logarithm of the product has all digits
    in both tails.

    Args:
        loc: :math:`\eta`; the higher, the higher the level.
        cuts: ``(*, k - 1)``, increasing.

    Source: McCullagh 1980, "Regression models for ordinal data".

    >>> q = Ordinal(torch.tensor(0.0), cuts=torch.tensor([-1.0, 1.0]))
    >>> q.probs, q.mean
    (tensor([0.2689, 0.4621, 0.2689]), tensor(1.))
    """

    arg_constraints = {"loc": constraints.real, "cuts": constraints.ordered_vector}

    def __init__(self, loc: Tensor | float, cuts: Tensor, validate_args: bool | None = None):
        if not isinstance(cuts, Tensor) or not cuts.dim() or not cuts.shape[-1]:
            raise ValueError(f"`cuts` must be a tensor (*, k - 1) of increasing numbers, got {describe(cuts)}")
        loc = torch.as_tensor(loc).to(cuts)
        batch = torch.broadcast_shapes(loc.shape, cuts.shape[:-1])
        self.loc, self.cuts = loc.expand(batch), cuts.expand(*batch, -1)
        above = cuts - loc[..., None]
        gaps = torch.log(-torch.expm1(-cuts.diff(dim=-1)))
        inner = gaps + logsigmoid(above[..., 1:]) + logsigmoid(-above[..., :-1])
        logits = torch.cat([logsigmoid(above[..., :1]), inner, logsigmoid(-above[..., -1:])], -1)
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = super().expand(batch_shape, self._get_checked_instance(Ordinal, _instance))
        new.loc, new.cuts = self.loc.expand(batch_shape), self.cuts.expand(*batch_shape, -1)
        return new


class LogNormal(dist.LogNormal):
    """Pyro's LogNormal, with an error for zeros that names the alternatives.

    >>> LogNormal(0.0, 1.0).log_prob(torch.tensor([1.0, 0.0]))
    Traceback (most recent call last):
        ...
    ValueError: the values of a LogNormal must be positive numbers, got 0. Alternatives: ...
    """

    alternatives = (
        "Alternatives: for counts, a zero-inflated Poisson or NegativeBinomial; for other amounts that may be 0, a "
        "Normal on log(1 + x), or a Bernoulli column of whether x > 0 and a LogNormal one with NaN where x is 0."
    )

    def _validate_sample(self, value: Tensor) -> None:
        if isinstance(value, Tensor) and not value.is_complex() and (value <= 0).any():
            got = f"got {float(value.min()):.4g}"
            raise ValueError(f"the values of a LogNormal must be positive numbers, {got}. {self.alternatives}")
        super()._validate_sample(value)


class StudentT(dist.StudentT):
    r"""Pyro's Student-t, with full precision at many degrees of freedom and far from the centre.

    With :math:`u = (x - \mu) / (\sigma\sqrt{\nu})`,

    .. math:: \log p(x) = \log\frac{\Gamma(\frac{\nu + 1}{2})}{\Gamma(\frac{\nu}{2})} - \tfrac12\log \pi\nu
              - \log\sigma - \tfrac{\nu + 1}{2} \log(1 + u^2) .

    >>> StudentT(1.0, 0.0, 1.0).log_prob(torch.tensor([0.0, 1e30]))
    tensor([  -1.1447, -139.2998])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        half = 0.5 * self.df.double()
        constant = (_log_gamma_ratio(half, 0.5) - 0.5 * (2 * math.pi * half).log()).to(self.df.dtype)
        u = ((value - self.loc) / (self.scale * self.df.sqrt())).abs()
        near, far = u.clamp(max=1.0), u.clamp(min=1.0)
        bend = torch.where(u < 1, torch.log1p(near**2), 2 * far.log() + torch.log1p(1 / far**2))
        return constant - self.scale.log() - 0.5 * (self.df + 1) * bend
