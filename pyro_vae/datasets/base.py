"""A dataset: observations, labels and names."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Dataset"]


@dataclass(frozen=True)
class Dataset:
    """Data ``x`` of N rows and a label for each.

    Attributes:
        x: ``(N, ...)``.
        labels: ``(N,)``, integers.
    """

    x: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.x)
