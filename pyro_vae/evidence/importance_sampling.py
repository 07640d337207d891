"""Estimates of log p(x) where there is no exact answer: importance sampling with the guide as the proposal."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae._utils.param_store import scoped_param_store
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import boolean, positive_int, tqdm_disable
from pyro_vae.compilation.graph import CompiledFunction
from pyro_vae.evidence.pareto import pareto_shape, reliable_shape, tail_length
from pyro_vae.exact.densities import ModelDensity, log_joint, sample_with_log_q
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.model_guide import is_amortized

__all__ = ["Evidence", "batched_estimate", "log_evidence"]

_BUDGET = 2**22  # numbers in the largest tensor of one chunk


_ROWS = 128  # of a batch


Sampler = Callable[[int], Tensor]


Done = Callable[[float], object]


@dataclass(frozen=True)
class Evidence:
    r"""Estimates of :math:`\log p(x_i)` from K weighted draws each. Printed, it says what they come to.

    Attributes:
        log_evidence: ``(N,)``, in nats: a lower bound in expectation.
        ess: ``(N,)``, the effective number of draws :math:`(\sum_k w_k)^2 / \sum_k w_k^2`, from 1 to K. An estimate
            that rests on a few draws of many is too low, by more than its standard error tells.
        khat: ``(N,)``, the shape of the tail of the weights, see :func:`pyro_vae.evidence.pareto.pareto_shape`. Above
            :attr:`reliable_khat` neither the estimate nor its standard error is to be trusted.
        num_samples: K.

    >>> constant = torch.full((4,), -1.5)
    >>> print(Evidence(constant, ess=torch.full((4,), 100.0), khat=torch.full((4,), -math.inf), num_samples=100))
    log p(x), in expectation at least -1.500 nats per datum
    standard error 0.000 over 4 data, of it 0.000 from 100 draws each
    median ess 100.0 of 100; k̂ above 0.50 for 0.0 % of the data
    """

    log_evidence: Tensor
    ess: Tensor
    khat: Tensor
    num_samples: int

    @property
    def standard_error(self) -> Tensor:
        """``(N,)``, in nats, by the delta method: that of the mean weight, relative to it. NaN of one draw."""
        if self.num_samples == 1:
            return torch.full_like(self.ess, math.nan)
        return (1 / self.ess - 1 / self.num_samples).clamp(min=0).sqrt()

    @property
    def bias_corrected(self) -> Tensor:
        r"""``(N,)``, in nats: with the bias of the logarithm taken off, to first order in 1/K, and no bound any more.

        The mean weight is unbiased for p(x), and its logarithm too low by half its relative variance,
        :math:`\mathbb{E}[\log\hat p] \approx \log p(x) - \mathrm{se}^2 / 2`. NaN of one draw. Where k̂ is not
        reliable the bias is larger than this.
        """
        return self.log_evidence + self.standard_error**2 / 2

    @property
    def reliable_khat(self) -> float:
        r"""The k̂ up to which an estimate is to be trusted, :math:`\min(1 - 1/\log_{10} K, 0.7)`."""
        return reliable_shape(self.num_samples)

    @property
    def unreliable(self) -> Tensor:
        """``(N,)``, whether k̂ is above :attr:`reliable_khat`, or unknown for want of draws."""
        return ~(self.khat <= self.reliable_khat)

    def __str__(self) -> str:
        found, noise = self.log_evidence.double(), self.standard_error.double()
        count = len(found)
        spread = float(found.std() / count**0.5) if count > 1 else math.nan
        return (
            f"log p(x), in expectation at least {float(found.mean()):.3f} nats per datum\n"
            f"standard error {spread:.3f} over {count} data, of it "
            f"{float(noise.square().sum().sqrt() / count):.3f} from {self.num_samples} draws each\n"
            f"median ess {float(self.ess.median()):.1f} of {self.num_samples}; "
            f"k̂ above {self.reliable_khat:.2f} for {100 * float(self.unreliable.double().mean()):.1f} % of the data"
        )


@torch.no_grad()
@scoped_param_store()
def log_evidence(
    model: Function,
    guide: Function,
    *data: Tensor,
    num_samples: int = 1000,
    plate: str = "data",
    seed: int = 0,
    progress: bool | None = None,
    compile: bool = False,
) -> Evidence:
    r"""Estimate the log marginal likelihood of each datum,

    .. math:: \log p(x) \approx \log \frac1K \sum_{k=1}^K w_k, \qquad
              w_k = \frac{p(x, z_k)}{q(z_k \mid x)},\quad z_k \sim q(z \mid x).

    In expectation a lower bound that tightens as K grows; at K = 1 the ELBO. Where :func:`pyro_vae.exact.inference.log_evidence`
    has an answer, that is better; where k̂ says that the guide is too far from the posterior, so may be
    :func:`pyro_vae.annealed_log_evidence`. Latents may be continuous, discrete, or both.

    Args:
        model: a Pyro model with one data plate, as the rightmost dimension, that holds all its sites.
        guide: its guide.
        data: what both take.
        num_samples: K, draws of each datum's latents; in batches of rows and chunks of draws that bound the memory. Of
            the weights only running sums are kept, and the largest, about 3 sqrt(K) of each datum, for k̂.
        plate: name of the data plate.
        seed: of the draws.
        progress: whether to show a progress bar; only on a terminal if left out.
        compile: whether to capture the weights of a chunk as one graph and replay it compiled, see
            :mod:`pyro_vae.compilation.graph`: the same draws and, but for rounding, the same numbers, faster after some seconds
            in a C++ compiler. It pays for many draws of many data: each call captures its own.

    Raises:
        ValueError: if model and guide are not of this form, or the likelihood is not normalised;
            :class:`pyro_vae.compilation.graph.CaptureError` is one, if they cannot be captured.

    Source: Burda, Grosse and Salakhutdinov 2016, "Importance weighted autoencoders", equation 8.

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(1),
    ...     encoder=guides.DiagonalNormal(2, 1, networks.linear()),
    ...     decoder=likelihoods.Normal(1, 2, networks.linear()),
    ... )
    >>> estimate = log_evidence(vae.model, vae.guide, torch.randn(10, 2), num_samples=200)
    >>> estimate.log_evidence.shape, bool((estimate.ess <= 200).all()), estimate.khat.shape
    (torch.Size([10]), True, torch.Size([10]))
    """
    positive_int(num_samples, "num_samples")
    boolean(compile, "compile")
    problem = ModelDensity(model, data, plate)
    GuideDensity(problem, guide).check_densities()
    replayed: dict[int, CompiledFunction] = {}

    def sampler(problem: ModelDensity, guide: Function, done: Done) -> Sampler:
        def sample(count: int) -> Tensor:
            weights = partial(_log_weights, model, guide, count)
            run = replayed.setdefault(count, CompiledFunction(weights)) if compile else weights
            (log_weights,) = run(*problem.data)
            done(log_weights.numel())
            return log_weights

        return sample

    return batched_estimate(problem, guide, num_samples, sampler, seed, progress)


def batched_estimate(
    problem: ModelDensity,
    guide: Function,
    num_samples: int,
    sampler: Callable[[ModelDensity, Function, Done], Sampler],
    seed: int,
    progress: bool | None,
) -> Evidence:
    """The evidence from K log-weights of each datum, in batches of rows and chunks of draws.

    Args:
        problem: the model on its data.
        guide: its guide.
        num_samples: K.
        sampler: makes of a batch of rows and the guide the function that draws log-weights, ``count -> (count, N)``,
            and tells its third argument how many are done.
        seed: of the draws.
        progress: as in :func:`log_evidence`.
    """
    total = problem.num_data * num_samples
    with seeded(seed), tqdm(total=total, disable=tqdm_disable(progress), unit="draw", unit_scale=True) as bar:
        parts = [_summed(part, sampler(part, guide, bar.update), num_samples) for part in _batches(problem, guide)]
    found, ess, khat = (torch.cat(list(part)).to(problem.dtype) for part in zip(*parts, strict=True))
    return Evidence(found, ess, khat, num_samples)


def _batches(problem: ModelDensity, guide: Function) -> list[ModelDensity]:
    """Some rows each, for which q(z | x) is computed once for many draws; all at once where rows need each other."""
    model, data, plate = problem.model, problem.data, problem.plate
    if problem.num_data <= _ROWS or not (is_amortized(model, data, plate) and is_amortized(guide, data, plate)):
        return [problem]
    parts = zip(*(tensor.split(_ROWS) for tensor in data), strict=True)
    return [ModelDensity(model, part, plate) for part in parts]


def _summed(problem: ModelDensity, sampler: Sampler, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """The logarithm of the mean weight, the effective number of draws and k̂, ``(N,)`` each."""
    widths = [site["fn"].event_shape.numel() for site in (problem.latents | problem.observed).values()]
    chunk = max(1, _BUDGET // (problem.num_data * max(64, *widths)))
    kept = tail_length(num_samples) + 1
    total, total_of_squares = problem.zeros() - math.inf, problem.zeros() - math.inf
    top = problem.zeros()[:0].reshape(0, problem.num_data)
    for first in range(0, num_samples, chunk):
        log_weight = sampler(min(chunk, num_samples - first))
        # The tail keeps its dtype: k̂ knows by it what is rounding.
        top = torch.cat([top.to(log_weight.dtype), log_weight])
        top = top.topk(min(kept, len(top)), dim=0, sorted=False).values
        log_weight = log_weight.double()
        total = torch.logaddexp(total, log_weight.logsumexp(0))
        total_of_squares = torch.logaddexp(total_of_squares, (2 * log_weight).logsumexp(0))
    ess = (2 * total - total_of_squares).exp()
    return total - math.log(num_samples), ess, pareto_shape(top, num_samples)


def _log_weights(model: Function, guide: Function, count: int, *data: Tensor) -> list[Tensor]:
    """log p(x, z) - log q(z | x) at draws z ~ q, ``(count, N)``."""
    values, log_q = sample_with_log_q(guide, data, count)
    return [log_joint(model, values, data) - log_q]
