r"""The terms of the ELBO, computed from the traces of a step: ELBO = -distortion - rate.

.. math:: \mathrm{distortion} = -\mathbb{E}_q[\log p(x \mid z)], \qquad
          \mathrm{rate} = \mathbb{E}_q[\log q(z \mid x) - \log p(z)].

All are in nats per datum and at β = 1. Scales of the objective are removed.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae._utils.traces import latent_sites, log_density, observed_sites
from pyro_vae.distributions.properties import is_normalized, is_point

__all__ = ["bound_name", "elbo_terms", "rate_by_variable"]

_PARTICLES = "num_particles_vectorized"


def bound_name(model_trace: Trace, guide_trace: Trace) -> str:
    """Return ``"elbo"``, or ``"surrogate"`` if the objective is no bound.

    It is none if an observed site has no normalised density, or if all sites of the guide are points (``Delta``, as in
    ``AutoDelta``): such a guide has no density, and the objective finds a mode.
    """
    bounded = all(is_normalized(site["fn"]) for site in observed_sites(model_trace).values())
    latents = latent_sites(guide_trace).values()
    points = bool(latents) and all(is_point(site["fn"]) for site in latents)
    return "elbo" if bounded and not points else "surrogate"


def rate_by_variable(site: dict[str, Any], prior: dict[str, Any]) -> Tensor | None:
    """Compute KL(q || p) of each variable of a site, ``(*batch, *variables)``, or estimate it from the guide's draws.

    The arguments are its sites in guide and model. ``None`` if one of them is no product over the variables.
    """
    q, p = site["fn"], prior["fn"]
    if p.batch_shape != q.batch_shape:  # some of torch's KLs do not broadcast
        p = p.expand(q.batch_shape)
    while isinstance(q, torch.distributions.Independent) and isinstance(p, torch.distributions.Independent):
        q, p = q.base_dist, p.base_dist
    if q.event_shape != p.event_shape or (q is site["fn"] and q.event_shape):
        return None
    try:
        return torch.distributions.kl_divergence(q, p)
    except NotImplementedError:
        return q.log_prob(site["value"]) - p.log_prob(site["value"])


@torch.no_grad()
def elbo_terms(traces: Sequence[tuple[Trace, Trace]], num_data: int) -> dict[str, Tensor] | None:
    """Compute ELBO, distortion and rate in nats per datum, averaged over (model, guide) traces.

    Latents that the guide enumerates are summed over exactly. ``None`` if the model marginalises a latent that the
    guide lacks, whose nats are neither rate nor distortion, or if two latents are enumerated in one dimension.
    """
    distortion: Any = 0.0
    rate: Any = 0.0
    for model_trace, guide_trace in traces:
        guide_sites, model_sites = latent_sites(guide_trace), latent_sites(model_trace)
        if not model_sites.keys() <= guide_sites.keys():
            return None
        enumerated = [site for site in guide_sites.values() if site["infer"].get("_enumerate_dim") is not None]
        weights = {site["infer"]["_enumerate_dim"]: _log_weight(site) for site in enumerated}
        if len(weights) < len(enumerated):  # two in one dimension
            return None
        distortion = distortion - _expectations(observed_sites(model_trace), weights)
        rate = rate + _expectations(guide_sites, weights) - _expectations(model_sites, weights)
    count = len(traces) * num_data
    distortion, rate = (torch.as_tensor(total, dtype=torch.float64) / count for total in (distortion, rate))
    return {bound_name(*traces[0]): -distortion - rate, "distortion": distortion, "rate": rate}


def _log_weight(site: dict[str, Any]) -> Tensor:
    """log q of an enumerated state, or -log K if K draws replace the states.

    It is not masked: a mask removes the nats of a site from the bound, but not the probabilities of its states.
    """
    draws, log_q = site["infer"].get("num_samples"), site["fn"].score_parts(site["value"]).score_function
    return log_q if draws is None else torch.full_like(log_q, -math.log(draws))


def _expectations(sites: dict[str, Any], weights: dict[int, Tensor]) -> Any:
    return sum(_expectation(site, weights) for site in sites.values())


def _expectation(site: dict[str, Any], weights: dict[int, Tensor]) -> Tensor:
    """The expected log-density of a site under the guide, summed over plates and scaled to all data."""
    term = log_density(site)
    frames = site["cond_indep_stack"]
    scale = math.prod((frame.full_size or frame.size) / frame.size for frame in frames if frame.name != _PARTICLES)
    particles = math.prod(frame.size for frame in frames if frame.name == _PARTICLES)
    summed = {dim: weight for dim, weight in weights.items() if _size(term, dim) > 1}
    pending = list(summed)
    while pending:  # the weight of a variable may depend on others, which are then summed over as well
        weight = summed[pending.pop()]
        new = [dim for dim in weights if dim not in summed and _size(weight, dim) > 1]
        summed |= {dim: weights[dim] for dim in new}
        pending += new
    while summed:  # sum over each variable before those that its weight depends on
        dim = next(dim for dim in summed if all(_size(w, dim) == 1 for other, w in summed.items() if other != dim))
        weight = summed.pop(dim).exp()
        term = torch.where(weight > 0, weight * term, 0.0).sum(dim, keepdim=True)
    return term.sum(dtype=torch.float64) * (scale / particles)


def _size(tensor: Tensor, dim: int) -> int:
    return tensor.shape[dim] if tensor.dim() >= -dim else 1
