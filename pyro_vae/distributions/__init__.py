r"""Distributions that Pyro lacks, or has in a form that loses digits.

Relaxed variables live where they are safe in float32: a relaxed Bernoulli as its *logit*, a relaxed one-hot
(Gumbel-softmax) as its *logarithm* on the log-simplex. Squash a sample with ``sigmoid`` or ``exp`` after the sample
site; the KL divergence between two such distributions is the same on either side of that bijection.

What the package reads of any distribution is in :mod:`pyro_vae.distributions.properties`, and how far it reaches in
:mod:`pyro_vae.distributions.extent`.
"""

from pyro_vae.distributions import missing as missing
from pyro_vae.distributions import tabular as tabular
from pyro_vae.distributions.bernoulli import Bernoulli, ContinuousBernoulli, SoftTargetBernoulli
from pyro_vae.distributions.columns import Columns
from pyro_vae.distributions.discretized import DiscretizedLogisticMixture
from pyro_vae.distributions.extent import Extent, find_extent
from pyro_vae.distributions.logit_normal import LogitNormal
from pyro_vae.distributions.product import Product
from pyro_vae.distributions.properties import (
    base_distribution,
    base_support,
    discrete_twin,
    is_normalized,
    without_independent,
)
from pyro_vae.distributions.relaxed import (
    AdditiveLogRatioTransform,
    LogitRelaxedBernoulli,
    LogRelaxedOneHotCategorical,
    log_simplex,
)
from pyro_vae.distributions.spatial_mixture import SpatialMixture

__all__ = ["AdditiveLogRatioTransform", "Bernoulli", "Columns", "ContinuousBernoulli"]
__all__ += ["DiscretizedLogisticMixture", "Extent"]
__all__ += ["LogRelaxedOneHotCategorical", "LogitNormal", "LogitRelaxedBernoulli", "Product"]
__all__ += ["SoftTargetBernoulli", "SpatialMixture", "base_distribution", "base_support", "discrete_twin"]
__all__ += ["find_extent", "is_normalized", "log_simplex", "without_independent"]
