"""The importance-weighted bound of pathwise draws, with three estimators of its gradient in the guide."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae._utils.typing import Function
from pyro_vae.compilation import torch_private
from pyro_vae.objectives.particle_elbo import Pair, ParticleELBO, sum_events
from pyro_vae.objectives.particles import Particles

__all__ = ["ImportanceWeighted"]

_GRADIENTS = ("pathwise", "sticking-the-landing", "doubly-reparameterized")


class ImportanceWeighted(ParticleELBO):
    r"""The K-sample bound of pathwise draws,

    .. math:: L_K = \mathbb{E}_{z_1, \dots, z_K \sim q}\Big[\log \frac1K \sum_k w_k\Big] \le \log p(x), \qquad
              w_k = \frac{p(x, z_k)}{q(z_k \mid x)},

    the ELBO at K = 1, and tighter as K grows. With the normalised weights :math:`\tilde w_k = w_k / \sum_j w_j` its
    gradient in the parameters of the guide is one of

    * ``"pathwise"``: that of the formula, :math:`\sum_k \tilde w_k \nabla \log w_k`; signal-to-noise falls with K.
    * ``"doubly-reparameterized"``: :math:`\sum_k \tilde w_k^2 \frac{\partial \log w_k}{\partial z_k} \nabla z_k`,
      where a second reparameterization removes the score of q. Unbiased, and the signal-to-noise ratio grows with K.
      If the latents have a weight β, the factor is :math:`(1 - \beta) \tilde w_k + \beta \tilde w_k^2`.
    * ``"sticking-the-landing"``: :math:`\sum_k \tilde w_k \frac{\partial \log w_k}{\partial z_k} \nabla z_k`. At
      K = 1 it equals the doubly reparameterized gradient: unbiased, and without noise where q is the posterior. For
      K > 1 it is **biased**.

    The gradient in all other parameters is that of the formula.

    Args:
        num_particles: K.
        gradient: estimator of the gradient in the guide, as above.

    Raises:
        ValueError: at the first step, if a latent is not reparameterised (VIMCO takes discrete latents).

    Source: Burda, Grosse and Salakhutdinov 2016, "Importance weighted autoencoders"; Roeder, Wu and Duvenaud 2017,
    "Sticking the landing"; Tucker, Lawson, Gu and Maddison 2019, "Doubly reparameterized gradient estimators for Monte
    Carlo objectives".

    >>> from pyro_vae import VAE, fit, guides, likelihoods, networks, priors
    >>> net = networks.linear()
    >>> vae = VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> elbo = ImportanceWeighted(num_particles=5, gradient="doubly-reparameterized")
    >>> fitted = fit(vae.model, vae.guide, torch.randn(50, 2), epochs=5, elbo=elbo)
    """

    def __init__(self, num_particles: int, gradient: str = "pathwise"):
        super().__init__(num_particles)
        if not isinstance(gradient, str) or gradient not in _GRADIENTS:
            raise ValueError(f"`gradient` must be one of {', '.join(map(repr, _GRADIENTS))}, got {gradient!r}")
        self.gradient = gradient
        self._cut = _CutGraph(num_particles)

    def _get_trace(self, model: Function, guide: Function, args: Any, kwargs: Any) -> Pair:
        self._cut = _CutGraph(self.num_particles)
        return super()._get_trace(model, guide, args, kwargs)

    def _one_draw(self, *args: Any) -> Pair:
        with nullcontext() if self.gradient == "pathwise" else self._cut:
            return super()._one_draw(*args)

    @property
    def bound_draws(self) -> int:
        return self.num_particles

    def bound(self, particles: Particles) -> Tensor:
        particles.check_one_scale()
        if discrete := [name for name, site in particles.guide.items() if not site["fn"].has_rsample]:
            got = f"{discrete} without pathwise gradients; objectives.VIMCO takes any latents"
            raise ValueError(f"ImportanceWeighted needs reparameterised latents, got {got}")
        return particles.log_weight.logsumexp(0) - math.log(self.num_particles)

    def surrogate(self, particles: Particles) -> Tensor:
        if self.gradient == "pathwise":
            return self.bound(particles)
        weights = particles.log_weight.detach().softmax(0)
        factor = weights
        if self.gradient == "doubly-reparameterized":  # for β = 1, the squared weight
            factor = weights - _latent_weight(particles) * (weights - weights**2)
        slopes = self._cut.total_derivatives((factor * particles.log_weight).sum())
        total = (weights * (particles.log_likelihood + particles.log_prior)).sum(0)
        for name, value, slope in slopes:
            total = total + sum_events(slope * value, particles.guide[name]).sum_to_size(total.shape)
        return total


def _latent_weight(particles: Particles) -> Tensor:
    """The weight β of log q in log w, and so of the score that the second reparameterization removes."""
    weights = {
        name: torch.as_tensor(site["scale"] / particles.scale, device="cpu") for name, site in particles.guide.items()
    }
    first = next(iter(weights.values()))
    if any(not torch.equal(weight, first) for weight in weights.values()):
        got = {name: weight.tolist() for name, weight in weights.items()}
        raise ValueError(f"ImportanceWeighted needs one weight for all latents, got {got}")
    return first


class _CutGraph(Messenger):
    """Cut the graph at the draws of a guide: later sites depend on leaves with the same values."""

    def __init__(self, num_draws: int) -> None:
        super().__init__()
        self.num_draws = num_draws
        self._open: set[str] = set()
        self._at_once = False
        self._draws: list[tuple[str, Tensor, Tensor]] = []  # name, value, leaf

    def _pyro_sample(self, msg: Any) -> None:
        # This handler runs after the inner ones: a site without a value will be drawn. In the model, `replay` sets it.
        if msg["value"] is None and not msg["is_observed"] and not site_is_subsample(msg):
            self._open.add(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._open:
            self._open.remove(msg["name"])
            with torch_private.outside_vmap() as level:
                value = torch_private.unbatched(msg["value"], level, self.num_draws)
                if not value.requires_grad:
                    return
                leaf = value.detach().requires_grad_()
            msg["value"] = torch_private.batched(leaf, level)
            if level is None and self._at_once:  # torch.vmap has failed, and draws are run one by one
                self._draws.clear()
            self._at_once = level is not None
            self._draws.append((msg["name"], value, leaf))

    def total_derivatives(self, signal: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """List name and value of each draw with the derivative of the signal in it, also through later draws.

        A value holds all draws, or one where they are run one by one.
        """
        if not self._draws:
            return []
        leaves = [leaf for *_, leaf in self._draws]
        slopes = list(torch.autograd.grad(signal, leaves, retain_graph=True))
        for index in reversed(range(1, len(leaves))):
            value, options = self._draws[index][1], {"retain_graph": True, "allow_unused": True}
            for place, slope in enumerate(torch.autograd.grad(value, leaves[:index], slopes[index], **options)):
                if slope is not None:
                    slopes[place] = slopes[place] + slope
        return [(name, value, slope) for (name, value, _), slope in zip(self._draws, slopes, strict=True)]
