"""Estimates of log p(x) where there is no exact answer: importance sampling with the guide as the proposal."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.checks import positive_int
from pyro_vae.joint_density import Guide, Problem, drawn
from pyro_vae.minibatches import is_amortized
from pyro_vae.randomness import seeded

__all__ = ["Evidence", "log_evidence"]

_BUDGET = 2**22  # numbers in the largest tensor of one chunk
_ROWS = 128  # of a batch

Function = Callable[..., Any]


@dataclass(frozen=True)
class Evidence:
    r"""Estimates of :math:`\log p(x_i)` from K weighted draws each.

    Attributes:
        log_evidence: ``(N,)``, in nats.
        ess: ``(N,)``, the effective number of draws :math:`(\sum_k w_k)^2 / \sum_k w_k^2`, from 1 to K. An estimate
            that rests on a few draws of many is too low, by more than its standard error tells.
        num_samples: K.
    """

    log_evidence: Tensor
    ess: Tensor
    num_samples: int

    @property
    def standard_error(self) -> Tensor:
        """``(N,)``, in nats, by the delta method: that of the mean weight, relative to it. NaN of one draw."""
        if self.num_samples == 1:
            return torch.full_like(self.ess, math.nan)
        return (1 / self.ess - 1 / self.num_samples).clamp(min=0).sqrt()


@torch.no_grad()
def log_evidence(
    model: Function, guide: Function, *data: Tensor, num_samples: int = 1000, plate: str = "data", seed: int = 0
) -> Evidence:
    r"""Estimate the log marginal likelihood of each datum,

    .. math:: \log p(x) \approx \log \frac1K \sum_{k=1}^K w_k, \qquad
              w_k = \frac{p(x, z_k)}{q(z_k \mid x)},\quad z_k \sim q(z \mid x).

    In expectation a lower bound that tightens as K grows; at K = 1 the ELBO. Where :func:`pyro_vae.exact.log_evidence`
    has an answer, that is better.

    Args:
        model: a Pyro model with one data plate, as the rightmost dimension, that holds all its sites.
        guide: its guide.
        data: what both take.
        num_samples: K, draws of each datum's latents; in batches of rows and chunks of draws that bound the memory.
        plate: name of the data plate.
        seed: of the draws.

    Raises:
        ValueError: if model and guide are not of this form, or the likelihood is not normalised.

    Source: Burda, Grosse and Salakhutdinov 2016, "Importance weighted autoencoders", equation 8.

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(1),
    ...     encoder=guides.DiagonalNormal(2, 1, networks.linear()),
    ...     decoder=likelihoods.Normal(1, 2, networks.linear()),
    ... )
    >>> estimate = log_evidence(vae.model, vae.guide, torch.randn(10, 2), num_samples=200)
    >>> estimate.log_evidence.shape, bool((estimate.ess <= 200).all())
    (torch.Size([10]), True)
    """
    positive_int(num_samples, "num_samples")
    problem = Problem(model, data, plate)
    Guide(problem, guide).check_densities()
    with seeded(seed):
        totals = [_totals(part, guide, num_samples) for part in _batches(problem, guide)]
    total, total_of_squares = (torch.cat(list(parts)) for parts in zip(*totals, strict=True))
    ess = (2 * total - total_of_squares).exp()
    return Evidence((total - math.log(num_samples)).to(problem.dtype), ess.to(problem.dtype), num_samples)


def _batches(problem: Problem, guide: Function) -> list[Problem]:
    """Some rows each, for which q(z | x) is computed once for many draws; all at once where rows need each other."""
    model, data, plate = problem.model, problem.data, problem.plate
    if problem.num_data <= _ROWS or not (is_amortized(model, data, plate) and is_amortized(guide, data, plate)):
        return [problem]
    parts = zip(*(tensor.split(_ROWS) for tensor in data), strict=True)
    return [Problem(model, part, plate) for part in parts]


def _totals(problem: Problem, guide: Function, num_samples: int) -> tuple[Tensor, Tensor]:
    """The logarithms of the sums of weights and of their squares, ``(N,)`` each."""
    widths = [site["fn"].event_shape.numel() for site in (problem.latents | problem.observed).values()]
    chunk = max(1, _BUDGET // (problem.num_data * max(64, *widths)))
    total, total_of_squares = problem.zeros() - math.inf, problem.zeros() - math.inf
    for first in range(0, num_samples, chunk):
        log_weight = _log_weights(problem, guide, min(chunk, num_samples - first)).double()
        total = torch.logaddexp(total, log_weight.logsumexp(0))
        total_of_squares = torch.logaddexp(total_of_squares, (2 * log_weight).logsumexp(0))
    return total, total_of_squares


def _log_weights(problem: Problem, guide: Function, count: int) -> Tensor:
    """log p(x, z) - log q(z | x) at draws z ~ q, ``(count, N)``."""
    draws, log_q = drawn(guide, problem.data, count)
    return problem.log_joint(draws) - log_q
