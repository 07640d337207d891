"""The statistics of estimates of a known vector: bias, variance, and a test of whether there is a bias at all."""

import math
from dataclasses import dataclass

from scipy.stats import t as student_t
from torch import Tensor

__all__ = ["Measured", "measure"]

_EFFECTIVE = 20  # estimates that a parameter's variance must rest on to be tested


@dataclass(frozen=True)
class Measured:
    """What was found of one estimator in one group of parameters; gradients are of nats per datum.

    Attributes:
        target_norm: length of the exact gradient.
        bias: length of the estimator's bias, what chance explains taken off; 0 if that is all of it.
        bias_error: standard error of the bias. Where the bias is 0, the bias that chance could hide.
        variance: of one estimate, summed over parameters.
        max_z: the largest deviation of the mean from the target among the parameters tested, in standard errors.
        num_parameters: how many there are.
        num_tested: how many were tested: those whose variance does not rest on a few rare estimates. Where a guide is
            nearly sure of its codes, a state that is never drawn has a gradient that is never seen.
        repeats: how many estimates there were.
    """

    target_norm: float
    bias: float
    bias_error: float
    variance: float
    max_z: float
    num_parameters: int
    num_tested: int
    repeats: int

    @property
    def signal_to_noise(self) -> float:
        """Length of the exact gradient over the standard deviation of an estimate."""
        return self.target_norm / math.sqrt(self.variance) if self.variance > 0 else math.inf

    @property
    def p_value(self) -> float:
        """Of the largest deviation, for all that were tested at once (Bonferroni, Student's t): tiny if biased."""
        tails = 2 * float(student_t.sf(self.max_z, self.repeats - 1))
        return min(1.0, self.num_tested * tails) if self.num_tested else 1.0


def measure(estimates: Tensor, target: Tensor) -> Measured:
    r"""Hold estimates ``(R, P)`` against the vector that they are of, ``(P,)``.

    With d the deviation of their mean and C their covariance, the squared bias is :math:`|d|^2 - \mathrm{tr}\,C / R`,
    without the share of chance; its variance is :math:`4\,b^\top C b / R + 2\,|C|_F^2 / R^2`. Both C are estimated
    without their own bias, through the products of the R estimates. Below rounding no bias is told.

    >>> import torch
    >>> estimates = 1 + torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)).double()
    >>> measure(estimates, torch.ones(3)).p_value > 1e-3, measure(estimates, torch.zeros(3)).p_value < 1e-3
    (True, True)
    """
    repeats, mean = len(estimates), estimates.mean(0)
    centred, deviation = estimates - mean, mean - target
    variance = estimates.var(0)
    rounding = 1e-5 * float(target.norm()) + 1e-12
    squared = float((deviation**2).sum() - variance.sum() / repeats)
    bias = math.sqrt(max(squared, 0.0))
    bias = bias if bias > rounding else 0.0
    covariance = _squared_covariance(centred, float(variance.sum()))
    along = float((centred @ deviation).square().sum()) / (repeats - 1)  # d' C d, which is b' C b + |C|^2 / R
    noise = 2 * covariance / repeats**2
    spread = math.sqrt(max(4 * along / repeats - noise, noise))
    error = (variance / repeats).sqrt()
    effective = (centred**2).sum(0) ** 2 / (centred**4).sum(0).clamp(min=1e-300)
    constant = (variance <= (1e-6 * mean) ** 2) & (mean != 0)  # as of enumeration; what is always 0 was never seen
    tested = (effective >= _EFFECTIVE) | constant
    scores = (deviation.abs() / error.clamp(min=rounding / 4))[tested]
    return Measured(
        target_norm=float(target.norm()),
        bias=bias,
        bias_error=min(spread / (2 * bias), math.sqrt(spread)) if bias > 0 else math.sqrt(spread),
        variance=float(variance.sum()),
        max_z=float(scores.max()) if len(scores) else 0.0,
        num_parameters=len(target),
        num_tested=int(tested.sum()),
        repeats=repeats,
    )


def _squared_covariance(centred: Tensor, trace: float) -> float:
    """The squared Frobenius norm of the covariance, without bias for normal estimates."""
    repeats = len(centred)
    found = float(((centred @ centred.T) ** 2).sum()) / (repeats - 1) ** 2
    if repeats == 2:
        return found
    unbiased = (repeats - 1) ** 2 / ((repeats - 2) * (repeats + 1)) * (found - trace**2 / (repeats - 1))
    return max(unbiased, 0.0)
