"""The cases that are measured: sizes and settings for all contestants, without torch or JAX."""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import numpy as np


@dataclass(frozen=True)
class Case:
    """A model, its data and its training."""

    name: str  # in the options
    title: str  # in the tables
    data: str  # "two_gaussians", "digits" or "mnist"
    rows: int  # a whole number of batches, so that all steps are equal
    features: int  # of a datum
    hidden: tuple[int, ...]  # units of the encoder's hidden layers; the decoder has them in reverse
    latent: tuple[int, ...]  # shape of z
    batch_size: int  # rows of a step
    check: int  # epochs of the run that compares the contestants
    check_rows: int  # rows of that run
    task: str = "train"  # or "evaluate" (log p(x) by importance weighting) or "export"
    activation: str = "relu"  # or "tanh" or "silu"
    guide: str = "normal"  # or "gumbel" (a relaxed one-hot) or "bernoulli", which is enumerated
    likelihood: str = "bernoulli"  # or "normal", with one learned scale
    lr: float = 1e-3  # of Adam
    particles: int = 1  # draws of each datum; several are importance-weighted
    temperatures: tuple[float, float] = (0.5, 0.67)  # of prior and guide, if they are relaxed
    mapped: bool = False  # whether the data stay in a file, whose pages are read when they are needed

    @property
    def full_batch(self) -> bool:
        return self.batch_size == self.rows

    @property
    def binarized(self) -> bool:
        """Whether pixels are bytes, which are sampled as 0 or 1 for each batch."""
        return self.data == "mnist"

    @property
    def bound(self) -> str:
        """Name of the negative loss; contestants are compared by losses of the same name."""
        if self.task == "export":
            return "mean square of the draws"
        return "elbo" if self.task == "train" and self.particles == 1 else "log p(x), K draws"

    @property
    def unit(self) -> str:
        return {"train": "step", "evaluate": "image-sample", "export": "draw"}[self.task]

    @property
    def encoder(self) -> list[tuple[int, int]]:
        """Sizes of the encoder's layers, inputs and outputs."""
        raw = prod(self.latent) * (2 if self.guide == "normal" else 1)
        return list(pairwise([self.features, *self.hidden, raw]))

    @property
    def decoder(self) -> list[tuple[int, int]]:
        return list(pairwise([prod(self.latent), *self.hidden[::-1], self.features]))

    @property
    def decoded(self) -> int:
        """Number of codes that are decoded in a step."""
        return 2 ** prod(self.latent) if self.guide == "bernoulli" else self.batch_size * self.particles


MIXTURE = Case(
    "mixture", "Mixture of two Gaussians, 1000 points, full batch, 2-32-1", "two_gaussians", rows=1000, features=2,
    hidden=(32,), latent=(1,), batch_size=1000, activation="tanh", likelihood="normal", lr=1e-2, check=50,
    check_rows=1000,
)  # fmt: skip
DIGITS = Case(
    "digits", "Digits of 8 × 8 pixels, 64-128-2, batch 100", "digits", rows=1500, features=64, hidden=(128,),
    latent=(2,), batch_size=100, activation="tanh", lr=3e-3, check=4, check_rows=1500,
)  # fmt: skip
MNIST = Case(
    "mnist-128", "MNIST 784-400-20, batch 128", "mnist", rows=468 * 128, features=784, hidden=(400,), latent=(20,),
    batch_size=128, check=1, check_rows=50 * 128,
)  # fmt: skip
VARIANTS = (
    replace(MNIST, name="mnist-1024", title="MNIST 784-400-20, batch 1024",
            rows=58 * 1024, batch_size=1024, check_rows=50 * 1024),
    replace(MNIST, name="gumbel", title="MNIST, Gumbel-softmax 20 × 10, 784-400-200, batch 128",
            guide="gumbel", latent=(20, 10)),
    replace(MNIST, name="importance", title="MNIST 784-400-20, importance-weighted K = 50, batch 20",
            rows=50 * 20, batch_size=20, particles=50, check_rows=50 * 20),
    replace(DIGITS, name="enumerated", title="Digits, 10 Bernoulli variables enumerated, 64-128-10, batch 100",
            guide="bernoulli", latent=(10,)),
    replace(MNIST, name="evidence", title="log p(x) of MNIST images, 784-400-20, 1000 draws each", task="evaluate",
            rows=100, batch_size=100, particles=1000, check_rows=100),
    replace(MIXTURE, name="export", task="export", particles=200, check=1,
            title="200 draws of 1000 points: a tree for ArviZ; z and x alone by Pyro's Predictive"),
)  # fmt: skip
CASES = {case.name: case for case in (MIXTURE, DIGITS, MNIST, *VARIANTS)}


def shortened(case: Case) -> Case:
    """Return a case of about a second, to test the benchmark; its times mean nothing."""
    batch = min(case.batch_size, 20)
    rows = batch if case.full_batch else 10 * batch
    latent = (4,) if case.guide == "bernoulli" else case.latent
    check = 10 if case.full_batch and case.task == "train" else 1
    sizes = {"rows": rows, "check_rows": rows, "batch_size": batch, "hidden": (8,), "latent": latent}
    return replace(case, **sizes, particles=min(case.particles, 10), check=check)


def initial_weights(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw weights ``(out, in)`` and biases of each layer as torch does, by names such as ``encoder.0.weight``."""
    random, weights = np.random.default_rng(seed), {}
    for part, layers in (("encoder", case.encoder), ("decoder", case.decoder)):
        for number, (inputs, outputs) in enumerate(layers):
            bound = inputs**-0.5
            weights[f"{part}.{number}.weight"] = random.uniform(-bound, bound, (outputs, inputs)).astype(np.float32)
            weights[f"{part}.{number}.bias"] = random.uniform(-bound, bound, outputs).astype(np.float32)
    if case.likelihood == "normal":
        weights["log_scale"] = np.zeros((), np.float32)
    return weights
