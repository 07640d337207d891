"""The sites of a Pyro trace by role, and their log-densities."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["deterministic_sites", "latent_sites", "log_density", "observed_sites", "record_traces"]


def log_density(site: dict[str, Any]) -> Tensor:
    """``log_prob`` of a site, masked but not scaled; reused if an ELBO has computed it."""
    value = site.get("unscaled_log_prob")
    if value is None:
        value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return value if site["mask"] is None else torch.where(torch.as_tensor(site["mask"]), value, 0.0)


def record_traces(function: Callable[..., Any], traces: list[Trace]) -> Callable[..., Any]:
    """Wrap ``function`` to append a trace of each run, with the effects of outer handlers, to ``traces``."""

    def recording(*args: Any, **kwargs: Any) -> Any:
        with poutine.trace() as tracer:
            result = function(*args, **kwargs)
        traces.append(tracer.trace)
        return result

    return recording


def deterministic_sites(trace: Trace) -> dict[str, Any]:
    """The sites of ``pyro.deterministic``, by name."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: site for name, site in nodes.items() if site["type"] == "sample" and site["infer"].get("_deterministic")
    }


def latent_sites(trace: Trace) -> dict[str, Any]:
    """The unobserved sample sites, by name."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }


def observed_sites(trace: Trace) -> dict[str, Any]:
    """The observed sample sites that count (``pyro.deterministic`` and masked-out ones do not), by name."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and site["mask"] is not False
        and not site["infer"].get("_deterministic")
    }
