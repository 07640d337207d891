"""The joint distribution of independent discrete variables, enumerable as one event."""

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.distributions.bernoulli import SharedBernoulli

__all__ = ["Product"]


class Product(dist.Independent):
    r"""Independent discrete variables that enumerate *jointly*, as one site.

    ``Bernoulli(...).to_event(1)`` cannot be enumerated in Pyro; this can, in one new dimension. For n variables of s
    values each it has :math:`s^n` states.

    Args:
        base: a distribution of single variables, such as ``Bernoulli`` or ``OneHotCategorical``.
        num_dims: how many of its rightmost batch dimensions are one event.

    Raises:
        ValueError: from :meth:`enumerate_support`, if there are more than ``max_states`` = 2^16 states.

    >>> Product(dist.Bernoulli(logits=torch.zeros(5, 2)), 1).enumerate_support(expand=False).shape
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
                f"a Product must have at most {self.max_states} states to be enumerated, got {count} states: "
                f"{variables.numel()} variables of {len(values)} values. For training use relaxed latents or one of "
                "pyro_vae.objectives; for log p(x) use pyro_vae.log_evidence"
            )
        grid = torch.cartesian_prod(*[torch.arange(len(values), device=values.device)] * variables.numel())
        states = values.reshape(len(values), *base.event_shape)[grid.reshape(count, -1)]
        states = states.reshape(count, *[1] * len(self.batch_shape), *self.event_shape)
        return states.expand(-1, *self.batch_shape, *self.event_shape) if expand else states
