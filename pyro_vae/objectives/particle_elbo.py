"""The base class of our ELBOs: K particles per datum, one bound and one surrogate for each datum."""

from abc import abstractmethod
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import is_integer
from pyro_vae.objectives.particles import Particles

__all__ = ["ParticleELBO", "sum_events"]


class ParticleELBO(Trace_ELBO):
    """An ELBO with K = ``num_particles`` vectorized draws, ``minimum`` or more, and one surrogate for each datum."""

    def __init__(self, num_particles: int, minimum: int = 1, even: bool = False):
        wrong = not is_integer(num_particles) or num_particles < minimum
        if wrong or (even and num_particles % 2):
            kind = "an even number" if even else "an integer"
            raise ValueError(f"`num_particles` must be {kind}, {minimum} or more, got {num_particles!r}")
        super().__init__(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)

    @abstractmethod
    def bound(self, particles: Particles) -> Tensor:
        """Compute the reported value of each datum, ``(B,)``."""

    @abstractmethod
    def surrogate(self, particles: Particles) -> Tensor:
        """Compute a value of each datum, ``(B,)``, whose gradient is the gradient estimate."""

    @property
    def bound_draws(self) -> int:
        """Draws in the bound whose gradient is estimated: 1 for the ELBO, K for a bound of K draws."""
        return 1

    @torch.no_grad()
    def loss(self, model: Function, guide: Function, *args: Any, **kwargs: Any) -> float:
        """Compute minus the bound, summed over all data. A baseline does not learn from this call."""
        particles = self._particles(model, guide, args, kwargs)
        return -(particles.scale * self.bound(particles)).sum().item()

    def differentiable_loss(self, model: Function, guide: Function, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss, with the estimated gradient."""
        loss, surrogate = self._losses(model, guide, args, kwargs)
        return loss + (surrogate - surrogate.detach())

    def loss_and_grads(self, model: Function, guide: Function, *args: Any, **kwargs: Any) -> float:
        """Compute the loss, and add the estimated gradient to that of the parameters."""
        loss, surrogate = self._losses(model, guide, args, kwargs)
        if surrogate.requires_grad:
            surrogate.backward()
        return loss.item()

    def _losses(self, model: Function, guide: Function, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        particles = self._particles(model, guide, args, kwargs)
        loss = -(particles.scale * self.bound(particles)).sum().detach()
        return loss, -(particles.scale * self.surrogate(particles)).sum()

    def _particles(self, model: Function, guide: Function, args: Any, kwargs: Any) -> Particles:
        name = type(self).__name__
        try:
            ((model_trace, guide_trace),) = self._get_traces(model, guide, args, kwargs)
        except ValueError as error:
            # Pyro's errors when a plate of the model has the dimension of the particles.
            if not any(text in str(error) for text in ('"num_particles_vectorized", collide', "plate stack overflow")):
                raise
            raise ValueError(
                f"{name} needs all sites in one data plate, as the rightmost batch dimension, got another plate on its "
                "left, where the draws are; pyro.infer.Trace_ELBO has no such limit"
            ) from error
        return Particles(name, model_trace, guide_trace, self.num_particles)


def sum_events(values: Tensor, site: dict[str, Any]) -> Tensor:
    """Sum over the variables of a site, ``(*batch, *variables)`` to ``(*batch)``."""
    return values.flatten(len(site["fn"].batch_shape)).sum(-1) if values.dim() > len(site["fn"].batch_shape) else values
