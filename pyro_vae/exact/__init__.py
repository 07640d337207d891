"""Exact answers where they can be computed: log p(x) and p(z | x), the ELBO and KL(q || p(z | x)).

See :mod:`pyro_vae.exact.inference` for the models that have one.
"""

from pyro_vae.exact.discrete import DiscretePosterior
from pyro_vae.exact.inference import Posterior, elbo, kl, log_evidence, posterior
from pyro_vae.exact.model_density import MAX_STATES
from pyro_vae.exact.quadrature import QuadratureError

__all__ = ["MAX_STATES", "DiscretePosterior", "Posterior", "QuadratureError", "elbo", "kl", "log_evidence", "posterior"]
