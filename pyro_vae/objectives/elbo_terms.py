r"""Where the nats go: ELBO = -distortion - rate, from the traces of a step.

.. math:: \mathrm{distortion} = -\mathbb{E}_q[\log p(x \mid z)], \qquad
          \mathrm{rate} = \mathbb{E}_q[\log q(z \mid x) - \log p(z)].

All in nats per datum and at β = 1, whatever scale the objective gave its terms.
"""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae._utils.traces import latent_sites, log_density, observed_sites
from pyro_vae.distributions.properties import base_distribution, is_normalized

__all__ = ["bound_name", "elbo_terms", "rate_by_variable"]

_PARTICLES = "num_particles_vectorized"


def bound_name(model_trace: Trace, guide_trace: Trace) -> str:
    """``"elbo"``, or ``"surrogate"`` where nothing is bounded.

    That is so where an observed site has no normalised density, and where the guide is all points (``Delta``, as in
    ``AutoDelta``): it has no density, and the objective is that of a mode.
    """
    bounded = all(is_normalized(site["fn"]) for site in observed_sites(model_trace).values())
    latents = latent_sites(guide_trace).values()
    points = bool(latents) and all(isinstance(base_distribution(site["fn"]), dist.Delta) for site in latents)
    return "elbo" if bounded and not points else "surrogate"


def rate_by_variable(ours: dict[str, Any], theirs: dict[str, Any]) -> Tensor | None:
    """KL(q || p) of each variable of a site, ``(*batch, *variables)``, or its estimate from the draws of the guide.

    ``None`` if guide or prior is no product over the variables.
    """
    q, p = ours["fn"], theirs["fn"]
    if p.batch_shape != q.batch_shape:  # which some of torch's KLs do not broadcast
        p = p.expand(q.batch_shape)
    while isinstance(q, torch.distributions.Independent) and isinstance(p, torch.distributions.Independent):
        q, p = q.base_dist, p.base_dist
    if q.event_shape != p.event_shape or (q is ours["fn"] and q.event_shape):
        return None
    try:
        return torch.distributions.kl_divergence(q, p)
    except NotImplementedError:
        return q.log_prob(ours["value"]) - p.log_prob(ours["value"])


@torch.no_grad()
def elbo_terms(traces: Sequence[tuple[Trace, Trace]], num_data: int) -> dict[str, Tensor] | None:
    """ELBO, distortion and rate in nats per datum, averaged over (model, guide) traces.

    Latents that the guide enumerates are summed over exactly. ``None`` if the model marginalises a latent that the
    guide does not have: its nats are neither rate nor distortion; and if two latents of the guide are enumerated in one
    dimension, as ``pyro.markov`` lets them: there the sums are the ELBO's own.
    """
    distortion: Any = 0.0
    rate: Any = 0.0
    for model_trace, guide_trace in traces:
        guide_sites, model_sites = latent_sites(guide_trace), latent_sites(model_trace)
        if not model_sites.keys() <= guide_sites.keys() or _share_dimensions(guide_sites):
            return None
        weights = _enumerated(guide_sites)
        distortion = distortion - _expectations(observed_sites(model_trace), weights)
        rate = rate + _expectations(guide_sites, weights) - _expectations(model_sites, weights)
    count = len(traces) * num_data
    distortion, rate = (torch.as_tensor(total, dtype=torch.float64) / count for total in (distortion, rate))
    return {bound_name(*traces[0]): -distortion - rate, "distortion": distortion, "rate": rate}


def _share_dimensions(sites: dict[str, Any]) -> bool:
    """Whether two sites are enumerated in one."""
    dims = [site["infer"].get("_enumerate_dim") for site in sites.values()]
    return any(dims.count(dim) > 1 for dim in dims if dim is not None)


def _enumerated(sites: dict[str, Any]) -> dict[int, Tensor]:
    """The log-weights of enumerated sites, by the dimension that each has been given."""
    return {
        site["infer"]["_enumerate_dim"]: _log_weight(site)
        for site in sites.values()
        if site["infer"].get("_enumerate_dim") is not None
    }


def _log_weight(site: dict[str, Any]) -> Tensor:
    """log q of a state that is summed over; of one of K draws in its place, -log K.

    Not masked: a mask takes a site's nats from the bound, and leaves its states their probabilities.
    """
    draws, log_q = site["infer"].get("num_samples"), site["fn"].score_parts(site["value"]).score_function
    return log_q if draws is None else torch.full_like(log_q, -math.log(draws))


def _expectations(sites: dict[str, Any], weights: dict[int, Tensor]) -> Any:
    return sum(_expectation(site, weights) for site in sites.values())


def _expectation(site: dict[str, Any], weights: dict[int, Tensor]) -> Tensor:
    """A site's expected log-density under the guide, summed over plates and scaled to all data."""
    term = log_density(site)
    frames = site["cond_indep_stack"]
    scale = math.prod((frame.full_size or frame.size) / frame.size for frame in frames if frame.name != _PARTICLES)
    particles = math.prod(frame.size for frame in frames if frame.name == _PARTICLES)
    summed = {dim: weight for dim, weight in weights.items() if _extent(term, dim) > 1}
    pending = list(summed)
    while pending:  # a variable's weight may depend on others, over which it is summed as well
        weight = summed[pending.pop()]
        found = [dim for dim in weights if dim not in summed and _extent(weight, dim) > 1]
        summed |= {dim: weights[dim] for dim in found}
        pending += found
    while summed:  # one after the other, each before those that its weight depends on
        dim = next(dim for dim in summed if all(_extent(w, dim) == 1 for other, w in summed.items() if other != dim))
        weight = summed.pop(dim).exp()
        term = torch.where(weight > 0, weight * term, 0.0).sum(dim, keepdim=True)
    return term.sum(dtype=torch.float64) * (scale / particles)


def _extent(tensor: Tensor, dim: int) -> int:
    return tensor.shape[dim] if tensor.dim() >= -dim else 1
