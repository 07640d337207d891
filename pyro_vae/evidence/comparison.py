"""A table that compares models by log p(x) of held-out data, with each source of error in its own column."""

import math
from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from pyro_vae._utils.validation import describe, real_tensor, with_article
from pyro_vae.evidence.importance_sampling import Evidence

__all__ = ["compare_evidence"]


def compare_evidence(evidence: Mapping[str, Evidence | Tensor]) -> pd.DataFrame:
    r"""Compare models by their mean log p(x) over the same N held-out data, the best first.

    Each row is a model. The columns are in nats per datum, except for the last:

    * ``log_evidence``: the mean over data.
    * ``standard_error``: of that mean over new data, :math:`s / \sqrt N`; s is the standard deviation over data.
    * ``monte_carlo_error``: the part of it that more draws would remove, :math:`\sqrt{\sum_i \mathrm{se}_i^2} / N`; 0
      for exact answers. It is the error for these N data. Estimates vary around the log p(x) of their data, so the
      spread over data **already contains** the noise of the draws: do not add the two.
    * ``difference``: to the best model, 0 or less.
    * ``difference_error``: its standard error, that of the mean of the N differences. It is mostly much smaller than
      the errors of the two means, since data that are hard for one model are hard for the others. NaN for the best.
    * ``difference_monte_carlo_error``: the part of it that more draws would remove. The draws of both models are
      taken as independent; with the same seed they may share noise, and this error is then too large.
    * ``unreliable``: the share of data whose k̂ is too large or unknown; 0 for exact answers.

    Estimates are lower bounds in expectation. A model with a worse guide has a mean that is too low, by half of each
    squared standard error, and by more where k̂ is unreliable. Such a model may be better than its row.

    Args:
        evidence: by name, the :class:`pyro_vae.Evidence` of a model, or ``(N,)`` of
            :func:`pyro_vae.exact.inference.log_evidence`, all of the same data in the same order. Of models with global
            latents it is one number for all data, and the columns are in nats of all data.

    Raises:
        TypeError, ValueError: if there is no model, or an entry has another type, shape, or number of data.

    >>> x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    >>> normal = torch.distributions.Normal
    >>> table = compare_evidence({"wide": normal(0.0, 2.0).log_prob(x), "true": normal(0.0, 1.0).log_prob(x)})
    >>> table[["log_evidence", "difference", "difference_error"]].round(2)
          log_evidence  difference  difference_error
    true         -1.43        0.00               NaN
    wide         -1.74       -0.31              0.03
    """
    entries = _entries(evidence)
    means = {name: float(values.mean()) for name, (values, _, _) in entries.items()}
    ranked = sorted(means, key=lambda name: (math.isnan(means[name]), -means[name]))
    best, best_error, _ = entries[ranked[0]]
    rows = {}
    for name in ranked:
        values, error, unreliable = entries[name]
        rows[name] = {
            "log_evidence": means[name],
            "standard_error": _mean_error(values),
            "monte_carlo_error": float(error.norm() / len(error)),
            "difference": means[name] - means[ranked[0]],
            "difference_error": _mean_error(values - best),
            "difference_monte_carlo_error": float(torch.hypot(error, best_error).norm() / len(error)),
            "unreliable": float(unreliable.double().mean()),
        }
    rows[ranked[0]] |= {"difference": 0.0, "difference_error": math.nan, "difference_monte_carlo_error": math.nan}
    return pd.DataFrame.from_dict(rows, orient="index")


def _mean_error(values: Tensor) -> float:
    """Standard error over data; NaN for one datum."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan


def _entries(evidence: Mapping[str, Evidence | Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The log p(x) of each model, its Monte Carlo standard errors, and whether each is unreliable, ``(N,)``."""
    if not isinstance(evidence, Mapping):
        raise TypeError(
            f"`evidence` must be a mapping from names to Evidence, got {with_article(type(evidence).__name__)}"
        )
    if not evidence:
        raise ValueError("`evidence` must have one or more models, got none")
    entries = {}
    for name, entry in evidence.items():
        if isinstance(entry, Evidence):
            values, error, unreliable = entry.log_evidence, entry.standard_error, entry.unreliable
        elif isinstance(entry, Tensor):
            if not real_tensor(entry, f"evidence[{name!r}]", "a tensor of floats (N,)").is_floating_point():
                raise TypeError(f"`evidence[{name!r}]` must be floats (N,), nats of each datum, got {describe(entry)}")
            values, error, unreliable = entry, torch.zeros_like(entry), torch.zeros_like(entry, dtype=torch.bool)
        else:
            must = "the result of pv.log_evidence or pv.exact.log_evidence"
            raise TypeError(f"`evidence[{name!r}]` must be {must}, got {with_article(type(entry).__name__)}")
        if values.dim() > 1 or values.numel() == 0:
            must = "(N,) with N >= 1, or one number for all data"
            raise ValueError(f"`evidence[{name!r}]` must be {must}, got shape {tuple(values.shape)}")
        values, error, unreliable = (part.detach().cpu().reshape(-1) for part in (values, error, unreliable))
        entries[name] = (values.double(), error.double(), unreliable)
    sizes = {name: len(values) for name, (values, _, _) in entries.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"`evidence` must have the same data, in the same order, for each model, got {sizes} data")
    return entries
