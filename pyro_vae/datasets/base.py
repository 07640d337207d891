"""The type that all data sets have: observations and their labels."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Dataset"]


@dataclass(frozen=True)
class Dataset:
    """N observations with a label for each.

    Attributes:
        x: ``(N, ...)``.
        labels: ``(N,)``, integers.
    """

    x: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def to_data(self) -> Tensor:
        """Return the observations, without labels: what :func:`pyro_vae.fit` and its like take."""
        return self.x
