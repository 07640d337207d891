"""A conditional VAE (Sohn et al. 2015): the prior of the latent and the decoder depend on an input."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from programs.by_hand import normal
from programs.program import Program


class CVAE(nn.Module):
    def __init__(self, inputs=3, outputs=4, hidden=16):
        super().__init__()
        self.prior_net = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 2))
        self.generation_net = nn.Sequential(nn.Linear(1 + inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        self.recognition_net = nn.Sequential(nn.Linear(inputs + outputs, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def model(self, xs, ys=None):
        pyro.module("generation_net", self)
        with pyro.plate("data", len(xs)):
            loc, log_scale = self.prior_net(xs).chunk(2, -1)
            z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            logits = self.generation_net(torch.cat([z, xs], -1))
            pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=ys)

    def guide(self, xs, ys=None):
        with pyro.plate("data", len(xs)):
            if ys is None:
                loc, log_scale = self.prior_net(xs).chunk(2, -1)
            else:
                loc, log_scale = self.recognition_net(torch.cat([xs, ys], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def make():
    xs = torch.randn(50, 3)
    ys = (xs @ torch.randn(3, 4) + torch.randn(50, 1) * 2 > 0).float()
    cvae = CVAE()

    @torch.no_grad()
    def by_hand():
        unit = torch.linspace(-7, 7, 701)[:, None]
        loc, log_scale = cvae.prior_net(xs).chunk(2, -1)
        z = loc + log_scale.exp() * unit[:, None]  # (points, N, 1)
        logits = cvae.generation_net(torch.cat([z, xs.expand(len(z), -1, -1)], -1))
        likelihood = dist.Bernoulli(logits=logits).log_prob(ys).sum(-1)
        return (normal(unit, 0.0, 1.0) + likelihood).logsumexp(0) + (unit[1] - unit[0]).log()

    return Program(cvae.model, cvae.guide, (xs, ys), how="quadrature", by_hand=by_hand)
