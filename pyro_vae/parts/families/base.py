"""The base class of families: the shape of the event, the raw outputs, and positive quantities of four kinds."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae._utils.typing import Shape
from pyro_vae._utils.validation import as_shape, describe, positive
from pyro_vae.distributions import tabular

__all__ = ["KINDS", "Family"]

KINDS = ("network", "shared", "per_dimension")


class Family(nn.Module):
    """A map from raw outputs ``(*, num_raw)`` to a distribution of batch shape ``(*)`` and event shape ``event_shape``.

    Subclasses define ``forward(raw)``, and set ``num_raw`` where it is not one of each variable.
    """

    _options: tuple[str, ...] = ()  # attributes that ``repr`` shows
    fitting_guide: str | None = None
    """The name of a guide of the same support, for the error when another one does not fit."""

    def __init__(self, event_shape: Shape):
        super().__init__()
        self.event_shape = as_shape(event_shape, "event_shape")
        self.num_raw = self.event_shape.numel()

    def __call__(self, raw: Tensor) -> dist.TorchDistribution:
        """The distribution. The number of raw outputs is checked: surplus ones would be ignored silently."""
        if not isinstance(raw, Tensor) or raw.shape[-1:] != (self.num_raw,):
            raise ValueError(f"`raw` must be (*, {self.num_raw}), the raw outputs of {self}, got {describe(raw)}")
        return super().__call__(raw)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        raise NotImplementedError

    def start(self, *batch: int) -> Tensor:
        """Initial values of free raw outputs, ``(*batch, num_raw)``: zeros by default."""
        return torch.zeros(*batch, self.num_raw)

    def extra_repr(self) -> str:
        options = [f"{name}={getattr(self, name)!r}" for name in self._options]
        return ", ".join([f"event_shape={tuple(self.event_shape)}", *options])

    def _shaped(self, raw: Tensor) -> Tensor:
        return raw.reshape(*raw.shape[:-1], *self.event_shape)

    def _declare(self, name: str, kind: str | float) -> int:
        """Create the parameter or buffer of a positive quantity, and return how many raw outputs it takes."""
        if isinstance(kind, str) and kind not in KINDS:
            raise ValueError(f"`{name}` must be {', '.join(map(repr, KINDS))} or a number, got {kind!r}")
        if not isinstance(kind, str):
            self.register_buffer(f"fixed_{name}", torch.tensor(positive(kind, name)))
        elif kind != "network":
            shape = self.event_shape if kind == "per_dimension" else ()
            self.register_parameter(f"log_{name}", nn.Parameter(torch.zeros(shape)))
        return self.event_shape.numel() if kind == "network" else 0

    def _declared(self, name: str, kind: str | float, raw: Tensor, floor: float) -> Tensor:
        """The quantity: fixed, or the exponential of a raw output or parameter plus a floor."""
        if not isinstance(kind, str):
            return getattr(self, f"fixed_{name}")
        log_value = self._shaped(raw) if kind == "network" else getattr(self, f"log_{name}")
        return tabular.log_of_bounded_exp(log_value).exp() + floor
