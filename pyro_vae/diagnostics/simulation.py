"""Data drawn from a model, like the given ones, with the latents that they were drawn from."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae._utils.traces import latent_sites, log_density, observed_sites
from pyro_vae._utils.typing import Function
from pyro_vae.draws import Values
from pyro_vae.handlers import ResampleObserved

__all__ = ["Simulation", "Simulator"]


class Simulation(NamedTuple):
    """Data drawn from a model.

    ``data`` are the arguments of model and guide, ``values`` those of observed sites that are no data tensors, and
    ``truth`` the values of all latents of the model, by name.
    """

    data: tuple[Tensor, ...]
    values: Values
    truth: Values


class _Place(NamedTuple):
    """Where the values of an observed site come from: a data tensor, by its number, or a part of it."""

    number: int
    part: tuple[torch.Size, tuple[int, ...], int] | None  # sizes, strides and offset in the memory of the tensor

    def of(self, tensors: list[Tensor]) -> Tensor:
        """The part of copies of the data tensors, as a view."""
        tensor = tensors[self.number]
        return tensor if self.part is None else tensor.as_strided(*self.part)


class Simulator:
    """Draws data sets from a model: covariates, masks and missing entries (NaN) stay, observed values are drawn.

    Where an observed site has a data tensor, or a view of one, as its value, the drawn values take its place in the
    data, so that the guide sees them, too. Other values, such as those of a model that closes over its data, are
    replaced at the site.

    Attributes:
        others: the names of these sites.

    Args:
        model: a Pyro model.
        guide: its guide, which must then read no data tensor that holds such other values.
        data: the arguments of both.

    Raises:
        ValueError: if there is no way to pass drawn values to model and guide, or the likelihood reads the observed
            values themselves.
    """

    def __init__(self, model: Function, guide: Function, data: tuple[Tensor, ...]):
        self.model, self.guide, self.data = model, guide, tuple(data)
        with poutine.block():
            observed = observed_sites(poutine.trace(model).get_trace(*data))
        self.shapes = {name: torch.as_tensor(site["value"]).shape for name, site in observed.items()}
        values = {name: torch.as_tensor(site["value"]) for name, site in observed.items()}
        self.given = {name: value.detach().clone() for name, value in values.items()}
        places = {name: _place(name, value, self.data) for name, value in values.items()}
        self.places = {name: place for name, place in places.items() if place is not None}
        self._check_once()
        self.others = [name for name in places if name not in self.places]
        if self.others:
            self._check_guide(self.others, values)

    def _check_once(self) -> None:
        """Raise if two sites observe the same numbers of a data tensor."""
        counts = [torch.zeros_like(tensor, dtype=torch.int32) for tensor in self._copies()]
        for place in self.places.values():
            place.of(counts).add_(1)
        for number, count in enumerate(counts):
            if (count > 1).any():
                sites = [name for name, place in self.places.items() if place.number == number]
                raise ValueError(f"`model` must observe each data tensor at one site, got one tensor at {sites}")

    def _check_guide(self, names: list[str], values: Values) -> None:
        """Raise if the guide reads a data tensor from which the model computes observed values."""
        for number, tensor in enumerate(self.data):
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            others = (*self.data[:number], tensor + 0.5 + tensor.nan_to_num().abs(), *self.data[number + 1 :])
            with poutine.block(), pyro.validation_enabled(False):
                again = observed_sites(poutine.trace(self.model).get_trace(*others))
                changed = [name for name in names if not _same(values[name], again[name]["value"])]
                if not changed:
                    continue
                drawn = poutine.trace(self.guide).get_trace(*self.data)
                moved = poutine.trace(poutine.replay(self.guide, drawn)).get_trace(*others)
            ours, theirs = (latent_sites(trace) for trace in (drawn, moved))
            if any(not torch.allclose(log_density(ours[name]), log_density(theirs[name])) for name in ours):
                raise ValueError(
                    f"`model` must observe one of its {len(self.data)} data tensors, unchanged, or a view of one, at "
                    f"{changed[0]!r}, as in `obs=x`, where the guide reads it, got other values: simulated data would "
                    "not reach the guide"
                )

    def draw(self, check: bool = False) -> Simulation:
        """Draw data and latents in the current random stream; with ``check``, raise if they are not right as data."""
        simulated = self._copies()
        written = _WriteDrawn(self.places, self.given, simulated)
        with poutine.block():
            trace = poutine.trace(written(ResampleObserved()(self.model))).get_trace(*simulated)
        sites: dict[str, Any] = dict(trace.nodes)
        values = {name: written.values[name].reshape(self.shapes[name]) for name in self.others}
        truth = {name: site["value"] for name, site in latent_sites(trace).items() if name not in self.shapes}
        simulation = Simulation(tuple(simulated), values, truth)
        if check:
            drawn = {name: sites[name] | {"value": value} for name, value in written.values.items()}
            self._check({name: log_density(site) for name, site in drawn.items()}, simulation)
        return simulation

    def _check(self, expected: Values, simulation: Simulation) -> None:
        """Raise if drawn values have another density when they are passed as data than when they were drawn."""
        fixed = poutine.condition(self.model, data=simulation.truth | simulation.values)
        with poutine.block():
            again = observed_sites(poutine.trace(fixed).get_trace(*simulation.data))
        for name in self.shapes:
            if not torch.allclose(expected[name], log_density(again[name]), rtol=1e-3, atol=1e-3):
                raise ValueError(
                    f"`model` must have a likelihood of {name!r} that depends on latents, covariates and values of "
                    "sites before it, not on the observed values themselves, got draws that have another density when "
                    "they are passed as data"
                )

    def _copies(self) -> list[Tensor]:
        """Copies of the data tensors, with the same strides."""
        return [torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device).copy_(t) for t in self.data]


class _WriteDrawn(Messenger):
    """Write drawn values into the data at once, so that the sites after them see them, as in a chain of observations.

    What is masked stays as it is given, since it is not observed, and what is missing (NaN) stays missing.
    """

    def __init__(self, places: Mapping[str, _Place], given: Values, data: list[Tensor]):
        super().__init__()
        self.places, self.given, self.data = places, given, data
        self.values: Values = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if (name := msg["name"]) not in self.given:
            return
        value, given = torch.as_tensor(msg["value"]), self.given[name]
        kept = given.isnan()
        if msg["mask"] is not None:
            mask = torch.as_tensor(msg["mask"], device=value.device)
            kept = kept | ~mask.reshape(mask.shape + (1,) * msg["fn"].event_dim).expand(value.shape).reshape(
                given.shape
            )
        value = value.reshape(given.shape)
        self.values[name] = torch.where(kept, given.to(value.dtype), value) if kept.any() else value
        if name in self.places:
            written = self.places[name].of(self.data)
            written.copy_(self.values[name].reshape(written.shape))
            _check_dtype(name, value, written)


def _same(ours: Tensor, theirs: Any) -> bool:
    return torch.equal(ours.nan_to_num(), torch.as_tensor(theirs).nan_to_num())


def _check_dtype(name: str, value: Tensor, written: Tensor) -> None:
    if not written.is_floating_point() and not value.equal(written.reshape(value.shape).to(value)):
        raise ValueError(
            f"`data` must have a dtype that holds the draws of {name!r}, {value.dtype} with fractions, got "
            f"{written.dtype}. Convert it by `x.to(dtype)`"
        )


def _place(name: str, value: Tensor, data: tuple[Tensor, ...]) -> _Place | None:
    """Find the data tensor that is the value of an observed site, or of which it is a part; ``None`` if none is."""
    for number, tensor in enumerate(data):
        if tensor is value:
            return _Place(number, None)
    for number, tensor in enumerate(data):
        if (part := _part(value, tensor)) is not None:
            return _Place(number, part)
    found = [
        number
        for number, tensor in enumerate(data)
        if tensor.numel() == value.numel()
        and torch.allclose(tensor.double().flatten(), value.double().flatten(), equal_nan=True)
    ]
    if len(found) > 1:
        raise ValueError(
            f"`model` must observe one of its {len(data)} data tensors, unchanged, at {name!r}, as in `obs=x`, got "
            "values that are equal to several of them"
        )
    return _Place(found[0], None) if found else None


def _part(value: Tensor, tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], int] | None:
    """Sizes, strides and offset of a value that is a view of a data tensor."""
    if value.dtype != tensor.dtype or value.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
        return None
    offset = int(value.storage_offset() - tensor.storage_offset())
    ends = [sum((size - 1) * step for size, step in zip(t.size(), t.stride(), strict=True)) for t in (value, tensor)]
    repeated = any(step == 0 and size > 1 for size, step in zip(value.size(), value.stride(), strict=True))
    inside = offset >= 0 and offset + ends[0] <= ends[1]
    return (value.size(), value.stride(), offset) if inside and not repeated and value.numel() else None
