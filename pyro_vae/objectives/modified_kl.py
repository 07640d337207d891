"""Objectives whose rate differs from that of the ELBO. **None of them is a bound.**"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from pyro_vae._utils.traces import plate_scale
from pyro_vae._utils.validation import number, positive, with_article
from pyro_vae.distributions.properties import base_distribution, discrete_twin, is_masked, without_independent
from pyro_vae.objectives.elbo_terms import rate_by_variable
from pyro_vae.objectives.particle_elbo import ParticleELBO
from pyro_vae.objectives.particles import Particles, Site

__all__ = ["DiscreteKL", "FreeBits", "TotalCorrelation"]


class _ModifiedKL(ParticleELBO):
    """The mean log-likelihood of the draws minus a rate that the subclass defines."""

    @abstractmethod
    def rate(self, name: str, site: Site, prior: Site) -> Tensor:
        """Compute the rate of each variable of a latent in one draw, ``(B, *variables)``, from guide and model."""

    def modified(self, rate: Tensor, counted: Tensor) -> Tensor:
        """Change the rates ``(K, B, *variables)`` of all draws; ``counted`` are the data that are not masked."""
        return rate

    def read(self, name: str, site: Site, prior: Site | None) -> dict[str, Tensor]:
        if prior is None:
            return {}
        if is_masked(site["fn"]):
            must = "masked by poutine.mask around model and guide"
            raise ValueError(f"site {name!r} must be {must}, got a masked distribution")
        return {"rate": self.rate(name, site, prior)}

    def bound(self, particles: Particles) -> Tensor:
        """Compute the objective, which is no bound."""
        return self.surrogate(particles)

    def surrogate(self, particles: Particles) -> Tensor:
        total = torch.zeros((), device="cpu")
        for _, site, _ in particles.pairs():
            rate, counted = site["read"]["rate"], _mask(site)
            rate = self.modified(rate, counted).reshape(*rate.shape[:2], -1).sum(-1)
            total = total + torch.where(counted, rate, 0.0) * (site["scale"] / particles.scale)
        return (particles.log_likelihood - total).mean(0)


class DiscreteKL(_ModifiedKL):
    r"""Relaxed draws in the likelihood and the KL of the **discrete** variables in closed form. **This is no bound.**

    .. math:: \mathbb{E}[\log p(x \mid y)] - \mathrm{KL}(q(z \mid x) \,\Vert\, p(z)),
              \qquad y \text{ relaxed},\ z \text{ its discrete twin.}

    Rate and distortion are those of different variables, so their sum bounds log p(x) neither of the relaxed model nor
    of its twin. Many programs use this objective, and it often trains the twin well. :func:`pyro_vae.fit` reports the
    ELBO of the relaxed model; evaluate ``vae.discrete()``.

    Args:
        num_particles: K, draws for the likelihood.

    Source: Jang, Gu and Poole 2017, "Categorical reparameterization with Gumbel-softmax", section 3; Maddison, Mnih and
    Teh 2017, appendix C.3, which shows that it is no bound.

    >>> from pyro_vae import VAE, fit, guides, likelihoods, networks, priors
    >>> latent, net = (1, 3), networks.linear()
    >>> prior, encoder = priors.GumbelSoftmax(latent, 0.5), guides.GumbelSoftmax(2, latent, net, 0.5)
    >>> vae = VAE(prior, encoder, likelihoods.Normal(latent, 2, net))
    >>> fitted = fit(vae.model, vae.guide, torch.randn(50, 2), epochs=5, elbo=DiscreteKL())
    """

    def __init__(self, num_particles: int = 1):
        super().__init__(num_particles)

    def rate(self, name: str, site: Site, prior: Site) -> Tensor:
        twins = [discrete_twin(one["fn"]) for one in (site, prior)]
        for one, twin in zip((site, prior), twins, strict=True):
            if twin is None:
                which = "such as those of priors.RelaxedBernoulli or priors.GumbelSoftmax"
                got = f"{with_article(type(without_independent(one['fn'])).__name__)} for site {name!r}"
                raise ValueError(f"DiscreteKL needs relaxed latents, {which}, got {got}")
        return torch.distributions.kl_divergence(*twins)


class FreeBits(_ModifiedKL):
    r"""An ELBO whose KL has a floor for each latent variable. **With a floor above zero this is no bound.**

    .. math:: \mathbb{E}_q[\log p(x \mid z)]
              - \sum_d \max\big(\lambda,\ \overline{\mathrm{KL}}(q(z_d \mid x) \Vert p(z_d))\big),

    where the bar is a mean over the unmasked data of the batch. The rate of a variable below :math:`\lambda` nats has
    no gradient, which keeps the variable from collapsing in the first epochs. The KL is computed in closed form where
    torch has one, and is otherwise estimated from the draws. :func:`pyro_vae.fit` reports the ELBO.

    Args:
        nats: :math:`\lambda`, for each variable.
        num_particles: K.

    Raises:
        ValueError: at the first step, if prior or guide is no product over variables, or z is not reparameterised.

    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling 2016, "Improved variational inference with
    inverse autoregressive flow", appendix C.8.

    >>> from pyro_vae import VAE, fit, guides, likelihoods, networks, priors
    >>> net = networks.linear()
    >>> vae = VAE(priors.StandardNormal(2), guides.DiagonalNormal(2, 2, net), likelihoods.Normal(2, 2, net))
    >>> fitted = fit(vae.model, vae.guide, torch.randn(50, 2), epochs=5, elbo=FreeBits(0.1))
    """

    sums_over_rows = False  # the rate that is compared is an average over the batch

    def __init__(self, nats: float, num_particles: int = 1):
        super().__init__(num_particles)
        self.nats = positive(nats, "nats")

    def rate(self, name: str, site: Site, prior: Site) -> Tensor:
        if not site["fn"].has_rsample:
            got = f"{name!r} without pathwise gradients"
            why = "from others the guide would get no gradient of the likelihood"
            raise ValueError(f"FreeBits needs reparameterised latents, got {got}; {why}")
        each = rate_by_variable(site, prior)
        if each is None:
            q, p = (type(base_distribution(one["fn"])).__name__ for one in (site, prior))
            raise ValueError(
                "FreeBits needs products over the variables of z, such as guides.DiagonalNormal with "
                f"priors.StandardNormal, got a {q} in the guide and a {p} in the model for site {name!r}"
            )
        return each

    def modified(self, rate: Tensor, counted: Tensor) -> Tensor:
        rows = counted.reshape(counted.shape + (1,) * (rate.dim() - counted.dim()))
        average = torch.where(rows, rate, 0.0).flatten(0, 1).sum(0) / counted.sum()
        return torch.where(average > self.nats, rate, self.nats)


class TotalCorrelation(ParticleELBO):
    r"""An ELBO with a further weight on the total correlation of the codes. **Above a weight of 1 this is no bound.**

    .. math:: \mathrm{ELBO} - (\beta - 1)\, \mathrm{KL}\Big(q(z) \Big\Vert \prod_d q(z_d)\Big),
              \qquad q(z) = \frac1N \sum_n q(z \mid x_n),

    the objective of a β-TCVAE. It presses the variables of the aggregate posterior to be independent, and leaves the
    information of codes and data alone, which the weight of a β-VAE (:class:`pyro_vae.handlers.WeightKL`) reduces, too.

    With a draw z of the datum n in a batch of B, :math:`q(z)` is estimated without bias by
    :math:`\frac1N q(z \mid x_n)` plus :math:`\frac{N - 1}{N}` times the mean of :math:`q(z \mid x_m)` over the others
    of the batch, and :math:`q(z_d)` likewise; their logarithms have a bias that goes to zero as B goes to N. N is the
    size of the data plate. :func:`pyro_vae.fit` reports the ELBO.

    Args:
        weight: :math:`\beta`, 0 or more; 1 is the ELBO.
        num_particles: K.

    Raises:
        ValueError: at the first step, if the guide has several latents, or one that is no product over variables or not
            reparameterised; if data are masked; or for a batch of one row.

    Source: Chen, Li, Grosse and Duvenaud 2018, "Isolating sources of disentanglement in VAEs", equations 2 and 4, and
    appendix C.2 for the stratified estimate.

    >>> from pyro_vae import VAE, fit, guides, likelihoods, networks, priors
    >>> net = networks.linear()
    >>> vae = VAE(priors.StandardNormal(2), guides.DiagonalNormal(2, 2, net), likelihoods.Normal(2, 2, net))
    >>> fitted = fit(vae.model, vae.guide, torch.randn(50, 2), epochs=5, elbo=TotalCorrelation(4.0))
    """

    sums_over_rows = False  # q(z) is estimated from all rows of a batch

    def __init__(self, weight: float, num_particles: int = 1):
        super().__init__(num_particles)
        self.weight = number(weight, "weight", least=0)

    def read(self, name: str, site: Site, prior: Site | None) -> dict[str, Tensor]:
        q = without_independent(site["fn"])
        if not q.has_rsample or q.event_shape:
            kind = f"{with_article(type(base_distribution(q)).__name__)} for site {name!r}"
            must = "a latent that is reparameterised and a product over variables, such as guides.DiagonalNormal"
            raise ValueError(f"TotalCorrelation needs {must}, got {kind}")
        if is_masked(site["fn"]) or site["mask"] is not None:
            raise ValueError(f"TotalCorrelation needs data without a mask, got one at site {name!r}")
        if len(site["value"]) < 2:
            raise ValueError(f"TotalCorrelation needs batches of two rows or more, got {len(site['value'])}")
        each = q.log_prob(site["value"][:, None])
        each = each.reshape(*each.shape[:2], -1)  # (B, B, D): the draw of each row, by the guide of each row
        return {"joint": _own_and_others(each.sum(-1, keepdim=True)), "marginals": _own_and_others(each)}

    def bound(self, particles: Particles) -> Tensor:
        """Compute the objective, which is no bound if the weight is above 1."""
        return self.surrogate(particles)

    def surrogate(self, particles: Particles) -> Tensor:
        pairs = particles.pairs()
        if len(pairs) > 1:
            raise ValueError(f"TotalCorrelation needs one latent site, got {[name for name, *_ in pairs]}")
        [(_, site, _)] = pairs
        rows = particles.shape[1]
        num_data = plate_scale(site) * rows  # not the scale of the site, which has a weight of the whole model, too
        shares = site["value"].new_tensor([1 / num_data, (num_data - 1) / num_data / (rows - 1)]).log()
        joint, marginals = (
            torch.logsumexp(site["read"][name] + shares[:, None], -2) for name in ("joint", "marginals")
        )
        return (particles.log_weight - (self.weight - 1) * (joint.sum(-1) - marginals.sum(-1))).mean(0)


def _own_and_others(log_density: Tensor) -> Tensor:
    """From densities ``(B, B, D)``, those of each row's own guide, and the log-sum of the others, ``(B, 2, D)``."""
    own = torch.eye(len(log_density), dtype=torch.bool, device=log_density.device)[..., None]
    others = log_density.masked_fill(own, -math.inf).logsumexp(1)
    return torch.stack([log_density.diagonal().T, others], 1)


def _mask(site: Site) -> Tensor:
    """The mask of the data at a site, ``(K, B)``: False for data that do not count."""
    mask = True if site["mask"] is None else site["mask"]
    return torch.as_tensor(mask, device=site["value"].device).expand(site["unscaled_log_prob"].shape)
