"""
Watch a run in TensorBoard
==========================

A callback of `pv.fit` writes the history of each epoch to TensorBoard, and at the end a picture of samples. The model
is the VAE of `digits.py`. Look at it with `tensorboard --logdir results/watch_training`. Needs the extra `examples`.
"""

import argparse
import math
from typing import Any

import common
import matplotlib.pyplot as plt
import pyro
from torch.utils.tensorboard import SummaryWriter

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "watch_training", epochs=60)
    parser.add_argument("--every", type=common.positive_int, default=1, help="epochs from one entry to the next")
    return parser.parse_args()


# 1. A callback: it gets the epoch, with the ELBO and its terms in training and on held-out digits.
class WriteHistory:
    """Write the history of every so many epochs."""

    def __init__(self, writer: SummaryWriter, every: int):
        self.writer, self.every = writer, every

    def __call__(self, epoch: pv.training.loop.Epoch) -> None:
        if epoch.number % self.every == 0:
            for name, value in epoch.record.items():
                self.writer.add_scalar(name, value, epoch.steps)


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, shape = common.load_binary_images("digits")
    network = networks.mlp([64])
    vae = pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(64, 2, network), likelihoods.Bernoulli(2, 64, network))
    with SummaryWriter(args.out) as writer:
        # 2. Train with the callback.
        options: dict[str, Any] = {
            "epochs": args.epochs,
            "batch_size": 100,
            "lr": 3e-3,
            "validation": test.x,
            "seed": args.seed,
        }
        fitted = pv.fit(vae.model, vae.guide, train.x, callbacks=[WriteHistory(writer, args.every)], **options)
        # 3. Add a picture of samples.
        figure, ax = plt.subplots(layout="constrained")
        pv.plots.samples(vae.generate, shape, ax=ax)
        writer.add_figure("samples", figure, fitted.steps, close=False)
    found = {"history": fitted.history, "entries": math.floor(args.epochs / args.every)}
    common.save(args, found, {"samples": figure}, {})


if __name__ == "__main__":
    main(parse_args())
