"""Batting averages (Efron and Morris 1975): a Beta-Binomial hierarchy, in a function of keywords."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

from programs.by_hand import grid, leave_one_out, moments
from programs.program import Program


def model(at_bats, hits=None):
    m = pyro.sample("m", dist.Uniform(0.0, 1.0))
    kappa = pyro.sample("kappa", dist.LogNormal(3.0, 0.7))
    with pyro.plate("num_players", at_bats.shape[0]):
        phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
        return pyro.sample("hits", dist.Binomial(at_bats, probs=phi), obs=hits)


def make():
    at_bats = torch.tensor([45.0] * 12)
    hits = torch.tensor([18.0, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 8])

    def integrate():
        (m, log_kappa), volume = grid(torch.linspace(0.1, 0.6, 120), torch.linspace(0.0, 6.5, 150))
        kappa = log_kappa.exp()
        a, b = (m * kappa)[:, None], ((1 - m) * kappa)[:, None]
        likelihood = dist.BetaBinomial(a, b, at_bats).log_prob(hits)
        joint = dist.Normal(3.0, 0.7).log_prob(log_kappa) + likelihood.sum(-1)
        means = {"m": m, "kappa": kappa, "phi": (a + hits) / (a + b + at_bats)}
        return *moments(joint, volume, **means), leave_one_out(joint, likelihood)

    return Program(
        model,
        AutoNormal(model),
        (at_bats,),
        {"hits": hits},
        how="quadrature and a closed form",
        steps=500,
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
        loo=lambda: integrate()[2],
    )
