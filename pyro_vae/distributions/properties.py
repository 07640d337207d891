r"""Distributions that Pyro lacks, or has in a form that loses digits.

Relaxed variables live where they are safe in float32: a relaxed Bernoulli as its *logit*, a relaxed one-hot
(Gumbel-softmax) as its *logarithm* on the log-simplex. Squash a sample with ``sigmoid`` or ``exp`` after the sample
site; the KL divergence between two such distributions is the same on either side of that bijection.
"""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints

__all__ = ["base_distribution", "base_support", "is_normalized", "without_independent"]


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
