r"""The importance-weighted bound of pathwise draws, and gradients that leave out what is noise."""

import math
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.objectives.base import Function, ParticleELBO, sum_events
from pyro_vae.objectives.particles import Particles

__all__ = ["ImportanceWeighted"]

_GRADIENTS = ("pathwise", "sticking-the-landing", "doubly-reparameterized")


class ImportanceWeighted(ParticleELBO):
    r"""The K-sample bound of pathwise draws,

    .. math:: L_K = \mathbb{E}_{z_1, \dots, z_K \sim q}\Big[\log \frac1K \sum_k w_k\Big] \le \log p(x), \qquad
              w_k = \frac{p(x, z_k)}{q(z_k \mid x)},

    the ELBO at K = 1, and tighter as K grows. With the normalised weights :math:`\tilde w_k = w_k / \sum_j w_j` its
    gradient in the parameters of the guide is one of

    * ``"pathwise"``: that of the formula as it is, :math:`\sum_k \tilde w_k \nabla \log w_k`. Its signal-to-noise
      falls with K.
    * ``"doubly-reparameterized"``: :math:`\sum_k \tilde w_k^2 \frac{\partial \log w_k}{\partial z_k} \nabla z_k`,
      with the score of q reparameterised away. Unbiased, and the signal-to-noise grows with K. Where the latents have
      a weight β, the factor is :math:`(1 - \beta) \tilde w_k + \beta \tilde w_k^2`.
    * ``"sticking-the-landing"``: :math:`\sum_k \tilde w_k \frac{\partial \log w_k}{\partial z_k} \nabla z_k`. At
      K = 1 the same as the last: unbiased, and without noise where q is the posterior. For K > 1 it is **biased**.

    The gradient in all other parameters is that of the formula.

    Args:
        num_particles: K.
        gradient: of the guide, as above.

    Raises:
        ValueError: when it runs, if a latent is not drawn pathwise (VIMCO takes discrete ones).

    Source: Burda, Grosse and Salakhutdinov 2016, "Importance weighted autoencoders"; Roeder, Wu and Duvenaud 2017,
    "Sticking the landing"; Tucker, Lawson, Gu and Maddison 2019, "Doubly reparameterized gradient estimators for Monte
    Carlo objectives".

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(1),
    ...     encoder=guides.DiagonalNormal(2, 1, networks.linear()),
    ...     decoder=likelihoods.Normal(1, 2, networks.linear()),
    ... )
    >>> elbo = ImportanceWeighted(num_particles=5, gradient="doubly-reparameterized")
    >>> fitted = pv.fit(vae.model, vae.guide, torch.randn(50, 2), epochs=5, elbo=elbo)
    """

    def __init__(self, num_particles: int, gradient: str = "pathwise"):
        super().__init__(num_particles)
        if gradient not in _GRADIENTS:
            raise ValueError(f"`gradient` must be {', '.join(map(repr, _GRADIENTS))}, got {gradient!r}")
        self.gradient = gradient
        self._leaves = _Leaves()

    def _get_trace(self, model: Function, guide: Function, args: Any, kwargs: Any) -> Any:
        if self.gradient == "pathwise":
            return super()._get_trace(model, guide, args, kwargs)
        self._leaves = _Leaves()
        with self._leaves:
            return super()._get_trace(model, guide, args, kwargs)

    @property
    def bound_draws(self) -> int:
        return self.num_particles

    def bound(self, draws: Particles) -> Tensor:
        draws.check_one_scale(type(self).__name__)
        discrete = [name for name, site in draws.guide.items() if not site["fn"].has_rsample]
        if discrete:
            raise ValueError(
                f"`ImportanceWeighted` must be reparameterised ones. objectives.VIMCO takes any: latents {discrete} "
                "are not drawn pathwise"
            )
        return draws.f.logsumexp(0) - math.log(self.num_particles)

    def surrogate(self, draws: Particles) -> Tensor:
        if self.gradient == "pathwise":
            return self.bound(draws)
        weights = draws.f.detach().softmax(0)
        share = weights
        if self.gradient == "doubly-reparameterized":  # at a weight of 1, that of the draw squared
            share = weights - _weight_of_latents(draws) * (weights - weights**2)
        signal = self._leaves.passed_on((share * draws.f).sum())
        through = sum(
            (sum_events(slope * value, draws.guide[name]).expand(draws.shape).sum(0) for name, value, slope in signal),
            torch.zeros(()),
        )
        return (weights * (draws.log_likelihood + draws.log_prior)).sum(0) + through


def _weight_of_latents(draws: Particles) -> Tensor:
    """β, with which log q enters log w, and so does the score that is reparameterised away."""
    weights = {name: torch.as_tensor(site["scale"] / draws.scale) for name, site in draws.guide.items()}
    first = next(iter(weights.values()))
    if any(not torch.equal(weight, first) for weight in weights.values()):
        found = {name: weight.tolist() for name, weight in weights.items()}
        raise ValueError(f"`ImportanceWeighted` must be one for all of them, got latents of the weights {found}")
    return first


class _Leaves(Messenger):
    """Cut the graph at the draws of a guide: what comes after depends on leaves of the same values."""

    def __init__(self) -> None:
        super().__init__()
        self._open: set[str] = set()
        self._drawn: list[tuple[str, Tensor, Tensor]] = []

    def _pyro_sample(self, msg: Any) -> None:
        # Runs after the handlers inside: what they have not given a value, as `replay` does in the model, is drawn.
        if msg["value"] is None and not msg["is_observed"] and not site_is_subsample(msg):
            self._open.add(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._open:
            self._open.remove(msg["name"])
            value = msg["value"]
            if value.requires_grad:
                msg["value"] = value.detach().requires_grad_()
                self._drawn.append((msg["name"], value, msg["value"]))

    def passed_on(self, signal: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """Name and value of each draw, and the derivative of the signal in it, the way through later draws included."""
        if not self._drawn:
            return []
        leaves = [leaf for *_, leaf in self._drawn]
        slopes = list(torch.autograd.grad(signal, leaves, retain_graph=True))
        for index in reversed(range(1, len(leaves))):
            earlier = torch.autograd.grad(
                self._drawn[index][1], leaves[:index], slopes[index], retain_graph=True, allow_unused=True
            )
            for place, slope in enumerate(earlier):
                if slope is not None:
                    slopes[place] = slopes[place] + slope
        return [(name, value, slope) for (name, value, _), slope in zip(self._drawn, slopes, strict=True)]
