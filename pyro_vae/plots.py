"""Pictures, each on matplotlib axes, each answering one question.

* of the nats: :mod:`pyro_vae.plot_nats`;
* of estimates, and whether to trust them: :mod:`pyro_vae.plot_estimates`;
* of the latent space: :mod:`pyro_vae.plot_latents`;
* of images: :mod:`pyro_vae.plot_images`;
* of the model itself: :mod:`pyro_vae.plot_plates`.

Functions draw on ``ax``, or on axes of a new figure if it is left out, and return them; none calls ``plt.show()``.
Clusters, methods and models differ in marker, line style or hatching as well as in colour, so that a picture reads in
black and white.
"""

from pyro_vae.plot_estimates import bias_variance, calibration, evidence_comparison, khat
from pyro_vae.plot_images import image_grid, manifold, reconstructions, samples, traversals
from pyro_vae.plot_latents import latent_map, posterior
from pyro_vae.plot_nats import rate_distortion, training_curves
from pyro_vae.plot_plates import plate_diagram

__all__ = [
    "bias_variance",
    "calibration",
    "evidence_comparison",
    "image_grid",
    "khat",
    "latent_map",
    "manifold",
    "plate_diagram",
    "posterior",
    "rate_distortion",
    "reconstructions",
    "samples",
    "training_curves",
    "traversals",
]
