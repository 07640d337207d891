"""
A sweep with Optuna
===================

How many latent variables, how many hidden units, which learning rate? Optuna proposes them, and a callback of `pv.fit`
reports the held-out ELBO after each epoch, so that a trial that is worse than the median of the others ends early. The
best trials are printed as a table. Needs the extra `examples`.
"""

import argparse
from typing import Any

import common
import optuna
import pyro

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "sweep", epochs=40)
    parser.add_argument("--trials", type=common.positive_int, default=20, help="models to train")
    return parser.parse_args()


# 1. One trial: choose, train, and return the held-out ELBO.
def run_trial(
    trial: optuna.Trial, train: pv.datasets.Dataset, test: pv.datasets.Dataset, args: argparse.Namespace
) -> float:
    latent = trial.suggest_int("latent", 1, 16, log=True)
    hidden = trial.suggest_int("hidden", 16, 128, log=True)
    lr = trial.suggest_float("lr", 3e-4, 3e-2, log=True)
    network = networks.mlp([hidden])
    encoder, decoder = guides.DiagonalNormal(64, latent, network), likelihoods.Bernoulli(latent, 64, network)
    vae = pv.VAE(priors.StandardNormal(latent), encoder, decoder)

    # 2. A callback that returns True ends the run.
    def prune(epoch: pv.training.loop.Epoch) -> bool:
        trial.report(epoch.record["validation_elbo"], epoch.number)
        return trial.should_prune()

    options: dict[str, Any] = {
        "epochs": args.epochs,
        "batch_size": 100,
        "lr": lr,
        "validation": test.x,
        "seed": args.seed,
        "callbacks": [prune],
    }
    fitted = pv.fit(vae.model, vae.guide, train.x, **options)
    if fitted.stopped == "callback":
        raise optuna.TrialPruned
    return pv.evaluate(vae.model, vae.guide, test.x, num_samples=10, seed=args.seed)["elbo"]


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    train, test, _ = common.load_binary_images("digits")
    # 3. The study: proposals by a seeded sampler, and a pruner that needs five trials to compare with.
    sampler, pruner = optuna.samplers.TPESampler(seed=args.seed), optuna.pruners.MedianPruner(n_startup_trials=5)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    study.optimize(lambda trial: run_trial(trial, train, test, args), n_trials=args.trials)
    # 4. The best trials, and how many ended early.
    complete = sorted(
        study.get_trials(states=[optuna.trial.TrialState.COMPLETE]), key=lambda trial: trial.value or 0.0, reverse=True
    )
    rows = {f"trial {trial.number}": {"elbo": trial.value} | trial.params for trial in complete[:5]}
    columns = {"ELBO": "{elbo:.3f}", "latent": "{latent}", "hidden": "{hidden}", "lr": "{lr:.4f}"}
    pruned = len(study.trials) - len(complete)
    text = common.table("nats per image", rows, columns, f"{pruned} of {args.trials} trials ended early")
    print(text)
    common.save(args, {"trials": rows, "pruned": pruned}, {}, {}, text)


if __name__ == "__main__":
    main(parse_args())
