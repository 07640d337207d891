"""Kill training runs at random moments, and resume them in new processes, until one comes to its end.

:func:`kill_and_resume` trains in ``folder/whole`` without a kill, and in ``folder/killed 1`` and so on with kills.
"""

import os
import random
import signal
import time
import traceback

import pyro
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae import baselines, guides, likelihoods, networks, objectives, priors, schedules
from pyro_vae.compilation.graph import Graph
from pyro_vae.handlers import WeightKL


def noisy(x):
    """A transform that draws random numbers."""
    return x + 0.01 * torch.randn_like(x)


def normalized(in_features, out_features):
    """A network with buffers that change in each step."""
    return nn.Sequential(nn.Linear(in_features, 8, False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, out_features))


def continuous(**options):
    """BatchNorm, two schedules, gradients clipped."""
    vae = pv.VAE(
        priors.StandardNormal(1), guides.DiagonalNormal(2, 1, networks.mlp([8])), likelihoods.Normal(1, 2, normalized)
    )
    beta = torch.tensor(0.0)
    weight = WeightKL(beta)
    return weight(vae.model), weight(vae.guide), {"schedules": {beta: schedules.linear(0.1, 1.0, 15)}, **options}


def uncompiled(make):
    """Capture the step, and run its graph without compiling it, which is slow."""
    Graph.compile = lambda self, *inputs: None
    return make(compile=True)


def frozen(**options):
    """An encoder that is frozen for some epochs, and a decoder that is switched to evaluation mode."""
    model, guide, options = continuous(**options)
    vae = guide.args[1].__self__

    def freeze(epoch):
        vae.encoder.requires_grad_(not 2 <= epoch.number < 5)
        vae.decoder.train(epoch.number < 6)

    return model, guide, {"callbacks": [freeze], **options}


def discrete(**options):
    """A baseline with parameters, and modules that a function registers."""
    prior, decoder = priors.Bernoulli(2, learnable=True), likelihoods.Normal(2, 2, networks.linear())
    encoder = guides.Bernoulli(2, 2, networks.mlp([8]))

    def model(x):
        pyro.module("prior", prior)
        pyro.module("decoder", decoder)
        bias = pyro.param("bias", torch.zeros(2))
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", prior())
            pyro.sample("x", decoder(z + bias), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", encoder(pyro.subsample(x, event_dim=1)))

    elbo = objectives.ScoreFunction(baseline=baselines.NeuralBaseline(2, networks.mlp([4])))
    return model, guide, {"elbo": elbo, **options}


VARIANTS = {
    "continuous": continuous,
    "discrete": discrete,
    "frozen": frozen,
    "captured": lambda: uncompiled(continuous),
    "frozen, captured": lambda: uncompiled(frozen),
    "compiled": lambda: continuous(compile=True),
}


def train(variant, folder):
    """Run the training: mini-batches that do not divide the data, a checkpoint after every step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pyro.clear_param_store()
    x, held_out = pv.datasets.two_gaussians(50, seed=0).x, pv.datasets.two_gaussians(20, seed=1).x
    model, guide, options = VARIANTS[variant]()
    options |= {"lr": schedules.decayed(1e-2, steps=24), "transform": noisy, "clip_norm": 5.0, "seed": 3}
    checkpoints = pv.Checkpoints(folder, every_steps=1)
    pv.fit(model, guide, x, epochs=8, batch_size=20, validation=held_out, checkpoints=checkpoints, **options)


def forked(variant, folder):
    """Train in a forked process, which need not import anything, and return its process id."""
    if child := os.fork():
        return child
    try:
        train(variant, folder)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finished(child):
    """Wait for a process, and return whether it was not killed."""
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the run failed"
    return os.WIFEXITED(status)


def kill_and_resume(variant, folder, kills, seed):
    """Train once without kills, then in new folders until there were enough kills and the last run is finished.

    Return the number of kills, and how many runs were finished.
    """
    os.fsync = lambda file: None  # needed for a loss of power only: what a killed process has written is kept
    chance = random.Random(seed)
    train(variant, folder / "whole")  # in this process, so that the forked ones have all imports
    start = time.monotonic()
    assert finished(forked(variant, folder / "killed 0"))
    longest = time.monotonic() - start
    done = rounds = 0
    while done < kills:
        rounds += 1
        while True:
            child = forked(variant, folder / f"killed {rounds}")
            if done < kills:
                time.sleep(chance.uniform(0.0, longest))
                os.kill(child, signal.SIGKILL)
            if finished(child):
                break
            done += 1
    return done, rounds
