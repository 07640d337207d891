"""The script whose ranks are measured: it trains a VAE on images in turns, or for a held-out ELBO.

It runs under ``python`` and under ``torchrun``. ``fit`` trains by ``pyro_vae.fit``, as a user would; ``ddp`` trains the
same networks by hand, under ``DistributedDataParallel``; ``sums`` adds up tensors over ranks and trains nothing.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, parallel, priors

HIDDEN, LATENT = 400, 20
EPOCHS = 10**6  # of a run in turns, which is ended by its parent
COMPILE = {"choose": None, "yes": True, "no": False}


class Turns:
    """The turns of this rank: it waits until the parent makes the file of a turn, and notes the times of each one."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.number = folder, 0
        self.file = (folder / f"rank-{rank}.jsonl").open("a")
        self.started = self._now()

    def __call__(self, _: Any = None, **others: float) -> bool:
        """End a turn, note its seconds and ``others``, and wait for the next one; return whether it was the last."""
        wall, processor = (after - before for after, before in zip(self._now(), self.started, strict=True))
        self.file.write(json.dumps({"wall": wall, "processor": processor} | others) + "\n")
        self.file.flush()
        self.number += 1
        while not (self.folder / f"turn-{self.number}").exists():
            if (self.folder / "end").exists():
                return True
            time.sleep(0.005)
        self.started = self._now()
        return False

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def vae(args: argparse.Namespace, features: int) -> pv.VAE:
    torch.manual_seed(args.seed)
    network = networks.mlp([HIDDEN])
    encoder = guides.DiagonalNormal(features, LATENT, network)
    return pv.VAE(priors.StandardNormal(LATENT), encoder, likelihoods.Bernoulli(LATENT, features, network))


def by_fit(args: argparse.Namespace, x: Tensor) -> None:
    """Train by ``fit``, each epoch a turn."""
    model = vae(args, x.shape[1])
    pv.fit(
        model.model, model.guide, x, epochs=EPOCHS, batch_size=args.batch, lr=1e-3, transform=datasets.resample,
        compile=COMPILE[args.compile], progress=False,
        callbacks=[parallel.on_every_rank(Turns(args.folder, parallel.rank()))],
    )  # fmt: skip


class Loss(nn.Module):
    """The negative ELBO of a batch, by hand."""

    def __init__(self, features: int, hidden: int, latent: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, features))

    def forward(self, x: Tensor) -> Tensor:
        loc, log_scale = self.encoder(x).chunk(2, dim=-1)
        noise = torch.randn_like(loc)
        z = loc + log_scale.exp() * noise
        rate = (z**2 / 2 - noise**2 / 2 - log_scale).sum()
        return rate + binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")


def by_ddp(args: argparse.Namespace, x: Tensor) -> None:
    """Train by hand: each rank takes every K-th row of a batch."""
    rank, size, network = join(), dist.get_world_size(), Loss(x.shape[1], HIDDEN, LATENT)
    torch.manual_seed(args.seed)
    loss_of: nn.Module = DistributedDataParallel(network) if size > 1 else network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    turns, random = Turns(args.folder, rank), np.random.default_rng(args.seed)
    ended = False
    while not ended:
        for index in torch.from_numpy(random.permutation(len(x))).split(args.batch):
            loss = loss_of(datasets.resample(x[index[rank::size]]))
            optimizer.zero_grad()
            loss.backward()
            if not loss.isfinite():
                raise FloatingPointError("the loss is not finite")
            optimizer.step()
        ended = turns()


def sums(args: argparse.Namespace, x: Tensor) -> None:
    """Add up few numbers over ranks, and as many as the network has, in turns; note the shortest time of each."""
    rank, parameters = join(), vae(args, x.shape[1]).parameters()
    tensors = {"few": torch.ones(8), "all": torch.ones(sum(parameter.numel() for parameter in parameters))}
    turns, ended = Turns(args.folder, rank), False
    while not ended:
        found = {name: min(_seconds(tensor) for _ in range(50)) for name, tensor in tensors.items()}
        ended = turns(**found)


def _seconds(tensor: Tensor) -> float:
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(tensor.fill_(1.0))
    return time.perf_counter() - started


def join() -> int:
    """Join the group of ranks, which is one process under ``python``."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank()


def held_out(args: argparse.Namespace, x: Tensor) -> None:
    """Train with some seeds, and write the held-out ELBO of each."""
    test = torch.from_numpy(np.load(args.data / "test.npy"))
    for seed in range(args.seeds):
        args.seed = seed
        model = vae(args, x.shape[1])
        fitted = pv.fit(
            model.model, model.guide, x, epochs=args.epochs, batch_size=args.batch, lr=1e-3, seed=seed,
            transform=datasets.resample, compile=COMPILE[args.compile], progress=False,
        )  # fmt: skip
        elbo = pv.evaluate(model.model, model.guide, datasets.binarize(test), seed=0)["elbo"]
        if parallel.rank() == 0:
            with (args.folder / f"elbo-{parallel.num_ranks()}.jsonl").open("a") as file:
                file.write(json.dumps({"seed": seed, "elbo": elbo, "seconds": fitted.seconds}) + "\n")


TASKS: dict[str, Callable[[argparse.Namespace, Tensor], None]] = {
    "fit": by_fit,
    "ddp": by_ddp,
    "sums": sums,
    "elbo": held_out,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("folder", type=Path, help="of the files of the turns")
    parser.add_argument("--data", type=Path, required=True, help="folder of x.npy and test.npy")
    parser.add_argument("--batch", type=int, default=1024, help="rows of a step, of all ranks together")
    parser.add_argument("--compile", choices=COMPILE, default="choose")
    parser.add_argument("--epochs", type=int, default=3, help="of the held-out ELBO")
    parser.add_argument("--seeds", type=int, default=4, help="of the held-out ELBO")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    x = torch.from_numpy(np.load(args.data / "x.npy"))
    TASKS[args.task](args, x)


if __name__ == "__main__":
    main()
