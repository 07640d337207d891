"""Properties of any distribution that the rest of the package reads: support, normalisation, wrappers, discrete twin.

A distribution of our own has them as attributes; those of torch and Pyro are known here, and only here.
"""

import math
from functools import singledispatch
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import AffineTransform

__all__ = [
    "base_distribution", "base_support", "clamp_inside", "class_probabilities", "conditional_mean", "discrete_twin",
    "inside_support", "is_discrete", "is_masked", "is_normalized", "is_point", "masks", "same_support",
    "spell_support", "support_bounds", "within_support", "without_independent",
    "without_masks",
]  # fmt: skip


def base_distribution(distribution: Any) -> Any:
    """The distribution inside all wrappers that have a ``base_dist``: ``Independent``, masked, transformed.

    >>> base_distribution(dist.Normal(torch.zeros(2), 1.0).to_event(1))
    Normal(loc: torch.Size([2]), scale: torch.Size([2]))
    """
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return distribution


def is_point(distribution: Any) -> bool:
    """Whether a distribution is a point (``Delta``), in whatever wrappers."""
    return isinstance(base_distribution(distribution), dist.Delta)


def is_discrete(distribution: Any) -> bool:
    """Whether a distribution has a mass, and not a density; ``False`` where its support is not known."""
    try:
        return bool(distribution.support.is_discrete)
    except NotImplementedError:
        return False


def without_independent(distribution: Any) -> Any:
    """The distribution inside ``to_event`` alone: a masked or transformed one differs from its base.

    >>> without_independent(dist.Normal(torch.zeros(2), 1.0).to_event(1)).event_shape
    torch.Size([])
    """
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    return distribution


def is_masked(distribution: Any) -> bool:
    """Whether a ``MaskedDistribution`` is one of the wrappers.

    >>> is_masked(dist.Normal(torch.zeros(2), 1.0).mask(False).to_event(1))
    True
    """
    return bool(masks(distribution))


def without_masks(distribution: Any) -> Any:
    """The distribution without the masks among its wrappers.

    >>> without_masks(dist.Normal(torch.zeros(2), 1.0).mask(False).to_event(1)).log_prob(torch.zeros(2))
    tensor(-1.8379)
    """
    if isinstance(distribution, dist.MaskedDistribution):
        return without_masks(distribution.base_dist)
    if not is_masked(distribution):
        return distribution
    return without_masks(distribution.base_dist).to_event(distribution.reinterpreted_batch_ndims)


def masks(distribution: Any) -> list[Any]:
    """The masks of each ``MaskedDistribution`` among the wrappers, booleans or tensors.

    >>> masks(dist.Normal(torch.zeros(2), 1.0).mask(False).to_event(1))
    [False]
    """
    found = []
    while hasattr(distribution, "base_dist"):
        if isinstance(distribution, dist.MaskedDistribution):
            found.append(distribution._mask)
        distribution = distribution.base_dist
    return found


def is_normalized(distribution: Any) -> bool:
    """Whether ``log_prob`` is the logarithm of a density or mass: it sums to one over the support.

    Soft targets are not: their class has ``normalized = False``. ``pyro.factor``, a ``Unit``, may be any number, as may
    the ``log_density`` of a ``Delta``, and an ``ImproperUniform`` has infinite mass.

    >>> is_normalized(dist.Normal(0.0, 1.0)), is_normalized(dist.Unit(torch.tensor(3.0)))
    (True, False)
    """
    base = base_distribution(distribution)
    if isinstance(base, torch.distributions.MixtureSameFamily):
        return is_normalized(base.component_distribution)
    if isinstance(base, dist.Delta):
        return not torch.as_tensor(base.log_density).any()
    return getattr(base, "normalized", not isinstance(base, dist.Unit | dist.ImproperUniform))


def inside_support(distribution: Any, value: Tensor) -> Tensor:
    """Whether values are in the support of a distribution, ``(*batch)``, or masked; ``True`` where it is not known.

    It does not depend on ``validate_args``, without which ``log_prob`` takes any number.

    >>> inside_support(dist.Bernoulli(torch.full((2,), 0.5), validate_args=False), torch.tensor([1.0, 0.3]))
    tensor([ True, False])
    """
    if isinstance(distribution, torch.distributions.Independent):
        inside, dims = inside_support(distribution.base_dist, value), distribution.reinterpreted_batch_ndims
        return inside.flatten(-dims).all(-1) if 0 < dims <= inside.dim() else inside
    if isinstance(distribution, dist.MaskedDistribution):
        return inside_support(distribution.base_dist, value) | ~torch.as_tensor(distribution._mask, device=value.device)
    try:
        return torch.as_tensor(distribution.support.check(value))
    except (NotImplementedError, AttributeError, RuntimeError, TypeError):
        return torch.ones((), dtype=torch.bool, device=value.device)


def base_support(distribution: Any) -> Any:
    """The constraint on one variable: that inside all ``independent`` ones, and of a mixture that of its components.

    >>> base_support(dist.Normal(torch.zeros(2), 1.0).to_event(1))
    Real()
    """
    support = _affine_support(distribution) or distribution.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def _affine_support(distribution: Any) -> Any:
    """The support after an affine transform of bounded variables, which torch takes for all real numbers.

    ``None`` for any other distribution. ``biject_to(constraints.positive)`` of torch ends with such a transform.
    """
    distribution = without_independent(distribution)
    parts = [part for one in getattr(distribution, "transforms", ()) for part in getattr(one, "parts", [one])]
    if not parts or not isinstance(parts[-1], AffineTransform):
        return None
    inner = distribution.base_dist.support if len(parts) == 1 else parts[-2].codomain
    while hasattr(inner, "base_constraint"):
        inner = inner.base_constraint
    if isinstance(parts[-2] if len(parts) > 1 else None, AffineTransform) or not _is_bounded(inner):
        return None
    ends = [
        torch.as_tensor(parts[-1].loc + parts[-1].scale * getattr(inner, name, infinite))
        for name, infinite in (("lower_bound", -math.inf), ("upper_bound", math.inf))
    ]
    return torch.distributions.constraints.interval(*(end(*ends) for end in (torch.minimum, torch.maximum)))


def support_bounds(distribution: Any) -> tuple[Any, Any]:
    """The lower and upper bound of one variable, numbers or tensors, infinite if it is unbounded.

    >>> support_bounds(dist.Gamma(2.0, 1.0))
    (0.0, inf)
    """
    support = base_support(distribution)
    return getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)


def same_support(first: Any, second: Any) -> bool:
    """Whether two distributions of one event shape have the same support, up to its boundary.

    >>> [same_support(dist.Beta(1.0, 1.0), dist.Uniform(0.0, high)) for high in (1.0, 2.0)]
    [True, False]
    """
    one, other = base_support(first), base_support(second)
    if one.is_discrete != other.is_discrete or _is_bounded(one) != _is_bounded(other):
        return False
    if not _is_bounded(one):
        return repr(one) == repr(other)
    pairs = zip(support_bounds(first), support_bounds(second), strict=True)
    return all(bool((_as_double(ours) == _as_double(theirs)).all()) for ours, theirs in pairs)


def within_support(first: Any, second: Any) -> bool:
    """Whether all values of a distribution are in the support of another one, where their bounds are known.

    >>> within_support(dist.LogNormal(0.0, 1.0), dist.Normal(0.0, 1.0))
    True
    >>> within_support(dist.Normal(0.0, 1.0), dist.LogNormal(0.0, 1.0))
    False
    """
    try:
        (low, high), (least, most) = (map(_as_double, support_bounds(one)) for one in (first, second))
        return bool((low >= least).all() and (high <= most).all())
    except (NotImplementedError, AttributeError, RuntimeError):  # no known support, or bounds of other shapes
        return True


def spell_support(distribution: Any) -> str:
    """The support in words, for messages.

    >>> spell_support(dist.Uniform(torch.zeros(3, 2), 1.0).to_event(1)), spell_support(dist.Normal(0.0, 1.0))
    ('[0, 1]', 'Real()')
    >>> spell_support(dist.Bernoulli(torch.zeros(2)).to_event(1)), spell_support(dist.Poisson(1.0))
    ('0 and 1', '[0, inf], whole numbers')
    """
    base = base_support(distribution)
    if base is torch.distributions.constraints.boolean:
        return "0 and 1"
    if not _is_bounded(base):
        return str(distribution.support)
    ends = []
    for bound in map(_as_double, support_bounds(distribution)):
        low, high = bound.min().item(), bound.max().item()
        ends.append(f"{low:g}" if low == high else f"{low:g}...{high:g}")
    return f"[{', '.join(ends)}]" + (", whole numbers" if base.is_discrete else "")


def clamp_inside(value: Tensor, low: Tensor | float, high: Tensor | float, dtype: torch.dtype | None = None) -> Tensor:
    """Clamp values to the interior of an interval, so that they stay there when they are rounded to ``dtype``.

    >>> clamp_inside(torch.tensor([0.0, 0.5, 1.0]), 0.0, 1.0).logit().isfinite()
    tensor([True, True, True])
    """
    rounding = torch.finfo(dtype or value.dtype)
    low, high = (torch.as_tensor(bound, dtype=value.dtype, device=value.device) for bound in (low, high))
    least, most = (
        torch.where(bound.isfinite(), bound + sign * (bound.abs() * rounding.eps).clamp(min=rounding.tiny), bound)
        for bound, sign in ((low, 1), (high, -1))
    )
    return value.clamp(least, most)


def _is_bounded(support: Any) -> bool:
    return hasattr(support, "lower_bound") or hasattr(support, "upper_bound")


def _as_double(bound: Any) -> Tensor:
    return torch.as_tensor(bound).detach().to("cpu", torch.float64)


def discrete_twin(distribution: Any) -> Any:
    """The discrete twin, by the method ``discrete()`` of a relaxed distribution; ``None`` if it is not relaxed."""
    twin = getattr(base_distribution(distribution), "discrete", None)
    return None if twin is None else twin()


@singledispatch
def class_probabilities(distribution: Any) -> Tensor | None:
    """The probability of each class of categorical variables, ``(*batch, k)``; ``None`` of variables without classes.

    >>> class_probabilities(dist.OneHotCategorical(torch.tensor([1.0, 3.0])))
    tensor([0.2500, 0.7500])
    """
    return None


@class_probabilities.register(torch.distributions.OneHotCategorical)
@class_probabilities.register(torch.distributions.Categorical)
def _(distribution: Any) -> Tensor:
    return distribution.probs


def conditional_mean(distribution: Any) -> tuple[Tensor | None, bool]:
    """The mean of each variable, and whether its last dimension is classes; ``None`` where the mean is not known.

    It may be infinite. Of categorical variables it is the probability of each class; of relaxed ones that of their
    discrete twin.

    >>> conditional_mean(dist.Categorical(torch.ones(2)))
    (tensor([0.5000, 0.5000]), True)
    """
    variables = without_independent(distribution)
    if (twin := discrete_twin(variables)) is not None:
        variables = twin
    if (classes := class_probabilities(variables)) is not None:
        return classes, True
    try:
        return variables.mean, False
    except NotImplementedError:
        return None, False
