"""A linear Gaussian model, its exact posterior as a guide, guides with errors, and data."""

import pyro.distributions as dist
import torch
from pairs import guide_of, model_of

WEIGHT = torch.tensor([[1.0, 0.0, 1.0, 0.5], [0.0, 1.0, -1.0, 0.5]])
NOISE = 0.6
COVARIANCE = torch.linalg.inv(torch.eye(2) + WEIGHT @ WEIGHT.T / NOISE**2)

model = model_of(dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda z: dist.Normal(z @ WEIGHT, NOISE).to_event(1))


def posterior_mean(x):
    return x @ WEIGHT.T / NOISE**2 @ COVARIANCE


def make_guide(covariance_factor=1.0, shift=0.0):
    """The exact posterior, with its covariance multiplied and its mean moved."""
    return guide_of(lambda x: dist.MultivariateNormal(posterior_mean(x) + shift, covariance_factor * COVARIANCE))


def make_data(seed=0, rows=200):
    generator = torch.Generator().manual_seed(seed)
    z, noise = (torch.randn(rows, size, generator=generator) for size in (2, 4))
    return z @ WEIGHT + NOISE * noise
