"""Families of binary, categorical and count variables."""

from collections.abc import Sequence
from numbers import Real

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae import distributions
from pyro_vae._utils.typing import Shape
from pyro_vae._utils.validation import describe, positive, positive_int
from pyro_vae.distributions import tabular
from pyro_vae.distributions.properties import base_support, without_independent
from pyro_vae.parts.families.base import KINDS, Family

__all__ = ["Bernoulli", "Categorical", "ContinuousBernoulli", "DiscretizedLogisticMixture", "NegativeBinomial"]
__all__ += ["OneHot", "OneHotCategorical", "Ordinal", "Poisson", "SoftTargetBernoulli", "ZeroInflated"]

_CUT_FLOOR = 1e-4  # of the step between cut points, which float32 can still represent next to a cut point of 100


def _probability(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < 1:
        raise ValueError(f"`{name}` must be a probability between 0 and 1, got {value!r}")
    return float(value)


class Poisson(Family):
    r"""Independent Poisson counts. The raw output is the log-rate; above :math:`e^{16}` the rate grows linearly.

    >>> Poisson(2)(torch.tensor([0.0, 1e4])).mean
    tensor([1.0000e+00, 8.8728e+10])
    """

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return tabular.Poisson(tabular.log_of_bounded_exp(self._shaped(raw))).to_event(len(self.event_shape))


class NegativeBinomial(Family):
    r"""Independent counts of mean :math:`\mu_d` and variance :math:`\mu_d + \alpha_d\,\mu_d^2`.

    The logarithm of the mean is a raw output, as in :class:`Poisson`. The dispersion :math:`\alpha` is one of the four
    kinds of :class:`Normal`'s scale, :math:`\alpha = e^{s} + 10^{-6}` where it is not fixed.

    >>> NegativeBinomial(1, dispersion=0.5)(torch.tensor([2.0]).log()).variance
    tensor([4.])
    """

    _options = ("dispersion",)

    def __init__(self, event_shape: Shape, dispersion: str | float = "shared"):
        super().__init__(event_shape)
        self.dispersion = dispersion
        self.num_raw += self._declare("dispersion", dispersion)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        size = self.event_shape.numel()
        log_mean = tabular.log_of_bounded_exp(self._shaped(raw[..., :size]))
        dispersion = self._declared("dispersion", self.dispersion, raw[..., size:], 1e-6)
        return tabular.NegativeBinomial(log_mean, dispersion).to_event(len(self.event_shape))


class ZeroInflated(Family):
    r"""Independent counts of a family with more zeros, :class:`pyro_vae.distributions.tabular.ZeroInflated`.

    The raw outputs are those of the counts. Those of the gate, the logits of the probability :math:`\pi` of a zero that
    is not a count, follow where the gate is from a network.

    Args:
        base: family of counts, :class:`Poisson` or :class:`NegativeBinomial`.
        gate: :math:`\pi`: ``"network"``, ``"shared"`` or ``"per_dimension"``, or a fixed probability.

    >>> q = ZeroInflated(Poisson(1), gate=0.5)(torch.zeros(1))
    >>> q.log_prob(torch.zeros(1)).exp(), q.mean
    (tensor(0.6839), tensor([0.5000]))
    """

    _options = ("gate",)

    def __init__(self, base: Family, gate: str | float = "network"):
        must = "a family of counts, such as families.Poisson(2), as a density has no mass at 0 to add zeros to"
        if not isinstance(base, Family):
            raise TypeError(f"`base` must be {must}, got {describe(base)}")
        if base_support(base(base.start())) is not constraints.nonnegative_integer:
            raise ValueError(f"`base` must be {must}, got {base}")
        super().__init__(base.event_shape)
        self.base, self.gate = base, gate
        self.num_raw = base.num_raw
        if not isinstance(gate, str):
            self.register_buffer("fixed_gate", torch.tensor(_probability(gate, "gate")).logit())
        elif gate == "network":
            self.num_raw += self.event_shape.numel()
        elif gate in KINDS:
            self.gate_logits = nn.Parameter(torch.zeros(self.event_shape if gate == "per_dimension" else ()))
        else:
            raise ValueError(f"`gate` must be {', '.join(map(repr, KINDS))} or a probability, got {gate!r}")

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        counts = without_independent(self.base(raw[..., : self.base.num_raw]))
        return tabular.ZeroInflated(counts, self._gate_logits(raw)).to_event(len(self.event_shape))

    def _gate_logits(self, raw: Tensor) -> Tensor:
        if self.gate == "network":
            return self._shaped(raw[..., self.base.num_raw :])
        return getattr(self, "gate_logits" if isinstance(self.gate, str) else "fixed_gate")


class Categorical(Family):
    """Independent variables of k classes, numbered 0 to k - 1, enumerable as one site.

    The raw outputs are k logits of each variable. The classes come first, as the channels of an image do.

    >>> Categorical(2, num_classes=3)(torch.zeros(5, 6)).enumerate_support().shape
    torch.Size([9, 5, 2])
    """

    _options = ("num_classes",)

    def __init__(self, event_shape: Shape, num_classes: int):
        super().__init__(event_shape)
        self.num_classes = positive_int(num_classes, "num_classes")
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be an integer of 2 or more, got {num_classes}")
        self.num_raw *= self.num_classes

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        by_class = raw.reshape(*raw.shape[:-1], self.num_classes, *self.event_shape)
        logits = torch.movedim(by_class, raw.dim() - 1, -1)
        return distributions.Product(tabular.Categorical(logits=logits), len(self.event_shape))


class Ordinal(Family):
    r"""Independent variables of k ordered levels, numbered 0 to k - 1, :class:`pyro_vae.distributions.tabular.Ordinal`.

    The raw output of a variable is its location :math:`\eta`. The cut points are parameters of the family, not
    functions of the context: the first one, and the logarithms of the steps to the next ones, plus a floor of
    :math:`10^{-4}`. They start where all levels have the mass :math:`1/k` at :math:`\eta = 0`.

    >>> Ordinal(1, num_levels=4)(torch.zeros(1)).base_dist.probs
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]], grad_fn=<SoftmaxBackward0>)
    """

    _options = ("num_levels",)

    def __init__(self, event_shape: Shape, num_levels: int):
        super().__init__(event_shape)
        self.num_levels = positive_int(num_levels, "num_levels")
        if num_levels < 2:
            raise ValueError(f"`num_levels` must be an integer of 2 or more, got {num_levels}")
        cuts = (torch.arange(1, self.num_levels) / self.num_levels).logit()
        start = torch.cat([cuts[:1], (cuts.diff() - _CUT_FLOOR).log()])
        self.raw_cuts = nn.Parameter(start.repeat(*self.event_shape, 1))

    def cuts(self) -> Tensor:
        """The cut points, ``(*event_shape, k - 1)``, increasing."""
        first, steps = self.raw_cuts[..., :1], self.raw_cuts[..., 1:]
        return torch.cat([first, tabular.log_of_bounded_exp(steps).exp() + _CUT_FLOOR], -1).cumsum(-1)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return distributions.Product(tabular.Ordinal(self._shaped(raw), self.cuts()), len(self.event_shape))


class DiscretizedLogisticMixture(Family):
    r"""Independent levels 0 to k - 1, such as the 256 of a colour: :class:`distributions.DiscretizedLogisticMixture`.

    The raw outputs of a variable with m components are m logits of the weights, none if m = 1, m locations and m
    logarithms of scales. They come first, as the channels of an image do. At zero the locations are spread evenly over
    the levels, and all scales are :math:`(k - 1) / 8m`; a location moves by :math:`(k - 1) / 2` levels for each unit.

    >>> DiscretizedLogisticMixture(2, num_levels=5)(torch.zeros(4)).mean
    tensor([2., 2.])
    """

    _options = ("num_levels", "num_components", "min_scale")

    def __init__(self, event_shape: Shape, num_levels: int = 256, num_components: int = 1, min_scale: float = 0.1):
        super().__init__(event_shape)
        self.num_levels = positive_int(num_levels, "num_levels")
        if num_levels < 2:
            raise ValueError(f"`num_levels` must be an integer of 2 or more, got {num_levels}")
        self.num_components = positive_int(num_components, "num_components")
        self.min_scale = positive(min_scale, "min_scale")
        self.num_raw *= 3 * self.num_components if num_components > 1 else 2

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        by_kind = raw.reshape(*raw.shape[:-1], -1, self.num_components, *self.event_shape)
        *logits, loc, log_scale = by_kind.movedim(raw.dim(), -1).unbind(raw.dim() - 1)
        half, number = (self.num_levels - 1) / 2, self.num_components
        spread = (2 * torch.arange(number, dtype=raw.dtype, device=raw.device) + 1) / number - 1
        scale = half / (4 * number) * tabular.log_of_bounded_exp(log_scale).exp() + self.min_scale
        weights = logits[0] if logits else torch.zeros_like(loc)
        levels = distributions.DiscretizedLogisticMixture(weights, half * (1 + loc + spread), scale, self.num_levels)
        return distributions.Product(levels, len(self.event_shape))


class Bernoulli(Family):
    """Independent Bernoulli variables, enumerable as one site.

    >>> Bernoulli(3)(torch.zeros(5, 3)).enumerate_support().shape
    torch.Size([8, 5, 3])
    """

    fitting_guide = "Bernoulli"

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return distributions.Product(distributions.Bernoulli(logits=self._shaped(raw)), len(self.event_shape))


class SoftTargetBernoulli(Family):
    """The cross-entropy of targets in [0, 1], which is no likelihood, see :class:`distributions.SoftTargetBernoulli`.

    >>> distributions.is_normalized(SoftTargetBernoulli(3)(torch.zeros(3)))
    False
    """

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return distributions.SoftTargetBernoulli(logits=self._shaped(raw)).to_event(len(self.event_shape))


class ContinuousBernoulli(Family):
    """Independent continuous Bernoulli variables on [0, 1].

    >>> ContinuousBernoulli(2)(torch.zeros(2)).mean
    tensor([0.5000, 0.5000])
    """

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return distributions.ContinuousBernoulli(self._shaped(raw)).to_event(len(self.event_shape))


class OneHot(Family):
    """Families of n independent one-hot variables of k classes, event shape ``(n, k)`` with k logits each."""

    def __init__(self, event_shape: Sequence[int]):
        super().__init__(event_shape)
        if len(self.event_shape) != 2 or self.event_shape[1] < 2:
            must = "(n, k), n one-hot variables of k >= 2 classes"
            raise ValueError(f"`event_shape` must be {must}, got {tuple(self.event_shape)}")


class OneHotCategorical(OneHot):
    """Independent one-hot variables, enumerable as one site of k^n states.

    >>> OneHotCategorical((2, 3))(torch.zeros(6)).enumerate_support().shape
    torch.Size([9, 2, 3])
    """

    fitting_guide = "OneHotCategorical"

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        return distributions.Product(dist.OneHotCategorical(logits=self._shaped(raw)), 1)
