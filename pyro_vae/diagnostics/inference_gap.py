r"""Where inference loses its nats: the gap of a guide, split into what its family and what its network leaves.

.. math:: \log p(x) - \mathrm{ELBO}(q) = \underbrace{\log p(x) - \mathrm{ELBO}(q^*)}_{\text{approximation}}
          + \underbrace{\mathrm{ELBO}(q^*) - \mathrm{ELBO}(q)}_{\text{amortization}},

with :math:`q^*` the best member of q's family for each datum, found by refining q for each datum on its own.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae import exact
from pyro_vae._utils.param_store import scoped_param_store
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import function, positive, positive_int
from pyro_vae.diagnostics.refinement import refine
from pyro_vae.distributions.properties import without_independent
from pyro_vae.evidence.importance_sampling import log_evidence
from pyro_vae.exact.guide_density import GuideDensity, sample_sites
from pyro_vae.exact.linear_gaussian import linear_gaussian
from pyro_vae.exact.model_density import ModelDensity

__all__ = ["InferenceGap", "inference_gap"]


@dataclass(frozen=True)
class InferenceGap:
    r"""What :func:`inference_gap` returns, in nats, ``(N,)`` each.

    Attributes:
        log_evidence: log p(x), exact or an estimate that is in expectation a lower bound.
        elbo: of the guide.
        refined_elbo: of the guide refined for each datum.
        log_evidence_error: standard error of ``log_evidence``; 0 where it is exact.
        elbo_error: standard error of ``elbo``; 0 where it is exact.
        amortization_error: standard error of ``amortization``, from the same noise for q and for q*.
        is_exact: whether ``log_evidence`` is exact.
        rows: the number of each datum: of :func:`pyro_vae.inspect`, which takes some of many, among all of them.
        refined: the refined guide, a Pyro guide of these very data.
    """

    log_evidence: Tensor
    elbo: Tensor
    refined_elbo: Tensor
    log_evidence_error: Tensor
    elbo_error: Tensor
    amortization_error: Tensor
    is_exact: bool
    rows: Tensor
    refined: Function = field(repr=False)

    @property
    def worst(self) -> tuple[float, int]:
        """The largest gap, and the number of the datum that has it."""
        place = self.gap.argmax()
        return self.gap[place].item(), int(self.rows[place])

    @property
    def gap(self) -> Tensor:
        r""":math:`\log p(x) - \mathrm{ELBO}(q) = \mathrm{KL}(q(z \mid x) \Vert p(z \mid x))`."""
        return self.log_evidence - self.elbo

    @property
    def approximation(self) -> Tensor:
        r""":math:`\log p(x) - \mathrm{ELBO}(q^*)`: what a richer family would win."""
        return self.log_evidence - self.refined_elbo

    @property
    def amortization(self) -> Tensor:
        r""":math:`\mathrm{ELBO}(q^*) - \mathrm{ELBO}(q)`: what a larger network, or longer training, would win."""
        return self.refined_elbo - self.elbo

    def __str__(self) -> str:
        kind = "exact" if self.is_exact else "importance-weighted from q*, in expectation a lower bound"
        least = "" if self.is_exact else ", at least"
        largest, row = self.worst
        return "\n".join(
            [
                f"log p(x) {_mean(self.log_evidence, self.log_evidence_error)} nats per datum, {kind}",
                f"ELBO {_mean(self.elbo, self.elbo_error)}",
                f"gap {self.gap.mean().item():.3f}{least}; the largest {largest:.3f}, of datum {row}",
                f"  = approximation {self.approximation.mean().item():.3f}{least} (of the family of q)",
                f"  + amortization {_mean(self.amortization, self.amortization_error)} (of the network of q)",
            ]
        )


def _mean(values: Tensor, errors: Tensor) -> str:
    """The mean over data, with the standard error of the draws."""
    return f"{values.mean().item():.3f} ± {errors.square().sum().sqrt().item() / len(values):.3f}"


def inference_gap(
    model: Function,
    guide: Function,
    *data: Tensor,
    refined: Function | None = None,
    steps: int = 1000,
    lr: float = 1e-2,
    num_particles: int = 32,
    num_samples: int = 1000,
    plate: str = "data",
    seed: int = 0,
    tolerance: float = 1e-4,
) -> InferenceGap:
    r"""The gap of each datum between log p(x) and the ELBO, split into approximation and amortization.

    The model is fixed. Each datum gets parameters of its own for q, which start at what the guide says of it and climb
    its ELBO with Adam, on pathwise gradients without the score, or by an exact sum over discrete latents. A guide of a
    :class:`pyro_vae.VAE` is refined in the raw outputs of its encoder, any other in the parameters of its
    distributions.

    log p(x) is exact where :mod:`pyro_vae.exact` has it; the ELBOs are where that or a closed form has them. Otherwise
    log p(x) is importance-weighted from q*, in expectation a lower bound, and so are then gap and approximation.
    A refinement that has not arrived books as approximation what is amortization: take more ``steps``. Their sum does
    not depend on it.

    Args:
        model: a Pyro model with one data plate, as the rightmost dimension, that holds all its sites.
        guide: its guide; its latents, given x, must not hang on one another.
        data: what both take, N rows. All are refined at once: some hundreds tell the mean.
        refined: q*, a guide of these data that has been refined elsewhere; in the place of the refinement here.
        steps: of Adam.
        lr: its learning rate, held for half the steps and then decayed.
        num_particles: draws of each datum in a step; continuous latents only.
        num_samples: K, draws of each datum for ELBOs without a closed form and for the importance-weighted log p(x).
        plate: name of the data plate.
        seed: of all draws.
        tolerance: of quadrature, see :func:`pyro_vae.exact.inference.log_evidence`.

    Raises:
        ValueError: if model and guide are not of this form, or the guide cannot be refined, saying why and what to do.

    Source: Cremer, Li and Duvenaud 2018, "Inference suboptimality in variational autoencoders"; Roeder, Wu and Duvenaud
    2017, "Sticking the landing", on the gradient.

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(2),
    ...     encoder=guides.DiagonalNormal(3, 2, networks.linear()),
    ...     decoder=likelihoods.Normal(2, 3, networks.linear()),
    ... )
    >>> gap = inference_gap(vae.model, vae.guide, torch.randn(20, 3), steps=100)
    >>> bool((gap.amortization >= 0).all()), gap.is_exact
    (True, True)
    """
    positive_int(steps, "steps")
    positive_int(num_particles, "num_particles")
    positive(lr, "lr")
    positive(tolerance, "tolerance")
    if positive_int(num_samples, "num_samples") < 2:
        raise ValueError("`num_samples` must be 2 or more: standard errors are from the spread of the draws, got 1")
    with scoped_param_store(), seeded(seed):
        with torch.no_grad():
            problem = ModelDensity(model, data, plate)
            q = GuideDensity(problem, guide)
            q.check_densities()
        if refined is None:
            refined = refine(q, steps, lr, num_particles)
        function(refined, "refined")
        with torch.no_grad():
            best = GuideDensity(problem, refined)
            best.check_densities()
            log_p = _log_evidence_exactly(problem, tolerance)
            is_exact = log_p is not None
            log_p_error = problem.zeros()
            if log_p is None:
                estimate = log_evidence(model, refined, *data, num_samples=num_samples, plate=plate, seed=seed)
                log_p, log_p_error = estimate.log_evidence, estimate.standard_error
            elbo, error, refined_elbo, difference_error = _elbos(q, best, log_p, num_samples, seed, tolerance)
    return InferenceGap(
        log_evidence=log_p.to(problem.dtype),
        elbo=elbo.to(problem.dtype),
        refined_elbo=refined_elbo.to(problem.dtype),
        log_evidence_error=log_p_error.to(problem.dtype),
        elbo_error=error.to(problem.dtype),
        amortization_error=difference_error.to(problem.dtype),
        is_exact=is_exact,
        rows=torch.arange(problem.num_data, device=problem.data[0].device),
        refined=refined,
    )


def _log_evidence_exactly(problem: ModelDensity, tolerance: float) -> Tensor | None:
    with suppress(ValueError, exact.QuadratureError):
        return exact.log_evidence(problem.model, *problem.data, plate=problem.plate, tolerance=tolerance)
    return None


def _elbos(
    q: GuideDensity, best: GuideDensity, log_p: Tensor, num_samples: int, seed: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ELBO of q with its error, ELBO of q*, and the error of their difference, ``(N,)`` each."""
    both = [_elbo_exactly(guide, log_p, tolerance) for guide in (q, best)]
    if both[0] is not None and both[1] is not None:
        zeros = torch.zeros_like(both[0])
        return both[0], zeros, both[1], zeros
    terms = torch.stack([_elbo_terms(guide, num_samples, seed) for guide in (q, best)])  # (2, K, N), of the same noise
    mean = terms.mean(1)
    error, difference_error = (t.std(0) / num_samples**0.5 for t in (terms[0], terms[1] - terms[0]))
    return mean[0], error, mean[1], difference_error


def _elbo_exactly(q: GuideDensity, log_p: Tensor, tolerance: float) -> Tensor | None:
    problem = q.p
    linear = linear_gaussian(problem)
    if linear is not None:
        ours = _as_multivariate_normal(q.site()["fn"])
        if ours is not None:
            return log_p - kl_divergence(ours, linear.posterior())
    with suppress(ValueError, exact.QuadratureError):
        return exact.elbo(problem.model, q.guide, *problem.data, plate=problem.plate, tolerance=tolerance)
    return None


def _as_multivariate_normal(fn: Any) -> Any:
    base = without_independent(fn)
    if isinstance(base, torch.distributions.Normal) and len(fn.event_shape) == 1:
        return torch.distributions.MultivariateNormal(fn.mean, scale_tril=fn.stddev.diag_embed())
    if isinstance(base, torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal):
        return base
    return None


def _elbo_terms(q: GuideDensity, num_samples: int, seed: int) -> Tensor:
    """log p(x, z) - log q(z | x) at draws, ``(K, N)``."""
    problem, parts = q.p, []
    with seeded(seed):
        for first in range(0, num_samples, problem.chunk):
            sites = sample_sites(q.guide, problem.data, min(problem.chunk, num_samples - first))
            values = {name: site["value"] for name, site in sites.items()}
            log_q = sum(site["fn"].log_prob(site["value"]) for site in sites.values())
            parts.append((problem.log_joint(values) - log_q).double())
    return torch.cat(parts)
