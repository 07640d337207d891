"""Load the models of a folder in a new process, and print numbers that they compute from their data."""

import json
import sys
from pathlib import Path

import torch

import pyro_vae as pv


def figures(vae, x):
    """Return draws and log-densities, which two processes compare to the bit."""
    torch.manual_seed(0)
    q, p = vae.encode(x), vae.prior()
    z = q.sample()
    numbers = (z, q.log_prob(z), p.log_prob(z), vae.decode(z).log_prob(x), p.sample((3,)))
    return [number.double().flatten().tolist() for number in numbers]


if __name__ == "__main__":
    torch.set_num_threads(1)
    files = sorted(Path(sys.argv[1]).glob("*.pt"))
    print(json.dumps({path.name: figures(pv.VAE.load(path), torch.load(f"{path}.x")) for path in files}))
