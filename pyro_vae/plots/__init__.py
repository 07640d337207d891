"""Pictures by matplotlib; each one answers one question.

* the ELBO and its terms: :mod:`pyro_vae.plots.elbo`;
* estimates, and whether to trust them: :mod:`pyro_vae.plots.estimates`;
* the latent space: :mod:`pyro_vae.plots.latent`;
* images: :mod:`pyro_vae.plots.images`;
* the model itself: :mod:`pyro_vae.plots.plate_diagram`.

Functions draw on ``ax``, by default on the axes of a new figure, and return the axes; none calls ``plt.show()``.
Clusters, methods and models differ in marker, line style or hatching as well as in colour: a picture can be read in
black and white.
"""

from pyro_vae.plots.elbo import rate_distortion, training_curves
from pyro_vae.plots.estimates import bias_variance, calibration, evidence_comparison, khat
from pyro_vae.plots.images import image_grid, manifold, reconstructions, samples, traversals
from pyro_vae.plots.latent import latent_map, posterior
from pyro_vae.plots.plate_diagram import plate_diagram

__all__ = [
    "bias_variance", "calibration", "evidence_comparison", "image_grid", "khat", "latent_map", "manifold",
    "plate_diagram", "posterior", "rate_distortion", "reconstructions", "samples", "training_curves", "traversals",
]  # fmt: skip
