"""Run one function on many rows, in a process of its own, and print its peak of memory and its processor time.

``python large_data.py FUNCTION PROGRAM ROWS`` prints JSON: megabytes above those of the data, seconds, and any error.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.tables import Table

HIDDEN = [256]  # a layer for all of a million rows would take a GiB


def memory(name):
    """Megabytes of this process: now, ``"VmRSS"``, or their peak, ``"VmHWM"``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


def vae(features, rows):
    x = torch.empty(rows, features)
    for block in x.split(10_000):  # without large temporary tensors, which would count in the peak before the start
        block.normal_()
    network = networks.mlp(HIDDEN)
    encoder, decoder = guides.DiagonalNormal(features, 1, network), likelihoods.Normal(1, features, network)
    pair = pv.VAE(priors.StandardNormal(1), encoder, decoder)
    return pair.model, pair.guide, x


def table(rows):
    random = np.random.default_rng(0)
    frame = pd.DataFrame({
        "normal": random.normal(size=rows),
        "positive": random.gamma(2.0, size=rows),
        "class": pd.Categorical.from_codes(random.integers(0, 4, rows), list("pqrs")),
        "count": random.poisson(3.0, size=rows),
    })  # fmt: skip
    frame.loc[::7, "normal"] = np.nan
    found = Table.from_frame(frame)
    pair = found.vae(1, HIDDEN)
    return pair.model, pair.guide, *found.data


def mixture(rows):
    _, _, x = vae(20, rows)
    loc, network = torch.randn(5, 20), networks.mlp(HIDDEN)(20, 5)

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(5) / 5))
            pyro.sample("x", dist.Normal(loc[k], 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=network(x)))

    return model, guide, x


def shared(rows):
    """One latent of all data next to those of each datum."""
    _, _, x = vae(2, rows)
    decode, encode = (networks.mlp([32])(2, size) for size in (2, 4))  # all rows run together

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z) + mu, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encode", encode)
        loc = pyro.param("loc", torch.zeros(2))
        pyro.sample("mu", dist.Normal(loc, 0.01).to_event(1))
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            found = encode(x)
            pyro.sample("z", dist.Normal(found[..., :2], found[..., 2:].exp()).to_event(1))

    return model, guide, x


class Rows(torch.utils.data.Dataset):
    """Rows that are read one by one."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return self.x[row]


def data_set(rows):
    model, guide, x = vae(20, rows)
    return model, guide, Rows(x)


def mapped(rows):
    """Numbers in float64 in a file, which become float32 when they are read."""
    model, guide, x = vae(20, rows)
    path = Path(sys.argv[4]) / "x.npy"
    file = np.lib.format.open_memmap(path, "w+", np.float64, (rows, 20))
    for start in range(0, rows, 10_000):
        file[start : start + 10_000] = x[start : start + 10_000].numpy()
    del file, x
    return model, guide, np.load(path, mmap_mode="r")


PROGRAMS = {
    "normal, 2 columns": lambda rows: vae(2, rows),
    "normal, 20 columns": lambda rows: vae(20, rows),
    "mixture": mixture,
    "table": table,
    "global latent": shared,
    "data set": data_set,
    "mapped file": mapped,
}
QUICK = {"progress": False}
FUNCTIONS = {
    "evaluate": lambda model, guide, *x: pv.evaluate(model, guide, x),
    "fit": lambda model, guide, *x: pv.fit(
        model, guide, x, epochs=1, batch_size=10_000, validation=x, **QUICK
    ),
    "log_evidence": lambda model, guide, *x: pv.log_evidence(model, guide, *x, num_samples=2, **QUICK),
    "exact.log_evidence": lambda model, guide, *x: pv.exact.log_evidence(model, *x, **QUICK),
    "exact.posterior": lambda model, guide, *x: pv.exact.posterior(model, *x, **QUICK).mean,
    "exact.elbo": lambda model, guide, *x: pv.exact.elbo(model, guide, *x, **QUICK),
    "decompose": lambda model, guide, *x: pv.decompose(model, guide, *x, num_samples=2, **QUICK),
    "inference_gap": lambda model, guide, *x: pv.inference_gap(
        model, guide, *x, steps=2, num_particles=2, num_samples=2, tolerance=None, **QUICK
    ),
    "inspect": lambda model, guide, *x: pv.inspect(
        model, guide, *x, num_samples=2, num_simulations=20, max_rows=200, max_refined=10, **QUICK
    ),
    "report": lambda model, guide, *x: pv.report(
        Path(sys.argv[4]) / "page.html", model, guide, *x, num_samples=2, num_simulations=20, max_rows=200,
        max_refined=10, **QUICK,
    ),
}  # fmt: skip


def main():
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30,) * 2)
    function, program, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
    model, guide, *x = PROGRAMS[program](rows)
    start, begun = memory("VmRSS"), time.process_time()
    FUNCTIONS[function](model, guide, *x)
    print(json.dumps({"megabytes": memory("VmHWM") - start, "seconds": time.process_time() - begun}))


if __name__ == "__main__":
    main()
