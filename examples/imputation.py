"""
Impute missing entries, with their uncertainty
==============================================

Thirty measurements of 569 tumours, from scikit-learn, some with outliers. A quarter of the entries is masked, in
training and held-out rows. A VAE whose likelihood skips missing entries is trained on the rest, and draws the masked
entries of the held-out rows. In each step up to half of the remaining entries is masked too, so that the encoder
learns from incomplete rows; one VAE is trained without that and is overconfident. The baselines are column means and
scikit-learn's IterativeImputer, a regression of each column on all others, which has the smallest errors here.
"""

import argparse
import math
import warnings
from typing import Any, NamedTuple

import common
import pyro
import torch
import xarray as xr
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors

LEVELS = torch.linspace(0.05, 0.95, 19)


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "imputation", epochs=500)
    common.add_training(parser, batch_size=100, lr=3e-3)
    parser.add_argument("--latent", type=common.positive_int, default=12, help="dimensions of z")
    parser.add_argument("--hidden", type=common.positive_int, default=64, help="hidden units of each network")
    parser.add_argument("--percent", type=common.positive_int, default=25, help="percentage of masked entries")
    parser.add_argument("--draws", type=common.positive_int, default=100, help="draws of each masked entry")
    return parser.parse_args()


class Imputed(NamedTuple):
    """Draws of every entry, ``(draws, N, D)``, a point estimate, and the log-density of each entry's true value."""

    draws: Tensor
    estimate: Tensor
    log_density: Tensor


def normal_imputation(loc: Tensor, scale: Tensor, complete: Tensor, draws: int) -> Imputed:
    """Impute each entry by a normal distribution."""
    q = torch.distributions.Normal(loc, scale)
    return Imputed(q.sample(torch.Size([draws])), loc, q.log_prob(complete))


def regression_imputation(train: Tensor, x: Tensor, complete: Tensor, draws: int, seed: int) -> Imputed:
    """Impute by scikit-learn's IterativeImputer; the density is a normal with mean and variance of its draws."""
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        imputer = IterativeImputer(sample_posterior=True, random_state=seed).fit(train.numpy())
        drawn = torch.stack([torch.as_tensor(imputer.transform(x.numpy())) for _ in range(draws)]).float()
        estimate = torch.as_tensor(IterativeImputer(random_state=seed).fit(train.numpy()).transform(x.numpy())).float()
    normals = torch.distributions.Normal(drawn.mean(0), drawn.std(0).clamp(min=1e-3))
    return Imputed(drawn, estimate, normals.log_prob(complete))


@torch.no_grad()
def vae_imputation(vae: pv.VAE, x: Tensor, complete: Tensor, draws: int) -> Imputed:
    """Draw z ~ q(z | observed entries), x ~ p(x | z); the density of an entry is a mixture over the z."""
    drawn = vae.impute(x, draws)
    p = vae.decode(vae.encode(x).sample(torch.Size([draws])))
    return Imputed(drawn, p.mean.mean(0), p.base_dist.log_prob(complete).logsumexp(0) - math.log(draws))


def table_vae(likelihood: Any, columns: int, latent: int, hidden: int) -> pv.VAE:
    """Make a VAE whose encoder and likelihood skip missing entries."""
    network = networks.mlp([hidden], activation=nn.Tanh)
    encoder = guides.DiagonalNormal(columns, latent, networks.with_missing(network))
    decoder = likelihood(latent, columns, network, scale="per_dimension", min_scale=0.02, missing=True)
    return pv.VAE(priors.StandardNormal(latent), encoder, decoder)


def mask_more(x: Tensor) -> Tensor:
    """Mask up to half of each row's entries, a share that differs from row to row."""
    return x.masked_fill(torch.rand(x.shape) < torch.rand(len(x), 1) / 2, torch.nan)


def evaluate(imputed: Imputed, complete: Tensor, masked: Tensor) -> dict[str, Any]:
    """Compute a row of the table, for the masked entries of held-out rows; the standard error is over rows."""
    error, nats = (imputed.estimate - complete)[masked], imputed.log_density[masked]
    inside = common.coverage(imputed.draws[:, masked], complete[masked], LEVELS).tolist()
    low, high = imputed.draws.quantile(torch.tensor([0.05, 0.95]), dim=0)
    by_row = (imputed.log_density - nats.mean()).masked_fill(~masked, 0.0).sum(1)
    return {
        "rmse": float(error.square().mean().sqrt()),
        "absolute_error": float(error.abs().median()),
        "coverage": inside,
        "inside_50": inside[9],
        "inside_90": inside[17],
        "width_90": float((high - low)[masked].mean()),
        "log_density": float(nats.mean()),
        "log_density_error": float(by_row.square().sum().sqrt() / len(nats)),
    }


COLUMNS = {"RMSE": "{rmse:.3f}", "|error|": "{absolute_error:.3f}", "in 50 %": "{inside_50:.0%}"}
COLUMNS |= {
    "in 90 %": "{inside_90:.0%}",
    "width": "{width_90:.3f}",
    "log p": "{log_density:.3f} ± {log_density_error:.3f}",
}
NOTES = """errors and widths in standard deviations of a column; |error|: the median; width: of the 90 % interval
in 50 %, in 90 %: share of masked entries in these intervals; log p: nats per masked entry ± the standard error"""


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Mask a quarter of the entries. The baselines are column means and a regression of each column on all
    # others.
    complete, incomplete, names = common.load_measurements(args.percent, args.seed)
    train, x, complete, masked = incomplete[:400], incomplete[400:], complete[400:], incomplete[400:].isnan()
    found = {
        "column means": normal_imputation(torch.zeros_like(x), torch.ones(30), complete, args.draws),
        "IterativeImputer": regression_imputation(train, x, complete, args.draws, args.seed),
    }
    # 2. Train three VAEs that skip missing entries, and draw the masked ones from each.
    histories = {}
    for name in ("VAE, nothing more hidden", "VAE, Normal", "VAE, Student-t"):
        likelihood = likelihoods.Normal if name == "VAE, Normal" else likelihoods.StudentT
        vae = table_vae(likelihood, len(names), args.latent, args.hidden)
        options = common.training_options(args) | {"transform": None if "nothing" in name else mask_more}
        fitted = pv.fit(vae.model, vae.guide, train, **options)
        histories[name] = fitted.history
        found[name] = vae_imputation(vae, x, complete, args.draws)
    # 3. Compare error and coverage: do intervals contain the true value as often as they claim?
    rows = {name: evaluate(imputed, complete, masked) for name, imputed in found.items()}
    covered = {name: row.pop("coverage") for name, row in rows.items()}
    text = common.table(f"{int(masked.sum())} masked entries", rows, COLUMNS, NOTES)
    print(text)
    lines = {"exact": (LEVELS, LEVELS)} | {name: (LEVELS, shares) for name, shares in covered.items()}
    axis = {"xlabel": "nominal level of the interval", "ylabel": "share of masked entries in it", "aspect": "equal"}
    figure = common.draw_lines(lines, title="Calibration: below the line, intervals are too narrow", **axis)
    results = {"methods": rows, "levels": LEVELS.tolist(), "coverage": covered, "histories": histories}
    tree = common.make_tree(vae, x[:50], args, dims={"x": ["measurement"]}, coords={"measurement": names})
    imputed = (("chain", "draw", "obs", "measurement"), found[name].draws[None, :, :50].numpy())
    tree["imputed"] = xr.DataTree(xr.Dataset({"x": imputed}))
    common.save(args, results, {"calibration": figure}, {"imputation": tree}, text)


if __name__ == "__main__":
    main(parse_args())
