"""A causal effect VAE (Louizos et al. 2017): a guide that also predicts treatment and outcome, for new covariates."""

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.cevae import TraceCausalEffect_ELBO
from torch import nn

from programs.by_hand import moments, normal
from programs.program import Program


class CEVAE(nn.Module):
    def __init__(self, covariates=4, hidden=12):
        super().__init__()
        self.x_nn = nn.Sequential(nn.Linear(1, hidden), nn.ELU(), nn.Linear(hidden, covariates))
        self.t_nn = nn.Linear(1, 1)
        self.y_nn = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
        self.guide_t = nn.Linear(covariates, 1)
        self.guide_y = nn.Linear(covariates + 1, 1)
        self.guide_z = nn.Sequential(nn.Linear(covariates + 2, hidden), nn.ELU(), nn.Linear(hidden, 2))

    def outcome(self, z, t):
        y0, y1 = self.y_nn[0](z).squeeze(-1), self.y_nn[1](z).squeeze(-1)
        return dist.Bernoulli(logits=torch.where(t.bool(), y1, y0))

    def model(self, x, t=None, y=None, size=None):
        pyro.module("model", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            x = pyro.sample("x", dist.Normal(self.x_nn(z), 1.0).to_event(1), obs=x)
            t = pyro.sample("t", dist.Bernoulli(logits=self.t_nn(z).squeeze(-1)), obs=t)
            return pyro.sample("y", self.outcome(z, t), obs=y)

    def guide(self, x, t=None, y=None, size=None):
        auxiliary = {"is_auxiliary": True}
        with pyro.plate("data", len(x)):
            logits = self.guide_t(x).squeeze(-1)
            t = pyro.sample("t", dist.Bernoulli(logits=logits), obs=t, infer=auxiliary)
            logits = self.guide_y(torch.cat([x, t.unsqueeze(-1)], -1)).squeeze(-1)
            y = pyro.sample("y", dist.Bernoulli(logits=logits), obs=y, infer=auxiliary)
            loc, log_scale = self.guide_z(torch.cat([x, t.unsqueeze(-1), y.unsqueeze(-1)], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def make():
    z = torch.randn(60, 1)
    x = z * torch.tensor([1.0, -1.0, 0.5, 0.0]) + torch.randn(60, 4)
    t = torch.bernoulli(torch.sigmoid(z[:, 0]))
    y = torch.bernoulli(torch.sigmoid(2 * z[:, 0] + t - 0.5))
    cevae = CEVAE()

    @torch.no_grad()
    def integrate():
        point = torch.linspace(-7, 7, 701)[:, None, None]
        likelihood = normal(x, cevae.x_nn(point), 1.0).sum(-1)
        likelihood = likelihood + dist.Bernoulli(logits=cevae.t_nn(point).squeeze(-1)).log_prob(t)
        likelihood = likelihood + cevae.outcome(point, t).log_prob(y)
        joint = normal(point[..., 0], 0.0, 1.0) + likelihood
        return moments(joint, torch.tensor(14 / 700).log(), z=point[:, 0])

    return Program(
        cevae.model,
        cevae.guide,
        (x, t, y),
        elbo=TraceCausalEffect_ELBO(),
        steps=600,
        how="quadrature",
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
    )
