"""A ladder VAE (Sønderby et al. 2016) of two levels: the guide goes from the top down; pixels have eight levels."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from programs.by_hand import grid, moments, normal
from programs.program import Program
from pyro_vae.distributions import DiscretizedLogisticMixture

LEVELS = 8


class LadderVAE(nn.Module):
    def __init__(self, pixels=6, hidden=12):
        super().__init__()
        self.up = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh())
        self.upper = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2))
        self.lower = nn.Linear(hidden, 2)
        self.prior = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 2))
        self.decoder = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, pixels))
        self.log_scale = nn.Parameter(torch.zeros(pixels))

    def p_z1(self, z2):
        loc, raw = self.prior(z2).chunk(2, -1)
        return loc, nn.functional.softplus(raw) + 0.2

    def model(self, x):
        pyro.module("ladder", self)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(*self.p_z1(z2)).to_event(1))
            loc, scale = (LEVELS - 1) / 2 * (1 + self.decoder(z1)), self.log_scale.exp()
            pixels = DiscretizedLogisticMixture(torch.zeros(1), loc[..., None], scale[..., None], LEVELS)
            pyro.sample("x", pixels.to_event(1), obs=x)

    def guide(self, x):
        pyro.module("ladder", self)
        with pyro.plate("data", len(x)):
            features = self.up(x - (LEVELS - 1) / 2)
            loc, log_scale = self.upper(features).chunk(2, -1)
            z2 = pyro.sample("z2", dist.Normal(loc, log_scale.exp()).to_event(1))
            seen, log_seen = self.lower(features).chunk(2, -1)
            expected, spread = self.p_z1(z2)
            precisions = (-2 * log_seen).exp(), spread**-2  # of the evidence from below, and of the prior
            mean = (seen * precisions[0] + expected * precisions[1]) / sum(precisions)
            pyro.sample("z1", dist.Normal(mean, sum(precisions) ** -0.5).to_event(1))


def make():
    z2 = torch.randn(30, 1)
    z1 = z2.abs() * 1.5 + 0.5 * torch.randn(30, 1)
    x = (3.5 + 2 * z1 * torch.randn(6) + 0.7 * torch.randn(30, 6)).round().clamp(0, LEVELS - 1)
    ladder = LadderVAE()

    @torch.no_grad()
    def integrate():
        """Sums over a grid of z2 and of z1, in units of its prior's scale."""
        (z2, unit), volume = grid(torch.linspace(-6, 6, 121), torch.linspace(-7, 7, 281))
        loc, scale = ladder.p_z1(z2[:, None])
        z1 = loc + scale * unit[:, None]
        centre, spread = 3.5 * (1 + ladder.decoder(z1)).double(), ladder.log_scale.exp().double()
        ends = torch.arange(LEVELS - 1) + 0.5
        below = ((ends[:, None, None] - centre) / spread).sigmoid()
        below = torch.cat([torch.zeros_like(below[:1]), below, torch.ones_like(below[:1])])
        log_mass = below.diff(dim=0).clamp(min=1e-200).log()  # (levels, points, pixels)
        likelihood = sum(log_mass[:, :, pixel][x[:, pixel].long()] for pixel in range(x.shape[1]))
        prior = normal(z2, 0.0, 1.0) + normal(unit, 0.0, 1.0)
        return moments(prior[:, None] + likelihood.T.float(), volume, z2=z2[:, None], z1=z1)

    return Program(
        ladder.model,
        ladder.guide,
        (x,),
        steps=600,
        how="quadrature",
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
    )
