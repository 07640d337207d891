r"""Exact answers: log p(x) and p(z | x), the ELBO and KL(q || p(z | x)), where they can be computed.

* discrete latents: by a sum over all states;
* Gaussian latents and flows of one or two dimensions, relaxed latents of one logit: by quadrature that refines until
  two resolutions agree;
* a linear Gaussian model of any size: in closed form.

Every function takes a Pyro model with one data plate, as the rightmost dimension, whose latents are all inside it.
"""

from pyro_vae.exact.densities import MAX_STATES
from pyro_vae.exact.inference import Posterior, elbo, kl, log_evidence, posterior
from pyro_vae.exact.quadrature import QuadratureError

__all__ = ["MAX_STATES", "Posterior", "QuadratureError", "elbo", "kl", "log_evidence", "posterior"]
