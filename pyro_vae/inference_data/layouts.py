"""The values of a site as an array: a dimension for each plate, then those of the event, and NaN where it is masked."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_vae._utils.traces import is_deterministic

__all__ = ["SiteLayout", "counted_cells", "vectorized_frames"]

Site = dict[str, Any]


class SiteLayout:
    """How the values of a site, ``(*batch, *event)``, are arranged in an array, ``(*plates, *event)``.

    A plate that a site does not lie in leaves a dimension of size 1 between others, which the array lacks. Dimensions
    of the batch that belong to no plate are those of the event. ``pyro.deterministic`` counts all dimensions as the
    event's by default; those of the plates around it, if it has them, are plates.

    Args:
        site: of a trace, in plates whose sizes are known.

    Attributes:
        plates: their sizes by name, from left to right.
        event: the sizes of the other dimensions.

    >>> import pyro
    >>> from pyro import poutine
    >>> def model():
    ...     with pyro.plate("people", 4, dim=-3), pyro.plate("days", 5, dim=-1):
    ...         return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    >>> layout = SiteLayout(poutine.trace(model).get_trace().nodes["z"])
    >>> layout.plates, layout.event, layout.arrange(model()).shape
    ({'people': 4, 'days': 5}, (2,), torch.Size([4, 5, 2]))
    """

    def __init__(self, site: Site):
        value = torch.as_tensor(site["value"])
        frames = vectorized_frames(site)
        sizes = {frame.dim: frame.size for frame in frames if frame.dim is not None}
        self._event_dim = _event_dim(site, value, sizes)
        batch = tuple(value.shape[: value.dim() - self._event_dim])
        if not is_deterministic(site):
            batch = tuple(torch.broadcast_shapes(batch, site["fn"].batch_shape))
        elif not _fits(batch, sizes):  # the same for all cells of the plates around it
            frames, sizes = [], {}
        depth = max(len(batch), -min(sizes, default=0))
        batch = (1,) * (depth - len(batch)) + batch
        self._shape = tuple(sizes.get(dim, batch[dim]) for dim in range(-depth, 0))
        others = [dim for dim in range(-depth, 0) if dim not in sizes and batch[dim] > 1]
        self._order = [depth + dim for dim in (*sizes, *others)]
        self.plates = {frame.name: frame.size for frame in frames}
        self.event = (*(batch[dim] for dim in others), *value.shape[value.dim() - self._event_dim :])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return (*self.plates.values(), *self.event)

    def arrange(self, value: Any) -> Tensor:
        """Return the values of the site in a run as ``(*plates, *event)``."""
        value = torch.as_tensor(value)
        event = tuple(value.shape[value.dim() - self._event_dim :])
        value = value.expand((*self._shape, *event))
        depth = len(self._shape)
        gone = [axis for axis in range(depth) if axis not in self._order]
        value = value.permute((*self._order, *range(depth, value.dim()), *gone))
        return value.reshape(value.shape[: value.dim() - len(gone)])

    def values(self, site: Site, missing: Tensor | None = None) -> Tensor:
        """Return the values of the site of another run, with NaN where it is masked; integers are floats then.

        Args:
            site: of the trace of that run.
            missing: where data are missing, and no mask is applied.
        """
        value, counted = torch.as_tensor(site["value"]), counted_cells(site)
        if counted is None:
            return self.arrange(value)
        if missing is not None:
            counted = counted | missing
        value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
        return self.arrange(torch.where(counted, value, torch.nan))


def vectorized_frames(site: Site) -> list[CondIndepStackFrame]:
    """The plates around a site that are dimensions of its batch, from left to right."""
    frames = [frame for frame in site["cond_indep_stack"] if frame.dim is not None]
    return sorted(frames, key=lambda frame: frame.dim or 0)


def counted_cells(site: Site) -> Tensor | None:
    """Where the values of a site count, broadcastable to them; ``None`` if it has no mask.

    Masks are those around the site, ``poutine.mask``, and those of its distribution, ``fn.mask(...)``.
    """
    fn, event_dim = site["fn"], site["fn"].event_dim
    found = [(site["mask"], event_dim)]
    while hasattr(fn, "base_dist") and not is_deterministic(site):
        if isinstance(fn, dist.MaskedDistribution):
            found.append((fn._mask, fn.event_dim))
        fn = fn.base_dist
    counted: Tensor | None = None
    for mask, dims in found:
        if mask is None or mask is True:
            continue
        mask = torch.as_tensor(mask, device=torch.as_tensor(site["value"]).device)
        mask = mask.reshape(mask.shape + (1,) * dims)
        counted = mask if counted is None else counted & mask
    return counted


def _event_dim(site: Site, value: Tensor, sizes: dict[Any, int]) -> int:
    """The number of dimensions of a value that are not those of a batch."""
    event_dim = min(site["fn"].event_dim, value.dim())
    if is_deterministic(site) and event_dim == value.dim():
        depth = -min(sizes, default=0)
        if _fits(value.shape[:depth], sizes) and depth <= value.dim():
            return value.dim() - depth
    return event_dim


def _fits(batch: tuple[int, ...], sizes: dict[Any, int]) -> bool:
    """Whether a batch has the dimensions of plates, and no others."""
    depth = -min(sizes, default=0)
    return tuple(batch) == tuple(sizes.get(dim, 1) for dim in range(-depth, 0))
