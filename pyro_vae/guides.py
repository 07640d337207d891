"""Guides q(z | x), also called encoders: parts with the datum as their context."""

from collections.abc import Sequence

from pyro_vae import families
from pyro_vae.families import Family, as_shape
from pyro_vae.networks import NetworkFactory, build
from pyro_vae.parts import Conditional

__all__ = [
    "Bernoulli",
    "DiagonalNormal",
    "GumbelSoftmax",
    "InverseAutoregressiveFlow",
    "OneHotCategorical",
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
        network: factory, see :mod:`pyro_vae.networks`.

    Source: Kingma and Welling 2014, "Auto-encoding variational Bayes", section 3.

    >>> import torch
    >>> from pyro_vae import networks
    >>> DiagonalNormal(2, 1, networks.mlp([32]))(torch.zeros(5, 2)).event_shape
    torch.Size([1])
    """

    def __init__(self, in_features: int | Sequence[int], latent: int | Sequence[int], network: NetworkFactory):
        super().__init__(families.Normal(latent), in_features, network)


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
        family = families.Flow(latent, self.kind, transforms, hidden, context, inverse=True)
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
        network: factory, see :mod:`pyro_vae.networks`.
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
        network: factory, see :mod:`pyro_vae.networks`.
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
        network: factory, see :mod:`pyro_vae.networks`.

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
        network: factory, see :mod:`pyro_vae.networks`.

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
        network: factory, see :mod:`pyro_vae.networks`.
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
        network: factory, see :mod:`pyro_vae.networks`.
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
