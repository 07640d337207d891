"""A table with holes, what is imputed for them, and how that is judged."""

import warnings
from dataclasses import dataclass

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from torch import Tensor

LEVELS = torch.linspace(0.05, 0.95, 19)


@dataclass
class Table:
    """A table in units of its columns' standard deviations, complete and with missing entries."""

    names: list[str]
    loc: Tensor
    scale: Tensor
    complete: Tensor
    x: Tensor


def load(percent: int, seed: int) -> tuple[Table, Table]:
    """Training rows and held-out rows; means and standard deviations are those of what is observed in training."""
    generator = torch.Generator().manual_seed(seed)
    data = load_breast_cancer()
    values = torch.as_tensor(data.data)[torch.randperm(len(data.data), generator=generator)]
    missing = torch.rand(values.shape, generator=generator) < percent / 100
    train = values.masked_fill(missing, torch.nan)[:400]
    loc = train.nanmean(0)
    scale = (train - loc).square().nanmean(0).sqrt()
    standard = ((values - loc) / scale).float()
    x, names = standard.masked_fill(missing, torch.nan), [str(name) for name in data.feature_names]
    first, last = (Table(names, loc, scale, standard[rows], x[rows]) for rows in (slice(400), slice(400, None)))
    return first, last


@dataclass
class Imputed:
    """Draws of every entry, ``(draws, N, D)``, a best guess, and the log-density of each entry's true value."""

    draws: Tensor
    guess: Tensor
    log_density: Tensor


def by_normals(loc: Tensor, scale: Tensor, complete: Tensor, draws: int) -> Imputed:
    """A normal for each entry."""
    q = torch.distributions.Normal(loc, scale)
    return Imputed(q.sample(torch.Size([draws])), loc, q.log_prob(complete))


def by_regressions(train: Tensor, x: Tensor, complete: Tensor, draws: int, seed: int) -> Imputed:
    """scikit-learn's IterativeImputer: its draws, and for a density a normal of their mean and variance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        imputer = IterativeImputer(sample_posterior=True, random_state=seed).fit(train.numpy())
        drawn = torch.stack([torch.as_tensor(imputer.transform(x.numpy())) for _ in range(draws)]).float()
        guess = torch.as_tensor(IterativeImputer(random_state=seed).fit(train.numpy()).transform(x.numpy())).float()
    normals = torch.distributions.Normal(drawn.mean(0), drawn.std(0).clamp(min=1e-3))
    return Imputed(drawn, guess, normals.log_prob(complete))


def coverage(imputed: Imputed, complete: Tensor, hidden: Tensor) -> Tensor:
    """The share of hidden entries inside the central interval of each level."""
    below = (imputed.draws < complete).float().mean(0)[hidden]
    return ((below - 0.5).abs()[:, None] <= LEVELS / 2).float().mean(0)


def evaluate(imputed: Imputed, test: Table) -> dict[str, float]:
    """A row of the table, of the hidden entries of held-out rows; standard errors from row to row."""
    hidden = test.x.isnan()
    error = (imputed.guess - test.complete)[hidden]
    inside = dict(zip((f"{level:.2f}" for level in LEVELS), coverage(imputed, test.complete, hidden), strict=True))
    low, high = imputed.draws.quantile(torch.tensor([0.05, 0.95]), dim=0)
    nats = imputed.log_density[hidden]
    by_row = (imputed.log_density - nats.mean()).masked_fill(~hidden, 0.0).sum(1)
    return {
        "rmse": float(error.square().mean().sqrt()),
        "absolute_error": float(error.abs().median()),
        "inside_50": float(inside["0.50"]),
        "inside_90": float(inside["0.90"]),
        "width_90": float((high - low)[hidden].mean()),
        "log_density": float(nats.mean()),
        "log_density_error": float(by_row.square().sum().sqrt() / len(nats)),
    }
