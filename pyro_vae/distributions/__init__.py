r"""Distributions that Pyro lacks, or has in a form that loses digits.

Relaxed variables live where they are safe in float32: a relaxed Bernoulli as its *logit*, a relaxed one-hot
(Gumbel-softmax) as its *logarithm* on the log-simplex. Squash a sample with ``sigmoid`` or ``exp`` after the sample
site; the KL divergence between two such distributions is the same on either side of that bijection.
"""

from pyro_vae.distributions import missing as missing
from pyro_vae.distributions import tabular as tabular
from pyro_vae.distributions.bernoulli import Bernoulli, ContinuousBernoulli, SoftTargetBernoulli
from pyro_vae.distributions.product import Product
from pyro_vae.distributions.properties import base_distribution, base_support, is_normalized, without_independent
from pyro_vae.distributions.relaxed import (
    AdditiveLogRatioTransform,
    LogitRelaxedBernoulli,
    LogRelaxedOneHotCategorical,
    log_simplex,
)

__all__ = [
    "AdditiveLogRatioTransform",
    "Bernoulli",
    "ContinuousBernoulli",
    "LogRelaxedOneHotCategorical",
    "LogitRelaxedBernoulli",
    "Product",
    "SoftTargetBernoulli",
    "base_distribution",
    "base_support",
    "is_normalized",
    "log_simplex",
    "without_independent",
]
