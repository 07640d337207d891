"""Integrals over one or two dimensions that know their own error.

Composite Gauss-Legendre rules on a box, refined by doubling the panels until two resolutions agree. Each axis breaks
at a point of its own, where an integrand may jump: a relaxed Bernoulli read hard jumps where its logit is 0.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Box", "QuadratureError", "QuadratureRule", "log_integral", "refine_to_tolerance"]

_ORDER = 8


_FIRST_PANELS = {1: 32, 2: 4}


SHARED_NODES = {1: 2**16, 2: 2**16}
"""How many nodes, by dimensions, are tried on one box around all data: a decoder runs once for all of them."""


ZOOM_NODES = {2: 2**12}
"""How many are tried on boxes of each datum's own before these are drawn closer, in two dimensions."""


MAX_NODES = {1: 2**16, 2: 2**18}
"""How many are tried at last."""


class QuadratureError(ArithmeticError):
    """The integral did not settle: two resolutions differ by more than the tolerance at the finest that is tried."""


@cache
def _panel() -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(_ORDER)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


@dataclass(frozen=True)
class Box:
    """The corners and break points of boxes, one for each of a batch: ``low <= middle <= high``, each ``(B, d)``."""

    low: Tensor
    middle: Tensor
    high: Tensor

    def shared(self) -> "Box":
        """One box, ``(1, d)``, if all of the batch are equal; else these."""
        corners = torch.stack([self.low, self.middle, self.high])
        return self.union() if (corners == corners[:, :1]).all() else self

    def union(self) -> "Box":
        """One box around all of the batch, ``(1, d)``, broken at the first one's break point."""
        low, high = self.low.amin(0, keepdim=True), self.high.amax(0, keepdim=True)
        return Box(low, self.middle[:1].clamp(low, high), high)

    def join(self, other: "Box") -> "Box":
        """Boxes around those of both, datum by datum, broken where these are."""
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return Box(low, self.middle.clamp(low, high), high)

    def expanded(self) -> "Box":
        """Twice the width on either side of the break."""
        return Box(2 * self.low - self.middle, self.middle, 2 * self.high - self.middle)


class QuadratureRule:
    """Nodes, log-weights and cells of a tensor-product rule with this many panels for each axis of a box."""

    def __init__(self, box: Box, panels: int):
        position, weight = (tensor.to(box.low.device) for tensor in _panel())
        half = panels // 2
        starts = torch.arange(half, dtype=torch.float64, device=box.low.device)
        position = ((starts[:, None] + position) / half).flatten()
        weight = (weight / half).repeat(half)
        start = weight.cumsum(0) - weight
        # Quadrature cells: those of Gauss-Legendre tile the interval and hold one node each.
        below, above = box.middle - box.low, box.high - box.middle
        self.nodes = torch.cat([_span(box.low, below, position), _span(box.middle, above, position)])
        self.widths = torch.cat([_span(0 * below, below, weight), _span(0 * above, above, weight)])
        self.starts = torch.cat([_span(box.low, below, start), _span(box.middle, above, start)])
        self.box = box
        self.dims = box.low.shape[-1]
        self.per_axis = len(self.nodes)

    def __len__(self) -> int:
        return self.per_axis**self.dims

    def chunks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Nodes ``(C, B, d)``, their log-weights ``(C, B)`` and whether they lie in an outermost panel ``(C, 1)``."""
        stop = len(self) if stop is None else stop
        for first in range(start, stop, size):
            index = self._index(torch.arange(first, min(first + size, stop), device=self.nodes.device))
            log_weights = self._take(self.widths, index).log().sum(-1)
            edge = ((index < _ORDER) | (index >= self.per_axis - _ORDER)).any(-1, keepdim=True)
            yield self._take(self.nodes, index), log_weights, edge

    def draw(self, flat: Tensor) -> Tensor:
        """A uniform draw from the cell of each node number, ``(*, B)``, as points ``(*, B, d)``."""
        index = self._index(flat)
        batch = torch.arange(self.nodes.shape[1], device=flat.device)
        axes = torch.arange(self.dims, device=flat.device)
        pick = (index, batch[:, None].expand(index.shape[-2:]) if len(batch) > 1 else torch.zeros_like(index), axes)
        return self.starts[pick] + torch.rand(index.shape, dtype=torch.float64, device=flat.device) * self.widths[pick]

    def _index(self, flat: Tensor) -> Tensor:
        return torch.stack([flat // self.per_axis**axis % self.per_axis for axis in range(self.dims)], dim=-1)

    def _take(self, values: Tensor, index: Tensor) -> Tensor:
        return torch.stack([values[index[:, axis], :, axis] for axis in range(self.dims)], dim=-1)


def _span(start: Tensor, length: Tensor, position: Tensor) -> Tensor:
    return start + position[:, None, None] * length


def refine_to_tolerance(
    estimate: Callable[[int], Tensor], dims: int, tolerance: float, max_nodes: int, rounding: float = 0.0
) -> tuple[Tensor, int]:
    """The estimate at the first number of panels that agrees with half as many, and that number.

    They agree if they differ by no more than ``tolerance``, plus ``rounding`` times the estimate: an integrand in
    float32 cannot do better.

    Raises:
        QuadratureError: if none within ``max_nodes`` nodes does, with the discrepancy.
    """
    panels = _FIRST_PANELS[dims]
    previous = estimate(panels)
    while (2 * panels * _ORDER) ** dims <= max_nodes:
        panels *= 2
        current = estimate(panels)
        # Where both are -inf there is no mass at either resolution.
        gap = torch.where(current == previous, 0.0, (current - previous).abs())
        if (gap <= tolerance + rounding * current.abs()).all():
            return current, panels
        previous = current
    worst = int(gap.nan_to_num(float("inf")).argmax())
    raise QuadratureError(
        f"quadrature did not settle: with {(panels * _ORDER) ** dims} nodes and half as many in each dimension, the "
        f"integral of datum {worst} differs by {gap[worst]:.3g} nats, and {tolerance:.3g} are asked for"
    )


def log_integral(
    log_integrand: Callable[[Tensor], Tensor], box: Box, tolerance: float, chunk: int
) -> tuple[Tensor, QuadratureRule]:
    """The logarithm of an integral over all space.

    The box that is given is for all data. It grows until its edges do not matter. Where in two dimensions a rule on it
    does not settle, each datum gets a box of its own around all that the rule leaves possible, drawn closer twice
    before the last, finest rule.

    Args:
        log_integrand: from points ``(C, B, d)`` to ``(C, N)``, with B = 1 or N.
        box: where to start.
        tolerance: to which two resolutions must agree, in nats.
        chunk: how many points to evaluate at once.

    Returns:
        The logarithm, ``(N,)`` in float64, and the rule that gave it.

    Raises:
        QuadratureError: if it does not settle, with the discrepancy.
    """
    dims = box.low.shape[-1]
    limits = [SHARED_NODES[1]] if dims == 1 else [SHARED_NODES[2], ZOOM_NODES[2], ZOOM_NODES[2], MAX_NODES[2]]
    for _ in range(12):
        integral = _LogIntegral(log_integrand, box, chunk)
        failure: QuadratureError | None = None
        try:
            value, panels = refine_to_tolerance(integral, dims, tolerance, limits[0])
        except QuadratureError as error:
            failure = error
        if (integral.edge_share > tolerance).any():
            box = box.expanded()
        elif failure is None:
            return value, QuadratureRule(box, panels)
        elif len(limits) > 1:
            box = integral.zoomed(math.isqrt(limits.pop(0)) // _ORDER)
        else:
            raise failure
    raise QuadratureError(
        f"quadrature did not settle: {float(integral.edge_share.max()):.3g} of the mass lies at the edge of the box of "
        f"datum {int(integral.edge_share.argmax())}"
    )


class _LogIntegral:
    """Estimates of the logarithm of an integral over boxes, by number of panels."""

    def __init__(self, log_integrand: Callable[[Tensor], Tensor], box: Box, chunk: int):
        self.log_integrand = log_integrand
        self.box = box
        self.chunk = chunk
        self.edge_share = torch.zeros(())

    def terms(self, panels: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for nodes, log_weights, edge in QuadratureRule(self.box, panels).chunks(self.chunk):
            yield nodes, self.log_integrand(nodes).double() + log_weights, edge

    def __call__(self, panels: int) -> Tensor:
        totals, edges = [], []
        for _, terms, edge in self.terms(panels):
            totals.append(terms.logsumexp(0))
            edges.append(terms.masked_fill(~edge, -torch.inf).logsumexp(0))
        total = torch.stack(totals).logsumexp(0)
        self.edge_share = (torch.stack(edges).logsumexp(0) - total).exp()
        return total

    def zoomed(self, panels: int) -> Box:
        """For each datum of two dimensions, a box around the nodes within e^-30 of its largest term, and a margin.

        A peak narrower than the nodes' distance may stand beside a node. Of a normal one, the drop from the node to its
        neighbour bounds how high: so a node counts by its term plus that drop.
        """
        top = torch.stack([terms.amax(0) for _, terms, _ in self.terms(panels)]).amax(0)
        low = torch.full((*top.shape, 2), torch.inf, dtype=torch.float64, device=top.device)
        high = -low
        for nodes, terms, drop in self._rows_with_drops(panels):
            counts = (terms + drop > top - 30)[..., None]
            low = torch.minimum(low, nodes.masked_fill(~counts, torch.inf).amin(0))
            high = torch.maximum(high, nodes.masked_fill(~counts, -torch.inf).amax(0))
        widest = 2 * torch.maximum(self.box.middle - self.box.low, self.box.high - self.box.middle) / panels
        margin = 2 * widest / _ORDER
        low, high = low - margin, high + margin
        return Box(low, self.box.middle.clamp(low, high), high)

    def _rows_with_drops(self, panels: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows of nodes with their terms, and the largest difference of each to its neighbours on either axis."""
        before: tuple[Tensor, Tensor, Tensor] | None = None
        for nodes, terms in self._rows(panels):
            along = (terms[1:] - terms[:-1]).abs().nan_to_num()
            drop = torch.maximum(pad(along, (0, 0, 1, 0)), pad(along, (0, 0, 0, 1)))
            if before is not None:
                across = (terms - before[1]).abs().nan_to_num()
                drop = torch.maximum(drop, across)
                yield before[0], before[1], torch.maximum(before[2], across)
            before = nodes, terms, drop
        if before is not None:
            yield before

    def _rows(self, panels: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Nodes and terms of each row of the grid in turn."""
        rule = QuadratureRule(self.box, panels)
        for first in range(0, len(rule), rule.per_axis):
            chunks = list(rule.chunks(self.chunk, first, first + rule.per_axis))
            terms = [self.log_integrand(nodes).double() + log_weights for nodes, log_weights, _ in chunks]
            yield torch.cat([nodes for nodes, _, _ in chunks]), torch.cat(terms)
