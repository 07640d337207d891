r"""Gradient estimators against the exact gradient: bias, variance and signal-to-noise, by group of parameters.

Where the discrete latents of a model can be enumerated, so can the ELBO, its K-sample bounds and their gradients. An
estimator is run many times on the same parameters and data, and its mean and spread are held against the gradient of
its *own* target.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from pyro_vae.checks import positive_int
from pyro_vae.handlers import parameters_of
from pyro_vae.joint_density import MAX_STATES, Guide, Problem
from pyro_vae.randomness import seeded
from pyro_vae.score_functions import VIMCO

__all__ = ["Comparison", "Estimator", "Measured", "compare", "exact_gradient"]

Function = Callable[..., Any]


@dataclass(frozen=True)
class Estimator:
    """A way to estimate a gradient.

    Attributes:
        model: a Pyro model.
        guide: its guide.
        elbo: whose ``loss_and_grads`` is the estimate.
        target: the discrete (model, guide) whose gradient is meant, with the same parameters; the pair itself if left
            out. Of a relaxed VAE it is the twin: ``(twin.model, twin.guide)``.
    """

    model: Function
    guide: Function
    elbo: Any
    target: tuple[Function, Function] | None = None

    @property
    def num_draws(self) -> int:
        """Of the bound that is estimated: K of a K-sample bound, otherwise 1."""
        return self.elbo.num_particles if isinstance(self.elbo, VIMCO) else 1

    def evaluations(self, num_states: int) -> int:
        """Runs of the decoder for each datum and estimate: one for each draw, or for each state if it enumerates."""
        return self.elbo.num_particles * (num_states if isinstance(self.elbo, TraceEnum_ELBO) else 1)


@dataclass(frozen=True)
class Measured:
    """What was found of one estimator in one group of parameters; gradients are of nats per datum.

    Attributes:
        target_norm: length of the exact gradient.
        bias: length of the estimator's bias, what chance explains taken off; 0 if that is all of it.
        bias_error: standard error of the bias.
        variance: of one estimate, summed over parameters.
        max_z: the largest deviation of the mean from the target among the parameters, in standard errors.
        num_parameters: how many there are.
    """

    target_norm: float
    bias: float
    bias_error: float
    variance: float
    max_z: float
    num_parameters: int

    @property
    def signal_to_noise(self) -> float:
        """Length of the exact gradient over the standard deviation of an estimate."""
        return self.target_norm / math.sqrt(self.variance) if self.variance > 0 else math.inf

    @property
    def p_value(self) -> float:
        """Of the largest deviation, for all parameters at once (Bonferroni): tiny where there is a bias."""
        return min(1.0, self.num_parameters * math.erfc(self.max_z / math.sqrt(2)))


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` has found.

    Attributes:
        measured: by estimator, and within by group of parameters, ``"all"`` among them.
        evaluations: runs of the decoder for each datum and estimate, by estimator.
    """

    measured: dict[str, dict[str, Measured]]
    evaluations: dict[str, int] = field(repr=False)

    def table(self, group: str = "all") -> str:
        """A line for each estimator, of one group of parameters."""
        titles = f"{'runs':>6s}{'|gradient|':>12s}{'bias':>10s}{'error':>9s}{'variance':>11s}{'SNR':>9s}{'max z':>7s}"
        lines = [f"{group:28s}{titles}"]
        for name, groups in self.measured.items():
            row = groups[group]
            lines.append(
                f"{name:28s}{self.evaluations[name]:6d}{row.target_norm:12.4f}{row.bias:10.4f}{row.bias_error:9.4f}"
                f"{row.variance:11.4f}{row.signal_to_noise:9.3f}{row.max_z:7.1f}"
            )
        return "\n".join(lines)


def exact_gradient(
    model: Function, guide: Function, *data: Tensor, num_draws: int = 1, plate: str = "data"
) -> dict[str, Tensor]:
    r"""The gradient of the ELBO, or of the K-sample bound, by enumeration, in nats per datum.

    .. math:: \nabla\,\mathbb{E}_{z_1, \dots, z_K \sim q}\Big[\log \frac1K \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}\Big]

    Args:
        model: a Pyro model of discrete latents.
        guide: its guide.
        data: what both take.
        num_draws: K; 1 for the ELBO.
        plate: name of the data plate.

    Returns:
        by name, of the unconstrained parameters: for a VAE as in ``vae.named_parameters()``.

    Raises:
        ValueError: if there are more than 2^16 states, or combinations of K states.

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> vae = pv.VAE(
    ...     prior=priors.Bernoulli(2),
    ...     encoder=guides.Bernoulli(2, 2, networks.linear()),
    ...     decoder=likelihoods.Normal(2, 2, networks.linear()),
    ... )
    >>> gradient = exact_gradient(vae.model, vae.guide, torch.randn(5, 2))
    >>> gradient["encoder.network.bias"].shape
    torch.Size([2])
    """
    positive_int(num_draws, "num_draws")
    problem = Problem(model, data, plate)
    if not problem.is_discrete:
        raise ValueError(f"model: its latents {list(problem.latents)} are not all discrete, and cannot be enumerated")
    q = Guide(problem, guide)
    parameters = _parameters(model, guide, data)
    gradients = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    # Twice over the states, chunk by chunk: the densities of all of them, and then their gradients, each weighted with
    # the slope of the bound in its density.
    with torch.no_grad():
        pieces = [(problem.log_joint(values), q.log_prob(values)) for values in problem.states()]
    log_joint, log_q = (torch.cat(list(piece)).double() for piece in zip(*pieces, strict=True))  # (S, N)
    slopes = _slopes(log_joint, log_q, num_draws)
    sizes = [len(piece[0]) for piece in pieces]
    for values, *slope in zip(problem.states(), *(one.split(sizes) for one in slopes), strict=True):
        with torch.enable_grad():
            densities = problem.log_joint(values), q.log_prob(values)
            part = sum((one * weight).sum() for one, weight in zip(densities, slope, strict=True))
        found = torch.autograd.grad(part, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                gradients[name] += gradient
    return gradients


def _slopes(log_joint: Tensor, log_q: Tensor, num_draws: int) -> tuple[Tensor, ...]:
    """The derivative of the bound, in nats per datum, in log p(x, z) and in log q(z | x), each ``(S, N)``."""
    count = len(log_q) ** num_draws
    if count > MAX_STATES:
        raise ValueError(
            f"num_draws: {len(log_q)} states have {count} combinations of {num_draws}; at most {MAX_STATES} are "
            "summed over"
        )
    with torch.enable_grad():
        log_joint, log_q = log_joint.requires_grad_(), log_q.requires_grad_()
        chosen = torch.cartesian_prod(*[torch.arange(len(log_q), device=log_q.device)] * num_draws).reshape(count, -1)
        bound = (log_joint - log_q)[chosen].logsumexp(1) - math.log(num_draws)  # (S^K, N)
        total = (log_q[chosen].sum(1).exp() * bound).sum() / log_q.shape[1]
    return torch.autograd.grad(total, (log_joint, log_q))


def compare(
    estimators: Mapping[str, Estimator],
    *data: Tensor,
    evaluations: int | None = None,
    repeats: int = 1000,
    plate: str = "data",
    seed: int = 0,
) -> Comparison:
    """Run each estimator many times, at the parameters as they are, and hold it against the gradient of its target.

    A running average learns from one estimate to the next, as in training, and is put back afterwards.

    Args:
        estimators: by name.
        data: what models and guides take.
        evaluations: runs of the decoder that each estimate may cost for each datum: estimators with fewer draws are
            averaged over several. As many as each takes if left out.
        repeats: how many estimates, 2 or more.
        plate: name of the data plate.
        seed: of the draws.
    """
    if positive_int(repeats, "repeats") < 2:
        raise ValueError("repeats: got 1; accepted is 2 or more, for a variance")
    store = pyro.get_param_store()
    with store.scope(store.get_state()):  # a baseline registers parameters too
        return _compare(estimators, data, evaluations, repeats, plate, seed)


def _compare(
    estimators: Mapping[str, Estimator],
    data: tuple[Tensor, ...],
    evaluations: int | None,
    repeats: int,
    plate: str,
    seed: int,
) -> Comparison:
    measured, costs = {}, {}
    for name, estimator in estimators.items():
        pair = estimator.target or (estimator.model, estimator.guide)
        target = exact_gradient(*pair, *data, num_draws=estimator.num_draws, plate=plate)
        parameters = _parameters(*pair, data)
        cost = estimator.evaluations(Problem(pair[0], data, plate).num_states)
        averaged = 1 if evaluations is None else evaluations // cost
        if averaged < 1:
            raise ValueError(f"evaluations: got {evaluations}; {name} takes {cost} for each estimate")
        costs[name] = cost * averaged
        with seeded(seed):
            estimates = _estimates(estimator, parameters, data, repeats, averaged)
        measured[name] = {
            group: _measure(estimates[:, columns], _flat(target)[columns]) for group, columns in _groups(target).items()
        }
    return Comparison(measured, costs)


def _parameters(model: Function, guide: Function, data: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The unconstrained parameters of a pair, by name."""
    with poutine.block(), poutine.trace(param_only=True) as tracer, torch.no_grad(), seeded(0):
        trace = poutine.trace(guide).get_trace(*data)
        poutine.replay(model, trace)(*data)
    found = {name: value for name, value in parameters_of(tracer.trace).items() if value.requires_grad}
    owners = {name.rpartition("$$$")[0] for name in found}
    if len(owners) == 1:  # the parameters of one module, such as a VAE, go by its own names
        return {name.rpartition("$$$")[2]: value for name, value in found.items()}
    return {name.replace("$$$", "."): value for name, value in found.items()}


def _estimates(
    estimator: Estimator, parameters: dict[str, Tensor], data: tuple[Tensor, ...], repeats: int, averaged: int
) -> Tensor:
    """Minus the gradient of the loss of each repeat, per datum, ``(repeats, P)``; all is left as it was."""
    before = {name: parameter.grad for name, parameter in parameters.items()}
    baseline = getattr(estimator.elbo, "baseline", None)
    learned = None if baseline is None else copy.deepcopy(baseline.state_dict())
    rows = []
    tracer = poutine.trace(param_only=True)
    try:
        for _ in range(repeats):
            for parameter in parameters.values():
                parameter.grad = None
            for _ in range(averaged):
                with tracer:
                    estimator.elbo.loss_and_grads(estimator.model, estimator.guide, *data)
            rows.append(_flat({name: _grad(parameter) for name, parameter in parameters.items()}))
    finally:
        for parameter in parameters_of(tracer.trace).values():  # those of a baseline too
            parameter.grad = None
        for name, parameter in parameters.items():
            parameter.grad = before[name]
        if baseline is not None:
            baseline.load_state_dict(learned)
    return torch.stack(rows) / -(averaged * len(data[0]))


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _flat(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().double().flatten() for value in values.values()])


def _groups(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Columns of all parameters, and of those of each part: ``encoder``, ``decoder``, or what the name says."""
    columns: dict[str, list[int]] = {"all": []}
    first = 0
    for name, value in values.items():
        part = name.partition(".")[0]
        own = list(range(first, first + value.numel()))
        columns["all"] += own
        columns.setdefault(part, []).extend(own)
        first += value.numel()
    return {group: torch.tensor(own) for group, own in columns.items()}


def _measure(estimates: Tensor, target: Tensor) -> Measured:
    """Bias, variance and the largest deviation; what rounding explains of a deviation counts as none."""
    repeats = len(estimates)
    variance = estimates.var(0)
    error = (variance / repeats).sqrt()
    deviation = estimates.mean(0) - target
    rounding = 1e-5 * target.norm() + 1e-12
    squared = float((deviation**2 - error**2).sum())
    # The standard error of the squared bias, by the delta method, and of its root.
    spread = float((4 * deviation**2 * error**2 + 2 * error**4).sum().sqrt())
    bias = math.sqrt(max(squared, 0.0))
    bias = bias if bias > rounding else 0.0
    z = deviation.abs().clamp(min=0) / error.clamp(min=float(rounding) / 4)
    return Measured(
        target_norm=float(target.norm()),
        bias=bias,
        bias_error=spread / (2 * bias) if bias > 0 else math.sqrt(spread),
        variance=float(variance.sum()),
        max_z=float(z.max()),
        num_parameters=len(target),
    )
