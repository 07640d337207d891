"""The aggregate posterior q(z), the mixture of q(z | x_n) over the data, and its log-densities at values of z."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae._utils.ranks import share_of
from pyro_vae.distributions.properties import without_independent
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.exact.model_density import Values

__all__ = ["AggregatePosterior", "log_densities"]

_BUDGET = 2**21  # numbers in the largest tensor of one chunk


class AggregatePosterior:
    """The mixture of q(z | x_n) over N data at R values of the latents.

    It is summed over batches of the data by :meth:`add`, for all values, or for parts of them, which are then joined.

    Args:
        values: of each latent, ``(R, 1, *event)`` by site.
        owners: for each of them the number of the datum of which it is a draw, ``(R,)``; ``None`` for states.
        num_data: N.
    """

    def __init__(self, values: Values, owners: Tensor | None, num_data: int):
        self._values, self._owners, self.num_data = values, owners, num_data
        first = next(iter(values.values()))
        self._sum_of_others = torch.full(first.shape[:1], -math.inf, dtype=torch.float64, device=first.device)
        self._own = self._sum_of_others.clone()
        self._by_variable: dict[str, tuple[Tensor, Tensor]] = {}  # the sum over all data, and that of the owner

    def add(self, q: GuideDensity, first_row: int) -> None:
        """Add a batch of the data, of which ``first_row`` is the number of the first one."""
        factors, count = q.factors(), len(self._own)
        width = sum(site["fn"].event_shape.numel() for site in q.sites.values())
        chunk = max(1, _BUDGET // (q.p.num_data * max(16, width)))
        for first in range(0, count, chunk):
            part = slice(first, first + chunk)
            log_q, by_variable = log_densities(q, factors, {name: value[part] for name, value in self._values.items()})
            owner, inside = self._owners_in(part, first_row, q.p.num_data)
            found = log_q.gather(1, owner[:, None])
            self._own[part] = torch.where(inside, found[:, 0], self._own[part])
            others = log_q.scatter(1, owner[:, None], found.masked_fill(inside[:, None], -math.inf)).logsumexp(1)
            self._sum_of_others[part] = torch.logaddexp(self._sum_of_others[part], others)
            for name, each in by_variable.items():
                if name not in self._by_variable:
                    nothing = each.new_full((count, each.shape[-1]), -math.inf)
                    self._by_variable[name] = nothing, nothing.clone()
                total, own = self._by_variable[name]
                total[part] = torch.logaddexp(total[part], each.logsumexp(1))
                found = each.gather(1, owner[:, None, None].expand(-1, -1, each.shape[-1]))[:, 0]
                own[part] = torch.where(inside[:, None], found, own[part])

    def parts(self, count: int) -> "list[AggregatePosterior]":
        """Split the values, before any data are added, into at most ``count`` parts."""
        found, total = [], len(self._own)
        for number in range(min(count, total)):
            part = share_of(total, number, min(count, total))
            owners = None if self._owners is None else self._owners[part]
            values = {name: value[part] for name, value in self._values.items()}
            found.append(AggregatePosterior(values, owners, self.num_data))
        return found

    def sums(self) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Return the sums so far, for :meth:`join`."""
        return self._own, self._sum_of_others, self._by_variable

    def join(self, sums: "Sequence[tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]]") -> None:
        """Set the sums to those of all parts."""
        self._own, self._sum_of_others = (torch.cat(list(of)) for of in zip(*(each[:2] for each in sums), strict=True))
        for name in sums[0][2]:
            total, own = (torch.cat(list(of)) for of in zip(*(each[2][name] for each in sums), strict=True))
            self._by_variable[name] = total, own

    def _owners_in(self, part: slice, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
        """The place of each owner in a batch, any if it is not in it, and whether it is."""
        if self._owners is None:
            owner = torch.full_like(self._own[part], -1, dtype=torch.long)
        else:
            owner = self._owners[part] - first_row
        return owner.clamp(0, num_rows - 1), (owner >= 0) & (owner < num_rows)

    @property
    def log_q(self) -> Tensor:
        """log q(z | x_n) of the owners, ``(R,)``."""
        return self._own

    @property
    def log_sum(self) -> Tensor:
        """The logarithm of the sum of all q(z | x_n), ``(R,)``."""
        return torch.logaddexp(self._own, self._sum_of_others)

    @property
    def log_aggregate(self) -> Tensor:
        """log q(z), ``(R,)``."""
        return self.log_sum - math.log(self.num_data)

    @property
    def log_others(self) -> Tensor:
        """The logarithm of the mixture without the owner, ``(R,)``."""
        return self._sum_of_others - math.log(self.num_data - 1)

    def log_aggregate_of(self, name: str) -> Tensor:
        """log q(z_d) of each variable d of a site, ``(R, V)``."""
        return self._by_variable[name][0] - math.log(self.num_data)

    def information(self) -> dict[str, Tensor]:
        """The mutual information of each variable and n, the mean over the values, ``(V,)`` by site."""
        return {
            name: (own - total + math.log(self.num_data)).mean(0, dtype=self._own.dtype)
            for name, (total, own) in self._by_variable.items()
        }


def log_densities(q: GuideDensity, factors: dict[str, Any] | None, values: Values) -> tuple[Tensor, dict[str, Tensor]]:
    """log q(z | x_n) for every n at values ``(C, 1, *event)``, ``(C, N)``, and of each variable, ``(C, N, V)``.

    ``factors`` are those of q, computed once. Where some latent depends on another, variables have no density alone.
    """
    shape = (len(next(iter(values.values()))), q.p.num_data)
    # Not every distribution takes values of a narrower batch than its own: Pyro's conditional flows do not.
    wide = {name: value.expand(*shape, *value.shape[2:]) for name, value in values.items()}
    if factors is None:
        return q.log_prob(wide).double().expand(shape), {}
    total, by_variable = q.p.zeros().expand(shape), {}
    for name, fn in factors.items():
        each = without_independent(fn).log_prob(wide[name])
        each = each.flatten(2) if each.dim() > 2 else each[..., None]
        total = total + each.sum(-1, dtype=total.dtype)
        by_variable[name] = each
    return total, by_variable
