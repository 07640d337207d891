r"""Whether a guide's q(z | x) can be believed: simulation-based calibration on data drawn from the model itself.

Where z* is drawn from the prior and x* from the likelihood at z*, z* is a draw from the exact posterior p(z | x*). So
it must not be told from draws of q(z | x*): its rank among L of them is uniform on 0, ..., L, for each latent
coordinate and for any quantity of z and x.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.transforms import biject_to
from scipy.stats import norm
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_vae._utils.param_store import scoped_param_store
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import latent_sites, log_density, observed_sites
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import data_tensors, function, positive, positive_int
from pyro_vae.diagnostics.uniformity import p_value, simultaneous_band
from pyro_vae.distributions.properties import base_distribution
from pyro_vae.exact.guide_density import GuideDensity, sample_with_log_q
from pyro_vae.exact.model_density import ModelDensity, Values
from pyro_vae.handlers import ResampleObserved
from pyro_vae.model_guide import is_amortized

__all__ = [
    "ALL",
    "JOINT",
    "Calibration",
    "CalibrationErrors",
    "SimulationResults",
    "calibrate",
    "calibration_errors",
    "errors_after_elbo_corrections",
]

JOINT = "log p(x, z)"
"""The name of the quantity that reads the data."""


ALL = "all coordinates"
"""The name of what they have in common."""


_EFFECTIVE = 20  # data that a coordinate's error must rest on to have a say in that of all


@dataclass(frozen=True)
class CalibrationErrors:
    """How far q is off, by coordinate, ``(D,)``, and on the whole.

    Attributes:
        variance_ratio: the variance that q should have over the one it has: 2 if q's is half of what it must be.
        log_ratio_error: standard error of its logarithm.
        bias: how far the mean of q should move, in standard deviations of q.
        bias_error: its standard error.
        overall: of all coordinates: the geometric mean of the ratios, the error of its logarithm; the root mean square
            of the biases, what chance explains taken off, and its error.
    """

    variance_ratio: Tensor
    log_ratio_error: Tensor
    bias: Tensor
    bias_error: Tensor
    overall: tuple[float, float, float, float]


@dataclass(frozen=True)
class Calibration:
    r"""What R data drawn from the model tell of a guide, by L draws of each q(z | x).

    There are Q quantities: the coordinates of the latents, and last log p(x, z). A latent on the reals is its own
    coordinate, one with constraints is told in free ones (a point of the log-simplex in log-ratios), and a class by an
    indicator of each.

    Attributes:
        names: of the quantities, such as ``"z[0]"``.
        ranks: ``(R, Q)``, of the truth among the L draws, from 0 to L; ties broken at random.
        num_draws: L.
        p_values: ``(Q,)``, each exact, of the uniformity of the ranks.
        errors: of the truths about q: their mean squared distance from q's mean, but for a constant bias, over the mean
            variance of q, and that bias.
        remedies: of a continuous q, on the data that were given: the variance and the shift, the same for all data,
            that would raise the ELBO. Where :math:`h = -\mathbb{E}_q[\partial_z \log p(x, z)\,(z - \mathbb{E}_q z)]`,
            the ELBO is stationary in the variance at a mean h of 1; 1 / h is the factor for a normal p(z | x). None if
            a latent is discrete, or of one datum.
        divergence: in nats per datum, an unbiased estimate of the whole distance to the exact posterior,
            :math:`\mathbb{E}_{p(x)}[\mathrm{KL}(q \Vert p(z|x)) + \mathrm{KL}(p(z|x) \Vert q)]`, in which log p(x)
            cancels. What averages out in the ranks, one datum too narrow and one too wide, adds up here.
        divergence_error: its standard error. The estimate has heavy tails where q is far too narrow.
        tolerance: the ratio of variances that is let pass.
        alpha: the chance of any false alarm.

    Source: Talts et al. 2018, "Validating Bayesian inference algorithms with simulation-based calibration"; Modrák et
    al. 2023, "Simulation-based calibration checking for Bayesian computation", for log p(x, z), without which a guide
    that returns the prior would pass; Grosse, Ancha and Roy 2016, "Measuring the reliability of MCMC inference with
    bidirectional Monte Carlo", for the divergence.
    """

    names: tuple[str, ...]
    ranks: Tensor
    num_draws: int
    p_values: Tensor
    errors: CalibrationErrors
    elbo_corrections: CalibrationErrors | None
    divergence: float
    divergence_error: float
    tolerance: float
    alpha: float

    @property
    def is_exact(self) -> bool:
        """Whether no rank tells q from the exact posterior; if q is exact, that fails with a chance of ``alpha``."""
        return not any(self.leaves_band(index) for index in range(len(self.names)))

    def leaves_band(self, index: int) -> bool:
        """Whether the ranks of a quantity are certainly not uniform, at ``alpha`` for all quantities together."""
        return float(self.p_values[index]) <= self.alpha / len(self.names)

    @property
    def faults(self) -> dict[str, str]:
        """What is wrong, in words, by quantity: what is certain, and more than the tolerance lets pass.

        Certain: some ranks leave their band, at ``alpha`` for all quantities together. Material: a remedy of the
        variances by a factor of more than ``tolerance``, or of the means by as much, by a bound as sure as that; its
        square for one of several coordinates. With a tolerance of 1, and of discrete latents, the errors are named.
        """
        if self.is_exact:
            return {}
        sure = float(norm.isf(self.alpha / (4 * len(self.names))))  # two sides of two effects of each quantity
        effects = self.errors if self.elbo_corrections is None or self.tolerance == 1 else self.elbo_corrections
        allowed = _Tolerance(self.tolerance, sure)
        words = {ALL: allowed.words(*effects.overall)}
        for index, name in enumerate(self.names[:-1]):
            of_one = (effects.variance_ratio, effects.log_ratio_error, effects.bias, effects.bias_error)
            words[name] = _Tolerance(self.tolerance**2, sure).words(*(float(values[index]) for values in of_one))
        if self.tolerance == 1 or self.elbo_corrections is None:
            for index, name in enumerate(self.names):
                leaves = self.leaves_band(index)
                off = [f"not as p(z | x) is, p = {self.p_values[index]:.1g}"] if self.tolerance == 1 else []
                words[name] = (words.get(name) or off) if leaves else []
        return {name: "; ".join(found) for name, found in words.items() if found}

    def ecdf_difference(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of a quantity's ranks: places u, the share of ranks below u less u, and the band's two edges; ``(L,)`` each.

        If q is exact, all quantities stay within their bands with a chance of 1 - ``alpha``.
        """
        cells = self.num_draws + 1
        places = np.arange(1, cells) / cells
        share = np.bincount(self.ranks[:, index].numpy(), minlength=cells).cumsum()[:-1] / len(self.ranks)
        lower, upper = simultaneous_band(len(self.ranks), cells, 1 - self.alpha / len(self.names))
        return places, share - places, lower - places, upper - places

    def coverage(self, level: float) -> tuple[Tensor, Tensor]:
        """How often the central interval of q holds the truth, ``(Q,)``, which should be ``level``; and its error.

        The ends are quantiles of the draws; a truth between two draws counts in part where an end lies there too.
        """
        if isinstance(level, bool) or not isinstance(level, float) or not 0 < level < 1:
            raise ValueError(f"`level` must be a number between 0 and 1, such as 0.9, got {level!r}")
        low, high = ((1 - level) / 2, (1 + level) / 2)
        start, width = self.ranks.double() / (self.num_draws + 1), 1 / (self.num_draws + 1)
        held = ((start + width).clamp(max=high) - start.clamp(min=low)).clamp(min=0) / width
        return held.mean(0), held.std(0) / len(held) ** 0.5

    @property
    def headline(self) -> str:
        """How far q is from the exact posterior, in words."""
        return (
            f"q(z | x) of {len(self.ranks)} data drawn from the model, {self.num_draws} draws each: "
            f"{self.divergence:.2f} ± {self.divergence_error:.2f} nats from p(z | x), both KL divergences together"
        )

    def __str__(self) -> str:
        return "\n".join([self.headline, *(f"  {name}: {fault}" for name, fault in self.faults.items())])


@dataclass(frozen=True)
class _Tolerance:
    """What is let pass: what is not for sure more than the effect of a normal's variance off by a factor."""

    ratio: float
    sure: float

    def words(self, ratio: float, log_ratio_error: float, bias: float, bias_error: float) -> list[str]:
        """What is beyond it. A bias is allowed that is as many nats away, by both KL divergences together."""
        found = []
        if abs(math.log(ratio)) - self.sure * log_ratio_error > math.log(self.ratio):
            kind = "narrow" if ratio > 1 else "wide"
            found.append(f"too {kind}, the variance of q is {1 / ratio:.2f} times what it should be")
        if abs(bias) - self.sure * bias_error > math.sqrt(max((self.ratio + 1 / self.ratio) / 2 - 1, 0.0)):
            found.append(f"biased, the mean of q is off by {abs(bias):.2f} of its standard deviations")
        return found


@dataclass(frozen=True)
class SimulationResults:
    """Truths beside draws, for N data.

    Attributes:
        ranks: ``(N, Q)``, of the truth.
        errors: ``(N, D)``, the truth less the mean of the draws.
        variances: ``(N, D)``, of the draws.
        excess: ``(N,)``, log p(x, z) - log q(z | x) at the truth less its mean over the draws.
    """

    ranks: Tensor
    errors: Tensor
    variances: Tensor
    excess: Tensor


def calibration_errors(found: SimulationResults, count: int) -> CalibrationErrors:
    """How far the truths lie from the mean of ``count`` draws, beside how far the draws do."""
    num, errors, variances = len(found.errors), found.errors.cpu(), found.variances.cpu()
    scale, centre = variances.mean(0), errors.mean(0)
    squared = (errors - centre) ** 2 * num / (num - 1) - variances / count  # less what the mean of the draws errs by
    mean_squared = squared.mean(0)
    constant = (scale == 0) & (mean_squared == 0)
    ratio = torch.where(constant, 1.0, (mean_squared / scale).clamp(1e-9, 1e9))
    influence = torch.where(constant, 0.0, (squared - ratio * variances) / mean_squared.abs().clamp(min=1e-300))
    deviation = scale.clamp(min=1e-300).sqrt()
    told = (squared.sum(0) ** 2 >= _EFFECTIVE * (squared**2).sum(0)) & ~constant & (scale > 0)
    return _effects(ratio, influence, centre / deviation, errors.std(0) / deviation / num**0.5, told)


def errors_after_elbo_corrections(curvature: Tensor, pull: Tensor) -> CalibrationErrors:
    """What would make the ELBO stationary, from ``(N, D)``: h, and the gradient of log p in standard deviations."""
    curvature, pull = curvature.cpu(), pull.cpu()
    mean = curvature.mean(0).clamp(1e-9, 1e9)
    influence = -(curvature - mean) / mean
    error = pull.std(0) / mean / len(pull) ** 0.5
    return _effects(1 / mean, influence, pull.mean(0) / mean, error, torch.ones_like(mean, dtype=torch.bool))


def _effects(ratio: Tensor, influence: Tensor, bias: Tensor, bias_error: Tensor, told: Tensor) -> CalibrationErrors:
    """With the whole: errors of ratios may go together, and each datum has its say on all of them at once."""
    log_ratio_error = influence.std(0) / len(influence) ** 0.5
    overall = (1.0, 0.0, 0.0, 0.0)
    if told.any():
        chance = float((bias_error[told] ** 2).mean())
        size = max(float((bias[told] ** 2).mean()) - chance, 0.0) ** 0.5
        error = float((bias * bias_error)[told].norm()) / int(told.sum()) / size if size else 0.0
        whole = float(influence[:, told].mean(1).std()) / len(influence) ** 0.5
        overall = (math.exp(float(ratio[told].log().mean())), whole, size, max(error, (chance / len(bias)) ** 0.5))
    return CalibrationErrors(ratio, log_ratio_error, bias, bias_error, overall)


_ROWS = 128  # of a batch, for which the guide's network runs once


@torch.no_grad()
def calibrate(
    model: Function,
    guide: Function,
    *data: Tensor,
    num_simulations: int = 1000,
    num_draws: int = 99,
    tolerance: float = 2**0.5,
    alpha: float = 1e-3,
    plate: str = "data",
    seed: int = 0,
) -> Calibration:
    r"""Simulation-based calibration of a guide, on data drawn from the model.

    For each simulation :math:`z^* \sim p(z)` and :math:`x^* \sim p(x \mid z^*)`; L draws of :math:`q(z \mid x^*)`
    follow, and for each quantity f the rank :math:`r = \#\{l : f(z_l, x^*) < f(z^*, x^*)\}`. If q is the exact
    posterior, r is uniform.

    An encoder that is trained is hardly ever exact, and enough simulations will tell: its means err by more than its
    variances admit. That is a limit of encoder and family, and no training longer would mend it. What
    :attr:`Calibration.faults` names is certain by the ranks, and **a fault**: another variance, or another mean, the
    same for all data, would raise the ELBO on the data given, by more than a factor of ``tolerance``. Wherever training
    has converged no such remedy is left, whatever the ranks say.

    The default tolerance is :math:`\sqrt 2`, half way between a sound q and one of half the variance, for which the
    factor is 2. At :math:`\sqrt 2` an interval of 90 % of a normal holds 83 %, and the two KL divergences add up to
    0.06 nats a dimension; at 2 it holds 76 %, at 0.25 nats. With ``tolerance=1`` whatever the ranks tell is named.

    All of this is on average over data: that a few are wrong can hide in it. Of each datum
    :func:`pyro_vae.exact.inference.kl` tells, where there is an exact answer.

    Args:
        model: a Pyro model of one data plate, as the rightmost dimension, that holds all its sites.
        guide: its guide, amortized: of new data it makes a q(z | x) without being fitted to them.
        data: what both take. Their rows, repeated, are the template of the simulations: covariates stay, and so does
            which entries are missing (NaN); what the model observes is drawn anew.
        num_simulations: R.
        num_draws: L of each datum.
        tolerance: the factor in the variance that is let pass, 1 or more.
        alpha: the chance of any false alarm if q is exact.
        plate: name of the data plate.
        seed: of all draws.

    Raises:
        ValueError: if the guide is not amortized or the model holds something of its own for each datum, if the data
            plate does not hold all sites, or if an observed value is not one of the data tensors, as it was given.

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(1),
    ...     encoder=guides.DiagonalNormal(2, 1, networks.linear()),
    ...     decoder=likelihoods.Normal(1, 2, networks.linear()),
    ... )
    >>> x = vae.generate(200)
    >>> before = calibrate(vae.model, vae.guide, x)
    >>> fitted = pv.fit(vae.model, vae.guide, x, epochs=500, lr=1e-2, seed=0)
    >>> before.is_exact, calibrate(vae.model, vae.guide, x).faults
    (False, {})
    """
    _check(num_simulations, num_draws, tolerance, alpha)
    data = data_tensors(data, "data")
    function(guide, "guide")
    with scoped_param_store(), seeded(seed):
        ModelDensity(
            model, data, plate
        )  # refuses what is of another form, which would next be told to hang on other rows
        _check_local(model, data, plate)
        simulated, truth = _simulated(model, data, plate, num_simulations)
        _check_amortized(guide, simulated, plate)
        parts = [
            _compared(ModelDensity(model, part, plate), guide, values, num_draws)
            for part, values in _batches(simulated, truth)
        ]
        whole = SimulationResults(
            *(torch.cat(list(tensors)) for tensors in zip(*(vars(p).values() for p in parts), strict=True))
        )
        elbo_corrections = _elbo_corrections(model, guide, data, plate, num_simulations, num_draws)
    ranks = whole.ranks.cpu()
    return Calibration(
        names=_names(ModelDensity(model, tuple(tensor[:1] for tensor in simulated), plate)),
        ranks=ranks,
        num_draws=num_draws,
        p_values=torch.tensor([p_value(column.numpy(), num_draws + 1) for column in ranks.T]).double(),
        errors=calibration_errors(whole, num_draws),
        elbo_corrections=elbo_corrections,
        divergence=whole.excess.mean().item(),
        divergence_error=whole.excess.std().item() / num_simulations**0.5,
        tolerance=float(tolerance),
        alpha=alpha,
    )


def _check(num_simulations: int, num_draws: int, tolerance: float, alpha: float) -> None:
    positive_int(num_simulations, "num_simulations")
    positive_int(num_draws, "num_draws")
    for name, value in (("num_simulations", num_simulations), ("num_draws", num_draws)):
        if value < 10:
            raise ValueError(f"`{name}` must be 10 or more, of which ranks can be told uniform or not, got {value}")
    if positive(tolerance, "tolerance") < 1:
        raise ValueError(f"`tolerance` must be a factor of 1 or more, got {tolerance!r}")
    if not positive(alpha, "alpha") < 1:
        raise ValueError(f"`alpha` must be a chance between 0 and 1, got {alpha!r}")


def _simulated(model: Function, data: tuple[Tensor, ...], plate: str, num: int) -> tuple[tuple[Tensor, ...], Values]:
    """Data like those given, of ``num`` rows, but drawn from the model; and the latents that they were drawn from."""
    count, places = len(data[0]), torch.arange(num, device=data[0].device)
    rows = places * count // num if num < count else places % count
    template = tuple(tensor[rows] for tensor in data)
    ModelDensity(model, tuple(tensor[: min(num, 4)] for tensor in template), plate)  # refuses what is of another form
    with poutine.block():
        observed = observed_sites(poutine.trace(model).get_trace(*template))
        trace = poutine.trace(ResampleObserved()(model)).get_trace(*template)
    roles = {name: _role(name, site["value"], template) for name, site in observed.items()}
    if len(set(roles.values())) < len(roles):
        raise ValueError(f"`model` must be one for each: its observed sites {list(roles)} share a data tensor")
    sites: dict[str, Any] = dict(trace.nodes)
    complete = list(template)
    for name, index in roles.items():
        value = sites[name]["value"].reshape(template[index].shape)
        complete[index] = value.to(template[index])
        if not value.equal(complete[index].to(value)) and not template[index].is_floating_point():
            raise ValueError(
                f"`data` must be data of that dtype, `x.to(dtype)`, got {template[index].dtype} for {name!r}, of "
                f"which the model draws {value.dtype} with fractions"
            )
    truth = {name: site["value"] for name, site in latent_sites(trace).items() if name not in observed}
    with poutine.block():
        again = observed_sites(poutine.trace(poutine.condition(model, data=truth)).get_trace(*complete))
    for name in roles:
        drawn_density, density = (log_density(one[name]).double() for one in (sites, again))
        if not torch.allclose(drawn_density, density, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"model: what it draws for {name!r} has another density when it is handed back as data. Accepted is a "
                "likelihood that reads the latents and covariates, but not the observed values themselves"
            )
    for index, nan in enumerate(tensor.isnan() for tensor in template):
        complete[index] = complete[index].masked_fill(nan, math.nan) if nan.any() else complete[index]
    return tuple(complete), truth


def _role(name: str, value: Tensor, data: tuple[Tensor, ...]) -> int:
    """Which of the data tensors an observed site has for its value."""
    found = [index for index, tensor in enumerate(data) if tensor is value]
    found = found or [
        index
        for index, tensor in enumerate(data)
        if tensor.numel() == value.numel()
        and torch.allclose(tensor.double().flatten(), value.double().flatten(), equal_nan=True)
    ]
    if len(found) != 1:
        raise ValueError(
            f"`model` must be one of them as it is, `obs=x`: what it observes at {name!r} is {'several' if found else 'none'} "
            f"of its {len(data)} data tensors, so that what is drawn anew could not be handed to it"
        )
    return found[0]


def _check_amortized(guide: Function, data: tuple[Tensor, ...], plate: str) -> None:
    if not is_amortized(guide, data, plate):
        raise ValueError(
            "guide: is not amortized: its q(z | x) of a datum hangs on more than that datum, such as parameters of its "
            "own, and there is none of data drawn anew. Accepted is an encoder, such as guides.DiagonalNormal, in "
            "evaluation mode; hold other guides against pyro_vae.exact.inference.posterior or pyro_vae.reference"
        )


def _check_local(model: Function, data: tuple[Tensor, ...], plate: str) -> None:
    with seeded(0):
        local = is_amortized(model, data, plate)
    if not local:
        raise ValueError(
            "model: its p(x, z) of a datum hangs on more than that datum, such as a covariate that it holds itself and "
            "indexes by the plate, and data drawn anew have none of their own. Hand covariates over as data"
        )


def _batches(data: tuple[Tensor, ...], truth: Values) -> Iterator[tuple[tuple[Tensor, ...], Values]]:
    for first in range(0, len(data[0]), _ROWS):
        rows = slice(first, first + _ROWS)
        yield tuple(tensor[rows] for tensor in data), {name: value[rows] for name, value in truth.items()}


def _compared(problem: ModelDensity, guide: Function, truth: Values, count: int) -> SimulationResults:
    q = GuideDensity(problem, guide)
    q.check_densities()
    draws, log_q = sample_with_log_q(guide, problem.data, count)
    chunks = range(0, count, problem.chunk)
    log_p = torch.cat(
        [problem.log_joint({name: value[i : i + problem.chunk] for name, value in draws.items()}) for i in chunks]
    ).double()
    at_truth = {name: value[None] for name, value in truth.items()}
    true_log_p, true_log_q = problem.log_joint(at_truth)[0].double(), _log_q(q, at_truth)[0].double()
    values = torch.cat([_coordinates(problem, draws), log_p[..., None]], -1)
    true = torch.cat([_coordinates(problem, at_truth)[0], true_log_p[:, None]], -1)
    ties = (values == true).sum(0)
    ranks = (values < true).sum(0) + (torch.rand(ties.shape, device=ties.device) * (ties + 1)).long().clamp(max=ties)
    excess = (true_log_p - true_log_q) - (log_p - log_q.double()).mean(0)
    return SimulationResults(ranks, (true - values.mean(0))[:, :-1], values.var(0)[:, :-1], excess)


def _log_q(q: GuideDensity, truth: Values) -> Tensor:
    """log q(z | x) at the truth, which may lie where q has no density at all."""
    with pyro.validation_enabled(False):
        return q.log_prob(truth).nan_to_num(nan=-math.inf, neginf=-math.inf, posinf=math.inf)


def _coordinates(problem: ModelDensity, values: Values) -> Tensor:
    """All latents in free coordinates, ``(C, N, D)``."""
    return _side_by_side(_unconstrained(site["fn"], values[name]) for name, site in problem.latents.items())


def _side_by_side(values: Iterable[Tensor]) -> Tensor:
    """From ``(C, N, ...)`` each to ``(C, N, D)``."""
    return torch.cat([value.detach().reshape(*value.shape[:2], -1).double() for value in values], -1)


def _unconstrained(fn: Any, value: Tensor) -> Tensor:
    """Values ``(C, N, *event)`` on the reals, or as indicators of classes, as ``(C, N, *shape)``."""
    if not fn.support.is_discrete:
        return biject_to(fn.support).inv(value)
    base = base_distribution(fn)
    return one_hot(value.long(), base.probs.shape[-1]) if isinstance(base, dist.Categorical) else value


def _names(problem: ModelDensity) -> tuple[str, ...]:
    names: list[str] = []
    for name, site in problem.latents.items():
        shape = _unconstrained(site["fn"], site["value"][None]).shape[2:]
        names += [f"{name}{list(place)}" if shape else name for place in np.ndindex(*shape)]
    return (*names, JOINT)


def _elbo_corrections(
    model: Function, guide: Function, data: tuple[Tensor, ...], plate: str, num: int, count: int
) -> CalibrationErrors | None:
    """By the gradients of log p(x, z) at draws of q, on at most ``num`` of the data given."""
    if len(data[0]) == 1:
        return None  # the errors are from the spread over data
    rows = torch.arange(min(num, len(data[0])), device=data[0].device) * len(data[0]) // min(num, len(data[0]))
    found = []
    for part, _ in _batches(tuple(tensor[rows] for tensor in data), {}):
        problem = ModelDensity(model, part, plate)
        if any(site["fn"].support.is_discrete for site in problem.latents.values()):
            return None
        free, gradients = _gradients(problem, sample_with_log_q(guide, part, count)[0])
        centred = free - free.mean(0)
        curvature = -(gradients * centred).sum(0) / (count - 1)
        found.append((curvature, gradients.mean(0) * free.std(0)))
    return errors_after_elbo_corrections(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _gradients(problem: ModelDensity, draws: Values) -> tuple[Tensor, Tensor]:
    """Draws in free coordinates, and the gradients of log p(x, z) by them, both ``(C, N, D)``."""
    maps = {name: biject_to(site["fn"].support) for name, site in problem.latents.items()}
    count = len(next(iter(draws.values())))
    parts = []
    for first in range(0, count, problem.chunk):
        free = {name: maps[name].inv(draws[name][first : first + problem.chunk]).detach() for name in maps}
        with torch.enable_grad():
            values = {name: value.requires_grad_() for name, value in free.items()}
            sites = {name: maps[name](value) for name, value in values.items()}
            log_p = problem.log_joint(sites).sum()
            log_p = log_p + sum(maps[name].log_abs_det_jacobian(values[name], sites[name]).sum() for name in maps)
            gradients = torch.autograd.grad(log_p, list(values.values()))
        parts.append((_side_by_side(free.values()), _side_by_side(gradients)))
    whole, slopes = (torch.cat(list(tensors)) for tensors in zip(*parts, strict=True))
    return whole, slopes
