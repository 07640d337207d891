"""Coordinates of a continuous latent for quadrature: from its support to an unconstrained space."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae.distributions import properties
from pyro_vae.distributions.extent import find_extent
from pyro_vae.exact.quadrature import Box
from pyro_vae.model_guide import outside_support

__all__ = ["LatentCoordinates", "check_support"]


class LatentCoordinates:
    """Unconstrained coordinates ``(*, d)``, with d at most 2, of a continuous latent site.

    They are those of ``biject_to``: x itself on the reals, log x on the positive numbers, a logit on an interval. An
    integral over them has the Jacobian of the map, :meth:`log_jacobian`.
    """

    def __init__(self, name: str, fn: dist.TorchDistribution, dtype: torch.dtype):
        self.name, self.fn, self.dtype = name, fn, dtype
        try:
            self.transform = biject_to(properties.base_support(fn))
        except NotImplementedError as error:
            must = "have a latent whose support has unconstrained coordinates for quadrature"
            got = f"a {_kind(fn)} on {fn.support} at {name!r}"
            hint = "write the latent on the real line and transform it after the site"
            raise ValueError(f"`model` must {must}, got {got}; {hint}") from error
        self.is_elementwise = self.transform.domain.event_dim == 0
        self.bounds = properties.support_bounds(fn)
        self.is_bounded = any(isinstance(bound, Tensor) or math.isfinite(bound) for bound in self.bounds)
        self.coordinate_shape = tuple(self.transform.inverse_shape(fn.event_shape))
        self.dims = math.prod(self.coordinate_shape)
        if self.dims > 2:
            must = f"have a continuous latent of at most 2 dimensions for quadrature, got {self.dims} at {name!r}"
            hint = "discrete latents are enumerated, and linear Gaussian models are solved in closed form"
            raise ValueError(f"`model` must {must}; {hint}")

    def to_site(self, points: Tensor) -> Tensor:
        """Values of the site at coordinates ``(*, d)``, strictly inside its support."""
        value = self._once(self.transform(self._shaped(points)), points)
        if self.is_bounded:  # rounding to the dtype of the parameters may put a value on a bound of infinite density
            value = properties.clamp_inside(value, *self.bounds, dtype=_parameter_dtype(self.fn) or self.dtype)
        return value.to(self.dtype)

    def log_jacobian(self, points: Tensor) -> Tensor:
        """The logarithm of the volume of the site's values for that of coordinates ``(*, d)``, as ``(*)``."""
        shaped = self._shaped(points)
        each = self._once(self.transform.log_abs_det_jacobian(shaped, self.transform(shaped)), points)
        return each.flatten(points.dim() - 1).sum(-1) if each.dim() >= points.dim() else each

    def _shaped(self, points: Tensor) -> Tensor:
        return points.reshape(*points.shape[:-1], *self.coordinate_shape)

    def _once(self, values: Tensor, points: Tensor) -> Tensor:
        """The values of one row for all, where bounds that were expanded to all data have repeated them."""
        row = points.dim() - 2
        if row < 0 or values.shape[row] == points.shape[row]:
            return values
        first = values.narrow(row, 0, 1)
        return first if (values == first).all() else values

    def to_points(self, value: Tensor) -> Tensor:
        """Coordinates ``(*, d)`` of values of the site ``(*, *event)``."""
        return self.transform.inv(value).reshape(*value.shape[: value.dim() - self.fn.event_dim], self.dims)

    def integration_box(self, fn: dist.TorchDistribution, num_data: int) -> Box:
        """A box for each datum with nearly all mass of p(z) or q(z | x); a ValueError if its extent is not known."""
        try:
            corners = find_extent(fn)
        except NotImplementedError as error:
            raise ValueError(
                f"`model` must have distributions of known extent for quadrature, got a {_kind(fn)} at {self.name!r}: "
                f"{error}. Write the latent on the real line and transform it after the site, or register the extent "
                "with `pyro_vae.distributions.find_extent.register`"
            ) from error
        check_support(self.name, fn, self.fn)
        boxes = [corners._replace(parts=()), *corners.parts]
        ends = [[self._corner(corner, num_data) for corner in torch.broadcast_tensors(*box[:3])] for box in boxes]
        low, middle, high = ends[0]
        parts = [torch.stack([end[place] for end in ends[1:] or ends]) for place in (0, 2)]
        return Box(low, middle.clamp(low, high), high, torch.stack(parts)).shared()

    def _corner(self, corner: Tensor, num_data: int) -> Tensor:
        return corner.expand(num_data, *self.coordinate_shape).reshape(num_data, self.dims).double()


def check_support(name: str, drawn: dist.TorchDistribution, fn: dist.TorchDistribution) -> None:
    """Raise if the distribution of a latent in the guide has another support than that in the model, ``fn``."""
    if not properties.same_support(drawn, fn):
        raise outside_support(name, drawn, fn)


def _parameter_dtype(fn: dist.TorchDistribution) -> torch.dtype | None:
    variables = properties.without_independent(fn)
    values = (getattr(variables, name) for name in getattr(variables, "arg_constraints", {}))
    return next((value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)


def _kind(fn: dist.TorchDistribution) -> str:
    return type(properties.without_independent(fn)).__name__
