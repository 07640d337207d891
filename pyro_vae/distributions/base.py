"""The base class of our distributions: their parameters expand with the batch."""

from copy import copy
from typing import Any, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

__all__ = ["Parametric"]


class Parametric(TorchDistribution):
    """A distribution whose tensor attributes are parameters of shape ``(*batch, ...)``."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        new, batch = copy(self), torch.Size(batch_shape)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(new, name, value.expand(batch + value.shape[len(self.batch_shape) :]))
        new._batch_shape = batch
        return new
