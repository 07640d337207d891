"""The sites of a Pyro trace by role, and their log-densities."""

from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["deterministic_sites", "latent_shapes", "latent_sites", "log_density", "observed_sites"]


def log_density(site: dict[str, Any]) -> Tensor:
    """``log_prob`` of a site, masked but not scaled; reused if an ELBO has computed it."""
    value = site.get("unscaled_log_prob")
    if value is None:
        value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return (
        value if site["mask"] is None else torch.where(torch.as_tensor(site["mask"], device=value.device), value, 0.0)
    )


def _sample_sites(trace: Trace) -> dict[str, Any]:
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def deterministic_sites(trace: Trace) -> dict[str, Any]:
    """The sites of ``pyro.deterministic``, by name."""
    return {name: site for name, site in _sample_sites(trace).items() if site["infer"].get("_deterministic")}


def latent_sites(trace: Trace) -> dict[str, Any]:
    """The unobserved sample sites, by name."""
    sites = _sample_sites(trace)
    return {name: site for name, site in sites.items() if not site["is_observed"] and not site_is_subsample(site)}


def observed_sites(trace: Trace) -> dict[str, Any]:
    """The observed sample sites that count (``pyro.deterministic`` and masked-out ones do not), by name."""
    sites = {name: site for name, site in _sample_sites(trace).items() if not site["infer"].get("_deterministic")}
    return {name: site for name, site in sites.items() if site["is_observed"] and site["mask"] is not False}


def latent_shapes(trace: Trace) -> dict[str, tuple[int, ...]]:
    """The shapes of the values of the latent sites, by name."""
    return {name: tuple(site["value"].shape) for name, site in latent_sites(trace).items()}
