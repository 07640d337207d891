r"""Missing values: NaN in the data is an entry that was not observed.

A likelihood that is a product over the entries of x leaves out the missing ones by leaving out their factors,

.. math:: p(x_\mathrm{obs} \mid z) = \int p(x \mid z)\,dx_\mathrm{mis} = \prod_{d\ \mathrm{observed}} p(x_d \mid z),

so that :math:`\log p(x_\mathrm{obs})`, its bounds and its gradients are those of the observed entries. Maximising it is
right where the probability that an entry is missing does not depend on its value, given the observed entries
(missing at random).

Source: Rubin 1976, "Inference and missing data".
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import transform_to

from pyro_vae._utils.data import DataTensors
from pyro_vae._utils.validation import describe
from pyro_vae.distributions.base import named_arguments

__all__ = ["WithMissing", "accepts_missing", "check_missing", "first_missing", "with_missing"]


class _OrMissing(constraints.Constraint):
    """A constraint that NaN satisfies too."""

    def __init__(self, base_constraint: Any):
        self.base_constraint = base_constraint
        self.is_discrete = base_constraint.is_discrete
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return value.isnan() | self.base_constraint.check(value)

    def __repr__(self) -> str:
        return f"OrMissing({self.base_constraint!r})"


@named_arguments
class WithMissing(dist.TorchDistribution):
    """A distribution of single variables whose values may be missing: NaN has a ``log_prob`` of 0.

    Samples are complete. A missing value does not contribute to any gradient.

    Args:
        base_dist: of event shape ``()``; the variables of a datum are its rightmost batch dimensions.

    >>> q = WithMissing(dist.Normal(torch.zeros(2), 1.0)).to_event(1)
    >>> q.log_prob(torch.tensor([[0.0, 0.0], [0.0, torch.nan]]))
    tensor([-1.8379, -0.9189])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    accepts_missing = True

    def __init__(self, base_dist: dist.TorchDistribution):
        if base_dist.event_shape:
            got = f"a {type(base_dist).__name__} of event shape {tuple(base_dist.event_shape)}"
            raise ValueError(f"`base_dist` must be a distribution of single variables, event shape (), got {got}")
        self.base_dist = base_dist
        super().__init__(base_dist.batch_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "WithMissing":
        return WithMissing(self.base_dist.expand(torch.Size(batch_shape)))

    @property
    def support(self) -> constraints.Constraint:
        return _OrMissing(self.base_dist.support)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.base_dist.has_rsample

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        return self.base_dist.has_enumerate_support

    @property
    def mean(self) -> Tensor:
        return self.base_dist.mean

    @property
    def variance(self) -> Tensor:
        return self.base_dist.variance

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.base_dist.sample(sample_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.base_dist.rsample(sample_shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        return self.base_dist.enumerate_support(expand)

    def log_prob(self, value: Tensor) -> Tensor:
        missing = value.isnan()
        # NaN is replaced before the density is computed: 0 times NaN would be NaN in the gradient.
        log_prob = self.base_dist.log_prob(torch.where(missing, _inside(self.base_dist.support, value), value))
        return torch.where(missing, 0.0, log_prob)


def _inside(support: Any, like: Tensor) -> Tensor:
    """A value inside the support."""
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    return zero + getattr(support, "lower_bound", 0) if support.is_discrete else transform_to(support)(zero)


def with_missing(distribution: Any) -> Any:
    """Wrap the variables of a distribution of a datum in :class:`WithMissing`, inside its ``to_event``.

    >>> q = with_missing(dist.Poisson(torch.ones(3)).to_event(1))
    >>> q.log_prob(torch.tensor([0.0, torch.nan, torch.nan])), q.event_shape
    (tensor(-1.), torch.Size([3]))
    """
    if hasattr(distribution, "with_missing"):  # of several kinds of variables
        return distribution.with_missing()
    if not hasattr(distribution, "log_prob"):
        raise TypeError(f"`distribution` must be a distribution of single variables, got {describe(distribution)}")
    if isinstance(distribution, torch.distributions.Independent):
        return type(distribution)(with_missing(distribution.base_dist), distribution.reinterpreted_batch_ndims)
    return WithMissing(distribution)


def accepts_missing(distribution: Any) -> bool:
    """Whether a distribution takes NaN as a missing entry, in all of its variables."""
    while not hasattr(distribution, "accepts_missing"):
        if not hasattr(distribution, "base_dist"):
            return False
        distribution = distribution.base_dist
    return bool(distribution.accepts_missing)


def first_missing(data: Sequence[Tensor]) -> str | None:
    """The place of the first NaN in the data tensors, in words; ``None`` without NaN.

    >>> first_missing([torch.tensor([[0.0, 1.0], [torch.nan, 2.0]])])
    'row 1, column (0,)'
    """
    return (data if isinstance(data, DataTensors) else DataTensors(data)).place(torch.isnan)


def check_missing(
    observed: Iterable[dict[str, Any]], data: Sequence[Tensor], name: str, error: Exception | None = None
) -> None:
    """Raise a ValueError if data hold NaN that a model does not accept: at a site with NaN, or if none has it, at any.

    Args:
        observed: the observed sites of the model on these data, or on some of their rows.
        data: what the model takes.
        name: of the data in the error.
        error: what the model raised on the data, such as for a parameter that is computed from NaN.
    """
    where = first_missing(data)
    sites = list(observed) if where is not None else []
    needed = [site for site in sites if first_missing([site["value"]]) is not None]
    if where is not None and (error or not all(accepts_missing(site["fn"]) for site in needed or sites)):
        hint = "For missing values, use a likelihood of pv.likelihoods with `missing=True`"
        raise ValueError(f"`{name}` must hold finite numbers, got nan at {where}. {hint}") from error
