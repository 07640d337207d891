"""The two-Gaussian mixture: data whose density and posterior are known."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae._utils.validation import describe, positive, positive_int, real_tensor, seed_number
from pyro_vae.datasets.base import Dataset, on_default_device

__all__ = ["TwoGaussians", "two_gaussians"]


@dataclass(frozen=True, repr=False)
class TwoGaussians(Dataset):
    r"""Draws from :math:`z \sim \mathrm{Bernoulli}(1/2),\ x \mid z \sim N(\pm(1, 1), s^2 I)`.

    Attributes:
        x: ``(N, 2)``.
        labels: ``(N,)``, z for each point: 1 at (1, 1), 0 at (-1, -1).
        scale: the standard deviation s of each coordinate.
    """

    scale: float

    def _line(self) -> str:
        return f"{super()._line()}, scale {self.scale:g}"

    def _log_joint(self, x: Tensor) -> Tensor:
        if not real_tensor(x, "x", "points (*, 2)").is_floating_point() or x.shape[-1:] != (2,):
            raise ValueError(f"`x` must be points (*, 2), floats, got {describe(x)}")
        centres = torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=x.dtype, device=x.device)
        component = torch.distributions.Normal(centres, self.scale)
        return component.log_prob(x[..., None, :]).sum(-1) + math.log(0.5)

    def log_prob(self, x: Tensor) -> Tensor:
        """The true log-density, in nats: ``(*, 2)`` to ``(*)``."""
        return self._log_joint(x).logsumexp(-1)

    def posterior(self, x: Tensor) -> Tensor:
        """The true p(z = 1 | x): ``(*, 2)`` to ``(*)``."""
        return self._log_joint(x).softmax(-1)[..., 1]


def two_gaussians(num_points: int, scale: float = 0.1, seed: int = 0) -> TwoGaussians:
    r"""Draw from the mixture :math:`z \sim \mathrm{Bernoulli}(1/2)`, :math:`x \sim N(\pm(1, 1), s^2 I)`.

    Where the problem is stated with "N(±(1, 1), 0.1)", it is not clear what 0.1 is. Here ``scale`` is a **standard
    deviation**: the covariance is 0.01 times the identity. Another seed gives an independent test set.

    Args:
        num_points: N.
        scale: standard deviation s of each coordinate.
        seed: seed of the draws.

    >>> data = two_gaussians(1000, seed=0)
    >>> data.x.shape, round(float(two_gaussians(100_000, seed=1).log_prob(data.x).mean()), 1)
    (torch.Size([1000, 2]), 1.1)
    """
    positive_int(num_points, "num_points")
    scale = positive(scale, "scale")
    generator = torch.Generator("cpu").manual_seed(seed_number(seed))
    labels = (torch.rand(num_points, generator=generator, device="cpu") < 0.5).long()
    noise = torch.randn(num_points, 2, generator=generator, device="cpu")
    x, labels = on_default_device((2.0 * labels - 1.0)[:, None] + scale * noise, labels)
    return TwoGaussians(x, labels, scale)
