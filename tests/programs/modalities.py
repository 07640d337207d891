"""A VAE of two modalities (Wu and Goodman 2018): numbers and a class, either missing, a product of experts as guide."""

import pyro
import torch
from torch import nn

from programs.by_hand import grid, moments, normal
from programs.program import Program
from pyro_vae import guides, likelihoods, networks, priors


class TwoModalities(nn.Module):
    def __init__(self, features=3, classes=4, hidden=8):
        super().__init__()
        network = networks.mlp([hidden], nn.Tanh)
        self.prior = priors.StandardNormal(2)
        self.numbers = likelihoods.Normal(2, features, network, scale=0.5, missing=True)
        self.label = likelihoods.Categorical(2, 1, classes, network, missing=True)
        experts = [
            guides.DiagonalNormal(features, 2, network),
            guides.DiagonalNormal(1, 2, networks.one_hot(classes, network)),
        ]
        self.experts = guides.ProductOfExperts(experts)

    def model(self, numbers, label):
        pyro.module("two_modalities", self)
        with pyro.plate("items", len(numbers)):
            numbers, label = (pyro.subsample(x, event_dim=1) for x in (numbers, label))
            z = pyro.sample("z", self.prior())
            pyro.sample("numbers", self.numbers(z), obs=numbers)
            pyro.sample("label", self.label(z), obs=label)

    def guide(self, numbers, label):
        pyro.module("two_modalities", self)
        with pyro.plate("items", len(numbers)):
            rows = [pyro.subsample(x, event_dim=1) for x in (numbers, label)]
            pyro.sample("z", self.experts(torch.cat(rows, -1)))


def make():
    z = torch.randn(40, 2)
    numbers = torch.stack([z[:, 0], z[:, 1], z[:, 0] * z[:, 1]], -1) + 0.5 * torch.randn(40, 3)
    label = (2 * (z[:, :1] > 0) + (z[:, 1:] > 0)).float()
    numbers[::4], label[1::4] = torch.nan, torch.nan
    pair = TwoModalities()

    @torch.no_grad()
    def on_grid():
        """log p(x) and the posterior means of each datum, with the factors of missing modalities left out by hand."""
        axis = torch.linspace(-6, 6, 241)
        points, volume = grid(axis, axis)
        z = torch.stack(points, -1)
        log_joint = normal(z, 0.0, 1.0).sum(-1)[:, None].expand(-1, len(numbers)).clone()
        loc, logits = pair.numbers.network(z), pair.label.network(z).log_softmax(-1)
        for row in range(len(numbers)):
            if row % 4 != 0:
                log_joint[:, row] += normal(numbers[row], loc, 0.5).sum(-1)
            if row % 4 != 1:
                log_joint[:, row] += logits[:, int(label[row])]
        return moments(log_joint, volume, z=z)

    return Program(
        pair.model,
        pair.guide,
        (numbers, label),
        how="quadrature",
        by_hand=lambda: on_grid()[0],
        means=lambda: on_grid()[1],
    )
