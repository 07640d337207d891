"""Scenes of two objects on a line (Burgess et al. 2019): masks compete, and the slot of each pixel is summed out."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from programs.by_hand import grid, moments, normal
from programs.program import Program

PIXELS, SCALE = 8, 0.3


class Slots(nn.Module):
    """Each slot has a network for its mask and its colour at each pixel; the background is grey, 0."""

    def __init__(self, slots=2, hidden=8):
        super().__init__()
        self.slots = slots
        self.decoders = nn.ModuleList(
            nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 2 * PIXELS)) for _ in range(slots)
        )
        self.encoder = nn.Sequential(nn.Linear(PIXELS, hidden), nn.Tanh(), nn.Linear(hidden, 2 * slots))

    def decode(self, z):
        """Logits and colours of background and slots, (..., pixels, 1 + slots)."""
        drawn = [decoder(z[..., [index]]).unflatten(-1, (2, PIXELS)) for index, decoder in enumerate(self.decoders)]
        values = torch.stack([torch.zeros_like(drawn[0]), *drawn], -1)
        return values[..., 0, :, :], values[..., 1, :, :]

    def model(self, x):
        pyro.module("slots", self)
        with pyro.plate("scenes", len(x)):
            x = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.slots), 1.0).to_event(1))
            logits, colours = self.decode(z)
            pixel = dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(colours, SCALE))
            pyro.sample("x", pixel.to_event(1), obs=x)

    def guide(self, x):
        pyro.module("slots", self)
        with pyro.plate("scenes", len(x)):
            loc, log_scale = self.encoder(pyro.subsample(x, event_dim=1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def make():
    left, right = torch.randn(30, 1), torch.randn(30, 1)
    place = torch.arange(8.0)
    x = torch.where(place < 3, 1 + 0.5 * left, 0.0) + torch.where((place - 5 - right).abs() < 1.2, -1.0, 0.0)
    x = x + SCALE * torch.randn(30, PIXELS)
    slots = Slots()

    @torch.no_grad()
    def on_grid():
        axis = torch.linspace(-6, 6, 121)
        points, volume = grid(axis, axis)
        z = torch.stack(points, -1)
        logits, colours = (each[:, None] for each in slots.decode(z))
        pixels = (logits.log_softmax(-1) + normal(x[..., None], colours, SCALE)).logsumexp(-1)
        return moments(normal(z, 0.0, 1.0).sum(-1)[:, None] + pixels.sum(-1), volume, z=z)

    return Program(
        slots.model,
        slots.guide,
        (x,),
        how="quadrature",
        by_hand=lambda: on_grid()[0],
        means=lambda: on_grid()[1],
    )
