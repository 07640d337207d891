"""ProdLDA (Srivastava and Sutton 2017): an amortised topic model of word counts."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from programs.by_hand import grid, moments, normal
from programs.program import Program


class ProdLDA(nn.Module):
    def __init__(self, vocabulary=12, topics=3, hidden=16):
        super().__init__()
        self.topics = topics
        self.beta = nn.Linear(topics, vocabulary, bias=False)
        self.encoder = nn.Sequential(nn.Linear(vocabulary, hidden), nn.Softplus(), nn.Linear(hidden, 2 * topics))

    def model(self, docs):
        pyro.module("beta", self.beta)
        with pyro.plate("documents", docs.shape[0]):
            logtheta_loc = docs.new_zeros((docs.shape[0], self.topics))
            logtheta_scale = docs.new_ones((docs.shape[0], self.topics))
            logtheta = pyro.sample("logtheta", dist.Normal(logtheta_loc, logtheta_scale).to_event(1))
            probs = self.beta(logtheta.softmax(-1)).softmax(-1)
            pyro.sample("obs", dist.Multinomial(total_count=int(docs.sum(-1).max()), probs=probs), obs=docs)

    def guide(self, docs):
        pyro.module("encoder", self.encoder)
        with pyro.plate("documents", docs.shape[0]):
            loc, log_scale = self.encoder(docs).chunk(2, -1)
            pyro.sample("logtheta", dist.Normal(loc, log_scale.exp()).to_event(1))


def make():
    topics = dist.Dirichlet(torch.full((12,), 0.3)).sample((3,))
    theta = dist.Dirichlet(torch.full((3,), 0.5)).sample((40,))
    docs = dist.Multinomial(20, theta @ topics).sample()
    lda = ProdLDA()

    @torch.no_grad()
    def integrate():
        axis = torch.linspace(-5.5, 5.5, 45)
        points, volume = grid(axis, axis, axis)
        log_probs = lda.beta(torch.stack(points, -1).softmax(-1)).log_softmax(-1)
        constant = torch.lgamma(docs.sum(-1) + 1) - torch.lgamma(docs + 1).sum(-1)
        prior = sum(normal(point, 0.0, 1.0) for point in points)
        joint = prior[:, None] + log_probs @ docs.T + constant
        return moments(joint, volume, logtheta=torch.stack(points, -1))

    return Program(
        lda.model, lda.guide, (docs,), how="quadrature", by_hand=lambda: integrate()[0], means=lambda: integrate()[1]
    )
