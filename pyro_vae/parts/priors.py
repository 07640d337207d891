"""Priors p(z): parts without a context. Their ``read`` also defines the input of the decoder for a value of z.

Where a prior does not describe ``latent``, it is the size or shape of z.
"""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae._utils.data import data_tensors
from pyro_vae._utils.typing import Shape
from pyro_vae._utils.validation import boolean, numbers, real_tensor, with_article
from pyro_vae.distributions.mixture import MixtureOfNormals as Mixture
from pyro_vae.parts import families
from pyro_vae.parts.base import Conditional, Part, Unconditional, checked_amortized
from pyro_vae.parts.families import multivariate

__all__ = ["Bernoulli", "Gamma", "GumbelSoftmax", "Laplace", "MixtureOfNormals", "Normal", "NormalizingFlow"]
__all__ += ["OneHotCategorical", "RelaxedBernoulli", "StandardNormal", "StudentT", "Uniform", "VampPrior"]


class StandardNormal(Unconditional):
    r""":math:`z \sim N(0, I)`.

    Args:
        latent: size or shape of z.

    >>> StandardNormal(2)().log_prob(torch.zeros(2))
    tensor(-1.8379)
    """

    def __init__(self, latent: Shape):
        super().__init__(families.Normal(latent))


class Normal(Unconditional):
    r""":math:`z \sim N(\mu, \mathrm{diag}\,\sigma^2)` with learnable location and scale, initially :math:`N(0, I)`.

    >>> [parameter.shape for parameter in Normal(2).parameters()]
    [torch.Size([4])]
    """

    def __init__(self, latent: Shape):
        family = families.Normal(latent)
        super().__init__(family, nn.Parameter(family.start()))


class Laplace(Unconditional):
    r""":math:`p(z) = \prod_d \tfrac{1}{2 b_d} e^{-|z_d - \mu_d| / b_d}`, a sparse prior: few coordinates are large.

    Args:
        learnable: whether location and scale are trained, starting from 0 and 1.

    >>> Laplace(2)().log_prob(torch.zeros(2))
    tensor(-1.3863)
    """

    def __init__(self, latent: Shape, learnable: bool = False):
        family = families.Laplace(latent)
        super().__init__(family, _raw(family.start(), learnable))


class StudentT(Unconditional):
    r"""Independent Student-t variables, :math:`z_d \sim t_\nu(\mu_d, \sigma_d)`, with heavy tails.

    Args:
        df: degrees of freedom :math:`\nu`, a positive number.
        learnable: whether location and scale are trained, starting from 0 and 1.

    >>> StudentT(2, df=4.0)().variance
    tensor([2., 2.])
    """

    def __init__(self, latent: Shape, df: float = 4.0, learnable: bool = False):
        family = families.StudentT(latent, df)
        super().__init__(family, _raw(family.start(), learnable))


class Gamma(Unconditional):
    r"""Independent positive variables, :math:`p(z) = \prod_d \frac{b_d^{a_d}}{\Gamma(a_d)} z_d^{a_d - 1} e^{-b_d z_d}`.

    A guide that fits is :class:`pyro_vae.parts.guides.LogNormal`.

    Args:
        concentration: :math:`a`, positive, a number or a tensor that expands to the shape of z.
        rate: :math:`b`, likewise.
        learnable: whether both are trained, starting from these.

    >>> Gamma(2, concentration=3.0, rate=2.0)().mean
    tensor([1.5000, 1.5000])
    """

    def __init__(
        self, latent: Shape, concentration: float | Tensor = 1.0, rate: float | Tensor = 1.0, learnable: bool = False
    ):
        family = families.Gamma(latent)
        logs = [
            _expand(_positive(value, name).log(), family.event_shape, name)
            for name, value in (("concentration", concentration), ("rate", rate))
        ]
        super().__init__(family, _raw(torch.cat(logs), learnable))


class Uniform(Unconditional):
    r"""The flat density on a box, :math:`p(z) = \prod_d \frac{1}{b_d - a_d}` for :math:`a_d < z_d < b_d`.

    A guide that fits is :class:`pyro_vae.parts.guides.LogitNormal` on the same box: with mass outside, KL is infinite.

    Args:
        low: lower corner a, a number or a tensor that expands to the shape of z.
        high: upper corner b, above a.

    >>> Uniform(2, low=-1.0, high=1.0)().log_prob(torch.zeros(2))
    tensor(-1.3863)
    """

    def __init__(self, latent: Shape, low: float | Tensor = 0.0, high: float | Tensor = 1.0):
        super().__init__(families.Uniform(latent, low, high))


class MixtureOfNormals(Unconditional):
    r""":math:`z \sim \sum_k \pi_k\,N(\mu_k, \mathrm{diag}\,\sigma_k^2)` with learnable weights, locations and scales.

    Initial locations are drawn from :math:`N(0, I)`, so that the components differ.

    Args:
        num_components: K.

    >>> MixtureOfNormals(2, num_components=10)().event_shape
    torch.Size([2])
    """

    def __init__(self, latent: int, num_components: int):
        family = multivariate.MixtureOfNormals(latent, num_components)
        super().__init__(family, nn.Parameter(family.start()))


class VampPrior(Part):
    r"""The guide's average over learned pseudo-data, :math:`p(z) = \frac1K \sum_k q(z \mid u_k)`.

    The best prior for a guide is the aggregate posterior, its average over all data; this is one over K learned data.
    It shares the encoder's parameters, which get gradients through the prior too.

    Args:
        encoder: the guide, amortized and continuous, such as :class:`pyro_vae.parts.guides.DiagonalNormal`.
        pseudo_data: initial :math:`u_k`, ``(K, *data)``, such as some rows of the data; they are trained.

    Source: Tomczak and Welling 2018, "VAE with a VampPrior", equation 9. There images stay in [0, 1]; not here.

    >>> from pyro_vae import guides, networks
    >>> encoder = guides.DiagonalNormal(3, 2, networks.mlp([8]))
    >>> VampPrior(encoder, torch.randn(10, 3))().log_prob(torch.zeros(2)).shape
    torch.Size([])
    """

    def __init__(self, encoder: Conditional, pseudo_data: Tensor):
        super().__init__()
        shape = tuple(checked_amortized(encoder).context_shape)
        real_tensor(pseudo_data, "pseudo_data", "a tensor, such as x[:20]")
        if pseudo_data.dim() != 1 + len(shape) or pseudo_data.shape[1:] != shape or not len(pseudo_data):
            spelled = ", ".join(map(str, shape))
            raise ValueError(f"`pseudo_data` must be (K, {spelled}), K >= 1, got shape {tuple(pseudo_data.shape)}")
        data_tensors(pseudo_data, "pseudo_data")
        self.encoder = encoder
        self.pseudo_data = nn.Parameter(pseudo_data.detach().clone().to(torch.get_default_dtype()))
        if isinstance(encoder.family, families.Relaxed) or not encoder(self.pseudo_data).has_rsample:
            must = "a guide of continuous latents that are not relaxed"
            raise ValueError(f"`encoder` must be {must}, got {with_article(type(encoder).__name__)}")

    @property
    def family(self) -> families.Family:  # type: ignore[override]
        return self.encoder.family

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        """The mixture for the current pseudo-data and guide."""
        components = self.encoder(self.pseudo_data)
        logits = self.pseudo_data.new_zeros(len(self.pseudo_data))
        if isinstance(self.family, families.Normal) and len(components.event_shape) == 1:
            return Mixture(logits, components.mean, components.stddev)
        return dist.MixtureSameFamily(torch.distributions.Categorical(logits=logits), components)

    def extra_repr(self) -> str:
        return f"num_components={len(self.pseudo_data)}"


class NormalizingFlow(Unconditional):
    r"""A learnable density of :math:`z = b + s \odot f^{-1}(\epsilon)`, :math:`\epsilon \sim N(0, I)`.

    Before training it is :math:`N(0, I)`. f is a masked autoregressive flow: a density takes one pass through its
    networks, a draw one pass per variable of z.

    Args:
        transforms: number of autoregressive steps, each in the reverse order of the last.
        hidden: sizes of the hidden layers of each step's network.
        kind: of step: ``"affine"``, of a single variable just a normal, or ``"spline"``, flexible within 5 scales of b.

    Raises an ImportError without zuko: ``pip install 'pyro-vae[flows]'``.

    Source: Papamakarios, Pavlakou and Murray 2017, "Masked autoregressive flow for density estimation"; Durkan,
    Bekasov, Murray and Papamakarios 2019, "Neural spline flows"; as a prior, Chen, Kingma et al. 2017, "Variational
    lossy autoencoder", section 3.2.

    >>> NormalizingFlow(2, transforms=2, kind="spline")().log_prob(torch.zeros(2)).item()
    -1.837...
    """

    def __init__(self, latent: Shape, transforms: int = 3, hidden: Sequence[int] = (64, 64), kind: str = "affine"):
        family = multivariate.Flow(latent, kind, transforms, hidden)
        super().__init__(family, nn.Parameter(family.start()))


class Bernoulli(Unconditional):
    r"""Independent :math:`z_j \sim \mathrm{Bernoulli}(\pi_j)`, one site of :math:`2^n` states under enumeration.

    Args:
        latent: number of variables.
        probs: :math:`\pi`, a number or a tensor of shape ``(latent,)``, between 0 and 1.
        learnable: whether the probabilities are trained, starting from ``probs``.

    >>> Bernoulli(3, probs=0.25)().mean
    tensor([0.2500, 0.2500, 0.2500])
    """

    def __init__(self, latent: Shape, probs: float | Tensor = 0.5, learnable: bool = False):
        family = families.Bernoulli(latent)
        super().__init__(family, _logits(family.event_shape, probs, learnable))


class OneHotCategorical(Unconditional):
    r"""Independent one-hot variables, :math:`z_j \sim \mathrm{Categorical}(\pi_j)`, one site of :math:`k^n` states.

    Args:
        latent: ``(n, k)``, n variables of k classes.
        probs: tensor that broadcasts to ``(n, k)``, positive, each row summing to one; uniform if left out.
        learnable: whether the probabilities are trained, starting from ``probs``.

    >>> OneHotCategorical((1, 4))().mean
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    def __init__(self, latent: Sequence[int], probs: Tensor | None = None, learnable: bool = False):
        family = families.OneHotCategorical(latent)
        super().__init__(family, _log_probs(family.event_shape, probs, learnable))


class _RelaxedPrior(Unconditional):
    """A relaxed prior: the decoder reads the relaxed variable, or straight through the hard one."""

    family: families.Relaxed

    def __init__(self, family: families.Relaxed, raw: Tensor, straight_through: bool):
        super().__init__(family, raw)
        self.straight_through = boolean(straight_through, "straight_through")

    def read(self, value: Tensor) -> Tensor:
        """The relaxed variable, or with ``straight_through`` the hard one with the gradient of the relaxed one."""
        soft = self.family.soft(value)
        return self.family.hard(value) + (soft - soft.detach()) if self.straight_through else soft

    def extra_repr(self) -> str:
        return f"straight_through={self.straight_through}"


class RelaxedBernoulli(_RelaxedPrior):
    r"""Independent relaxed Bernoulli variables. A value of the site is the logit; the decoder reads its sigmoid.

    Args:
        latent: number of variables.
        temperature: :math:`\lambda > 0`; the limit at 0 is the discrete twin, :class:`Bernoulli`.
        probs: probabilities of the twin.
        learnable: whether they are trained.
        straight_through: whether the decoder reads 0s and 1s, with the gradient of the sigmoid. The relaxed ELBO is
            then a lower bound on the twin's ELBO.

    >>> prior = RelaxedBernoulli(1, temperature=0.5)
    >>> prior.read(torch.tensor([2.0])), prior.discrete()().mean
    (tensor([0.8808]), tensor([0.5000]))
    """

    def __init__(
        self,
        latent: Shape,
        temperature: float,
        probs: float | Tensor = 0.5,
        learnable: bool = False,
        straight_through: bool = False,
    ):
        family = families.RelaxedBernoulli(latent, temperature)
        super().__init__(family, _logits(family.event_shape, probs, learnable), straight_through)


class GumbelSoftmax(_RelaxedPrior):
    r"""Independent relaxed one-hot variables. The site is on the log-simplex; the decoder reads its exponential.

    Args:
        latent: ``(n, k)``, n variables of k classes.
        temperature: :math:`\lambda > 0`; the limit at 0 is the discrete twin, :class:`OneHotCategorical`.
        probs: probabilities of the twin; uniform if left out.
        learnable: whether they are trained.
        straight_through: whether the decoder reads one-hot vectors, with the gradient of the soft ones.

    >>> prior = GumbelSoftmax((1, 2), temperature=0.5, straight_through=True)
    >>> prior.read(torch.tensor([[0.4, 0.6]]).log())
    tensor([[0., 1.]])
    """

    def __init__(
        self,
        latent: Sequence[int],
        temperature: float,
        probs: Tensor | None = None,
        learnable: bool = False,
        straight_through: bool = False,
    ):
        family = families.RelaxedOneHotCategorical(latent, temperature)
        super().__init__(family, _log_probs(family.event_shape, probs, learnable), straight_through)


def _raw(values: Tensor, learnable: bool) -> Tensor:
    return nn.Parameter(values) if boolean(learnable, "learnable") else values


def _logits(shape: torch.Size, probs: float | Tensor, learnable: bool) -> Tensor:
    probs = numbers(probs, "probs")
    if not ((probs > 0) & (probs < 1)).all():
        raise ValueError(f"`probs` must be strictly between 0 and 1, got {probs.tolist()}")
    return _raw(_expand(torch.logit(probs), shape, "probs"), learnable)


def _log_probs(shape: torch.Size, probs: Tensor | None, learnable: bool) -> Tensor:
    if probs is None:
        return _raw(torch.zeros(shape.numel()), learnable)
    probs = numbers(probs, "probs")
    if not ((probs > 0).all() and torch.allclose(probs.sum(-1), probs.new_ones(()))):
        raise ValueError(f"`probs` must be positive probabilities that sum to one by row, got {probs.tolist()}")
    return _raw(_expand(probs.log(), shape, "probs"), learnable)


def _positive(value: float | Tensor, name: str) -> Tensor:
    found = numbers(value, name)
    if not ((found > 0) & found.isfinite()).all():
        raise ValueError(f"`{name}` must be positive, finite numbers, got {found.tolist()}")
    return found


def _expand(values: Tensor, shape: torch.Size, name: str) -> Tensor:
    try:
        return values.expand(shape).flatten().clone()
    except RuntimeError as error:
        raise ValueError(f"`{name}` must expand to shape {tuple(shape)}, got shape {tuple(values.shape)}") from error
