"""A regression of counts whose model draws a mini-batch itself: ``subsample_size``, and ``obs=y[rows]``."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal

from programs.by_hand import grid, leave_one_out, moments, normal
from programs.program import Program


def model(x, y, batch_size=20):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("observations", len(x), subsample_size=batch_size) as rows:
        pyro.sample("obs", dist.Poisson(torch.exp(a + b * x[rows])), obs=y[rows])


def make():
    x = torch.randn(80)
    y = dist.Poisson(torch.exp(0.5 + 0.4 * x)).sample()

    def integrate():
        (a, b), volume = grid(torch.linspace(-1, 2, 200), torch.linspace(-1, 2, 200))
        likelihood = dist.Poisson(torch.exp(a[:, None] + b[:, None] * x)).log_prob(y)
        joint = normal(a, 0.0, 1.0) + normal(b, 0.0, 1.0) + likelihood.sum(-1)
        return *moments(joint, volume, a=a, b=b), leave_one_out(joint, likelihood)

    return Program(
        model,
        AutoDiagonalNormal(model),
        (x, y),
        all_rows={"batch_size": None},
        how="quadrature",
        lr=0.01,
        steps=800,
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
        loo=lambda: integrate()[2],
    )
