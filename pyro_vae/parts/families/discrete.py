"""Families of binary, categorical and count variables."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae import distributions
from pyro_vae._utils.typing import Shape
from pyro_vae._utils.validation import positive_int
from pyro_vae.distributions import tabular
from pyro_vae.parts.families.base import Family

__all__ = ["Bernoulli", "Categorical", "ContinuousBernoulli", "NegativeBinomial"]
__all__ += ["OneHot", "OneHotCategorical", "Poisson", "SoftTargetBernoulli"]


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
