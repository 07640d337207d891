"""Counts of genes in single cells (Lopez et al. 2018; Xu et al. 2021): a size factor, a cell state, and cell types."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import nn
from torch.nn.functional import softplus

from programs.by_hand import grid, normal
from programs.program import Program


class SingleCell(nn.Module):
    def __init__(self, genes=6, types=2, hidden=16, l_loc=3.0, l_scale=0.4):
        super().__init__()
        self.types, self.l_loc, self.l_scale = types, l_loc, l_scale
        self.decoder = nn.Sequential(nn.Linear(1 + types, hidden), nn.Tanh(), nn.Linear(hidden, genes))
        self.inverse_dispersion = nn.Parameter(torch.ones(genes))
        self.encoder = nn.Sequential(nn.Linear(genes, hidden), nn.Tanh(), nn.Linear(hidden, 4 + types))

    def counts(self, z, y, size):
        batch = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])
        share = self.decoder(torch.cat([z.expand(*batch, -1), y.expand(*batch, -1)], -1)).softmax(-1)
        theta = softplus(self.inverse_dispersion)
        return dist.GammaPoisson(theta, theta / (size * share)).to_event(1)

    def model(self, x):
        pyro.module("scanvi", self)
        with pyro.plate("batch", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(self.types) / self.types))
            size = pyro.sample("l", dist.LogNormal(self.l_loc * torch.ones(1), self.l_scale).to_event(1))
            pyro.sample("x", self.counts(z, y, size), obs=x)

    def guide(self, x):
        pyro.module("scanvi", self)
        z_loc, z_scale, l_loc, l_scale, logits = self.encoder((1 + x).log()).split([1, 1, 1, 1, self.types], -1)
        with pyro.plate("batch", len(x)):
            pyro.sample("y", dist.OneHotCategorical(logits=logits))
            pyro.sample("z", dist.Normal(z_loc, softplus(z_scale) + 0.1).to_event(1))
            pyro.sample("l", dist.LogNormal(l_loc + self.l_loc, softplus(l_scale) * 0.3 + 0.05).to_event(1))


def make():
    kind = torch.randint(2, (30,))
    share = (torch.randn(2, 6)[kind] + 0.5 * torch.randn(30, 1) * torch.randn(6)).softmax(-1)
    x = dist.Poisson(torch.exp(3 + 0.4 * torch.randn(30, 1)) * share).sample()
    cells = SingleCell()

    @torch.no_grad()
    def by_hand():
        (z, log_size), volume = grid(torch.linspace(-6, 6, 121), torch.linspace(-6, 6, 121))
        size = torch.exp(cells.l_loc + cells.l_scale * log_size)
        terms = []
        for y in torch.eye(2):
            y = y.expand(len(z), 2)
            likelihood = cells.counts(z[:, None, None], y[:, None], size[:, None, None]).log_prob(x)
            terms.append(likelihood + (normal(z, 0.0, 1.0) + normal(log_size, 0.0, 1.0))[:, None])
        return torch.cat(terms).logsumexp(0) + volume - torch.tensor(2.0).log()

    return Program(
        cells.model,
        config_enumerate(cells.guide),
        (x,),
        elbo=TraceEnum_ELBO(max_plate_nesting=1),
        how="quadrature",
        by_hand=by_hand,
    )
