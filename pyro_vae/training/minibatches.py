"""Mini-batches of any Pyro pair: which way of taking rows is right for it, or that none is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae._utils.amortization import _in_plate, is_amortized
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import latent_sites, log_density, observed_sites
from pyro_vae._utils.typing import Function
from pyro_vae.handlers import FixedSubsample, SubsampleRows, SubsampleStatements

__all__ = ["Batcher", "Transform", "following_autoguide", "make_batcher", "transformed"]

Batcher = Callable[[Tensor], Any]
"""Given row numbers, a context manager that yields the arguments to call the pair with."""


Transform = Callable[..., Tensor | Sequence[Tensor]]
"""From the rows of each data tensor to the rows that the pair is run on."""


def make_batcher(
    model: Function,
    guide: Function,
    data: tuple[Tensor, ...],
    batch_size: int,
    plate: str,
    transform: Transform | None = None,
) -> Batcher:
    """The right way to run this pair on some of its rows.

    A model that reads its data with ``pyro.subsample`` is handed all of them, and a handler sets the subsample of the
    plate: right for global latents, per-datum guides and autoguides alike. A model without may take slices of the
    data, only if every latent is local to the plate and the guide is amortized, so that a row's q(z | x) depends on
    that row alone.

    A ``transform`` is called once for each batch, so that model and guide see the same rows.

    Raises:
        ValueError: if neither is right, saying why and what to do.
    """
    if transform is not None:  # `Drawn` knows a tensor by its identity, and one tensor may be given in two roles
        data = tuple(tensor.view_as(tensor) for tensor in data)
    first = torch.arange(batch_size, device=data[0].device)
    drawn = _drawn(data, first, transform)
    model_trace, subsamples = _first_run(model, data, SubsampleRows(plate, first), drawn, transform)
    _check_plate(model_trace, plate)
    if not subsamples:
        _check_slicing(model, model_trace, guide, transformed(data, transform), plate)
        return lambda rows: _sliced(data, rows, transform)
    _check_subsampling(model, guide, data, SubsampleRows(plate, first), drawn)
    if transform is not None:
        _check_reading(model, guide, data, SubsampleRows(plate, first), drawn.rows)
    return lambda rows: _subsampled(data, rows, plate, transform)


def _first_run(
    model: Function,
    data: tuple[Tensor, ...],
    subsample: SubsampleRows,
    drawn: FixedSubsample,
    transform: Transform | None,
) -> tuple[Trace, bool]:
    """A trace of the model, and whether it reads with ``pyro.subsample``: then of a few rows, and else of all."""
    with suppress(ValueError, RuntimeError, IndexError):
        with poutine.block(), torch.no_grad(), SubsampleStatements() as statements, subsample, drawn:
            trace = poutine.trace(model).get_trace(*data)
        if statements.count:
            return trace, True
    with poutine.block(), torch.no_grad(), SubsampleStatements() as statements:
        return poutine.trace(model).get_trace(*transformed(data, transform)), statements.count > 0


def transformed(rows: tuple[Tensor, ...], transform: Transform | None) -> tuple[Tensor, ...]:
    """What a transform makes of the rows of each data tensor."""
    if transform is None:
        return rows
    expected = "a function that makes a tensor of each, such as `pyro_vae.datasets.pixels.binarize`"
    if not callable(transform):
        raise TypeError(f"`transform` must be {expected}, got {transform!r}")
    versions = [_version(tensor) for tensor in rows]
    result = transform(*rows)
    if [_version(tensor) for tensor in rows] != versions:
        raise ValueError(
            "`transform` must be a function that makes new tensors, `x / 255` in place of `x.div_(255)`: changes its "
            "rows in place, and so the data"
        )
    seen = tuple(result) if isinstance(result, tuple | list) else (result,)
    if not all(isinstance(tensor, Tensor) and tensor.dim() > 0 for tensor in seen):
        raise TypeError(
            f"`transform` must be {expected}: of {len(rows)} tensors of {len(rows[0])} rows it makes {result!r}"
        )
    if [len(tensor) for tensor in seen] != [len(tensor) for tensor in rows]:
        raise ValueError(
            f"`transform` must be one for each, of as many rows: of {len(rows)} tensors of {len(rows[0])} rows it "
            f"makes tensors of {[len(tensor) for tensor in seen]} rows"
        )
    return seen


def _version(tensor: Tensor) -> int:
    """Which grows when a tensor is changed in place; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _drawn(data: tuple[Tensor, ...], rows: Tensor, transform: Transform | None) -> FixedSubsample:
    """What ``pyro.subsample`` returns; without a transform that is left to the plate."""
    return FixedSubsample(
        *((), ()) if transform is None else (data, transformed(tuple(x[rows] for x in data), transform))
    )


@contextmanager
def _subsampled(
    data: tuple[Tensor, ...], rows: Tensor, plate: str, transform: Transform | None
) -> Iterator[tuple[Tensor, ...]]:
    with SubsampleRows(plate, rows), _drawn(data, rows, transform):
        yield data


@contextmanager
def _sliced(data: tuple[Tensor, ...], rows: Tensor, transform: Transform | None) -> Iterator[tuple[Tensor, ...]]:
    with poutine.scale(scale=len(data[0]) / len(rows)):
        yield transformed(tuple(tensor[rows] for tensor in data), transform)


@contextmanager
def following_autoguide(guide: Function) -> Iterator[None]:
    """Let an autoguide's plates take any subsample; Pyro fixes their size at that of the first call.

    Any other guide is left alone, and so is an autoguide with ``create_plates`` of its own.
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


def _check_plate(model_trace: Trace, plate: str) -> None:
    outside = [name for name, site in observed_sites(model_trace).items() if not _in_plate(site, plate)]
    if outside:
        found = {frame.name for site in model_trace.nodes.values() for frame in site.get("cond_indep_stack", ())}
        raise ValueError(
            f"batch_size: mini-batches need every observed site in the plate {plate!r}; {outside} are not. Name "
            f"the data plate with `plate=` (found: {sorted(found)}), or leave batch_size out."
        )


def _check_subsampling(
    model: Function, guide: Function, data: tuple[Tensor, ...], subsample: SubsampleRows, drawn: FixedSubsample
) -> None:
    plate, rows = subsample.plate, subsample.rows

    def fail(who: str, reason: str) -> ValueError:
        return ValueError(
            f"batch_size: the {who} does not follow the subsample of the plate {plate!r}: {reason}. Read its data "
            "with `pyro.subsample(x, event_dim=...)` inside the plate, or leave batch_size out for full batches."
        )

    with poutine.block(), torch.no_grad(), subsample, drawn:
        try:
            guide_trace = poutine.trace(guide).get_trace(*data)
        except (ValueError, RuntimeError) as error:
            raise fail("guide", str(error)) from error
        try:
            model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*data)
        except (ValueError, RuntimeError) as error:
            raise fail("model", str(error)) from error
    for who, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, site in (latent_sites(trace) | observed_sites(trace)).items():
            sizes = [frame.size for frame in site["cond_indep_stack"] if frame.name == plate]
            if sizes and sizes != [len(rows)]:
                raise fail(who, f"site {name!r} has {sizes[0]} rows where {len(rows)} were asked for")


def _check_reading(
    model: Function, guide: Function, data: tuple[Tensor, ...], subsample: SubsampleRows, rows: Sequence[Tensor]
) -> None:
    """Refuse what sees data that are not transformed: at the same drawn rows, other data must change nothing."""
    with poutine.block(), torch.no_grad(), subsample, FixedSubsample(data, rows):
        guide_trace = poutine.trace(guide).get_trace(*data)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*data)
    as_handed = "`pyro.subsample(x, event_dim=...)` as it is handed over"
    remedy = "Read it so, or transform the data beforehand"
    for who, function, trace in (("model", model, model_trace), ("guide", guide, guide_trace)):
        if isinstance(function, AutoGuide):  # never reads data
            continue
        fixed = poutine.condition(function, data={name: site["value"] for name, site in latent_sites(trace).items()})
        found = []
        for given in (data, tuple(tensor[-1:].expand_as(tensor) for tensor in data)):
            drawn = FixedSubsample(given, rows)
            with poutine.block(), torch.no_grad(), seeded(0), subsample, drawn:
                found.append(observed_sites(poutine.trace(fixed).get_trace(*given)))
        if who == "model" and not all(drawn.read):
            raise ValueError(
                f"transform: the model does not read data tensor {drawn.read.index(False)} with {as_handed}, and would "
                f"not see it transformed. {remedy}"
            )
        if not all(torch.allclose(log_density(site), log_density(found[1][name])) for name, site in found[0].items()):
            raise ValueError(
                f"transform: the {who} reads some of its data otherwise than with {as_handed}, and would see them as "
                f"they are, not transformed. {remedy}"
            )


def _check_slicing(model: Function, model_trace: Trace, guide: Function, data: tuple[Tensor, ...], plate: str) -> None:
    remedy = (
        "A slice of the data would train it wrong. Read the data in model and guide with "
        "`pyro.subsample(x, event_dim=...)` inside the plate, or leave batch_size out for full batches."
    )
    outside = [name for name, site in latent_sites(model_trace).items() if not _in_plate(site, plate)]
    if outside:
        raise ValueError(
            f"batch_size: the model reads its data without pyro.subsample, and its latents {outside} are global, "
            f"outside the plate {plate!r}. {remedy}"
        )
    for who, function in (("model", model), ("guide", guide)):
        if not is_amortized(function, data, plate):
            raise ValueError(
                f"batch_size: the model reads its data without pyro.subsample, and the {who} is not amortized: a row's "
                f"distribution there depends on more than that row, such as parameters for each datum. {remedy}"
            )
