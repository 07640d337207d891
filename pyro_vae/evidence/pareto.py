r"""The generalised Pareto shape k̂ of the largest importance weights, which shows whether their mean is reliable.

Above a high cutoff, nearly every distribution of weights is close to a generalised Pareto distribution. Its shape k
determines how many moments the weights have: :math:`\mathbb{E}[w^m]` is finite for :math:`m < 1/k`. From k = 1/2 on,
the variance of the mean is infinite. Already below that, the mean of few weights is mostly too low, by more than its
standard error.

Source: Vehtari, Simpson, Gelman, Yao and Gabry 2024, "Pareto smoothed importance sampling"; Zhang and Stephens 2009, "A
new and efficient estimation method for the generalized Pareto distribution".
"""

import math

import torch
from torch import Tensor

from pyro_vae._utils.validation import describe, positive_int, real_tensor

__all__ = ["pareto_shape", "reliable_shape", "shape_error", "tail_length"]

_MIN_TAIL = 5  # draws above the cutoff, to fit a shape
_ROUNDING = 16  # units of the last digit of a log-weight
_PRIOR_DRAWS = 10  # weight of the prior, whose shape is 1/2


def tail_length(num_samples: int) -> int:
    r"""Return the number of draws in the tail of S draws, :math:`\lceil\min(S/5, 3\sqrt S)\rceil`.

    >>> tail_length(100), tail_length(5000)
    (20, 213)
    """
    positive_int(num_samples, "num_samples")
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def reliable_shape(num_samples: int) -> float:
    r"""Return the largest k̂ of a reliable mean of S weights, :math:`\min(1 - 1/\log_{10} S, 0.7)`.

    Minus infinity for one draw, and 0 or less up to ten draws. Source: Vehtari et al. 2024, equation 13.

    >>> reliable_shape(100), reliable_shape(5000)
    (0.5, 0.7)
    """
    positive_int(num_samples, "num_samples")
    return min(1 - 1 / math.log10(num_samples), 0.7) if num_samples > 1 else -math.inf


def pareto_shape(log_weights: Tensor, num_samples: int | None = None) -> Tensor:
    r"""Compute k̂ of the weights of each datum, for all data at once, in float64.

    The tail is the part above the :math:`(T+1)`-th largest of S weights, with T of :func:`tail_length`. A generalised
    Pareto distribution is fitted to its exceedances by the posterior mean of Zhang and Stephens. A prior of ten draws
    pulls the shape towards 1/2, :math:`\hat k = (T k + 5) / (T + 10)`. The result equals ``psislw`` of ArviZ 0.23 up to
    rounding, where that is finite; ArviZ 1.x rounds T down.

    * **All of the largest weights equal**, up to rounding: there is no tail, and k̂ is ``-inf``. Examples are an exact
      guide, whose weights all are p(x), and a discrete latent whose largest weight is drawn again and again.
    * **One to four draws above the cutoff**, and ties below them: too few to fit, and k̂ is ``inf``, since weights that
      were drawn so rarely may be larger than observed. (ArviZ returns ``inf`` in the case above too.)
    * **At most 20 draws**, whose tail has fewer than five: k̂ is ``NaN``.
    * **Weights of zero**, ``-inf``, are draws below the tail. If all are zero, k̂ is ``inf``. If a weight is ``NaN`` or
      infinite, k̂ is ``NaN``.

    No k̂ can detect a state of a discrete latent that was never drawn.

    Args:
        log_weights: ``(S, N)``, or at least the T + 1 largest of each datum, in any order.
        num_samples: S, if ``log_weights`` are only the largest.

    Returns ``(N,)``. Raises a TypeError or ValueError for weights of another type or shape, or fewer than T + 1.

    >>> uniform = 1 - torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)).double()
    >>> pareto_shape(-torch.tensor([0.2, 1.0]) * uniform.log()) < reliable_shape(4000)  # w = u^-k
    tensor([ True, False])
    >>> pareto_shape(torch.zeros(100, 2))
    tensor([-inf, -inf], dtype=torch.float64)
    """
    if not real_tensor(log_weights, "log_weights", "(S, N)").is_floating_point():
        raise TypeError(f"`log_weights` must be floats, (S, N), got {describe(log_weights)}")
    if log_weights.dim() != 2:
        raise ValueError(f"`log_weights` must be (S, N), got shape {tuple(log_weights.shape)}")
    count = len(log_weights) if num_samples is None else num_samples
    kept = min(tail_length(count) + 1, count)
    if len(log_weights) < kept:
        raise ValueError(f"`log_weights` must be at least the {kept} largest of {count}, got {len(log_weights)}")
    if kept <= _MIN_TAIL:
        return torch.full(log_weights.shape[1:], math.nan, dtype=torch.float64, device=log_weights.device)
    rounding = _ROUNDING * torch.finfo(log_weights.dtype).eps
    top = log_weights.topk(kept, dim=0).values.double()
    largest = top[0]
    relative = top - largest
    cutoff = relative[-1].clamp(min=math.log(torch.finfo(torch.float64).tiny))
    above = relative[:-1] > cutoff
    number = above.sum(0)
    exceedances = torch.where(above, cutoff.exp() * (relative[:-1] - cutoff).expm1(), 0.0)
    shape = torch.where(number < _MIN_TAIL, math.inf, _fit_shape(exceedances, number.clamp(min=_MIN_TAIL)))
    shape = torch.where(-cutoff <= rounding * (1 + largest.abs()), -math.inf, shape)
    shape = torch.where(largest == -math.inf, math.inf, shape)
    return torch.where(largest.isnan() | (largest == math.inf), math.nan, shape)


def shape_error(shape: Tensor, num_samples: int) -> Tensor:
    r"""Compute the standard error of k̂, from the T weights of the tail that it is fitted to,

    .. math:: \mathrm{se}(\hat k) = \frac{T}{T + 10} \cdot \frac{1 + k}{\sqrt T}.

    The second factor is the asymptotic error of a fitted shape k, the first the pull of the prior towards 1/2, which is
    taken off :math:`\hat k` to get k. The error is that of the draws alone. Not in it is the bias of a cutoff where the
    weights do not yet follow their limit, mostly towards low values.

    Source: Smith 1985, "Maximum likelihood estimation in a class of nonregular cases", for k > -1/2.

    Args:
        shape: k̂ of :func:`pareto_shape`; if it is ``-inf`` there is no tail, and the error is 0.
        num_samples: S.

    >>> shape_error(torch.tensor([0.5, -torch.inf]), 1000)
    tensor([0.1392, 0.0000])
    """
    tail = tail_length(num_samples)
    fitted = ((tail + _PRIOR_DRAWS) * shape - _PRIOR_DRAWS / 2) / tail
    return (1 + fitted).clamp(min=0) * tail**0.5 / (tail + _PRIOR_DRAWS)


def _fit_shape(exceedances: Tensor, number: Tensor) -> Tensor:
    """Fit the shape of each column to its first ``number`` exceedances, in falling order, followed by zeros.

    The profile likelihood of b = -k/σ is averaged on a grid, with a prior whose scale is that of the first quartile.
    """
    size = 30 + number.double().sqrt().floor()
    quartile = (number / 4 + 0.5).long() - 1  # counted from the smallest
    scale = 3 * exceedances.gather(0, (number - 1 - quartile)[None])[0]

    def shape_at(b: Tensor) -> Tensor:
        return torch.log1p(-b * exceedances).sum(0) / number

    points = range(1, int(size.max()) + 1)
    grid = torch.stack([(1 - (size / (j - 0.5)).sqrt()) / scale + 1 / exceedances[0] for j in points])
    shapes = torch.stack([shape_at(b) for b in grid])
    ratio = torch.where(grid == 0, number / exceedances.sum(0), -grid / shapes)  # 1/σ, and its limit
    likelihood = number * (ratio.log() - shapes - 1)
    outside = torch.arange(len(grid), device=grid.device)[:, None] >= size
    weight = likelihood.masked_fill(outside, -math.inf).softmax(0)
    weight = torch.where(weight >= 10 * torch.finfo(torch.float64).eps, weight, 0.0)
    shape = shape_at((weight * grid).sum(0) / weight.sum(0))
    return (number * shape + _PRIOR_DRAWS / 2) / (number + _PRIOR_DRAWS)
