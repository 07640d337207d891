"""The joint density log p(x, z) of a Pyro model at any values of its latents, for each cell of its units.

The units are the plates that all sites share, :attr:`pyro_vae.model_guide.ModelGuide.units`: one cell for each datum
where all latents are local to it, and a single cell where some latent is global. Values have the cells first, see
:class:`CellLayout`. The model runs with its latents conditioned on many values, each as if it were alone, see
:mod:`pyro_vae.draws`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae._utils.data import DataTensors
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import latent_sites, log_density, observed_sites, plate_scale, summed_to
from pyro_vae._utils.typing import Function
from pyro_vae.distributions.properties import is_masked
from pyro_vae.draws import PerDraw, Results, Values
from pyro_vae.exact.coordinates import LatentCoordinates
from pyro_vae.exact.elimination import MAX_STATES, check_enumeration, enumerated, log_marginal
from pyro_vae.exact.quadrature import Box
from pyro_vae.model_guide import ModelGuide, check_one_plate

__all__ = [
    "MAX_STATES", "CellLayout", "ConditionedRuns", "ModelDensity", "Values", "check_repeatable", "check_site",
    "common_weight", "few_rows", "layouts_of", "plus",
]  # fmt: skip

Sites = dict[str, dict[str, Any]]
Read = Callable[[Sites], dict[Any, Tensor]]
"""From the sites at one value of the latents to tensors by key."""

_BUDGET = 2**20  # numbers in the largest tensor of a chunk; larger tensors are slower because of page faults


class CellLayout:
    """The values of a site, ``(C, *batch, *event)`` for C draws, with the cells of some plates first, ``(C, U, ...)``.

    >>> from pyro.poutine.indep_messenger import CondIndepStackFrame
    >>> layout = CellLayout([CondIndepStackFrame("rows", dim=-1, size=5, counter=0)], num_batch=2)
    >>> layout.to_cells(torch.zeros(7, 4, 5, 3)).shape, layout.to_site(torch.zeros(7, 5, 4, 3)).shape
    (torch.Size([7, 5, 4, 3]), torch.Size([7, 4, 5, 3]))
    """

    def __init__(self, plates: Iterable[CondIndepStackFrame], num_batch: int):
        frames = [frame for frame in plates if frame.dim is not None]
        self.sizes = [frame.size for frame in frames]
        self._axes = [1 + num_batch + frame.dim for frame in frames if frame.dim is not None]
        self._first = list(range(1, 1 + len(frames)))

    def to_cells(self, value: Tensor) -> Tensor:
        """Move the cells behind the draws, and flatten them."""
        return value.movedim(self._axes, self._first).reshape(value.shape[0], -1, *self._others(value))

    def to_site(self, value: Tensor) -> Tensor:
        """Return values to their places; one cell may stand for all."""
        cells = value.shape[1]  # of one plate as many as there are: rows come in batches
        sizes = [cells] if len(self.sizes) == 1 else self.sizes if cells > 1 else [1] * len(self.sizes)
        return value.reshape(value.shape[0], *sizes, *value.shape[2:]).movedim(self._first, self._axes)

    def _others(self, value: Tensor) -> list[int]:
        return [size for axis, size in enumerate(value.shape) if axis and axis not in self._axes]


class ModelDensity:
    """A model on its data, ``pair``: log p(x, z) at any z, and its latents.

    Args:
        pair: the model, and its guide if there is one.
        by_rows: whether all sites must be in the data plate, the rightmost dimension, so that each cell is a row.
        units: the plates whose cells have a log p(x, z) each; by default those that all sites share.
        summed_out: discrete latents to sum out, further to those that the guide leaves out; not by rows.

    Attributes:
        eliminated: the latents that are summed out.
        num_data: N, the number of cells: of rows, of groups, or 1.
        latents: the sites of the latents, by name, without those that are summed out.
        layouts: of their values.

    Raises:
        ValueError: if the model does not have latent and observed sites, all in the data plate and unscaled; if a
            latent is masked, or a likelihood not normalised; if two runs give different densities.
    """

    def __init__(
        self,
        pair: ModelGuide,
        by_rows: bool = True,
        units: Sequence[CondIndepStackFrame] | None = None,
        summed_out: Iterable[str] = (),
    ):
        try:
            with torch.no_grad(), pyro.validation_enabled():
                pair.model_trace.compute_log_prob()
        except ValueError:  # a draw of the guide may lie outside of the support of p(z)
            pair.check_kinds()
            raise
        self.pair, self.model, self.data, self.plate = pair, pair.model, pair.data, pair.plate
        self.eliminated = [] if by_rows else [*pair.eliminated, *summed_out]
        self.latents = {name: site for name, site in pair.latents.items() if name not in self.eliminated}
        self.observed, self.by_rows = pair.observed, by_rows
        if by_rows:
            _check_structure(pair)
        else:
            _check_form(pair)
        self.units = pair.units if units is None else units
        self.num_data = math.prod(frame.size for frame in self.units)
        self.rows = torch.arange(self.num_data, device=pair.data[0].device)
        self.dtype = log_density(next(iter(self.observed.values()))).dtype
        self.chunk = self.chunk_size(_BUDGET)
        self.layouts = layouts_of(self.latents, self.units)
        self.runs = ConditionedRuns(self.model, self.layouts, self.units, self.eliminated, pair.max_plate_nesting)
        if by_rows:
            pair.check_rows("model")
        if self.eliminated:
            first_dim = -1 - pair.max_plate_nesting
            with torch.no_grad(), seeded(1), poutine.block():
                check_enumeration(self.model, self.eliminated, first_dim, pair.model_trace, pair.data)
        # Another run at the same latents, in a batch with others, shows random numbers such as those of dropout.
        values = {name: self.layouts[name].to_cells(site["value"][None]) for name, site in self.latents.items()}
        others = {name: torch.cat([value, value.roll(1, 1)]) for name, value in values.items()}
        with torch.no_grad(), seeded(1):
            expected = self.log_joint(values)[0] if self.eliminated else self._traced()
            check_repeatable("model", expected, self.log_joint(others)[0])

    def _traced(self) -> Tensor:
        """log p(x, z) of the run of the pair, for each cell."""
        return plus([summed_to(log_density(site), self.units).flatten() for site in self.sites.values()])

    @property
    def sites(self) -> Sites:
        """The latent and observed sites."""
        return self.latents | self.observed

    @property
    def is_discrete(self) -> bool:
        """Whether every latent can be enumerated."""
        return all(site["fn"].has_enumerate_support for site in self.latents.values())

    @property
    def num_states(self) -> int:
        """The number of joint states of the discrete latents."""
        return math.prod(map(len, self._supports()))

    def single_site(self) -> tuple[str, dict[str, Any]]:
        """Return name and site of the only latent."""
        if len(self.latents) != 1:
            raise ValueError(
                f"`model` must have discrete latents with at most {MAX_STATES} states together, or a single continuous "
                f"latent, got the latents {list(self.latents)}; a posterior is computed for a single latent only"
            )
        return next(iter(self.latents.items()))

    def coordinates(self) -> LatentCoordinates:
        """Return the coordinates of the only latent, a continuous one."""
        name, site = self.single_site()
        return LatentCoordinates(name, site["fn"], self.dtype)

    def integration_box(self, fn: dist.TorchDistribution) -> Box:
        """Return a box for each datum with nearly all mass of p(z) or q(z | x), ``fn``; one if all are the same."""
        box = self.coordinates().integration_box(fn, self.pair.num_data)
        return box if len(box.low) == 1 else box[self.rows].shared()

    def chunk_size(self, budget: int) -> int:
        """Return how many values of the latents fit a budget of numbers in the largest tensor."""
        if self.by_rows:
            widths = [site["fn"].event_shape.numel() for site in self.sites.values()]
        else:
            widths = [-(-torch.as_tensor(site["value"]).numel() // self.num_data) for site in self.sites.values()]
        return max(1, budget // (self.num_data * max(64, *widths)))

    def of_rows(self, rows: Tensor | slice) -> "ModelDensity":
        """Return the density of some rows, for a model and guide whose rows do not depend on each other."""
        part = copy(self)
        part.data = DataTensors(self.data.rows(rows))
        part.num_data, part.rows = len(part.data[0]), self.rows[rows]
        part.chunk = part.chunk_size(_BUDGET)
        return part

    def on_all_rows(self, pair: ModelGuide) -> "ModelDensity":
        """Return the density on all rows of a pair whose first rows this one has, independent of the others."""
        whole = copy(self)
        whole.pair, whole.data, whole.num_data = pair, pair.data, pair.num_data
        whole.rows = torch.arange(pair.num_data, device=pair.data[0].device)
        whole.chunk = whole.chunk_size(_BUDGET)
        return whole

    def on_data(self, data: tuple[Tensor, ...]) -> "ModelDensity":
        """Return the density on other data, of as many rows or of another batch."""
        part = copy(self)
        part.data, part.num_data = DataTensors(data), self.num_data + len(data[0]) - len(self.data[0])
        return part

    def batches(self, size: int) -> "Iterator[ModelDensity]":
        """Split the rows into batches, for a model and guide whose rows do not depend on each other."""
        return (self.of_rows(slice(start, start + size)) for start in range(0, self.num_data, size))

    def has_independent_rows(self, owners: Sequence[str] = ("model", "guide")) -> bool:
        """Whether some rows can be computed without the others, in the model and the guide, if there is one."""
        coordinates = [LatentCoordinates(name, site["fn"], self.dtype) for name, site in self.latents.items()]
        if any(isinstance(bound, Tensor) and bound.dim() for each in coordinates for bound in each.bounds):
            return False  # the bounds of a support are those of all rows
        present = ["model"] if self.pair.guide is None else ["model", "guide"]
        return all(self.pair.is_amortized(owner) for owner in owners if owner in present)

    def zeros(self) -> Tensor:
        """Return zeros ``(N,)`` in float64, on the device of the data."""
        return torch.zeros(self.num_data, dtype=torch.float64, device=self.data[0].device)

    def log_joint(self, values: Values) -> Tensor:
        """Compute log p(x, z) at values of every latent, ``(C, 1 or N, *event)``, as ``(C, N)``."""
        return self.runs.log_prob(values, self.data, self.num_data)

    def read(self, values: Values, read: Read) -> dict[Any, Tensor]:
        """Read tensors from the sites at values of every latent, ``(C, 1 or N, *event)``; ``(C, *shape)`` each."""
        results, count = self.runs(values, self.data, self.num_data, read), _count(values)
        return {key: results.each(key, count) for key in results.tensors}

    def log_probs(self, values: Values) -> dict[str, Tensor]:
        """Compute the log-density of each site, latent and observed, at values of every latent, ``(C, 1 or N)``."""
        return self.read(values, lambda sites: {name: self.runs.summed(log_density(s)) for name, s in sites.items()})

    def states(self) -> Iterator[Values]:
        """Iterate over the joint states of all latents in chunks, as values ``(C, 1, *event)``."""
        supports, count = self._supports(), self.num_states
        if count > MAX_STATES:
            must = f"discrete latents with at most {MAX_STATES} states together"
            raise ValueError(f"`model` must have {must}, got {count} states of {list(self.latents)}")
        for index in torch.arange(count, device=supports[0].device).split(self.chunk):
            values, rest = {}, index
            for name, support in zip(self.latents, supports, strict=True):
                values[name], rest = support[rest % len(support)], rest // len(support)
            yield values

    def _supports(self) -> list[Tensor]:
        fns = [site["fn"] for site in self.latents.values()]
        return [fn.enumerate_support(expand=False).reshape(-1, 1, *fn.event_shape) for fn in fns]


def few_rows(p: ModelDensity, count: int) -> Tensor | None:
    """Return the numbers of a few rows; ``None`` if they cannot be looked at without the others."""
    device = p.data[0].device
    if p.num_data <= count:
        return torch.arange(p.num_data, device=device)
    return torch.linspace(0, p.num_data - 1, count, device=device).long() if p.has_independent_rows() else None


class ConditionedRuns:
    """Runs of a model or guide at values of every latent, ``(C, 1 or N, *inner, *event)``.

    Values that are the same for all data, one row, are given as one row if the code has the same densities then as with
    N rows, which is compared at the first and the last of the first values. A decoder then runs on C rows, and not C N.

    Args:
        function: the model or guide.
        layouts: of the values of its latents.
        units: the plates for whose cells it has a log-density each.
        eliminated: the discrete latents that are summed out.
        max_plate_nesting: how many dimensions the plates take.
    """

    def __init__(
        self,
        function: Function,
        layouts: Mapping[str, CellLayout],
        units: Sequence[CondIndepStackFrame],
        eliminated: Iterable[str] = (),
        max_plate_nesting: int = 1,
    ):
        self.function, self.layouts, self.units = function, layouts, units
        self.eliminated = list(eliminated)
        if self.eliminated:
            self.function = enumerated(function, self.eliminated, -1 - max_plate_nesting)
        self._runs = {rows: PerDraw() for rows in ("one", "all")}
        self._one_row: bool | None = None  # not known yet

    def trace(self, values: Values, data: tuple[Tensor, ...]) -> Trace:
        """Run once, at one value of every latent, ``(N, *inner, *event)``."""
        at = {name: self.layouts[name].to_site(value[None])[0] for name, value in values.items()}
        return poutine.trace(poutine.condition(self.function, data=at)).get_trace(*data)

    def sites(self, values: Values, data: tuple[Tensor, ...]) -> Sites:
        """Run once, at one value of every latent, and return the sites."""
        return _scored_sites(self.trace(values, data))

    def __call__(self, values: Values, data: tuple[Tensor, ...], num_data: int, read: Read | None = None) -> Results:
        """Read tensors from the sites, by default the log-density of each by its name, at C values of every latent."""
        short = any(value.shape[1] == 1 for value in values.values())
        if not short or num_data == 1:
            return self._at("all", values, data, num_data, read)
        if self._one_row is None:
            self._one_row = self._same_with_one_row(values, data, num_data)
        return self._at("one" if self._one_row else "all", values, data, num_data, read)

    def log_prob(self, values: Values, data: tuple[Tensor, ...], num_data: int) -> Tensor:
        """Compute the log-density of all sites together, ``(C, N)``."""
        return _total(self(values, data, num_data), _count(values))

    def _at(
        self, rows: str, values: Values, data: tuple[Tensor, ...], num_data: int, read: Read | None = None
    ) -> Results:
        if rows == "all":
            values = {name: value.expand(-1, num_data, *value.shape[2:]) for name, value in values.items()}

        def run(values: Values) -> tuple[dict[Any, Tensor], None]:
            trace = self.trace(values, data)
            return (read(_scored_sites(trace)) if read else self.log_densities(trace)), None

        with poutine.block():
            return self._runs[rows](run, _count(values), values)

    def log_densities(self, trace: Trace) -> dict[Any, Tensor]:
        """The log-density of each site for each cell, or of all sites together where latents are summed out."""
        if self.eliminated:
            return {"joint": log_marginal(trace, self.units).flatten()}
        return {name: self.summed(log_density(site)) for name, site in _scored_sites(trace).items()}

    def summed(self, term: Tensor) -> Tensor:
        """Sum a log-density to ``(N)`` cells; that of one row, which stands for all, stays one."""
        if [frame.dim for frame in self.units] == [-1] and term.dim() == 1:
            return term
        return summed_to(term, self.units).flatten()

    def _same_with_one_row(self, values: Values, data: tuple[Tensor, ...], num_data: int) -> bool:
        ends = {name: value[:: max(1, len(value) - 1)] for name, value in values.items()}
        expected = _total(self._at("all", ends, data, num_data), _count(ends))
        try:
            found = _total(self._at("one", ends, data, num_data), _count(ends))
        except Exception:  # code such as torch.cat, which needs N rows
            return False
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def _scored_sites(trace: Trace) -> Sites:
    # An autoguide at values of its auxiliary sites draws the latents that are functions of them.
    return observed_sites(trace) | latent_sites(trace)


def layouts_of(sites: Sites, units: Sequence[CondIndepStackFrame]) -> dict[str, CellLayout]:
    """The layouts of the values of sites."""
    return {name: CellLayout(units, site["value"].dim() - site["fn"].event_dim) for name, site in sites.items()}


def _count(values: Values) -> int:
    return len(next(iter(values.values()), (None,)))


def _total(results: Results, count: int) -> Tensor:
    total = plus(results.tensors.values())
    return total if results.stacked else total.expand(count, *total.shape)


def plus(terms: Iterable[Tensor]) -> Tensor:
    """Sum log-densities, which may be none."""
    return sum(terms, torch.zeros((), device="cpu"))


def check_repeatable(owner: str, expected: Tensor, again: Tensor) -> None:
    """Raise if the log-density of another run of ``"model"`` or ``"guide"`` at the same latents is another one."""
    if not torch.allclose(expected, again, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"`{owner}` must have one {'log p(x, z)' if owner == 'model' else 'log q(z | x)'} at each z, got two "
            "different ones at the same z"
        )


def check_site(owner: str, name: str, site: dict[str, Any], weight: float = 1.0, by_rows: bool = True) -> None:
    """Raise if a site of ``"model"`` or ``"guide"`` has another weight than all sites have, :func:`common_weight`.

    Raise also if it is a masked latent where each row needs a density.
    """
    if _is_scaled(site, weight):
        must = "use all data, with densities that are not scaled"
        raise ValueError(f"`{owner}` must {must}, got site {name!r} with the scale {site['scale']}")
    if by_rows and not site["is_observed"] and (site["mask"] is not None or is_masked(site["fn"])):
        got = f"{name!r} with one: its masked density is no distribution"
        raise ValueError(f"`{owner}` must have latents without a mask, got {got}")


def common_weight(pair: ModelGuide) -> float:
    """The scale that all sites of a model have, 1 if they differ.

    One scale for everything, such as 1/N for a loss per datum, changes the steps of an optimizer, and not the model.
    """
    sites = (pair.latents | pair.observed).values()
    weights = {float(torch.as_tensor(site["scale"]).max()) / plate_scale(site) for site in sites}
    return weights.pop() if len(weights) == 1 else 1.0


def _is_scaled(site: dict[str, Any], weight: float = 1.0) -> bool:
    return bool(torch.as_tensor(site["scale"]).ne(weight).any())


def _check_form(pair: ModelGuide) -> None:
    """Raise if a model has no log p(x, z) of all data."""
    if not pair.observed:
        raise ValueError(f"`model` must have observed sites, got the latents {list(pair.latents)} alone")
    for name, site in (pair.latents | pair.observed).items():
        check_site("model", name, site, common_weight(pair), by_rows=False)
    pair.check_likelihood()
    pair.check_kinds()


def _check_structure(pair: ModelGuide) -> None:
    """Raise if a model has no exact density of each row."""
    if not pair.latents or not pair.observed:
        got = f"the latents {list(pair.latents)} and the observed sites {list(pair.observed)}"
        raise ValueError(f"`model` must have latent and observed sites, got {got}")
    sites = pair.latents | pair.observed
    check_one_plate([("model", name, site) for name, site in sites.items()], pair.plate)
    frame = next(iter(pair.observed.values()))["cond_indep_stack"][0]
    # A plate of fewer rows in the guide is a subsample in the model, which is replayed with it.
    drawn = [("guide", name, site) for name, site in pair.guide_latents.items() if plate_scale(site) == 1]
    check_one_plate(drawn, pair.plate, frame.full_size or frame.size)
    for name, site in sites.items():
        check_site("model", name, site, common_weight(pair))
    pair.check_likelihood()
    pair.check_kinds()
