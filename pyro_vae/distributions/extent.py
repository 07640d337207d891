r"""The extent of a distribution: a box that holds all but a negligible mass, which quadrature integrates over.

Boxes are in *unconstrained coordinates*, those of ``biject_to`` of the support of one variable: x itself on the reals,
:math:`\log x` on the positive numbers, :math:`\mathrm{logit}\frac{x - a}{b - a}` on an interval, log-ratios on the
log-simplex. A distribution of our own has a method ``extent()``; one of torch or Pyro is registered here.
"""

import math
from functools import singledispatch
from itertools import product
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.distributions.properties import base_support

__all__ = ["LOG_TAIL", "NORMAL_REACH", "Extent", "around_components", "find_extent"]

LOG_TAIL = 36.0
"""A box leaves out a mass of about e^-36 = 2e-16."""
NORMAL_REACH = 9.0
"""Standard deviations of a normal on either side of its mean, all but a mass of 2e-19."""


class Extent(NamedTuple):
    """Lower corner, a point inside, and upper corner of a box, ``(*batch, *coordinates)``.

    Quadrature breaks each axis at the point inside: put it where the density, or what reads the value, has a kink.
    ``parts`` are boxes inside of which there is a scale of its own, such as those of the components of a mixture.
    """

    low: Tensor
    middle: Tensor
    high: Tensor
    parts: "tuple[Extent, ...]" = ()

    @classmethod
    def around(cls, middle: Tensor, radius: Tensor) -> "Extent":
        return cls(middle - radius, middle, middle + radius)


@singledispatch
def find_extent(distribution: Any) -> Extent:
    """Return the box of a distribution, by its own method, or 9 standard deviations around the mean on the real line.

    Register another distribution with ``@find_extent.register``, or give the class a method ``extent()``. Raises a
    NotImplementedError if the extent is not known.

    >>> find_extent(dist.Normal(torch.zeros(2), 1.0).to_event(1)).high
    tensor([9., 9.])
    """
    if hasattr(distribution, "extent"):
        return distribution.extent()
    if base_support(distribution) is not torch.distributions.constraints.real:
        raise NotImplementedError("its extent is not known")
    try:
        box = Extent.around(distribution.mean, NORMAL_REACH * distribution.variance.sqrt())
    except NotImplementedError as error:
        raise NotImplementedError("its mean and variance are not known") from error
    if not all(corner.isfinite().all() for corner in box[:3]):
        raise NotImplementedError("it is without a finite mean and variance")
    return box


@find_extent.register(torch.distributions.Independent)
@find_extent.register(dist.MaskedDistribution)
def _(distribution: Any) -> Extent:
    """The box of the variables; parts of two of them are combined."""
    box = find_extent(distribution.base_dist)
    if box.parts and distribution.batch_shape != distribution.base_dist.batch_shape and box.low.shape[-1] == 2:
        return box._replace(parts=tuple(_from_two(*pair) for pair in product(box.parts, repeat=2)))
    return box


def _from_two(one: Extent, other: Extent) -> Extent:
    low, middle, high = (torch.stack([a[..., 0], b[..., 1]], -1) for a, b in zip(one[:3], other[:3], strict=True))
    return Extent(low, middle, high)


@find_extent.register
def _(distribution: torch.distributions.MixtureSameFamily) -> Extent:
    """The box around those of the components."""
    return around_components(find_extent(distribution.component_distribution), len(distribution.batch_shape))


def around_components(each: Extent, dim: int) -> Extent:
    """Return the box around those of components, which are the dimension ``dim`` of its corners."""
    low, high = each.low.amin(dim), each.high.amax(dim)
    inner = [box for part in each.parts or (each,) for box in zip(*(end.unbind(dim) for end in part[:3]), strict=True)]
    return Extent(low, (low + high) / 2, high, tuple(Extent(*box) for box in inner))


@find_extent.register
def _(distribution: torch.distributions.Laplace) -> Extent:
    return Extent.around(distribution.loc, LOG_TAIL * distribution.scale)


@find_extent.register
def _(distribution: torch.distributions.StudentT) -> Extent:
    """All but a mass of 1e-7: the tails are heavy."""
    from scipy.stats import t  # slow to import

    radius = torch.as_tensor(t.isf(5e-8, distribution.df.double().cpu().numpy())).to(distribution.scale)
    return Extent.around(distribution.loc, radius * distribution.scale)


@find_extent.register
def _(distribution: torch.distributions.LogNormal) -> Extent:
    return Extent.around(distribution.loc, NORMAL_REACH * distribution.scale)


@find_extent.register
def _(distribution: torch.distributions.Uniform) -> Extent:
    """The logit of a uniform variable is a standard logistic variable."""
    zero = torch.zeros_like(distribution.low)
    return Extent.around(zero, zero + LOG_TAIL)


@find_extent.register
def _(distribution: torch.distributions.Gamma) -> Extent:
    r"""A box from bounds on both tails. For concentration a, rate 1 and t = 36,

    :math:`P(x < \epsilon) \le \epsilon^a / \Gamma(a + 1)` and :math:`P(x > a + \sqrt{2at} + t) \le e^{-t}`.

    Source: Boucheron, Lugosi and Massart 2013, "Concentration inequalities", section 2.4, for the upper one.
    """
    a, log_rate = distribution.concentration, distribution.rate.log()
    low = ((a + 1).lgamma() - LOG_TAIL) / a
    high = (a + (2 * LOG_TAIL * a).sqrt() + LOG_TAIL).log()
    return Extent(low - log_rate, a.log() - log_rate, high - log_rate)


@find_extent.register
def _(distribution: torch.distributions.Exponential) -> Extent:
    return find_extent(torch.distributions.Gamma(torch.ones_like(distribution.rate), distribution.rate))


@find_extent.register
def _(distribution: torch.distributions.Beta) -> Extent:
    r"""A box from :math:`P(x < \epsilon) \le 2 \epsilon^a / (a B(a, b))`, :math:`\epsilon \le 1/2`, likewise above."""
    a, b = distribution.concentration1, distribution.concentration0
    log_beta = a.lgamma() + b.lgamma() - (a + b).lgamma()
    low, high = ((c.log() + log_beta - math.log(2) - LOG_TAIL) / c for c in (a, b))
    return Extent(low, a.log() - b.log(), -high)


@find_extent.register
def _(distribution: torch.distributions.HalfNormal) -> Extent:
    r"""A box from :math:`P(x < \epsilon) \le \epsilon`, for scale 1, and nine scales."""
    log_scale = distribution.scale.log()
    return Extent(log_scale - LOG_TAIL, log_scale, log_scale + math.log(NORMAL_REACH))


@find_extent.register
def _(distribution: torch.distributions.HalfCauchy) -> Extent:
    r"""A box from :math:`P(x < \epsilon) \le \epsilon`, for scale 1, and :math:`P(x > t) \le 1 / t`."""
    return Extent.around(distribution.scale.log(), torch.full_like(distribution.scale, LOG_TAIL))


@find_extent.register(dist.InverseGamma)
@find_extent.register(torch.distributions.InverseGamma)
def _(distribution: Any) -> Extent:
    """The box of the logarithm of its inverse, turned around."""
    low, middle, high, _ = find_extent(torch.distributions.Gamma(distribution.concentration, distribution.rate))
    return Extent(-high, -middle, -low)
