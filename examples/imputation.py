"""
Fill in what is missing, and say how surely
===========================================

Thirty measurements of 569 tumours, from scikit-learn, from areas in the hundreds to fractions of a hundredth, some with
outliers. A quarter of the entries is hidden, in training rows and in held-out rows alike. A VAE whose likelihood goes
without missing entries is trained on the rest, with a normal or a Student-t likelihood, and draws the hidden entries of
the held-out rows given the others. In each step up to half of what is left is hidden too, so that the encoder learns
what it cannot know; one VAE goes without that, and is too sure of itself. Beside them: the mean of each column, and
scikit-learn's IterativeImputer, a regression of each column on all others. Where radius, perimeter and area nearly tell
each other, as here, regressions guess best; the VAE is one model of all columns, whatever is missing.
"""

import options

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    parser = options.parser(__doc__, "imputation", epochs=500)
    options.add_training(parser, batch_size=100, lr=3e-3)
    parser.add_argument("--latent", type=options.count, default=12, help="dimensions of z")
    parser.add_argument("--hidden", type=options.count, default=64, help="units of the hidden layer, each way")
    parser.add_argument("--percent", type=options.count, default=25, help="percentage of entries that are hidden")
    parser.add_argument("--draws", type=options.count, default=100, help="draws of each hidden entry")
    args = parser.parse_args()

import argparse
import math
import warnings
from dataclasses import dataclass

import imputation_pictures as pictures
import pyro
import results
import torch
import xarray as xr
from sklearn.datasets import load_breast_cancer
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors

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


def table_vae(likelihood: str, columns: int, latent: int, hidden: int) -> pv.VAE:
    network = networks.mlp([hidden], activation=nn.Tanh)
    family = {"Normal": likelihoods.Normal, "Student-t": likelihoods.StudentT}[likelihood]
    return pv.VAE(
        prior=priors.StandardNormal(latent),
        encoder=guides.DiagonalNormal(columns, latent, networks.with_missing(network)),
        decoder=family(latent, columns, network, scale="per_dimension", min_scale=0.02, missing=True),
    )


def hide_more(x: Tensor) -> Tensor:
    """Up to half of each row's entries missing besides, a share that differs from row to row."""
    return x.masked_fill(torch.rand(x.shape) < torch.rand(len(x), 1) / 2, torch.nan)


@dataclass
class Imputed:
    """Draws of every entry, ``(draws, N, D)``, a best guess, and the log-density of each entry's true value."""

    draws: Tensor
    guess: Tensor
    log_density: Tensor


@torch.no_grad()
def by_vae(vae: pv.VAE, x: Tensor, complete: Tensor, draws: int) -> Imputed:
    """z ~ q(z | observed entries), x ~ p(x | z); the density of an entry is a mixture over the z."""
    drawn = vae.impute(x, draws)
    p = vae.decode(vae.encode(x).sample(torch.Size([draws])))
    return Imputed(drawn, p.mean.mean(0), p.base_dist.log_prob(complete).logsumexp(0) - math.log(draws))


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


def judge(imputed: Imputed, test: Table) -> dict[str, float]:
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


def table(rows: dict[str, dict[str, float]], hidden: int) -> str:
    columns = {
        "rmse": "RMSE",
        "absolute_error": "|error|",
        "inside_50": "in 50 %",
        "inside_90": "in 90 %",
        "width_90": "width",
        "log_density": "log p",
    }
    lines = [f"{f'{hidden} hidden entries':24s}" + "".join(f"{title:>9s}" for title in columns.values())]
    for name, row in rows.items():
        cells = [f"{row[key]:.0%}" if key.startswith("inside") else f"{row[key]:.3f}" for key in columns]
        lines.append(f"{name:24s}" + "".join(f"{cell:>9s}" for cell in cells) + f" ± {row['log_density_error']:.3f}")
    return "\n".join(
        [
            *lines,
            "errors and widths in standard deviations of a column; |error|: the median; width: of the 90 % interval",
            "in 50 %, in 90 %: share of hidden entries in these intervals; log p: nats per hidden entry ± its error",
        ]
    )


def saved(vae: pv.VAE, test: Table, imputed: Imputed, args: argparse.Namespace) -> xr.DataTree:
    """Draws for ArviZ of fifty held-out rows, and the imputed entries in a group of their own."""
    tree = pv.to_datatree(
        vae.model,
        vae.guide,
        test.x[:50],
        draws=args.draws,
        seed=args.seed,
        parallel=True,
        dims={"x": ["measurement"]},
        coords={"measurement": test.names},
    )
    dims = ("chain", "draw", "obs", "measurement")
    tree["imputed"] = xr.DataTree(xr.Dataset({"x": (dims, imputed.draws[None, :, :50].numpy())}))
    return tree


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test = load(args.percent, args.seed)
    observed = f"{int((~train.x.isnan()).sum())} of {train.x.numel()} entries"
    print(f"Training on {observed} of {len(train.x)} tumours; hidden entries of {len(test.x)} others are imputed")
    found: dict[str, Imputed] = {}
    found["column means"] = by_normals(torch.zeros_like(test.x), torch.ones(30), test.complete, args.draws)
    found["IterativeImputer"] = by_regressions(train.x, test.x, test.complete, args.draws, args.seed)
    histories: dict[str, dict[str, list[float]]] = {}
    vaes: dict[str, pv.VAE] = {}
    for name in ("VAE, nothing more hidden", "VAE, Normal", "VAE, Student-t"):
        likelihood = "Normal" if name == "VAE, Normal" else "Student-t"
        vae = vaes[name] = table_vae(likelihood, len(train.names), args.latent, args.hidden)
        fitted = pv.fit(
            vae.model,
            vae.guide,
            train.x,
            epochs=args.epochs,
            batch_size=args.batch_size,
            lr=args.lr,
            transform=None if name == "VAE, nothing more hidden" else hide_more,
            seed=args.seed,
        )
        histories[name] = fitted.history
        found[name] = by_vae(vae, test.x, test.complete, args.draws)
        print(f"{name}: {fitted.seconds:.1f} s", flush=True)

    rows = {name: judge(imputed, test) for name, imputed in found.items()}
    hidden = test.x.isnan()
    report = table(rows, int(hidden.sum()))
    print(f"\n{report}\n")
    covered = {name: coverage(imputed, test.complete, hidden) for name, imputed in found.items()}
    best = found["VAE, Student-t"]
    drawings = {
        "table": pictures.tables(test, best.guess),
        "intervals": pictures.intervals(test, best.draws),
        "calibration": pictures.calibration(LEVELS, covered),
        "errors": pictures.errors(rows),
    }
    summary = {
        "methods": rows,
        "levels": LEVELS.tolist(),
        "coverage": {name: shares.tolist() for name, shares in covered.items()},
        "histories": histories,
    }
    tree = saved(vaes["VAE, Student-t"], test, best, args)
    results.save(args, summary, drawings, {"imputation": tree}, report)


if __name__ == "__main__":
    main(args)
