"""Bernoulli distributions: of logits shared by many data, with soft targets, and the continuous Bernoulli."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from pyro_vae.distributions.base import Parametric
from pyro_vae.distributions.relaxed import open_uniform

__all__ = ["Bernoulli", "ContinuousBernoulli", "SharedBernoulli", "SoftTargetBernoulli"]


class SharedBernoulli(dist.Bernoulli):
    r"""Pyro's Bernoulli, with logarithms computed before its logits are expanded.

    .. math:: \log p(x) = x \log \sigma(l) + (1 - x) \log \sigma(-l)

    For S states and N data, logits ``(S, 1, D)`` need S D logarithms, where torch computes S N D. Gradients go to the
    original logits; the attribute ``logits`` of an expanded distribution has none.

    >>> x = torch.tensor([[0.0], [1.0]])
    >>> SharedBernoulli(logits=torch.tensor([[[1.0]], [[-2.0]]])).expand([2, 2, 1]).log_prob(x)[..., 0]
    tensor([[-1.3133, -0.3133],
            [-0.1269, -2.1269]])
    """

    _before_expansion: Tensor | None = None

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = super().expand(batch_shape, _instance)
        new._before_expansion = self._logits
        return new

    @property
    def _logits(self) -> Tensor:
        return self.logits if self._before_expansion is None else self._before_expansion

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_p = self._log_mass(value)
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))

    def joint_log_prob(self, value: Tensor, num_dims: int) -> Tensor:
        r"""The log-mass, summed over the last ``num_dims`` dimensions.

        Where logits vary over states alone and values over data alone, or the reverse, it is two matrix
        products, :math:`X \log\sigma(L)^\top + (1 - X) \log\sigma(-L)^\top`, without a tensor of S N D numbers. They
        are in float64, which neither autocast nor TF32 reduces.
        """
        if self._validate_args:
            self._validate_sample(value)
        logits = self._logits
        event = self.batch_shape[len(self.batch_shape) - num_dims :]
        shape = torch.broadcast_shapes(logits.shape, value.shape, event)
        batch = shape[: len(shape) - num_dims]
        of_logits, of_values = (_varying(tensor, event, len(batch)) for tensor in (logits, value))
        apart = of_logits and of_values and not of_logits & of_values
        if not apart or 0 in shape or value.dtype != logits.dtype:
            log_p = self._log_mass(value)
            if num_dims:
                log_p = log_p.expand(torch.broadcast_shapes(log_p.shape, event)).sum(tuple(range(-num_dims, 0)))
        else:
            x, of = (tensor.double().reshape(-1, event.numel()) for tensor in (value, logits))
            log_p = (x @ logsigmoid(of).T + (1 - x) @ logsigmoid(-of).T).to(logits.dtype)
            order = sorted(of_values) + sorted(of_logits)
            log_p = log_p.reshape([batch[dim] for dim in order]).permute([order.index(dim) for dim in sorted(order)])
            log_p = log_p.reshape(batch)
        return log_p.expand(torch.broadcast_shapes(batch, self.batch_shape[: len(self.batch_shape) - num_dims]))

    def _log_mass(self, value: Tensor) -> Tensor:
        """The log-mass of each variable, in the shape of value and original logits."""
        logits = self._logits
        shape = torch.broadcast_shapes(logits.shape, value.shape)
        if shape == logits.shape or value.dtype != logits.dtype:
            # as `binary_cross_entropy_with_logits`, which is eight times slower in torch.vmap
            return torch.addcmul(logsigmoid(logits), 1 - value, logits, value=-1)
        return torch.lerp(logsigmoid(-logits), logsigmoid(logits), value)


def _varying(tensor: Tensor, event: torch.Size, batch_dims: int) -> set[int]:
    """The batch dimensions of ``batch_dims`` with more than one event; none if the event dimensions are incomplete."""
    batch = tensor.shape[: tensor.dim() - len(event)]
    if tensor.shape[len(batch) :] != event:
        return set()
    return {batch_dims - len(batch) + dim for dim, size in enumerate(batch) if size > 1}


_GREY = (
    "the data of a Bernoulli likelihood must be 0s and 1s, got {low:.4g} to {high:.4g}. {rescale}"
    "Alternatives: threshold the data, `datasets.binarize(x)`; sample them, `datasets.resample(x)`; use `likelihoods."
    "ContinuousBernoulli`, a density; or `likelihoods.Bernoulli(..., soft_targets=True)`, a cross-entropy, no density."
)
_RESCALE = "Bring them to [0, 1] first, such as `x / 255` for bytes. "


class Bernoulli(SharedBernoulli):
    """Pyro's Bernoulli, with an error for grey values that names the alternatives.

    >>> Bernoulli(logits=torch.zeros(2)).log_prob(torch.tensor([0.0, 0.3]))
    Traceback (most recent call last):
        ...
    ValueError: the data of a Bernoulli likelihood must be 0s and 1s, got 0 to 0.3. Alternatives: ...
    """

    def _validate_sample(self, value: Tensor) -> None:
        if isinstance(value, Tensor) and (value.dtype == torch.bool or value.is_complex()):
            raise TypeError(f"`value` must be 0s and 1s (convert booleans with `x.float()`), got {value.dtype}")
        if isinstance(value, Tensor) and not self.support.check(value).all():
            low, high = float(value.min()), float(value.max())
            raise ValueError(_GREY.format(low=low, high=high, rescale=_RESCALE if low < 0 or high > 1 else ""))
        super()._validate_sample(value)


class SoftTargetBernoulli(SharedBernoulli):
    r"""The cross-entropy :math:`x \log p + (1 - x) \log(1 - p)` for targets :math:`x` in [0, 1].

    It does not integrate to one over [0, 1], so it is **no likelihood** (``normalized`` is false): exact evidence
    raises an error, and training reports a surrogate in place of an ELBO. Samples are zeros and ones.

    >>> SoftTargetBernoulli(logits=torch.tensor(0.0)).log_prob(torch.tensor(0.3))
    tensor(-0.6931)
    """

    normalized = False
    support = constraints.unit_interval
    has_enumerate_support = False


class ContinuousBernoulli(Parametric):
    r"""A density on [0, 1] with the cross-entropy as its exponent, for grey pixels.

    .. math:: \log p(x) = x\,l - \mathrm{softplus}(l) + \log C(l), \qquad C(l) = \frac{l}{\tanh(l / 2)} .

    It is computed from logits :math:`l`, with a series near :math:`l = 0`, and keeps full precision in float32 at large
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
        # x l - softplus(l), in a form that keeps precision for x near 1 at large l.
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

    def rsample(self, sample_shape=()) -> Tensor:
        return self.icdf(open_uniform(self._extended_shape(sample_shape), self.logits))
