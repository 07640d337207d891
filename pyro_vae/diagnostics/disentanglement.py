"""Disentanglement: whether each latent variable stands for one known factor of the data, as MIG and DCI measure it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.display import Result, Table
from pyro_vae._utils.validation import describe, first_index, mapping, positive_int, real_tensor, seed_number

__all__ = ["Disentanglement", "disentanglement"]

_TRAIN_SHARE = 0.75  # of the rows, on which the forests of DCI are trained; the others measure their accuracy
_TREES = 30
_FEWEST = 20  # rows


@dataclass(frozen=True, repr=False)
class Disentanglement(Result):
    """The result of :func:`disentanglement`, for D codes and F factors.

    Attributes:
        factors: the names of the factors.
        mig: the mutual information gap, the mean of ``gaps``; 1 is perfect, 0 is none.
        disentanglement: whether a code is about one factor only, 0 to 1 (DCI).
        completeness: whether a factor is in one code only, 0 to 1 (DCI).
        informativeness: the mean of ``accuracy`` (DCI).
        gaps: the gap of each factor, ``(F,)``.
        information: mutual information of code and factor in nats, ``(D, F)``.
        entropy: that of each factor in nats, ``(F,)``.
        importance: importance of each code for the prediction of each factor, ``(D, F)``; it sums to 1 over the codes.
        accuracy: the share of held-out rows whose factor is predicted from the codes, ``(F,)``.
        chance: the same for the most frequent value of the factor, ``(F,)``.
    """

    factors: tuple[str, ...]
    mig: float
    disentanglement: float
    completeness: float
    informativeness: float
    gaps: Tensor
    information: Tensor
    entropy: Tensor
    importance: Tensor
    accuracy: Tensor
    chance: Tensor

    def _line(self) -> str:
        dci = f"disentanglement {self.disentanglement:.3f}, completeness {self.completeness:.3f}"
        return f"MIG {self.mig:.3f}, {dci}, informativeness {self.informativeness:.3f}"

    def _table(self) -> Table:
        head = ("factor", "best code", "information, nats", "entropy, nats", "gap", "accuracy", "by chance")
        best, code = self.information.max(0)
        columns = (code, best, self.entropy, self.gaps, self.accuracy, self.chance)
        rows = [
            (name, str(int(values[0])), *(f"{float(value):.3f}" for value in values[1:]))
            for name, *values in zip(self.factors, *columns, strict=True)
        ]
        return Table(head, rows, self._line())


def disentanglement(codes: Tensor, factors: Mapping[str, Tensor], *, bins: int = 20, seed: int = 0) -> Disentanglement:
    r"""Measure whether each code stands for one known factor: MIG, and the three numbers of DCI.

    The **mutual information gap** compares the two codes that know most about a factor v,

    .. math:: \mathrm{MIG} = \frac1F \sum_v \frac{I(z_{(1)}; v) - I(z_{(2)}; v)}{H(v)},

    with the information of two discrete variables: codes, and factors of more than ``bins`` values, are put into bins
    of equal counts. It does not change if a code is replaced by an increasing function of itself. The estimate of an
    information of N rows is too high by about :math:`(\mathrm{bins} - 1)(\mathrm{values} - 1) / 2N` nats.

    **DCI** trains a random forest to predict each factor from all codes. With the importance :math:`R_{dv}` of the code
    d for the factor v, :math:`H_F` an entropy divided by log F, and :math:`\rho_d` the share of the code d in the sum
    of all importances,

    .. math:: \text{disentanglement} = \sum_d \rho_d \Big(1 - H_F\Big(\frac{R_{d\cdot}}{\sum_v R_{dv}}\Big)\Big),
              \qquad \text{completeness} = \frac1F \sum_v \Big(1 - H_D(R_{\cdot v})\Big).

    Informativeness is the accuracy on rows that the forests did not see, a quarter of all; the paper has an error.

    Args:
        codes: ``(N, D)`` with D >= 2: draws of q(z | x), ``vae.encode(x).sample()``. The mean of a latent that the
            decoder ignores still moves a little with x, and information does not depend on scale: only the noise of the
            draws shows that it carries nothing.
        factors: two or more known factors by name, ``(N,)`` each, such as those of
            :func:`pyro_vae.datasets.shapes`.
        bins: the number of bins, 2 or more.
        seed: seed of the forests, and of the choice of the held-out rows.

    Raises:
        TypeError, ValueError: for codes or factors of another type or shape, or a factor of one value.

    Source: Chen, Li, Grosse and Duvenaud 2018, "Isolating sources of disentanglement in VAEs", section 4.1; Eastwood
    and Williams 2018, "A framework for the quantitative evaluation of disentangled representations", section 2; bins
    and the accuracy of forests as in Locatello et al. 2019, "Challenging common assumptions", appendix C.

    >>> factors = {"x": torch.arange(400) % 4, "y": torch.arange(400) // 4 % 4}
    >>> codes = torch.stack([-factors["y"], factors["x"]], 1).double()
    >>> disentanglement(codes, factors)
    Disentanglement(MIG 1.000, disentanglement 1.000, completeness 1.000, informativeness 1.000)
    """
    codes = _checked_codes(codes)
    names, values = _checked_factors(factors, len(codes), positive_int(bins, "bins"))
    seed_number(seed)
    states = [_binned(code.contiguous(), bins) for code in codes.T]
    information = torch.tensor([[_information(state, factor) for factor in values] for state in states], device="cpu")
    entropy = torch.tensor([_information(factor, factor) for factor in values], device="cpu")
    best = information.sort(0, descending=True).values
    gaps = (best[0] - best[1]) / entropy
    importance, accuracy = _forests(codes, values, seed)
    chance = torch.tensor([np.bincount(factor).max() / len(factor) for factor in values], device="cpu")
    by_code = importance.sum(1)
    focus = 1 - _relative_entropy(importance[by_code > 0], 1)
    return Disentanglement(
        names,
        gaps.mean().item(),
        ((by_code[by_code > 0] / by_code.sum()) * focus).sum().item(),
        (1 - _relative_entropy(importance, 0)).mean().item(),
        accuracy.mean().item(),
        gaps,
        information,
        entropy,
        importance,
        accuracy,
        chance,
    )


def _checked_codes(codes: Any) -> Tensor:
    expected = "codes (N, D) with D >= 2, such as `vae.encode(x).sample()`"
    if real_tensor(codes, "codes", expected).dim() != 2 or codes.shape[1] < 2:
        raise ValueError(f"`codes` must be {expected}, got shape {tuple(codes.shape)}")
    if len(codes) < _FEWEST:
        raise ValueError(f"`codes` must have {_FEWEST} or more rows, got {len(codes)}")
    if (place := first_index(lambda part: ~part.isfinite(), codes)) is not None:
        raise ValueError(f"`codes` must hold finite numbers, got {codes[tuple(place)].item()} at {tuple(place)}")
    return codes.detach().cpu().double()


def _checked_factors(factors: Any, count: int, bins: int) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Return the names, and the values of each factor as numbers 0, 1, ..."""
    named = mapping(factors, "factors", "{'x': x, 'hue': hue}")
    if len(named) < 2:
        raise ValueError(f"`factors` must be two or more, got {len(named)}")
    if bins < 2:
        raise ValueError(f"`bins` must be 2 or more, got {bins}")
    values = []
    for name, factor in named.items():
        expected = f"numbers ({count},), one for each row of `codes`"
        if real_tensor(factor, f"factors: {name!r}", expected).shape != (count,):
            raise ValueError(f"`factors` must be {expected}, got {describe(factor)} for {name!r}")
        if not factor.isfinite().all():
            raise ValueError(f"`factors` must be finite numbers, got another one for {name!r}")
        states = _binned(factor.detach().cpu().double().contiguous(), bins)
        if states.max() == 0:
            raise ValueError(f"`factors` must have two values or more, got one for {name!r}")
        values.append(states)
    return tuple(str(name) for name in named), values


def _binned(values: Tensor, bins: int) -> np.ndarray:
    """Number the values, if they are few; put others into bins of equal counts, with equal values in the same one."""
    distinct, states, counts = values.unique(return_inverse=True, return_counts=True)
    if len(distinct) > bins:
        # By the middle of its ranks, a value of more than one bin's share remains apart from others on both sides.
        middle = counts.cumsum(0) - counts / 2
        states = (bins * middle / len(values)).floor()[states].unique(return_inverse=True)[1]
    return states.numpy()


def _information(one: np.ndarray, other: np.ndarray) -> float:
    """The mutual information of two columns of numbers 0, 1, ..., in nats; of a column with itself, its entropy."""
    joint = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(joint, (one, other), 1 / len(one))
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / independent[seen])).sum())


def _forests(codes: Tensor, values: list[np.ndarray], seed: int) -> tuple[Tensor, Tensor]:
    """The importance of each code for each factor, ``(D, F)``, and the accuracy on held-out rows, ``(F,)``."""
    from sklearn.ensemble import RandomForestClassifier

    order, x = np.random.default_rng(seed).permutation(len(codes)), codes.numpy()
    train, test = np.split(order, [int(_TRAIN_SHARE * len(order))])
    importance, accuracy = [], []
    for factor in values:
        # All codes compete for each split: with a random choice of them, useless codes would seem to matter.
        forest = RandomForestClassifier(_TREES, max_features=None, min_samples_leaf=3, random_state=seed)
        forest.fit(x[train], factor[train])
        importance.append(torch.from_numpy(forest.feature_importances_))
        accuracy.append(float(forest.score(x[test], factor[test])))
    return torch.stack(importance, 1), torch.tensor(accuracy, device="cpu")


def _relative_entropy(weights: Tensor, dim: int) -> Tensor:
    """The entropy of weights along a dimension, divided by its largest possible value; of all zeros, 1."""
    shares = weights / weights.sum(dim, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim) / np.log(weights.shape[dim])
    return entropy.nan_to_num(1.0)
