"""Likelihoods p(x | z), also called decoders: parts with what the prior lets them read of z as their context."""

from collections.abc import Sequence

from pyro_vae import families
from pyro_vae.families import Family, as_shape
from pyro_vae.networks import NetworkFactory, build
from pyro_vae.parts import Conditional

__all__ = ["Bernoulli", "ContinuousBernoulli", "Normal"]


class _Decoder(Conditional):
    def __init__(self, family: Family, latent: int | Sequence[int], network: NetworkFactory):
        features = as_shape(latent, "latent").numel()
        super().__init__(family, latent, build(network, features, family.num_raw))


class Normal(_Decoder):
    r""":math:`p(x \mid z) = N(\mu(z), \mathrm{diag}\,\sigma^2)`, a density with respect to Lebesgue measure.

    With a fixed scale this is the mean-squared error that many texts train on, up to a constant:
    :math:`-\log p(x \mid z) = \frac{1}{2\sigma^2}\lVert x - \mu(z)\rVert^2 + \frac{D}{2}\log 2\pi\sigma^2`.

    Args:
        latent: size or shape of z.
        out_features: size or shape of x.
        network: factory, see :mod:`pyro_vae.networks`.
        scale: ``"shared"`` (one learned number, the default), ``"per_dimension"``, ``"network"`` (a function of z), or
            a fixed positive number.
        min_scale: floor under a learned scale, in the units of x. Without one, a constant dimension sends the density
            to infinity.

    >>> import torch
    >>> from pyro_vae import networks
    >>> Normal(1, 2, networks.linear(), scale=0.1)(torch.zeros(5, 1)).stddev[0]
    tensor([0.1000, 0.1000])
    """

    def __init__(
        self,
        latent: int | Sequence[int],
        out_features: int | Sequence[int],
        network: NetworkFactory,
        scale: str | float = "shared",
        min_scale: float = 1e-3,
    ):
        super().__init__(families.Normal(out_features, scale, min_scale), latent, network)


class Bernoulli(_Decoder):
    r""":math:`p(x \mid z) = \prod_d \pi_d(z)^{x_d} (1 - \pi_d(z))^{1 - x_d}`, a mass on 0s and 1s.

    Args:
        latent: size or shape of z.
        out_features: size or shape of x.
        network: factory, see :mod:`pyro_vae.networks`.
        soft_targets: accept grey values in [0, 1] and score them with the cross-entropy. That is **no likelihood**:
            exact evidence then refuses the model, and training reports a surrogate instead of an ELBO.

    Raises:
        ValueError: when it scores data other than 0 and 1 without ``soft_targets``; the message names the ways out.

    >>> import torch
    >>> from pyro_vae import networks
    >>> Bernoulli(2, (8, 8), networks.mlp([32]))(torch.zeros(5, 2)).event_shape
    torch.Size([8, 8])
    """

    def __init__(
        self,
        latent: int | Sequence[int],
        out_features: int | Sequence[int],
        network: NetworkFactory,
        soft_targets: bool = False,
    ):
        family = families.SoftTargetBernoulli if soft_targets else families.Bernoulli
        super().__init__(family(out_features), latent, network)


class ContinuousBernoulli(_Decoder):
    r"""A density on [0, 1] for grey values, :math:`p(x \mid z) \propto \pi(z)^{x} (1 - \pi(z))^{1 - x}`.

    Args:
        latent: size or shape of z.
        out_features: size or shape of x.
        network: factory, see :mod:`pyro_vae.networks`.

    Source: Loaiza-Ganem and Cunningham 2019.

    >>> import torch
    >>> from pyro_vae import networks
    >>> ContinuousBernoulli(2, 64, networks.linear())(torch.zeros(5, 2)).log_prob(torch.rand(5, 64)).shape
    torch.Size([5])
    """

    def __init__(self, latent: int | Sequence[int], out_features: int | Sequence[int], network: NetworkFactory):
        super().__init__(families.ContinuousBernoulli(out_features), latent, network)
