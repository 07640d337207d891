r"""ELBOs that Pyro lacks. Each computes a bound and a learning signal for every datum.

* Score-function estimators, for latents whose draws pass no gradient: :mod:`pyro_vae.objectives.score_function`.
* The importance-weighted bound of pathwise draws, and gradients with less noise:
  :mod:`pyro_vae.objectives.importance_weighted`.
* Objectives with another rate, which are no bounds: :mod:`pyro_vae.objectives.modified_kl`.

Each is a ``pyro.infer.ELBO``: pass it to :func:`pyro_vae.fit` or to ``pyro.infer.SVI``. All need a model and a guide
with all latents in one data plate, the rightmost dimension. The K draws are K runs of model and guide, done at once
where ``torch.vmap`` can. The scale N/B of a mini-batch multiplies the estimate of each datum.
"""

from pyro_vae.objectives import baselines as baselines
from pyro_vae.objectives.importance_weighted import ImportanceWeighted
from pyro_vae.objectives.modified_kl import DiscreteKL, FreeBits, TotalCorrelation
from pyro_vae.objectives.score_function import VIMCO, DisARM, LeaveOneOut, ScoreFunction

__all__ = ["VIMCO", "DisARM", "DiscreteKL", "FreeBits", "ImportanceWeighted", "LeaveOneOut", "ScoreFunction"]
__all__ += ["TotalCorrelation"]
