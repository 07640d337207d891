"""Parts of a model: modules that return a distribution."""

from pyro_vae.parts import families, guides, likelihoods, networks, priors
from pyro_vae.parts.base import Conditional, Part, Unconditional

__all__ = ["Conditional", "Part", "Unconditional", "families", "guides", "likelihoods", "networks", "priors"]
