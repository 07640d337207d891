"""Families of real-valued variables."""

import warnings
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae._utils.validation import number
from pyro_vae.distributions import tabular
from pyro_vae.parts.families.base import Family

__all__ = ["Laplace", "Normal", "StudentT"]


class _LocationScale(Family):
    """Families with a location for each dimension, and a scale of one of four kinds above a floor."""

    def __init__(self, event_shape: int | Sequence[int], scale: str | float, min_scale: float):
        super().__init__(event_shape)
        self.scale = scale
        self.min_scale = number(min_scale, "min_scale", least=0)
        self.num_raw = self.event_shape.numel() + self._declare("scale", scale)

    def _loc_and_scale(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        size = self.event_shape.numel()
        scale = self._declared("scale", self.scale, raw[..., size : 2 * size], self.min_scale)
        if isinstance(self.scale, str) and self.min_scale and torch.distributions.Distribution._validate_args:
            self._warn_if_binding(scale)
        return self._shaped(raw[..., :size]), scale

    def _warn_if_binding(self, scale: Tensor) -> None:
        binding = scale < 1.01 * self.min_scale
        if binding.any():
            where = binding.reshape(-1, *self.event_shape).any(0).sum() if binding.dim() else "all"
            warnings.warn(
                f"min_scale = {self.min_scale} binds in {where} of {self.event_shape.numel()} dimensions: the data are "
                "(almost) constant there, and log p(x) depends on min_scale. Drop those dimensions, or add noise.",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale!r}"


class Normal(_LocationScale):
    r"""Independent normals, :math:`x_d \sim N(\mu_d, \sigma_d^2)`.

    The scale is one of four kinds:

    * ``"network"``: :math:`\sigma_d = e^{r_d} + m` from a raw output of its own, as the location is;
    * ``"shared"``: one free parameter, :math:`\sigma = e^{s} + m`;
    * ``"per_dimension"``: a free parameter for each dimension;
    * a positive number: fixed.

    The floor ``min_scale`` :math:`m` keeps a likelihood from growing without bound where the data have a constant
    dimension; its binding (:math:`\sigma < 1.01 m`) is warned about, since the density then says more about the floor
    than about the data.

    >>> Normal(2, scale="shared")(torch.zeros(5, 2)).stddev[0]
    tensor([1., 1.], grad_fn=<SelectBackward0>)
    """

    def __init__(self, event_shape: int | Sequence[int], scale: str | float = "network", min_scale: float = 0.0):
        super().__init__(event_shape, scale, min_scale)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return dist.Normal(*self._loc_and_scale(raw)).to_event(len(self.event_shape))


class Laplace(_LocationScale):
    r"""Independent Laplace variables, :math:`p(x_d) = e^{-|x_d - \mu_d| / b_d} / 2 b_d`, b as the scale of a normal.

    >>> Laplace(1, scale=1.0)(torch.zeros(1)).log_prob(torch.zeros(1))
    tensor(-0.6931)
    """

    def __init__(self, event_shape: int | Sequence[int], scale: str | float = "network", min_scale: float = 0.0):
        super().__init__(event_shape, scale, min_scale)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return dist.Laplace(*self._loc_and_scale(raw)).to_event(len(self.event_shape))


class StudentT(_LocationScale):
    r"""Independent Student-t variables, of location :math:`\mu_d`, scale :math:`\sigma_d` and degrees of freedom
    :math:`\nu`: normals with outliers.

    The scale is as in :class:`Normal`; ``df`` is one of the same four kinds. Learned or from a network it is
    :math:`\nu = 2 + e^{s}`, above 2 so that mean and variance are finite; a fixed one is any positive number.

    >>> StudentT(2, df=4.0, scale=1.0)(torch.zeros(5, 2)).variance[0]
    tensor([2., 2.])
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        df: str | float = "shared",
        scale: str | float = "network",
        min_scale: float = 0.0,
    ):
        super().__init__(event_shape, scale, min_scale)
        self.df = df
        self.num_raw += self._declare("df", df)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        df = self._declared("df", self.df, raw[..., -self.event_shape.numel() :], 2.0)
        return tabular.StudentT(df, *self._loc_and_scale(raw)).to_event(len(self.event_shape))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, df={self.df!r}"
