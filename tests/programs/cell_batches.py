"""Counts of genes in cells of several batches, with zero inflation and a latent library size (Lopez et al. 2018)."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import one_hot, softplus

from programs.by_hand import grid, normal
from programs.program import Program


class Cells(nn.Module):
    def __init__(self, genes=6, batches=3, hidden=16):
        super().__init__()
        self.genes = genes
        self.decoder = nn.Sequential(nn.Linear(1 + batches, hidden), nn.Tanh(), nn.Linear(hidden, 2 * genes))
        self.inverse_dispersion = nn.Parameter(torch.ones(genes))
        self.encoder = nn.Sequential(nn.Linear(genes + batches, hidden), nn.Tanh(), nn.Linear(hidden, 4))
        self.register_buffer("l_loc", torch.tensor([2.5, 3.0, 3.5]))

    def counts(self, z, log_l, batch):
        shape = torch.broadcast_shapes(z.shape[:-1], batch.shape[:-1])
        raw = self.decoder(torch.cat([z.expand(*shape, -1), batch.expand(*shape, -1)], -1))
        mean = log_l.exp() * raw[..., : self.genes].softmax(-1)
        theta = softplus(self.inverse_dispersion)
        counts = dist.NegativeBinomial(theta, logits=mean.log() - theta.log())
        return dist.ZeroInflatedDistribution(counts, gate_logits=raw[..., self.genes :] - 2).to_event(1)

    def model(self, x, batch):
        pyro.module("cells", self)
        with pyro.plate("cells", len(x)):
            x, batch = pyro.subsample(x, event_dim=1), pyro.subsample(batch, event_dim=1)
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            log_l = pyro.sample("log_l", dist.Normal((batch @ self.l_loc)[:, None], 0.4).to_event(1))
            pyro.sample("obs", self.counts(z, log_l, batch), obs=x)

    def guide(self, x, batch):
        pyro.module("cells", self)
        with pyro.plate("cells", len(x)):
            x, batch = pyro.subsample(x, event_dim=1), pyro.subsample(batch, event_dim=1)
            raw = self.encoder(torch.cat([x.log1p(), batch], -1))
            z_loc, z_scale, l_loc, l_scale = raw.split(1, -1)
            pyro.sample("z", dist.Normal(z_loc, softplus(z_scale) + 0.1).to_event(1))
            total = x.sum(-1, keepdim=True).log1p()
            pyro.sample("log_l", dist.Normal(total + 0.3 * l_loc, 0.3 * softplus(l_scale) + 0.05).to_event(1))


def make():
    batch = one_hot(torch.arange(30) % 3, 3).float()
    share = (torch.randn(6) + torch.randn(30, 1) * torch.randn(6) + 0.5 * batch @ torch.randn(3, 6)).softmax(-1)
    size = torch.exp(batch @ torch.tensor([2.5, 3.0, 3.5]) + 0.4 * torch.randn(30))
    x = dist.Poisson(size[:, None] * share).sample() * (torch.rand(30, 6) > 0.1)
    cells = Cells()

    @torch.no_grad()
    def by_hand():
        (z, unit), volume = grid(torch.linspace(-6, 6, 121), torch.linspace(-6, 6, 121))
        log_l = (batch @ cells.l_loc)[None, :, None] + 0.4 * unit[:, None, None]
        theta = softplus(cells.inverse_dispersion)
        raw = cells.decoder(torch.cat([z[:, None, None].expand(-1, 30, 1), batch.expand(len(z), -1, -1)], -1))
        mean, gate = log_l.exp() * raw[..., :6].softmax(-1), (raw[..., 6:] - 2).sigmoid()
        counts = (x + theta).lgamma() - theta.lgamma() - (x + 1).lgamma()
        counts = counts + theta * (theta / (theta + mean)).log() + x * (mean / (theta + mean)).log()
        likelihood = (gate * (x == 0) + (1 - gate) * counts.exp()).log().sum(-1)
        joint = likelihood + (normal(z, 0.0, 1.0) + normal(unit, 0.0, 1.0))[:, None]
        return joint.logsumexp(0) + volume

    return Program(cells.model, cells.guide, (x, batch), how="quadrature", by_hand=by_hand)
