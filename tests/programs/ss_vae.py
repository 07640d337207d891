"""A semi-supervised VAE (Kingma et al. 2014, M2): the class is enumerated in the guide where it is not observed."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import nn

from programs.by_hand import normal
from programs.program import Program


class SSVAE(nn.Module):
    def __init__(self, features=4, classes=3, hidden=16):
        super().__init__()
        self.classes = classes
        self.classifier = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, classes))
        self.encoder = nn.Sequential(nn.Linear(features + classes, hidden), nn.Tanh(), nn.Linear(hidden, 2))
        self.decoder = nn.Sequential(nn.Linear(1 + classes, hidden), nn.Tanh(), nn.Linear(hidden, features))

    def join(self, a, b):
        shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
        return torch.cat([a.expand(*shape, -1), b.expand(*shape, -1)], -1)

    def model(self, xs, ys=None):
        pyro.module("ss_vae", self)
        with pyro.plate("images", len(xs)):
            zs = pyro.sample("z", dist.Normal(xs.new_zeros(1), 1.0).to_event(1))
            ys = pyro.sample("y", dist.OneHotCategorical(xs.new_ones(self.classes) / self.classes), obs=ys)
            pyro.sample("x", dist.Normal(self.decoder(self.join(zs, ys)), 0.5).to_event(1), obs=xs)

    def guide(self, xs, ys=None):
        with pyro.plate("images", len(xs)):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(logits=self.classifier(xs)))
            loc, log_scale = self.encoder(self.join(xs, ys)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def make():
    labels = torch.randint(3, (50,))
    x = (
        torch.randn(3, 4)[labels] * 2
        + torch.randn(50, 1) * torch.tensor([1.0, -1.0, 0.5, 0.0])
        + 0.3 * torch.randn(50, 4)
    )
    ss_vae = SSVAE()

    @torch.no_grad()
    def by_hand():
        z = torch.linspace(-7, 7, 701)
        terms = []
        for y in torch.eye(3):
            loc = ss_vae.decoder(torch.cat([z[:, None], y.expand(len(z), 3)], -1))
            terms.append(normal(z, 0.0, 1.0)[:, None] + normal(x, loc[:, None], 0.5).sum(-1) - torch.tensor(3.0).log())
        return torch.cat(terms).logsumexp(0) + (z[1] - z[0]).log()

    return Program(
        ss_vae.model,
        config_enumerate(ss_vae.guide),
        (x,),
        elbo=TraceEnum_ELBO(max_plate_nesting=1),
        how="quadrature",
        by_hand=by_hand,
    )
