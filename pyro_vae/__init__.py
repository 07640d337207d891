"""Variational autoencoders and other latent-variable models in Pyro, held against the exact answer."""

from pyro_vae import (
    datasets,
    distributions,
    exact,
    families,
    guides,
    handlers,
    likelihoods,
    networks,
    plots,
    priors,
    schedules,
)
from pyro_vae.evidence import Evidence, log_evidence
from pyro_vae.inference_data import to_arviz, to_datatree
from pyro_vae.training import Fitted, evaluate, fit
from pyro_vae.vae import VAE

__version__ = "0.1.0"

__all__ = [
    "VAE",
    "Evidence",
    "Fitted",
    "datasets",
    "distributions",
    "evaluate",
    "exact",
    "families",
    "fit",
    "guides",
    "handlers",
    "likelihoods",
    "log_evidence",
    "networks",
    "plots",
    "priors",
    "schedules",
    "to_arviz",
    "to_datatree",
]
