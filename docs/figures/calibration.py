"""Ranks of an exact guide and of a guide with half its variance, with the band for an exact guide."""

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyro_vae as pv


def model(x):
    """z ~ N(0, I), x ~ N(z, I)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide_of(share):
    """The exact posterior N(x / 2, I / 2), with a share of its variance."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, (share / 2) ** 0.5).to_event(1))

    return guide


figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
for ax, share, title in zip(axes, (1.0, 0.5), ("exact", "half the variance"), strict=True):
    pv.plots.calibration(pv.calibrate(model, guide_of(share), torch.zeros(8, 2)), ax=ax)
    ax.set_title(title)
