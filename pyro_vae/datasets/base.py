"""The type that all data sets have: observations and their labels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae._utils.display import Result, Table, count_of

__all__ = ["Dataset", "on_default_device"]


@dataclass(frozen=True, repr=False)
class Dataset(Result):
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

    def _line(self) -> str:
        shape, kinds = tuple(self.x.shape[1:]), len(self.labels.unique())
        data = f"{count_of(len(self), 'datum', 'data')} of shape {shape}"
        return f"{data}, {str(self.x.dtype).removeprefix('torch.')}, {count_of(kinds, 'label')}"

    def _table(self) -> Table:
        x = self.x.detach()
        missing = x.isnan().double().mean().item() if x.is_floating_point() else 0.0
        finite = x[x.isfinite()]
        labels, counts = self.labels.unique(return_counts=True)
        shown = [f"{label}: {count:,}" for label, count in zip(labels.tolist(), counts.tolist(), strict=True)]
        rows = [
            ("data", f"{len(self):,}"),
            ("shape of a datum", tuple(x.shape[1:])),
            ("dtype and device", f"{str(x.dtype).removeprefix('torch.')}, {x.device}"),
            ("values", f"{finite.min().item():.4g} to {finite.max().item():.4g}" if len(finite) else "none"),
            *([("missing", f"{missing:.1%}")] if missing else []),
            ("data of each label", ", ".join(shown)),
        ]
        return Table(("property", "value"), rows)


def on_default_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors on torch's default device, as its functions that make tensors do."""
    device = torch.get_default_device()
    return tuple(tensor.to(device) for tensor in tensors)
