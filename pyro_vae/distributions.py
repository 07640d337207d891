r"""Distributions that Pyro lacks, or has in a form that loses digits.

Relaxed variables live where they are safe in float32: a relaxed Bernoulli as its *logit*, a relaxed one-hot
(Gumbel-softmax) as its *logarithm* on the log-simplex. Squash a sample with ``sigmoid`` or ``exp`` after the sample
site; the KL divergence between two such distributions is the same on either side of that bijection.
"""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Transform, biject_to, transform_to
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid, softplus

from pyro_vae.bernoulli import SharedBernoulli

__all__ = [
    "AdditiveLogRatioTransform",
    "Bernoulli",
    "ContinuousBernoulli",
    "LogRelaxedOneHotCategorical",
    "LogitRelaxedBernoulli",
    "Product",
    "SoftTargetBernoulli",
    "base_distribution",
    "base_support",
    "is_normalized",
    "log_simplex",
    "without_independent",
]


def is_normalized(distribution: dist.Distribution) -> bool:
    """Whether ``log_prob`` is the logarithm of a density or mass: it sums to one over the support.

    Soft targets are none, and ``pyro.factor`` (which is a ``Unit``) may be any number.

    >>> is_normalized(dist.Normal(0.0, 1.0)), is_normalized(SoftTargetBernoulli(logits=torch.zeros(3)).to_event(1))
    (True, False)
    """
    base = base_distribution(distribution)
    return getattr(base, "normalized", not isinstance(base, dist.Unit))


def base_distribution(distribution: Any) -> Any:
    """The distribution inside all wrappers that have a ``base_dist``: ``Independent``, masked, transformed.

    >>> base_distribution(dist.Normal(torch.zeros(2), 1.0).to_event(1))
    Normal(loc: torch.Size([2]), scale: torch.Size([2]))
    """
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return distribution


def without_independent(distribution: Any) -> Any:
    """The distribution inside ``to_event`` alone: a masked or transformed one is another than its base.

    >>> without_independent(dist.Normal(torch.zeros(2), 1.0).to_event(1)).event_shape
    torch.Size([])
    """
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    return distribution


def base_support(distribution: Any) -> constraints.Constraint:
    """The constraint on one variable: that inside all ``independent`` ones, and of a mixture that of its components.

    >>> base_support(dist.Normal(torch.zeros(2), 1.0).to_event(1))
    Real()
    """
    support = distribution.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


class _LogSimplex(constraints.Constraint):
    """Vectors whose exponentials are positive and sum to one."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return value.logsumexp(-1).abs() < 1e-4

    def __repr__(self) -> str:
        return "log_simplex"


log_simplex = _LogSimplex()


class AdditiveLogRatioTransform(Transform):
    r"""From :math:`v \in \mathbb{R}^{k-1}` to :math:`y = \log\mathrm{softmax}(v_1, \dots, v_{k-1}, 0)`.

    Densities on the log-simplex are taken with respect to Lebesgue measure on these coordinates,
    :math:`v_j = y_j - y_k`, so the Jacobian term is zero by definition.

    >>> to_simplex = AdditiveLogRatioTransform()
    >>> to_simplex(torch.tensor([0.0])).exp()
    tensor([0.5000, 0.5000])
    """

    domain = constraints.real_vector
    codomain = log_simplex
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdditiveLogRatioTransform)

    def _call(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(*x.shape[:-1], 1)], dim=-1).log_softmax(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return y[..., :-1] - y[..., -1:]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(x.shape[:-1])

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] + 1))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] - 1))


@biject_to.register(_LogSimplex)
@transform_to.register(_LogSimplex)
def _to_log_simplex(constraint: _LogSimplex) -> AdditiveLogRatioTransform:
    return AdditiveLogRatioTransform()


def _open_uniform(shape: torch.Size, like: Tensor) -> Tensor:
    """Uniform noise that never touches 0 or 1, so that its logit is finite."""
    half_step = torch.finfo(like.dtype).eps / 2
    return torch.rand(shape, dtype=like.dtype, device=like.device).clamp(half_step, 1 - half_step)


class LogitRelaxedBernoulli(TorchDistribution):
    r"""The logit :math:`y` of a relaxed (binary concrete) Bernoulli.

    With logits :math:`l`, temperature :math:`\lambda` and :math:`d = l - \lambda y`,

    .. math:: \log p(y) = \log\lambda - \mathrm{softplus}(d) - \mathrm{softplus}(-d), \qquad
              y = \frac{l + \log u - \log(1 - u)}{\lambda},\ u \sim U(0, 1).

    ``sigmoid(y)`` is the relaxed variable in (0, 1) and ``y > 0`` has exactly the law of the discrete twin
    ``Bernoulli(logits=l)``, at every temperature. Unlike torch's ``LogitRelaxedBernoulli``, the density is finite
    wherever its arguments are, samples carry gradients at large logits, and ``has_rsample`` is true.

    Args:
        temperature: positive, any shape that broadcasts with ``logits``.
        logits: log-odds of the discrete twin.

    Source: Maddison, Mnih and Teh 2017, "The Concrete Distribution", appendix B.

    >>> q = LogitRelaxedBernoulli(torch.tensor(0.5), logits=torch.tensor([-100.0, 0.0, 100.0]))
    >>> q.log_prob(torch.zeros(3))
    tensor([-100.6931,   -2.0794, -100.6931])
    """

    arg_constraints = {"temperature": constraints.positive, "logits": constraints.real}
    support = constraints.real
    has_rsample = True

    def __init__(self, temperature: Tensor | float, logits: Tensor, validate_args: bool | None = None):
        self.temperature, self.logits = broadcast_all(temperature, logits)
        super().__init__(self.logits.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(LogitRelaxedBernoulli, _instance)
        new.temperature = self.temperature.expand(batch_shape)
        new.logits = self.logits.expand(batch_shape)
        super(LogitRelaxedBernoulli, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        noise = torch.logit(_open_uniform(self._extended_shape(sample_shape), self.logits))
        return (self.logits + noise) / self.temperature

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        difference = self.logits - self.temperature * value
        return self.temperature.log() + logsigmoid(difference) + logsigmoid(-difference)


class LogRelaxedOneHotCategorical(TorchDistribution):
    r"""The logarithm :math:`y` of a relaxed one-hot variable: Gumbel-softmax, or the concrete distribution.

    With logits :math:`l \in \mathbb{R}^k` and temperature :math:`\lambda`,

    .. math:: y = \log\mathrm{softmax}\big((l + g) / \lambda\big),\ g_j \sim \mathrm{Gumbel}(0, 1), \qquad
              \log p(y) = \log (k-1)! + (k - 1) \log\lambda + \sum_j \log\mathrm{softmax}(l - \lambda y)_j .

    The density is with respect to Lebesgue measure on the log-ratios :math:`y_j - y_k`, over :math:`k - 1` dimensions.
    ``exp(y)`` is the relaxed one-hot vector and the index of its largest entry has exactly the law of the discrete
    twin, at every temperature.

    Args:
        temperature: positive, any shape that broadcasts with the batch shape of ``logits``.
        logits: unnormalised, ``(*, k)``.

    Source: Jang, Gu and Poole 2017; Maddison, Mnih and Teh 2017, appendix C.

    >>> q = LogRelaxedOneHotCategorical(torch.tensor(0.1), logits=torch.tensor([100.0, 0.0, -100.0]))
    >>> y = q.sample()
    >>> y.shape, bool(q.log_prob(y).isfinite()), round(float(y.exp().sum()), 3)
    (torch.Size([3]), True, 1.0)
    """

    arg_constraints = {"temperature": constraints.positive, "logits": constraints.real_vector}
    support = log_simplex
    has_rsample = True

    def __init__(self, temperature: Tensor | float, logits: Tensor, validate_args: bool | None = None):
        if not isinstance(logits, Tensor) or logits.dim() == 0:
            raise ValueError(f"logits: got {logits!r}; accepted is a tensor (*, k), of k classes")
        temperature = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
        batch_shape = torch.broadcast_shapes(temperature.shape, logits.shape[:-1])
        self.temperature = temperature.expand(batch_shape)
        self.logits = logits.expand(*batch_shape, -1).log_softmax(-1)
        super().__init__(batch_shape, logits.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(LogRelaxedOneHotCategorical, _instance)
        new.temperature = self.temperature.expand(batch_shape)
        new.logits = self.logits.expand(*batch_shape, -1)
        super(LogRelaxedOneHotCategorical, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        gumbel = -(-_open_uniform(self._extended_shape(sample_shape), self.logits).log()).log()
        return ((self.logits + gumbel) / self.temperature[..., None]).log_softmax(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        k = self.event_shape[0]
        score = (self.logits - self.temperature[..., None] * value).log_softmax(-1).sum(-1)
        return math.lgamma(k) + (k - 1) * self.temperature.log() + score


class Product(dist.Independent):
    r"""Independent discrete variables that enumerate *jointly*, as one site.

    ``Bernoulli(...).to_event(1)`` refuses to enumerate in Pyro; this does, in one new dimension of
    :math:`S = s^n` states for :math:`n` variables of :math:`s` values each.

    Args:
        base: a distribution of single variables, such as ``Bernoulli`` or ``OneHotCategorical``.
        num_dims: how many of its rightmost batch dimensions are one event.

    Raises:
        ValueError: from :meth:`enumerate_support`, if there are more than ``max_states`` = 2^16 states.

    >>> q = Product(dist.Bernoulli(logits=torch.zeros(5, 2)), 1)
    >>> q.enumerate_support(expand=False).shape
    torch.Size([4, 1, 2])
    """

    max_states = 2**16
    has_enumerate_support = True

    def log_prob(self, value: Tensor) -> Tensor:
        base, num_dims = self.base_dist, self.reinterpreted_batch_ndims
        return base.joint_log_prob(value, num_dims) if isinstance(base, SharedBernoulli) else super().log_prob(value)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        base, num_dims = self.base_dist, self.reinterpreted_batch_ndims
        variables = base.batch_shape[len(base.batch_shape) - num_dims :]
        values = base.enumerate_support(expand=False)
        count = len(values) ** variables.numel()
        if count > self.max_states:
            raise ValueError(
                f"enumerate_support: {variables.numel()} variables of {len(values)} values have {count} states; "
                f"at most {self.max_states} are enumerated. To train, take a relaxed estimator or one of "
                "pyro_vae.objectives; for log p(x), the estimate pyro_vae.log_evidence"
            )
        grid = torch.cartesian_prod(*[torch.arange(len(values), device=values.device)] * variables.numel())
        states = values.reshape(len(values), *base.event_shape)[grid.reshape(count, -1)]
        states = states.reshape(count, *[1] * len(self.batch_shape), *self.event_shape)
        return states.expand(-1, *self.batch_shape, *self.event_shape) if expand else states


_GREY = (
    "a Bernoulli likelihood is the mass of 0s and 1s, and the data hold others, {low:.4g} to {high:.4g}. {rescale}"
    "Ways out: threshold the data, `datasets.binarize(x)`; sample them, `datasets.resample(x)`; use `likelihoods."
    "ContinuousBernoulli`, a density; or `likelihoods.Bernoulli(..., soft_targets=True)`, a cross-entropy, no density."
)
_RESCALE = "Bring them to [0, 1] first, such as `x / 255` for bytes. "


class Bernoulli(SharedBernoulli):
    """Pyro's Bernoulli, with an error that helps when it is asked to score grey values.

    >>> Bernoulli(logits=torch.zeros(2)).log_prob(torch.tensor([0.0, 0.3]))
    Traceback (most recent call last):
        ...
    ValueError: a Bernoulli likelihood is the mass of 0s and 1s, and the data hold others, 0 to 0.3. Ways out: ...
    """

    def _validate_sample(self, value: Tensor) -> None:
        if isinstance(value, Tensor) and (value.dtype == torch.bool or value.is_complex()):
            raise TypeError(f"value: got {value.dtype}; accepted are 0s and 1s, `x.float()` of what is true or false")
        if isinstance(value, Tensor) and not self.support.check(value).all():
            low, high = float(value.min()), float(value.max())
            raise ValueError(_GREY.format(low=low, high=high, rescale=_RESCALE if low < 0 or high > 1 else ""))
        super()._validate_sample(value)


class SoftTargetBernoulli(SharedBernoulli):
    r"""The cross-entropy :math:`x \log p + (1 - x) \log(1 - p)` for targets :math:`x` in [0, 1].

    It does not integrate to one over [0, 1], so it is **no likelihood** (``normalized`` is false): exact evidence
    refuses it, and training reports the objective as a surrogate, not as an ELBO. Samples are zeros and ones.

    >>> SoftTargetBernoulli(logits=torch.tensor(0.0)).log_prob(torch.tensor(0.3))
    tensor(-0.6931)
    """

    normalized = False
    support = constraints.unit_interval
    has_enumerate_support = False


class ContinuousBernoulli(TorchDistribution):
    r"""A density on [0, 1] with the cross-entropy as its exponent, for grey pixels.

    .. math:: \log p(x) = x\,l - \mathrm{softplus}(l) + \log C(l), \qquad C(l) = \frac{l}{\tanh(l / 2)} .

    Computed from logits :math:`l`, with a series near :math:`l = 0`, so that it keeps its digits in float32 at large
    logits, where torch's ``ContinuousBernoulli`` clamps its probabilities.

    Source: Loaiza-Ganem and Cunningham 2019, "The continuous Bernoulli".

    >>> ContinuousBernoulli(torch.tensor([0.0, 20.0])).log_prob(torch.tensor([0.5, 0.9]))
    tensor([0.0000, 0.9957])
    """

    arg_constraints = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None):
        self.logits = torch.as_tensor(logits)
        super().__init__(self.logits.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(ContinuousBernoulli, _instance)
        new.logits = self.logits.expand(batch_shape)
        super(ContinuousBernoulli, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def log_normalizer(self) -> Tensor:
        r""":math:`\log C(l)`, by its Taylor series where :math:`|l| < 0.3`."""
        small = self.logits.abs() < 0.3
        square = torch.where(small, self.logits, 0.0) ** 2
        series = square * (1 / 12 + square * (-7 / 1440 + square * (31 / 90720 - square * 127 / 4838400)))
        magnitude = torch.where(small, 1.0, self.logits.abs())
        return torch.where(small, math.log(2) + series, magnitude.log() - (magnitude / 2).tanh().log())

    @property
    def mean(self) -> Tensor:
        small = self.logits.abs() < 0.1
        logits = torch.where(small, self.logits, 0.0)
        series = 0.5 + logits * (1 / 12 + logits**2 * (-1 / 720 + logits**2 / 30240))
        magnitude = torch.where(small, 1.0, self.logits.abs())
        upper = -1 / torch.expm1(-magnitude) - 1 / magnitude
        return torch.where(small, series, torch.where(self.logits > 0, upper, 1 - upper))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        # x l - softplus(l), written so that x near 1 at a large l loses no digits.
        above = (value - 1) * self.logits - softplus(-self.logits)
        below = value * self.logits - softplus(self.logits)
        return torch.where(self.logits > 0, above, below) + self.log_normalizer

    def icdf(self, value: Tensor) -> Tensor:
        small = self.logits.abs() < 1e-3
        logits = torch.where(small, self.logits, 0.0)
        series = value + value * (1 - value) * (logits / 2 + logits**2 * (1 - 2 * value) / 6)
        magnitude = torch.where(small, 1.0, self.logits.abs())
        positive = self.logits > 0
        lower = -torch.log1p(torch.where(positive, 1 - value, value) * torch.expm1(-magnitude)) / magnitude
        return torch.where(small, series, torch.where(positive, 1 - lower, lower)).clamp(0, 1)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        return self.icdf(_open_uniform(self._extended_shape(sample_shape), self.logits))
