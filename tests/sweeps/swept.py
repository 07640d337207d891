"""What the sweeps of the tests fit; worker processes import this module by the path of the tests."""

import os
import signal
from pathlib import Path

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors

X = pv.datasets.two_gaussians(150, seed=0).x
TRAINING, VALIDATION = X[:100], X[100:]
OPTIONS = {"epochs": 5, "batch_size": 50, "compile": False, "num_samples": 10, "every_seconds": 1e-6, "workers": 2}


class Follow:
    """A callback that notes the process of each epoch, and kills it once, in the middle of a run."""

    def __init__(self, folder, name, kills):
        self.path, self.kills = Path(folder) / name, kills

    def __call__(self, epoch):
        with self.path.open("a") as file:
            file.write(f"{os.getpid()} {epoch.number}\n")
        if self.kills and epoch.number == 3:
            marker = self.path.with_suffix(".killed")
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)


def make_vae(latent, lr, **options):
    """A small VAE with a learning rate."""
    net = networks.mlp([4])
    encoder, decoder = guides.DiagonalNormal(2, latent, net), likelihoods.Normal(latent, 2, net)
    return pv.VAE(priors.StandardNormal(latent), encoder, decoder), {"lr": lr, **options}


def make_followed(folder, victim=None):
    """Return a function ``make`` whose runs note their epochs in a folder; the victim's process is killed once."""

    def make(latent, lr):
        callback = Follow(folder, f"latent {latent}, lr {lr}", (latent, lr) == victim)
        return make_vae(latent, lr, callbacks=[callback])

    return make


def processes_by_epoch(folder, name):
    """Return the processes of a run, in order, and the epochs at whose end each was."""
    found = {}
    for line in (Path(folder) / name).read_text().splitlines():
        process, epoch = line.split()
        found.setdefault(process, []).append(int(epoch))
    return list(found.values())
