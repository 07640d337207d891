"""Relaxed families: continuous variables with a temperature in place of discrete ones."""

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_vae import distributions
from pyro_vae._utils.typing import Shape
from pyro_vae._utils.validation import positive
from pyro_vae.parts.families.base import Family
from pyro_vae.parts.families.discrete import Bernoulli, OneHot, OneHotCategorical

__all__ = ["Relaxed", "RelaxedBernoulli", "RelaxedOneHotCategorical"]


class Relaxed(Family):
    """Families with a temperature, in a 0-dim buffer that a schedule or a checkpoint can change."""

    temperature: Tensor

    def __init__(self, event_shape: Shape, temperature: float):
        super().__init__(event_shape)
        self.register_buffer("temperature", torch.tensor(positive(temperature, "temperature")))

    def soft(self, value: Tensor) -> Tensor:
        """The relaxed variable at a value of its site."""
        raise NotImplementedError

    def hard(self, value: Tensor) -> Tensor:
        """The discrete variable at a value of the site. It has the law of the discrete twin."""
        raise NotImplementedError

    def discrete(self) -> Family:
        """The family of the discrete twin. It takes the same raw outputs."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature.item():.4g}"


class RelaxedBernoulli(Relaxed):
    r"""Independent relaxed Bernoulli variables, each as its logit :math:`y`.

    >>> family = RelaxedBernoulli(1, temperature=0.5)
    >>> family.soft(torch.tensor([-1.0])), family.hard(torch.tensor([-1.0]))
    (tensor([0.2689]), tensor([0.]))
    """

    fitting_guide = "RelaxedBernoulli"

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        relaxed = distributions.LogitRelaxedBernoulli(self.temperature, logits=self._shaped(raw))
        return relaxed.to_event(len(self.event_shape))

    def soft(self, value: Tensor) -> Tensor:
        return value.sigmoid()

    def hard(self, value: Tensor) -> Tensor:
        return (value > 0).to(value.dtype)

    def discrete(self) -> Bernoulli:
        return Bernoulli(self.event_shape)


class RelaxedOneHotCategorical(Relaxed, OneHot):
    """Independent Gumbel-softmax variables, each as its logarithm on the log-simplex.

    >>> family = RelaxedOneHotCategorical((1, 3), temperature=0.5)
    >>> family.hard(torch.tensor([[0.2, 0.7, 0.1]]).log())
    tensor([[0., 1., 0.]])
    """

    fitting_guide = "GumbelSoftmax"

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return distributions.LogRelaxedOneHotCategorical(self.temperature, logits=self._shaped(raw)).to_event(1)

    def soft(self, value: Tensor) -> Tensor:
        return value.exp()

    def hard(self, value: Tensor) -> Tensor:
        return one_hot(value.argmax(-1), value.shape[-1]).to(value.dtype)

    def discrete(self) -> OneHotCategorical:
        return OneHotCategorical(self.event_shape)
