"""A deep Markov model (Krishnan et al. 2017) on ragged sequences, with a guide that reads them backwards."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn

from programs.by_hand import normal
from programs.program import Program


class DMM(nn.Module):
    def __init__(self, notes=5, z_dim=1, hidden=8):
        super().__init__()
        self.transition = nn.Sequential(nn.Linear(z_dim, hidden), nn.Tanh(), nn.Linear(hidden, z_dim))
        self.emitter = nn.Sequential(nn.Linear(z_dim, hidden), nn.Tanh(), nn.Linear(hidden, notes))
        self.log_scale = nn.Parameter(torch.zeros(z_dim))
        self.rnn = nn.GRU(notes, hidden, batch_first=True)
        self.combiner = nn.Linear(z_dim + hidden, 2 * z_dim)
        self.z_0 = nn.Parameter(torch.zeros(z_dim))

    def model(self, sequences, lengths):
        pyro.module("dmm", self)
        z = self.z_0.expand(len(sequences), -1)
        with pyro.plate("z_minibatch", len(sequences)):
            for t in pyro.markov(range(sequences.shape[1])):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t + 1}", dist.Normal(self.transition(z), self.log_scale.exp()).to_event(1))
                    notes = dist.Bernoulli(logits=self.emitter(z)).to_event(1)
                    pyro.sample(f"obs_x_{t + 1}", notes, obs=sequences[:, t])

    def guide(self, sequences, lengths):
        pyro.module("dmm", self)
        hidden = self.rnn(sequences.flip(1))[0].flip(1)
        z = self.z_0.expand(len(sequences), -1)
        with pyro.plate("z_minibatch", len(sequences)):
            for t in pyro.markov(range(sequences.shape[1])):
                with poutine.mask(mask=t < lengths):
                    loc, log_scale = self.combiner(torch.cat([z, hidden[:, t]], -1)).chunk(2, -1)
                    z = pyro.sample(f"z_{t + 1}", dist.Normal(loc, log_scale.exp()).to_event(1))


def make():
    lengths = torch.randint(2, 7, (20,))
    lengths[0] = 6
    state = torch.randn(20, 6, 1).cumsum(1)
    sequences = (state * torch.randn(5) + torch.randn(20, 6, 5) > 0).float()
    sequences = sequences * (torch.arange(6) < lengths[:, None])[..., None]
    dmm = DMM()

    @torch.no_grad()
    def by_hand():
        z, scale = torch.linspace(-8, 8, 641)[:, None], dmm.log_scale.exp()
        step = (z[1] - z[0]).log()
        emission = dist.Bernoulli(logits=dmm.emitter(z)[:, None, None]).log_prob(sequences).sum(-1)  # (points, N, T)
        start = normal(z[:, 0], dmm.transition(dmm.z_0), scale)
        kernel = normal(z[:, 0], dmm.transition(z), scale)  # from, to
        alpha = start[:, None] + emission[:, :, 0]
        for t in range(1, 6):
            moved = (alpha[:, None, :] + kernel[:, :, None]).logsumexp(0) + step + emission[:, :, t]
            alpha = torch.where(t < lengths, moved, alpha)
        return alpha.logsumexp(0) + step

    return Program(dmm.model, dmm.guide, (sequences, lengths), how="filter on a grid", by_hand=by_hand)
