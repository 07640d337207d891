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
from pyro_vae.calibration import Calibration, calibrate
from pyro_vae.checkpoints import Checkpoints
from pyro_vae.comparison import compare_evidence
from pyro_vae.evidence import Evidence, log_evidence
from pyro_vae.gaps import InferenceGap, inference_gap
from pyro_vae.inference_data import save_draws, to_arviz, to_datatree
from pyro_vae.information import Decomposition, decompose
from pyro_vae.inspection import Inspection, inspect
from pyro_vae.mcmc import reference
from pyro_vae.report import report
from pyro_vae.svi import SVI
from pyro_vae.training import Fitted, evaluate, fit
from pyro_vae.vae import VAE

__version__ = "0.1.0"

__all__ = [
    "SVI",
    "VAE",
    "Calibration",
    "Checkpoints",
    "Decomposition",
    "Evidence",
    "Fitted",
    "InferenceGap",
    "Inspection",
    "annealed_log_evidence",
    "baselines",
    "calibrate",
    "compare_evidence",
    "datasets",
    "decompose",
    "distributions",
    "evaluate",
    "exact",
    "families",
    "fit",
    "gradients",
    "guides",
    "handlers",
    "inference_gap",
    "inspect",
    "likelihoods",
    "log_evidence",
    "missing",
    "networks",
    "objectives",
    "plots",
    "priors",
    "reference",
    "report",
    "save_draws",
    "schedules",
    "tabular",
    "to_arviz",
    "to_datatree",
]
