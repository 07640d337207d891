"""Normalizing flows as Pyro distributions: invertible maps of standard normal noise, built with zuko.

zuko is an optional extra, ``pip install 'pyro-vae[flows]'``, and is imported when the first flow is built.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyro_vae.distributions.base import Parametric, ScoresDraws
from pyro_vae.distributions.extent import Extent

__all__ = ["KINDS", "Flow", "autoregressive", "import_zuko"]

KINDS = ("affine", "spline")
"""Kinds of autoregressive steps: the map of one variable, given the previous ones."""

_BINS = 8
_REACH = 8.5  # standard deviations: all but e^-36 of a normal of two dimensions


def autoregressive(features: int, context: int, kind: str, transforms: int, hidden: Sequence[int]) -> nn.Module:
    r"""Masked autoregressive steps, :math:`y_d = \tau(x_d;\ h(x_{<d}, c))`, each in the reverse order of the last.

    They are initialised to the identity. Called with a context ``(*, context)``, or ``None`` if that is 0, the module
    returns a transform of ``(*, features)``: forward in one pass, inverse in one pass per feature. Raises an
    ImportError if zuko is not installed.

    Args:
        features: number of variables.
        context: size of c.
        kind: of :math:`\tau`: ``"affine"``, or ``"spline"``, rational-quadratic on [-5, 5] and the identity elsewhere.
        transforms: number of steps.
        hidden: sizes of the layers of h, a masked network.

    >>> steps = autoregressive(features=2, context=0, kind="spline", transforms=2, hidden=[8])
    >>> steps(None)(torch.tensor([0.5, -1.0]))
    tensor([ 0.5000, -1.0000], grad_fn=<WhereBackward0>)
    """
    zuko = import_zuko()
    univariate: dict[str, Any] = {}
    if kind == "spline":
        shapes = [(_BINS,), (_BINS,), (_BINS - 1,)]
        univariate = {"univariate": partial(zuko.transforms.MonotonicRQSTransform, slope=1e-3), "shapes": shapes}
    # SiLU makes the density of affine steps smooth, so that quadrature needs few nodes.
    network = {"hidden_features": tuple(hidden), "activation": nn.SiLU}
    steps = []
    for number in range(transforms):
        order = torch.arange(features) if number % 2 == 0 else torch.arange(features).flip(0)
        step = zuko.flows.MaskedAutoregressiveTransform(features, context, order=order, **univariate, **network)
        # One variable without a context has free parameters in place of a network.
        for parameter in (step.hyper[-1] if hasattr(step, "hyper") else step).parameters():
            nn.init.zeros_(parameter)
        steps.append(step)
    return zuko.lazy.LazyComposedTransform(*steps)


def import_zuko() -> Any:
    """Import zuko, and restore torch's validation of distributions, which the import switches off globally."""
    validate = bool(Distribution._validate_args)
    try:
        import zuko
    except ModuleNotFoundError as error:
        if error.name != "zuko":
            raise
        raise ImportError("flows need zuko, which is not installed: `pip install 'pyro-vae[flows]'`") from error
    finally:
        Distribution.set_default_validate_args(validate)
    return zuko


def _with_log_slope(transform: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The image of x and the log-determinant, in one pass for the transforms of zuko."""
    if hasattr(transform, "call_and_ladj"):
        return transform.call_and_ladj(x)
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)


class Flow(ScoresDraws, Parametric):
    r"""A normalizing flow, :math:`z = b + s \odot f(\epsilon)` with :math:`\epsilon \sim N(0, I)` and f invertible,

    .. math:: \log q(z) = \log N(\epsilon; 0, I) - \sum_d \log s_d
              - \log \left|\det \frac{\partial f}{\partial \epsilon}\right|,
              \qquad \epsilon = f^{-1}\big((z - b) / s\big).

    Where f is fast and its inverse slow, a draw should be scored when it is made. With ``scores_draws``, ``log_prob``
    of a draw returns that stored score (:class:`pyro_vae.distributions.base.ScoresDraws`), and f is not inverted, which
    would also lose precision where f is strongly curved.

    Args:
        transform: f, from ``(*, D)`` to ``(*, D)``, with D the number of variables.
        shift: b, ``(*batch, *event)``.
        scale: s, positive, of a shape that broadcasts with that of ``shift``.
        event_dim: number of dimensions on the right that are one event.
        scores_draws: whether a draw is scored as it is made.

    Source: Papamakarios, Nalisnick, Rezende, Mohamed and Lakshminarayanan 2021, "Normalizing flows for probabilistic
    modeling and inference", equation 7.

    >>> from torch.distributions import AffineTransform
    >>> q = Flow(AffineTransform(1.0, 3.0, event_dim=1), shift=torch.zeros(5, 2), scale=torch.ones(2))
    >>> q.batch_shape, q.event_shape, q.support
    (torch.Size([5]), torch.Size([2]), IndependentConstraint(Real(), 1))
    >>> q.log_prob(torch.ones(2))[0]
    tensor(-4.0351)
    """

    arg_constraints = {"shift": constraints.real, "scale": constraints.positive}
    has_rsample = True

    def __init__(
        self,
        transform: Transform,
        shift: Tensor,
        scale: Tensor,
        event_dim: int = 1,
        scores_draws: bool = False,
        validate_args: bool | None = None,
    ):
        self.transform = transform
        self.shift, self.scale = torch.broadcast_tensors(shift, scale)
        self.scores_draws = scores_draws
        cut = self.shift.dim() - event_dim
        super().__init__(self.shift.shape[:cut], self.shift.shape[cut:], validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def rsample(self, sample_shape=()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.shift.dtype, device=self.shift.device).reshape(*self._rows(shape), -1)
        if not self.scores_draws:
            return self.shift + self.scale * self.transform(noise).reshape(shape)
        value, log_density = self.push(noise)
        self._store_score(value, log_density)
        return value

    def push(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Map noise, ``(*, *batch, D)``, to values ``(*, *batch, *event)``, with their log-densities ``(*, *batch)``.

        >>> from torch.distributions import AffineTransform
        >>> q = Flow(AffineTransform(1.0, 3.0, event_dim=1), shift=torch.zeros(2), scale=torch.ones(2))
        >>> q.push(torch.tensor([0.0, -1.0]))
        (tensor([ 1., -2.]), tensor(-4.5351))
        """
        standardized, log_slope = _with_log_slope(self.transform, noise)
        value = self.shift + self.scale * standardized.reshape(noise.shape[:-1] + self.event_shape)
        return value, self._log_density(noise, log_slope)

    def _score(self, value: Tensor) -> Tensor:
        standardized = (value - self.shift) / self.scale
        rows = standardized.reshape(*self._rows(standardized.shape), -1)
        noise, log_slope = _with_log_slope(self.transform.inv, rows)
        return self._log_density(noise, -log_slope)

    def _log_density(self, noise: Tensor, log_slope: Tensor) -> Tensor:
        log_scale = self.scale.log().flatten(len(self.batch_shape)).sum(-1)
        log_normal = -0.5 * (noise**2 + math.log(2 * math.pi)).sum(-1)
        return log_normal - log_slope - log_scale

    def _rows(self, shape: torch.Size) -> torch.Size:
        return shape[: len(shape) - len(self.event_shape)]

    def extent(self) -> Extent:
        """The box around the images of noise out to 8.5 standard deviations, for at most two variables."""
        size = self.event_shape.numel()
        radii = torch.linspace(0, _REACH, 18, dtype=self.shift.dtype, device=self.shift.device)
        if size == 1:
            noise = torch.cat([radii, -radii])[:, None]
        else:
            angles = torch.linspace(0, 2 * math.pi, 65, dtype=radii.dtype, device=radii.device)[:-1]
            noise = (radii[:, None, None] * torch.stack([angles.cos(), angles.sin()], dim=-1)).flatten(0, 1)
        images = self.transform(noise.reshape(-1, *[1] * len(self.batch_shape), size))
        points = self.shift + self.scale * images.reshape(*images.shape[:-1], *self.event_shape)
        return Extent(points.amin(0), points[0], points.amax(0))
