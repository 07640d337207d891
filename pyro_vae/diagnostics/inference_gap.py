r"""The inference gap of a guide, split into the gap of its family (approximation) and of its network (amortization).

.. math:: \log p(x) - \mathrm{ELBO}(q) = \underbrace{\log p(x) - \mathrm{ELBO}(q^*)}_{\text{approximation}}
          + \underbrace{\mathrm{ELBO}(q^*) - \mathrm{ELBO}(q)}_{\text{amortization}},

with :math:`q^*` the best member of q's family for each datum, found by refining q for each datum separately.

Where a datum has no latents of its own, as with global latents, there is the gap of each cell of the plates that all
sites share, or of all data together, and no such split.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae import exact
from pyro_vae._utils.chunks import in_chunks
from pyro_vae._utils.data import DataTensors, data_tensors
from pyro_vae._utils.display import Result, Table, count_of, per_cell
from pyro_vae._utils.param_store import without_training
from pyro_vae._utils.progress import progress_bar
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.shared_calls import report_of_ranks
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import function, positive, positive_int
from pyro_vae.arguments import any_arguments
from pyro_vae.diagnostics.refinement import RefinementError, refine
from pyro_vae.distributions.properties import without_independent
from pyro_vae.evidence.importance_sampling import Evidence, cell_densities, cell_plates, log_evidence
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.exact.linear_gaussian import linear_gaussian
from pyro_vae.exact.model_density import ModelDensity
from pyro_vae.model_guide import ModelGuide

__all__ = ["InferenceGap", "inference_gap"]

_BUDGET = 2**23  # numbers in the draws of all rows that are refined together, several times as many with gradients


@dataclass(frozen=True, repr=False)
class InferenceGap(Result):
    r"""The result of :func:`inference_gap`, in nats, ``(N,)`` each.

    Where a datum has no latents of its own, N is the number of cells of ``plates``, and 1 for all data together.

    Attributes:
        log_evidence: log p(x), exact or an estimate that is in expectation a lower bound.
        log_evidence_error: its standard error; 0 if it is exact.
        elbo: the ELBO of the guide.
        elbo_error: its standard error; 0 if it is exact.
        refined_elbo: the ELBO of the guide refined for each datum; ``None`` without a split.
        amortization_error: standard error of ``amortization``, with the same noise for q and q*, or ``None``.
        is_exact: whether ``log_evidence`` is exact.
        rows: the index of each datum among all rows, of which it takes some if there are many, as does
            :func:`pyro_vae.inspect`.
        refined: the refined guide, a Pyro guide of these rows, or ``None``.
        steps: steps of the refinement; 0 if a refined guide was given.
        plates: the names of the plates whose cells the numbers are of; ``None`` for data, ``()`` for all data together.
        evidence: the importance-weighted estimate, with its k̂; ``None`` if log p(x) is exact.
        why_no_split: why there is no approximation and amortization; empty if there are.
    """

    log_evidence: Tensor
    log_evidence_error: Tensor
    elbo: Tensor
    elbo_error: Tensor
    refined_elbo: Tensor | None
    amortization_error: Tensor | None
    is_exact: bool
    rows: Tensor
    refined: Function | None
    steps: int = 0
    plates: tuple[str, ...] | None = None
    evidence: Evidence | None = None
    why_no_split: str = ""

    @property
    def worst(self) -> tuple[float, int]:
        """The largest gap, and the index of its datum."""
        index = self.gap.argmax()
        return self.gap[index].item(), int(self.rows[index])

    @property
    def gap(self) -> Tensor:
        r""":math:`\log p(x) - \mathrm{ELBO}(q) = \mathrm{KL}(q(z \mid x) \Vert p(z \mid x))`."""
        return self.log_evidence - self.elbo

    @property
    def approximation(self) -> Tensor | None:
        r""":math:`\log p(x) - \mathrm{ELBO}(q^*)`: the gain of a richer family; ``None`` without a split."""
        return None if self.refined_elbo is None else self.log_evidence - self.refined_elbo

    @property
    def amortization(self) -> Tensor | None:
        r""":math:`\mathrm{ELBO}(q^*) - \mathrm{ELBO}(q)`: the gain of a larger network or a longer fit, or ``None``."""
        return None if self.refined_elbo is None else self.refined_elbo - self.elbo

    @property
    def _refinement(self) -> str:
        """How q* was found."""
        return (
            f"refined by {count_of(self.steps, 'step')} for each datum" if self.steps else "a refined guide, as given"
        )

    @property
    def _least(self) -> str:
        return "" if self.is_exact else "at least "

    @property
    def _kind(self) -> str:
        """How log p(x) was computed."""
        if self.is_exact:
            return "exact"
        return f"importance-weighted from {'q' if self.refined_elbo is None else 'q*'}, in expectation a lower bound"

    @property
    def _trust(self) -> str:
        """Whether the estimate of log p(x) is reliable, where it is one number or a few."""
        if self.evidence is None or not self.why_no_split or not self.evidence.unreliable.any():
            return ""
        return f"{self.evidence.unreliable_share}: log p(x) may be higher, by an unknown amount"

    def _largest(self, words: str = "the largest gap is") -> str:
        largest, row = self.worst
        name = "datum" if self.plates is None else "cell"
        return f"{words} {largest:.3f}, of {name} {row}" if len(self.gap) > 1 else ""

    def _line(self) -> str:
        gap = f"the ELBO is {self._least}{self.gap.mean().item():.3f} nats {per_cell(self.plates)} below log p(x)"
        if self.approximation is not None and self.amortization is not None:
            gap += (
                f": approximation {self.approximation.mean().item():.3f} + amortization "
                f"{self.amortization.mean().item():.3f}"
            )
        gap += f"; {self._largest()}" if len(self.gap) > 1 else ""
        counted = count_of(len(self.gap), "datum", "data") if self.plates is None else count_of(len(self.gap), "cell")
        return gap if self.plates == () else f"{gap}; {counted}"

    def _table(self) -> Table:
        rows = [("inference gap, log p(x) − ELBO", f"{self._least}{self.gap.mean().item():.3f}")]
        note = f"In nats {per_cell(self.plates)}."
        if self.approximation is not None and self.amortization is not None:
            approximation, amortization = (part.mean().item() for part in (self.approximation, self.amortization))
            rows += [
                ("approximation gap, due to the family of q", f"{self._least}{approximation:.3f}"),
                ("amortization gap, due to the network of q", f"{amortization:.3f}"),
            ]
            data = count_of(len(self.gap), "datum", "data")
            note = f"In nats per datum, over {data}. The best q of the family, q*, is {self._refinement}."
        else:
            rows.append(("ELBO", f"{self.elbo.mean().item():.3f}"))
        if len(self.gap) > 1:
            name, (worst, row) = "datum" if self.plates is None else "cell", self.worst
            rows.append((f"largest inference gap of a {name}", f"{worst:.3f} ({name} {row})"))
        kind = self._kind if self.why_no_split or self.is_exact else "estimated by importance sampling from q*"
        note = f"{note} log p(x) is {kind}." + (f" {self._trust}." if self._trust else "")
        if self.why_no_split:
            note += f" There is no split into approximation and amortization: {self.why_no_split}."
        return Table(("quantity", "value"), rows, note)

    def __str__(self) -> str:
        least, largest = "" if self.is_exact else ", at least", self._largest("; the largest")
        lines = [
            f"log p(x) {_mean(self.log_evidence, self.log_evidence_error)} nats {per_cell(self.plates)}, {self._kind}",
            f"ELBO {_mean(self.elbo, self.elbo_error)}",
            f"gap {self.gap.mean().item():.3f}{least}{largest}",
        ]
        if self.approximation is None or self.amortization is None or self.amortization_error is None:
            lines += [self._trust] if self._trust else []
            return "\n".join([*lines, f"no split into approximation and amortization: {self.why_no_split}"])
        lines += [
            f"  = approximation {self.approximation.mean().item():.3f}{least} (of the family of q)",
            f"  + amortization {_mean(self.amortization, self.amortization_error)} (of the network of q)",
            f"q* is {self._refinement}",
        ]
        return "\n".join(lines)


def _mean(values: Tensor, errors: Tensor) -> str:
    """Format the mean over data with the standard error of the draws."""
    return f"{values.mean().item():.3f} ± {errors.square().sum().sqrt().item() / len(values):.3f}"


@report_of_ranks("inference_gap")
@any_arguments
@without_training
def inference_gap(
    model: Function,
    guide: Function,
    *data: Data,
    refined: Function | None = None,
    steps: int = 50,
    lr: float = 0.15,
    num_particles: int = 32,
    num_samples: int = 1000,
    plate: str = "data",
    seed: int = 0,
    tolerance: float | None = 1e-4,
    progress: bool | None = None,
) -> InferenceGap:
    r"""Compute the gap between log p(x) and the ELBO for each datum, and split it into approximation and amortization.

    The model is fixed. Each datum gets its own free parameters of q: the raw outputs of the encoder of a
    :class:`pyro_vae.VAE`, or the parameters of distributions. They start at the guide's values and maximize the ELBO of
    that datum with Adam, on pathwise gradients without the score, or on the exact sum over discrete latents.

    log p(x) is exact if :mod:`pyro_vae.exact` can compute it; the ELBOs are exact if it or a closed form can. Otherwise
    log p(x) is importance-weighted from q*, in expectation a lower bound, and so are the gap and the approximation. If
    the refinement has not converged, for want of ``steps``, the amortization is too small, the approximation too large.

    The split needs latents of each datum, in one data plate, and a guide that can be refined. Otherwise the result has
    the gap alone, with the reason: for each datum, each cell of the plates that all sites share, or all data together,
    as where a latent is global. Then log p(x), where it is not exact, is importance-weighted from q.

    Args:
        model: a Pyro model.
        guide: its guide; for the split, its latent sites must be independent, given x.
        data: arguments of both. All rows are refined at once: some hundreds are enough for the mean. Of more rows than
            have 2^23 numbers in ``num_particles`` draws, by default 8192 of up to 64 numbers each, evenly spaced ones
            are used, see :attr:`InferenceGap.rows`; if they depend on each other, there is no split.
        refined: q*, a guide of these data that is refined already, in place of a refinement here.
        steps: steps of Adam. On VAEs of 64 pixels with a trained encoder and two or ten latents, the default of 50
            steps of 32 draws reaches the ELBO of 1000 steps to 0.001 nats; see ``lr`` for a guide that is far from its
            best.
        lr: its learning rate, constant for half the steps and then decayed. A raw output moves by at most 0.75 ``lr``
            ``steps``, 5.6 by default.
        num_particles: draws of continuous latents of each datum in a step. Those of normal distributions have the
            moments of the normal, so that a quadratic log-density has gradients without noise.
        num_samples: K, draws of each datum for ELBOs without a closed form and for the importance-weighted log p(x).
        plate, seed: name of the data plate, and seed of all draws.
        tolerance: tolerance of quadrature, see :func:`pyro_vae.exact.inference.log_evidence`. With ``None`` there is no
            quadrature, which takes long for two latent dimensions and many pixels.
        progress: whether to show a progress bar; by default only on a terminal or in a notebook.

    Raises:
        ValueError: if the guide has a point for a latent, the likelihood is not normalised, or a refined guide is given
            where there is no split.
        FloatingPointError: if a gradient of the refinement is not finite.

    Source: Cremer, Li and Duvenaud 2018, "Inference suboptimality in variational autoencoders"; Roeder, Wu and Duvenaud
    2017, "Sticking the landing", on the gradient.

    >>> from pyro_vae import VAE, guides, likelihoods, networks, priors
    >>> net = networks.linear()
    >>> vae = VAE(priors.StandardNormal(2), guides.DiagonalNormal(3, 2, net), likelihoods.Normal(2, 3, net))
    >>> gap = inference_gap(vae.model, vae.guide, torch.randn(20, 3), steps=100)
    >>> bool((gap.amortization >= 0).all()), gap.is_exact
    (True, True)
    """
    positive_int(steps, "steps")
    positive_int(num_particles, "num_particles")
    positive(lr, "lr")
    tolerance = None if tolerance is None else positive(tolerance, "tolerance")
    if positive_int(num_samples, "num_samples") < 2:
        raise ValueError("`num_samples` must be 2 or more, for standard errors, got 1")
    if refined is not None:
        function(refined, "refined")
    tensors = data_tensors(data, "data", model, lazy=True)
    most = max(1, _BUDGET // (num_particles * max(64, *(tensor[0].numel() for tensor in tensors))))
    with seeded(seed), progress_bar("inference_gap", progress, stages=("refinement", "log p(x)", "ELBO")) as bar:
        with torch.no_grad():
            rows = None if refined is not None else _some_rows(model, guide, tensors, plate, most)
            data = tensors.whole() if rows is None else DataTensors(tensors.rows(rows))
            p, q = cell_densities(ModelGuide(model, guide, data, plate))
        why_not = _why_no_split(p)
        if not why_not and refined is None and p.num_data > most:
            why_not = (
                f"the rows depend on each other, or on their places, and all {p.num_data} of them are too many to "
                f"refine at once, more than {most}"
            )
        if why_not and refined is not None:
            raise ValueError(f"`refined` must be left out where there is no split: {why_not}")
        if refined is None:
            bar.begin("refinement")
            try:
                refined = None if why_not else refine(q, steps, lr, num_particles, seed)
            except RefinementError as error:
                why_not = str(error)
        else:
            steps = 0
        with torch.no_grad():
            bar.begin("log p(x)")
            log_p, log_p_error, evidence = _exact_log_evidence(p, tolerance), p.zeros(), None
            if log_p is None:
                proposal = guide if refined is None else refined
                evidence = log_evidence(model, proposal, *data, num_samples=num_samples, plate=plate, seed=seed)
                log_p, log_p_error = evidence.log_evidence.flatten(), evidence.standard_error.flatten()
            bar.begin("ELBO")
            if refined is None:
                elbo, elbo_error = _elbo(q, log_p, num_samples, seed, tolerance)
                refined_elbo = amortization_error = None
            else:
                best = GuideDensity(ModelDensity(ModelGuide(model, refined, data, plate)))
                elbos = _elbos(q, best, log_p, num_samples, seed, tolerance)
                elbo, elbo_error, refined_elbo, amortization_error = (each.to(p.dtype) for each in elbos)
    return InferenceGap(
        log_evidence=log_p.to(p.dtype),
        log_evidence_error=log_p_error.to(p.dtype),
        elbo=elbo.to(p.dtype),
        elbo_error=elbo_error.to(p.dtype),
        refined_elbo=refined_elbo,
        amortization_error=amortization_error,
        is_exact=evidence is None,
        rows=torch.arange(p.num_data, device=p.data[0].device) if rows is None else rows,
        refined=refined,
        steps=0 if refined is None else steps,
        plates=cell_plates(p),
        evidence=evidence,
        why_no_split=why_not,
    )


def _some_rows(model: Function, guide: Function, data: DataTensors, plate: str, most: int) -> Tensor | None:
    """Choose evenly spaced rows of many, if they do not depend on the others; ``None`` for all rows."""
    count = len(data[0])
    if count <= most or len(ModelGuide.in_batches(model, guide, data, plate)) == 1:
        return None
    return torch.arange(most, device=data[0].device) * count // most


def _why_no_split(p: ModelDensity) -> str:
    """Why the gap is not that of a family and of a network for each datum; empty if it is."""
    if p.by_rows:
        return ""
    if p.pair.eliminated:
        return f"the guide leaves out {p.pair.eliminated}, which are summed out"
    if outside := [name for name in p.latents if not p.pair.is_local(p.latents[name])]:
        return f"q of {outside}, latents of many data, is fitted to them together"
    return "not every datum has a q(z|x) of its own in one data plate, the rightmost dimension"


def _exact_log_evidence(p: ModelDensity, tolerance: float | None) -> Tensor | None:
    if tolerance is None and p.by_rows and not p.is_discrete and linear_gaussian(p) is None:
        return None
    with suppress(ValueError, exact.QuadratureError):
        return _by_cell(p, exact.log_evidence(p.model, *p.data, plate=p.plate, **_options(tolerance)))
    return None


def _by_cell(p: ModelDensity, exactly: Tensor) -> Tensor | None:
    """Exact numbers for the cells of the densities, which may be coarser than those of the model alone."""
    if exactly.numel() == p.num_data:
        return exactly.flatten()
    return exactly.sum().reshape(1) if p.num_data == 1 else None


def _options(tolerance: float | None) -> dict[str, Any]:
    return {} if tolerance is None else {"tolerance": tolerance}


def _elbo(
    q: GuideDensity, log_p: Tensor, num_samples: int, seed: int, tolerance: float | None
) -> tuple[Tensor, Tensor]:
    """The ELBO of q, with its error, ``(N,)`` each."""
    if (elbo := _exact_elbo(q, log_p, tolerance)) is not None:
        return elbo, torch.zeros_like(elbo)
    terms = _elbo_terms(q, num_samples, seed)
    return terms.mean(0), terms.std(0) / num_samples**0.5


def _elbos(
    q: GuideDensity, best: GuideDensity, log_p: Tensor, num_samples: int, seed: int, tolerance: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ELBO of q with its error, the ELBO of q*, and the error of their difference, ``(N,)`` each."""
    elbo, refined_elbo = (_exact_elbo(guide, log_p, tolerance) for guide in (q, best))
    if elbo is not None and refined_elbo is not None:
        zeros = torch.zeros_like(elbo)
        return elbo, zeros, refined_elbo, zeros
    terms, refined_terms = (_elbo_terms(guide, num_samples, seed) for guide in (q, best))  # (K, N), of the same noise
    error, difference_error = (t.std(0) / num_samples**0.5 for t in (terms, refined_terms - terms))
    return terms.mean(0), error, refined_terms.mean(0), difference_error


def _exact_elbo(q: GuideDensity, log_p: Tensor, tolerance: float | None) -> Tensor | None:
    p = q.p
    if not p.by_rows:
        with suppress(ValueError, exact.QuadratureError):
            return _by_cell(p, exact.elbo(p.model, q.guide, *p.data, plate=p.plate, **_options(tolerance)))
        return None
    linear = linear_gaussian(p)
    if linear is not None and (normal := _as_multivariate_normal(q.site()["fn"])) is not None:
        return log_p - kl_divergence(normal, linear.posterior())
    if tolerance is None and not p.is_discrete:
        return None
    with suppress(ValueError, exact.QuadratureError):
        return exact.elbo(p.model, q.guide, *p.data, plate=p.plate, **_options(tolerance))
    return None


def _as_multivariate_normal(fn: Any) -> Any:
    base = without_independent(fn)
    if isinstance(base, torch.distributions.Normal) and len(fn.event_shape) == 1:
        return torch.distributions.MultivariateNormal(fn.mean, scale_tril=fn.stddev.diag_embed())
    if isinstance(base, torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal):
        return base
    return None


def _elbo_terms(q: GuideDensity, num_samples: int, seed: int) -> Tensor:
    """log p(x, z) - log q(z | x) at draws of q, ``(K, N)``."""
    p = q.p
    counts = [min(p.chunk, num_samples - first) for first in range(0, num_samples, p.chunk)]

    def terms(count: int) -> Tensor:
        values, log_q = q.sample(count)
        return (p.log_joint(values) - log_q).double()

    return torch.cat(in_chunks("inference_gap", counts, terms, p.data[0].device, seed))
