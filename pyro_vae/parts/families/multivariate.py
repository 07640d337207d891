"""Families of real variables that depend on each other: normals with covariance, mixtures of normals, flows."""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.kl import register_kl

from pyro_vae._utils.typing import Shape
from pyro_vae._utils.validation import as_shape, positive_int
from pyro_vae.distributions import flow
from pyro_vae.distributions.base import ScoresDraws
from pyro_vae.distributions.mixture import MixtureOfNormals as Mixture
from pyro_vae.parts.families.base import Family

__all__ = ["Flow", "FullRankNormal", "LowRankNormal", "MixtureOfNormals"]


class _Vector(Family):
    """Families of one vector, event shape ``(D,)``."""

    fitting_guide = "DiagonalNormal"

    def __init__(self, event_shape: Shape):
        super().__init__(event_shape)
        if len(self.event_shape) != 1:
            raise ValueError(f"`event_shape` must be (D,), one vector, got {tuple(self.event_shape)}")
        self.size = self.event_shape[0]


class FullRankNormal(_Vector):
    r"""A normal with any covariance, :math:`x \sim N(\mu, L L^\top)` with :math:`L = \mathrm{diag}(\sigma)\,(I + N)`.

    N is strictly lower triangular: a raw output times :math:`\min(1, 3 / D)`. An optimizer such as Adam moves all raw
    outputs by steps of one size, whose noise in N costs about :math:`\tfrac{1}{2} \sum_{ij} N_{ij}^2` nats, a sum of
    :math:`D^2 / 2` terms. Without this factor, and without :math:`\sigma` in front, that is more than the covariance
    gains with tens of variables; and with 100, the condition number of L would be 1e12 at the start of a network.

    >>> FullRankNormal(2)(torch.zeros(5)).covariance_matrix
    tensor([[1., 0.],
            [0., 1.]])
    """

    # Of models in files from before the factor, and before σ stood in front of N: they keep their covariances.
    below_scale, is_relative = 1.0, False

    def __init__(self, event_shape: Shape):
        super().__init__(event_shape)
        self.num_raw = 2 * self.size + self.size * (self.size - 1) // 2
        self.below_scale, self.is_relative = min(1.0, 3 / self.size), True

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        loc, log_diagonal, below = raw.split([self.size, self.size, self.num_raw - 2 * self.size], dim=-1)
        rows, columns = torch.tril_indices(self.size, self.size, offset=-1, device=raw.device)
        diagonal, below = log_diagonal.exp(), self.below_scale * below
        scale_tril = diagonal.diag_embed()
        scale_tril[..., rows, columns] = diagonal[..., rows] * below if self.is_relative else below
        return MultivariateNormal(loc, scale_tril=scale_tril)


class MultivariateNormal(ScoresDraws, dist.MultivariateNormal):
    """Pyro's, with full precision where L is ill-conditioned: by the noise of a draw, and in float64 elsewhere."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        scale_tril = self._unbroadcasted_scale_tril
        value = self.loc + (scale_tril @ noise[..., None]).squeeze(-1)
        self._store_score(value, self._log_density(noise, scale_tril))
        return value

    def _score(self, value: Tensor) -> Tensor:
        exact = [tensor.double() for tensor in (value, self.loc, self._unbroadcasted_scale_tril)]
        log_prob = dist.MultivariateNormal(exact[1], scale_tril=exact[2], validate_args=False).log_prob(exact[0])
        return log_prob.to(self.loc.dtype)

    @staticmethod
    def _log_density(noise: Tensor, scale_tril: Tensor) -> Tensor:
        log_det = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (noise**2 + math.log(2 * math.pi)).sum(-1) - log_det


class LowRankNormal(_Vector):
    r"""A normal of low-rank plus diagonal covariance, :math:`x \sim N(\mu, W W^\top + \mathrm{diag}\,\sigma^2)`.

    :math:`W = \mathrm{diag}(\sigma)\,V`, and V is a raw output times :math:`\min(1, 3 / D)^{1/2}`: the noise of
    training in V would otherwise cost more than the covariance gains, see :class:`FullRankNormal`.

    Args:
        rank: columns of W, from 1 to the size of x.

    >>> LowRankNormal(3, rank=1)(torch.zeros(9)).variance
    tensor([1., 1., 1.])
    """

    _options = ("rank",)
    factor_scale, is_relative = 1.0, False  # of models in files from before, as in FullRankNormal

    def __init__(self, event_shape: Shape, rank: int):
        super().__init__(event_shape)
        self.rank = positive_int(rank, "rank")
        if rank > self.size:
            raise ValueError(f"`rank` must be 1 to {self.size}, the size of the vector, got {rank}")
        self.num_raw = self.size * (2 + self.rank)
        self.factor_scale, self.is_relative = min(1.0, 3 / self.size) ** 0.5, True

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        loc, log_scale, factor = raw.split([self.size, self.size, self.size * self.rank], dim=-1)
        factor = self.factor_scale * factor.reshape(*factor.shape[:-1], self.size, self.rank)
        if self.is_relative:
            factor = log_scale.exp()[..., None] * factor
        try:
            return LowRankMultivariateNormal(loc, factor, (2 * log_scale).exp())
        except torch.linalg.LinAlgError as error:  # torch raises it before its check of the values
            found = f"{raw.min():.4g} to {raw.max():.4g}"
            raise ValueError(f"`raw` must be finite numbers, not too large, for {self}, got {found}") from error


class LowRankMultivariateNormal(dist.LowRankMultivariateNormal):
    """Pyro's, with full precision where the scales are small compared with W.

    The squared distance is a difference of large terms, which in float32 cancel to noise at a ratio of 1:1000.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        loc, factor, diagonal = self.loc, self._unbroadcasted_cov_factor, self._unbroadcasted_cov_diag
        exact = dist.LowRankMultivariateNormal(loc.double(), factor.double(), diagonal.double(), validate_args=False)
        return exact.log_prob(value.double()).to(loc.dtype)


class MixtureOfNormals(_Vector):
    r"""A mixture of diagonal normals, :math:`x \sim \sum_k \pi_k\,N(\mu_k, \mathrm{diag}\,\sigma_k^2)`, drawn pathwise.

    Args:
        num_components: K.

    >>> MixtureOfNormals(2, num_components=3)(torch.zeros(15)).log_prob(torch.zeros(2))
    tensor(-1.8379)
    """

    _options = ("num_components",)

    def __init__(self, event_shape: Shape, num_components: int):
        super().__init__(event_shape)
        self.num_components = positive_int(num_components, "num_components")
        self.num_raw = self.num_components * (1 + 2 * self.size)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        count = self.num_components
        logits, loc, log_scale = raw.split([count, count * self.size, count * self.size], dim=-1)
        shape = (*raw.shape[:-1], count, self.size)
        return Mixture(logits, loc.reshape(shape), log_scale.reshape(shape).exp())

    def start(self, *batch: int) -> Tensor:
        """Locations are drawn from N(0, I): equal components have equal gradients, and would stay equal."""
        raw = super().start(*batch)
        raw[..., self.num_components : self.num_components * (1 + self.size)].normal_()
        return raw


class Flow(Family):
    r"""A normalizing flow :math:`z = b + s \odot f(\epsilon; h)` of noise :math:`\epsilon \sim N(0, I)`.

    f is made of masked autoregressive steps, whose networks are parameters of the family. The raw outputs are the shift
    b, the logarithm of the scale s, and a context h that every step reads. Before training the steps are the identity,
    and the flow is the independent normal :math:`N(b, s^2)`.

    A masked network is evaluated in one pass, and inverted in one pass per variable. By default the one pass is from
    value to noise, and densities are fast (a masked autoregressive flow). With ``inverse`` it is from noise to value:
    draws are fast, and so are the densities of draws (an inverse autoregressive flow).

    Args:
        event_shape: size or shape of z.
        kind: of step: ``"affine"``, or ``"spline"``. Affine steps of a single variable make a normal of it.
        transforms: number of steps.
        hidden: sizes of the hidden layers of each step's masked network.
        context: size of h.
        inverse: whether draws are fast in place of densities.

    Raises an ImportError without zuko: ``pip install 'pyro-vae[flows]'``.

    Source: Papamakarios, Pavlakou and Murray 2017, "Masked autoregressive flow"; Kingma et al. 2016, "Improved
    variational inference with inverse autoregressive flow"; Durkan, Bekasov, Murray and Papamakarios 2019, "Neural
    spline flows".

    >>> family = Flow(2, kind="spline", transforms=2, hidden=[8], context=4, inverse=True)
    >>> family(torch.randn(5, family.num_raw)).rsample().shape
    torch.Size([5, 2])
    """

    _options = ("kind", "transforms", "hidden", "context", "inverse")
    fitting_guide = "DiagonalNormal"

    def __init__(
        self,
        event_shape: Shape,
        kind: str = "affine",
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
        context: int = 0,
        inverse: bool = False,
    ):
        super().__init__(event_shape)
        if not isinstance(kind, str) or kind not in flow.KINDS:
            raise ValueError(f"`kind` must be {', '.join(map(repr, flow.KINDS))}, got {kind!r}")
        if type(context) is not int or not 0 <= context < 2**31:
            raise ValueError(f"`context` must be an integer, 0 or more, got {context!r}")
        self.kind, self.context, self.inverse = kind, context, inverse
        self.transforms = positive_int(transforms, "transforms")
        self.hidden = tuple(as_shape(hidden, "hidden"))
        size = self.event_shape.numel()
        self.num_raw = 2 * size + context
        self.steps = flow.autoregressive(size, context, kind, transforms, self.hidden)

    def forward(self, raw: Tensor) -> dist.TorchDistribution:
        size = self.event_shape.numel()
        shift, log_scale = self._shaped(raw[..., :size]), self._shaped(raw[..., size : 2 * size])
        forward = self.steps(raw[..., 2 * size :] if self.context else None)
        transform = forward if self.inverse else forward.inv
        return flow.Flow(transform, shift, log_scale.exp(), len(self.event_shape), scores_draws=self.inverse)

    def __repr__(self) -> str:
        """The options without the steps, whose own ``repr`` draws random numbers."""
        return f"{type(self).__name__}({self.extra_repr()})"


@register_kl(torch.distributions.MultivariateNormal, torch.distributions.Independent)
@register_kl(torch.distributions.LowRankMultivariateNormal, torch.distributions.Independent)
def _kl_from_diagonal_normal(q: torch.distributions.Distribution, p: torch.distributions.Independent) -> Tensor:
    """KL(q || p) = -H(q) - E[log p] for a normal q and independent normal variables, which torch lacks."""
    if type(p.base_dist) not in (dist.Normal, torch.distributions.Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    cross = (q.variance + (q.mean - p.base_dist.loc) ** 2) / p.base_dist.variance
    log_p = -0.5 * (cross + p.base_dist.variance.log() + math.log(2 * math.pi))
    return -q.entropy() - log_p.sum(-1)
