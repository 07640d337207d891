"""Parts of a model: modules that return a distribution.

A new prior is one class in :mod:`pyro_vae.parts.priors`, over a family, and a line in the test cases. No other module
needs its name: they read its distribution through :mod:`pyro_vae.distributions.properties` and
:mod:`pyro_vae.distributions.extent`.
"""

from pyro_vae.parts import families, guides, likelihoods, networks, priors, spatial
from pyro_vae.parts.base import Conditional, Part, Unconditional

__all__ = [
    "Conditional", "Part", "Unconditional", "families", "guides", "likelihoods", "networks", "priors", "spatial",
]  # fmt: skip
