"""The judge: log p(x) of held-out data from the weights of any contestant, by plain PyTorch."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from handwritten import log_likelihood, network
from problems import Problem
from torch import Tensor
from torch.distributions import Normal, OneHotCategorical

Weights = dict[str, Tensor]
CHUNK = 2**24  # pixels that are scored at a time


class Judge:
    """Log p(x) of the held-out data of a problem, in nats per datum, minus the true log-density where it is known.

    The importance-weighted estimate is a lower bound in expectation (Burda et al. 2016, equation 8). Relaxed codes are
    replaced by hard ones. Each evaluation has the same random numbers, and leaves torch's own as they are.
    """

    def __init__(self, problem: Problem, folder: Path):
        self.problem = problem
        with np.load(folder / "held_out.npz") as file:
            self.x = torch.from_numpy(file["x"])
            self.truth = float(file["truth"].mean()) if "truth" in file else 0.0

    @torch.no_grad()
    def __call__(self, path: Path) -> float:
        """Return the value of the weights in a file; it is from fewer draws if the target is out of reach."""
        with np.load(path) as file:
            weights = {name: torch.from_numpy(file[name]) for name in file.files}
        problem = self.problem
        if not problem.draws:
            return float(self._by_enumeration(weights).mean()) - self.truth
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            value = self._by_importance(weights, problem.first_draws)
            if value >= problem.target - problem.margin:
                value = self._by_importance(weights, problem.draws)
        return value - self.truth

    def _by_enumeration(self, weights: Weights) -> Tensor:
        """Sum over all states of Bernoulli variables with probability 1/2."""
        bits = torch.arange(self.problem.latent[0])
        states = ((torch.arange(2 ** len(bits))[:, None] >> bits) & 1).float()
        return log_likelihood(self.problem, weights, states[:, None], self.x).logsumexp(0) - len(bits) * math.log(2)

    def _by_importance(self, weights: Weights, draws: int) -> float:
        parts = [self._log_weights(weights, x, draws) for x in self._blocks(draws)]
        return float((torch.cat(parts, dim=1).logsumexp(0) - math.log(draws)).mean())

    def _blocks(self, draws: int) -> Iterator[Tensor]:
        """Split the held-out data so that the pixels of all draws of a block fit in the memory."""
        yield from self.x.split(max(1, CHUNK // (draws * self.problem.features)))

    def _log_weights(self, weights: Weights, x: Tensor, draws: int) -> Tensor:
        """Compute log p(x, z) / q(z|x) of draws from q(z|x), ``(draws, rows)``."""
        raw = network(self.problem, weights, "encoder", standardized(weights, "encoder", x))
        if self.problem.guide == "gumbel":
            q = OneHotCategorical(logits=raw.reshape(len(x), *self.problem.latent), validate_args=False)
            z = q.sample((draws,))
            log_ratio = -math.log(self.problem.latent[-1]) * self.problem.latent[0] - q.log_prob(z).sum(-1)
            z = z.flatten(2)
        else:
            loc, log_scale = raw.chunk(2, dim=-1)
            q = Normal(loc, log_scale.exp(), validate_args=False)
            z = q.sample((draws,))
            log_ratio = (Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum(-1)
        return log_ratio + log_likelihood(self.problem, weights, standardized(weights, "decoder", z), x)


def standardized(weights: Weights, part: str, inputs: Tensor) -> Tensor:
    """Standardize the inputs of a network by its fixed location and scale, if it has them."""
    return (inputs - weights.get(f"{part}.loc", 0.0)) / weights.get(f"{part}.scale", 1.0)
