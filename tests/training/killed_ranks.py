"""Training runs on several ranks, with checkpoints."""

import hashlib

import pyro
import torch
from killed_runs import continuous, discrete, noisy

import pyro_vae as pv
from pyro_vae import schedules

X, HELD_OUT = pv.datasets.two_gaussians(50, seed=0).x, pv.datasets.two_gaussians(20, seed=1).x
VARIANTS = {"continuous": continuous, "discrete": discrete}


def trained(folder, epochs, variant="continuous", every_steps=2, data=X, **others):
    """Train with random numbers in rows, networks and a transform; return history, steps and a checksum."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    model, guide, options = VARIANTS[variant]()
    options |= {"lr": schedules.decayed(1e-2, steps=24), "transform": noisy, "clip_norm": 5.0, "seed": 3}
    checkpoints = None if folder is None else pv.Checkpoints(folder, every_steps=every_steps)
    fitted = pv.fit(
        model, guide, data, epochs=epochs, batch_size=20, validation=HELD_OUT, checkpoints=checkpoints,
        **options | others,
    )  # fmt: skip
    return dict(fitted.history), fitted.steps, checksum(pyro.get_param_store().values())


def checksum(tensors):
    """A number of the bits of tensors."""
    content = b"".join(tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()
