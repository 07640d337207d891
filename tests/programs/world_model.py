"""A world model: a latent state that actions move, seen as images, with a guide that reads the images that follow."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from programs.by_hand import normal
from programs.program import Program

STEPS = 5


class World(nn.Module):
    def __init__(self, pixels=6, hidden=8):
        super().__init__()
        self.push = nn.Parameter(torch.tensor(0.5))
        self.log_noise = nn.Parameter(torch.tensor(-0.7))
        self.decoder = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, pixels))
        self.encoder = nn.GRU(pixels + 1, hidden, batch_first=True)
        self.combiner = nn.Linear(hidden + 1, 2)

    def move(self, state, action):
        return dist.Normal(0.9 * torch.sin(state) + self.push * action, self.log_noise.exp())

    def model(self, images, actions):
        pyro.module("world", self)
        with pyro.plate("sequences", len(images)):
            state = torch.zeros(len(images))
            for t in pyro.markov(range(STEPS)):
                state = pyro.sample(f"state_{t}", self.move(state, actions[:, t]))
                pixels = dist.Bernoulli(logits=self.decoder(state[..., None])).to_event(1)
                pyro.sample(f"image_{t}", pixels, obs=images[:, t])

    def guide(self, images, actions):
        pyro.module("world", self)
        future = self.encoder(torch.cat([images, actions[..., None]], -1).flip(1))[0].flip(1)
        with pyro.plate("sequences", len(images)):
            state = torch.zeros(len(images))
            for t in pyro.markov(range(STEPS)):
                expected = self.move(state, actions[:, t]).mean
                context = [future[:, t].expand(*expected.shape, -1), expected[..., None]]
                change, log_scale = self.combiner(torch.cat(context, -1)).unbind(-1)
                state = pyro.sample(f"state_{t}", dist.Normal(expected + change, log_scale.exp()))


def make():
    actions = torch.randn(20, STEPS)
    state, images, weights = torch.zeros(20), [], 2 * torch.randn(6)
    for t in range(STEPS):
        state = 0.9 * state.sin() + 0.8 * actions[:, t] + 0.4 * torch.randn(20)
        images.append((state[:, None] * weights + torch.randn(20, 6) > 0).float())
    images = torch.stack(images, 1)
    world = World()

    @torch.no_grad()
    def smoothed():
        """A filter forwards and one backwards, on a grid of states; actions differ between sequences."""
        z = torch.linspace(-6, 6, 301)
        step = (z[1] - z[0]).log()
        emission = dist.Bernoulli(logits=world.decoder(z[:, None])[:, None, None]).log_prob(images).sum(-1)  # (K, N, T)
        loc = 0.9 * z.sin()[:, None] + world.push * actions.T[:, None]  # (T, K, N), from the state before
        noise = world.log_noise.exp()
        kernels = [normal(z[:, None], mean[:, None], noise) for mean in loc]  # (from, to, N)
        alpha = [normal(z[:, None], world.push * actions[:, 0], noise) + emission[..., 0]]
        for t in range(1, STEPS):
            alpha.append((alpha[-1][:, None] + kernels[t]).logsumexp(0) + step + emission[..., t])
        beta = [torch.zeros_like(alpha[0])]
        for t in range(STEPS - 1, 0, -1):
            beta.insert(0, (kernels[t] + (beta[0] + emission[..., t])[None]).logsumexp(1) + step)
        joint = torch.stack(alpha) + torch.stack(beta)
        return alpha[-1].logsumexp(0) + step, torch.einsum("k,tkn->tn", z, joint.softmax(1))

    def means():
        return {f"state_{t}": mean for t, mean in enumerate(smoothed()[1])}

    return Program(
        world.model,
        world.guide,
        (images, actions),
        how="filter on a grid",
        by_hand=lambda: smoothed()[0],
        means=means,
    )
