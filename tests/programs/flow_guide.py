"""A curved posterior of two parameters, with a normalizing flow as guide; the data are in the closure."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoIAFNormal

from programs.by_hand import grid, leave_one_out, moments, normal
from programs.program import Program


def make():
    data = 1.0 + torch.randn(12)

    def model():
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(data)):
            pyro.sample("obs", dist.Normal(theta[..., :1] + theta[..., 1:] ** 2, 1.0), obs=data)

    def integrate():
        axis = torch.linspace(-5, 5, 400)
        (a, b), volume = grid(axis, axis)
        likelihood = normal(data, (a + b**2)[:, None], 1.0)
        joint = normal(a, 0.0, 1.0) + normal(b, 0.0, 1.0) + likelihood.sum(-1)
        return *moments(joint, volume, theta=torch.stack([a, b], -1)), leave_one_out(joint, likelihood)

    return Program(
        model,
        AutoIAFNormal(model, hidden_dim=[16], num_transforms=2),
        (),
        how="quadrature",
        lr=0.01,
        steps=600,
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
        loo=lambda: integrate()[2],
    )
