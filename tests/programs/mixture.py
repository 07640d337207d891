"""A Gaussian mixture with unknown weights, locations and scale: the assignments are enumerated in the model."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal

from programs.by_hand import grid, leave_one_out, moments, normal
from programs.program import Program

K = 2


@config_enumerate
def model(data):
    weights = pyro.sample("weights", dist.Dirichlet(2.0 * torch.ones(K)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("components", K):
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-3.0, 3.0]), 1.0))
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)


def make():
    data = torch.where(torch.rand(40) < 0.35, -2.5, 2.0) + 0.9 * torch.randn(40)

    def integrate():
        axes = [torch.linspace(*limits, 20) for limits in [(0.05, 0.85), (0.4, 2.0), (-4.5, -0.8), (1.0, 3.2)]]
        (weight, scale, a, b), volume = grid(*axes)
        weight, scale, a, b = (values[:, None] for values in (weight, scale, a, b))
        first, second = weight.log() + normal(data, a, scale), (1 - weight).log() + normal(data, b, scale)
        likelihood = torch.logaddexp(first, second)
        weight, scale, a, b = (values[:, 0] for values in (weight, scale, a, b))
        prior = dist.Beta(2.0, 2.0).log_prob(weight) + dist.LogNormal(0.0, 0.5).log_prob(scale)
        joint = prior + normal(a, -3.0, 1.0) + normal(b, 3.0, 1.0) + likelihood.sum(-1)
        means = moments(joint, volume, scale=scale, locs=torch.stack([a, b], -1))
        return *means, leave_one_out(joint, likelihood)

    guide = AutoNormal(poutine.block(model, hide=["assignment"]))
    return Program(
        model,
        guide,
        (data,),
        elbo=TraceEnum_ELBO(max_plate_nesting=1),
        lr=0.03,
        how="quadrature",
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
        loo=lambda: integrate()[2],
    )
