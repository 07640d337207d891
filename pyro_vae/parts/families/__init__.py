"""Families: maps from raw, unconstrained outputs to a Pyro distribution, each written once.

A family knows nothing of where its raw outputs come from. :class:`pyro_vae.parts.base.Unconditional` feeds it free
parameters (a prior), :class:`pyro_vae.parts.base.Conditional` a network (a guide, a likelihood, a conditional prior).
"""

from pyro_vae.parts.families.base import Family
from pyro_vae.parts.families.continuous import Gamma, Laplace, LogitNormal, LogNormal, Normal, StudentT, Uniform
from pyro_vae.parts.families.discrete import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    NegativeBinomial,
    OneHotCategorical,
    Poisson,
    SoftTargetBernoulli,
)
from pyro_vae.parts.families.relaxed import Relaxed, RelaxedBernoulli, RelaxedOneHotCategorical

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "Family",
    "Gamma",
    "Laplace",
    "LogNormal",
    "LogitNormal",
    "NegativeBinomial",
    "Normal",
    "OneHotCategorical",
    "Poisson",
    "Relaxed",
    "RelaxedBernoulli",
    "RelaxedOneHotCategorical",
    "SoftTargetBernoulli",
    "StudentT",
    "Uniform",
]
