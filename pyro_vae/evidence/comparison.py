"""Models side by side by what they give held-out data: log p(x), with every error said apart."""

import math
from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from pyro_vae._utils.validation import describe, real_tensor
from pyro_vae.evidence.importance_sampling import Evidence

__all__ = ["compare_evidence"]


def compare_evidence(evidence: Mapping[str, Evidence | Tensor]) -> pd.DataFrame:
    r"""Compare models by their mean log p(x) over the same N held-out data, the best first.

    Each row is a model. The columns, in nats per datum but for the last:

    * ``log_evidence``: the mean over data;
    * ``standard_error``: of that mean, as one of all data like these, :math:`s / \sqrt N`, with s the standard
      deviation over the N data;
    * ``monte_carlo_error``: the part of it that more draws would take away, :math:`\sqrt{\sum_i \mathrm{se}_i^2} / N`;
      0 of exact answers. It is the error for just these N data. An estimate strays from the log p(x) of its datum, and
      so the spread over data has the noise of the draws **in it already**: the two are not to be added;
    * ``difference``: to the best, 0 or less;
    * ``difference_error``: its standard error. Data that are hard are so for each model, and therefore it is that of
      the N differences, datum by datum: mostly much smaller than the two errors would tell. NaN of the best;
    * ``difference_monte_carlo_error``: the part of that which more draws would take away, of the draws of both models,
      taken as independent (with one seed for both they may share noise, and this is then too large);
    * ``unreliable``: share of the data whose k̂ is above what is reliable or unknown; 0 of exact answers.

    Estimates are as they are, lower bounds in expectation: a model whose guide is worse is held lower than it is, by
    half of each squared standard error, and by more where k̂ is unreliable. Where many of its data are, a model may be
    better than it looks here.

    Args:
        evidence: by name, the :class:`pyro_vae.Evidence` of a model, or ``(N,)`` of
            :func:`pyro_vae.exact.inference.log_evidence`, all of the same data in the same order.

    Raises:
        TypeError, ValueError: if there is nothing to compare, an entry is of another kind or shape, or not of as many
            data as the others.

    >>> x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    >>> normal = torch.distributions.Normal
    >>> table = compare_evidence({"wide": normal(0.0, 2.0).log_prob(x), "true": normal(0.0, 1.0).log_prob(x)})
    >>> table[["log_evidence", "difference", "difference_error"]].round(2)
          log_evidence  difference  difference_error
    true         -1.43        0.00               NaN
    wide         -1.74       -0.31              0.03
    """
    entries = _entries(evidence)
    means = {name: float(found.mean()) for name, (found, _, _) in entries.items()}
    ranked = sorted(means, key=lambda name: (math.isnan(means[name]), -means[name]))
    best, best_error, _ = entries[ranked[0]]
    rows = {}
    for name in ranked:
        found, error, unreliable = entries[name]
        first = name == ranked[0]
        rows[name] = {
            "log_evidence": means[name],
            "standard_error": _of_mean(found),
            "monte_carlo_error": _of_draws(error),
            "difference": 0.0 if first else means[name] - means[ranked[0]],
            "difference_error": math.nan if first else _of_mean(found - best),
            "difference_monte_carlo_error": math.nan if first else _of_draws(torch.hypot(error, best_error)),
            "unreliable": float(unreliable.double().mean()),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _of_mean(values: Tensor) -> float:
    """Standard error over data; NaN of one datum."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan


def _of_draws(errors: Tensor) -> float:
    return float(errors.square().sum().sqrt() / len(errors))


def _entries(evidence: Mapping[str, Evidence | Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of each model: log p(x), its standard errors of Monte Carlo, and whether each is unreliable, ``(N,)``."""
    if not isinstance(evidence, Mapping):
        raise TypeError(f"`evidence` must be a mapping from names to Evidence, got a {type(evidence).__name__}")
    if not evidence:
        raise ValueError("`evidence` must be one or more, got no models")
    entries = {}
    for name, entry in evidence.items():
        if isinstance(entry, Evidence):
            found, error, unreliable = entry.log_evidence, entry.standard_error, entry.unreliable
        elif isinstance(entry, Tensor):
            if not real_tensor(entry, f"evidence: {name!r}", "(N,)").is_floating_point():
                raise TypeError(f"`evidence` must be floats (N,), nats of each datum: {name!r} is {describe(entry)}")
            found, error, unreliable = entry, torch.zeros_like(entry), torch.zeros(entry.shape, dtype=torch.bool)
        else:
            raise TypeError(
                "`evidence` must be what pv.log_evidence returns, and tensors (N,) of pv.exact.log_evidence: "
                f"{name!r} is a {type(entry).__name__}"
            )
        if found.dim() != 1 or len(found) == 0:
            raise ValueError(f"`evidence` must be (N,) with N >= 1: {name!r} has shape {tuple(found.shape)}")
        entries[name] = (found.detach().cpu().double(), error.detach().cpu().double(), unreliable.cpu())
    sizes = {name: len(found) for name, (found, _, _) in entries.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"`evidence` must be the same data, in the same order, for each model, got {sizes} data")
    return entries
