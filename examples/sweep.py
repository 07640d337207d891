"""
A sweep: how many latents, how many hidden units, which learning rate?
=======================================================================

Optuna proposes settings by the held-out ELBO of earlier ones, and stops those early that are worse than others. Each
settings is trained with two seeds, in two processes. The table compares them in pairs with the best, with standard
errors. A sweep that is killed resumes when it is started again. Needs the extra `optuna`.
"""

import argparse

import common
import optuna

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "sweep", epochs=40)
    parser.add_argument("--settings", type=common.positive_int, default=12, help="settings to train")
    parser.add_argument("--workers", type=common.positive_int, default=2, help="processes")
    return parser.parse_args()


# 1. What to fit with some settings: a VAE, and options of `pv.fit`.
def make(latent: int, hidden: int, lr: float) -> tuple[pv.VAE, dict[str, float]]:
    network = networks.mlp([hidden])
    encoder, decoder = guides.DiagonalNormal(64, latent, network), likelihoods.Bernoulli(latent, 64, network)
    return pv.VAE(priors.StandardNormal(latent), encoder, decoder), {"lr": lr}


def main(args: argparse.Namespace) -> None:
    train, test, _ = common.load_binary_images("digits")
    # 2. The space: ranges, and how small numbers are drawn as often as large ones.
    space = {
        "latent": pv.sweeps.integers(1, 16, log=True),
        "hidden": pv.sweeps.integers(16, 128, log=True),
        "lr": pv.sweeps.log_uniform(3e-4, 3e-2),
    }
    # 3. The sweep. Settings that are worse than three quarters of the others after an eighth of the epochs end there.
    result = pv.sweep(
        make,
        space,
        train.x,
        validation=test.x,
        folder=args.out / "runs",
        engine="optuna",
        search=optuna.samplers.TPESampler(seed=args.seed),
        early_stopping=max(1, args.epochs // 8),
        num_settings=args.settings,
        seeds=2,
        workers=args.workers,
        epochs=args.epochs,
        batch_size=100,
    )
    # 4. The table, the best first, the picture, and everything in one file.
    rows = {str(number): row for number, row in enumerate(result.table.to_dict("records"), 1)}
    columns = {"latent": "{latent}", "hidden": "{hidden}", "lr": "{lr:.4f}", "ELBO": "{elbo:.3f}"}
    columns |= {"± over seeds": "{standard_error:.3f}", "to the best": "{difference:.3f} ± {difference_error:.3f}"}
    text = common.table("nats per image", rows, columns, repr(result))
    print(text)
    figure = pv.plots.sweep(result).get_figure(root=True)
    assert figure is not None
    common.save(args, {"rows": rows}, {"sweep": figure}, {"sweep": result.to_datatree()}, text)


if __name__ == "__main__":
    main(parse_args())
