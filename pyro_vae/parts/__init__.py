"""Parts of a model: modules that return a distribution."""

from pyro_vae.parts import families, guides, likelihoods, networks, priors

__all__ = ["families", "guides", "likelihoods", "networks", "priors"]
