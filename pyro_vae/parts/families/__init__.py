"""Families: maps from raw, unconstrained outputs to a Pyro distribution, each written once.

A family does not depend on the source of its raw outputs. In :class:`pyro_vae.parts.base.Unconditional` they are free
parameters (a prior), in :class:`pyro_vae.parts.base.Conditional` the output of a network (a guide or a likelihood).
"""

from pyro_vae.parts.families.base import Family
from pyro_vae.parts.families.columns import Columns
from pyro_vae.parts.families.continuous import Gamma, Laplace, LogitNormal, LogNormal, Normal, StudentT, Uniform
from pyro_vae.parts.families.discrete import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogisticMixture,
    NegativeBinomial,
    OneHotCategorical,
    Ordinal,
    Poisson,
    SoftTargetBernoulli,
    ZeroInflated,
)
from pyro_vae.parts.families.relaxed import Relaxed, RelaxedBernoulli, RelaxedOneHotCategorical

__all__ = ["Bernoulli", "Categorical", "Columns", "ContinuousBernoulli", "DiscretizedLogisticMixture"]
__all__ += ["Family", "Gamma", "Laplace"]
__all__ += ["LogNormal", "LogitNormal", "NegativeBinomial", "Normal", "OneHotCategorical", "Ordinal", "Poisson"]
__all__ += ["Relaxed", "RelaxedBernoulli", "RelaxedOneHotCategorical", "SoftTargetBernoulli", "StudentT", "Uniform"]
__all__ += ["ZeroInflated"]
