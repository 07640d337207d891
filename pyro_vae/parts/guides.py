"""Guides q(z | x), also called encoders: parts with the datum as their context."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae._utils.validation import as_shape, data_tensors, describe, positive_int
from pyro_vae.parts import families
from pyro_vae.parts.base import Conditional, Part, checked_family, checked_raw
from pyro_vae.parts.families import multivariate
from pyro_vae.parts.families.base import Family
from pyro_vae.parts.networks import NetworkFactory, build

__all__ = [
    "Bernoulli",
    "DiagonalNormal",
    "FullRankNormal",
    "GumbelSoftmax",
    "InverseAutoregressiveFlow",
    "LogNormal",
    "LogitNormal",
    "LowRankNormal",
    "MixtureOfNormals",
    "OneHotCategorical",
    "PerDatum",
    "RelaxedBernoulli",
    "SplineFlow",
]


class _Encoder(Conditional):
    def __init__(self, family: Family, in_features: int | Sequence[int], network: NetworkFactory):
        features = as_shape(in_features, "in_features").numel()
        super().__init__(family, in_features, build(network, features, family.num_raw))


class DiagonalNormal(_Encoder):
    r""":math:`q(z \mid x) = N(\mu(x), \mathrm{diag}\,\sigma(x)^2)`.

    Args:
        in_features: size or shape of x.
        latent: size or shape of z.
        network: factory, see :mod:`pyro_vae.parts.networks`.

    Source: Kingma and Welling 2014, "Auto-encoding variational Bayes", section 3.

    >>> import torch
    >>> from pyro_vae import networks
    >>> DiagonalNormal(2, 1, networks.mlp([32]))(torch.zeros(5, 2)).event_shape
    torch.Size([1])
    """

    def __init__(self, in_features: int | Sequence[int], latent: int | Sequence[int], network: NetworkFactory):
        super().__init__(families.Normal(latent), in_features, network)


class LogNormal(_Encoder):
    r"""Positive variables, :math:`\log z_d \sim N(\mu_d(x), \sigma_d(x)^2)`, for a prior such as ``priors.Gamma``.

    Args:
        in_features: size or shape of x.
        latent: size or shape of z.
        network: factory, see :mod:`pyro_vae.parts.networks`.

    >>> import torch
    >>> from pyro_vae import networks
    >>> bool((LogNormal(2, 3, networks.linear())(torch.zeros(5, 2)).sample() > 0).all())
    True
    """

    def __init__(self, in_features: int | Sequence[int], latent: int | Sequence[int], network: NetworkFactory):
        super().__init__(families.LogNormal(latent), in_features, network)


class LogitNormal(_Encoder):
    r"""Variables in a box, :math:`\mathrm{logit}\frac{z_d - a_d}{b_d - a_d} \sim N(\mu_d(x), \sigma_d(x)^2)`.

    For a prior on the same box, such as ``priors.Uniform``.

    Args:
        in_features: size or shape of x.
        latent: size or shape of z.
        network: factory, see :mod:`pyro_vae.parts.networks`.
        low: lower corner a, a number or a tensor that expands to the shape of z.
        high: upper corner b, above a.

    >>> import torch
    >>> from pyro_vae import networks
    >>> LogitNormal(2, 3, networks.linear(), low=-1.0, high=1.0)(torch.zeros(5, 2)).event_shape
    torch.Size([3])
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        latent: int | Sequence[int],
        network: NetworkFactory,
        low: float | Tensor = 0.0,
        high: float | Tensor = 1.0,
    ):
        super().__init__(families.LogitNormal(latent, low, high), in_features, network)


class FullRankNormal(_Encoder):
    r""":math:`q(z \mid x) = N(\mu(x), L(x) L(x)^\top)`, with all correlations.

    The network has D(D + 3)/2 outputs: for tens of dimensions take :class:`LowRankNormal`.

    Args:
        in_features: size or shape of x.
        latent: size of z, D.
        network: factory, see :mod:`pyro_vae.parts.networks`.

    >>> import torch
    >>> from pyro_vae import networks
    >>> FullRankNormal(2, 3, networks.linear())(torch.zeros(5, 2)).covariance_matrix.shape
    torch.Size([5, 3, 3])
    """

    def __init__(self, in_features: int | Sequence[int], latent: int, network: NetworkFactory):
        super().__init__(multivariate.FullRankNormal(latent), in_features, network)


class LowRankNormal(_Encoder):
    r""":math:`q(z \mid x) = N(\mu(x), W(x) W(x)^\top + \mathrm{diag}\,\sigma(x)^2)`.

    Args:
        in_features: size or shape of x.
        latent: size of z, D.
        network: factory, see :mod:`pyro_vae.parts.networks`.
        rank: columns of W, from 1 to D.

    Source: Ong, Nott and Smith 2018, "Gaussian variational approximation with a factor covariance structure".

    >>> import torch
    >>> from pyro_vae import networks
    >>> LowRankNormal(2, 3, networks.linear(), rank=1)(torch.zeros(5, 2)).event_shape
    torch.Size([3])
    """

    def __init__(self, in_features: int | Sequence[int], latent: int, network: NetworkFactory, rank: int = 1):
        super().__init__(multivariate.LowRankNormal(latent, rank), in_features, network)


class MixtureOfNormals(_Encoder):
    r""":math:`q(z \mid x) = \sum_k \pi_k(x)\,N(\mu_k(x), \mathrm{diag}\,\sigma_k(x)^2)`.

    For posteriors of several modes. Draws are pathwise in the weights of the components too, as long as the components
    touch: those more than 8 scales apart find their places, but keep the weights that they had when they parted, see
    :class:`pyro_vae.distributions.mixture.MixtureOfNormals`.

    Args:
        in_features: size or shape of x.
        latent: size of z, D.
        network: factory, see :mod:`pyro_vae.parts.networks`.
        num_components: K.

    Source: Graves 2016, "Stochastic backpropagation through mixture density distributions"; Figurnov, Mohamed and Mnih
    2018, "Implicit reparameterization gradients".

    >>> import torch
    >>> from pyro_vae import networks
    >>> MixtureOfNormals(2, 3, networks.linear(), num_components=4)(torch.zeros(5, 2)).has_rsample
    True
    """

    def __init__(self, in_features: int | Sequence[int], latent: int, network: NetworkFactory, num_components: int = 2):
        super().__init__(multivariate.MixtureOfNormals(latent, num_components), in_features, network)


class PerDatum(Part):
    r"""Not amortized: raw outputs of its own for each datum, :math:`q_i(z) = q(z;\ \lambda_i)`.

    The best guide of its family for each datum, at the price of a search for each: new data need a new one. It is in
    the place of an encoder, and takes from x only how many rows there are; inside a subsampled data plate it takes the
    rows that the plate does.

    Args:
        family: of q, such as ``families.Normal(2)``.
        raw: the raw outputs to start from, ``(N, family.num_raw)``, or the number of data N, to start where the family
            does: at zeros, and a mixture at locations from :math:`N(0, I)`.

    Source: Hoffman, Blei, Wang and Paisley 2013, "Stochastic variational inference"; on the gap to an amortized guide,
    Cremer, Li and Duvenaud 2018, "Inference suboptimality in variational autoencoders".

    >>> import pyro_vae as pv
    >>> from pyro_vae import families, likelihoods, networks, priors
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(2),
    ...     encoder=PerDatum(families.Normal(2), 50),
    ...     decoder=likelihoods.Normal(2, 3, networks.linear()),
    ... )
    >>> fitted = pv.fit(vae.model, vae.guide, torch.randn(50, 3), epochs=5, batch_size=20)
    """

    def __init__(self, family: Family, raw: Tensor | int):
        super().__init__()
        self.family = checked_family(family)
        if isinstance(raw, Tensor):
            if checked_raw(raw, family, lead="N").dim() != 2:
                raise ValueError(f"`raw` must be (N, {family.num_raw}), for {family}, got shape {tuple(raw.shape)}")
            self.raw = raw if isinstance(raw, nn.Parameter) else nn.Parameter(raw.detach().clone())
        else:
            self.raw = nn.Parameter(family.start(positive_int(raw, "raw")))

    @classmethod
    def refining(cls, encoder: Conditional, x: Tensor) -> "PerDatum":
        """Start from what an amortized guide says of these data, to close the gap that amortization leaves.

        Freeze the rest, and the ELBO of these very data is the tightest that the family has:

        >>> import pyro_vae as pv
        >>> from pyro_vae import guides, likelihoods, networks, priors
        >>> vae = pv.VAE(
        ...     prior=priors.StandardNormal(2),
        ...     encoder=guides.DiagonalNormal(3, 2, networks.linear()),
        ...     decoder=likelihoods.Normal(2, 3, networks.linear()).requires_grad_(False),
        ... )
        >>> x = torch.randn(50, 3)
        >>> refined = pv.VAE(vae.prior, PerDatum.refining(vae.encoder, x), vae.decoder)
        >>> fitted = pv.fit(refined.model, refined.guide, x, epochs=5)
        """
        if not isinstance(encoder, Conditional):
            raise TypeError(f"`encoder` must be an amortized guide of this package, got {describe(encoder)}")
        with torch.no_grad():
            raw = encoder.raw_outputs(*data_tensors((x,), "x"))
        return cls(encoder.family, raw)

    @property
    def num_data(self) -> int:
        """N."""
        return len(self.raw)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        """q of each datum, or of those in the subsample of the plate around it."""
        raw = pyro.subsample(self.raw, event_dim=1)
        if context is not None and len(context) != len(raw):
            raise ValueError(
                f"`PerDatum` must be the {self.num_data} data that it was made for, got {len(context)} rows"
            )
        return self.family(raw)

    def discrete(self) -> "PerDatum":
        """The discrete twin, with the same raw outputs."""
        return PerDatum(self._discrete_family(), self.raw)

    def extra_repr(self) -> str:
        """N."""
        return f"num_data={self.num_data}"


class _FlowEncoder(_Encoder):
    """A flow that is fast to draw from, with shift, scale and context from the network."""

    kind: str

    def __init__(
        self,
        in_features: int | Sequence[int],
        latent: int | Sequence[int],
        network: NetworkFactory,
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
        context: int = 16,
    ):
        family = multivariate.Flow(latent, self.kind, transforms, hidden, context, inverse=True)
        super().__init__(family, in_features, network)


class InverseAutoregressiveFlow(_FlowEncoder):
    r""":math:`z = \mu(x) + \sigma(x) \odot f(\epsilon; h(x))`, with noise :math:`\epsilon \sim N(0, I)`.

    The steps of f are autoregressive, and affine in each variable.
    The network gives :math:`\mu`, :math:`\sigma` and a context h, which every step reads. Before f is trained, this is
    :class:`DiagonalNormal`. Kingma et al. apply :math:`\mu` and :math:`\sigma` before f; either way the first or the
    last affine step can take them in, and the family is the same. Of a single variable it is a normal again: take
    :class:`SplineFlow` there.

    A draw and its density are one pass through the steps. The density of any other value takes as many as z has
    variables: it is met in exact answers and in ``objectives.ImportanceWeighted`` with other gradients than
    ``"pathwise"``. There is no KL in closed form: ``TraceMeanField_ELBO`` falls back on the draws.

    Args:
        in_features: size or shape of x.
        latent: size or shape of z.
        network: factory, see :mod:`pyro_vae.parts.networks`.
        transforms: number of autoregressive steps, each in the reverse order of the last.
        hidden: sizes of the hidden layers of each step's network.
        context: size of h; at 0 the steps are the same for every x.

    Raises:
        ImportError: if zuko is not installed: ``pip install 'pyro-vae[flows]'``.

    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling 2016, "Improved variational inference with inverse
    autoregressive flow", algorithm 1.

    >>> import torch
    >>> from pyro_vae import networks
    >>> q = InverseAutoregressiveFlow(5, 2, networks.mlp([32]))(torch.zeros(7, 5))
    >>> z = q.rsample()
    >>> z.shape, q.log_prob(z).shape
    (torch.Size([7, 2]), torch.Size([7]))
    """

    kind = "affine"


class SplineFlow(_FlowEncoder):
    r""":math:`z = \mu(x) + \sigma(x) \odot f(\epsilon; h(x))` with f autoregressive, a spline in each variable.

    As :class:`InverseAutoregressiveFlow`, with rational-quadratic splines in the place of affine maps. They make
    several modes of one, of a single variable too.

    Args:
        in_features: size or shape of x.
        latent: size or shape of z.
        network: factory, see :mod:`pyro_vae.parts.networks`.
        transforms: number of autoregressive steps, each in the reverse order of the last.
        hidden: sizes of the hidden layers of each step's network.
        context: size of h; at 0 the steps are the same for every x.

    Raises:
        ImportError: if zuko is not installed: ``pip install 'pyro-vae[flows]'``.

    Source: Durkan, Bekasov, Murray and Papamakarios 2019, "Neural spline flows".

    >>> import torch
    >>> from pyro_vae import networks
    >>> SplineFlow(5, 1, networks.mlp([32]))(torch.zeros(7, 5)).rsample().shape
    torch.Size([7, 1])
    """

    kind = "spline"


class Bernoulli(_Encoder):
    r"""Independent :math:`q(z_j \mid x) = \mathrm{Bernoulli}(\pi_j(x))`.

    Under ``TraceEnum_ELBO`` and ``config_enumerate(vae.guide)`` the ELBO is a sum over all states; under
    ``Trace_ELBO`` its gradient is the score-function estimator.

    Args:
        in_features: size or shape of x.
        latent: number of variables.
        network: factory, see :mod:`pyro_vae.parts.networks`.

    >>> import torch
    >>> from pyro_vae import networks
    >>> Bernoulli(2, 3, networks.linear())(torch.zeros(5, 2)).sample().shape
    torch.Size([5, 3])
    """

    def __init__(self, in_features: int | Sequence[int], latent: int | Sequence[int], network: NetworkFactory):
        super().__init__(families.Bernoulli(latent), in_features, network)


class OneHotCategorical(_Encoder):
    r"""Independent one-hot variables, :math:`q(z_j \mid x) = \mathrm{Categorical}(\pi_j(x))`.

    Args:
        in_features: size or shape of x.
        latent: ``(n, k)``, n variables of k classes.
        network: factory, see :mod:`pyro_vae.parts.networks`.

    >>> import torch
    >>> from pyro_vae import networks
    >>> OneHotCategorical(2, (1, 3), networks.linear())(torch.zeros(5, 2)).sample().shape
    torch.Size([5, 1, 3])
    """

    def __init__(self, in_features: int | Sequence[int], latent: Sequence[int], network: NetworkFactory):
        super().__init__(families.OneHotCategorical(latent), in_features, network)


class RelaxedBernoulli(_Encoder):
    r"""Independent relaxed Bernoulli variables with logits from the network; the site is in logit space.

    Args:
        in_features: size or shape of x.
        latent: number of variables.
        network: factory, see :mod:`pyro_vae.parts.networks`.
        temperature: :math:`\lambda > 0`. Maddison et al. 2017 use 2/3 here with 1/2 in the prior.

    >>> import torch
    >>> from pyro_vae import networks
    >>> RelaxedBernoulli(2, 3, networks.linear(), temperature=0.66)(torch.zeros(5, 2)).has_rsample
    True
    """

    def __init__(
        self, in_features: int | Sequence[int], latent: int | Sequence[int], network: NetworkFactory, temperature: float
    ):
        super().__init__(families.RelaxedBernoulli(latent, temperature), in_features, network)


class GumbelSoftmax(_Encoder):
    r"""Independent relaxed one-hot variables with logits from the network; the site is on the log-simplex.

    Args:
        in_features: size or shape of x.
        latent: ``(n, k)``, n variables of k classes.
        network: factory, see :mod:`pyro_vae.parts.networks`.
        temperature: :math:`\lambda > 0`.

    >>> import torch
    >>> from pyro_vae import networks
    >>> GumbelSoftmax(2, (1, 3), networks.linear(), temperature=0.5)(torch.zeros(5, 2)).sample().exp().sum(-1).shape
    torch.Size([5, 1])
    """

    def __init__(
        self, in_features: int | Sequence[int], latent: Sequence[int], network: NetworkFactory, temperature: float
    ):
        super().__init__(families.RelaxedOneHotCategorical(latent, temperature), in_features, network)
