"""The aggregate posterior, the mixture of q(z | x) over the data, at draws of its components."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae._utils.traces import log_density
from pyro_vae.distributions.properties import without_independent
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.exact.model_density import ModelDensity, Values

__all__ = ["Aggregate", "Terms"]

_BUDGET = 2**21  # numbers in the largest tensor of one chunk


class Terms(NamedTuple):
    """Log-densities at draws of each datum's latents, or their expectations, ``(K, N)``."""

    log_likelihood: Tensor
    log_prior: Tensor
    log_q: Tensor
    log_mixture: Tensor
    log_others: Tensor


class Aggregate:
    """The aggregate posterior of a guide on the data of a problem."""

    def __init__(self, problem: ModelDensity, q: GuideDensity):
        self.problem = problem
        self.q = q
        self.factors = q.factors()  # computed once, if no latent hangs on another
        width = sum(site["fn"].event_shape.numel() for site in q.sites.values())
        self.chunk = max(1, _BUDGET // (problem.num_data * max(16, width)))

    def _log_q(self, values: Values) -> tuple[Tensor, dict[str, Tensor]]:
        """log q(z | x_n) of every n at values ``(C, 1, *event)``, ``(C, N)``; of each variable too, ``(C, N, V)``."""
        shape = (len(next(iter(values.values()))), self.problem.num_data)
        if self.factors is None:
            wide = {name: value.expand(*shape, *value.shape[2:]) for name, value in values.items()}
            return self.q.log_prob(wide).double().expand(shape), {}
        total, by_variable = self.problem.zeros().expand(shape), {}
        for name, fn in self.factors.items():
            each = without_independent(fn).log_prob(values[name])
            each = each.expand(*shape, *each.shape[2:]).flatten(2) if each.dim() > 2 else each.expand(shape)[..., None]
            total = total + each.sum(-1, dtype=total.dtype)
            by_variable[name] = each
        return total, by_variable

    def at_draws(self, values: Values) -> tuple[Tensor, dict[str, Tensor]]:
        """At draws ``(K, N, *event)``: log q of their own datum, log q(z) with and without it, ``(3, K, N)``.

        And the information of each variable, summed over the draws, ``(V,)``.
        """
        count, num_data = next(iter(values.values())).shape[:2]
        flat = {name: value.flatten(0, 1)[:, None] for name, value in values.items()}
        owners = torch.arange(num_data, device=self.problem.data[0].device).repeat(count)
        parts: list[Tensor] = []
        information: dict[str, Tensor] = {}
        for first in range(0, len(owners), self.chunk):
            owner = owners[first : first + self.chunk, None]
            log_q, by_variable = self._log_q({name: value[first : first + self.chunk] for name, value in flat.items()})
            own = log_q.gather(1, owner)
            others = log_q.scatter(1, owner, -math.inf).logsumexp(1, keepdim=True)
            parts.append(torch.cat([own, torch.logaddexp(own, others), others], dim=1))
            for name, each in by_variable.items():
                mine = each.gather(1, owner[..., None].expand(-1, -1, each.shape[-1]))[:, 0]
                found = (mine - each.logsumexp(1) + math.log(num_data)).sum(0, dtype=log_q.dtype)
                information[name] = information.get(name, torch.zeros_like(found)) + found
        own, all_of_them, others = torch.cat(parts).T.unflatten(1, (count, num_data))
        return torch.stack([own, all_of_them - math.log(num_data), others - math.log(num_data - 1)]), information

    def over_states(self) -> tuple[Terms, dict[str, Tensor]]:
        """The expectations of each datum without error, as ``(1, N)``; and the information of each variable."""
        total = torch.stack([self.problem.zeros()] * 5)
        information: dict[str, Tensor] = {}
        num_data = self.problem.num_data
        for values in self.problem.states():
            log_q, by_variable = self._log_q(values)
            log_sum = log_q.logsumexp(1, keepdim=True).expand_as(log_q)
            without = log_sum + torch.log1p(-(log_q - log_sum).exp().clamp(max=1))
            terms = torch.stack(
                [
                    *(part.expand_as(log_q) for part in self.model_terms(self.problem.sites(values))),
                    log_q,
                    log_sum - math.log(num_data),
                    without - math.log(num_data - 1),
                ]
            )
            weight = log_q.exp()
            total = total + torch.where(weight > 0, weight * terms, 0.0).sum(1)
            for name, each in by_variable.items():
                gain = each - each.logsumexp(1, keepdim=True) + math.log(num_data)
                found = torch.where(weight[..., None] > 0, weight[..., None] * gain, 0.0).sum(0).mean(0)
                information[name] = information.get(name, torch.zeros_like(found)) + found
        return Terms(*total[:, None]), information

    def model_terms(self, sites: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """log p(x | z) and log p(z) apart, from the sites of the model."""
        parts = [self.problem.zeros(), self.problem.zeros()]
        for name, site in sites.items():
            parts[name in self.problem.latents] = parts[name in self.problem.latents] + log_density(site).double()
        return parts[0], parts[1]
