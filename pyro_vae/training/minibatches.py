"""Mini-batches of any Pyro pair: which way of taking rows is right for it, or that none is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import latent_sites, log_density, observed_sites
from pyro_vae._utils.transform import Transform, transformed
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import DataTensors
from pyro_vae.handlers import FixedSubsample, SubsampleRows, SubsampleStatements
from pyro_vae.model_guide import ModelGuide, RunError, trace_pair

__all__ = ["Batcher", "autoguide_follows_subsample", "make_batcher"]

Batcher = Callable[[Tensor], Any]
"""Given row numbers, a context manager that yields the arguments to call the pair with."""


def make_batcher(
    model: Function,
    guide: Function,
    data: tuple[Tensor, ...],
    batch_size: int,
    plate: str,
    transform: Transform | None = None,
) -> tuple[ModelGuide, Batcher]:
    """Run a pair on its first rows, and return it with the right way to run it on any of them.

    With all N rows in a batch they stay as they are. A model that reads its data with ``pyro.subsample`` is given all
    of them, and a handler sets the subsample of the plate: right for global latents, per-datum guides and autoguides
    alike. A model without may take slices of the data, only if every latent is local to the plate and the guide is
    amortized, so that a row's q(z | x) depends on that row alone.

    A ``transform`` is called once for each batch, so that model and guide see the same rows.

    Raises:
        ValueError: if no way is right, with the reason and what to do.
    """
    # A transform that works in place is refused on a copy, before it changes the data.
    transformed(tuple(tensor[:batch_size].clone() for tensor in data), transform)
    if batch_size == len(data[0]):
        pair = ModelGuide(model, guide, transformed(data, transform), plate, seed=None)
        pair.check_data_plate()
        return pair, lambda rows: _all_rows(data, transform)
    if transform is not None:  # `FixedSubsample` knows a tensor by its identity, and one may be given in two roles
        data = tuple(tensor.view_as(tensor) for tensor in data)
    first = torch.arange(batch_size, device=data[0].device)
    within = SubsampleRows(plate, first), _fixed_subsample(data, first, transform)
    found, subsamples = _first_batch(model, guide, data, within)
    if not subsamples or isinstance(found, RunError):
        pair = ModelGuide(model, guide, transformed(data, transform), plate, seed=None)
        pair.check_data_plate()
        if isinstance(found, RunError) and subsamples:  # what all rows raise as well is another fault than this
            raise _no_subsample(found.who, plate, str(found.error)) from found.error
        _check_slicing(pair)
        return pair, lambda rows: _sliced(data, rows, transform)
    pair = ModelGuide(model, guide, DataTensors(data), plate, traces=found)
    pair.check_data_plate()
    _check_subsampling(pair, batch_size)
    if transform is not None:
        _check_reading(pair, *within)
    return pair, lambda rows: _subsampled(data, rows, plate, transform)


def _first_batch(
    model: Function, guide: Function, data: tuple[Tensor, ...], within: tuple[SubsampleRows, FixedSubsample]
) -> tuple[tuple[Trace, Trace] | RunError, bool]:
    """The traces of a pair under a subsample, or why it does not run there, and whether it uses ``pyro.subsample``."""
    with poutine.block(), SubsampleStatements() as statements, within[0], within[1]:
        found: tuple[Trace, Trace] | RunError
        try:
            found = trace_pair(model, guide, data)
        except RunError as failure:
            found = failure
        if isinstance(found, RunError) and found.who == "guide":  # then the model has not run
            with suppress(RunError):
                trace_pair(model, None, data)
    return found, statements.count > 0


def _fixed_subsample(data: tuple[Tensor, ...], rows: Tensor, transform: Transform | None) -> FixedSubsample:
    """Transformed rows for ``pyro.subsample`` to return; without a transform the plate subsamples by itself."""
    if transform is None:
        return FixedSubsample((), ())
    return FixedSubsample(data, transformed(tuple(tensor[rows] for tensor in data), transform))


@contextmanager
def _all_rows(data: tuple[Tensor, ...], transform: Transform | None) -> Iterator[tuple[Tensor, ...]]:
    yield transformed(data, transform)


@contextmanager
def _subsampled(
    data: tuple[Tensor, ...], rows: Tensor, plate: str, transform: Transform | None
) -> Iterator[tuple[Tensor, ...]]:
    with SubsampleRows(plate, rows), _fixed_subsample(data, rows, transform):
        yield data


@contextmanager
def _sliced(data: tuple[Tensor, ...], rows: Tensor, transform: Transform | None) -> Iterator[tuple[Tensor, ...]]:
    with poutine.scale(scale=len(data[0]) / len(rows)):
        yield transformed(tuple(tensor[rows] for tensor in data), transform)


@contextmanager
def autoguide_follows_subsample(guide: Function) -> Iterator[None]:
    """Let an autoguide's plates take any subsample; Pyro fixes their size at that of the first call.

    Other guides, and autoguides with ``create_plates`` of their own, are not changed.
    """
    if not isinstance(guide, AutoGuide) or guide.create_plates is not None:
        yield
        return
    guide.create_plates = lambda *args, **kwargs: [
        pyro.plate(name, frame.full_size or frame.size, dim=frame.dim)
        for name, frame in guide._prototype_frames.items()
    ]
    try:
        yield
    finally:
        guide.create_plates = None


def _no_subsample(who: str, plate: str, reason: str) -> ValueError:
    return ValueError(
        f"`batch_size` needs a {who} that follows the subsample of the plate {plate!r}: {reason}. Read its data with "
        "`pyro.subsample(x, event_dim=...)` inside the plate, or leave batch_size out for full batches"
    )


def _check_subsampling(pair: ModelGuide, batch_size: int) -> None:
    """Raise if a site in the data plate has another number of rows than the subsample."""
    for who, name, site in pair.sites:
        sizes = [frame.size for frame in site["cond_indep_stack"] if frame.name == pair.plate]
        if sizes and sizes != [batch_size]:
            raise _no_subsample(who, pair.plate, f"site {name!r} has {sizes[0]} rows instead of {batch_size}")


def _check_reading(pair: ModelGuide, subsample: SubsampleRows, drawn: FixedSubsample) -> None:
    """Raise if a function reads data that are not transformed: at the same rows, other data must change nothing."""
    other = tuple(tensor[-1:].expand_as(tensor) for tensor in pair.data)
    statement = "`pyro.subsample(x, event_dim=...)` of the tensor that it is given"
    remedy = "Read it so, or transform the data before"
    for who, run, trace in (("model", pair.model, pair.model_trace), ("guide", pair.guide, pair.guide_trace)):
        if isinstance(run, AutoGuide):  # never reads data
            continue
        if who == "model" and not all(drawn.read):
            raise ValueError(
                f"`transform` needs a model that reads every data tensor with {statement}, got one that does not read "
                f"tensor {drawn.read.index(False)} so. {remedy}"
            )
        fixed = poutine.condition(run, data={name: site["value"] for name, site in latent_sites(trace).items()})

        def densities(data: tuple[Tensor, ...], fixed: Function = fixed) -> dict[str, Tensor]:
            with poutine.block(), torch.no_grad(), seeded(0), subsample, FixedSubsample(data, drawn.rows):
                sites = observed_sites(poutine.trace(fixed).get_trace(*data))
            return {name: log_density(site) for name, site in sites.items()}

        ours = {name: log_density(site) for name, site in (latent_sites(trace) | observed_sites(trace)).items()}
        theirs = densities(other)
        if not _allclose(ours, theirs) and not _allclose(densities(pair.data), theirs):  # not by random numbers alone
            raise ValueError(
                f"`transform` needs a {who} that reads its data with {statement} alone, got one that reads some of "
                f"them in another way, without the transform. {remedy}"
            )


def _allclose(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.allclose(value, theirs[name]) for name, value in ours.items())


def _check_slicing(pair: ModelGuide) -> None:
    """Raise if slices of the data would train a pair wrong."""
    remedy = (
        "Read the data in model and guide with `pyro.subsample(x, event_dim=...)` inside the plate, or leave "
        "batch_size out for full batches"
    )
    if pair.global_latents:
        raise ValueError(
            f"`batch_size` needs a model that reads its data with pyro.subsample where latents are global, got "
            f"{pair.global_latents} outside of the plate {pair.plate!r}. {remedy}"
        )
    for who in ("model", "guide"):
        if not pair.is_amortized(who):
            raise ValueError(
                f"`batch_size` needs a model that reads its data with pyro.subsample where the {who} is not amortized: "
                f"a row's distribution in it depends on more than that row, such as parameters for each datum. {remedy}"
            )
