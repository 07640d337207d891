"""A Gaussian process with unknown length scale and noise: all observations are one multivariate normal."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

from programs.by_hand import grid, moments
from programs.program import Program


def kernel(x, length, noise):
    squared = (x[:, None] - x) ** 2
    return torch.exp(-squared / (2 * length**2)) + (noise**2 + 1e-4) * torch.eye(len(x))


def model(x, y=None):
    length = pyro.sample("length", dist.LogNormal(0.0, 0.7))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.7))
    return pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), kernel(x, length, noise)), obs=y)


def make():
    x = torch.linspace(-3, 3, 20)
    y = torch.sin(1.5 * x) + 0.3 * torch.randn(20)

    def integrate():
        (length, noise), volume = grid(torch.linspace(-3.0, 2.5, 110), torch.linspace(-3.5, 1.0, 90))  # logarithms
        covariance = kernel(x, length.exp()[:, None, None], noise.exp()[:, None, None])
        prior = dist.Normal(0.0, 0.7).log_prob(length) + dist.Normal(-1.0, 0.7).log_prob(noise)
        joint = prior + dist.MultivariateNormal(torch.zeros(20), covariance).log_prob(y)
        return moments(joint, volume, length=length.exp(), noise=noise.exp())

    return Program(
        model,
        AutoMultivariateNormal(model),
        (x, y),
        how="quadrature",
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
    )
