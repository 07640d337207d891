r"""ELBOs that Pyro lacks, each with a bound and a learning signal of its own for each datum.

* for latents whose draws pass no gradient on, estimators from the score function (:mod:`pyro_vae.objectives.score_function`);
* for pathwise draws, the importance-weighted bound, and gradients of less noise (:mod:`pyro_vae.objectives.importance_weighted`);
* objectives with another rate, which are no bounds (:mod:`pyro_vae.objectives.modified_kl`).

Each is a ``pyro.infer.ELBO``: hand it to :func:`pyro_vae.fit`, or to ``pyro.infer.SVI``. All need a model and guide
whose latents lie in one data plate, as the rightmost dimension. Draws are side by side in a plate on its left. The
scale N/B of a mini-batch multiplies the estimate of each datum from outside.
"""

from pyro_vae.objectives import baselines as baselines
from pyro_vae.objectives.importance_weighted import ImportanceWeighted
from pyro_vae.objectives.modified_kl import DiscreteKL, FreeBits
from pyro_vae.objectives.score_function import VIMCO, DisARM, LeaveOneOut, ScoreFunction

__all__ = ["VIMCO", "DisARM", "DiscreteKL", "FreeBits", "ImportanceWeighted", "LeaveOneOut", "ScoreFunction"]
