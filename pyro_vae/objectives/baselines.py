"""Baselines of the score function: what is taken off the learning signal of each datum to make it quieter.

A baseline is a module with ``forward(x) -> (B,)``, its guess of f before it is drawn, and ``learn(f, b) -> (B,)``,
which is told the ``(K, B)`` values that came and says what it wants to make small. It must not depend on the draws.
"""

import torch
from torch import Tensor, nn

from pyro_vae._utils.validation import positive_int
from pyro_vae.parts.networks import NetworkFactory, build

__all__ = ["NeuralBaseline", "RunningAverage"]


class RunningAverage(nn.Module):
    r"""A baseline: the average of f over earlier steps, :math:`b \leftarrow \beta b + (1 - \beta)\,\bar f`.

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
        """The average so far, without the bias of its start at zero; 0 at first."""
        return torch.where(self.steps > 0, self.average / (1 - self.decay**self.steps).clamp(min=1e-12), 0.0)

    def learn(self, f: Tensor, b: Tensor) -> Tensor:
        """Take in the values of this step, after b has been used; there is nothing to train."""
        with torch.no_grad():
            self.average.mul_(self.decay).add_((1 - self.decay) * f.mean().to(self.average))
            self.steps.add_(1)
        return torch.zeros_like(b)

    def extra_repr(self) -> str:
        return f"decay={self.decay}"


class NeuralBaseline(nn.Module):
    r"""A baseline: a network's prediction of f from x, on top of a running average, trained by least squares (NVIL).

    Args:
        in_features: number of features of x.
        network: factory, see :mod:`pyro_vae.parts.networks`.
        decay: of the running average.

    The division of the signal by its running standard deviation, which NVIL has too, is left out: it makes the
    gradient that of another objective from step to step, and Adam does the like.

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
            raise ValueError(
                f"baseline: its network takes {self.in_features} features, and a datum has {x.shape[-1]} in the first "
                f"observed site: {error}"
            ) from error

    def learn(self, f: Tensor, b: Tensor) -> Tensor:
        """The squared error of each datum, ``(B,)``, to be made small."""
        self.centre.learn(f, b)
        return ((f - b) ** 2).mean(0)
