"""A variational autoencoder of binary pixels, in the manner of Pyro's first example."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from programs.by_hand import grid, moments, normal
from programs.program import Program


class VAE(nn.Module):
    def __init__(self, pixels=12, z_dim=2, hidden=16):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Softplus(), nn.Linear(hidden, 2 * z_dim))
        self.decoder = nn.Sequential(nn.Linear(z_dim, hidden), nn.Softplus(), nn.Linear(hidden, pixels))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros(x.shape[0], self.z_dim)
            z = pyro.sample("latent", dist.Normal(z_loc, torch.ones_like(z_loc)).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


def make():
    x = (torch.randn(60, 2) @ torch.randn(2, 12) * 1.5 > torch.rand(12)).float()
    vae = VAE()

    @torch.no_grad()
    def integrate():
        axis = torch.linspace(-7, 7, 141)
        (a, b), volume = grid(axis, axis)
        logits = vae.decoder(torch.stack([a, b], -1))
        likelihood = logits @ x.T - nn.functional.softplus(logits).sum(1, keepdim=True)
        prior = normal(a, 0.0, 1.0) + normal(b, 0.0, 1.0)
        return moments(prior[:, None] + likelihood, volume, latent=torch.stack([a, b], -1))

    return Program(
        vae.model,
        vae.guide,
        (x,),
        steps=1000,
        how="quadrature",
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
    )
