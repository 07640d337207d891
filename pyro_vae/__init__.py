"""Variational autoencoders and other latent-variable models in Pyro, held against the exact answer."""

from pyro_vae import (
    baselines,
    datasets,
    distributions,
    exact,
    families,
    gradients,
    guides,
    handlers,
    likelihoods,
    missing,
    networks,
    objectives,
    plots,
    priors,
    schedules,
    tabular,
)
from pyro_vae.annealing import annealed_log_evidence
from pyro_vae.comparison import compare_evidence
from pyro_vae.evidence import Evidence, log_evidence
from pyro_vae.inference_data import to_arviz, to_datatree
from pyro_vae.training import Fitted, evaluate, fit
from pyro_vae.vae import VAE

__version__ = "0.1.0"

__all__ = [
    "VAE",
    "Evidence",
    "Fitted",
    "annealed_log_evidence",
    "baselines",
    "compare_evidence",
    "datasets",
    "distributions",
    "evaluate",
    "exact",
    "families",
    "fit",
    "gradients",
    "guides",
    "handlers",
    "likelihoods",
    "log_evidence",
    "missing",
    "networks",
    "objectives",
    "plots",
    "priors",
    "schedules",
    "tabular",
    "to_arviz",
    "to_datatree",
]
