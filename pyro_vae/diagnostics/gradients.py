r"""Gradient estimators compared with the exact gradient: bias, variance and signal-to-noise ratio, by parameter group.

If the discrete latents of a model can be enumerated, so can its ELBO, its K-sample bounds and their gradients. Each
estimator runs many times on the same parameters and data. The mean and the spread of its estimates are compared with
the exact gradient of the estimator's *own* target. Where some latents are continuous, an unbiased estimator, such as
one that sums over the discrete ones, is the reference instead.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import Tensor, nn

from pyro_vae._utils.data import data_tensors
from pyro_vae._utils.module_state import evaluation_mode
from pyro_vae._utils.param_store import parameters_of, without_training
from pyro_vae._utils.plates import every_row
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import describe, positive_int, real_tensor
from pyro_vae.arguments import any_arguments
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.exact.model_density import MAX_STATES, ModelDensity
from pyro_vae.model_guide import ModelGuide
from pyro_vae.objectives.particle_elbo import ParticleELBO

__all__ = ["Comparison", "Estimator", "Measured", "compare", "exact_gradient", "measure"]

_BUDGET = 2**22  # numbers in the largest tensor of one chunk
_WARM_UP = 50  # estimates from which a running average learns before the first that counts
_EFFECTIVE = 20  # effective number of estimates that a parameter needs to be tested


@dataclass(frozen=True)
class Estimator:
    """A gradient estimator: an ELBO on a model and a guide.

    Attributes:
        model: a Pyro model.
        guide: its guide.
        elbo: the ELBO whose ``loss_and_grads`` is one estimate.
        target: the discrete (model, guide) whose gradient is estimated, with the same parameters; the pair itself if
            left out. For a relaxed VAE it is the discrete twin: ``(twin.model, twin.guide)``.

    Raises:
        TypeError, ValueError: if ``elbo`` is no instance of an ELBO whose target can be enumerated.
    """

    model: Function
    guide: Function
    elbo: Any
    target: tuple[Function, Function] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.elbo, ELBO):
            raise TypeError(f"`elbo` must be an instance, such as Trace_ELBO(), got {self.elbo!r}")
        if not isinstance(self.elbo, ParticleELBO | Trace_ELBO | TraceGraph_ELBO | TraceEnum_ELBO):
            raise ValueError(
                "`elbo` must be Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO or one of pyro_vae.objectives, got a "
                f"{type(self.elbo).__name__}, whose weights are not computed for each datum"
            )
        if self.target is not None and not (isinstance(self.target, tuple) and len(self.target) == 2):
            raise TypeError(f"`target` must be a pair, such as (twin.model, twin.guide), got {self.target!r}")

    @property
    def num_draws(self) -> int:
        """K if the target is a K-sample bound, otherwise 1."""
        return self.elbo.bound_draws if isinstance(self.elbo, ParticleELBO) else 1

    def evaluations(self, num_states: int) -> int:
        """Count the decoder runs per datum and estimate: one for each draw, and each state if it enumerates."""
        return self.elbo.num_particles * (num_states if isinstance(self.elbo, TraceEnum_ELBO) else 1)


@dataclass(frozen=True)
class Measured:
    """Bias and variance of one estimator in one group of parameters; gradients are of nats per datum.

    Attributes:
        target_norm: length of the exact gradient, or of the mean estimate of the reference.
        bias: length of the estimator's bias, after the share of chance is subtracted; 0 if chance explains all of it.
        bias_error: standard error of the bias. Where the bias is 0, the largest bias that chance could hide.
        variance: variance of one estimate, summed over parameters.
        max_z: the largest deviation of the mean from the target among the tested parameters, in standard errors.
        num_parameters: number of parameters.
        num_tested: number of tested parameters: those whose variance does not depend on a few rare estimates. If a
            guide is nearly certain of a discrete latent, it may never draw a state, nor a gradient of that state.
        repeats: number of estimates.
    """

    target_norm: float
    bias: float
    bias_error: float
    variance: float
    max_z: float
    num_parameters: int
    num_tested: int
    repeats: int

    @property
    def signal_to_noise(self) -> float:
        """Length of the exact gradient over the standard deviation of an estimate."""
        return self.target_norm / math.sqrt(self.variance) if self.variance > 0 else math.inf

    @property
    def p_value(self) -> float:
        """p-value of the largest deviation under no bias, for all tests together (Bonferroni, Student's t)."""
        from scipy.stats import t as student_t

        tails = 2 * float(student_t.sf(self.max_z, self.repeats - 1))
        return min(1.0, self.num_tested * tails) if self.num_tested else 1.0


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        measured: by estimator and by group of parameters; the group ``"all"`` has all of them.
        evaluations: runs of the decoder for each datum and estimate, by estimator.
    """

    measured: dict[str, dict[str, Measured]]
    evaluations: dict[str, int] = field(repr=False)

    def of(self, group: str) -> dict[str, Measured]:
        """Select the results of one group of parameters, by estimator."""
        known = dict.fromkeys(name for groups in self.measured.values() for name in groups)
        if group not in known:
            raise ValueError(f"`group` must be {', '.join(map(repr, known))}, got {group!r}")
        return {name: groups[group] for name, groups in self.measured.items() if group in groups}

    def table(self, group: str = "all") -> str:
        """Format a row for each estimator, for one group of parameters; p is :attr:`Measured.p_value`."""
        import pandas as pd

        titles = ["evaluations", "|gradient|", "bias", "error", "variance", "SNR", "max z", "p"]
        rows = {}
        for name, row in self.of(group).items():
            numbers = (row.target_norm, row.bias, row.bias_error, row.variance, row.signal_to_noise)
            cells = [f"{number:.4g}" for number in numbers]
            rows[name] = [str(self.evaluations[name]), *cells, f"{row.max_z:.1f}", f"{row.p_value:.1e}"]
        columns = pd.Index(titles, name=group)
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns).to_string(col_space=11)


@without_training  # a baseline registers parameters, too
def compare(
    estimators: Mapping[str, Estimator],
    *data: Data,
    evaluations: int | None = None,
    repeats: int = 1000,
    reference: str | None = None,
    plate: str = "data",
    seed: int = 0,
) -> Comparison:
    """Run each estimator many times at the present parameters and compare it with the gradient of its target.

    The target is enumerated. Where latents are continuous, it is estimated, too: by the ``reference``, an unbiased
    estimator of the same gradient. Its noise is then a part of the errors of all biases.

    A running average learns from one estimate to the next, also from some before the first that counts; its state is
    restored at the end. The network of a baseline is not trained here: train it first.

    Args:
        estimators: by name.
        data: arguments of models and guides.
        evaluations: runs of the decoder per datum that each estimate may cost: estimators with fewer draws are averaged
            over several estimates. If left out, each estimate costs what its estimator takes.
        repeats: number of estimates, 2 or more.
        reference: the name of one of the estimators, for latents that cannot all be enumerated. All are compared with
            its gradient: of an estimator of another objective, such as ``objectives.FreeBits`` or ``TotalCorrelation``
            next to an ELBO, what is called bias is the distance between the gradients of the two objectives.
        plate, seed: name of the data plate, and seed of the draws.

    Raises:
        TypeError: if ``estimators`` is no mapping from names to estimators.
        ValueError: if ``evaluations`` are fewer than an estimator takes, a target has other parameters, or
            ``reference`` is no name of an estimator.
        FloatingPointError: if an estimate is not finite.
    """
    if positive_int(repeats, "repeats") < 2:
        raise ValueError("`repeats` must be 2 or more, for a variance, got 1")
    if evaluations is not None:
        positive_int(evaluations, "evaluations")
    wrong = not isinstance(estimators, Mapping) or not all(isinstance(one, Estimator) for one in estimators.values())
    if wrong or not estimators:
        raise TypeError(f"`estimators` must be a dict from names to Estimators, got {estimators!r}")
    if reference is not None:
        _check_reference(reference, estimators)
    data = data_tensors(data, "data", next(iter(estimators.values())).model)
    options = data, evaluations, repeats, plate
    if reference is not None:
        one = estimators[reference]
        parameters = _parameters(one.model, one.guide, data)
        # Of another seed: the draws are independent of those that are compared.
        target, _ = _run(reference, one, "reference", parameters, *options, seed ^ 1)
    measured, costs = {}, {}
    for name, one in estimators.items():
        if reference is None:
            pair = one.target or (one.model, one.guide)
            target = _flat(exact_gradient(*pair, *data, num_draws=one.num_draws, plate=plate).values())
            parameters = _parameters(*pair, data)
        argument = "target" if reference is None else "reference"
        found, costs[name] = _run(name, one, argument, parameters, *options, seed)
        groups = _groups(parameters)
        measured[name] = {group: measure(found[:, own], target[..., own]) for group, own in groups.items()}
    return Comparison(measured, costs)


def _check_reference(reference: str, estimators: Mapping[str, Estimator]) -> None:
    if not isinstance(reference, str) or reference not in estimators:
        raise ValueError(f"`reference` must be one of {', '.join(map(repr, estimators))}, got {reference!r}")
    bounds = {name: one.num_draws for name, one in estimators.items() if one.num_draws > 1}
    if bounds:
        must = "left out for bounds of several draws, whose gradient is not that of the ELBO"
        raise ValueError(f"`reference` must be {must}, got {reference!r} with the draws {bounds}")


@any_arguments
@evaluation_mode()
@every_row()
def exact_gradient(
    model: Function, guide: Function, *data: Data, num_draws: int = 1, plate: str = "data"
) -> dict[str, Tensor]:
    r"""Compute the gradient of the ELBO, or of the K-sample bound, by enumeration, in nats per datum.

    .. math:: \nabla\,\mathbb{E}_{z_1, \dots, z_K \sim q}\Big[\log \frac1K \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}\Big]

    Args:
        model, guide: a Pyro model with discrete latents, and its guide.
        data: arguments of both.
        num_draws: K; 1 for the ELBO.
        plate: name of the data plate.

    Returns:
        gradients of the unconstrained parameters, by name: for a VAE as in ``vae.named_parameters()``.

    Raises:
        ValueError: if there are more than 2^16 combinations of K states, or no parameters to train.
        FloatingPointError: if the bound is not finite, as when a state of the guide has no mass in the model.

    >>> from pyro_vae import VAE, guides, likelihoods, networks, priors
    >>> net = networks.linear()
    >>> vae = VAE(priors.Bernoulli(2), guides.Bernoulli(2, 2, net), likelihoods.Normal(2, 2, net))
    >>> gradient = exact_gradient(vae.model, vae.guide, torch.randn(5, 2))
    >>> gradient["encoder.network.bias"].shape
    torch.Size([2])
    """
    positive_int(num_draws, "num_draws")
    p = ModelDensity(ModelGuide(model, guide, data, plate))
    if not p.is_discrete:
        continuous = [name for name, site in p.latents.items() if not site["fn"].has_enumerate_support]
        raise ValueError(
            "`model` must have latents that can be enumerated, several variables of one site by "
            f"`distributions.Product(base, num_dims)`, got {continuous}, which cannot. For a relaxed VAE pass its "
            "twin, `target=(twin.model, twin.guide)`"
        )
    q = GuideDensity(p)
    parameters = _parameters(model, guide, p.data)
    gradients = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    # Two passes over chunks of states: first their densities, then the gradients, weighted by the bound's derivatives.
    with torch.no_grad():
        pieces = [(p.log_joint(values), q.log_prob(values)) for values in p.states()]
    log_joint, log_q = (torch.cat(piece).double() for piece in zip(*pieces, strict=True))  # (S, N)
    slopes = _slopes(log_joint, log_q, num_draws)
    sizes = [len(piece[0]) for piece in pieces]
    for values, *slope in zip(p.states(), *(one.split(sizes) for one in slopes), strict=True):
        with torch.enable_grad():
            densities = p.log_joint(values), q.log_prob(values)
            weighted = [torch.where(w != 0, one * w, 0.0).sum() for one, w in zip(densities, slope, strict=True)]
        found = torch.autograd.grad(
            sum(weighted, torch.zeros((), device="cpu")), list(parameters.values()), allow_unused=True
        )
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                gradients[name] += gradient
    return gradients


def _slopes(log_joint: Tensor, log_q: Tensor, num_draws: int) -> tuple[Tensor, ...]:
    """The derivatives of the bound, in nats per datum, in log p(x, z) and in log q(z | x), ``(S, N)`` each."""
    count = len(log_q) ** num_draws
    if count > MAX_STATES:
        raise ValueError(
            f"`num_draws` must give at most {MAX_STATES} combinations of states, got {num_draws}: {len(log_q)} states "
            f"have {count} combinations"
        )
    chosen = torch.cartesian_prod(*[torch.arange(len(log_q), device=log_q.device)] * num_draws).reshape(count, -1)
    size = max(1, _BUDGET // chosen.numel())
    chunks = zip(log_joint.split(size, 1), log_q.split(size, 1), strict=True)
    slopes = [_slopes_of_chunk(joint.clone(), q.clone(), chosen) for joint, q in chunks]
    return tuple(torch.cat(parts, 1) / log_q.shape[1] for parts in zip(*slopes, strict=True))


@torch.enable_grad()
def _slopes_of_chunk(log_joint: Tensor, log_q: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
    log_joint, log_q = log_joint.requires_grad_(), log_q.requires_grad_()
    f = torch.where(log_q > -math.inf, log_joint - log_q, 0.0)  # states that q never draws have no weight
    bound = f[chosen].logsumexp(1) - math.log(chosen.shape[1])  # (S^K, n)
    total = (log_q[chosen].sum(1).exp() * bound).sum()
    if not total.isfinite():
        raise FloatingPointError(f"the bound is {total.item()}: the guide draws states that have no mass in the model")
    return torch.autograd.grad(total, (log_joint, log_q))


def _run(
    name: str, estimator: Estimator, argument: str, parameters: dict[str, Tensor], data: tuple[Tensor, ...],
    budget: int | None, repeats: int, plate: str, seed: int,
) -> tuple[Tensor, int]:  # fmt: skip
    """Return estimates of the gradient in parameters, ``(repeats, P)``, and the evaluations of each.

    ``argument`` names what has these parameters.
    """
    own = {id(parameter) for parameter in _parameters(estimator.model, estimator.guide, data).values()}
    foreign = [path for path, parameter in parameters.items() if id(parameter) not in own]
    if foreign:
        must = "have only parameters of its estimator, as `vae.discrete()` has"
        raise ValueError(f"`{argument}` must {must}, got {foreign} in that of {name!r}")
    model = estimator.model if estimator.target is None else estimator.target[0]
    pair = ModelGuide(model, None, data, plate)
    discrete = [site["fn"] for site in pair.latents.values() if site["fn"].has_enumerate_support]
    cost = estimator.evaluations(math.prod(len(fn.enumerate_support(expand=False)) for fn in discrete))
    averaged = 1 if budget is None else budget // cost
    if averaged < 1:
        raise ValueError(f"`evaluations` must be {cost} or more, which {name!r} takes for each estimate, got {budget}")
    with seeded(seed):
        total = _estimates(estimator, parameters, data, repeats, averaged)
    estimates = total / -(averaged * math.prod(frame.size for frame in pair.units))
    if not estimates.isfinite().all():
        raise FloatingPointError(f"the gradient that {name!r} estimates is not finite")
    return estimates, cost * averaged


def _parameters(model: Function, guide: Function, data: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The unconstrained parameters of a pair, by name."""
    with poutine.block(), poutine.trace(param_only=True) as tracer, torch.no_grad(), seeded(0):
        trace = poutine.trace(guide).get_trace(*data)
        poutine.replay(model, trace)(*data)
    found = {name: value for name, value in parameters_of(tracer.trace).items() if value.requires_grad}
    if not found:
        raise ValueError("`model` and `guide` must have parameters that require gradients, got none")
    owners = {name.rpartition("$$$")[0] for name in found}
    if len(owners) == 1:  # of one module, such as a VAE: its own names of its parameters
        return {name.rpartition("$$$")[2]: value for name, value in found.items()}
    return {name.replace("$$$", "."): value for name, value in found.items()}


def _estimates(
    estimator: Estimator, parameters: dict[str, Tensor], data: tuple[Tensor, ...], repeats: int, averaged: int
) -> Tensor:
    """Gradients of the loss, summed over runs and data, ``(repeats, P)``; gradients and baselines are then restored."""
    baseline = getattr(estimator.elbo, "baseline", nn.Module())
    own = _parameters(estimator.model, estimator.guide, data)
    touched = list(dict.fromkeys([*own.values(), *baseline.parameters()]))
    gradients, learned = [parameter.grad for parameter in touched], copy.deepcopy(baseline.state_dict())
    warm_up = _WARM_UP if list(baseline.buffers()) else 0
    rows = []
    try:
        for repeat in range(-warm_up, repeats):
            for parameter in touched:
                parameter.grad = None
            for _ in range(averaged if repeat >= 0 else 1):
                estimator.elbo.loss_and_grads(estimator.model, estimator.guide, *data)
            rows.append(_flat([p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters.values()]))
    finally:
        for parameter, gradient in zip(touched, gradients, strict=True):
            parameter.grad = gradient
        baseline.load_state_dict(learned)
    return torch.stack(rows[warm_up:])


def _flat(values: Iterable[Tensor]) -> Tensor:
    return torch.cat([value.detach().double().flatten() for value in values])


def _groups(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Columns of all parameters, and of each group: the first part of their names, such as ``encoder``."""
    parts = [name.partition(".")[0] for name, value in values.items() for _ in range(value.numel())]
    parts = ["all (a parameter)" if part == "all" else part for part in parts]
    columns = {part: [index for index, other in enumerate(parts) if other == part] for part in dict.fromkeys(parts)}
    columns = {"all": list(range(len(parts))), **columns}
    return {part: torch.tensor(own, device="cpu") for part, own in columns.items()}


def measure(estimates: Tensor, target: Tensor) -> Measured:
    r"""Compare estimates ``(R, P)`` with the vector that they estimate, ``(P,)``, or with R other estimates of it.

    With d the deviation of their mean and C their covariance, the squared bias is :math:`|d|^2 - \mathrm{tr}\,C / R`,
    without the share of chance; its variance is :math:`4\,b^\top C b / R + 2\,|C|_F^2 / R^2`. Both terms in C are
    estimated without bias, from the products of the R estimates. A bias below rounding error is 0. Where the target is
    estimated, ``(R, P)``, C is the covariance of the differences.

    >>> import torch
    >>> estimates = 1 + torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)).double()
    >>> measure(estimates, torch.ones(3)).p_value > 1e-3, measure(estimates, torch.zeros(3)).p_value < 1e-3
    (True, True)
    """
    for name, value, form, dims in (
        ("estimates", estimates, "(R, P) with R >= 2", {2}), ("target", target, "(P,) or (R, P)", {1, 2})
    ):  # fmt: skip
        if not real_tensor(value, name, f"floats {form}").is_floating_point() or value.dim() not in dims:
            raise ValueError(f"`{name}` must be floats {form}, got {describe(value)}")
    estimated = target.dim() == 2
    same = target.shape == estimates.shape if estimated else target.shape == estimates.shape[1:]
    if len(estimates) < 2 or not same or not target.shape[-1]:
        got = f"shapes {tuple(estimates.shape)} and {tuple(target.shape)}"
        raise ValueError(f"`estimates` and `target` must be (R, P) with R >= 2 and (P,) or (R, P), got {got}")
    differences, fixed = (estimates - target, 0.0) if estimated else (estimates, target)
    target_norm = float((target.mean(0) if estimated else target).norm())
    repeats, mean = len(estimates), differences.mean(0)
    centred, deviation = differences - mean, mean - fixed
    variance = differences.var(0)
    rounding = 1e-5 * target_norm + 1e-12
    squared = float((deviation**2).sum() - variance.sum() / repeats)
    bias = math.sqrt(max(squared, 0.0))
    bias = bias if bias > rounding else 0.0
    covariance = _squared_covariance(centred, float(variance.sum()))
    along = float((centred @ deviation).square().sum()) / (repeats - 1)  # d' C d, which is b' C b + |C|^2 / R
    noise = 2 * covariance / repeats**2
    spread = math.sqrt(max(4 * along / repeats - noise, noise))
    error = (variance / repeats).sqrt()
    effective = (centred**2).sum(0) ** 2 / (centred**4).sum(0).clamp(min=1e-300)
    constant = (variance <= (1e-6 * mean) ** 2) & (mean != 0)  # by enumeration; a constant 0 may be a rare event unseen
    tested = (effective >= _EFFECTIVE) | constant
    scores = (deviation.abs() / error.clamp(min=rounding / 4))[tested]
    return Measured(
        target_norm=target_norm,
        bias=bias,
        bias_error=min(spread / (2 * bias), math.sqrt(spread)) if bias > 0 else math.sqrt(spread),
        variance=float(estimates.var(0).sum()),
        max_z=float(scores.max()) if len(scores) else 0.0,
        num_parameters=target.shape[-1],
        num_tested=int(tested.sum()),
        repeats=repeats,
    )


def _squared_covariance(centred: Tensor, trace: float) -> float:
    """The squared Frobenius norm of the covariance, without bias for normal estimates."""
    repeats = len(centred)
    found = float(((centred @ centred.T) ** 2).sum()) / (repeats - 1) ** 2
    if repeats == 2:
        return found
    unbiased = (repeats - 1) ** 2 / ((repeats - 2) * (repeats + 1)) * (found - trace**2 / (repeats - 1))
    return max(unbiased, 0.0)
