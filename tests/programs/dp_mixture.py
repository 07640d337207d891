"""A Dirichlet process mixture of Poissons, by stick breaking with a truncation (Blei and Jordan 2006)."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from torch.distributions import constraints
from torch.nn.functional import pad

from programs.by_hand import grid, moments
from programs.program import Program

T = 3


def mix_weights(beta):
    beta1m_cumprod = (1 - beta).cumprod(-1)
    return pad(beta, (0, 1), value=1) * pad(beta1m_cumprod, (1, 0), value=1)


def model(data):
    with pyro.plate("sticks", T - 1):
        beta = pyro.sample("beta", dist.Beta(1.0, 1.5))
    with pyro.plate("components", T):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor([6.0, 20.0, 40.0]), 2.0))
    with pyro.plate("counts", len(data)):
        z = pyro.sample("z", dist.Categorical(mix_weights(beta)), infer={"enumerate": "parallel"})
        pyro.sample("obs", dist.Poisson(rate[z]), obs=data)


def guide(data):
    kappa = pyro.param("kappa", 2.0 * torch.ones(T - 1, 2), constraint=constraints.positive)
    shape = pyro.param("shape", torch.tensor([6.0, 20.0, 40.0]), constraint=constraints.positive)
    scale = pyro.param("gamma_rate", 2.0 * torch.ones(T), constraint=constraints.positive)
    with pyro.plate("sticks", T - 1):
        pyro.sample("beta", dist.Beta(kappa[:, 0], kappa[:, 1]))
    with pyro.plate("components", T):
        pyro.sample("rate", dist.Gamma(shape, scale))


def make():
    data = dist.Poisson(torch.tensor([2.0, 11.0, 22.0])[torch.randint(3, (30,))]).sample()

    def integrate():
        limits = [(0.03, 0.97), (0.03, 0.97), (0.5, 5.0), (5.0, 16.0), (14.0, 27.0)]
        axes = [torch.linspace(*limit, 13) for limit in limits]
        (first, second, *rates), volume = grid(*axes)
        log_weights = mix_weights(torch.stack([first, second], -1)).log()
        rate = torch.stack(rates, -1)
        values, counts = data.unique(return_counts=True)
        likelihood = torch.zeros(())
        for value, count in zip(values, counts, strict=True):
            likelihood = likelihood + count * (log_weights + dist.Poisson(rate).log_prob(value)).logsumexp(-1)
        prior = dist.Beta(1.0, 1.5).log_prob(first) + dist.Beta(1.0, 1.5).log_prob(second)
        prior = prior + dist.Gamma(torch.tensor([6.0, 20.0, 40.0]), 2.0).log_prob(rate).sum(-1)
        return moments(prior + likelihood, volume, rate=rate)

    return Program(
        model,
        guide,
        (data,),
        elbo=TraceEnum_ELBO(max_plate_nesting=1),
        lr=0.05,
        steps=800,
        how="quadrature",
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
    )
