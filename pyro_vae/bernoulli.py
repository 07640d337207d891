"""Bernoulli variables whose logits are shared by many data, as where states are enumerated."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["SharedBernoulli"]


class SharedBernoulli(dist.Bernoulli):
    r"""Pyro's Bernoulli, with the logarithms taken of its logits as they were before they were expanded.

    .. math:: \log p(x) = x \log \sigma(l) + (1 - x) \log \sigma(-l)

    Of S states and N data, logits ``(S, 1, D)`` have S D logarithms, where torch's takes S N D.

    >>> x = torch.tensor([[0.0], [1.0]])
    >>> SharedBernoulli(logits=torch.tensor([[[1.0]], [[-2.0]]])).expand([2, 2, 1]).log_prob(x)[..., 0]
    tensor([[-1.3133, -0.3133],
            [-0.1269, -2.1269]])
    """

    _before_expansion: Tensor | None = None

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same for a larger batch."""
        new = super().expand(batch_shape, _instance)
        new._before_expansion = self._logits
        return new

    @property
    def _logits(self) -> Tensor:
        return self.logits if self._before_expansion is None else self._before_expansion

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-mass, of the shape of batch and value."""
        logits = self._logits
        shape = torch.broadcast_shapes(logits.shape, value.shape)
        if shape == logits.shape or value.dtype != logits.dtype:
            return super().log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        log_p = torch.lerp(logsigmoid(-logits), logsigmoid(logits), value)
        return log_p.expand(torch.broadcast_shapes(shape, self.batch_shape))
