"""Test whether integers are uniform: the simultaneous band of their empirical distribution function, and a p-value."""

import numpy as np

__all__ = ["p_value", "simultaneous_band"]


def simultaneous_band(num: int, cells: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    r"""Compute a band that contains the whole empirical distribution function with probability ``level`` or more.

    For ``num`` independent integers, uniform on 0, ..., ``cells`` - 1, the count :math:`S_i` of those less than i is
    binomial. The band is the central interval of each count at one pointwise level, the largest at which all hold at
    once. That probability is computed, not simulated.

    Returns:
        Lower and upper bounds of :math:`S_i / \mathrm{num}` at i = 1, ..., ``cells`` - 1.

    Source: Säilynoja, Bürkner and Vehtari 2022, "Graphical test for discrete uniformity".

    >>> low, high = simultaneous_band(100, 2, 0.95)
    >>> low, high  # the binomial interval of one count
    (array([0.4]), array([0.6]))
    """
    outside = 1 - level
    low, high = np.log(outside / (4 * cells)), np.log(min(1.0, 2 * outside))
    for _ in range(30):
        middle = (low + high) / 2
        fits = _probability_within(*_limits(num, cells, np.exp(middle)), num, cells) >= level
        low, high = (middle, high) if fits else (low, middle)
    lower, upper = _limits(num, cells, np.exp(low))
    return lower / num, upper / num


def p_value(numbers: np.ndarray, cells: int) -> float:
    """Compute the p-value of the hypothesis that integers are uniform on 0, ..., ``cells`` - 1.

    It is exact (with the least likely count of :func:`simultaneous_band` as statistic); below 1e-12, an upper bound.

    >>> rng = np.random.default_rng(0)
    >>> p_value(rng.integers(0, 20, 500), 20) > 0.01, p_value(rng.binomial(19, 0.5, 500), 20) < 1e-9
    (True, True)
    """
    from scipy.stats import binom

    num = len(numbers)
    counts = np.bincount(numbers, minlength=cells).cumsum()[:-1]
    edges = np.arange(1, cells) / cells
    tails = np.minimum(binom.cdf(counts, num, edges), binom.cdf(num - counts, num, 1 - edges))
    pointwise = min(1.0, 2 * float(tails.min()))
    if pointwise < 1e-12:  # beyond the precision of what follows: bound it by the sum over counts
        return pointwise * cells
    if pointwise == 1:  # all counts are medians
        return 1.0
    within = _probability_within(*_limits(num, cells, pointwise * (1 + 1e-9)), num, cells)
    return float(np.clip(1 - within, pointwise / 2, 1.0))  # the tail of one count is a lower bound


def _limits(num: int, cells: int, pointwise: float) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and largest value of each count whose tails are at least half of ``pointwise``."""
    from scipy.stats import binom

    edges = np.arange(1, cells) / cells
    lower = binom.ppf(pointwise / 2, num, edges).astype(int).clip(0)
    return lower, num - lower[::-1]


def _probability_within(lower: np.ndarray, upper: np.ndarray, num: int, cells: int) -> float:
    """The probability that all counts are within limits: cells have independent Poisson numbers, given their sum."""
    from scipy.stats import poisson

    if (lower > upper).any():
        return 0.0
    rate = num / cells
    first, last = (int(poisson.ppf(tail, rate)) for tail in (1e-17, 1 - 1e-16))
    cell = poisson.pmf(np.arange(first, last + 20), rate)
    reached, start = np.ones(1), 0  # probabilities of the counts start, start + 1, ...
    for low, high in zip([*lower, num], [*upper, num], strict=True):
        summed = np.convolve(reached, cell)
        padded = np.zeros(high - low + 1)
        offset = low - (start + first)  # of `padded` in `summed`
        part = summed[max(offset, 0) : max(offset + len(padded), 0)]
        padded[max(-offset, 0) : max(-offset, 0) + len(part)] = part
        reached, start = padded, int(low)
    return float(reached[0] / poisson.pmf(num, num))
