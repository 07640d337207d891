"""Bernoulli variables whose logits are shared by many data, as where states are enumerated."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.utils import broadcast_all
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

__all__ = ["SharedBernoulli"]


class SharedBernoulli(dist.Bernoulli):
    r"""Pyro's Bernoulli, with the logarithms taken of its logits as they were before they were expanded.

    .. math:: \log p(x) = x \log \sigma(l) + (1 - x) \log \sigma(-l)

    Of S states and N data, logits ``(S, 1, D)`` have S D logarithms, where torch's takes S N D. Gradients are those of
    the logits that it was made with; ``logits`` of an expanded one has none.

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
        if self._validate_args:
            self._validate_sample(value)
        log_p = self._log_mass(value)
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))

    def joint_log_prob(self, value: Tensor, num_dims: int) -> Tensor:
        r"""The log-mass of all variables of the last ``num_dims`` dimensions together, of the shape of the others.

        Where logits are those of states alone and values those of data alone, or the other way round, it is two matrix
        products, :math:`X \log\sigma(L)^\top + (1 - X) \log\sigma(-L)^\top`, without a number for each of S N D. They
        are in float64, which neither autocast nor TF32 makes less of.
        """
        if self._validate_args:
            self._validate_sample(value)
        logits = self._logits
        event = self.batch_shape[len(self.batch_shape) - num_dims :]
        shape = torch.broadcast_shapes(logits.shape, value.shape, event)
        batch = shape[: len(shape) - num_dims]
        of_logits, of_values = (_varying(tensor, event, len(batch)) for tensor in (logits, value))
        apart = of_logits and of_values and not of_logits & of_values
        if not apart or 0 in shape or value.dtype != logits.dtype:
            log_p = self._log_mass(value)
            if num_dims:
                log_p = log_p.expand(torch.broadcast_shapes(log_p.shape, event)).sum(tuple(range(-num_dims, 0)))
        else:
            x, of = (tensor.double().reshape(-1, event.numel()) for tensor in (value, logits))
            log_p = (x @ logsigmoid(of).T + (1 - x) @ logsigmoid(-of).T).to(logits.dtype)
            order = sorted(of_values) + sorted(of_logits)
            log_p = log_p.reshape([batch[dim] for dim in order]).permute([order.index(dim) for dim in sorted(order)])
            log_p = log_p.reshape(batch)
        return log_p.expand(torch.broadcast_shapes(batch, self.batch_shape[: len(self.batch_shape) - num_dims]))

    def _log_mass(self, value: Tensor) -> Tensor:
        """Of each variable, of the shape of value and logits before they were expanded."""
        logits = self._logits
        shape = torch.broadcast_shapes(logits.shape, value.shape)
        if shape == logits.shape or value.dtype != logits.dtype:
            logits, value = broadcast_all(logits, value)
            return -binary_cross_entropy_with_logits(logits, value, reduction="none")
        return torch.lerp(logsigmoid(-logits), logsigmoid(logits), value)


def _varying(tensor: Tensor, event: torch.Size, batch_dims: int) -> set[int]:
    """Along which batch dimensions there is more than one event; none if its own are not whole.

    Dimensions are counted from the left of ``batch_dims``.
    """
    batch = tensor.shape[: tensor.dim() - len(event)]
    if tensor.shape[len(batch) :] != event:
        return set()
    return {batch_dims - len(batch) + dim for dim, size in enumerate(batch) if size > 1}
