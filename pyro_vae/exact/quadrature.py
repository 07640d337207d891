"""Adaptive quadrature over one or two dimensions that estimates its own error.

Gauss-Legendre rules on cells, which are halved where two resolutions disagree: at a narrow peak, a jump, a kink. The
first cells follow the scales of a distribution: each component of a mixture has its own. Further out, they grow with
the distance. All data share their cells, so that a decoder runs once for all of them, until few of them need the same.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, reduce
from itertools import count, product
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "MAX_NODES",
    "Box",
    "Cells",
    "Integrand",
    "LatticeFunction",
    "QuadratureError",
    "QuadratureRule",
    "check_draws",
    "integrate",
    "rows_from",
    "sum_on_lattice",
]

MAX_NODES = {1: 2**16, 2: 2**18}
"""Largest number of nodes for a datum, by dimensions."""
_SHARED_NODES = 2**16  # for all data, before each datum has its own cells
_SHARED_CHUNK = 4  # times as many points at once, if all data share them

_ORDER = 8
_PANELS = {1: 32, 2: 8}  # first cells along each axis of the box of a distribution
_SCANNED = {1: 128, 2: 32}  # points along each axis of a first cell, at which a few data are compared
_DEPTH = 30  # halvings after which a peak between nodes is narrower than float32 distinguishes
_EXPANSIONS = 12
_SPACING, _RADIUS = {1: 0.25, 2: 0.5}, 7.5  # of a lattice, by dimensions, in standard deviations of a normal
_SHELLS = (
    50  # doublings of a box for an expectation with heavy tails: the squares of numbers there are finite in float32
)


class QuadratureError(ArithmeticError):
    """The quadrature did not converge: two resolutions, or the independent estimate, differ more than the tolerance.

    Args:
        reason: the message, with ``{}`` for the number of the datum, if there is one.
        datum: its number.

    >>> error = QuadratureError("the density of datum {} is NaN", datum=3)
    >>> error.count_from(100)
    >>> print(error)
    the density of datum 103 is NaN
    """

    def __init__(self, reason: str, datum: int | None = None):
        super().__init__(reason)
        self._reason, self._datum = reason, datum
        self.count_from(0)

    def count_from(self, first: int) -> None:
        """Count the datum among all rows, of which ``first`` is the number of the first one here."""
        if self._datum is not None:
            self._datum += first
            self.args = (self._reason.format(self._datum),)


@contextmanager
def rows_from(first: int) -> Iterator[None]:
    """Count the datum of a :class:`QuadratureError` among all rows, of which a block computes those from ``first``."""
    try:
        yield
    except QuadratureError as error:
        error.count_from(first)
        raise


def check_draws(log_weight: Tensor, of: str, tolerance: float) -> None:
    """Raise if draws from the prior find more than a quadrature: mass that it has missed.

    Args:
        log_weight: log p(x | z) at the draws, less the log p(x) of the quadrature, ``(K, N)``.
        of: what each number is of, for the error: ``"datum"`` or ``"cell"``.
        tolerance: of the quadrature, in nats.
    """
    weight = log_weight.clamp(max=300).exp().nan_to_num(0.0)
    mean, error = weight.mean(0), weight.std(0) / len(weight) ** 0.5
    missed = (mean - 6 * error > 1 + 10 * tolerance + 1e-3) | (mean > 1e7)
    if missed.any():
        place = int(missed.byte().argmax())
        raise QuadratureError(
            f"quadrature did not converge: {len(weight)} draws from the prior find p(x) of {of} {{}} to be "
            f"{float(mean[place]):.3g} times that of the quadrature, with a standard error of "
            f"{float(error[place]):.2g}; it has missed a narrow peak",
            place,
        )


@dataclass(frozen=True)
class Box:
    """The corners and break points of boxes, one for each of a batch: ``low <= middle <= high``, each ``(B, d)``.

    ``parts`` are boxes inside, lower and upper corners ``(2, K, B, d)``, each of which has a scale of its own.
    """

    low: Tensor
    middle: Tensor
    high: Tensor
    parts: Tensor

    @classmethod
    def around(cls, low: Tensor, middle: Tensor, high: Tensor) -> "Box":
        """Return boxes of one scale."""
        return cls(low, middle, high, torch.stack([low, high])[:, None])

    def shared(self) -> "Box":
        """Return one box, ``(1, d)``, if all of the batch are equal, else all of them."""
        corners = torch.cat([torch.stack([self.low, self.middle, self.high]), self.parts.flatten(0, 1)])
        return self[:1] if (corners == corners[:, :1]).all() else self

    def union(self) -> "Box":
        """Return one box around the batch, ``(1, d)``, whose parts are those of all."""
        if len(self.low) == 1:
            return self
        low, high = self.low.amin(0, keepdim=True), self.high.amax(0, keepdim=True)
        return Box(low, self.middle[:1].clamp(low, high), high, self.parts.flatten(1, 2).unique(dim=1)[:, :, None])

    def expanded(self, factor: float) -> "Box":
        """Return boxes of this times the width on either side of the break point, with the same parts."""
        low, high = (self.middle + factor * (corner - self.middle) for corner in (self.low, self.high))
        return Box(low, self.middle, high, self.parts)

    def __getitem__(self, rows: slice | Tensor) -> "Box":
        return Box(self.low[rows], self.middle[rows], self.high[rows], self.parts[:, :, rows])


class Cells(NamedTuple):
    """Boxes by lower corner and width, ``(C, B, d)`` each: B = 1 if they are those of all data; width 0 for none."""

    low: Tensor
    width: Tensor

    def halve(self, axis: int) -> "Cells":
        """Return the halves along one axis, ``(2 C, B, d)``."""
        width = self.width.clone()
        width[..., axis] /= 2
        above = self.low.clone()
        above[..., axis] += width[..., axis]
        return Cells(torch.cat([self.low, above]), torch.cat([width, width]))

    def split(self) -> "Cells":
        """Return the halves along each axis, ``(2^d C, B, d)``."""
        return reduce(Cells.halve, reversed(range(self.low.shape[-1])), self)

    def take(self, index: Tensor) -> "Cells":
        """Return some cells: by a mask or numbers ``(C,)``, or for each datum by its numbers ``(C', N)``."""
        return Cells(*(_pick(part, index) for part in self))

    def nodes(self) -> tuple[Tensor, Tensor]:
        """Return the nodes ``(8^d, C, B, d)`` and their log-weights ``(8^d, C, B)``."""
        position, weight = (part.to(self.low.device)[:, None, None] for part in _rule(self.low.shape[-1]))
        return self.low + position * self.width, weight.log() + self.width.log().sum(-1)

    def subcells(self) -> "Cells":
        """Return for each node the cell around it, of a volume that is its weight, ``(8^d, C, B, d)``."""
        start, width = (part.to(self.low.device)[:, None, None] for part in _node_cells(self.low.shape[-1]))
        return Cells(self.low + start * self.width, width * self.width)

    def chunks(self, size: int) -> "Iterator[Cells]":
        """Iterate over at most ``size`` of them."""
        for parts in zip(*(part.split(max(1, size)) for part in self), strict=True):
            yield Cells(*parts)


class Integrand(Protocol):
    """A density and a function of which it is a weight, at points of N data."""

    num_data: int
    chunk: int
    """Number of points to compute at once."""
    rounding: float
    """Relative rounding error of the logarithm of the density and of the function."""

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        """From points ``(C, B, d)``, with B = 1 or N, to the log-density and the function's values, ``(C, N)``."""

    def few_rows(self, count: int) -> "tuple[Integrand, Tensor] | None":
        """Return the integrand of a few rows, and which they are, if rows do not depend on each other."""


class LatticeFunction(Protocol):
    """A function at points of N data, whose expectation under a normal distribution of each is a sum over a lattice."""

    chunk: int
    """Number of points to compute at once."""
    rounding: float
    """Relative rounding error of its values."""

    def __call__(self, points: Tensor) -> Tensor:
        """From points ``(C, N, d)`` to values ``(C, N)`` in float64."""


def sum_on_lattice(
    function: LatticeFunction, loc: Tensor, scale_tril: Tensor, tolerance: float, reach: float = 1.0
) -> tuple[Tensor, Tensor]:
    r"""Compute the expectation of a function f under a normal distribution by the trapezoidal rule.

    .. math:: \mathbb{E}[f(z)] \approx \sum_{k \in \mathbb{Z}^d} h^d\, \mathcal{N}(h k; 0, I)\, f(\mu + h L k)

    The error falls exponentially as the spacing h becomes smaller, where f is analytic, and as :math:`h^2` or h at a
    kink or a jump. Each of the lattices of every second or fourth point is a rule of its own with a larger error e,
    which its distance from the whole shows. The error of the whole is taken to be :math:`e_{2h}^2 / e_{4h}`, as if it
    fell by one factor each time, and no less than :math:`e_{2h} / 4`, as at a kink. Twice that must be tolerable.

    Args:
        function: f.
        loc, scale_tril: the mean ``(N, d)`` and the Cholesky factor ``(N, d, d)`` of the covariance, in float64.
        tolerance: largest error of the expectation.
        reach: the lattice is finer by this factor.

    Returns:
        The expectation, ``(N,)`` in float64, and for which data it is precise, ``(N,)``.

    Source: Trefethen and Weideman 2014, "The exponentially convergent trapezoidal rule", section 5.
    """
    dims = loc.shape[-1]
    spacing = _SPACING[dims] / reach
    most = math.ceil(_RADIUS / spacing)
    steps = _grid(torch.arange(-most, most + 1, device=loc.device), dims)
    radius = spacing * steps.double().norm(dim=-1)
    steps, radius = steps[radius <= _RADIUS], radius[radius <= _RADIUS]
    weights = (-(radius**2) / 2).exp() * (spacing / math.sqrt(2 * math.pi)) ** dims
    points = loc + torch.einsum("cj,nij->cni", spacing * steps.double(), scale_tril)
    values = torch.cat([function(part) for part in points.split(max(1, function.chunk))])
    terms = weights[:, None] * values
    value = terms.sum(0)
    error, coarser = (_spread(terms, steps, value, every) for every in (2, 4))
    error = torch.where(error < coarser, torch.maximum(error**2 / coarser, error / 4), error)
    at_edge = terms[radius > _RADIUS - 1].abs().sum(0)
    return value, torch.maximum(2 * error, 8 * at_edge) <= tolerance + function.rounding * value.abs()


def _spread(terms: Tensor, steps: Tensor, value: Tensor, every: int) -> Tensor:
    """The largest distance of a sum over a lattice from those over every second or fourth of its points, ``(N,)``."""
    dims = steps.shape[1]
    which = (steps % every) @ (every ** torch.arange(dims, device=steps.device))
    parts = torch.zeros(every**dims, terms.shape[1], dtype=terms.dtype, device=terms.device)
    return (parts.index_add_(0, which, terms).mul_(every**dims) - value).abs().amax(0)


class QuadratureRule(NamedTuple):
    """The cells of a quadrature in blocks, and the log-mass of each for each datum, -inf if the datum has others."""

    box: Box
    blocks: list[tuple[Cells, Tensor]]

    @property
    def per_axis(self) -> int:
        """The number of nodes along each axis of a full grid of as many."""
        dims = self.box.low.shape[-1]
        return round(sum(len(log_mass) for _, log_mass in self.blocks) ** (1 / dims) * _ORDER)

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor, Cells]]:
        """Iterate over nodes ``(C, B, d)``, log-weights ``(C, N)``, -inf where a datum has others, and their cells."""
        for cells, log_mass in self.blocks:
            per = max(1, size // _ORDER ** cells.low.shape[-1])
            for part, mass in zip(cells.chunks(per), log_mass.split(per), strict=True):
                nodes, log_weights = part.nodes()
                own = log_weights.expand(-1, *mass.shape).masked_fill(mass == -torch.inf, -torch.inf)
                yield nodes.flatten(0, 1), own.flatten(0, 1), Cells(*(each.flatten(0, 1) for each in part.subcells()))


def integrate(
    integrand: Integrand, box: Box, tolerance: float, reach: float = 4.0
) -> tuple[Tensor, Tensor | None, QuadratureRule]:
    """Compute the logarithm of the mass of a density over all space, and the integral of a function under it.

    Args:
        integrand: density and function.
        box: of the density, ``(1, d)`` or ``(N, d)``.
        tolerance: largest error of the logarithm, and of the integral.
        reach: the first cells fill a box that is wider by this factor, and is doubled while mass is at its edge.

    Returns:
        Both, ``(N,)`` in float64, the second ``None`` without a function; and the rule.

    Raises:
        QuadratureError: if two resolutions do not agree with the largest number of nodes, if mass remains outside, or
            if an integral is infinite.
    """
    hull = box.expanded(reach)
    cells = _first_cells(hull, hull.low.shape[0] == 1)
    if cells.low.shape[1] == 1:
        hull = hull.union()
    refinement = _Refinement(integrand, tolerance, box)
    refinement.add(_split_where_rough(integrand, cells), hull)
    shells: list[Tensor] = []
    expansions = 0
    while (refinement.edge > tolerance / 8).any():
        if expansions == (_EXPANSIONS if refinement.moment is None else _SHELLS):
            refinement.extrapolate(shells)
            break
        wider = hull.expanded(2)
        before = refinement.moment
        refinement.add(_shell(hull, wider), wider)
        if before is not None and refinement.moment is not None:
            shells.append(refinement.moment - before)
        expansions += 1
        hull = wider
    return refinement.log_mass, refinement.moment, QuadratureRule(hull, refinement.blocks)


class _Estimates(NamedTuple):
    """Estimates of cells for each datum, ``(C, N)``: log-mass, integral, and the log of what may hide between nodes.

    ``rough_mass``, a logarithm, and ``rough_moment`` are their last Legendre coefficients. If halves have nearly the
    same, there is a jump or a kink, at which two resolutions may agree by chance.
    """

    log_mass: Tensor
    moment: Tensor
    potential: Tensor
    rough_mass: Tensor
    rough_moment: Tensor

    def take(self, index: Tensor) -> "_Estimates":
        return _Estimates(*(_pick(part, index) for part in self))

    def of_parents(self, count: int) -> "_Estimates":
        """Join the estimates of the children of each of ``count`` cells."""
        mass, moment, potential, rough_mass, rough_moment = (part.unflatten(0, (-1, count)) for part in self)
        rough = rough_mass.logsumexp(0), rough_moment.sum(0)
        return _Estimates(mass.logsumexp(0), moment.sum(0), potential.amax(0), *rough)


class _Refinement:
    """The cells that were found fine enough, and their sums: ``log_mass`` and ``moment``, ``(N,)`` each."""

    def __init__(self, integrand: Integrand, tolerance: float, box: Box):
        self.integrand, self.tolerance, self.dims, self.nodes = integrand, tolerance, box.low.shape[-1], 0
        self.blocks: list[tuple[Cells, Tensor]] = []
        self.log_mass = box.low.new_full((integrand.num_data,), -torch.inf)
        self.moment: Tensor | None = None
        self.edge = torch.zeros_like(self.log_mass)

    def add(self, cells: Cells, hull: Box) -> None:
        """Refine cells and add them. ``edge`` becomes the share of mass, or the integral, at the edge of the hull."""
        self._edge_mass, self._edge_moment = torch.full_like(self.edge, -torch.inf), torch.zeros_like(self.edge)
        found = self._estimate(cells)
        needed = self._matters(found, self._total(found.log_mass))
        self._accept(cells, found, ~needed, hull)
        for depth in count():
            if not needed.any():
                break
            index = self._index(cells, needed)
            parents, coarse, needed = cells.take(index), found.take(index), _pick(needed, index)
            cells = parents.split()
            found = self._estimate(cells)
            fine = found.of_parents(len(needed))
            total = self._total(fine.log_mass.masked_fill(~needed, -torch.inf))
            splits = self._disagree(coarse, fine, needed, total, depth < _DEPTH)
            copies = len(found.log_mass) // len(needed)
            accepted, splits = (each.repeat(copies, 1) for each in (needed & ~splits, splits))
            needed = splits & self._matters(found, total)
            self._accept(cells, found, accepted | (splits & ~needed), hull)
        share = (self._edge_mass - self.log_mass).exp().nan_to_num(0.0)
        self.edge = torch.maximum(share, self._edge_moment)

    def _total(self, log_mass: Tensor) -> Tensor:
        return torch.logaddexp(self.log_mass, log_mass.logsumexp(0))

    def _matters(self, found: _Estimates, total: Tensor) -> Tensor:
        least = math.log(self.tolerance) - 5
        return (found.potential - total > least) | (found.moment.abs() > self.tolerance / 1000)

    def _disagree(self, coarse: _Estimates, fine: _Estimates, needed: Tensor, total: Tensor, may_hide: bool) -> Tensor:
        """Whether a cell is to be halved again for a datum, since its integral and that of its halves differ."""
        before, after = ((each.log_mass - total).exp() for each in (coarse, fine))
        digits = self.integrand.rounding * (1 + total.abs())  # the density is about as large as its integral
        rough = (fine.rough_mass - total).exp().masked_fill(fine.rough_mass < coarse.rough_mass - math.log(4), 0.0)
        error = torch.maximum((after - before).abs(), rough) - digits * after
        rough = fine.rough_moment.masked_fill(fine.rough_moment < coarse.rough_moment / 3, 0.0)
        moved = torch.maximum((fine.moment - coarse.moment).abs(), rough)
        moved = moved - self.integrand.rounding * fine.moment.abs()
        error = torch.maximum(error, moved).clamp(min=0).masked_fill(~needed, 0.0).nan_to_num(torch.inf)
        hidden = needed & (fine.potential > torch.maximum(total + math.log(self.tolerance) - 5, fine.log_mass + 6))
        hidden = hidden & may_hide
        agrees = (error.sum(0) <= self.tolerance) & ~hidden.any(0)
        splits = needed & ~agrees & (hidden | (error > 0.1 * self.tolerance / needed.sum(0).clamp(min=1)))
        if self.nodes > MAX_NODES[self.dims] and splits.any():
            worst = int(error.sum(0).argmax())
            gap = float(error[:, worst].sum())
            raise QuadratureError(
                f"quadrature did not converge: with {self.nodes} nodes and half as many in each dimension, the "
                f"integral of datum {{}} differs by {gap:.3g} nats, more than the tolerance of {self.tolerance:.3g}",
                worst,
            )
        return splits

    def _index(self, cells: Cells, needed: Tensor) -> Tensor:
        """Which cells to refine, ``(C,)`` for all data; or ``(C', N)``, some for each, where that is less work."""
        union, most = int(needed.any(1).sum()), int(needed.sum(0).max())
        is_shared = cells.low.shape[1] == 1
        if is_shared and (needed.shape[1] == 1 or (union <= 8 * most and self.nodes < _SHARED_NODES)):
            return needed.any(1)
        if is_shared:
            self.nodes = 0  # those of each datum count from here
        return (~needed).byte().argsort(dim=0, stable=True)[:most]

    def _estimate(self, cells: Cells) -> _Estimates:
        """Apply the rule to cells, ``_ORDER`` nodes along each axis."""
        per_cell = _ORDER**self.dims
        self.nodes += per_cell * len(cells.low)
        parts = []
        # A model runs once for points that all data share, and the work for each of them is small.
        size = self.integrand.chunk * (_SHARED_CHUNK if cells.low.shape[1] == 1 else 1)
        for part in cells.chunks(size // per_cell):
            points, log_weights = part.nodes()
            log_density, function = self.integrand(points.flatten(0, 1))
            log_density = _valid(log_density.double()).unflatten(0, (per_cell, -1))
            terms = log_density + log_weights
            grid = log_density.unflatten(0, (_ORDER,) * self.dims)
            height = (log_density + _neighbour_gaps(grid)).amax(0)
            log_volume = part.width.log().sum(-1)
            top = log_density.amax(0).nan_to_num(neginf=0.0)
            rough_mass = _last_coefficients((log_density - top).exp(), self.dims).log() + top + log_volume
            moment = rough_moment = torch.zeros_like(height)
            if function is not None:
                values = function.double().unflatten(0, (per_cell, -1))
                values = torch.where(terms > -torch.inf, (log_density + log_volume).exp() * values, 0.0)
                moment = (log_weights - log_volume).exp().mul(values).sum(0)
                rough_moment = _last_coefficients(values, self.dims)
                self.moment = torch.zeros_like(self.log_mass) if self.moment is None else self.moment
            parts.append(_Estimates(terms.logsumexp(0), moment, height + log_volume, rough_mass, rough_moment))
        return _Estimates(*map(torch.cat, zip(*parts, strict=True)))

    def _accept(self, cells: Cells, found: _Estimates, accepted: Tensor, hull: Box) -> None:
        if not accepted.any():
            return
        log_mass = found.log_mass.masked_fill(~accepted, -torch.inf)
        self.log_mass = self._total(log_mass)
        at_edge = (cells.low <= hull.low + 1e-6 * cells.width) | (
            cells.low + cells.width >= hull.high - 1e-6 * cells.width
        )
        at_edge = at_edge.any(-1) & accepted
        edge_mass = log_mass.masked_fill(~at_edge, -torch.inf).logsumexp(0)
        self._edge_mass = torch.logaddexp(self._edge_mass, edge_mass)
        if self.moment is not None:
            self.moment = self.moment + torch.where(accepted, found.moment, 0.0).sum(0)
            self._edge_moment = self._edge_moment + torch.where(at_edge, found.moment.abs(), 0.0).sum(0)
        kept = accepted.any(1)
        self.blocks.append((cells.take(kept), log_mass[kept]))

    def extrapolate(self, shells: list[Tensor]) -> None:
        """Add what lies outside of the last shell, by the ratio of the last shells; raise if that is infinite."""
        datum, share = int(self.edge.argmax()), float(self.edge.max())
        if self.moment is None:
            where = "at the edge of the box of datum {}"
            raise QuadratureError(f"quadrature did not converge: {share:.3g} of the mass is {where}", datum)
        third, second, last = (shell.abs() for shell in shells[-3:])
        ratio = last / second
        tail = last * ratio / (1 - ratio)
        error = last * (ratio - second / third).abs() / (1 - ratio) ** 2
        heavy = (self.edge > self.tolerance / 8) & ~((ratio < 0.98) & (error <= self.tolerance))
        if heavy.any():
            raise QuadratureError(
                "quadrature did not converge: the expectation under q(z | x) of datum {} is infinite, or depends on "
                "tails that are too heavy for quadrature; use a guide with lighter tails, such as a Student-t with "
                "more degrees of freedom",
                int(heavy.byte().argmax()),
            )
        far = self.edge > self.tolerance / 8
        self.moment = self.moment + torch.where(far, tail * shells[-1].sign(), 0.0)


def _valid(log_density: Tensor) -> Tensor:
    if log_density.isnan().any():
        datum = int(log_density.isnan().any(0).byte().argmax())
        raise QuadratureError("quadrature did not converge: the density of datum {} is NaN at some z", datum)
    return log_density


def _neighbour_gaps(grid: Tensor) -> Tensor:
    """The largest difference of a node's log-density to its neighbours, summed over axes: ``(8^d, C, N)``.

    A peak narrower than the distance of two nodes may lie between them. If it is normal, its height above a node is
    bounded by the difference to the neighbouring node.
    """
    dims, total = grid.dim() - 2, torch.zeros_like(grid)
    for axis in range(dims):
        gap = grid.diff(dim=axis).abs().nan_to_num(nan=0.0, posinf=0.0)
        edge = torch.zeros_like(grid.narrow(axis, 0, 1))
        total += torch.maximum(torch.cat([edge, gap], axis), torch.cat([gap, edge], axis))
    return total.flatten(0, dims - 1)


def _last_coefficients(values: Tensor, dims: int) -> Tensor:
    """The size of the last two Legendre coefficients along each axis, of values at the nodes ``(8^d, C, N)``."""
    weight, last = (part.to(values.device) for part in _projection())
    grid, total = values.unflatten(0, (_ORDER,) * dims), torch.zeros_like(values[0])
    for axis in range(dims):
        lines = torch.tensordot(last, grid.movedim(axis, 0), 1)  # (2, ..., C, N)
        total += (torch.tensordot(lines, weight, ([1], [0])) if dims == 2 else lines).abs().sum(0)
    return total / 4


def _first_cells(hull: Box, is_shared: bool) -> Cells:
    """Cells that fill a hull and resolve each of its parts, those of all data if these are not many more."""
    own = _bisect(hull, 4 * MAX_NODES[hull.low.shape[-1]] // _ORDER ** hull.low.shape[-1])
    if own is None:
        raise QuadratureError("quadrature did not converge: the components of a distribution have too many scales")
    shared = None if is_shared else _bisect(hull.union(), 4 * len(own.low))
    return own if shared is None else shared


def _bisect(hull: Box, limit: int) -> Cells | None:
    """Halve a hull until no cell is larger than the parts that it overlaps, by their number of panels."""
    dims = hull.low.shape[-1]
    cells = _tensor_product([hull.low, hull.middle, hull.high], list(product((0, 1), repeat=dims)))
    low, high = hull.parts
    largest = 1.001 * (high - low) / _PANELS[dims]
    done = []
    while len(cells.low):
        start, width = cells.low[:, None], cells.width[:, None]
        overlaps = ((start < high) & (start + width > low)).all(-1, keepdim=True)
        splits = (overlaps & (width > largest)).flatten(1, 2).any(1)  # (C, d): a strip is halved across alone
        done.append(cells.take(~splits.any(1)))
        halves = [cells.take(splits.any(1) & (splits.byte().argmax(1) == axis)).halve(axis) for axis in range(dims)]
        cells = _join(halves)
        if sum(len(part.low) for part in done) + len(cells.low) > limit:
            return None
    return _join(done)


def _shell(inner: Box, outer: Box) -> Cells:
    """Cells between a hull and a wider one."""
    places = [places for places in product(range(4), repeat=inner.low.shape[-1]) if {0, 3} & set(places)]
    return _tensor_product([outer.low, inner.low, inner.middle, inner.high, outer.high], places)


def _tensor_product(edges: list[Tensor], places: list[tuple[int, ...]]) -> Cells:
    """The cells between edges ``(B, d)``, by which interval is that of each axis."""
    ends = torch.stack(edges)
    axes, index = (torch.tensor(each, device=ends.device) for each in (range(ends.shape[-1]), places))
    low, high = (ends[index + shift, :, axes].movedim(-1, 1) for shift in (0, 1))  # (C, B, d)
    return Cells(low, high - low)


def _join(parts: list[Cells]) -> Cells:
    return Cells(*map(torch.cat, zip(*parts, strict=True)))


def _split_where_rough(integrand: Integrand, cells: Cells) -> Cells:
    """Halve cells around points at which a few data show more than the nodes do: narrow bumps, kinks, jumps.

    A bump of a decoder is one for every datum. In a cell, the values at many points are compared with the polynomial
    through its nodes.
    """
    dims = cells.low.shape[-1]
    size = _SCANNED[dims]
    if (found := integrand.few_rows(4 // dims)) is None:
        return cells
    few, rows = found
    inside, done = cells, []
    shown = cells if cells.low.shape[1] == 1 else Cells(*(each[:, rows] for each in cells))
    flags = torch.cat([_rough(few, part, size) for part in shown.chunks(few.chunk // size**dims)], -1)
    while flags.shape[0] > _ORDER and flags.any():
        hit, half = flags.flatten(0, -2).any(0), flags.shape[0] // 2
        done.append(inside.take(~hit))
        inside, flags = inside.take(hit).split(), flags[..., hit]
        sides = product((slice(half), slice(half, None)), repeat=dims)
        flags = torch.cat([flags[side] for side in sides], -1)
    return _join([*done, inside])


def _rough(few: Integrand, cells: Cells, size: int) -> Tensor:
    """Which of ``size`` points along each axis of cells are far from the polynomial, ``(size, ..., C)``."""
    dims, flags = cells.low.shape[-1], torch.zeros(1, dtype=torch.bool, device=cells.low.device)
    position, to_points = (part.to(cells.low.device) for part in _scan(dims, size))
    points = cells.low + position[:, None, None] * cells.width
    for at_nodes, at_points in zip(few(cells.nodes()[0].flatten(0, 1)), few(points.flatten(0, 1)), strict=True):
        if at_nodes is not None and at_points is not None:
            known, seen = (part.double().unflatten(0, (-1, len(cells.low))) for part in (at_nodes, at_points))
            gap = (seen - torch.einsum("sn,nc...->sc...", to_points, known)).abs()
            scale = (seen.amax(0) - seen.amin(0)).nan_to_num(nan=0.0, posinf=0.0)
            flags = flags | (gap.nan_to_num(nan=0.0, posinf=0.0) > 1 + 0.02 * scale).any(-1)
    return flags.unflatten(0, (size,) * dims)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """Return values ``(C, B, ...)`` at numbers or a mask ``(C,)``, or at numbers for each datum ``(C', N)``."""
    if index.dim() == 1:
        return values[index]
    if values.shape[1] == 1 and index.shape[1] > 1:
        return values[:, 0][index]
    return values.gather(0, index if values.dim() == 2 else index[..., None].expand(-1, -1, values.shape[-1]))


@cache
def _panel() -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(_ORDER)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


@cache
def _projection() -> tuple[Tensor, Tensor]:
    """The weights of the nodes, and the matrix from values at them to the last two Legendre coefficients."""
    position, weight = _panel()
    orders = np.arange(_ORDER - 2, _ORDER)
    polynomials = torch.from_numpy(np.polynomial.legendre.legvander(2 * position.numpy() - 1, _ORDER - 1)[:, orders].T)
    return weight, torch.from_numpy(2.0 * orders + 1)[:, None] * weight * polynomials


@cache
def _rule(dims: int) -> tuple[Tensor, Tensor]:
    """The nodes ``(8^d, d)`` and weights of the unit cell."""
    position, weight = _panel()
    return _grid(position, dims), _grid(weight, dims).prod(-1)


@cache
def _node_cells(dims: int) -> tuple[Tensor, Tensor]:
    """Start and width of the cell of each node: those of Gauss-Legendre tile the unit cell, with one node in each."""
    _, weight = _panel()
    return _grid(weight.cumsum(0) - weight, dims), _grid(weight, dims)


@cache
def _scan(dims: int, size: int) -> tuple[Tensor, Tensor]:
    """Equally spaced points ``(size^d, d)`` of the unit cell, and the matrix from values at nodes to those there."""
    points = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) / size
    known, wanted = (np.polynomial.legendre.legvander(2 * x.numpy() - 1, _ORDER - 1) for x in (_panel()[0], points))
    matrix = torch.from_numpy(wanted @ np.linalg.inv(known))
    return _grid(points, dims), reduce(torch.kron, [matrix] * dims)


def _grid(values: Tensor, dims: int) -> Tensor:
    return torch.stack(torch.meshgrid(*[values] * dims, indexing="ij"), -1).reshape(-1, dims)
