r"""The terms of the ELBO, computed from the traces of a step: ELBO = -distortion - rate.

.. math:: \mathrm{distortion} = -\mathbb{E}_q[\log p(x \mid z)], \qquad
          \mathrm{rate} = \mathbb{E}_q[\log q(z \mid x) - \log p(z)].

All are in nats per datum and at β = 1. Scales of the objective are removed.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from pyro.distributions import Unit
from pyro.ops.packed import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae._utils.traces import PARTICLES, latent_sites, log_density, masked, observed_sites, plate_scale
from pyro_vae.distributions.properties import is_point

__all__ = ["elbo_terms", "rate_by_variable", "weights_removed"]


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
def elbo_terms(
    traces: Sequence[tuple[Trace, Trace]],
    num_data: int,
    name: str = "elbo",
    closed_form: bool = False,
    model_masks: bool = False,
) -> dict[str, Tensor] | None:
    """Compute ELBO, distortion and rate in nats per datum, averaged over (model, guide) traces.

    Latents that the guide enumerates are summed over exactly. ``None`` if the model marginalises a latent that the
    guide lacks, whose nats are neither rate nor distortion, or if two latents are enumerated in one dimension.

    Args:
        traces: of model and guide, with plates that have a size.
        num_data: N.
        name: of the sum of distortion and rate, see :attr:`pyro_vae.model_guide.ModelGuide.bound`.
        closed_form: whether the rate is the closed form of KL(q || p) of each latent that has one, as in the loss of
            ``TraceMeanField_ELBO``, instead of an estimate from the draws.
        model_masks: whether the guide's densities are left out where the model masks its latents, see
            :attr:`pyro_vae.model_guide.ModelGuide.draws_cells`.
    """
    distortion: Any = 0.0
    rate: Any = 0.0
    for model_trace, guide_trace in traces:
        guide_sites, model_sites = latent_sites(guide_trace), latent_sites(model_trace)
        if model_masks:
            guide_sites = _masked_as(model_sites, guide_sites)
        drawn = {name for name, site in model_sites.items() if name in guide_sites or not is_point(site["fn"])}
        if not drawn <= guide_sites.keys():
            return None
        enumerated = [site for site in guide_sites.values() if site["infer"].get("_enumerate_dim") is not None]
        weights = {site["infer"]["_enumerate_dim"]: _log_weight(site) for site in enumerated}
        if len(weights) < len(enumerated):  # two in one dimension
            return None
        divergences = _divergences(guide_sites, model_sites) if closed_form else {}
        distortion = distortion - _expectations(observed_sites(model_trace), weights)
        factors = {name: site for name, site in observed_sites(guide_trace).items() if isinstance(site["fn"], Unit)}
        for sites, sign in ((guide_sites | factors, 1), (model_sites, -1)):
            sampled = {name: site for name, site in sites.items() if name not in divergences}
            rate = rate + sign * _expectations(sampled, weights)
        rate = rate + sum(_expectation(kl, guide_sites[name], {}) for name, kl in divergences.items())
    count = len(traces) * num_data
    device = next((total.device for total in (distortion, rate) if isinstance(total, Tensor)), None)  # one may be 0
    totals = (torch.as_tensor(total, dtype=torch.float64, device=device) for total in (distortion, rate))
    distortion, rate = (total / count for total in totals)
    return {name: -distortion - rate, "distortion": distortion, "rate": rate}


def _masked_as(model_sites: dict[str, Any], guide_sites: dict[str, Any]) -> dict[str, Any]:
    """The sites of an ``AutoNormal`` with the masks of the model, also those behind its points, ``*_unconstrained``."""
    masked_sites = {}
    for name, site in guide_sites.items():
        latent = model_sites.get(name) or model_sites.get(name.removesuffix("_unconstrained"))
        masked_sites[name] = site if latent is None or site["mask"] is not None else {**site, "mask": latent["mask"]}
    return masked_sites


def _divergences(guide_sites: dict[str, Any], model_sites: dict[str, Any]) -> dict[str, Tensor]:
    """KL(q || p) of each latent, ``(*batch)``, where it has a closed form.

    There is none in another order of the latents: p of one may then depend on draws that depend on it in the guide.
    Pyro leaves out the log-density of a ``Delta``.
    """
    divergences: dict[str, Tensor] = {}
    if list(model_sites) != [name for name in guide_sites if name in model_sites]:
        return divergences
    for name, prior in model_sites.items():
        site = guide_sites[name]
        if not is_point(site["fn"]):
            with suppress(NotImplementedError):
                divergence = torch.distributions.kl_divergence(site["fn"], prior["fn"])
                divergences[name] = masked(divergence.expand(site["fn"].batch_shape), site)
    return divergences


def weights_removed(traces: Sequence[tuple[Trace, Trace]]) -> list[tuple[Trace, Trace]]:
    """Return copies of traces of ``TraceEnum_ELBO`` whose sites have no other scale than N/B of their plates."""
    return [(_without_weights(model_trace), _without_weights(guide_trace)) for model_trace, guide_trace in traces]


def _without_weights(trace: Trace) -> Trace:
    new = trace.copy()
    new.plate_to_symbol, new.symbol_to_dim = trace.plate_to_symbol, trace.symbol_to_dim
    nodes: Any = new.nodes
    for name, site in nodes.items():
        if site["type"] == "sample" and "packed" in site:
            scale, known = plate_scale(site), site["packed"]
            log_prob = scale_and_mask(known["unscaled_log_prob"], scale, known["mask"])
            nodes[name] = {**site, "scale": scale, "packed": {**known, "scale": scale, "log_prob": log_prob}}
    return new


def _log_weight(site: dict[str, Any]) -> Tensor:
    """log q of an enumerated state, or -log K if K draws replace the states.

    It is not masked: a mask removes the nats of a site from the bound, but not the probabilities of its states.
    """
    draws, log_q = site["infer"].get("num_samples"), site["fn"].score_parts(site["value"]).score_function
    return log_q if draws is None else torch.full_like(log_q, -math.log(draws))


def _expectations(sites: dict[str, Any], weights: dict[int, Tensor]) -> Any:
    return sum(_expectation(log_density(site), site, weights) for site in sites.values())


def _expectation(term: Tensor, site: dict[str, Any], weights: dict[int, Tensor]) -> Tensor:
    """The expected value under the guide of a term of a site, summed over plates and scaled to all data."""
    particles = math.prod(frame.size for frame in site["cond_indep_stack"] if frame.name == PARTICLES)
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
    return term.sum(dtype=torch.float64) * (plate_scale(site) / particles)


def _size(tensor: Tensor, dim: int) -> int:
    return tensor.shape[dim] if tensor.dim() >= -dim else 1
