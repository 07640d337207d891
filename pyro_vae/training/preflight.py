"""Whether a model and a guide are a pair that an ELBO takes, found out before any training."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import ELBO, TraceEnum_ELBO
from torch import Tensor

from pyro_vae._utils.traces import latent_sites, observed_sites
from pyro_vae._utils.typing import Function
from pyro_vae.training.minibatches import Transform, transformed

__all__ = ["check_elbo", "check_pair", "explain_shape_mismatch"]


def check_elbo(elbo: ELBO) -> ELBO:
    """Refuse what is no ELBO, or one that needs TorchScript."""
    if not isinstance(elbo, ELBO):
        raise TypeError(f"`elbo` must be an instance, such as Trace_ELBO(), got {elbo!r}")
    if type(elbo).__name__.startswith("Jit"):
        raise ValueError(
            f"`elbo` must be the ELBO of the same name without Jit, got {type(elbo).__name__}, which needs "
            "TorchScript, deprecated in torch"
        )
    return elbo


@contextmanager
def explain_shape_mismatch(
    model: Function, guide: Function, data: tuple[Tensor, ...], transform: Transform | None = None
) -> Iterator[None]:
    """If a block fails, refuse the guide where a latent of it is of another shape than in the model: that is why."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        shapes: list[dict[str, torch.Size]] = []
        with suppress(ValueError, RuntimeError), torch.no_grad(), poutine.block():
            for function in (guide, model):
                latents = latent_sites(poutine.trace(function).get_trace(*transformed(data, transform)))
                shapes.append({name: site["value"].shape for name, site in latents.items()})
        for name, shape in shapes[0].items() if len(shapes) == 2 else ():
            if shape != shapes[1].get(name, shape):
                raise ValueError(
                    f"`guide` must be {tuple(shapes[1][name])}, that of the model: its latent {name!r} has shape "
                    f"{tuple(shape)}"
                ) from error
        raise


def check_pair(
    model: Function, guide: Function, elbo: ELBO, arguments: tuple[Tensor, ...], plate: str, transforms: bool
) -> None:
    """Refuse data in no plate of that name, a guide with latents of its own, and enumeration asked for by half."""
    with torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*arguments)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*arguments)
    ours, theirs = latent_sites(guide_trace), latent_sites(model_trace)
    plates = {frame.name for site in observed_sites(model_trace).values() for frame in site["cond_indep_stack"]}
    if plate not in plates:
        raise ValueError(
            f"`plate` must be the data plate of the model's observed sites, which are in {sorted(plates) or 'no plate'}, "
            f"got {plate!r}"
        )
    data = observed_sites(guide_trace).items()
    if observed := [name for name, site in data if not isinstance(site["fn"], dist.Unit)]:  # a `pyro.factor` is no data
        raise ValueError(
            f"`guide` must be a function with latent sites, such as `vae.guide`: it observes {observed}, which a "
            "model does"
        )
    if transforms and elbo.max_plate_nesting == float("inf"):  # Pyro would find it out from data without transform
        frames = [
            frame
            for site in (ours | theirs | observed_sites(model_trace)).values()
            for frame in site["cond_indep_stack"]
            if frame.dim is not None
        ]
        particles = int(elbo.vectorize_particles and elbo.num_particles > 1)
        elbo.max_plate_nesting = particles + max((-frame.dim for frame in frames), default=0)
    unknown = [name for name, site in ours.items() if name not in theirs and not site["infer"].get("is_auxiliary")]
    if unknown:
        raise ValueError(f"guide: its latents {unknown} are not in the model, whose latents are {list(theirs)}")
    how = {site["infer"].get("enumerate") for site in (*theirs.values(), *ours.values())}
    if not isinstance(elbo, TraceEnum_ELBO):
        if how - {None}:
            raise ValueError(
                "`elbo` must be TraceEnum_ELBO(max_plate_nesting=1): latents are marked for enumeration, and "
                f"{type(elbo).__name__} would sample them"
            )
    elif "sequential" in how:
        raise ValueError("`elbo` must be enumerate='parallel': sites are enumerated one state after another")
    elif "parallel" not in how:
        raise ValueError(
            "elbo: TraceEnum_ELBO found nothing to enumerate and would only sample. Mark discrete latents, "
            "`fit(model, config_enumerate(guide), ...)`; to sample them, and for continuous ones, use Trace_ELBO"
        )
