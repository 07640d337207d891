"""Forecasting with a local level: a random walk in a time plate, reparameterized as in Pyro's tutorials."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.reparam import LocScaleReparam

from programs.by_hand import grid, moments
from programs.program import Program


@poutine.reparam(config={"drift": LocScaleReparam(centered=0.0)})
def model(covariate, y=None, horizon=0):
    drift_scale = pyro.sample("drift_scale", dist.LogNormal(-1.0, 0.5))
    noise_scale = pyro.sample("noise_scale", dist.LogNormal(-1.0, 0.5))
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    with pyro.plate("time", len(covariate) + horizon, dim=-1):
        drift = pyro.sample("drift", dist.Normal(torch.zeros(()), drift_scale))
    level = drift.cumsum(-1)
    with pyro.plate("observed_time", len(covariate), dim=-1):
        return pyro.sample("y", dist.Normal(level[: len(covariate)] + weight * covariate, noise_scale), obs=y)


def make():
    covariate = torch.sin(torch.arange(10.0))
    y = 0.3 * torch.randn(10).cumsum(0) + 0.8 * covariate + 0.4 * torch.randn(10)

    def integrate():
        (drift, noise), volume = grid(torch.linspace(-3.5, 1.5, 100), torch.linspace(-3.5, 1.5, 100))  # logarithms
        steps = torch.arange(1.0, 11.0)
        walk = torch.minimum(steps[:, None], steps)

        def squared(log_sigma):
            return (2 * log_sigma).exp()[:, None, None]

        covariance = squared(drift) * walk + covariate[:, None] * covariate + squared(noise) * torch.eye(10)
        prior = dist.Normal(-1.0, 0.5).log_prob(drift) + dist.Normal(-1.0, 0.5).log_prob(noise)
        joint = prior + dist.MultivariateNormal(torch.zeros(10), covariance).log_prob(y)
        return moments(joint, volume, drift_scale=drift.exp(), noise_scale=noise.exp())

    return Program(
        model,
        AutoMultivariateNormal(model),
        (covariate,),
        {"y": y},
        how="quadrature and a closed form",
        lr=0.005,
        steps=1200,
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
    )
