"""The time of a step on a GPU: ours compared with plain Pyro, and with NumPyro where it is installed.

The data have MNIST's shape and random pixels, on which the time does not depend. Contestants take turns. Each time is
the median over rounds of some hundred steps, between two synchronizations. The share of the card is that of the
arithmetic of the products, three times that of the forward pass, in the time of a step, in ``--peak`` TFLOP/s.

``python tests/cuda_benchmark.py``; ``--device cpu --rows 64 --rounds 1 --steps 2`` shows that it runs.
"""

import argparse
import statistics
import time
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors

LATENT, PIXELS, HIDDEN = 20, 784, 400


class Mlp:
    """784-400-20, of Kingma and Welling."""

    name = "MLP 784-400-20"
    flops = 2 * (PIXELS * HIDDEN + HIDDEN * 2 * LATENT + LATENT * HIDDEN + HIDDEN * PIXELS)  # forward, for each datum

    @staticmethod
    def encoder(in_features, out_features):
        return networks.mlp([HIDDEN], nn.ReLU)(in_features, out_features)

    decoder = encoder


class Convolutional:
    """Two convolutions of stride 2, and their transposes."""

    name = "convolutional 1-32-64-20"
    flops = 2 * 2 * (32 * 14 * 14 * 16 + 64 * 7 * 7 * 32 * 16 + 64 * 7 * 7 * 3 * LATENT // 2)

    @staticmethod
    def encoder(in_features, out_features):
        layers = nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(), nn.Flatten()
        return nn.Sequential(nn.Unflatten(-1, (1, 28, 28)), *layers, nn.Linear(64 * 49, out_features))

    @staticmethod
    def decoder(in_features, out_features):
        layers = nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1), nn.Flatten()
        return nn.Sequential(nn.Linear(in_features, 64 * 49), nn.ReLU(), nn.Unflatten(-1, (64, 7, 7)), *layers)


def ours(case, x, batch_size, compile):
    """Return a function that trains for some steps, and how it did."""
    torch.manual_seed(0)
    encoder = guides.DiagonalNormal(PIXELS, LATENT, case.encoder)
    decoder = likelihoods.Bernoulli(LATENT, PIXELS, case.decoder)
    vae = pv.VAE(priors.StandardNormal(LATENT), encoder, decoder).to(x.device)
    per_epoch = len(x) // batch_size

    def seconds(steps):
        """Time of a step in the later epochs, after captures and compilers; the metrics are read in each."""
        ends, epochs = [], max(6, 2 * steps // per_epoch)
        options = {"epochs": epochs, "batch_size": batch_size, "compile": compile, "lr": 1e-3, "progress": False}
        options["callbacks"] = [lambda epoch: ends.append(now(x.device))]
        fitted = pv.fit(vae.model, vae.guide, x[: per_epoch * batch_size], **options)
        later = ends[epochs // 2 :]
        times = [(end - begin) / per_epoch for begin, end in pairwise(later)]
        return statistics.median(times), fitted.engine

    return seconds


def plain_pyro(case, x, batch_size):
    """Model and guide of a tutorial, by ``SVI.step``."""
    torch.manual_seed(0)
    encoder = case.encoder(PIXELS, 2 * LATENT).to(x.device)
    decoder = case.decoder(LATENT, PIXELS).to(x.device)
    loc, scale = x.new_zeros(LATENT), x.new_ones(LATENT)

    def model(rows):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(rows)):
            z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z), validate_args=False).to_event(1), obs=rows)

    def guide(rows):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(rows)):
            mean, log_scale = encoder(rows).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))

    svi = SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO())

    def seconds(steps):
        pyro.clear_param_store()
        for _ in range(10):
            svi.step(x[:batch_size])
        start = now(x.device)
        for number in range(steps):
            first = number * batch_size % (len(x) - batch_size + 1)
            svi.step(x[first : first + batch_size])
        return (now(x.device) - start) / steps, "SVI.step"

    return seconds


def numpyro(case, x, batch_size):
    """The same MLP in NumPyro, all steps in one ``lax.scan``; ``None`` where it is not installed."""
    try:
        import jax
        import numpyro.distributions as ndist
        from jax import numpy as jnp
        from numpyro import module, plate, sample
        from numpyro.infer import SVI as JaxSVI
        from numpyro.infer import Trace_ELBO as JaxELBO
        from numpyro.optim import Adam as JaxAdam
    except ImportError:
        return None
    if case is not Mlp:
        return None
    from jax.example_libraries import stax

    def network(outputs):
        return stax.serial(stax.Dense(HIDDEN), stax.Relu, stax.Dense(outputs))

    def model(rows):
        decode = module("decoder", network(PIXELS), (len(rows), LATENT))
        with plate("data", len(rows)):
            z = sample("z", ndist.Normal(jnp.zeros(LATENT), 1.0).to_event(1))
            sample("x", ndist.Bernoulli(logits=decode(z)).to_event(1), obs=rows)

    def guide(rows):
        encode = module("encoder", network(2 * LATENT), (len(rows), PIXELS))
        mean, log_scale = jnp.split(encode(rows), 2, -1)
        with plate("data", len(rows)):
            sample("z", ndist.Normal(mean, jnp.exp(log_scale)).to_event(1))

    svi, data = JaxSVI(model, guide, JaxAdam(1e-3), JaxELBO()), jnp.asarray(x.cpu().numpy())
    batches = data[: len(data) // batch_size * batch_size].reshape(-1, batch_size, PIXELS)

    @jax.jit
    def run(state, numbers):
        return jax.lax.scan(lambda state, number: svi.update(state, batches[number]), state, numbers)

    def seconds(steps):
        numbers = jnp.arange(steps) % len(batches)
        state = svi.init(jax.random.PRNGKey(0), batches[0])
        jax.block_until_ready(run(state, numbers))
        start = time.perf_counter()
        jax.block_until_ready(run(state, numbers))
        return (time.perf_counter() - start) / steps, f"one lax.scan on {jax.devices()[0].platform}"

    return seconds


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measured(case, x, batch_size, rounds, steps, peak):
    """Print a table of one case."""
    contestants = {
        "ours": ours(case, x, batch_size, None),
        "ours, compile=True": ours(case, x, batch_size, True),
        "plain Pyro": plain_pyro(case, x, batch_size),
        "NumPyro": numpyro(case, x, batch_size),
    }
    print(f"\n{case.name}, batch {batch_size}: milliseconds of a step, and the share of {peak} TFLOP/s")
    found: dict[str, list[float]] = {}
    how = {}
    for _ in range(rounds):
        for name, seconds in contestants.items():
            if seconds is not None:
                pyro.clear_param_store()
                time_of_step, how[name] = seconds(steps)
                found.setdefault(name, []).append(time_of_step)
    for name, times in found.items():
        median = statistics.median(times)
        share = 3 * case.flops * batch_size / max(median, 1e-12) / (peak * 1e12)
        spread = f"{1e3 * min(times):.3f} to {1e3 * max(times):.3f}"
        print(f"  {name:20} {1e3 * median:8.3f} ({spread})  {share:6.1%}  {how[name]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--peak", type=float, default=67.0, help="TFLOP/s of the card in float32, 67 of an H200")
    given = parser.parse_args()
    device = torch.device(given.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, products in {torch.get_float32_matmul_precision()} precision")
    generator = torch.Generator("cpu").manual_seed(0)
    x = (torch.rand(given.rows, PIXELS, generator=generator) < 0.5).float().to(device)
    for case in (Mlp, Convolutional):
        for batch_size in given.batches:
            measured(case, x, min(batch_size, given.rows), given.rounds, given.steps, given.peak)


if __name__ == "__main__":
    main()
