"""Baselines of the score function: they are subtracted from the learning signal of each datum to reduce its variance.

A baseline is a module with two methods. ``forward(x) -> (B,)`` predicts f before the draws, and must not depend on
them. ``learn(f, b) -> (B,)`` receives the ``(K, B)`` values of f and returns a loss of each datum, which is minimized.
"""

import torch
from torch import Tensor, nn

from pyro_vae._utils.validation import positive_int
from pyro_vae.parts.networks import NetworkFactory, build

__all__ = ["NeuralBaseline", "RunningAverage"]


class RunningAverage(nn.Module):
    r"""The average of f over earlier steps, :math:`b \leftarrow \beta b + (1 - \beta)\,\bar f`.

    Args:
        decay: :math:`\beta`, at least 0 and below 1.

    Source: Mnih and Gregor 2014, "Neural variational inference and learning in belief networks", section 2.3.

    >>> RunningAverage(decay=0.9)
    RunningAverage(decay=0.9)
    """

    average: Tensor
    steps: Tensor

    def __init__(self, decay: float = 0.9):
        super().__init__()
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise ValueError(f"`decay` must be a number from 0 to below 1, got {decay!r}")
        self.decay = decay
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the average so far, corrected for its start at zero; 0 before the first step."""
        return torch.where(self.steps > 0, self.average / (1 - self.decay**self.steps).clamp(min=1e-12), 0.0)

    def learn(self, f: Tensor, b: Tensor) -> Tensor:
        """Update the average with the values of this step. The loss is 0: there is nothing to train."""
        with torch.no_grad():
            self.average.mul_(self.decay).add_((1 - self.decay) * f.mean().to(self.average))
            self.steps.add_(1)
        return torch.zeros_like(b)

    def extra_repr(self) -> str:
        return f"decay={self.decay}"


class NeuralBaseline(nn.Module):
    r"""A network's prediction of f from x, added to a running average and trained by least squares (NVIL).

    Args:
        in_features: number of features of x.
        network: factory, see :mod:`pyro_vae.parts.networks`.
        decay: of the running average.

    NVIL also divides the signal by its running standard deviation. Here it does not: Adam has a similar effect.

    Source: Mnih and Gregor 2014, sections 2.3 and 2.4.

    >>> from pyro_vae import networks
    >>> NeuralBaseline(4, networks.mlp([8]))(torch.zeros(3, 4)).shape
    torch.Size([3])
    """

    def __init__(self, in_features: int, network: NetworkFactory, decay: float = 0.9):
        super().__init__()
        self.in_features = positive_int(in_features, "in_features")
        self.network = build(network, in_features, 1)
        self.centre = RunningAverage(decay)

    def forward(self, x: Tensor) -> Tensor:
        dtype = next((parameter.dtype for parameter in self.network.parameters()), x.dtype)
        try:
            return self.network(x.to(dtype)).squeeze(-1) + self.centre(x)
        except RuntimeError as error:
            must = f"have a network for the {x.shape[-1]} features of the first observed site"
            got = f"one for {self.in_features} features"
            raise ValueError(f"`baseline` must {must}, got {got}: {error}") from error

    def learn(self, f: Tensor, b: Tensor) -> Tensor:
        self.centre.learn(f, b)
        return ((f - b) ** 2).mean(0)
