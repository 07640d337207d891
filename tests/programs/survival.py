"""Survival with censoring: masks choose between the density of a time and the probability of a longer one."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from programs.by_hand import grid, leave_one_out, moments, normal
from programs.program import Program


def model(age, time, died):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("patients", len(age)):
        rate = torch.exp(intercept + slope * age)
        with poutine.mask(mask=died):
            pyro.sample("time", dist.Exponential(rate), obs=time)
        with poutine.mask(mask=~died):
            pyro.sample("censored", dist.Bernoulli(torch.exp(-rate * time)), obs=torch.ones(len(age)))


def make():
    age = torch.randn(40)
    lifetime, end = dist.Exponential(torch.exp(0.3 + 0.7 * age)).sample(), 1.5 * torch.rand(40) + 0.1
    time, died = torch.minimum(lifetime, end), lifetime < end

    def integrate():
        (intercept, slope), volume = grid(torch.linspace(-3, 3, 150), torch.linspace(-3, 3, 150))
        log_rate = intercept[:, None] + slope[:, None] * age
        likelihood = died * log_rate - log_rate.exp() * time
        joint = normal(intercept, 0.0, 1.0) + normal(slope, 0.0, 1.0) + likelihood.sum(-1)
        return *moments(joint, volume, intercept=intercept, slope=slope), leave_one_out(joint, likelihood)

    return Program(
        model,
        AutoNormal(model),
        (age, time, died),
        how="quadrature",
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
        loo=lambda: integrate()[2],
    )
