"""Eager PyTorch by hand: a loss for each case, tensors and ``torch.optim.Adam``.

The arithmetic is that of the other contestants: a Monte-Carlo estimate of the KL where they use one, and all states
where they enumerate them, without algebra that a framework does not do.
"""

import math
from collections.abc import Callable

import torch
from cases import Case
from inputs import Inputs, Losses, Tick
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, linear, logsigmoid, silu

Weights = dict[str, Tensor]
Loss = Callable[[Case, Weights, Tensor], dict[str, Tensor]]
HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def network(case: Case, weights: Weights, part: str, inputs: Tensor) -> Tensor:
    activation = {"tanh": torch.tanh, "relu": torch.relu, "silu": silu}[case.activation]
    for number in range(len(case.hidden) + 1):
        inputs = activation(inputs) if number else inputs
        inputs = linear(inputs, weights[f"{part}.{number}.weight"], weights[f"{part}.{number}.bias"])
    return inputs


def log_likelihood(case: Case, weights: Weights, z: Tensor, x: Tensor) -> Tensor:
    raw = network(case, weights, "decoder", z)
    if case.likelihood == "normal":
        scale = weights["log_scale"].exp() + 1e-3
        return -(((x - raw) / scale) ** 2 / 2 + scale.log() + HALF_LOG_TWO_PI).sum(-1)
    x, raw = torch.broadcast_tensors(x, raw)
    return -binary_cross_entropy_with_logits(raw, x, reduction="none").sum(-1)


def normal_loss(case: Case, weights: Weights, x: Tensor) -> dict[str, Tensor]:
    """Compute the ELBO of a Gaussian latent for one draw, or the importance-weighted bound for several."""
    loc, log_scale = network(case, weights, "encoder", x).chunk(2, dim=-1)
    noise = torch.randn(*(case.particles,) * (case.particles > 1), *loc.shape)
    z = loc + log_scale.exp() * noise
    log_prior = -(z**2 / 2 + HALF_LOG_TWO_PI).sum(-1)
    log_guide = -(noise**2 / 2 + log_scale + HALF_LOG_TWO_PI).sum(-1)
    log_weight = log_likelihood(case, weights, z, x) + log_prior - log_guide
    if case.particles == 1:
        return {"elbo": -log_weight.sum()}
    bound = log_weight.logsumexp(0) - math.log(case.particles)
    return {case.bound: -bound.sum(), "elbo": -log_weight.detach().mean(0).sum()}


def log_concrete(y: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Compute the log-density of the logarithm of relaxed one-hot variables, summed over variables."""
    classes, score = y.shape[-1], (logits - temperature * y).log_softmax(-1).sum(-1)
    return (score + math.lgamma(classes) + (classes - 1) * math.log(temperature)).sum(-1)


def gumbel_loss(case: Case, weights: Weights, x: Tensor) -> dict[str, Tensor]:
    """Compute the ELBO of Gumbel-softmax variables, with relaxed densities in guide and prior."""
    cold, warm = case.temperatures
    logits = network(case, weights, "encoder", x).reshape(len(x), *case.latent)
    uniform = torch.rand_like(logits).clamp(torch.finfo(logits.dtype).eps / 2, 1 - torch.finfo(logits.dtype).eps / 2)
    y = ((logits - (-uniform.log()).log()) / warm).log_softmax(-1)
    rate = log_concrete(y, logits, warm) - log_concrete(y, torch.zeros_like(logits), cold)
    return {"elbo": (rate - log_likelihood(case, weights, y.exp().flatten(1), x)).sum()}


def enumerated_loss(case: Case, weights: Weights, x: Tensor) -> dict[str, Tensor]:
    """Compute the ELBO of Bernoulli variables as a sum over all states."""
    logits, bits = network(case, weights, "encoder", x), torch.arange(case.latent[0])
    states = ((torch.arange(2 ** case.latent[0])[:, None] >> bits) & 1).to(x.dtype)
    on, off = logsigmoid(logits), logsigmoid(-logits)
    log_guide = states @ on.T + (1 - states) @ off.T  # (states, rows)
    log_joint = log_likelihood(case, weights, states[:, None], x) - case.latent[0] * math.log(2)
    return {"elbo": (log_guide.exp() * (log_guide - log_joint)).sum()}


LOSSES: dict[str, Loss] = {"normal": normal_loss, "gumbel": gumbel_loss, "bernoulli": enumerated_loss}


def train(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> Losses:
    """Train with a fused Adam."""
    torch.manual_seed(seed)
    weights = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in given.weights.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=case.lr, fused=True)
    x, losses_of = torch.from_numpy(given.x)[:rows], LOSSES[case.guide]
    record: Losses = {}
    for _ in range(epochs):
        total: dict[str, float] = {}
        for index in [None] if case.full_batch else torch.randperm(rows).split(case.batch_size):
            batch = x if index is None else x[index]
            losses = losses_of(case, weights, torch.bernoulli(batch.float() / 255) if case.binarized else batch)
            optimizer.zero_grad()
            losses[case.bound].backward()
            optimizer.step()
            total = {name: total.get(name, 0.0) + loss.item() for name, loss in losses.items()}
        for name, loss in total.items():
            record.setdefault(name, []).append(loss / rows)
        tick(rows // case.batch_size)
    return record


@torch.no_grad()
def evaluate(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> Losses:
    """Estimate the mean log p(x) by importance weighting, 50 draws at a time to limit the memory."""
    torch.manual_seed(seed)
    weights = {name: torch.from_numpy(value.copy()) for name, value in given.weights.items()}
    x = (torch.from_numpy(given.x[:rows]) > 127).float()
    chunk, found = min(case.particles, 50), []
    for _ in range(epochs):
        loc, log_scale = network(case, weights, "encoder", x).chunk(2, dim=-1)
        parts = []
        for _ in range(case.particles // chunk):
            noise = torch.randn(chunk, *loc.shape)
            z = loc + log_scale.exp() * noise
            log_ratio = (noise**2 / 2 + log_scale - z**2 / 2).sum(-1)
            parts.append(log_likelihood(case, weights, z, x) + log_ratio)
        log_weight = torch.cat(parts)
        found.append(-float((log_weight.logsumexp(0) - math.log(len(log_weight))).mean()))
        tick(rows * len(log_weight))
    return {case.bound: found}
