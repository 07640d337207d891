"""The aggregate posterior q(z), the mixture of q(z | x_n) over the data, and its log-densities at draws of z."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.distributions.properties import without_independent
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.exact.model_density import Values

__all__ = ["AggregatePosterior", "LogDensities"]

_BUDGET = 2**21  # numbers in the largest tensor of one chunk


class LogDensities(NamedTuple):
    """Log-densities at K draws of the latents of each datum, or their expectations, ``(K, N)`` each.

    ``log_aggregate`` is log q(z), the mixture over all data; ``log_others`` is the mixture without the datum itself.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_q: Tensor
    log_aggregate: Tensor
    log_others: Tensor


class AggregatePosterior:
    """The mixture of q(z | x_n) over the N data of a model and a guide."""

    def __init__(self, q: GuideDensity):
        self.p, self.q, self.num_data = q.p, q, q.p.num_data
        self.factors = q.factors()  # computed once, if no latent site depends on another
        width = sum(site["fn"].event_shape.numel() for site in q.sites.values())
        self.chunk = max(1, _BUDGET // (self.num_data * max(16, width)))

    def at_draws(self, values: Values) -> tuple[Tensor, dict[str, Tensor]]:
        """Evaluate q at draws ``(K, N, *event)``, row n from q(z | x_n).

        Return log q(z | x_n), log q(z), and log q(z) without datum n, stacked, ``(3, K, N)``; and for each site the
        mutual information of each variable and n, summed over draws, ``(V,)``.
        """
        count = len(next(iter(values.values())))
        flat = {name: value.flatten(0, 1)[:, None] for name, value in values.items()}
        owners = torch.arange(self.num_data, device=self.p.data[0].device).repeat(count)
        parts: list[Tensor] = []
        information: dict[str, Tensor] = {}
        for first in range(0, len(owners), self.chunk):
            owner = owners[first : first + self.chunk, None]
            log_q, by_variable = self._log_q({name: value[first : first + self.chunk] for name, value in flat.items()})
            own = log_q.gather(1, owner)
            others = log_q.scatter(1, owner, -math.inf).logsumexp(1, keepdim=True)
            parts.append(torch.cat([own, torch.logaddexp(own, others), others], dim=1))
            for name, each in by_variable.items():
                own_each = each.gather(1, owner[..., None].expand(-1, -1, each.shape[-1]))[:, 0]
                gain = (own_each - each.logsumexp(1) + math.log(self.num_data)).sum(0, dtype=log_q.dtype)
                information[name] = information.get(name, torch.zeros_like(gain)) + gain
        own, aggregate, others = torch.cat(parts).T.unflatten(1, (count, self.num_data))
        aggregate, others = aggregate - math.log(self.num_data), others - math.log(self.num_data - 1)
        return torch.stack([own, aggregate, others]), information

    def over_states(self) -> tuple[LogDensities, dict[str, Tensor], dict[str, Tensor]]:
        """Sum over all states of discrete latents, for exact expectations ``(1, N)`` in place of draws.

        Return the log-densities, the information of each variable, and the rate of each site, ``(1, N)``.
        """
        total = torch.stack([self.p.zeros()] * 5)
        information: dict[str, Tensor] = {}
        rates = {name: self.p.zeros() for name in self.q.sites}
        for values in self.p.states():
            log_q, by_variable = self._log_q(values)
            log_sum = log_q.logsumexp(1, keepdim=True).expand_as(log_q)
            others = log_sum + torch.log1p(-(log_q - log_sum).exp().clamp(max=1))
            log_probs, of_guide = self.p.log_probs(values), self.q.runs(values, self.p.data, self.num_data)
            likelihood, prior = (part.expand_as(log_q) for part in self.model_terms(log_probs))
            aggregate, others = log_sum - math.log(self.num_data), others - math.log(self.num_data - 1)
            weight = log_q.exp()
            terms = torch.stack([likelihood, prior, log_q, aggregate, others])
            total = total + torch.where(weight > 0, weight * terms, 0.0).sum(1)
            for name in rates:
                gain = of_guide.each(name, len(log_q)).double() - log_probs[name].double()
                rates[name] = rates[name] + torch.where(weight > 0, weight * gain, 0.0).sum(0)
            for name, each in by_variable.items():
                gain = each - each.logsumexp(1, keepdim=True) + math.log(self.num_data)
                gain = torch.where(weight[..., None] > 0, weight[..., None] * gain, 0.0).sum(0).mean(0)
                information[name] = information.get(name, torch.zeros_like(gain)) + gain
        return LogDensities(*total[:, None]), information, {name: rate[None] for name, rate in rates.items()}

    def model_terms(self, log_probs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute log p(x | z) and log p(z) from the log-densities of the sites of the model."""
        likelihood, prior = self.p.zeros(), self.p.zeros()
        for name, log_prob in log_probs.items():
            if name in self.p.latents:
                prior = prior + log_prob.double()
            else:
                likelihood = likelihood + log_prob.double()
        return likelihood, prior

    def _log_q(self, values: Values) -> tuple[Tensor, dict[str, Tensor]]:
        """log q(z | x_n) for every n at values ``(C, 1, *event)``, ``(C, N)``, and of each variable, ``(C, N, V)``."""
        shape = (len(next(iter(values.values()))), self.num_data)
        if self.factors is None:
            wide = {name: value.expand(*shape, *value.shape[2:]) for name, value in values.items()}
            return self.q.log_prob(wide).double().expand(shape), {}
        total, by_variable = self.p.zeros().expand(shape), {}
        for name, fn in self.factors.items():
            each = without_independent(fn).log_prob(values[name])
            each = each.expand(*shape, *each.shape[2:]).flatten(2) if each.dim() > 2 else each.expand(shape)[..., None]
            total = total + each.sum(-1, dtype=total.dtype)
            by_variable[name] = each
        return total, by_variable
