"""The problems of the contest: a model, its training and a held-out target, without torch or JAX."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cases import MIXTURE, MNIST, Case
from inputs import images, read, write

FULL_BATCH_STEPS = 100  # of an epoch, if each step is on all data


@dataclass(frozen=True)
class Problem(Case):
    """A model that is trained until its log p(x) of held-out data is above a target, with settings for each epoch."""

    target: float = 0.0  # nats per datum: log p(x), or if there is a ``truth`` its difference from the true log-density
    goal: str = ""  # the target in words
    epochs: int = 100  # of the learning rate's schedule, after which a run ends
    hold: float = 0.5  # share of the epochs before the learning rate falls
    warm_up: int = 0  # epochs in which the weight of the KL rises to 1
    cooling: float = 0.0  # decay of the guide's temperature per step, down to ``coldest``
    coldest: float = 0.5
    first_check: int = 0  # epochs before the target is checked
    every: int = 4  # epochs from one check to the next
    held_out: int = 2000  # data
    draws: int = 1000  # of q(z|x) for each of them; 0 if log p(x) is a sum over the states
    first_draws: int = 50  # a check ends after so many, if log p(x) from them is more than ``margin`` below the target
    margin: float = 1.0

    @property
    def steps_of_epoch(self) -> int:
        return FULL_BATCH_STEPS if self.full_batch else self.rows // self.batch_size

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, from 0: ``lr`` at first, then half a cosine to a hundredth of it."""
        fallen = min(max((epoch / self.epochs - self.hold) / (1 - self.hold), 0.0), 1.0)
        return self.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fallen)))

    def kl_weight(self, epoch: int) -> float:
        """Return the weight of the KL in an epoch."""
        return min((epoch + 0.5) / self.warm_up, 1.0) if self.warm_up else 1.0

    def temperature(self, epoch: int) -> float:
        """Return the temperature of a relaxed guide in an epoch."""
        steps = epoch * self.steps_of_epoch
        return max(min(self.coldest, self.temperatures[1]), self.temperatures[1] * math.exp(-self.cooling * steps))

    def has_check(self, epoch: int) -> bool:
        """Whether the target is checked after so many epochs."""
        return epoch >= self.first_check and (epoch % self.every == 0 or epoch == self.epochs)


def _problem(case: Case, **settings: Any) -> Problem:
    return Problem(**{**{name: getattr(case, name) for name in case.__dataclass_fields__}, **settings})


PROBLEMS = {
    problem.name: problem
    for problem in (
        _problem(
            MIXTURE, name="mixture", title="Mixture of two Gaussians, one bit, enumerated, 1000 points, full batch",
            guide="bernoulli", target=-0.01, goal="log p(x) of 5000 new points within 0.01 nats of the truth",
            epochs=40, every=1, held_out=5000, draws=0,
        ),
        _problem(
            MNIST, name="mnist", title="MNIST, resampled, 784-400-400-50, SiLU, batch 128", hidden=(400, 400),
            latent=(50,), activation="silu", lr=2e-3, warm_up=10, first_check=40, epochs=80, target=-87.0,
            goal="log p(x) of 2000 test images above -87.0 nats",
        ),
        _problem(
            MNIST, name="gumbel", title="MNIST, resampled, 20 × 10 Gumbel-softmax, 784-512-256-200, batch 128",
            hidden=(512, 256), latent=(20, 10), guide="gumbel", temperatures=(0.5, 1.0), cooling=3e-5, lr=2e-3,
            first_check=40, target=-89.0, goal="log p(x) of 2000 test images above -89.0 nats, with hard codes",
        ),
    )
}  # fmt: skip


def shortened(problem: Problem) -> Problem:
    """Return a problem of seconds, with a target that an epoch can reach, to test the contest, not the speed."""
    if problem.full_batch:
        return replace(problem, rows=100, batch_size=100, held_out=50, lr=5e-2, target=-1.0, epochs=2)
    sizes = {"rows": 200, "batch_size": 20, "hidden": (32,) * len(problem.hidden), "latent": (3,) * len(problem.latent)}
    judged = {"held_out": 20, "draws": 20, "first_draws": 5, "first_check": 0, "every": 2, "target": -239.0}
    return replace(problem, **sizes, **judged, lr=5e-3, epochs=20, warm_up=min(problem.warm_up, 1))


def write_inputs(problem: Problem, folder: Path, mnist: Path | None = None) -> None:
    """Write training data, held-out data and initial weights; output biases begin at the log-odds of the mean image.

    Fixed numbers standardize the inputs of a network, ``(inputs - loc) / scale``: the mean image those of the encoder,
    the moments of one-hot codes under the prior those of the decoder.
    """
    write(problem, folder, mnist)
    given = read(problem, folder)
    weights = dict(given.weights)
    random = np.random.default_rng(1)
    if problem.binarized:
        mean = given.x.mean(0) / 255
        weights[f"decoder.{len(problem.hidden)}.bias"] = _logit(np.clip(mean, 1e-3, 1 - 1e-3)).astype(np.float32)
        weights["encoder.loc"] = mean.astype(np.float32)
        grey = images("test", problem.held_out, mnist) / 255
        held_out = (random.random(grey.shape) < grey).astype(np.float32)
        truth = None
    else:
        from pyro_vae import datasets

        points = datasets.two_gaussians(problem.held_out, seed=1)
        held_out, truth = points.x.numpy(), points.log_prob(points.x).numpy()
    if problem.guide == "gumbel":
        share = 1 / problem.latent[-1]
        weights["decoder.loc"] = np.float32(share)
        weights["decoder.scale"] = np.float32(math.sqrt(share * (1 - share)))
    np.savez(folder / "weights.npz", **weights)
    np.savez(folder / "held_out.npz", x=held_out, **({} if truth is None else {"truth": truth}))


def _logit(share: np.ndarray) -> np.ndarray:
    return np.log(share) - np.log1p(-share)
