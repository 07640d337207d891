"""Draws from given noise, which several processes can have in common."""

import pyro.distributions as dist
import torch


class Noise(dist.TorchDistribution):
    """A normal distribution whose draws come from given noise, so that all processes can have the same."""

    has_rsample, support, arg_constraints = True, dist.constraints.real, {}

    def __init__(self, loc, scale, noise):
        self.loc, self.scale, self.noise = *torch.broadcast_tensors(loc, scale), noise
        super().__init__(self.loc.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Noise(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise

    def log_prob(self, value):
        return dist.Normal(self.loc, self.scale).log_prob(value)
