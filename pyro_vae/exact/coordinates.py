"""Unconstrained coordinates of a continuous latent, in which quadrature integrates over it."""

import math

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from scipy.stats import t as student_t
from torch import Tensor

from pyro_vae.distributions.flow import Flow
from pyro_vae.distributions.properties import base_distribution, base_support
from pyro_vae.distributions.relaxed import (
    AdditiveLogRatioTransform,
    LogitRelaxedBernoulli,
    LogRelaxedOneHotCategorical,
    log_simplex,
)
from pyro_vae.exact.quadrature import Box

__all__ = ["LatentCoordinates"]


class LatentCoordinates:
    """Coordinates ``(*, d)``, with d at most 2, of a continuous latent site.

    Args:
        name: of the site.
        fn: its distribution in the model.
        dtype: of the values.

    Raises:
        ValueError: if the latent is not on the real line or the log-simplex, or d is larger.
    """

    def __init__(self, name: str, fn: dist.TorchDistribution, dtype: torch.dtype):
        self.name = name
        self.dtype = dtype
        self.event_shape = fn.event_shape
        self.on_simplex = isinstance(base_distribution(fn), LogRelaxedOneHotCategorical)
        if base_support(fn) not in (constraints.real, log_simplex):
            kind = type(base_distribution(fn)).__name__
            raise ValueError(
                "`model` must have a latent on the real line or the log-simplex for quadrature, got a "
                f"{kind} on {fn.support} at {name!r}; write the latent on the real line and transform it after the site"
            )
        *variables, last = self.event_shape if self.event_shape else (1,)
        self.coordinate_shape = (*variables, last - 1) if self.on_simplex else tuple(self.event_shape)
        self.dims = math.prod(self.coordinate_shape)
        if self.dims > 2:
            raise ValueError(
                f"`model` must have a continuous latent of at most 2 dimensions for quadrature, got {self.dims} at "
                f"{name!r}; discrete latents are enumerated, and linear Gaussian models are solved in closed form"
            )

    def to_site(self, points: Tensor) -> Tensor:
        """Map coordinates ``(*, d)`` to values of the site ``(*, *event)``."""
        shaped = points.reshape(*points.shape[:-1], *self.coordinate_shape)
        return (AdditiveLogRatioTransform()(shaped) if self.on_simplex else shaped).to(self.dtype)

    def to_points(self, value: Tensor) -> Tensor:
        """Map values of the site ``(*, *event)`` to coordinates ``(*, d)``."""
        points = AdditiveLogRatioTransform().inv(value) if self.on_simplex else value
        return points.reshape(*value.shape[: value.dim() - len(self.event_shape)], self.dims)

    def integration_box(self, fn: dist.TorchDistribution, num_data: int) -> Box:
        """Return a box for each datum that contains all but e^-36 of the mass of a distribution, 1e-7 of a Student-t.

        Its break point is where a relaxed value is rounded to the other state.
        """
        base = base_distribution(fn)
        if isinstance(base, LogRelaxedOneHotCategorical):
            temperature = base.temperature[..., None]
            loc, spread = (base.logits[..., :-1] - base.logits[..., -1:]) / temperature, 36 / temperature
            middle = torch.zeros_like(loc)
        elif isinstance(base, LogitRelaxedBernoulli):
            loc, spread = base.logits / base.temperature, 36 / base.temperature
            middle = torch.zeros_like(loc)
        elif isinstance(base, dist.Laplace):
            loc, spread, middle = base.loc, 36 * base.scale, base.loc
        elif isinstance(base, dist.StudentT):
            tails = student_t.isf(5e-8, base.df.double().cpu().numpy())  # all but 1e-7 of the mass
            loc, spread, middle = base.loc, torch.as_tensor(tails).to(base.scale) * base.scale, base.loc
        elif isinstance(base, Flow):
            low, middle, high = base.extent()
            loc, spread = (low + high) / 2, (high - low) / 2
        else:
            try:
                loc, spread = fn.mean, 9 * fn.variance.sqrt()
            except NotImplementedError as error:
                raise ValueError(
                    f"model: site {self.name!r} has a {type(base).__name__}, whose mean and variance are not known, so "
                    "that quadrature does not know where to look"
                ) from error
            middle = loc
            if not (loc.isfinite() & spread.isfinite()).all():
                raise ValueError(
                    f"model: site {self.name!r} has a {type(base).__name__} without a finite mean and variance, so "
                    "that quadrature does not know where to look"
                )
        shape = (num_data, self.dims)
        loc, spread, middle = (
            tensor.expand(num_data, *self.coordinate_shape).reshape(shape).double()
            for tensor in (loc, spread.expand_as(loc), middle)
        )
        low, high = loc - spread, loc + spread
        return Box(low, middle.clamp(low, high), high).shared()
