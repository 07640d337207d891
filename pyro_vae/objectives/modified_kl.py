r"""Objectives whose rate is another than that of the ELBO: **none of them is a bound.**"""

from typing import Any

import torch
from torch import Tensor

from pyro_vae._utils.validation import positive
from pyro_vae.distributions.properties import base_distribution, discrete_twin, is_masked, without_independent
from pyro_vae.objectives.base import ParticleELBO, sum_events
from pyro_vae.objectives.elbo_terms import rate_by_variable
from pyro_vae.objectives.particles import Particles

__all__ = ["DiscreteKL", "FreeBits"]


class DiscreteKL(ParticleELBO):
    r"""Relaxed draws in the likelihood, and the KL of the **discrete** variables in closed form. **This is no bound.**

    .. math:: \mathbb{E}[\log p(x \mid y)] - \mathrm{KL}(q(z \mid x) \,\Vert\, p(z)),
              \qquad y \text{ relaxed},\ z \text{ its discrete twin.}

    The rate of one variable with the distortion of another: it bounds log p(x) neither of the relaxed model nor of the
    twin. It is what many programs train on, and often trains the twin well. :func:`pyro_vae.fit` reports the ELBO of
    the relaxed model beside it, as always; judge ``vae.discrete()``.

    Args:
        num_particles: K, draws for the likelihood.

    Source: Jang, Gu and Poole 2017, "Categorical reparameterization with Gumbel-softmax", section 3; Maddison, Mnih and
    Teh 2017, appendix C.3, on why it is no bound.

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> vae = pv.VAE(
    ...     prior=priors.GumbelSoftmax((1, 3), temperature=0.5),
    ...     encoder=guides.GumbelSoftmax(2, (1, 3), networks.linear(), temperature=0.5),
    ...     decoder=likelihoods.Normal((1, 3), 2, networks.linear()),
    ... )
    >>> fitted = pv.fit(vae.model, vae.guide, torch.randn(50, 2), epochs=5, elbo=DiscreteKL())
    """

    def __init__(self, num_particles: int = 1):
        super().__init__(num_particles)

    def bound(self, draws: Particles) -> Tensor:
        return self.surrogate(draws)

    def surrogate(self, draws: Particles) -> Tensor:
        rate = torch.zeros(())
        for name, site, prior in draws.pairs("DiscreteKL"):
            q, p = (_discrete(name, one["fn"]) for one in (site, prior))
            each = torch.distributions.kl_divergence(q, p)  # of each variable
            rate = rate + _masked(sum_events(each, site), name, site) * (site["scale"] / draws.scale)
        return (draws.log_likelihood - rate).mean(0)


def _masked(rate: Tensor, name: str, site: dict[str, Any]) -> Tensor:
    """The rate of the data that the site's mask lets through."""
    if is_masked(site["fn"]):
        raise ValueError(f"latent {name!r} must not be a masked distribution: put poutine.mask around model and guide")
    return torch.where(_counted(site), rate, 0.0)


def _rows_where(counted: Tensor, values: Tensor) -> Tensor:
    """The values of the data that count, and zeros."""
    return torch.where(counted.reshape(counted.shape + (1,) * (values.dim() - counted.dim())), values, 0.0)


def _counted(site: dict[str, Any]) -> Tensor:
    """Which data the site's mask lets through, ``(*batch)``."""
    mask = True if site["mask"] is None else site["mask"]
    return torch.as_tensor(mask, device=site["value"].device).expand(site["fn"].batch_shape)


class FreeBits(ParticleELBO):
    r"""A KL that costs nothing below a floor, for each latent variable. **For a floor above zero this is no bound.**

    .. math:: \mathbb{E}_q[\log p(x \mid z)]
              - \sum_d \max\big(\lambda,\ \overline{\mathrm{KL}}(q(z_d \mid x) \Vert p(z_d))\big),

    where the bar is a mean over the batch, without the data that a mask leaves out: a variable that carries less than
    :math:`\lambda` nats on average has no reason to give them up, which keeps it from collapsing in the first epochs.
    The KL is in closed form where torch has one, and is otherwise estimated from the draws. :func:`pyro_vae.fit`
    reports the ELBO, as always.

    Args:
        nats: :math:`\lambda`, for each variable.
        num_particles: K, draws.

    Raises:
        ValueError: when it runs, if prior and guide are not products over the variables of z, drawn pathwise.

    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling 2016, "Improved variational inference with
    inverse autoregressive flow", appendix C.8.

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(2),
    ...     encoder=guides.DiagonalNormal(2, 2, networks.linear()),
    ...     decoder=likelihoods.Normal(2, 2, networks.linear()),
    ... )
    >>> fitted = pv.fit(vae.model, vae.guide, torch.randn(50, 2), epochs=5, elbo=FreeBits(0.1))
    """

    def __init__(self, nats: float, num_particles: int = 1):
        super().__init__(num_particles)
        self.nats = positive(nats, "nats")

    def bound(self, draws: Particles) -> Tensor:
        return self.surrogate(draws)

    def surrogate(self, draws: Particles) -> Tensor:
        rate = torch.zeros(())
        for name, site, prior in draws.pairs("FreeBits"):
            if not site["fn"].has_rsample:
                raise ValueError(
                    f"`FreeBits` must be reparameterised ones: latent {name!r} is not drawn pathwise, and the "
                    "likelihood would not train the guide"
                )
            each = rate_by_variable(site, prior)
            if each is None:
                q, p = (type(base_distribution(one["fn"])).__name__ for one in (site, prior))
                raise ValueError(
                    "`FreeBits` must be products over the variables of z, such as guides.DiagonalNormal with "
                    f"priors.StandardNormal: site {name!r} is a {q} in the guide and a {p} in the model"
                )
            counted = _counted(site)
            average = _rows_where(counted, each).sum(0) / counted.sum()
            floored = torch.where(average > self.nats, each, self.nats)
            rate = rate + _masked(sum_events(floored, site), name, site) * (site["scale"] / draws.scale)
        return (draws.log_likelihood - rate).mean(0)


def _discrete(name: str, fn: Any) -> Any:
    """The discrete variables that relaxed ones stand for."""
    twin = discrete_twin(fn)
    if twin is None:
        raise ValueError(
            "`DiscreteKL` must be used with relaxed latents, as those of priors.RelaxedBernoulli and "
            f"priors.GumbelSoftmax, got a {type(without_independent(fn)).__name__} at site {name!r}"
        )
    return twin
