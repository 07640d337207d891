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
)
from pyro_vae.inference_data import to_datatree
from pyro_vae.training import Fitted, evaluate, fit
from pyro_vae.vae import VAE

__version__ = "0.1.0"

__all__ = [
    "VAE",
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
    "networks",
    "plots",
    "priors",
    "to_datatree",
]
