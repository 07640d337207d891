"""Inputs of pictures that several test files draw."""

import pyro.distributions as dist
import torch
from pairs import guide_of, model_of

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.diagnostics.gradients import Comparison, Measured
from pyro_vae.sweeps.result import Sweep
from pyro_vae.sweeps.run import Run, Task
from pyro_vae.sweeps.space import Space

DATUM = torch.tensor([[0.3, -0.2]])
X = torch.zeros(4, 2)
IMAGES = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
HISTORY = {"elbo": [-3.0, -2.0, -1.5], "distortion": [2.5, 1.2, 1.0], "rate": [0.5, 0.8, 0.5]}
VALIDATED = HISTORY | {f"validation_{name}": [value + 0.1 for value in values] for name, values in HISTORY.items()}
_COUNTS = {"num_parameters": 3, "num_tested": 3, "repeats": 99}
COMPARISON = Comparison(
    {
        "biased": {"all": Measured(2.0, bias=0.1, bias_error=0.01, variance=4.0, max_z=9.0, **_COUNTS)},
        "unbiased": {"all": Measured(2.0, bias=0.0, bias_error=0.02, variance=9.0, max_z=1.0, **_COUNTS)},
        "enumerated": {"all": Measured(2.0, bias=0.0, bias_error=0.0, variance=0.0, max_z=0.0, **_COUNTS)},
    },
    {"biased": 1, "unbiased": 1, "enumerated": 8},
)
KHAT = torch.tensor([0.1, 0.9, -torch.inf, 0.4, torch.nan, 0.7])
EVIDENCE = pv.Evidence(torch.zeros(6), torch.ones(6), KHAT, num_samples=1000)


def evidence_table():
    """Three models of 40 data: exact, from reliable draws, and from unreliable draws."""
    x = torch.randn(40, generator=torch.Generator().manual_seed(0))
    exact, good, bad = (dist.Normal(0.0, scale).log_prob(x) for scale in (1.0, 1.5, 2.0))
    good = pv.Evidence(good, torch.full((40,), 500.0), torch.zeros(40), 1000)
    bad = pv.Evidence(bad, torch.full((40,), 20.0), torch.arange(40) / 40.0, 1000)
    return pv.compare_evidence({"exact": exact, "good": good, "bad": bad})


def narrow_calibration():
    """The calibration of a guide that is exact in z[0] and too narrow in z[1]."""
    model = model_of(dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda z: dist.Normal(z, 1.0).to_event(1))
    guide = guide_of(lambda x: dist.Normal(x / 2, torch.tensor([0.5**0.5, 0.3])).to_event(1))
    return pv.calibrate(model, guide, X, num_simulations=500)


def decode(z):
    """Images whose pixels all identify the code."""
    return (z @ torch.tensor([[1.0], [10.0]])).expand(-1, 12) / 100


def draw_posterior(vae, x=DATUM, **options):
    return plots.posterior(vae.model, vae.guide, x, **options)


def draw_diagram(vae, **options):
    return plots.plate_diagram(vae.model, vae.guide, X, **options)


def sweep_of(elbos, tmp_path, status="complete"):
    """The result of a sweep, by the ELBO of each settings and seed."""
    task = Task(len, Space({"latent": range(9)}), (), (), {}, 1, 1.0, tmp_path)
    runs = [
        [Run({"latent": n}, k, "complete", elbo=elbo) for k, elbo in enumerate(each)] for n, each in enumerate(elbos)
    ]
    runs.append([Run({"latent": len(elbos)}, k, status, elbo=-99.0) for k in range(len(elbos[0]))])
    return Sweep.of(runs, range(len(elbos[0])), task)
