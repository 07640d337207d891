"""Likelihoods p(x | z), also called decoders: parts whose context is z, as the prior's ``read`` returns it.

Arguments that a likelihood does not describe are those of :class:`Normal`. Each is a product over the entries of x.
With ``missing=True``, NaN in x is an entry that was not observed, and
log p(x | z) is that of the observed entries, see :mod:`pyro_vae.distributions.missing`. The encoder then needs a
network that accepts NaN, such as :func:`pyro_vae.parts.networks.with_missing`.
"""

import math
from collections.abc import Mapping, Sequence

import pyro.distributions as dist
import torch

from pyro_vae._utils.typing import Shape
from pyro_vae._utils.validation import as_shape, boolean, positive
from pyro_vae.distributions.missing import with_missing
from pyro_vae.parts import families, networks
from pyro_vae.parts.base import Conditional
from pyro_vae.parts.families.base import Family
from pyro_vae.parts.networks import NetworkFactory

__all__ = ["Bernoulli", "Categorical", "Columns", "ContinuousBernoulli", "DiscretizedLogisticMixture", "LogNormal"]
__all__ += ["NegativeBinomial", "Normal", "Ordinal", "Poisson", "StudentT"]
__all__ += ["ZeroInflatedNegativeBinomial", "ZeroInflatedPoisson"]


class _Decoder(Conditional):
    def __init__(self, family: Family, latent: Shape, network: NetworkFactory, missing: bool):
        features = as_shape(latent, "latent").numel()
        super().__init__(family, latent, networks.build(network, features, family.num_raw))
        self.missing = boolean(missing, "missing")

    def forward(self, context: torch.Tensor | None = None) -> dist.TorchDistribution:
        likelihood = super().forward(context)
        return with_missing(likelihood) if self.missing else likelihood

    def extra_repr(self) -> str:
        return "missing=True" if self.missing else ""


class Normal(_Decoder):
    r""":math:`p(x \mid z) = N(\mu(z), \mathrm{diag}\,\sigma^2)`, a density with respect to Lebesgue measure.

    With a fixed scale, -log p is the squared error that many texts minimise, up to a constant, see :meth:`mse`:
    :math:`-\log p(x \mid z) = \frac{1}{2\sigma^2}\lVert x - \mu(z)\rVert^2 + \frac{D}{2}\log 2\pi\sigma^2`.

    Args:
        latent: size or shape of z.
        out_features: size or shape of x.
        network: factory, see :mod:`pyro_vae.parts.networks`.
        scale: ``"shared"`` (one learned number), ``"per_dimension"``, ``"network"`` (a function of z), or a fixed one.
        min_scale: floor of a learned scale, in the units of x; without it, the density of constant data is unbounded.
        missing: whether NaN in x is a missing entry; by default it is an error.

    >>> Normal(1, 2, networks.linear(), scale=0.1)(torch.zeros(5, 1)).stddev[0]
    tensor([0.1000, 0.1000])
    """

    def __init__(
        self,
        latent: Shape,
        out_features: Shape,
        network: NetworkFactory,
        scale: str | float = "shared",
        min_scale: float = 1e-3,
        missing: bool = False,
    ):
        super().__init__(families.Normal(out_features, scale, min_scale), latent, network, missing)

    @classmethod
    def mse(
        cls, latent: Shape, out_features: Shape, network: NetworkFactory, kl_weight: float, missing: bool = False
    ) -> "Normal":
        r"""The likelihood behind the loss "mean-squared error plus weight times KL": a normal of fixed scale.

        With the mean over the D elements of x, and the KL of a datum summed over its latents,

        .. math:: \frac1D \lVert x - \mu(z) \rVert^2 + w\,\mathrm{KL}
                  = -w \Bigl(\log N(x; \mu(z), \sigma^2 I) - \mathrm{KL} + \tfrac D2 \log 2\pi\sigma^2\Bigr),
                  \qquad \sigma^2 = \frac{wD}{2}.

        To choose the weight is to choose σ. For a sum of squared errors in place of their mean, σ² is w/2.

        Args:
            kl_weight: w, positive.

        >>> Normal.mse(2, 784, networks.linear(), kl_weight=0.01)(torch.zeros(1, 2)).stddev[0, 0]
        tensor(1.9799)
        """
        variance = positive(kl_weight, "kl_weight") * as_shape(out_features, "out_features").numel() / 2
        return cls(latent, out_features, network, scale=math.sqrt(variance), missing=missing)


class LogNormal(_Decoder):
    r""":math:`\log x_d \sim N(\mu_d(z), \sigma_d^2)`, a density for positive amounts, such as incomes.

    The scale and its floor are those of :math:`\log x`: a scale of 0.1 is an error of about 10 %.

    Raises:
        ValueError: for data with zeros or negative numbers; the message names the alternatives.

    >>> LogNormal(1, 2, networks.linear(), scale=0.1)(torch.zeros(5, 1)).log_prob(torch.ones(5, 2)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        latent: Shape,
        out_features: Shape,
        network: NetworkFactory,
        scale: str | float = "shared",
        min_scale: float = 1e-3,
        missing: bool = False,
    ):
        super().__init__(families.LogNormal(out_features, scale, min_scale), latent, network, missing)


class StudentT(_Decoder):
    r""":math:`p(x \mid z) = \prod_d t_\nu(x_d;\ \mu_d(z), \sigma_d)`, a density for numbers with outliers.

    A large error costs the logarithm of its size, not its square, so that a few outliers do not determine :math:`\mu`.

    Args:
        df: degrees of freedom: ``"shared"`` (the default), ``"per_dimension"`` or ``"network"``, learned and above 2;
            or a fixed positive number. At or below 1 the mean is NaN.

    Source: Lange, Little and Taylor 1989, "Robust statistical modeling using the t distribution".

    >>> StudentT(1, 2, networks.linear(), df=4.0, scale=0.1)(torch.zeros(5, 1)).variance[0]
    tensor([0.0200, 0.0200])
    """

    def __init__(
        self,
        latent: Shape,
        out_features: Shape,
        network: NetworkFactory,
        df: str | float = "shared",
        scale: str | float = "shared",
        min_scale: float = 1e-3,
        missing: bool = False,
    ):
        super().__init__(families.StudentT(out_features, df, scale, min_scale), latent, network, missing)


class Bernoulli(_Decoder):
    r""":math:`p(x \mid z) = \prod_d \pi_d(z)^{x_d} (1 - \pi_d(z))^{1 - x_d}`, a mass on 0s and 1s.

    Args:
        soft_targets: accept grey values in [0, 1] and score them with the cross-entropy. That is **no likelihood**:
            exact evidence raises an error, and training reports a surrogate instead of an ELBO.

    Raises:
        ValueError: for data other than 0 and 1 without ``soft_targets``; the message names the alternatives.

    >>> Bernoulli(2, (8, 8), networks.mlp([32]))(torch.zeros(5, 2)).event_shape
    torch.Size([8, 8])
    """

    def __init__(
        self,
        latent: Shape,
        out_features: Shape,
        network: NetworkFactory,
        soft_targets: bool = False,
        missing: bool = False,
    ):
        family = families.SoftTargetBernoulli if boolean(soft_targets, "soft_targets") else families.Bernoulli
        super().__init__(family(out_features), latent, network, missing)


class ContinuousBernoulli(_Decoder):
    r"""A density on [0, 1] for grey values, :math:`p(x \mid z) \propto \pi(z)^{x} (1 - \pi(z))^{1 - x}`.

    Source: Loaiza-Ganem and Cunningham 2019.

    >>> ContinuousBernoulli(2, 64, networks.linear())(torch.zeros(5, 2)).log_prob(torch.rand(5, 64)).shape
    torch.Size([5])
    """

    def __init__(self, latent: Shape, out_features: Shape, network: NetworkFactory, missing: bool = False):
        super().__init__(families.ContinuousBernoulli(out_features), latent, network, missing)


class Categorical(_Decoder):
    r""":math:`p(x \mid z) = \prod_d \pi_{d, x_d}(z)`, a mass on class numbers 0 to k - 1.

    The data are class numbers, ``(N, D)``, in the dtype of the network, not one-hot vectors. For the encoder,
    :func:`pyro_vae.parts.networks.one_hot` turns them into one-hot vectors. The ``mean`` is that of the class number,
    useful where classes are ordered; ``probs`` of ``base_dist`` are the probabilities.

    Args:
        num_classes: k, the same for every entry.

    >>> Categorical(1, 2, 3, networks.linear())(torch.zeros(5, 1)).log_prob(torch.ones(5, 2)).shape
    torch.Size([5])
    """

    def __init__(
        self, latent: Shape, out_features: Shape, num_classes: int, network: NetworkFactory, missing: bool = False
    ):
        super().__init__(families.Categorical(out_features, num_classes), latent, network, missing)


class Ordinal(_Decoder):
    r""":math:`P(x_d \le j \mid z) = \sigma(c_{d,j+1} - \eta_d(z))`, a mass on ordered levels 0 to k - 1.

    The network gives the location :math:`\eta_d`, one number for each entry. The cut points :math:`c_d` are learned,
    and do not depend on z. The data are level numbers, as the class numbers of :class:`Categorical`.

    Args:
        num_levels: k, the same for every entry.

    Source: McCullagh 1980, "Regression models for ordinal data", the proportional-odds model.

    >>> Ordinal(1, 2, 5, networks.linear())(torch.zeros(5, 1)).log_prob(torch.ones(5, 2)).shape
    torch.Size([5])
    """

    def __init__(
        self, latent: Shape, out_features: Shape, num_levels: int, network: NetworkFactory, missing: bool = False
    ):
        super().__init__(families.Ordinal(out_features, num_levels), latent, network, missing)


class DiscretizedLogisticMixture(_Decoder):
    r"""A mass on the levels 0 to k - 1 of colours: logistic variables, rounded to levels, and mixed.

    .. math:: P(x_d \mid z) = \sum_i \pi_{di} \Big[\sigma\Big(\frac{x_d + 1/2 - \mu_{di}}{s_{di}}\Big)
              - \sigma\Big(\frac{x_d - 1/2 - \mu_{di}}{s_{di}}\Big)\Big],

    exact at the two last levels, see :class:`pyro_vae.distributions.DiscretizedLogisticMixture`. It needs fewer outputs
    of the network than :class:`Categorical`, and neighbouring levels are alike. The data are bytes as floats,
    ``x.float()``. With D entries, bits per dimension are :math:`-\log p(x) / (D \log 2)`.

    Args:
        num_levels: k.
        num_components: components of each entry. With one, the network has two outputs for each entry; with m, 3 m.
            They are further channels of an image, see :func:`pyro_vae.parts.networks.deconvolutional`.
        min_scale: floor of the scales :math:`s`, in levels.

    Source: Salimans, Karpathy, Chen and Kingma 2017, "PixelCNN++", section 2.1; without its autoregression.

    >>> decoder = DiscretizedLogisticMixture(2, (3, 8, 8), networks.deconvolutional((3, 8, 8)))
    >>> decoder(torch.zeros(5, 2)).log_prob(torch.full((5, 3, 8, 8), 255.0)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        latent: Shape,
        out_features: Shape,
        network: NetworkFactory,
        num_levels: int = 256,
        num_components: int = 1,
        min_scale: float = 0.1,
        missing: bool = False,
    ):
        family = families.DiscretizedLogisticMixture(out_features, num_levels, num_components, min_scale)
        super().__init__(family, latent, network, missing)


class Poisson(_Decoder):
    r""":math:`p(x \mid z) = \prod_d \lambda_d(z)^{x_d} e^{-\lambda_d(z)} / x_d!`, a mass on counts 0, 1, 2, ...

    The network gives :math:`\log\lambda`. Mean and variance are equal: counts that vary more, as most do, need
    :class:`NegativeBinomial`.

    >>> Poisson(1, 3, networks.linear())(torch.zeros(5, 1)).sample().shape
    torch.Size([5, 3])
    """

    def __init__(self, latent: Shape, out_features: Shape, network: NetworkFactory, missing: bool = False):
        super().__init__(families.Poisson(out_features), latent, network, missing)


class NegativeBinomial(_Decoder):
    r"""A mass on counts of mean :math:`\mu_d(z)` and variance :math:`\mu_d + \alpha\mu_d^2`.

    The network gives :math:`\log\mu`. A dispersion :math:`\alpha` near 0 is :class:`Poisson`.

    Args:
        dispersion: ``"shared"`` (the default), ``"per_dimension"``, ``"network"`` or a positive number, see ``scale``.

    Source: Lopez, Regier, Cole, Jordan and Yosef 2018, "Deep generative modeling for single-cell transcriptomics".

    >>> NegativeBinomial(1, 3, networks.linear(), dispersion="per_dimension")(torch.zeros(5, 1)).sample().shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        latent: Shape,
        out_features: Shape,
        network: NetworkFactory,
        dispersion: str | float = "shared",
        missing: bool = False,
    ):
        super().__init__(families.NegativeBinomial(out_features, dispersion), latent, network, missing)


class ZeroInflatedPoisson(_Decoder):
    r"""A mass on counts with more zeros than a :class:`Poisson` has: zero with the probability :math:`\pi_d(z)`.

    .. math:: p(x_d \mid z) = \pi_d\,[x_d = 0] + (1 - \pi_d)\,\mathrm{Poisson}(x_d; \lambda_d(z)).

    Args:
        gate: :math:`\pi`: ``"network"`` (the default), ``"shared"`` or ``"per_dimension"``, or a fixed probability.

    Source: Lambert 1992, "Zero-inflated Poisson regression".

    >>> ZeroInflatedPoisson(1, 3, networks.linear(), gate="per_dimension")(torch.zeros(5, 1)).sample().shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        latent: Shape,
        out_features: Shape,
        network: NetworkFactory,
        gate: str | float = "network",
        missing: bool = False,
    ):
        family = families.ZeroInflated(families.Poisson(out_features), gate)
        super().__init__(family, latent, network, missing)


class ZeroInflatedNegativeBinomial(_Decoder):
    r"""A mass on counts with more zeros than a :class:`NegativeBinomial` has, see :class:`ZeroInflatedPoisson`.

    Args:
        dispersion: as of :class:`NegativeBinomial`.
        gate: as of :class:`ZeroInflatedPoisson`.

    Source: Lopez, Regier, Cole, Jordan and Yosef 2018, "Deep generative modeling for single-cell transcriptomics".

    >>> ZeroInflatedNegativeBinomial(1, 3, networks.linear())(torch.zeros(5, 1)).sample().shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        latent: Shape,
        out_features: Shape,
        network: NetworkFactory,
        dispersion: str | float = "shared",
        gate: str | float = "network",
        missing: bool = False,
    ):
        family = families.ZeroInflated(families.NegativeBinomial(out_features, dispersion), gate)
        super().__init__(family, latent, network, missing)


class Columns(_Decoder):
    r""":math:`p(x \mid z) = \prod_d p_d(x_d \mid z)`, a table whose columns have each a likelihood of its own kind.

    The data are one tensor of floats, ``(N, D)``: classes and levels are numbers 0 to k - 1, counts whole numbers, and
    NaN a missing entry. One network gives the raw outputs of all columns. The distribution is a
    :class:`pyro_vae.distributions.Columns`: ``p["sex"]`` is that of one column.

    Args:
        columns: families of one variable, ``families.Normal(1, scale="shared")``, ``families.StudentT(1)``,
            ``families.LogNormal(1)``, ``families.Poisson(1)``, ``families.NegativeBinomial(1)``,
            ``families.ZeroInflated(families.Poisson(1))``, ``families.Bernoulli(1)``, ``families.Categorical(1, k)`` or
            ``families.Ordinal(1, k)``, by the names of the columns, in the order of the columns of x; or a sequence.
        missing: whether NaN in x is a missing entry, as it is by default; if not, it is an error.

    Raises:
        ValueError: for data outside of a column's support; the message names the column and the row.

    Source: Nazábal, Olmos, Ghahramani and Valera 2020, "Handling incomplete heterogeneous data using VAEs".

    >>> columns = {"height": families.Normal(1, scale="shared"), "sex": families.Bernoulli(1)}
    >>> p = Columns(2, columns, networks.linear())(torch.zeros(5, 2))
    >>> p.log_prob(torch.tensor([[torch.nan, 1.0]])).shape, p["sex"].event_shape
    (torch.Size([5]), torch.Size([1]))
    """

    def __init__(
        self,
        latent: Shape,
        columns: Mapping[str, Family] | Sequence[Family],
        network: NetworkFactory,
        missing: bool = True,
    ):
        super().__init__(families.Columns(columns), latent, network, missing)
