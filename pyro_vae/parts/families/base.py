"""Families: maps from raw, unconstrained outputs to a Pyro distribution, each written once.

A family knows nothing of where its raw outputs come from. :class:`pyro_vae.parts.base.Unconditional` feeds it free
parameters (a prior), :class:`pyro_vae.parts.base.Conditional` a network (a guide, a likelihood, a conditional prior).
"""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae._utils.validation import as_shape, describe, positive
from pyro_vae.distributions import tabular
from pyro_vae.parts import constructor_args

__all__ = ["Family"]

_KINDS = ("network", "shared", "per_dimension")


class Family(constructor_args.Recorded, nn.Module):
    """A map from raw outputs ``(*, num_raw)`` to a distribution of batch shape ``(*)`` and event shape ``event_shape``.

    Subclasses set ``num_raw`` and define ``forward(raw)``.
    """

    num_raw: int
    fitting_guide: str | None = None
    """The class in :mod:`pyro_vae.parts.guides` of the same support, which an error names where another one does not fit."""

    def __init__(self, event_shape: int | Sequence[int]):
        super().__init__()
        self.event_shape = as_shape(event_shape, "event_shape")

    def __call__(self, raw: Tensor) -> dist.TorchDistribution:
        """The distribution; of too many raw outputs some would be left unread, without a word."""
        if not isinstance(raw, Tensor) or raw.shape[-1:] != (self.num_raw,):
            raise ValueError(f"`raw` must be (*, {self.num_raw}), the raw outputs of {self}, got {describe(raw)}")
        return super().__call__(raw)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        raise NotImplementedError

    def start(self, *batch: int) -> Tensor:
        """Raw outputs for free parameters to start from, ``(*batch, num_raw)``: zeros, where those can learn."""
        return torch.zeros(*batch, self.num_raw)

    def extra_repr(self) -> str:
        return f"event_shape={tuple(self.event_shape)}"

    def _shaped(self, raw: Tensor) -> Tensor:
        return raw.reshape(*raw.shape[:-1], *self.event_shape)

    def _declare(self, name: str, kind: str | float) -> int:
        """Make what a positive quantity of this kind is held in; how many raw outputs it takes."""
        if isinstance(kind, str) and kind not in _KINDS:
            raise ValueError(f"`{name}` must be {', '.join(map(repr, _KINDS))} or a number, got {kind!r}")
        if not isinstance(kind, str):
            self.register_buffer(f"fixed_{name}", torch.tensor(positive(kind, name)))
        elif kind != "network":
            shape = self.event_shape if kind == "per_dimension" else ()
            self.register_parameter(f"log_{name}", nn.Parameter(torch.zeros(shape)))
        return self.event_shape.numel() if kind == "network" else 0

    def _declared(self, name: str, kind: str | float, raw: Tensor, floor: float) -> Tensor:
        """Its value: fixed as it is, and otherwise the exponential of a raw output or parameter, above a floor."""
        if not isinstance(kind, str):
            return getattr(self, f"fixed_{name}")
        log_value = self._shaped(raw) if kind == "network" else getattr(self, f"log_{name}")
        return tabular.log_of_bounded_exp(log_value).exp() + floor
