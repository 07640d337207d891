r"""A mixture of normals whose draws carry gradients to every parameter, also to the weights of the components."""

import math
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.special import ndtr

from pyro_vae._utils.validation import real_tensor
from pyro_vae.distributions.base import Parametric
from pyro_vae.distributions.extent import NORMAL_REACH, Extent, around_components

__all__ = ["MixtureOfNormals"]


class MixtureOfNormals(Parametric):
    r"""A mixture of K diagonal normals in D dimensions,

    .. math:: p(z) = \sum_k \pi_k \prod_d N(z_d;\ \mu_{kd}, \sigma_{kd}^2).

    Draws are reparameterised implicitly. The values of the conditional distribution functions
    :math:`F_d(z_d \mid z_{<d})` at a draw are uniform noise. A draw changes so that this noise stays constant,

    .. math:: \mathrm{d}z_d = -\frac{\mathrm{d}F_d(z_d \mid z_{<d})}{p(z_d \mid z_{<d})},

    one dimension after the other. Pyro's ``MixtureOfDiagNormals`` has pathwise draws too, but divides by zero where two
    components coincide, and does not take one dimension. This one takes any K and D.

    Where the logits need no gradient, a draw moves with the location and scale of its component alone, in one step for
    all dimensions: the probability of each component is then a constant.

    The gradient of the weights comes from draws between the components. Between components more than 8 scales apart
    there are none in practice: the gradient of an ELBO is unbiased, but zero in every run, and the weights stay.

    Args:
        logits: of the components, ``(*batch, K)``.
        loc, scale: ``(*batch, K, D)``, scales positive.

    Source: Figurnov, Mohamed and Mnih 2018, "Implicit reparameterization gradients", section 3 and appendix; Graves
    2016, "Stochastic backpropagation through mixture density distributions".

    >>> loc = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    >>> q = MixtureOfNormals(torch.zeros(2), loc, torch.ones(2, 2))
    >>> q.rsample((5,)).requires_grad, q.mean
    (True, tensor([0., 0.], grad_fn=<SumBackward1>))
    """

    arg_constraints = {
        "logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None):
        for name, value in (("logits", logits), ("loc", loc), ("scale", scale)):
            real_tensor(value, name, "a tensor")
        if loc.dim() < 2 or logits.shape[-1:] != loc.shape[-2:-1]:
            got = f"shapes {tuple(logits.shape)} and {tuple(loc.shape)}"
            raise ValueError(f"`logits` and `loc` must be (*batch, K) and (*batch, K, D), got {got}")
        loc, scale = torch.broadcast_tensors(loc, scale)
        self._components = loc, scale
        batch = torch.broadcast_shapes(logits.shape[:-1], loc.shape[:-2])
        self.logits = logits.expand(*batch, -1)
        self.loc, self.scale = (value.expand(*batch, *loc.shape[-2:]) for value in (loc, scale))
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if self._components[0].dim() == 2 and _products_are_precise(*self._components):
            each = _log_normals(value, *self._components)
        else:
            each = _log_normal(value[..., None, :], self.loc, self.scale).sum(-1)
        return (self.logits.log_softmax(-1) + each).logsumexp(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self._draw_of_component(sample_shape)

    def _draw_of_component(self, sample_shape: Any) -> Tensor:
        """Draw a component, and then from it, with the gradient of its location and scale."""
        shape = self._extended_shape(torch.Size(sample_shape))
        component = torch.distributions.Categorical(logits=self.logits.detach()).sample(torch.Size(sample_shape))
        index = component[..., None, None].expand(*shape[:-1], 1, shape[-1])
        loc, scale = (
            value.expand(*shape[:-1], *value.shape[-2:]).gather(-2, index).squeeze(-2)
            for value in (self.loc, self.scale)
        )
        return loc + scale * torch.randn_like(loc)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        if not (torch.is_grad_enabled() and self.logits.requires_grad):
            return self._draw_of_component(sample_shape)
        z = self.sample(sample_shape)
        log_weight = self.logits.log_softmax(-1)  # of each component, given the previous dimensions
        moving = []
        for dim in range(z.shape[-1]):
            loc, scale, fixed = self.loc[..., dim], self.scale[..., dim], z[..., dim : dim + 1]
            uniform = (log_weight.softmax(-1) * ndtr((fixed - loc) / scale)).sum(-1)
            with torch.no_grad():
                conditional = log_weight.log_softmax(-1) + _log_normal(fixed, loc, scale)
                density = conditional.logsumexp(-1).exp()
            current = z[..., dim] - (uniform - uniform.detach()) / density
            log_weight = log_weight + _log_normal(current[..., None], loc, scale)
            moving.append(current)
        return torch.stack(moving, -1)

    @property
    def mean(self) -> Tensor:
        return (self.logits.softmax(-1)[..., None] * self.loc).sum(-2)

    @property
    def variance(self) -> Tensor:
        weights = self.logits.softmax(-1)[..., None]
        return (weights * (self.scale**2 + (self.loc - self.mean[..., None, :]) ** 2)).sum(-2)

    def extent(self) -> Extent:
        """The box around those of the components."""
        return around_components(Extent.around(self.loc, NORMAL_REACH * self.scale), len(self.batch_shape))


def _log_normal(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return -0.5 * ((value - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def _products_are_precise(loc: Tensor, scale: Tensor) -> bool:
    """Whether rounding moves the log-densities of :func:`_log_normals` by less than a few 1e-8 nats."""
    with torch.no_grad():
        distance = (loc.double() - loc.double().mean(0)).abs().amax(0) / scale.double().amin(0)
        # The products are as large as the squared distance, in scales; their sum may be near zero.
        precise = distance.square().sum() * torch.finfo(torch.float64).eps < 1e-8
    try:
        return bool(precise)
    except RuntimeError:  # torch.vmap runs several mixtures at once
        return False


def _log_normals(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The log-density of K components that are shared by all values, ``(*, K)``, without a tensor of ``(*, K, D)``."""
    # The squared distances are matrix products, in float64 and around the centre, since they cancel.
    centre = loc.detach().double().mean(0)
    z, centred, precision = value.double() - centre, loc.double() - centre, scale.double() ** -2
    squared = z**2 @ precision.T - 2 * z @ (centred * precision).T + (centred**2 * precision).sum(-1)
    log_norm = scale.double().log().sum(-1) + 0.5 * loc.shape[-1] * math.log(2 * math.pi)
    return (-0.5 * squared - log_norm).to(value.dtype)
