"""Importance sampling with the guide as proposal: estimates of log p(x), with their error and reliability."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyro_vae._utils.chunks import in_chunks
from pyro_vae._utils.data import data_tensors
from pyro_vae._utils.display import Result, Table, count_of, per_cell
from pyro_vae._utils.param_store import without_training
from pyro_vae._utils.progress import progress_bar
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.shared_calls import report_of_ranks
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import optional_boolean, positive_int
from pyro_vae.arguments import any_arguments
from pyro_vae.compilation.cost import automatic
from pyro_vae.compilation.graph import CompiledFunction
from pyro_vae.evidence.pareto import pareto_shape, reliable_shape, shape_error, tail_length
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.exact.model_density import ModelDensity
from pyro_vae.model_guide import ModelGuide

__all__ = [
    "Evidence", "ReportProgress", "WeightSampler", "batched_estimate", "cell_densities", "cell_plates", "densities",
    "log_evidence",
]  # fmt: skip

WeightSampler = Callable[[int], Tensor]
"""From a number of draws to their log-weights, ``(count, N)``."""
ReportProgress = Callable[[float], object]
"""Receives the number of weights that were computed since the last call."""

_BUDGET = 2**22  # numbers in the largest tensor of a chunk
_ROWS = 128  # in a batch


@dataclass(frozen=True, repr=False)
class Evidence(Result):
    r"""Estimates of :math:`\log p(x_i)` from K weighted draws each. ``print`` shows a summary.

    There is one for each datum where all latents are local to it; one for each cell of the plates that all sites share
    where they are local to an outer plate, such as groups; and one number for all data, of shape ``()``, where some
    latent is global, or the guide draws the latents of all data together. Shapes below are those of the first case.

    Attributes:
        log_evidence: ``(N,)``, in nats: a lower bound in expectation.
        ess: ``(N,)``, the effective number of draws :math:`(\sum_k w_k)^2 / \sum_k w_k^2`, from 1 to K. An estimate
            that depends on a few of many draws is too low, by more than its standard error.
        khat: ``(N,)``, the shape of the tail of the weights, see :func:`pyro_vae.evidence.pareto.pareto_shape`. Above
            :attr:`reliable_khat` neither the estimate nor its standard error is reliable. k̂ is itself an estimate, with
            the error :attr:`khat_error`, and sees only what was drawn.
        num_samples: K.
        plates: the names of the plates whose cells the estimates are of, from left to right; ``None`` for data.

    >>> constant = torch.full((4,), -1.5)
    >>> print(Evidence(constant, ess=torch.full((4,), 100.0), khat=torch.full((4,), -math.inf), num_samples=100))
    log p(x), in expectation at least -1.500 nats per datum
    standard error 0.000 over 4 data, of it 0.000 from 100 draws each
    median ess 100.0 of 100; k̂ plus its error above 0.50 for 0.0 % of the data
    """

    log_evidence: Tensor
    ess: Tensor
    khat: Tensor
    num_samples: int
    plates: tuple[str, ...] | None = None

    @property
    def _of(self) -> str:
        """What each estimate is of."""
        return per_cell(self.plates)

    @property
    def _over(self) -> str:
        """How many estimates there are, of what."""
        count = self.log_evidence.numel()
        return count_of(count, "datum", "data") if self.plates is None else count_of(count, "cell")

    @property
    def standard_error(self) -> Tensor:
        """Standard errors ``(N,)``, in nats, of the mean weight relative to it (delta method); NaN for one draw."""
        if self.num_samples == 1:
            return torch.full_like(self.ess, math.nan)
        return (1 / self.ess - 1 / self.num_samples).clamp(min=0).sqrt()

    @property
    def bias_corrected(self) -> Tensor:
        r"""Estimates ``(N,)``, in nats, without the bias of the logarithm to first order in 1/K; they are no bounds.

        The mean weight is unbiased for p(x), and its logarithm too low by half its relative variance,
        :math:`\mathbb{E}[\log\hat p] \approx \log p(x) - \mathrm{se}^2 / 2`; more if k̂ is unreliable. NaN for one draw.
        """
        return self.log_evidence + self.standard_error**2 / 2

    @property
    def reliable_khat(self) -> float:
        r"""The largest k̂ of a reliable estimate, :math:`\min(1 - 1/\log_{10} K, 0.7)`."""
        return reliable_shape(self.num_samples)

    @property
    def khat_error(self) -> Tensor:
        """Standard errors of k̂, ``(N,)``, see :func:`pyro_vae.evidence.pareto.shape_error`."""
        return shape_error(self.khat, self.num_samples)

    @property
    def unreliable(self) -> Tensor:
        """Whether k̂ plus its error is above :attr:`reliable_khat`, or unknown from too few draws, ``(N,)``."""
        return ~(self.khat + self.khat_error <= self.reliable_khat)

    @property
    def unreliable_share(self) -> str:
        """In words, of how many estimates k̂ is too high; of one estimate, its k̂."""
        if self.khat.numel() == 1:
            return f"k̂ is {float(self.khat):.2f}, plus its error above {self.reliable_khat:.2f}"
        share = self.unreliable.double().mean().item()
        return f"k̂ plus its error is above {self.reliable_khat:.2f} for {share:.0%} of the {self._over.split()[-1]}"

    def _line(self) -> str:
        draws = count_of(self.num_samples, "draw")
        if self.plates == ():
            trust = "unreliable" if self.unreliable.any() else "reliable"
            return (
                f"log p(x) at least {float(self.log_evidence):.3f} ± {float(self.standard_error):.3f} nats of all data "
                f"in expectation, from {draws}, k̂ {float(self.khat):.2f}, {trust}"
            )
        return (
            f"log p(x) at least {_mean_and_error(self.log_evidence)} nats {self._of} in expectation, from "
            f"{self._over} with {draws} each, k̂ unreliable for "
            f"{100 * float(self.unreliable.double().mean()):.1f} %"
        )

    def _table(self) -> Table:
        log_p, error = self.log_evidence.double().flatten(), self.standard_error.double().flatten()
        count = len(log_p)
        estimate = "log p(x) is estimated by importance sampling from q(z|x): its expectation is a lower bound."
        if self.plates == ():
            rows = [
                ("log p(x) of all data", f"{log_p.item():.3f}"),
                ("standard error due to the draws", f"{error.item():.3f}"),
                ("effective sample size", f"{self.ess.item():.1f} of {self.num_samples} draws"),
                (
                    f"k̂, reliable up to {self.reliable_khat:.2f}",
                    f"{self.khat.item():.2f} ± {self.khat_error.item():.2f}",
                ),
            ]
            return Table(("quantity", "value"), rows, f"In nats. {estimate}")
        rows = [
            ("mean of log p(x)", f"{log_p.mean():.3f}"),
            ("standard error of the mean", f"{log_p.std() / count**0.5:.3f}" if count > 1 else "unknown"),
            ("standard error due to the draws alone", f"{error.square().sum().sqrt() / count:.3f}"),
            ("median effective sample size", f"{self.ess.median():.1f} of {self.num_samples} draws"),
            (
                f"unreliable estimates (k̂ plus its error above {self.reliable_khat:.2f})",
                f"{self.unreliable.double().mean():.1%}",
            ),
        ]
        return Table(("quantity", "value"), rows, f"In nats {self._of}, over {self._over}. {estimate}")

    def __str__(self) -> str:
        estimate, noise = self.log_evidence.double().flatten(), self.standard_error.double().flatten()
        count, unsure = len(estimate), "above" if self.unreliable.any() else "not above"
        if self.plates == ():
            return (
                f"log p(x) of all data, in expectation at least {estimate.item():.3f} nats\n"
                f"standard error {noise.item():.3f} from {self.num_samples} draws\n"
                f"ess {self.ess.item():.1f} of {self.num_samples}; k̂ {self.khat.item():.2f}, plus its error {unsure} "
                f"{self.reliable_khat:.2f}"
            )
        spread = float(estimate.std() / count**0.5) if count > 1 else math.nan
        unreliable = 100 * float(self.unreliable.double().mean())
        return (
            f"log p(x), in expectation at least {float(estimate.mean()):.3f} nats {self._of}\n"
            f"standard error {spread:.3f} over {count} {'data' if self.plates is None else 'cells'}, of it "
            f"{float(noise.square().sum().sqrt() / count):.3f} from {self.num_samples} draws each\n"
            f"median ess {float(self.ess.median()):.1f} of {self.num_samples}; "
            f"k̂ plus its error above {self.reliable_khat:.2f} for {unreliable:.1f} % of "
            f"{'the data' if self.plates is None else 'them'}"
        )


def _mean_and_error(log_p: Tensor) -> str:
    """Format the mean over data with its standard error, where there are two data or more."""
    log_p = log_p.double()
    return f"{log_p.mean():.3f}" + (f" ± {log_p.std() / len(log_p) ** 0.5:.3f}" if len(log_p) > 1 else "")


@report_of_ranks("log_evidence")
@torch.no_grad()
@any_arguments
@without_training
def log_evidence(
    model: Function,
    guide: Function,
    *data: Data,
    num_samples: int = 1000,
    plate: str = "data",
    seed: int = 0,
    progress: bool | None = None,
    compile: bool | None = None,
) -> Evidence:
    r"""Estimate the log marginal likelihood of each datum,

    .. math:: \log p(x) \approx \log \frac1K \sum_{k=1}^K w_k, \qquad
              w_k = \frac{p(x, z_k)}{q(z_k \mid x)},\quad z_k \sim q(z \mid x).

    In expectation this is a lower bound, which is the ELBO at K = 1 and tightens as K grows. Prefer
    :func:`pyro_vae.exact.inference.log_evidence` where it has an answer. If k̂ is large, the guide is too far from the
    posterior, and :func:`pyro_vae.annealed_log_evidence` may be better. Latents may be continuous, discrete, or both.

    What x_i is follows from the plates that hold every site: a datum where all latents are local to it, a group where
    they are local to an outer plate. Where some latent is global, or the guide draws the latents of all data together,
    there is one number for all data. Its weights need a guide that is close to the posterior of all latents. Discrete
    latents that the guide leaves out are summed out, as ``TraceEnum_ELBO`` does. Latents may be masked, in model and
    guide alike.

    Args:
        model, guide: a Pyro model and its guide.
        data: arguments of both.
        num_samples: K, draws for each datum. They are computed in batches of rows and chunks of draws, which bound the
            memory: only running sums of the weights are stored, and the 3 sqrt(K) largest ones of each datum, for k̂.
        plate: name of the data plate.
        seed: of the draws.
        progress: whether to show a progress bar; by default only on a terminal or in a notebook.
        compile: whether to capture the weights of a chunk as a graph and compile it, see
            :mod:`pyro_vae.compilation.graph`. The results are the same except for rounding. By default, the numbers of
            draws and data decide: many chunks are captured where they can be, and compiled where that takes less time
            in all, see :func:`pyro_vae.compilation.cost.automatic`. ``True`` compiles in any case, which takes some
            seconds.

    Raises:
        ValueError: if model and guide are not of this form, or the likelihood is not normalised;
            :class:`pyro_vae.compilation.graph.CaptureError`, a subclass, if they cannot be captured and
            ``compile=True``.

    Source: Burda, Grosse and Salakhutdinov 2016, "Importance weighted autoencoders", equation 8.

    >>> from pyro_vae import VAE, guides, likelihoods, networks, priors
    >>> net = networks.linear()
    >>> vae = VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> estimate = log_evidence(vae.model, vae.guide, torch.randn(10, 2), num_samples=200)
    >>> estimate.log_evidence.shape, bool((estimate.ess <= 200).all()), estimate.khat.shape
    (torch.Size([10]), True, torch.Size([10]))
    """
    positive_int(num_samples, "num_samples")
    optional_boolean(compile, "compile")
    p, q = densities(model, guide, data, plate)
    num_data, runs = p.num_data, dict[tuple[int, int], Function]()

    def calls(p: ModelDensity, count: int) -> int:
        """How often there are so many draws of a batch of so many rows."""
        size = draws_at_once(p)
        return max(1, num_data // _ROWS if p.num_data == _ROWS else 1) * (num_samples // size if count == size else 1)

    def make_sampler(p: ModelDensity, report: ReportProgress) -> WeightSampler:
        def sample(count: int) -> Tensor:
            run: Function = partial(_log_weights, q.of_rows(p), count)
            if compile is None:
                run = runs.setdefault((count, p.num_data), automatic(run, calls(p, count)))
            elif compile:
                run = runs.setdefault((count, 0), CompiledFunction(run))
            (log_weights,) = run(*p.data)
            report(log_weights.numel())
            return log_weights

        return sample

    return batched_estimate("log_evidence", p, num_samples, make_sampler, seed, progress)


def densities(
    model: Function, guide: Function, data: Sequence[Tensor], plate: str, continuous: bool = False
) -> tuple[ModelDensity, GuideDensity]:
    """Return log p(x, z) and log q(z | x), run on as few rows as possible: their batches follow."""
    few, whole = ModelGuide.on_few_rows(model, guide, data_tensors(data, "data", model, lazy=True), plate)
    p, q = cell_densities(few, continuous)
    return (p if few is whole else p.on_all_rows(whole)), q


def cell_densities(pair: ModelGuide, continuous: bool = False) -> tuple[ModelDensity, GuideDensity]:
    """Return log p(x, z) and log q(z | x) of a pair, for the cells in which both have densities of their own.

    With ``continuous``, discrete latents are summed out of both next to continuous ones.
    """
    discrete = [name for name in pair.guide_latents if continuous and _is_summable(pair, name)]
    discrete = discrete if len(discrete) < len(pair.guide_latents) else []
    by_rows = bool(pair.latents) and pair.has_one_plate and not pair.eliminated and not discrete
    p = ModelDensity(pair, by_rows, summed_out=discrete)
    q = GuideDensity(p)
    if not p.by_rows and not _has_independent_cells(p, q):
        p = ModelDensity(pair, by_rows=False, units=(), summed_out=discrete)
        q = GuideDensity(p)
    return p, q


def cell_plates(p: ModelDensity) -> tuple[str, ...] | None:
    """Return the names of the plates whose cells have densities of their own; ``None`` where they are the data."""
    names = tuple(frame.name for frame in p.units)
    return None if p.by_rows or names == (p.plate,) else names


def _is_summable(pair: ModelGuide, name: str) -> bool:
    """Whether a latent can be summed out of model and guide."""
    sites = (latents.get(name) for latents in (pair.latents, pair.guide_latents))
    return all(site is not None and site["fn"].has_enumerate_support for site in sites)


def _has_independent_cells(p: ModelDensity, q: GuideDensity) -> bool:
    """Whether the densities of a cell depend on its own latents alone: those of half of the cells are replaced."""
    if p.num_data == 1 or not q.sites:
        return True
    with torch.no_grad(), seeded(2):
        values, log_q = q.sample(2)
        functions = [p.log_joint, *([q.log_prob] if q.has_any_density else [])]
        even = torch.arange(p.num_data, device=log_q.device) % 2 == 0
        for kept in (even, ~even):
            one = {name: value[:1] for name, value in values.items()}
            mixed = {
                name: torch.where(kept.reshape(-1, *[1] * (value.dim() - 2)), value[:1], value[1:])
                for name, value in values.items()
            }
            for density in functions:
                if not torch.allclose(density(one)[0][kept], density(mixed)[0][kept], rtol=1e-3, atol=1e-3):
                    return False
    return True


def batched_estimate(
    name: str,
    p: ModelDensity,
    num_samples: int,
    make_sampler: Callable[[ModelDensity, ReportProgress], WeightSampler],
    seed: int,
    progress: bool | None,
) -> Evidence:
    """Estimate the evidence from K log-weights of each datum, in batches of rows and chunks of draws.

    ``name`` is that of the function, for the progress bar.
    ``make_sampler`` returns the function that draws the log-weights of a batch of rows; the rest is as in
    :func:`log_evidence`.
    """
    total, device = p.num_data * num_samples, p.data[0].device
    with seeded(seed), progress_bar(name, progress, total=total, unit="draw", unit_scale=True) as bar:
        if _has_batches(p):

            def summarize(first: int) -> tuple[Tensor, Tensor, Tensor]:
                part = p.of_rows(slice(first, first + _ROWS))
                return _summarize_weights(part, make_sampler(part, bar.advance), num_samples)

            parts = in_chunks(name, range(0, p.num_data, _ROWS), summarize, device, seed)
        else:
            parts = [_summarize_weights(p, make_sampler(p, bar.advance), num_samples, name, seed)]
    sizes = [p.num_data] if p.by_rows else [frame.size for frame in p.units]
    log_evidence, ess, khat = (torch.cat(list(of)).to(p.dtype).reshape(sizes) for of in zip(*parts, strict=True))
    return Evidence(log_evidence, ess, khat, num_samples, cell_plates(p))


def draws_at_once(p: ModelDensity) -> int:
    """Return the number of draws of each datum whose log-weights are computed at once."""
    return p.chunk_size(_BUDGET)


def _has_batches(p: ModelDensity) -> bool:
    """Whether rows come in batches, which must be independent: q(z | x) of one is then computed once for many draws."""
    return p.by_rows and p.num_data > _ROWS and p.pair.is_amortized("model") and p.pair.is_amortized("guide")


def _summarize_weights(
    p: ModelDensity, sampler: WeightSampler, num_samples: int, name: str = "", seed: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The logarithm of the mean weight, the effective number of draws and k̂, ``(N,)`` each.

    With a seed, ranks share the draws. What the sampler drew before its first weights has the number 0.
    """
    chunk, top_size = draws_at_once(p), tail_length(num_samples) + 1
    counts = [min(chunk, num_samples - first) for first in range(0, num_samples, chunk)]

    def largest(log_weight: Tensor) -> Tensor:
        return log_weight.topk(min(top_size, len(log_weight)), dim=0, sorted=False).values

    def summarize(count: int) -> tuple[Tensor, Tensor, Tensor]:
        log_weight = sampler(count)
        # The largest weights keep their dtype, from which k̂ takes the size of a rounding error.
        top, log_weight = largest(log_weight), log_weight.double()
        return top, log_weight.logsumexp(0), (2 * log_weight).logsumexp(0)

    if seed is None or len(counts) == 1:
        found: Iterable[tuple[Tensor, Tensor, Tensor]] = map(summarize, counts)
    else:
        found = in_chunks(name, counts, summarize, p.data[0].device, seed, first=1)
    total, total_of_squares = p.zeros() - math.inf, p.zeros() - math.inf
    top = p.zeros()[:0].reshape(0, p.num_data)
    for of_chunk, log_sum, log_sum_of_squares in found:
        top = largest(torch.cat([top.to(of_chunk.dtype), of_chunk]))
        total = torch.logaddexp(total, log_sum)
        total_of_squares = torch.logaddexp(total_of_squares, log_sum_of_squares)
    ess = (2 * total - total_of_squares).exp()
    return total - math.log(num_samples), ess, pareto_shape(top, num_samples)


def _log_weights(q: GuideDensity, count: int, *data: Tensor) -> list[Tensor]:
    """log p(x, z) - log q(z | x) at draws z ~ q, ``(count, N)``."""
    q = q.of_rows(q.p.on_data(data))
    values, log_q = q.sample(count)
    return [q.p.log_joint(values) - log_q]
