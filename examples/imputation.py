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
from collections.abc import Callable

import imputation_pictures as pictures
import pyro
import results
import runs
import torch
import xarray as xr
from imputed import LEVELS, Imputed, by_normals, by_regressions, coverage, evaluate, load
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors


def table_vae(likelihood: Callable[..., nn.Module], columns: int, latent: int, hidden: int) -> pv.VAE:
    """Model: z ~ N(0, I), x ~ p(x | z), of which missing entries are no part. Guide: q(z | observed entries)."""
    network = networks.mlp([hidden], activation=nn.Tanh)
    return pv.VAE(
        prior=priors.StandardNormal(latent),
        encoder=guides.DiagonalNormal(columns, latent, networks.with_missing(network)),
        decoder=likelihood(latent, columns, network, scale="per_dimension", min_scale=0.02, missing=True),
    )


def hide_more(x: Tensor) -> Tensor:
    """Up to half of each row's entries missing besides, a share that differs from row to row."""
    return x.masked_fill(torch.rand(x.shape) < torch.rand(len(x), 1) / 2, torch.nan)


@torch.no_grad()
def by_vae(vae: pv.VAE, x: Tensor, complete: Tensor, draws: int) -> Imputed:
    """z ~ q(z | observed entries), x ~ p(x | z); the density of an entry is a mixture over the z."""
    drawn = vae.impute(x, draws)
    p = vae.decode(vae.encode(x).sample(torch.Size([draws])))
    return Imputed(drawn, p.mean.mean(0), p.base_dist.log_prob(complete).logsumexp(0) - math.log(draws))


COLUMNS = {"RMSE": "{rmse:.3f}", "|error|": "{absolute_error:.3f}", "in 50 %": "{inside_50:.0%}"}
COLUMNS |= {"in 90 %": "{inside_90:.0%}", "width": "{width_90:.3f}"}
COLUMNS |= {"log p": "{log_density:.3f} ± {log_density_error:.3f}"}
NOTES = """errors and widths in standard deviations of a column; |error|: the median; width: of the 90 % interval
in 50 %, in 90 %: share of hidden entries in these intervals; log p: nats per hidden entry ± its error"""
BEST = "VAE, Student-t"


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test = load(args.percent, args.seed)
    observed = f"{int((~train.x.isnan()).sum())} of {train.x.numel()} entries"
    print(f"Training on {observed} of {len(train.x)} tumours; hidden entries of {len(test.x)} others are imputed")
    found = {
        "column means": by_normals(torch.zeros_like(test.x), torch.ones(30), test.complete, args.draws),
        "IterativeImputer": by_regressions(train.x, test.x, test.complete, args.draws, args.seed),
    }
    vaes, histories = {}, {}
    for name in ("VAE, nothing more hidden", "VAE, Normal", BEST):
        likelihood = likelihoods.Normal if name == "VAE, Normal" else likelihoods.StudentT
        vae = vaes[name] = table_vae(likelihood, len(train.names), args.latent, args.hidden)
        hiding = None if name == "VAE, nothing more hidden" else hide_more
        fitted = runs.fit(args, vae.model, vae.guide, train.x, transform=hiding)
        histories[name] = fitted.history
        found[name] = by_vae(vae, test.x, test.complete, args.draws)
        print(f"{name}: {fitted.seconds:.1f} s", flush=True)

    rows = {name: evaluate(imputed, test) for name, imputed in found.items()}
    covered = {name: coverage(imputed, test.complete, test.x.isnan()) for name, imputed in found.items()}
    report = results.table(f"{int(test.x.isnan().sum())} hidden entries", rows, COLUMNS, NOTES)
    print(f"\n{report}\n")
    shares = {name: shares.tolist() for name, shares in covered.items()}
    summary = {"methods": rows, "levels": LEVELS.tolist(), "coverage": shares, "histories": histories}
    figures = pictures.draw(test, found[BEST], covered, rows)
    names = {"dims": {"x": ["measurement"]}, "coords": {"measurement": test.names}}
    tree = results.tree(vaes[BEST], test.x[:50], draws=args.draws, seed=args.seed, **names)
    dims = ("chain", "draw", "obs", "measurement")
    tree["imputed"] = xr.DataTree(xr.Dataset({"x": (dims, found[BEST].draws[None, :, :50].numpy())}))
    results.save(args, summary, figures, {"imputation": tree}, report)


if __name__ == "__main__":
    main(args)
