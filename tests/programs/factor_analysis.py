"""Probabilistic principal components: a linear decoder, mini-batches by ``pyro.plate(...) as rows``."""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from programs.by_hand import parameter
from programs.program import Program


def model(x):
    weight = pyro.param("weight", 0.5 * torch.eye(4)[:, :2])
    sigma = pyro.param("sigma", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("samples", len(x)) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight.T, sigma).to_event(1), obs=x[rows])


def guide(x):
    project = pyro.param("project", torch.zeros(2, 4))
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("samples", len(x)) as rows:
        pyro.sample("z", dist.Normal(x[rows] @ project.T, scale).to_event(1))


def make():
    x = torch.randn(60, 2) @ torch.randn(2, 4) + 0.3 * torch.randn(60, 4)

    def by_hand():
        weight, sigma = parameter("weight"), parameter("sigma")
        return dist.MultivariateNormal(torch.zeros(4), weight @ weight.T + sigma**2 * torch.eye(4)).log_prob(x)

    def means():
        weight, sigma = parameter("weight"), parameter("sigma")
        precision = weight.T @ weight + sigma**2 * torch.eye(2)
        return {"z": torch.linalg.solve(precision, weight.T @ x.T).T}

    return Program(model, guide, (x,), how="closed form", by_hand=by_hand, means=means)
