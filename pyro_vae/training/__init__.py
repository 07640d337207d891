"""Training: SVI with Pyro's ELBOs, any model and guide."""

from pyro_vae.training import schedules

__all__ = ["schedules"]
