"""What ELBOs with a learning signal for each datum share: draws side by side, a bound and a surrogate."""

from abc import abstractmethod
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import is_integer
from pyro_vae.objectives.particles import Particles

__all__ = ["ParticleELBO", "sum_events"]


_NESTED = ('"num_particles_vectorized", collide', "plate stack overflow")
"""Pyro, where a plate of the model's is in the place of that of the draws."""


class ParticleELBO(Trace_ELBO):
    """An ELBO with K draws side by side, and one surrogate for each datum.

    Args:
        num_particles: K.
        least: K must be this or more.
        even: whether K must be even.
    """

    def __init__(self, num_particles: int, least: int = 1, even: bool = False):
        wrong = not is_integer(num_particles) or num_particles < least
        if wrong or (even and num_particles % 2):
            kind = "an even number" if even else "an integer"
            raise ValueError(f"`num_particles` must be {kind}, {least} or more, got {num_particles!r}")
        super().__init__(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)

    @abstractmethod
    def bound(self, draws: Particles) -> Tensor:
        """What is reported of each datum, ``(B,)``."""

    @abstractmethod
    def surrogate(self, draws: Particles) -> Tensor:
        """What has the estimated gradient of each datum, ``(B,)``."""

    @property
    def bound_draws(self) -> int:
        """Draws in the bound whose gradient is estimated: 1 for the ELBO, K for a bound of K draws."""
        return 1

    def _draws(self, model: Function, guide: Function, args: Any, kwargs: Any) -> Particles:
        try:
            ((model_trace, guide_trace),) = self._get_traces(model, guide, args, kwargs)
        except ValueError as error:
            if not any(sign in str(error) for sign in _NESTED):
                raise
            raise ValueError(
                f"`{type(self).__name__}` must be one data plate around all sites, as the rightmost batch dimension. "
                "pyro.infer.Trace_ELBO has no such limit: a plate lies on the left of the data's, where the draws go"
            ) from error
        return Particles(type(self).__name__, model_trace, guide_trace, self.num_particles)

    def _losses(self, model: Function, guide: Function, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        draws = self._draws(model, guide, args, kwargs)
        return -(draws.scale * self.bound(draws)).sum().detach(), -(draws.scale * self.surrogate(draws)).sum()

    @torch.no_grad()
    def loss(self, model: Function, guide: Function, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, summed over all data. A baseline learns nothing from it."""
        draws = self._draws(model, guide, args, kwargs)
        return -(draws.scale * self.bound(draws)).sum().item()

    def differentiable_loss(self, model: Function, guide: Function, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, with the estimated gradient."""
        loss, surrogate = self._losses(model, guide, args, kwargs)
        return loss + (surrogate - surrogate.detach())

    def loss_and_grads(self, model: Function, guide: Function, *args: Any, **kwargs: Any) -> float:
        """The loss; the estimated gradient is added to that of the parameters."""
        loss, surrogate = self._losses(model, guide, args, kwargs)
        if surrogate.requires_grad:
            surrogate.backward()
        return loss.item()


def sum_events(values: Tensor, site: dict[str, Any]) -> Tensor:
    """Over the variables of a site, ``(*batch, *variables)`` to ``(*batch)``."""
    return values.flatten(len(site["fn"].batch_shape)).sum(-1) if values.dim() > len(site["fn"].batch_shape) else values
