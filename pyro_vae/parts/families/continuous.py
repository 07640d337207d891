"""Families of independent continuous variables: on the real line, of positive numbers, and in a box."""

import warnings

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae import distributions
from pyro_vae._utils.typing import Shape
from pyro_vae._utils.validation import number, numbers
from pyro_vae.distributions import tabular
from pyro_vae.parts.families.base import Family

__all__ = ["Gamma", "Laplace", "LogNormal", "LogitNormal", "Normal", "StudentT", "Uniform"]


class _LocationScale(Family):
    """Families with a location for each dimension, and a scale of one of four kinds above a floor."""

    _options: tuple[str, ...] = ("scale",)
    fitting_guide = "DiagonalNormal"

    def __init__(self, event_shape: Shape, scale: str | float = "network", min_scale: float = 0.0):
        super().__init__(event_shape)
        self.scale = scale
        self.min_scale = number(min_scale, "min_scale", least=0)
        self.num_raw += self._declare("scale", scale)

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


class Normal(_LocationScale):
    r"""Independent normals, :math:`x_d \sim N(\mu_d, \sigma_d^2)`.

    The scale is one of four kinds:

    * ``"network"``: :math:`\sigma_d = e^{r_d} + m` from a raw output of its own, as the location;
    * ``"shared"``: one free parameter, :math:`\sigma = e^{s} + m`;
    * ``"per_dimension"``: a free parameter for each dimension;
    * a positive number: fixed.

    The floor ``min_scale`` :math:`m` bounds the likelihood where the data have a constant dimension. A warning is given
    where the floor binds (:math:`\sigma < 1.01 m`): the density then depends on the floor.

    >>> Normal(2, scale="shared")(torch.zeros(5, 2)).stddev[0]
    tensor([1., 1.], grad_fn=<SelectBackward0>)
    """

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return dist.Normal(*self._loc_and_scale(raw)).to_event(len(self.event_shape))


class Laplace(_LocationScale):
    r"""Independent Laplace variables, :math:`p(x_d) = e^{-|x_d - \mu_d| / b_d} / 2 b_d`, b as in :class:`Normal`.

    >>> Laplace(1, scale=1.0)(torch.zeros(1)).log_prob(torch.zeros(1))
    tensor(-0.6931)
    """

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return dist.Laplace(*self._loc_and_scale(raw)).to_event(len(self.event_shape))


class StudentT(_LocationScale):
    r"""Independent Student-t variables, of location :math:`\mu_d`, scale :math:`\sigma_d` and degrees of freedom
    :math:`\nu`: normals with outliers.

    The scale is as in :class:`Normal`; ``df`` is one of the same four kinds. Learned or from a network it is
    :math:`\nu = 2 + e^{s}`, above 2 so that mean and variance are finite. A fixed one may be any positive number.

    >>> StudentT(2, df=4.0, scale=1.0)(torch.zeros(5, 2)).variance[0]
    tensor([2., 2.])
    """

    _options = ("scale", "df")

    def __init__(
        self, event_shape: Shape, df: str | float = "shared", scale: str | float = "network", min_scale: float = 0.0
    ):
        super().__init__(event_shape, scale, min_scale)
        self.df = df
        self.num_raw += self._declare("df", df)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        df = self._declared("df", self.df, raw[..., -self.event_shape.numel() :], 2.0)
        return tabular.StudentT(df, *self._loc_and_scale(raw)).to_event(len(self.event_shape))


class LogNormal(_LocationScale):
    r"""Independent positive variables whose logarithm is normal, :math:`\log x_d \sim N(\mu_d, \sigma_d^2)`.

    The scale is as in :class:`Normal`.

    >>> LogNormal(1, scale=1.0)(torch.zeros(1)).mean
    tensor([1.6487])
    """

    fitting_guide = "LogNormal"

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return tabular.LogNormal(*self._loc_and_scale(raw)).to_event(len(self.event_shape))


class Gamma(Family):
    r"""Independent positive variables, :math:`p(x_d) \propto x_d^{a_d - 1} e^{-b_d x_d}`.

    The raw outputs are the logarithms of the concentrations a, then of the rates b, each bounded as in
    :func:`pyro_vae.distributions.tabular.log_of_bounded_exp`.

    >>> Gamma(1)(torch.tensor([3.0, 2.0]).log()).mean
    tensor([1.5000])
    """

    fitting_guide = "LogNormal"

    def __init__(self, event_shape: Shape):
        super().__init__(event_shape)
        self.num_raw *= 2

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        concentration, rate = (self._shaped(tabular.log_of_bounded_exp(part).exp()) for part in raw.chunk(2, dim=-1))
        return dist.Gamma(concentration, rate).to_event(len(self.event_shape))


class _Boxed(Family):
    """Families of variables in a box, whose corners are buffers of the event shape."""

    fitting_guide = "LogitNormal"
    low: Tensor
    high: Tensor

    def _set_box(self, low: float | Tensor, high: float | Tensor) -> None:
        for name, bound in (("low", low), ("high", high)):
            value = numbers(bound, name)
            if not value.isfinite().all():
                raise ValueError(f"`{name}` must be finite, got {value.tolist()}")
            try:
                self.register_buffer(name, value.expand(self.event_shape).clone())
            except RuntimeError as error:
                shape = tuple(self.event_shape)
                raise ValueError(f"`{name}` must expand to {shape}, got shape {tuple(value.shape)}") from error
        if not (self.low < self.high).all():
            raise ValueError(f"`low` must be below `high`, got {self.low.tolist()} and {self.high.tolist()}")

    def extra_repr(self) -> str:
        bounds = {name: getattr(self, name).unique().tolist() for name in ("low", "high")}
        spelled = [f"{name}={found[0] if len(found) == 1 else found}" for name, found in bounds.items()]
        return ", ".join([super().extra_repr(), *spelled])


class Uniform(_Boxed):
    r"""The flat density on a box, :math:`p(x) = \prod_d \frac{1}{b_d - a_d}`, without raw outputs.

    Args:
        event_shape: size or shape of x.
        low: lower corner a, a number or a tensor that expands to the event shape.
        high: upper corner b.

    >>> Uniform(2, -1.0, 1.0)(torch.zeros(0)).log_prob(torch.zeros(2))
    tensor(-1.3863)
    """

    def __init__(self, event_shape: Shape, low: float | Tensor = 0.0, high: float | Tensor = 1.0):
        super().__init__(event_shape)
        self.num_raw = 0
        self._set_box(low, high)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        flat = dist.Uniform(self.low, self.high).to_event(len(self.event_shape))
        return flat.expand(raw.shape[:-1]) if raw.dim() > 1 else flat


class LogitNormal(_Boxed, _LocationScale):
    r"""Independent variables in a box whose logit is normal, :class:`pyro_vae.distributions.LogitNormal`.

    The box is as in :class:`Uniform`, the scale of the logit as in :class:`Normal`.

    >>> LogitNormal(1, scale=1.0)(torch.zeros(1)).log_prob(torch.tensor([0.5]))
    tensor(0.4674)
    """

    def __init__(
        self,
        event_shape: Shape,
        low: float | Tensor = 0.0,
        high: float | Tensor = 1.0,
        scale: str | float = "network",
        min_scale: float = 0.0,
    ):
        super().__init__(event_shape, scale, min_scale)
        self._set_box(low, high)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        loc, scale = self._loc_and_scale(raw)
        return distributions.LogitNormal(loc, scale, self.low, self.high).to_event(len(self.event_shape))
