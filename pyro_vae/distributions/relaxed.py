"""Relaxed distributions in logit or log space, where float32 keeps full precision."""

import math

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Transform, biject_to, transform_to
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

from pyro_vae.distributions.base import Parametric
from pyro_vae.distributions.extent import LOG_TAIL, Extent

__all__ = ["AdditiveLogRatioTransform", "LogRelaxedOneHotCategorical", "LogitRelaxedBernoulli", "log_simplex"]


class _LogSimplex(constraints.Constraint):
    """Vectors whose exponentials are positive and sum to one."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return value.logsumexp(-1).abs() < 1e-4

    def __repr__(self) -> str:
        return "log_simplex"


log_simplex = _LogSimplex()


class AdditiveLogRatioTransform(Transform):
    r"""The map of :math:`v \in \mathbb{R}^{k-1}` to :math:`y = \log\mathrm{softmax}(v_1, \dots, v_{k-1}, 0)`.

    Densities on the log-simplex are taken with respect to Lebesgue measure on these coordinates,
    :math:`v_j = y_j - y_k`, so the Jacobian term is zero by definition.

    >>> AdditiveLogRatioTransform()(torch.tensor([0.0])).exp()
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


def open_uniform(shape: torch.Size, like: Tensor) -> Tensor:
    """Uniform noise strictly between 0 and 1, so that its logit is finite."""
    half_step = torch.finfo(like.dtype).eps / 2
    return torch.rand(shape, dtype=like.dtype, device=like.device).clamp(half_step, 1 - half_step)


class LogitRelaxedBernoulli(Parametric):
    r"""The logit :math:`y` of a relaxed (binary concrete) Bernoulli.

    With logits :math:`l`, temperature :math:`\lambda` and :math:`d = l - \lambda y`,

    .. math:: \log p(y) = \log\lambda - \mathrm{softplus}(d) - \mathrm{softplus}(-d), \qquad
              y = \frac{l + \log u - \log(1 - u)}{\lambda},\ u \sim U(0, 1).

    ``sigmoid(y)`` is the relaxed variable in (0, 1), and ``y > 0`` has exactly the law of the discrete twin
    ``Bernoulli(logits=l)``, at every temperature. Unlike torch's ``LogitRelaxedBernoulli``, the density is finite for
    all finite arguments, draws carry gradients at large logits, and ``has_rsample`` is true.

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

    def rsample(self, sample_shape=()) -> Tensor:
        noise = torch.logit(open_uniform(self._extended_shape(sample_shape), self.logits))
        return (self.logits + noise) / self.temperature

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        difference = self.logits - self.temperature * value
        return self.temperature.log() + logsigmoid(difference) + logsigmoid(-difference)

    def discrete(self) -> torch.distributions.Bernoulli:
        """The discrete twin, ``Bernoulli(logits=l)``."""
        return torch.distributions.Bernoulli(logits=self.logits)

    def extent(self) -> Extent:
        """The box, broken at 0: there a hard reading jumps."""
        return _logistic_extent(self.logits, self.temperature)


class LogRelaxedOneHotCategorical(Parametric):
    r"""The logarithm :math:`y` of a relaxed one-hot variable: Gumbel-softmax, or the concrete distribution.

    With logits :math:`l \in \mathbb{R}^k` and temperature :math:`\lambda`,

    .. math:: y = \log\mathrm{softmax}\big((l + g) / \lambda\big),\ g_j \sim \mathrm{Gumbel}(0, 1), \qquad
              \log p(y) = \log (k-1)! + (k - 1) \log\lambda + \sum_j \log\mathrm{softmax}(l - \lambda y)_j .

    The density is with respect to Lebesgue measure on the log-ratios :math:`y_j - y_k`, over :math:`k - 1` dimensions.
    ``exp(y)`` is the relaxed one-hot vector; the index of its largest entry has exactly the law of the discrete twin.

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
            raise ValueError(f"`logits` must be a tensor (*, k), of k classes, got {logits!r}")
        temperature = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
        batch_shape = torch.broadcast_shapes(temperature.shape, logits.shape[:-1])
        self.temperature = temperature.expand(batch_shape)
        self.logits = logits.expand(*batch_shape, -1).log_softmax(-1)
        super().__init__(batch_shape, logits.shape[-1:], validate_args=validate_args)

    def rsample(self, sample_shape=()) -> Tensor:
        gumbel = -(-open_uniform(self._extended_shape(sample_shape), self.logits).log()).log()
        return ((self.logits + gumbel) / self.temperature[..., None]).log_softmax(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        k = self.event_shape[0]
        score = (self.logits - self.temperature[..., None] * value).log_softmax(-1).sum(-1)
        return math.lgamma(k) + (k - 1) * self.temperature.log() + score

    def discrete(self) -> torch.distributions.OneHotCategorical:
        """The discrete twin, ``OneHotCategorical(logits=l)``."""
        return torch.distributions.OneHotCategorical(logits=self.logits)

    def extent(self) -> Extent:
        """The box of the log-ratios, broken at 0: there a hard reading jumps."""
        return _logistic_extent(self.logits[..., :-1] - self.logits[..., -1:], self.temperature[..., None])


def _logistic_extent(logits: Tensor, temperature: Tensor) -> Extent:
    """The box of logistic variables of location l / λ and scale 1 / λ, and that of the passage from 0 to 1 inside."""
    loc, radius = logits / temperature, LOG_TAIL / temperature
    low, high = loc - radius, loc + radius
    zero = torch.zeros_like(loc)
    box = Extent(low, zero.clamp(low, high), high)
    return box._replace(parts=(box, Extent.around(zero, (zero + LOG_TAIL).minimum(radius))))
