"""Pictures by matplotlib; each one answers one question.

* the ELBO and its terms: :mod:`pyro_vae.plots.elbo`;
* estimates, and whether to trust them: :mod:`pyro_vae.plots.estimates`;
* the latent space: :mod:`pyro_vae.plots.latent`;
* images: :mod:`pyro_vae.plots.images`;
* the settings of a sweep: :mod:`pyro_vae.plots.sweeps`;
* the model itself: :mod:`pyro_vae.plots.plate_diagram`.

The order of arguments is that of the whole package: the subject first, such as a history or ``model, guide, *data``,
then options by keyword, ``ax`` last. Functions draw on ``ax``, by default on the axes of a new figure, and return the
axes; none calls ``plt.show()``. For axes of your own, make the figure with ``layout="constrained"``, which has room for
the legend below them.

Clusters, methods and models differ in marker, line style or hatching as well as in colour. The colours, from
:mod:`pyro_vae.plots.colours`, are safe for colour-blind readers, and a picture can be read in grey.
"""

from pyro_vae.plots.elbo import rate_distortion, training_curves
from pyro_vae.plots.estimates import bias_variance, calibration, evidence_comparison, khat
from pyro_vae.plots.images import image_grid, manifold, reconstructions, samples, traversals
from pyro_vae.plots.latent import latent_map, posterior
from pyro_vae.plots.plate_diagram import plate_diagram
from pyro_vae.plots.sweeps import sweep

__all__ = [
    "bias_variance", "calibration", "evidence_comparison", "image_grid", "khat", "latent_map", "manifold",
    "plate_diagram", "posterior", "rate_distortion", "reconstructions", "samples", "sweep", "training_curves",
    "traversals",
]  # fmt: skip
