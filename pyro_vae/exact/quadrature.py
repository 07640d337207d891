"""Quadrature over one or two dimensions that estimates its own error.

Composite Gauss-Legendre rules on a box. The number of panels doubles until two resolutions agree. Each axis has a break
point, where an integrand may jump: a relaxed Bernoulli that is rounded to 0 or 1 jumps where its logit is 0.
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

SHARED_NODES = {1: 2**16, 2: 2**16}
"""Largest number of nodes, by dimensions, on one box around all data, for which a decoder runs once."""
MAX_NODES = {1: 2**16, 2: 2**18}
"""Largest number of nodes on a box of each datum."""

_ZOOM_NODES = 2**12  # on a box of each datum in two dimensions, before the box is narrowed
_ORDER = 8
_FIRST_PANELS = {1: 32, 2: 4}


class QuadratureError(ArithmeticError):
    """The quadrature did not converge: the two finest resolutions differ by more than the tolerance."""


@dataclass(frozen=True)
class Box:
    """The corners and break points of boxes, one for each of a batch: ``low <= middle <= high``, each ``(B, d)``."""

    low: Tensor
    middle: Tensor
    high: Tensor

    def shared(self) -> "Box":
        """Return one box, ``(1, d)``, if all of the batch are equal, else all of them."""
        corners = torch.stack([self.low, self.middle, self.high])
        return self.union() if (corners == corners[:, :1]).all() else self

    def union(self) -> "Box":
        """Return one box around the batch, ``(1, d)``, with the break point of the first one."""
        low, high = self.low.amin(0, keepdim=True), self.high.amax(0, keepdim=True)
        return Box(low, self.middle[:1].clamp(low, high), high)

    def join(self, other: "Box") -> "Box":
        """Return boxes around those of both, datum by datum, with the break points of ``self``."""
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return Box(low, self.middle.clamp(low, high), high)

    def expanded(self) -> "Box":
        """Return boxes of twice the width on either side of the break point."""
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
        # The cells of Gauss-Legendre tile the interval, and each contains one node.
        below, above = box.middle - box.low, box.high - box.middle
        self.nodes = torch.cat([_span(box.low, below, position), _span(box.middle, above, position)])
        self.widths = torch.cat([_span(0 * below, below, weight), _span(0 * above, above, weight)])
        self.starts = torch.cat([_span(box.low, below, start), _span(box.middle, above, start)])
        self.box, self.dims, self.per_axis = box, box.low.shape[-1], len(self.nodes)

    def __len__(self) -> int:
        return self.per_axis**self.dims

    def chunks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Iterate over nodes ``(C, B, d)``, log-weights ``(C, B)``, whether they are in an outer panel ``(C, 1)``."""
        stop = len(self) if stop is None else stop
        for first in range(start, stop, size):
            index = self._index(torch.arange(first, min(first + size, stop), device=self.nodes.device))
            log_weights = self._take(self.widths, index).log().sum(-1)
            edge = ((index < _ORDER) | (index >= self.per_axis - _ORDER)).any(-1, keepdim=True)
            yield self._take(self.nodes, index), log_weights, edge

    def draw(self, flat: Tensor) -> Tensor:
        """Draw uniformly from the cell of each node number ``(*, B)``, as points ``(*, B, d)``."""
        index = self._index(flat)
        batch = torch.arange(self.nodes.shape[1], device=flat.device)
        axes = torch.arange(self.dims, device=flat.device)
        pick = (index, batch[:, None].expand(index.shape[-2:]) if len(batch) > 1 else torch.zeros_like(index), axes)
        return self.starts[pick] + torch.rand(index.shape, dtype=torch.float64, device=flat.device) * self.widths[pick]

    def _index(self, flat: Tensor) -> Tensor:
        return torch.stack([flat // self.per_axis**axis % self.per_axis for axis in range(self.dims)], dim=-1)

    def _take(self, values: Tensor, index: Tensor) -> Tensor:
        return torch.stack([values[index[:, axis], :, axis] for axis in range(self.dims)], dim=-1)


@cache
def _panel() -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(_ORDER)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


def _span(start: Tensor, length: Tensor, position: Tensor) -> Tensor:
    return start + position[:, None, None] * length


def refine_to_tolerance(
    estimate: Callable[[int], Tensor], dims: int, tolerance: float, max_nodes: int, rounding: float = 0.0
) -> tuple[Tensor, int]:
    """Double the panels until two estimates agree; return the last estimate and its number of panels.

    They agree if they differ by at most ``tolerance``, plus ``rounding`` times the estimate, for integrands in float32.
    If no two agree within ``max_nodes`` nodes, a QuadratureError names the discrepancy.
    """
    panels = _FIRST_PANELS[dims]
    previous = estimate(panels)
    while (2 * panels * _ORDER) ** dims <= max_nodes:
        panels *= 2
        current = estimate(panels)
        # Both are -inf if there is no mass at either resolution.
        gap = torch.where(current == previous, 0.0, (current - previous).abs())
        if (gap <= tolerance + rounding * current.abs()).all():
            return current, panels
        previous = current
    worst = int(gap.nan_to_num(float("inf")).argmax())
    raise QuadratureError(
        f"quadrature did not converge: with {(panels * _ORDER) ** dims} nodes and half as many in each dimension, the "
        f"integral of datum {worst} differs by {gap[worst]:.3g} nats, more than the tolerance of {tolerance:.3g}"
    )


def log_integral(
    log_integrand: Callable[[Tensor], Tensor], box: Box, tolerance: float, chunk: int
) -> tuple[Tensor, QuadratureRule]:
    """Compute the logarithm of an integral over all space.

    The first box is one for all data. It grows until the mass at its edges is negligible. If a rule on it does not
    converge in two dimensions, each datum gets its own box, which contains all mass that the rule can have missed. That
    box is narrowed twice before the last, finest rule.

    Args:
        log_integrand: from points ``(C, B, d)`` to ``(C, N)``, with B = 1 or N.
        box: the first box.
        tolerance: largest difference between two resolutions, in nats, or a QuadratureError is raised.
        chunk: number of points to evaluate at once.

    Returns:
        The logarithm, ``(N,)`` in float64, and the last rule.
    """
    dims = box.low.shape[-1]
    limits = [SHARED_NODES[1]] if dims == 1 else [SHARED_NODES[2], _ZOOM_NODES, _ZOOM_NODES, MAX_NODES[2]]
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
    share, datum = float(integral.edge_share.max()), int(integral.edge_share.argmax())
    where = f"at the edge of the box of datum {datum}"
    raise QuadratureError(f"quadrature did not converge: {share:.3g} of the mass is {where}")


class _LogIntegral:
    """Estimates of the logarithm of an integral over boxes, by number of panels."""

    def __init__(self, log_integrand: Callable[[Tensor], Tensor], box: Box, chunk: int):
        self.log_integrand, self.box, self.chunk = log_integrand, box, chunk
        self.edge_share = torch.zeros((), device="cpu")

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
        """Return a box for each datum in two dimensions: the nodes within e^-30 of its largest term, and a margin.

        A peak narrower than the distance of two nodes may lie between them. If it is normal, its height above a node is
        bounded by the difference to the neighbouring node, which is therefore added to the term of a node.
        """
        top = torch.stack([terms.amax(0) for _, terms, _ in self.terms(panels)]).amax(0)
        low = torch.full((*top.shape, 2), torch.inf, dtype=torch.float64, device=top.device)
        high = -low
        for nodes, terms, drop in self._rows_with_drops(panels):
            keep = (terms + drop > top - 30)[..., None]
            low = torch.minimum(low, nodes.masked_fill(~keep, torch.inf).amin(0))
            high = torch.maximum(high, nodes.masked_fill(~keep, -torch.inf).amax(0))
        widest = 2 * torch.maximum(self.box.middle - self.box.low, self.box.high - self.box.middle) / panels
        margin = 2 * widest / _ORDER
        low, high = low - margin, high + margin
        return Box(low, self.box.middle.clamp(low, high), high)

    def _rows_with_drops(self, panels: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Iterate over rows of nodes, their terms, and the largest difference to a neighbour on either axis."""
        before: tuple[Tensor, Tensor, Tensor] | None = None
        rule = QuadratureRule(self.box, panels)
        for first in range(0, len(rule), rule.per_axis):
            chunks = list(rule.chunks(self.chunk, first, first + rule.per_axis))
            nodes = torch.cat([part for part, _, _ in chunks])
            terms = torch.cat([self.log_integrand(part).double() + weights for part, weights, _ in chunks])
            along = (terms[1:] - terms[:-1]).abs().nan_to_num()
            drop = torch.maximum(pad(along, (0, 0, 1, 0)), pad(along, (0, 0, 0, 1)))
            if before is not None:
                across = (terms - before[1]).abs().nan_to_num()
                drop = torch.maximum(drop, across)
                yield before[0], before[1], torch.maximum(before[2], across)
            before = nodes, terms, drop
        if before is not None:
            yield before
