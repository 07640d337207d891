"""A sparse gamma deep exponential family (Ranganath et al. 2015) of one layer, on counts."""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from programs.by_hand import importance_sampling
from programs.program import Program

ROWS, PIXELS, WIDTH = 6, 5, 1


def model(x):
    with pyro.plate("weights", PIXELS):
        w = pyro.sample("w", dist.Gamma(torch.ones(WIDTH) * 2.0, torch.ones(WIDTH)).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(torch.ones(WIDTH) * 2.0, torch.ones(WIDTH)).to_event(1))
        pyro.sample("obs", dist.Poisson(z @ w.T).to_event(1), obs=x)


def guide(x):
    def q(name, rows):
        shape = pyro.param(f"shape_{name}", 3.0 * torch.ones(rows, WIDTH), constraint=constraints.greater_than(0.1))
        mean = pyro.param(f"mean_{name}", 2.0 * torch.ones(rows, WIDTH), constraint=constraints.greater_than(0.01))
        return dist.Gamma(shape, shape / mean).to_event(1)

    with pyro.plate("weights", PIXELS):
        pyro.sample("w", q("w", PIXELS))
    with pyro.plate("data", len(x)):
        pyro.sample("z", q("z", len(x)))


def make():
    x = dist.Poisson(dist.Gamma(2.0, 1.0).sample((ROWS, 1)) * dist.Gamma(2.0, 1.0).sample((PIXELS,))).sample()
    program = Program(
        model,
        guide,
        (x,),
        lr=0.05,
        how="importance sampling by hand",
        by_hand=lambda: importance_sampling(program, 4000),
    )
    return program
