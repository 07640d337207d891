r"""The generalised Pareto shape k̂ of the largest importance weights: whether their mean can be trusted.

Above a high cutoff nearly every law of weights looks like a generalised Pareto distribution, and its shape k tells how
many moments the weights have: :math:`\mathbb{E}[w^m]` is finite for :math:`m < 1/k`. From k = 1/2 the variance of the
mean is infinite, and already below that a mean of few weights is mostly too low, without a word from its standard
error.

Source: Vehtari, Simpson, Gelman, Yao and Gabry 2024, "Pareto smoothed importance sampling"; Zhang and Stephens 2009, "A
new and efficient estimation method for the generalized Pareto distribution".
"""

import math

import torch
from torch import Tensor

from pyro_vae._utils.validation import describe, positive_int, real_tensor

__all__ = ["pareto_shape", "reliable_shape", "tail_length"]

_LEAST = 5  # draws above the cutoff that a shape is fitted to


_ROUNDING = 16  # of the last digit of a log-weight


_PRIOR_DRAWS = 10  # of the weak prior, whose shape is 1/2


def tail_length(num_samples: int) -> int:
    r"""How many of S draws make the tail, :math:`\lceil\min(S/5, 3\sqrt S)\rceil`.

    >>> tail_length(100), tail_length(5000)
    (20, 213)
    """
    positive_int(num_samples, "num_samples")
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def reliable_shape(num_samples: int) -> float:
    r"""The k̂ up to which a mean of S weights is to be trusted, :math:`\min(1 - 1/\log_{10} S, 0.7)`.

    Source: Vehtari et al. 2024, equation 13. Minus infinity of one draw, 0 or less up to ten: nothing is.

    >>> reliable_shape(100), reliable_shape(5000)
    (0.5, 0.7)
    """
    positive_int(num_samples, "num_samples")
    return min(1 - 1 / math.log10(num_samples), 0.7) if num_samples > 1 else -math.inf


def pareto_shape(log_weights: Tensor, num_samples: int | None = None) -> Tensor:
    r"""k̂ of the weights of each datum, all data at once.

    The tail is what lies above the :math:`(T+1)`-th largest of S weights, T of :func:`tail_length`. To its exceedances
    a generalised Pareto distribution is fitted by the posterior mean of Zhang and Stephens, and the shape is drawn
    towards 1/2 as if by ten more draws, :math:`\hat k = (T k + 5) / (T + 10)`. In float64; equal to ``psislw`` of ArviZ
    0.23 to rounding, where that has an answer; ArviZ 1.x rounds T down.

    * **All weights equal at the top**, to rounding: there is no tail, and k̂ is ``-inf``. So it is of an exact guide,
      whose weights all are p(x), and of a discrete latent whose largest weight is drawn again and again.
    * **One to four draws above the cutoff**, and ties below them: too few to fit, and k̂ is ``inf``: what was seen so
      rarely may well weigh more than is known. (ArviZ says ``inf`` in the case above too.)
    * **Too few draws at all**, up to 20, whose tail has no five: k̂ is ``NaN``.
    * **Weights of zero**, ``-inf``, are draws like others, below the tail. If all are zero, k̂ is ``inf``; of a weight
      that is ``NaN`` or infinite it is ``NaN``.

    Of a state of a discrete latent that was never drawn, no k̂ can know.

    Args:
        log_weights: ``(S, N)``, or only the T + 1 largest or more of each datum, in any order.
        num_samples: S, where ``log_weights`` are only the largest.

    Returns:
        ``(N,)``, without a unit.

    Raises:
        ValueError: if the shape is another, or there are fewer weights than the tail needs.

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
        raise ValueError(
            f"`log_weights` must be the {kept} largest or more, got the {len(log_weights)} largest of {count}"
        )
    if kept <= _LEAST:
        return torch.full(log_weights.shape[1:], math.nan, dtype=torch.float64, device=log_weights.device)
    rounding = _ROUNDING * torch.finfo(log_weights.dtype).eps
    top = log_weights.topk(kept, dim=0).values.double()
    largest = top[0]
    relative = top - largest
    cutoff = relative[-1].clamp(min=math.log(torch.finfo(torch.float64).tiny))
    above = relative[:-1] > cutoff
    number = above.sum(0)
    exceedances = torch.where(above, cutoff.exp() * (relative[:-1] - cutoff).expm1(), 0.0)
    shape = torch.where(number < _LEAST, math.inf, _fitted(exceedances, number.clamp(min=_LEAST)))
    shape = torch.where(-cutoff <= rounding * (1 + largest.abs()), -math.inf, shape)
    shape = torch.where(largest == -math.inf, math.inf, shape)
    return torch.where(largest.isnan() | (largest == math.inf), math.nan, shape)


def _fitted(exceedances: Tensor, number: Tensor) -> Tensor:
    """The shape of each column, of which the first ``number`` exceedances count: falling, and 0 from there on.

    The profile likelihood of b = -k/σ is averaged on a grid, whose size depends on the number, over a prior whose scale
    is that of the first quartile.
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
