"""Guides q(z | x), also called encoders: parts with the datum as their context."""

from collections.abc import Sequence

from pyro_vae import families
from pyro_vae.families import Family, as_shape
from pyro_vae.networks import NetworkFactory, build
from pyro_vae.parts import Conditional

__all__ = ["Bernoulli", "DiagonalNormal", "GumbelSoftmax", "OneHotCategorical", "RelaxedBernoulli"]


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
