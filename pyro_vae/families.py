"""Families: maps from raw, unconstrained outputs to a Pyro distribution, each written once.

A family knows nothing of where its raw outputs come from. :class:`pyro_vae.parts.Unconditional` feeds it free
parameters (a prior), :class:`pyro_vae.parts.Conditional` a network (a guide, a likelihood, a conditional prior).
"""

import warnings
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_vae import distributions, flows
from pyro_vae.checks import positive, positive_int

__all__ = [
    "Bernoulli",
    "ContinuousBernoulli",
    "Family",
    "Flow",
    "Normal",
    "OneHotCategorical",
    "Relaxed",
    "RelaxedBernoulli",
    "RelaxedOneHotCategorical",
    "as_shape",
]


def as_shape(size: int | Sequence[int], name: str) -> torch.Size:
    """An event shape from ``3`` or ``(3, 2)``.

    >>> as_shape(3, "latent"), as_shape((20, 10), "latent")
    (torch.Size([3]), torch.Size([20, 10]))
    """
    shape = tuple(size) if isinstance(size, Sequence) else (size,)
    if not shape or not all(type(extent) is int and extent > 0 for extent in shape):
        raise ValueError(f"{name}: got {size!r}; accepted is a positive integer or a tuple of them")
    return torch.Size(shape)


class Family(nn.Module):
    """A map from raw outputs ``(*, num_raw)`` to a distribution of batch shape ``(*)`` and event shape ``event_shape``.

    Subclasses set ``num_raw`` and define ``forward(raw)``.
    """

    num_raw: int

    def __init__(self, event_shape: int | Sequence[int]):
        super().__init__()
        self.event_shape = as_shape(event_shape, "event_shape")

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"event_shape={tuple(self.event_shape)}"


class Normal(Family):
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

    scales = ("network", "shared", "per_dimension")
    fixed_scale: Tensor

    def __init__(self, event_shape: int | Sequence[int], scale: str | float = "network", min_scale: float = 0.0):
        super().__init__(event_shape)
        self.scale = scale
        self.min_scale = min_scale if min_scale == 0 else positive(min_scale, "min_scale")
        size = self.event_shape.numel()
        self.num_raw = 2 * size if scale == "network" else size
        if scale == "shared":
            self.log_scale = nn.Parameter(torch.zeros(()))
        elif scale == "per_dimension":
            self.log_scale = nn.Parameter(torch.zeros(self.event_shape))
        elif isinstance(scale, str) and scale != "network":
            raise ValueError(f"scale: got {scale!r}; accepted are {', '.join(map(repr, self.scales))} or a number")
        elif not isinstance(scale, str):
            self.register_buffer("fixed_scale", torch.tensor(positive(scale, "scale")))

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        size = self.event_shape.numel()
        loc = raw[..., :size].reshape(*raw.shape[:-1], *self.event_shape)
        return dist.Normal(loc, self._scale(raw[..., size:])).to_event(len(self.event_shape))

    def _scale(self, raw: Tensor) -> Tensor:
        if not isinstance(self.scale, str):
            return self.fixed_scale
        log_scale = raw.reshape(*raw.shape[:-1], *self.event_shape) if self.scale == "network" else self.log_scale
        scale = log_scale.exp() + self.min_scale
        if self.min_scale and torch.distributions.Distribution._validate_args:
            self._warn_if_binding(scale)
        return scale

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


class Flow(Family):
    r"""A normalizing flow :math:`z = b + s \odot f(\epsilon; h)` of noise :math:`\epsilon \sim N(0, I)`.

    f is made of masked autoregressive steps, whose networks are parameters of the family. The raw outputs are the shift
    b, the logarithm of the scale s, and a context h that every step reads. Before training the steps are the identity,
    and the flow is the independent normal :math:`N(b, s^2)`.

    A masked network is evaluated in one pass, and inverted in as many as there are variables. As it stands, the one
    pass is from value to noise, and densities are fast (a masked autoregressive flow). ``inverse`` turns it round:
    draws are fast, and so are the densities of draws (an inverse autoregressive flow).

    Args:
        event_shape: size or shape of z.
        kind: of step: ``"affine"``, or ``"spline"``. Affine steps of a single variable make a normal of it.
        transforms: number of steps.
        hidden: sizes of the hidden layers of each step's masked network.
        context: size of h.
        inverse: whether draws are fast, and not densities.

    Raises:
        ImportError: if zuko is not installed: ``pip install 'pyro-vae[flows]'``.

    Source: Papamakarios, Pavlakou and Murray 2017, "Masked autoregressive flow"; Kingma et al. 2016, "Improved
    variational inference with inverse autoregressive flow"; Durkan, Bekasov, Murray and Papamakarios 2019, "Neural
    spline flows".

    >>> family = Flow(2, kind="spline", transforms=2, hidden=[8], context=4, inverse=True)
    >>> family(torch.randn(5, family.num_raw)).rsample().shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        kind: str = "affine",
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
        context: int = 0,
        inverse: bool = False,
    ):
        super().__init__(event_shape)
        if kind not in flows.KINDS:
            raise ValueError(f"kind: got {kind!r}; accepted are {', '.join(map(repr, flows.KINDS))}")
        if type(context) is not int or context < 0:
            raise ValueError(f"context: got {context!r}; accepted is an integer, 0 or more")
        self.kind = kind
        self.transforms = positive_int(transforms, "transforms")
        self.hidden = tuple(as_shape(hidden, "hidden"))
        self.context = context
        self.inverse = inverse
        size = self.event_shape.numel()
        self.num_raw = 2 * size + context
        self.steps = flows.autoregressive(size, context, kind, transforms, self.hidden)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        size = self.event_shape.numel()
        shift, log_scale = (
            part.reshape(*raw.shape[:-1], *self.event_shape) for part in (raw[..., :size], raw[..., size : 2 * size])
        )
        forward = self.steps(raw[..., 2 * size :] if self.context else None)
        transform = forward if self.inverse else forward.inv
        return flows.Flow(transform, shift, log_scale.exp(), len(self.event_shape), scores_draws=self.inverse)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, kind={self.kind!r}, transforms={self.transforms}, hidden={self.hidden}, "
            f"context={self.context}, inverse={self.inverse}"
        )

    def __repr__(self) -> str:
        """Without the steps, whose own text draws random numbers."""
        return f"{type(self).__name__}({self.extra_repr()})"


class _Binary(Family):
    """Families of independent 0/1 variables with one logit each."""

    def __init__(self, event_shape: int | Sequence[int]):
        super().__init__(event_shape)
        self.num_raw = self.event_shape.numel()

    def logits(self, raw: Tensor) -> Tensor:
        return raw.reshape(*raw.shape[:-1], *self.event_shape)


class Bernoulli(_Binary):
    """Independent Bernoulli variables, enumerable as one site.

    >>> Bernoulli(3)(torch.zeros(5, 3)).enumerate_support().shape
    torch.Size([8, 5, 3])
    """

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return distributions.Product(distributions.Bernoulli(logits=self.logits(raw)), len(self.event_shape))


class SoftTargetBernoulli(_Binary):
    """The cross-entropy of targets in [0, 1]: no likelihood, see :class:`distributions.SoftTargetBernoulli`.

    >>> distributions.is_normalized(SoftTargetBernoulli(3)(torch.zeros(3)))
    False
    """

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return distributions.SoftTargetBernoulli(logits=self.logits(raw)).to_event(len(self.event_shape))


class ContinuousBernoulli(_Binary):
    """Independent continuous Bernoulli variables on [0, 1].

    >>> ContinuousBernoulli(2)(torch.zeros(2)).mean
    tensor([0.5000, 0.5000])
    """

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return distributions.ContinuousBernoulli(self.logits(raw)).to_event(len(self.event_shape))


class Relaxed(Family):
    """Families with a temperature, held in a 0-dim buffer that a schedule or a checkpoint can change."""

    temperature: Tensor

    def soft(self, value: Tensor) -> Tensor:
        """The relaxed variable, from a value of its site."""
        raise NotImplementedError

    def hard(self, value: Tensor) -> Tensor:
        """The discrete variable, from a value of the site; its law is the twin's."""
        raise NotImplementedError

    def discrete(self) -> Family:
        """The family of the discrete twin, which takes the same raw outputs."""
        raise NotImplementedError

    def _set_temperature(self, temperature: float) -> None:
        self.register_buffer("temperature", torch.tensor(positive(temperature, "temperature")))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature.item():.4g}"


class RelaxedBernoulli(Relaxed, _Binary):
    r"""Independent relaxed Bernoulli variables, each as its logit :math:`y`.

    >>> family = RelaxedBernoulli(1, temperature=0.5)
    >>> family.soft(torch.tensor([-1.0])), family.hard(torch.tensor([-1.0]))
    (tensor([0.2689]), tensor([0.]))
    """

    def __init__(self, event_shape: int | Sequence[int], temperature: float):
        super().__init__(event_shape)
        self._set_temperature(temperature)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        relaxed = distributions.LogitRelaxedBernoulli(self.temperature, logits=self.logits(raw))
        return relaxed.to_event(len(self.event_shape))

    def soft(self, value: Tensor) -> Tensor:
        return value.sigmoid()

    def hard(self, value: Tensor) -> Tensor:
        return (value > 0).to(value.dtype)

    def discrete(self) -> Bernoulli:
        return Bernoulli(self.event_shape)


class _OneHot(Family):
    """Families of n independent one-hot variables of k classes, event shape ``(n, k)`` with k logits each."""

    def __init__(self, event_shape: Sequence[int]):
        super().__init__(event_shape)
        if len(self.event_shape) != 2 or self.event_shape[1] < 2:
            raise ValueError(
                f"event_shape: got {tuple(self.event_shape)}; accepted is (n, k), n one-hot variables of k >= 2 classes"
            )
        self.num_raw = self.event_shape.numel()

    def logits(self, raw: Tensor) -> Tensor:
        return raw.reshape(*raw.shape[:-1], *self.event_shape)


class OneHotCategorical(_OneHot):
    """Independent one-hot variables, enumerable as one site of k^n states.

    >>> OneHotCategorical((2, 3))(torch.zeros(6)).enumerate_support().shape
    torch.Size([9, 2, 3])
    """

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return distributions.Product(dist.OneHotCategorical(logits=self.logits(raw)), 1)


class RelaxedOneHotCategorical(Relaxed, _OneHot):
    """Independent Gumbel-softmax variables, each as its logarithm on the log-simplex.

    >>> family = RelaxedOneHotCategorical((1, 3), temperature=0.5)
    >>> family.hard(torch.tensor([[0.2, 0.7, 0.1]]).log())
    tensor([[0., 1., 0.]])
    """

    def __init__(self, event_shape: Sequence[int], temperature: float):
        super().__init__(event_shape)
        self._set_temperature(temperature)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return distributions.LogRelaxedOneHotCategorical(self.temperature, logits=self.logits(raw)).to_event(1)

    def soft(self, value: Tensor) -> Tensor:
        return value.exp()

    def hard(self, value: Tensor) -> Tensor:
        return one_hot(value.argmax(-1), value.shape[-1]).to(value.dtype)

    def discrete(self) -> OneHotCategorical:
        return OneHotCategorical(self.event_shape)
