"""Whether the distributions of a row depend on that row alone."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae._utils.param_store import parameters_of
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import latent_sites, log_density, observed_sites
from pyro_vae._utils.typing import Function

__all__ = ["is_amortized"]


def _in_plate(site: dict[str, Any], plate: str) -> bool:
    return any(frame.name == plate for frame in site["cond_indep_stack"])


def is_amortized(function: Function, data: tuple[Tensor, ...], plate: str) -> bool:
    """Whether the distributions of a row, in a model or guide, depend on that row alone, wherever it stands.

    Tried with moved parameters, in a param store of its own: what holds for four rows must hold, at the same values of
    the latents, for three of them and for the four in reverse; and what holds for all rows, for a few from first to
    last, of which the first four may know nothing: a covariate that the function holds itself, ``group[rows]``, is one
    for all of them where data are sorted by it. Autoguides are judged by their plates.
    """
    if isinstance(function, AutoGuide):
        with poutine.block(), torch.no_grad():
            return not any(
                _in_plate(site, plate) for site in latent_sites(poutine.trace(function).get_trace(*data)).values()
            )
    spread = sorted({place * (len(data[0]) - 1) // 3 for place in range(4)})
    with pyro.get_param_store().scope(), torch.no_grad():
        try:
            run = poutine.trace(function).get_trace
            with _perturbed(run(*(tensor[:3] for tensor in data))):
                first = run(*(tensor[:4] for tensor in data))
                with seeded(0):
                    whole = run(*data)
                tried = [(first, [0, 1, 2]), (first, [3, 2, 1, 0]), (whole, spread)]
                return all(_same_rows(function, among, data, rows, plate) for among, rows in tried)
        except (ValueError, RuntimeError, IndexError):
            return False


def _same_rows(function: Function, whole: Trace, data: tuple[Tensor, ...], rows: list[int], plate: str) -> bool:
    """Whether rows that are run apart have the densities that they have among all."""
    index = torch.tensor([row for row in rows if row < len(data[0])], device=data[0].device)
    dims = {
        name: frame.dim
        for name, site in (latent_sites(whole) | observed_sites(whole)).items()
        for frame in site["cond_indep_stack"]
        if frame.name == plate
    }
    values = {
        name: site["value"].index_select(dims[name] - site["fn"].event_dim, index) if name in dims else site["value"]
        for name, site in latent_sites(whole).items()
    }
    apart = poutine.trace(poutine.condition(function, data=values)).get_trace(*(tensor[index] for tensor in data))
    ours, theirs = latent_sites(whole) | observed_sites(whole), observed_sites(apart)
    return all(
        torch.allclose(
            log_density(ours[name]).index_select(dim, index), log_density(theirs[name]), rtol=1e-3, atol=1e-3
        )
        for name, dim in dims.items()
    )


@contextmanager
def _perturbed(trace: Trace) -> Iterator[None]:
    """Shift the parameters of a trace by noise, and put them back: ones that start out equal then tell rows apart."""
    parameters = list(parameters_of(trace).values())
    values = [parameter.detach().clone() for parameter in parameters]
    with ExitStack() as stack:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.add_(0.1 * torch.randn_like(parameter))
            stack.callback(parameter.copy_, value)
        yield
