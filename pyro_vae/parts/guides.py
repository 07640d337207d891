"""Guides q(z | x), also called encoders: parts whose context is the datum.

Arguments that a guide does not describe are those of :class:`DiagonalNormal`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae._utils.data import data_tensors
from pyro_vae._utils.typing import Shape
from pyro_vae._utils.validation import as_shape, describe, positive_int
from pyro_vae.distributions.mixture import MixtureOfNormals as Mixture
from pyro_vae.distributions.properties import without_independent
from pyro_vae.parts import families, networks
from pyro_vae.parts.base import Conditional, Part, Unconditional, checked_amortized, checked_family, checked_raw
from pyro_vae.parts.families import multivariate
from pyro_vae.parts.families.base import Family
from pyro_vae.parts.networks import NetworkFactory

__all__ = ["Bernoulli", "DiagonalNormal", "FullRankNormal", "GumbelSoftmax", "InverseAutoregressiveFlow"]
__all__ += ["LogNormal", "LogitNormal", "LowRankNormal", "MixtureOfExperts", "MixtureOfNormals", "OneHotCategorical"]
__all__ += ["PerDatum", "ProductOfExperts", "RelaxedBernoulli", "SplineFlow"]


class _Encoder(Conditional):
    def __init__(self, family: Family, in_features: Shape, network: NetworkFactory):
        features = as_shape(in_features, "in_features").numel()
        super().__init__(family, in_features, networks.build(network, features, family.num_raw))


class DiagonalNormal(_Encoder):
    r""":math:`q(z \mid x) = N(\mu(x), \mathrm{diag}\,\sigma(x)^2)`.

    Args:
        in_features: size or shape of x.
        latent: size or shape of z.
        network: factory, see :mod:`pyro_vae.parts.networks`.

    Source: Kingma and Welling 2014, "Auto-encoding variational Bayes", section 3.

    >>> DiagonalNormal(2, 1, networks.mlp([32]))(torch.zeros(5, 2)).event_shape
    torch.Size([1])
    """

    def __init__(self, in_features: Shape, latent: Shape, network: NetworkFactory):
        super().__init__(families.Normal(latent), in_features, network)


class LogNormal(_Encoder):
    r"""Positive variables, :math:`\log z_d \sim N(\mu_d(x), \sigma_d(x)^2)`, for a prior such as ``priors.Gamma``.

    >>> bool((LogNormal(2, 3, networks.linear())(torch.zeros(5, 2)).sample() > 0).all())
    True
    """

    def __init__(self, in_features: Shape, latent: Shape, network: NetworkFactory):
        super().__init__(families.LogNormal(latent), in_features, network)


class LogitNormal(_Encoder):
    r"""Variables in a box, :math:`\mathrm{logit}\frac{z_d - a_d}{b_d - a_d} \sim N(\mu_d(x), \sigma_d(x)^2)`.

    Args:
        low: lower corner a of the box, that of the prior: a number or a tensor that expands to the shape of z.
        high: upper corner b, above a.

    >>> LogitNormal(2, 3, networks.linear(), low=-1.0, high=1.0)(torch.zeros(5, 2)).event_shape
    torch.Size([3])
    """

    def __init__(
        self,
        in_features: Shape,
        latent: Shape,
        network: NetworkFactory,
        low: float | Tensor = 0.0,
        high: float | Tensor = 1.0,
    ):
        super().__init__(families.LogitNormal(latent, low, high), in_features, network)


class FullRankNormal(_Encoder):
    r""":math:`q(z \mid x) = N(\mu(x), L(x) L(x)^\top)`, with all correlations.

    Before training it is near :class:`DiagonalNormal`, and its correlations move slowly: the noise of training in so
    many of them would cost more than they gain. The network has D(D + 3)/2 outputs, 560 for D = 32 dimensions; for
    hundreds of dimensions use :class:`LowRankNormal`.

    >>> FullRankNormal(2, 3, networks.linear())(torch.zeros(5, 2)).covariance_matrix.shape
    torch.Size([5, 3, 3])
    """

    def __init__(self, in_features: Shape, latent: int, network: NetworkFactory):
        super().__init__(multivariate.FullRankNormal(latent), in_features, network)


class LowRankNormal(_Encoder):
    r""":math:`q(z \mid x) = N(\mu(x), W(x) W(x)^\top + \mathrm{diag}\,\sigma(x)^2)`.

    Before training it is near :class:`DiagonalNormal`, as :class:`FullRankNormal` is.

    Args:
        rank: columns of W, from 1 to the size of z.

    Source: Ong, Nott and Smith 2018, "Gaussian variational approximation with a factor covariance structure".

    >>> LowRankNormal(2, 3, networks.linear(), rank=1)(torch.zeros(5, 2)).event_shape
    torch.Size([3])
    """

    def __init__(self, in_features: Shape, latent: int, network: NetworkFactory, rank: int = 1):
        super().__init__(multivariate.LowRankNormal(latent, rank), in_features, network)


class MixtureOfNormals(_Encoder):
    r""":math:`q(z \mid x) = \sum_k \pi_k(x)\,N(\mu_k(x), \mathrm{diag}\,\sigma_k(x)^2)`.

    It fits posteriors of several modes. Draws carry gradients to the weights too, as long as the components overlap:
    the weights of components more than 8 scales apart do not change any more, see
    :class:`pyro_vae.distributions.mixture.MixtureOfNormals`.

    Args:
        num_components: K.

    Source: Graves 2016, "Stochastic backpropagation through mixture density distributions"; Figurnov, Mohamed and Mnih
    2018, "Implicit reparameterization gradients".

    >>> MixtureOfNormals(2, 3, networks.linear(), num_components=4)(torch.zeros(5, 2)).has_rsample
    True
    """

    def __init__(self, in_features: Shape, latent: int, network: NetworkFactory, num_components: int = 2):
        super().__init__(multivariate.MixtureOfNormals(latent, num_components), in_features, network)


class _Experts(nn.Module):
    """The normals of several experts, each given its modality, and last that of the prior, which is given nothing."""

    def __init__(self, experts: Sequence[Conditional], prior: Unconditional):
        super().__init__()
        self.experts, self.prior = nn.ModuleList(experts), prior
        self.shapes = [expert.context_shape for expert in experts]
        self.sizes = [shape.numel() for shape in self.shapes]

    def _normals(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which modalities are missing, ``(*, M)``, and locations and log-scales ``(*, M + 1, D)``."""
        batch, missing, moments = context.shape[:-1], [], []
        for expert, shape, modality in zip(self.experts, self.shapes, context.split(self.sizes, -1), strict=True):
            missing.append(modality.isnan().all(-1))
            # Zeros in place of NaN: the output is not used, but NaN would remain in its gradient.
            modality = modality.masked_fill(missing[-1][..., None], 0.0)
            moments.append(_moments(expert(modality.reshape(*batch, *shape)), batch))
        moments.append(_moments(self.prior(), batch))
        locs, log_scales = zip(*moments, strict=True)
        return torch.stack(missing, -1), torch.stack(locs, -2), torch.stack(log_scales, -2)


def _moments(normal: dist.TorchDistribution, batch: torch.Size) -> tuple[Tensor, Tensor]:
    """The location and log-scale of independent normals, ``(*batch, D)``."""
    base, size = without_independent(normal), normal.event_shape.numel()
    loc, log_scale = (value.reshape(*normal.batch_shape, size) for value in (base.loc, base.scale.log()))
    return loc.expand(*batch, size), log_scale.expand(*batch, size)


class _ProductNetwork(_Experts):
    """Raw outputs of the product: its location and log-scale."""

    def forward(self, context: Tensor) -> Tensor:
        missing, loc, log_scale = self._normals(context)
        absent = torch.cat([missing, torch.zeros_like(missing[..., :1])], -1)
        # Of log-precisions, since precisions overflow where an expert is very sure.
        log_precision = (-2 * log_scale).masked_fill(absent[..., None], -torch.inf)
        loc = (log_precision.softmax(-2) * loc).sum(-2)
        return torch.cat([loc, -0.5 * log_precision.logsumexp(-2)], -1)


class _MixtureNetwork(_Experts):
    """Raw outputs of the mixture: its logits, locations and log-scales."""

    def forward(self, context: Tensor) -> Tensor:
        missing, loc, log_scale = self._normals(context)
        absent = torch.cat([missing, ~missing.all(-1, keepdim=True)], -1)
        logits = torch.zeros_like(loc[..., 0]).masked_fill(absent, -torch.inf)
        return torch.cat([logits, loc.flatten(-2), log_scale.flatten(-2)], -1)


def _checked_experts(
    experts: Sequence[Conditional], prior: Unconditional | None
) -> tuple[list[Conditional], Unconditional]:
    """Return experts and prior if they are normals of one shape; the prior is N(0, I) by default."""
    must = "a list of guides with diagonal normals, such as guides.DiagonalNormal, one for each modality"
    if isinstance(experts, nn.Module | str | Tensor) or not isinstance(experts, Iterable):
        raise TypeError(f"`experts` must be {must}, got {describe(experts)}")
    found = list(experts)
    if not found:
        raise ValueError(f"`experts` must be {must}, got an empty list")
    for expert in found:
        if not isinstance(expert, Conditional) or type(expert.family) is not families.Normal:
            raise TypeError(f"`experts` must be {must}, got {describe(expert)}")
    shape = found[0].event_shape
    if other := [expert.event_shape for expert in found if expert.event_shape != shape]:
        raise ValueError(f"`experts` must have one latent shape, got {tuple(shape)} and {tuple(other[0])}")
    if prior is None:
        prior = Unconditional(families.Normal(shape))
    if not isinstance(prior, Unconditional) or type(prior.family) is not families.Normal:
        raise TypeError(f"`prior` must be a normal, such as priors.StandardNormal(2), got {describe(prior)}")
    if prior.event_shape != shape:
        must = f"have the latent shape of the experts, {tuple(shape)}"
        raise ValueError(f"`prior` must {must}, got {tuple(prior.event_shape)}")
    return found, prior


class ProductOfExperts(Conditional):
    r"""The guide of several modalities :math:`x_1, \dots, x_M`, each with an expert of its own, as a product,

    .. math:: q(z \mid x) \propto p(z) \prod_{m\ \mathrm{observed}} q_m(z \mid x_m),

    with :math:`q_m = N(\mu_m, \mathrm{diag}\,\sigma_m^2)`, and :math:`N(\mu_0, \mathrm{diag}\,\sigma_0^2)` the prior.
    It is normal again, its precision is the sum of theirs, and its mean their mean weighted by precision:

    .. math:: \sigma^{-2} = \sigma_0^{-2} + \sum_m \sigma_m^{-2}, \qquad
              \mu = \sigma^2 \Bigl(\sigma_0^{-2} \mu_0 + \sum_m \sigma_m^{-2} \mu_m\Bigr).

    Where modalities are independent given z, the posterior has this form too, with :math:`p(x_m \mid z)` as a function
    of z in place of the expert. So an expert is no approximate posterior: it is what its modality adds to the prior.

    The context is one tensor, the modalities next to each other, each of the size that its expert takes. A modality is
    missing in a row where **all its entries are NaN**, and its expert drops out of the product; without any modality,
    q is the prior. If some of its entries are NaN, the expert's network must accept them, such as
    ``networks.with_missing``. Training on rows with missing modalities, such as a ``transform`` that hides some, lets
    each expert learn to work without the others; it takes the place of the sub-sampled ELBOs of Wu and Goodman. An
    expert that has become vague has no influence, and then almost no gradient: if one does not learn, let the weight of
    the KL rise from 0 in the first epochs (:class:`pyro_vae.handlers.WeightKL`).

    Args:
        experts: guides with diagonal normals, one for each modality, in the order of the context.
        prior: :math:`p(z)`, a ``priors.StandardNormal``, by default, or the ``priors.Normal`` of the model.

    Source: Wu and Goodman 2018, "Multimodal generative models for scalable weakly-supervised learning", section 2.2.

    >>> image, label = DiagonalNormal(64, 2, networks.linear()), DiagonalNormal(1, 2, networks.linear())
    >>> q = ProductOfExperts([image, label])
    >>> x = torch.cat([torch.rand(5, 64), torch.full((5, 1), torch.nan)], -1)  # without labels
    >>> bool((q(x).stddev < 1).all())  # every expert makes the guide more certain
    True
    >>> q(torch.full((1, 65), torch.nan)).mean.abs()
    tensor([[0., 0.]], grad_fn=<AbsBackward0>)
    """

    def __init__(self, experts: Sequence[Conditional], prior: Unconditional | None = None):
        found, prior = _checked_experts(experts, prior)
        network = _ProductNetwork(found, prior)
        super().__init__(families.Normal(found[0].event_shape), sum(network.sizes), network)


class MixtureOfExperts(Conditional):
    r"""The guide of several modalities :math:`x_1, \dots, x_M`, each with an expert of its own, as a mixture,

    .. math:: q(z \mid x) = \frac{1}{M_\mathrm{observed}} \sum_{m\ \mathrm{observed}} q_m(z \mid x_m).

    Each expert alone must explain all modalities: an expert is an approximate posterior given its modality, and the
    guide with several modalities is no more certain than they are. Draws carry gradients to the experts; the weights
    are fixed. The context and missing modalities are those of :class:`ProductOfExperts`.

    Args:
        experts: as of :class:`ProductOfExperts`, with a latent of one dimension of sizes, ``(D,)``.
        prior: q where every modality is missing, as of :class:`ProductOfExperts`.

    Source: Shi, Siddharth, Paige and Torr 2019, "Variational mixture-of-experts autoencoders for multi-modal deep
    generative models", section 3. They draw from every expert in each step; here a draw takes one of them.

    >>> image, label = DiagonalNormal(64, 2, networks.linear()), DiagonalNormal(1, 2, networks.linear())
    >>> q = MixtureOfExperts([image, label])(torch.cat([torch.rand(5, 64), torch.full((5, 1), torch.nan)], -1))
    >>> q.logits.softmax(-1)[0]  # of the image, the label, and the prior
    tensor([1., 0., 0.])
    """

    def __init__(self, experts: Sequence[Conditional], prior: Unconditional | None = None):
        found, prior = _checked_experts(experts, prior)
        network = _MixtureNetwork(found, prior)
        family = multivariate.MixtureOfNormals(found[0].event_shape, len(found) + 1)
        super().__init__(family, sum(network.sizes), network)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        q: Any = super().forward(context)
        return Mixture(q.logits.detach(), q.loc, q.scale)  # its draws then need no gradient of the weights


class PerDatum(Part):
    r"""A guide with free raw outputs for each datum, not amortized, :math:`q_i(z) = q(z;\ \lambda_i)`.

    It can be the best guide of its family for each datum, but each new datum needs a new fit. It takes the role of an
    encoder and reads only the number of rows of x. Inside a subsampled data plate it takes the rows of the plate.

    Args:
        family: of q, such as ``families.Normal(2)``.
        raw: initial raw outputs, ``(N, family.num_raw)``, or the number of data N for those of ``family.start``:
            zeros, and for a mixture locations from :math:`N(0, I)`.

    Source: Hoffman, Blei, Wang and Paisley 2013, "Stochastic variational inference"; on the gap to an amortized guide,
    Cremer, Li and Duvenaud 2018, "Inference suboptimality in variational autoencoders".

    >>> import pyro_vae as pv
    >>> from pyro_vae import likelihoods, priors
    >>> encoder = PerDatum(families.Normal(2), 50)
    >>> vae = pv.VAE(priors.StandardNormal(2), encoder, likelihoods.Normal(2, 3, networks.linear()))
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
        """Start from the outputs of an amortized guide for these data, to close the amortization gap.

        With the other parts frozen, training finds the tightest ELBO of the family for these data:

        >>> import pyro_vae as pv
        >>> from pyro_vae import likelihoods, priors
        >>> decoder = likelihoods.Normal(2, 3, networks.linear()).requires_grad_(False)
        >>> vae = pv.VAE(priors.StandardNormal(2), DiagonalNormal(3, 2, networks.linear()), decoder)
        >>> x = torch.randn(50, 3)
        >>> refined = pv.VAE(vae.prior, PerDatum.refining(vae.encoder, x), vae.decoder)
        >>> fitted = pv.fit(refined.model, refined.guide, x, epochs=5)
        """
        with torch.no_grad():
            raw = checked_amortized(encoder).raw_outputs(*data_tensors((x,), "x"))
        return cls(encoder.family, raw)

    @property
    def num_data(self) -> int:
        return len(self.raw)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        """q of each datum, or of the rows in the subsample of the enclosing plate."""
        raw = pyro.subsample(self.raw, event_dim=1)
        if context is not None and len(context) != len(raw):
            must = f"the {self.num_data} data that it was made for"
            raise ValueError(f"the context of PerDatum must be {must}, got {len(context)} rows")
        return self.family(raw)

    def discrete(self) -> "PerDatum":
        return PerDatum(self._discrete_family(), self.raw)

    def extra_repr(self) -> str:
        return f"num_data={self.num_data}"


class _FlowEncoder(_Encoder):
    """A flow with fast draws. The network gives its shift, scale and context."""

    kind: str

    def __init__(
        self,
        in_features: Shape,
        latent: Shape,
        network: NetworkFactory,
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
        context: int = 16,
    ):
        family = multivariate.Flow(latent, self.kind, transforms, hidden, context, inverse=True)
        super().__init__(family, in_features, network)


class InverseAutoregressiveFlow(_FlowEncoder):
    r""":math:`z = \mu(x) + \sigma(x) \odot f(\epsilon; h(x))`, with noise :math:`\epsilon \sim N(0, I)`.

    The steps of f are autoregressive, and affine in each variable. The network gives :math:`\mu`, :math:`\sigma` and a
    context h, which every step reads. Before f is trained, this is :class:`DiagonalNormal`. Kingma et al. apply
    :math:`\mu` and :math:`\sigma` before f; the family is the same, since an affine step can absorb them. For a single
    variable it is a normal: use :class:`SplineFlow` there.

    A draw and its density take one pass through the steps. The density of any other value takes one pass per variable
    of z: exact answers and ``objectives.ImportanceWeighted`` with gradients other than ``"pathwise"`` need it. There is
    no KL in closed form: ``TraceMeanField_ELBO`` estimates it from the draws.

    Args:
        transforms: number of autoregressive steps, each in the reverse order of the last.
        hidden: sizes of the hidden layers of each step's network.
        context: size of h; with 0 the steps are the same for every x.

    Raises an ImportError without zuko: ``pip install 'pyro-vae[flows]'``.

    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling 2016, "Improved variational inference with inverse
    autoregressive flow", algorithm 1.

    >>> InverseAutoregressiveFlow(5, 2, networks.mlp([32]))(torch.zeros(7, 5)).rsample().shape
    torch.Size([7, 2])
    """

    kind = "affine"


class SplineFlow(_FlowEncoder):
    r""":math:`z = \mu(x) + \sigma(x) \odot f(\epsilon; h(x))` with f autoregressive, a spline in each variable.

    It is :class:`InverseAutoregressiveFlow`, of the same arguments and errors, with rational-quadratic splines in place
    of affine maps. They can turn one mode into several, also for a single variable.

    Source: Durkan, Bekasov, Murray and Papamakarios 2019, "Neural spline flows".

    >>> SplineFlow(5, 1, networks.mlp([32]))(torch.zeros(7, 5)).rsample().shape
    torch.Size([7, 1])
    """

    kind = "spline"


class Bernoulli(_Encoder):
    r"""Independent :math:`q(z_j \mid x) = \mathrm{Bernoulli}(\pi_j(x))`.

    With ``TraceEnum_ELBO`` and ``config_enumerate(vae.guide)`` the ELBO is a sum over all states. With ``Trace_ELBO``
    its gradient is the score-function estimator.

    >>> Bernoulli(2, 3, networks.linear())(torch.zeros(5, 2)).sample().shape
    torch.Size([5, 3])
    """

    def __init__(self, in_features: Shape, latent: Shape, network: NetworkFactory):
        super().__init__(families.Bernoulli(latent), in_features, network)


class OneHotCategorical(_Encoder):
    r"""Independent one-hot variables, :math:`q(z_j \mid x) = \mathrm{Categorical}(\pi_j(x))`.

    Args:
        latent: ``(n, k)``, n variables of k classes.

    >>> OneHotCategorical(2, (1, 3), networks.linear())(torch.zeros(5, 2)).sample().shape
    torch.Size([5, 1, 3])
    """

    def __init__(self, in_features: Shape, latent: Sequence[int], network: NetworkFactory):
        super().__init__(families.OneHotCategorical(latent), in_features, network)


class RelaxedBernoulli(_Encoder):
    r"""Independent relaxed Bernoulli variables with logits from the network. A value of the site is the logit.

    Args:
        temperature: :math:`\lambda > 0`. Maddison et al. 2017 use 2/3 here with 1/2 in the prior.

    >>> RelaxedBernoulli(2, 3, networks.linear(), temperature=0.66)(torch.zeros(5, 2)).has_rsample
    True
    """

    def __init__(self, in_features: Shape, latent: Shape, network: NetworkFactory, temperature: float):
        super().__init__(families.RelaxedBernoulli(latent, temperature), in_features, network)


class GumbelSoftmax(_Encoder):
    r"""Independent relaxed one-hot variables with logits from the network. The site is on the log-simplex.

    Args:
        latent: ``(n, k)``, n variables of k classes.
        temperature: :math:`\lambda > 0`.

    >>> GumbelSoftmax(2, (1, 3), networks.linear(), temperature=0.5)(torch.zeros(5, 2)).sample().exp().sum(-1).shape
    torch.Size([5, 1])
    """

    def __init__(self, in_features: Shape, latent: Sequence[int], network: NetworkFactory, temperature: float):
        super().__init__(families.RelaxedOneHotCategorical(latent, temperature), in_features, network)
