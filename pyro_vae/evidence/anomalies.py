"""Scores of anomalies from log p(x), and how well scores tell anomalies from normal data."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae._utils.validation import describe, positive_int, real_tensor
from pyro_vae.evidence.importance_sampling import Evidence

__all__ = ["Auroc", "auroc", "typicality"]


def typicality(log_evidence: Evidence | Tensor, reference: Evidence | Tensor, group_size: int = 1) -> Tensor:
    r"""Score data by the distance of log p(x) from that of normal data,

    .. math:: s = \Bigl| \frac1M \sum_{i=1}^M \bigl(-\log p(x_i)\bigr) - \hat H \Bigr|, \qquad
              \hat H = -\frac1R \sum_{r=1}^R \log p(x'_r),

    in nats. A high score is an anomaly, whether its log p(x) is too low or **too high**: in many dimensions the place
    of highest density, such as a black image, is not where normal data are. With M = 1 each datum has a score of its
    own. For M data that come together the mean of their log p(x) varies less, by :math:`1 / \sqrt M`.

    It cannot see an anomaly whose log p(x) is that of normal data.

    Args:
        log_evidence: of the data to score, ``(N,)``: the result of :func:`pyro_vae.log_evidence`, or log p(x) itself.
        reference: of held-out normal data, likewise, ``(R,)``. With training data the scores would be too high where
            the model has overfitted.
        group_size: M; consecutive data are a group, and data after the last whole group are left out.

    Returns:
        ``(N // M,)``, in float64. For a threshold, use a quantile of the scores of other normal data.

    Raises:
        TypeError, ValueError: if log p(x) are not finite numbers ``(N,)``, or fewer than a group.

    Source: Nalisnick, Matsukawa, Teh and Lakshminarayanan 2019, "Detecting out-of-distribution inputs to deep
    generative models using typicality", section 3.

    >>> reference = torch.tensor([-100.0, -90.0, -110.0])
    >>> typicality(torch.tensor([-101.0, -150.0, -10.0]), reference)  # as usual, too low, too high
    tensor([ 1., 50., 90.], dtype=torch.float64)
    """
    values, usual = _log_p(log_evidence, "log_evidence"), _log_p(reference, "reference")
    count = len(values) // positive_int(group_size, "group_size")
    if not count:
        raise ValueError(f"`group_size` must be at most the number of data, {len(values)}, got {group_size}")
    groups = values[: count * group_size].reshape(count, group_size)
    return (groups.mean(1) - usual.mean().to(values.device)).abs()


class Auroc(NamedTuple):
    """The area under a ROC curve, and its standard error."""

    value: float
    standard_error: float


def auroc(normal: Tensor, anomalous: Tensor) -> Auroc:
    r"""Compute the probability that an anomaly has a higher score than a normal datum, with its standard error,

    .. math:: A = P(s > s') + \tfrac12 P(s = s'),

    the area under the curve of the receiver operating characteristic (ROC): 1/2 for scores that know nothing, 1 for
    those that separate all, and below 1/2 where anomalies look *more* normal than normal data. The standard error is
    that over new normal data and new anomalies,

    .. math:: \mathrm{se}^2 = \frac{\mathrm{var}_r\,A_r}{R} + \frac{\mathrm{var}_n\,A_n}{N},

    with :math:`A_r` the share of anomalies above the normal datum r, and :math:`A_n` that of normal data below the
    anomaly n, ties as one half. It is 0 where all are separated: then the error is only known to be small.

    Args:
        normal: scores of normal data, ``(R,)``, R >= 2.
        anomalous: scores of anomalies, ``(N,)``, N >= 2; higher ones are more anomalous. Infinite ones are allowed.

    Raises:
        TypeError, ValueError: if scores are not numbers ``(N,)``.

    Source: Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve"; DeLong, DeLong and
    Clarke-Pearson 1988, "Comparing the areas under two or more correlated receiver operating characteristic curves".

    >>> auroc(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 3.0])).value  # of six pairs four and a half
    0.75
    """
    normal, anomalous = (_scores(each, name) for each, name in ((normal, "normal"), (anomalous, "anomalous")))
    anomalous = anomalous.to(normal.device)
    below, above = _share_below(normal, anomalous), 1 - _share_below(anomalous, normal)
    variance = above.var() / len(above) + below.var() / len(below)
    return Auroc(below.mean().item(), variance.sqrt().item())


def _share_below(scores: Tensor, at: Tensor) -> Tensor:
    """The share of scores below each number, with ties as one half."""
    ordered = scores.sort().values
    return (torch.searchsorted(ordered, at) + torch.searchsorted(ordered, at, right=True)).double() / (2 * len(scores))


def _log_p(value: Evidence | Tensor, name: str) -> Tensor:
    """log p(x) of each datum, ``(N,)``, in float64."""
    must = "the result of pv.log_evidence, or log p(x), finite numbers (N,)"
    if isinstance(value, Evidence):
        value = value.log_evidence
    values = real_tensor(value, name, must).detach().double()
    if values.dim() != 1 or not values.numel() or not values.isfinite().all():
        raise ValueError(f"`{name}` must be {must}, got {describe(value)}")
    return values


def _scores(value: Tensor, name: str) -> Tensor:
    """Scores ``(N,)``, in float64."""
    must = "scores, numbers (N,) with N >= 2"
    values = real_tensor(value, name, must).detach().double()
    if values.dim() != 1 or len(values) < 2 or values.isnan().any():
        raise ValueError(f"`{name}` must be {must}, got {describe(value)}")
    return values
