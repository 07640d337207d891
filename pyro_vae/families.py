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

from pyro_vae import distributions, recipes, tabular
from pyro_vae.checks import as_shape, kind_of, number, positive, positive_int

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "Family",
    "Laplace",
    "NegativeBinomial",
    "Normal",
    "OneHotCategorical",
    "Poisson",
    "Relaxed",
    "RelaxedBernoulli",
    "RelaxedOneHotCategorical",
    "StudentT",
]

_KINDS = ("network", "shared", "per_dimension")


class Family(recipes.Recorded, nn.Module):
    """A map from raw outputs ``(*, num_raw)`` to a distribution of batch shape ``(*)`` and event shape ``event_shape``.

    Subclasses set ``num_raw`` and define ``forward(raw)``.
    """

    num_raw: int

    def __init__(self, event_shape: int | Sequence[int]):
        super().__init__()
        self.event_shape = as_shape(event_shape, "event_shape")

    def __call__(self, raw: Tensor) -> dist.TorchDistribution:
        """The distribution; of too many raw outputs some would be left unread, without a word."""
        if not isinstance(raw, Tensor) or raw.shape[-1:] != (self.num_raw,):
            raise ValueError(f"raw: got {kind_of(raw)}; accepted is (*, {self.num_raw}), the raw outputs of {self}")
        return super().__call__(raw)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        raise NotImplementedError

    def start(self, *batch: int) -> Tensor:
        """Raw outputs for free parameters to start from, ``(*batch, num_raw)``: zeros, where those can learn."""
        return torch.zeros(*batch, self.num_raw)

    def extra_repr(self) -> str:
        return f"event_shape={tuple(self.event_shape)}"

    def _shaped(self, raw: Tensor) -> Tensor:
        return raw.reshape(*raw.shape[:-1], *self.event_shape)

    def _declare(self, name: str, kind: str | float) -> int:
        """Make what a positive quantity of this kind is held in; how many raw outputs it takes."""
        if isinstance(kind, str) and kind not in _KINDS:
            raise ValueError(f"{name}: got {kind!r}; accepted are {', '.join(map(repr, _KINDS))} or a number")
        if not isinstance(kind, str):
            self.register_buffer(f"fixed_{name}", torch.tensor(positive(kind, name)))
        elif kind != "network":
            shape = self.event_shape if kind == "per_dimension" else ()
            self.register_parameter(f"log_{name}", nn.Parameter(torch.zeros(shape)))
        return self.event_shape.numel() if kind == "network" else 0

    def _declared(self, name: str, kind: str | float, raw: Tensor, floor: float) -> Tensor:
        """Its value: fixed as it is, and otherwise the exponential of a raw output or parameter, above a floor."""
        if not isinstance(kind, str):
            return getattr(self, f"fixed_{name}")
        log_value = self._shaped(raw) if kind == "network" else getattr(self, f"log_{name}")
        return tabular.log_of_bounded_exp(log_value).exp() + floor


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


class Poisson(Family):
    r"""Independent Poisson counts, with the log-rate a raw output; from :math:`e^{16}` on the rate grows linearly.

    >>> Poisson(2)(torch.tensor([0.0, 1e4])).mean
    tensor([1.0000e+00, 8.8728e+10])
    """

    def __init__(self, event_shape: int | Sequence[int]):
        super().__init__(event_shape)
        self.num_raw = self.event_shape.numel()

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return tabular.Poisson(tabular.log_of_bounded_exp(self._shaped(raw))).to_event(len(self.event_shape))


class NegativeBinomial(Family):
    r"""Independent counts of mean :math:`\mu_d` and variance :math:`\mu_d + \alpha_d\,\mu_d^2`.

    The logarithm of the mean is a raw output, as in :class:`Poisson`. The dispersion :math:`\alpha` is one of the four
    kinds of :class:`Normal`'s scale, :math:`\alpha = e^{s} + 10^{-6}` where it is not fixed.

    >>> NegativeBinomial(1, dispersion=0.5)(torch.tensor([2.0]).log()).variance
    tensor([4.])
    """

    def __init__(self, event_shape: int | Sequence[int], dispersion: str | float = "shared"):
        super().__init__(event_shape)
        self.dispersion = dispersion
        self.num_raw = self.event_shape.numel() + self._declare("dispersion", dispersion)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        size = self.event_shape.numel()
        log_mean = tabular.log_of_bounded_exp(self._shaped(raw[..., :size]))
        dispersion = self._declared("dispersion", self.dispersion, raw[..., size:], 1e-6)
        return tabular.NegativeBinomial(log_mean, dispersion).to_event(len(self.event_shape))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dispersion={self.dispersion!r}"


class Categorical(Family):
    """Independent variables of k classes, by number 0 to k - 1, enumerable as one site.

    The raw outputs are k logits for each, the classes first, as a network that makes images has them for channels.

    >>> Categorical(2, num_classes=3)(torch.zeros(5, 6)).enumerate_support().shape
    torch.Size([9, 5, 2])
    """

    def __init__(self, event_shape: int | Sequence[int], num_classes: int):
        super().__init__(event_shape)
        self.num_classes = positive_int(num_classes, "num_classes")
        if num_classes < 2:
            raise ValueError(f"num_classes: got {num_classes}; accepted is an integer of 2 or more")
        self.num_raw = self.num_classes * self.event_shape.numel()

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        by_class = raw.reshape(*raw.shape[:-1], self.num_classes, *self.event_shape)
        logits = by_class.movedim(raw.dim() - 1, -1)
        return distributions.Product(tabular.Categorical(logits=logits), len(self.event_shape))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_classes={self.num_classes}"


class _Binary(Family):
    """Families of independent 0/1 variables with one logit each."""

    def __init__(self, event_shape: int | Sequence[int]):
        super().__init__(event_shape)
        self.num_raw = self.event_shape.numel()

    def logits(self, raw: Tensor) -> Tensor:
        return self._shaped(raw)


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
        return self._shaped(raw)


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
