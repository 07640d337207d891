"""The sites of a Pyro trace by role, and their log-densities."""

import math
from collections.abc import Iterable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = [
    "PARTICLES", "data_plate", "data_plate_size", "deterministic_sites", "has_bad_rows", "is_deterministic",
    "latent_shapes", "latent_sites", "log_density", "masked", "observed_sites", "plate_scale",
    "set_plate_sizes", "shared_plates", "summed_to",
]  # fmt: skip

PARTICLES = "num_particles_vectorized"  # Pyro's name of the plate of vectorized particles


def log_density(site: dict[str, Any]) -> Tensor:
    """``log_prob`` of a site, masked but not scaled; reused if an ELBO has computed it."""
    value = site.get("unscaled_log_prob")
    if value is None:
        value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return masked(value, site)


def masked(value: Tensor, site: dict[str, Any]) -> Tensor:
    """Set a value of each datum to zero where a site is masked."""
    if site["mask"] is None:
        return value
    return torch.where(torch.as_tensor(site["mask"], device=value.device), value, 0.0)


def _sample_sites(trace: Trace) -> dict[str, Any]:
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def is_deterministic(site: dict[str, Any]) -> bool:
    """Whether a site is of ``pyro.deterministic``, or one that ``poutine.reparam`` made a function of others."""
    fn = site["fn"]
    is_function = isinstance(fn, dist.MaskedDistribution) and fn._mask is False and isinstance(fn.base_dist, dist.Delta)
    return bool(site["infer"].get("_deterministic")) or (site["is_observed"] and is_function)


def deterministic_sites(trace: Trace) -> dict[str, Any]:
    """The sites of ``pyro.deterministic``, and of ``poutine.reparam``, by name."""
    return {name: site for name, site in _sample_sites(trace).items() if is_deterministic(site)}


def latent_sites(trace: Trace) -> dict[str, Any]:
    """The unobserved sample sites, by name."""
    sites = _sample_sites(trace)
    return {name: site for name, site in sites.items() if not site["is_observed"] and not site_is_subsample(site)}


def observed_sites(trace: Trace) -> dict[str, Any]:
    """The observed sample sites that count (``pyro.deterministic`` and masked-out ones do not), by name."""
    sites = {name: site for name, site in _sample_sites(trace).items() if not is_deterministic(site)}
    return {name: site for name, site in sites.items() if site["is_observed"] and site["mask"] is not False}


def plate_scale(site: dict[str, Any]) -> float:
    """N/B, by which the subsampled plates of a site scale it; a larger scale of the site is a weight."""
    frames = [frame for frame in site["cond_indep_stack"] if frame.name != PARTICLES]
    return math.prod((frame.full_size or frame.size) / frame.size for frame in frames)


def shared_plates(sites: Iterable[dict[str, Any]]) -> tuple[CondIndepStackFrame, ...]:
    """The plates that every site lies in, from the leftmost dimension to the rightmost; none without sites.

    Given the parameters, log p(x, z) is a sum of independent terms over the cells of these plates. Plates that are
    loops in Python (``for i in pyro.plate(...)``) have no dimension and do not count.
    """
    stacks = [{frame.name: frame for frame in site["cond_indep_stack"] if frame.vectorized} for site in sites]
    names = set(stacks[0]).intersection(*stacks[1:]) - {PARTICLES} if stacks else set()
    return tuple(sorted((stacks[0][name] for name in names), key=lambda frame: frame.dim))


def summed_to(term: Tensor, plates: Iterable[CondIndepStackFrame]) -> Tensor:
    """Sum a log-density over all of its dimensions but those of some plates; ``(*sizes of the plates)``."""
    sizes = {frame.dim: frame.size for frame in plates if frame.dim is not None}  # from left to right
    term = term.reshape((1,) * max(0, -min(sizes, default=0) - term.dim()) + term.shape)
    summed = [dim for dim in range(-term.dim(), 0) if dim not in sizes]
    return (term.sum(summed) if summed else term).expand([*sizes.values()])


def data_plate(observed: Iterable[dict[str, Any]], sizes: Iterable[int]) -> CondIndepStackFrame | None:
    """The plate that holds every observed site and has one of these sizes, the outermost; ``None`` if there is none."""
    stacks = [site["cond_indep_stack"] for site in observed]
    sizes = set(sizes)
    shared = set.intersection(*({frame.name for frame in stack} for stack in stacks)) - {PARTICLES} if stacks else set()
    found = (frame for stack in stacks[:1] for frame in stack if frame.name in shared)
    return next((frame for frame in found if (frame.full_size or frame.size) in sizes), None)


def data_plate_size(trace: Trace, plate: str, sizes: Iterable[int]) -> int | None:
    """The number of rows of a data plate, by name, or else of :func:`data_plate`, in a trace of the model.

    The sizes are those of the tensors that it is given. If none of them fits, the plate is the outermost one.
    """
    observed = observed_sites(trace)
    frames = [frame for site in (latent_sites(trace) | observed).values() for frame in site["cond_indep_stack"]]
    named = next((frame for frame in frames if frame.name == plate), None)
    frame = named or data_plate(observed.values(), sizes)
    frame = frame or data_plate(observed.values(), {one.full_size or one.size for one in frames})
    return None if frame is None else frame.full_size or frame.size


def set_plate_sizes(*traces: Trace) -> None:
    """Give plates without a size, ``pyro.plate("data")``, that of their sites, in the traces of a run.

    Pyro gives them the size -1. A site with one value for all rows of such a plate is then in no such plate, as in
    Pyro's own sums, which count it once.
    """
    sites = [site for trace in traces for site in _sample_sites(trace).values() if not site_is_subsample(site)]
    unsized = [(site, frame) for site in sites for frame in site["cond_indep_stack"] if frame.size == -1]
    sizes: dict[str, int] = {}
    for site, frame in unsized:
        sizes[frame.name] = max(sizes.get(frame.name, 1), _extent(site, frame.dim, 1))
    for site, frame in unsized:
        extent = _extent(site, frame.dim, sizes[frame.name])
        stack, sized = site["cond_indep_stack"], frame._replace(size=extent, full_size=extent)
        place, outside = stack.index(frame), extent == 1 < sizes[frame.name]
        site["left_unsized"] = outside  # for errors
        site["cond_indep_stack"] = (*stack[:place], *([] if outside else [sized]), *stack[place + 1 :])


def _extent(site: dict[str, Any], dim: int, default: int) -> int:
    """The size of the batch of a site, of its distribution or its value, in a dimension from the right.

    The batch dimensions of ``pyro.deterministic`` are not known: it has the default.
    """
    if site["infer"].get("_deterministic"):
        return default
    shape = torch.as_tensor(site["value"]).shape
    batches = site["fn"].batch_shape, shape[: len(shape) - site["fn"].event_dim]
    return max(batch[dim] if len(batch) >= -dim else 1 for batch in batches)


def latent_shapes(trace: Trace) -> dict[str, tuple[int, ...]]:
    """The shapes of the values of the latent sites, by name."""
    return {name: tuple(site["value"].shape) for name, site in latent_sites(trace).items()}


def has_bad_rows(sites: Iterable[dict[str, Any]]) -> bool:
    """Whether the first site with a log-density that is not finite has finite ones too: some rows are at fault."""
    for site in sites:
        finite = log_density(site).isfinite()
        if not finite.all():
            return bool(finite.any())
    return False
