"""A state space model as one distribution, ``GaussianHMM``: unknown scales of state and observation."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

from programs.by_hand import grid, moments
from programs.program import Program


def model(data):
    state = pyro.sample("state_scale", dist.LogNormal(-1.0, 0.5))
    noise = pyro.sample("noise_scale", dist.LogNormal(-1.0, 0.5))
    eye, zero = torch.eye(1), torch.zeros(1)
    start = dist.Normal(zero, 1.0).to_event(1)
    walk = dist.Normal(zero, state.unsqueeze(-1)).to_event(1)
    emission = dist.Normal(zero, noise.unsqueeze(-1)).to_event(1)
    hmm = dist.GaussianHMM(start, 0.9 * eye, walk.expand([len(data)]), eye, emission, duration=len(data))
    pyro.sample("obs", hmm, obs=data)


def make():
    states = [torch.randn(())]
    for _ in range(20):
        states.append(0.9 * states[-1] + 0.4 * torch.randn(()))
    data = (torch.stack(states[1:]) + 0.4 * torch.randn(20))[:, None]

    def integrate():
        (state, noise), volume = grid(torch.linspace(-3.5, 1.5, 120), torch.linspace(-3.5, 1.5, 120))  # logarithms
        q, r = (2 * state).exp(), (2 * noise).exp()
        mean, variance = torch.zeros_like(q), torch.ones_like(q)
        joint = dist.Normal(-1.0, 0.5).log_prob(state) + dist.Normal(-1.0, 0.5).log_prob(noise)
        for y in data[:, 0]:
            mean, variance = 0.9 * mean, 0.81 * variance + q
            joint = joint + dist.Normal(mean, (variance + r).sqrt()).log_prob(y)
            gain = variance / (variance + r)
            mean, variance = mean + gain * (y - mean), (1 - gain) * variance
        return moments(joint, volume, state_scale=state.exp(), noise_scale=noise.exp())

    return Program(
        model,
        AutoMultivariateNormal(model),
        (data,),
        how="Kalman filter and quadrature",
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
    )
