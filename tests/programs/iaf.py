"""Inverse autoregressive flow (Kingma et al. 2016): an amortised guide whose flow reads a context from the encoder."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import conditional_affine_autoregressive
from torch import nn

from programs.by_hand import grid, moments, normal
from programs.program import Program


class IAF(nn.Module):
    def __init__(self, features=5, z_dim=2, context=4, hidden=16):
        super().__init__()
        self.context = context
        self.decoder = nn.Sequential(nn.Linear(z_dim, hidden), nn.Tanh(), nn.Linear(hidden, features))
        self.encoder = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, 2 * z_dim + context))
        options = {"context_dim": context, "hidden_dims": [8], "stable": True}
        self.flow = conditional_affine_autoregressive(z_dim, **options)

    def model(self, x):
        pyro.module("iaf", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("iaf", self)
        with pyro.plate("data", len(x)):
            loc, log_scale, h = self.encoder(x).split([2, 2, self.context], -1)
            noise = dist.Normal(loc, log_scale.exp()).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(noise, [self.flow.condition(h)]))


def make():
    z = torch.randn(40, 2)
    x = torch.stack([z[:, 0], z[:, 0] ** 2, z[:, 1], z.prod(-1), z.sum(-1).sin()], -1) + 0.3 * torch.randn(40, 5)
    iaf = IAF()

    @torch.no_grad()
    def integrate():
        axis = torch.linspace(-6, 6, 241)
        (a, b), volume = grid(axis, axis)
        z = torch.stack([a, b], -1)
        likelihood = normal(x, iaf.decoder(z)[:, None], 0.5).sum(-1)
        return moments((normal(z, 0.0, 1.0).sum(-1))[:, None] + likelihood, volume, z=z)

    return Program(
        iaf.model,
        iaf.guide,
        (x,),
        how="quadrature",
        lr=0.01,
        steps=800,
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
    )
