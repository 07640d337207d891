"""A linear Gaussian model, its exact posterior as a guide, guides with errors, and data."""

import pyro
import pyro.distributions as dist
import torch

WEIGHT = torch.tensor([[1.0, 0.0, 1.0, 0.5], [0.0, 1.0, -1.0, 0.5]])
NOISE = 0.6
COVARIANCE = torch.linalg.inv(torch.eye(2) + WEIGHT @ WEIGHT.T / NOISE**2)


def model(x):
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=1)
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT, NOISE).to_event(1), obs=x)


def posterior_mean(x):
    return x @ WEIGHT.T / NOISE**2 @ COVARIANCE


def make_guide(covariance_factor=1.0, shift=0.0):
    """The exact posterior, with its covariance multiplied and its mean moved."""

    def guide(x):
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            pyro.sample("z", dist.MultivariateNormal(posterior_mean(x) + shift, covariance_factor * COVARIANCE))

    return guide


def make_data(seed=0, rows=200):
    generator = torch.Generator().manual_seed(seed)
    z, noise = (torch.randn(rows, size, generator=generator) for size in (2, 4))
    return z @ WEIGHT + NOISE * noise
