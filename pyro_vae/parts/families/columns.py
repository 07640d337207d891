"""The family of a table: a family of its own kind for each column."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae import distributions
from pyro_vae.distributions.columns import by_name
from pyro_vae.parts.families.base import Family

__all__ = ["Columns"]


class Columns(Family):
    """Independent columns, each of a family of its own, :class:`pyro_vae.distributions.Columns`.

    The raw outputs are those of the columns, one column after the other. Columns with one family object share its
    parameters, such as the cut points of questions with the same answers.

    Args:
        columns: families of one variable, event shape ``(1,)``, by the name of their column, or in a sequence.

    >>> from pyro_vae import families
    >>> table = Columns({"height": families.Normal(1), "grade": families.Categorical(1, 3)})
    >>> table.num_raw, table(torch.zeros(7, 5)).mean[0]
    (5, tensor([0., 1.]))
    """

    def __init__(self, columns: Mapping[str, Family] | Sequence[Family]):
        kind = "a family of one variable, of event shape (1,), such as families.Normal(1)"
        found = by_name(columns, kind, _is_single)
        super().__init__(len(found))
        self.names = tuple(found)
        self.families = nn.ModuleList(found.values())
        self.num_raw = sum(family.num_raw for family in found.values())

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        families = self._families()
        parts = raw.split([family.num_raw for family in families], -1)
        made = [family(part) for family, part in zip(families, parts, strict=True)]
        return distributions.Columns(dict(zip(self.names, made, strict=True)))

    def start(self, *batch: int) -> Tensor:
        return torch.cat([family.start(*batch) for family in self._families()], -1)

    def _families(self) -> list[Family]:
        return cast(list[Family], list(self.families))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, columns={list(self.names)}"


def _is_single(column: Any) -> bool:
    return isinstance(column, Family) and column.event_shape == (1,)
