"""What ranks of a truth among draws tell: how far off the draws are, in which way, and whether that is certain."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from pyro_vae.uniformity import simultaneous_band

__all__ = ["ALL", "JOINT", "Calibration", "Compared", "Effects", "effects_of_errors", "effects_of_remedies"]

JOINT = "log p(x, z)"
"""The name of the quantity that reads the data."""

ALL = "all coordinates"
"""The name of what they have in common."""

_EFFECTIVE = 20  # data that a coordinate's error must rest on to have a say in that of all


@dataclass(frozen=True)
class Effects:
    """How far q is off, by coordinate, ``(D,)``, and on the whole.

    Attributes:
        variance_ratio: the variance that q should have over the one it has: 2 if q's is half of what it must be.
        log_ratio_error: standard error of its logarithm.
        bias: how far the mean of q should move, in standard deviations of q.
        bias_error: its standard error.
        overall: of all coordinates: the geometric mean of the ratios, the error of its logarithm; the root mean square
            of the biases, what chance explains taken off, and its error.
    """

    variance_ratio: Tensor
    log_ratio_error: Tensor
    bias: Tensor
    bias_error: Tensor
    overall: tuple[float, float, float, float]


@dataclass(frozen=True)
class Calibration:
    r"""What R data drawn from the model tell of a guide, by L draws of each q(z | x).

    There are Q quantities: the coordinates of the latents, and last log p(x, z). A latent on the reals is its own
    coordinate, one with constraints is told in free ones (a point of the log-simplex in log-ratios), and a class by an
    indicator of each.

    Attributes:
        names: of the quantities, such as ``"z[0]"``.
        ranks: ``(R, Q)``, of the truth among the L draws, from 0 to L; ties broken at random.
        num_draws: L.
        p_values: ``(Q,)``, each exact, of the uniformity of the ranks.
        errors: of the truths about q: their mean squared distance from q's mean, but for a constant bias, over the mean
            variance of q, and that bias.
        remedies: of a continuous q, on the data that were given: the variance and the shift, the same for all data,
            that would raise the ELBO. Where :math:`h = -\mathbb{E}_q[\partial_z \log p(x, z)\,(z - \mathbb{E}_q z)]`,
            the ELBO is stationary in the variance at a mean h of 1; 1 / h is the factor for a normal p(z | x). None if
            a latent is discrete, or of one datum.
        divergence: in nats per datum, an unbiased estimate of the whole distance to the exact posterior,
            :math:`\mathbb{E}_{p(x)}[\mathrm{KL}(q \Vert p(z|x)) + \mathrm{KL}(p(z|x) \Vert q)]`, in which log p(x)
            cancels. What averages out in the ranks, one datum too narrow and one too wide, adds up here.
        divergence_error: its standard error. The estimate has heavy tails where q is far too narrow.
        tolerance: the ratio of variances that is let pass.
        alpha: the chance of any false alarm.

    Source: Talts et al. 2018, "Validating Bayesian inference algorithms with simulation-based calibration"; Modrák et
    al. 2023, "Simulation-based calibration checking for Bayesian computation", for log p(x, z), without which a guide
    that returns the prior would pass; Grosse, Ancha and Roy 2016, "Measuring the reliability of MCMC inference with
    bidirectional Monte Carlo", for the divergence.
    """

    names: tuple[str, ...]
    ranks: Tensor
    num_draws: int
    p_values: Tensor
    errors: Effects
    remedies: Effects | None
    divergence: float
    divergence_error: float
    tolerance: float
    alpha: float

    @property
    def is_exact(self) -> bool:
        """Whether no rank tells q from the exact posterior; if q is exact, that fails with a chance of ``alpha``."""
        return not any(self.leaves_band(index) for index in range(len(self.names)))

    def leaves_band(self, index: int) -> bool:
        """Whether the ranks of a quantity are certainly not uniform, at ``alpha`` for all quantities together."""
        return float(self.p_values[index]) <= self.alpha / len(self.names)

    @property
    def faults(self) -> dict[str, str]:
        """What is wrong, in words, by quantity: what is certain, and more than the tolerance lets pass.

        Certain: some ranks leave their band, at ``alpha`` for all quantities together. Material: a remedy of the
        variances by a factor of more than ``tolerance``, or of the means by as much, by a bound as sure as that; its
        square for one of several coordinates. With a tolerance of 1, and of discrete latents, the errors are named.
        """
        if self.is_exact:
            return {}
        sure = float(norm.isf(self.alpha / (4 * len(self.names))))  # two sides of two effects of each quantity
        effects = self.errors if self.remedies is None or self.tolerance == 1 else self.remedies
        allowed = _Allowed(self.tolerance, sure)
        words = {ALL: allowed.words(*effects.overall)}
        for index, name in enumerate(self.names[:-1]):
            of_one = (effects.variance_ratio, effects.log_ratio_error, effects.bias, effects.bias_error)
            words[name] = _Allowed(self.tolerance**2, sure).words(*(float(values[index]) for values in of_one))
        if self.tolerance == 1 or self.remedies is None:
            for index, name in enumerate(self.names):
                leaves = self.leaves_band(index)
                off = [f"not as p(z | x) is, p = {self.p_values[index]:.1g}"] if self.tolerance == 1 else []
                words[name] = (words.get(name) or off) if leaves else []
        return {name: "; ".join(found) for name, found in words.items() if found}

    def ecdf_difference(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of a quantity's ranks: places u, the share of ranks below u less u, and the band's two edges; ``(L,)`` each.

        If q is exact, all quantities stay within their bands with a chance of 1 - ``alpha``.
        """
        cells = self.num_draws + 1
        places = np.arange(1, cells) / cells
        share = np.bincount(self.ranks[:, index].numpy(), minlength=cells).cumsum()[:-1] / len(self.ranks)
        lower, upper = simultaneous_band(len(self.ranks), cells, 1 - self.alpha / len(self.names))
        return places, share - places, lower - places, upper - places

    def coverage(self, level: float) -> tuple[Tensor, Tensor]:
        """How often the central interval of q holds the truth, ``(Q,)``, which should be ``level``; and its error.

        The ends are quantiles of the draws; a truth between two draws counts in part where an end lies there too.
        """
        if isinstance(level, bool) or not isinstance(level, float) or not 0 < level < 1:
            raise ValueError(f"level: got {level!r}; accepted is a number between 0 and 1, such as 0.9")
        low, high = ((1 - level) / 2, (1 + level) / 2)
        start, width = self.ranks.double() / (self.num_draws + 1), 1 / (self.num_draws + 1)
        held = ((start + width).clamp(max=high) - start.clamp(min=low)).clamp(min=0) / width
        return held.mean(0), held.std(0) / len(held) ** 0.5

    @property
    def headline(self) -> str:
        """How far q is from the exact posterior, in words."""
        return (
            f"q(z | x) of {len(self.ranks)} data drawn from the model, {self.num_draws} draws each: "
            f"{self.divergence:.2f} ± {self.divergence_error:.2f} nats from p(z | x), both KL divergences together"
        )

    def __str__(self) -> str:
        return "\n".join([self.headline, *(f"  {name}: {fault}" for name, fault in self.faults.items())])


@dataclass(frozen=True)
class _Allowed:
    """What is let pass: what is not for sure more than the effect of a normal's variance off by a factor."""

    ratio: float
    sure: float

    def words(self, ratio: float, log_ratio_error: float, bias: float, bias_error: float) -> list[str]:
        """What is beyond it. A bias is allowed that is as many nats away, by both KL divergences together."""
        found = []
        if abs(math.log(ratio)) - self.sure * log_ratio_error > math.log(self.ratio):
            kind = "narrow" if ratio > 1 else "wide"
            found.append(f"too {kind}, the variance of q is {1 / ratio:.2f} times what it should be")
        if abs(bias) - self.sure * bias_error > math.sqrt(max((self.ratio + 1 / self.ratio) / 2 - 1, 0.0)):
            found.append(f"biased, the mean of q is off by {abs(bias):.2f} of its standard deviations")
        return found


@dataclass(frozen=True)
class Compared:
    """Truths beside draws, for N data.

    Attributes:
        ranks: ``(N, Q)``, of the truth.
        errors: ``(N, D)``, the truth less the mean of the draws.
        variances: ``(N, D)``, of the draws.
        excess: ``(N,)``, log p(x, z) - log q(z | x) at the truth less its mean over the draws.
    """

    ranks: Tensor
    errors: Tensor
    variances: Tensor
    excess: Tensor


def effects_of_errors(found: Compared, count: int) -> Effects:
    """How far the truths lie from the mean of ``count`` draws, beside how far the draws do."""
    num, errors, variances = len(found.errors), found.errors.cpu(), found.variances.cpu()
    scale, centre = variances.mean(0), errors.mean(0)
    squared = (errors - centre) ** 2 * num / (num - 1) - variances / count  # less what the mean of the draws errs by
    mean_squared = squared.mean(0)
    constant = (scale == 0) & (mean_squared == 0)
    ratio = torch.where(constant, 1.0, (mean_squared / scale).clamp(1e-9, 1e9))
    influence = torch.where(constant, 0.0, (squared - ratio * variances) / mean_squared.abs().clamp(min=1e-300))
    deviation = scale.clamp(min=1e-300).sqrt()
    told = (squared.sum(0) ** 2 >= _EFFECTIVE * (squared**2).sum(0)) & ~constant & (scale > 0)
    return _effects(ratio, influence, centre / deviation, errors.std(0) / deviation / num**0.5, told)


def effects_of_remedies(curvature: Tensor, pull: Tensor) -> Effects:
    """What would make the ELBO stationary, from ``(N, D)``: h, and the gradient of log p in standard deviations."""
    curvature, pull = curvature.cpu(), pull.cpu()
    mean = curvature.mean(0).clamp(1e-9, 1e9)
    influence = -(curvature - mean) / mean
    error = pull.std(0) / mean / len(pull) ** 0.5
    return _effects(1 / mean, influence, pull.mean(0) / mean, error, torch.ones_like(mean, dtype=torch.bool))


def _effects(ratio: Tensor, influence: Tensor, bias: Tensor, bias_error: Tensor, told: Tensor) -> Effects:
    """With the whole: errors of ratios may go together, and each datum has its say on all of them at once."""
    log_ratio_error = influence.std(0) / len(influence) ** 0.5
    overall = (1.0, 0.0, 0.0, 0.0)
    if told.any():
        chance = float((bias_error[told] ** 2).mean())
        size = max(float((bias[told] ** 2).mean()) - chance, 0.0) ** 0.5
        error = float((bias * bias_error)[told].norm()) / int(told.sum()) / size if size else 0.0
        whole = float(influence[:, told].mean(1).std()) / len(influence) ** 0.5
        overall = (math.exp(float(ratio[told].log().mean())), whole, size, max(error, (chance / len(bias)) ** 0.5))
    return Effects(ratio, log_ratio_error, bias, bias_error, overall)
