"""A linear Gaussian chain with a latent state at each step, and learned parameters; no plate at all."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch.distributions import constraints

from programs.by_hand import parameter
from programs.program import Program


def model(data):
    rho = pyro.param("rho", torch.tensor(0.8))
    sigma = pyro.param("sigma", torch.tensor(0.5), constraint=constraints.positive)
    z = torch.zeros(())
    for t in pyro.markov(range(len(data))):
        z = pyro.sample(f"z_{t}", dist.Normal(rho * z, 0.5))
        pyro.sample(f"y_{t}", dist.Normal(z, sigma), obs=data[t])


def make():
    data = 0.5 * torch.randn(10).cumsum(0) + 0.5 * torch.randn(10)

    def by_hand():
        rho, r = parameter("rho"), parameter("sigma") ** 2
        mean, variance, total = torch.zeros(()), torch.zeros(()), torch.zeros(())
        for y in data:
            mean, variance = rho * mean, rho**2 * variance + 0.25
            total = total + dist.Normal(mean, (variance + r).sqrt()).log_prob(y)
            gain = variance / (variance + r)
            mean, variance = mean + gain * (y - mean), (1 - gain) * variance
        return total

    def means():
        rho, sigma = parameter("rho"), parameter("sigma")
        step = torch.eye(10) - rho * torch.diag(torch.ones(9), -1)
        precision = step.T @ step / 0.25 + torch.eye(10) / sigma**2
        z = torch.linalg.solve(precision, data / sigma**2)
        return {f"z_{t}": z[t] for t in range(10)}

    return Program(
        model, AutoMultivariateNormal(model), (data,), how="Kalman filter", steps=600, by_hand=by_hand, means=means
    )
