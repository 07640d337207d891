"""
One script on one process or several
====================================

The same script runs under `python` and under `torchrun`. Each rank trains on its share of every batch and evaluates its
share of the held-out rows, and all ranks end with the same parameters and the same numbers:

    python examples/several_ranks.py
    torchrun --nproc-per-node=2 examples/several_ranks.py
"""

import argparse

import common
import pyro

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, parallel, priors


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "several_ranks", epochs=60)
    parser.add_argument("--batch-size", type=common.positive_int, default=100, help="rows of a step, of all ranks")
    parser.add_argument("--draws", type=common.positive_int, default=100, help="draws of each row for log p(x)")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Load the data and build the model, on each rank alike.
    train, test, _ = common.load_binary_images("digits")
    network = networks.mlp([64])
    vae = pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(64, 2, network), likelihoods.Bernoulli(2, 64, network))
    # 2. Train: each rank computes the gradients of its share of every batch, which are added up.
    options = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": 3e-3, "seed": args.seed}
    fitted = pv.fit(vae.model, vae.guide, train.x, **options)
    # 3. Evaluate: each rank takes a share of the rows, and all receive the whole result.
    elbo = pv.evaluate(vae.model, vae.guide, test.x)["elbo"]
    log_p = pv.log_evidence(vae.model, vae.guide, test.x, num_samples=args.draws, seed=args.seed).log_evidence
    # 4. All ranks have the same parameters and results; one of them prints and writes files.
    if parallel.rank() == 0:
        error = common.standard_error(log_p)
        print(f"{parallel.num_ranks()} rank(s), {fitted.steps} steps in {fitted.seconds:.1f} s")
        print(f"held-out ELBO {elbo:.2f}, log p(x) {float(log_p.mean()):.2f} ± {error:.2f} nats per image")
        found = {"ranks": parallel.num_ranks(), "steps": fitted.steps, "elbo": elbo, "log_p": float(log_p.mean())}
        common.save(args, found | {"error": error}, {}, {})


if __name__ == "__main__":
    main(parse_args())
