r"""The score function, for latents whose draws pass no gradient on: its baselines, and draws that depend on each other.

With draws :math:`z_1, \dots, z_K \sim q(z \mid x)` of a datum's latents, let

.. math:: f_k = \log p(x, z_k) - \log q(z_k \mid x).

A draw of a discrete z passes no gradient on to q. The *score function* does instead,
:math:`\nabla\,\mathbb{E}_q[f] = \mathbb{E}_q[(f - b)\,\nabla \log q(z \mid x)]`, for every baseline b that does not
depend on z. The estimators here differ in b, or in how their draws depend on each other.
"""

import math
from itertools import count
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae._utils.param_store import register
from pyro_vae._utils.validation import nonempty_string
from pyro_vae.distributions.properties import base_distribution
from pyro_vae.objectives.base import Function, ParticleELBO, sum_events
from pyro_vae.objectives.particles import Particles

__all__ = ["VIMCO", "DisARM", "LeaveOneOut", "ScoreFunction"]

_numbers = count(1)


class _OfELBO(ParticleELBO):
    """Estimators of the gradient of the ELBO itself."""

    def bound(self, draws: Particles) -> Tensor:
        return draws.f.mean(0)


def _scored(draws: Particles, signal: Tensor) -> Tensor:
    """f, and the score of each draw times a signal ``(K, B)``."""
    # The gradient of log q itself is left out where its expectation is zero: it would be noise.
    f = draws.f + (draws.score - draws.score.detach())
    return (f + signal * draws.score).mean(0)


class ScoreFunction(_OfELBO):
    r"""The score function with a learned baseline, :math:`(f_k - b(x))\,\nabla \log q(z_k \mid x)`.

    Args:
        baseline: one of :mod:`pyro_vae.objectives.baselines`, or of your own. Without one the estimator is
            ``pyro.infer.Trace_ELBO``.
        num_particles: K.
        name: under which its parameters are registered with Pyro, to be trained by the optimizer of the others; unique
            in the process if left out.

    Raises:
        ValueError: when it runs, if Pyro's param store holds other parameters under that name.

    Source: Williams 1992; Mnih and Gregor 2014.

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> vae = pv.VAE(
    ...     prior=priors.Bernoulli(3),
    ...     encoder=guides.Bernoulli(2, 3, networks.linear()),
    ...     decoder=likelihoods.Normal(3, 2, networks.linear()),
    ... )
    >>> elbo = ScoreFunction(pv.baselines.RunningAverage())
    >>> fitted = pv.fit(vae.model, vae.guide, torch.randn(50, 2), epochs=5, elbo=elbo)
    """

    def __init__(self, baseline: nn.Module, num_particles: int = 1, name: str | None = None):
        super().__init__(num_particles)
        if not isinstance(baseline, nn.Module) or not hasattr(baseline, "learn"):
            raise TypeError(
                f"`baseline` must be a module such as baselines.RunningAverage(), got {baseline!r}. Without one, take "
                "pyro.infer.Trace_ELBO()"
            )
        self.baseline: Any = baseline
        self.name = f"baseline{next(_numbers)}" if name is None else nonempty_string(name, "name")

    def surrogate(self, draws: Particles) -> Tensor:
        f = draws.f.detach()
        register(self.name, self.baseline)
        b = self.baseline(draws.x).to(f)
        _check_rows("forward", b, f)
        error = self.baseline.learn(f, b)
        _check_rows("learn", error, f)
        return _scored(draws, f - b.detach()) - error / draws.scale


def _check_rows(method: str, value: Tensor, f: Tensor) -> None:
    if value.shape not in ((), f.shape[1:]):
        raise ValueError(
            f"`baseline` must be {tuple(f.shape[1:])}, one number for each datum: its {method} gives shape "
            f"{tuple(value.shape)}"
        )


class LeaveOneOut(_OfELBO):
    r"""The score function with the other draws as the baseline of each (RLOO, VarGrad's relative),

    .. math:: \Big(f_k - \frac{1}{K - 1} \sum_{j \ne k} f_j\Big)\,\nabla \log q(z_k \mid x).

    Unbiased, with nothing to learn. For K = 2 it pairs two independent draws.

    Args:
        num_particles: K, 2 or more.

    Source: Kool, van Hoof and Welling 2019, "Buy 4 REINFORCE samples, get a baseline for free!".

    >>> LeaveOneOut(num_particles=1)
    Traceback (most recent call last):
        ...
    ValueError: `num_particles` must be an integer, 2 or more, got 1
    """

    def __init__(self, num_particles: int = 2):
        super().__init__(num_particles, least=2)

    def surrogate(self, draws: Particles) -> Tensor:
        f = draws.f.detach()
        return _scored(draws, (f - f.mean(0)) * (self.num_particles / (self.num_particles - 1)))


class VIMCO(ParticleELBO):
    r"""The gradient of the K-sample bound :math:`L = \log \frac1K \sum_k e^{f_k}`, not of the ELBO.

    The score of each draw is multiplied with :math:`L - L_{-k}`, where :math:`L_{-k}` has the geometric mean of the
    others' weights in the place of :math:`e^{f_k}`.

    Args:
        num_particles: K, 2 or more.

    Source: Mnih and Rezende 2016, "Variational inference for Monte Carlo objectives", equations 5 to 8.

    >>> VIMCO(num_particles=5).num_particles
    5
    """

    def __init__(self, num_particles: int = 2):
        super().__init__(num_particles, least=2)

    @property
    def bound_draws(self) -> int:
        return self.num_particles

    def bound(self, draws: Particles) -> Tensor:
        draws.check_one_scale("VIMCO")
        return draws.f.logsumexp(0) - math.log(self.num_particles)

    def surrogate(self, draws: Particles) -> Tensor:
        f, count = draws.f.detach(), self.num_particles
        others = (f.sum(0) - f) / (count - 1)
        without = torch.where(torch.eye(count, dtype=torch.bool, device=f.device)[..., None], others, f)  # (K, K, B)
        signal = f.logsumexp(0) - without.logsumexp(1)
        return self.bound(draws) + (signal * draws.score).sum(0)


class DisARM(_OfELBO):
    r"""Antithetic pairs of Bernoulli draws, for guides of Bernoulli variables alone.

    A pair comes from one uniform number for each variable, :math:`z = 1[u > 1 - \pi]` and
    :math:`\tilde z = 1[u < \pi]`. The gradient in the logit :math:`\alpha_j` of each variable is

    .. math:: \tfrac12 (f(z) - f(\tilde z))\,(-1)^{\tilde z_j}\,1[z_j \ne \tilde z_j]\,\sigma(|\alpha_j|).

    Unbiased, with the variance of ARM at most.

    Args:
        num_particles: K, an even number: K/2 pairs.

    Source: Dong, Mnih and Tucker 2020, "DisARM: an antithetic gradient estimator for binary latent variables", section
    3; found as U2G by Yin, Ho, Yan, Qian and Zhou 2020.

    >>> DisARM(num_particles=3)
    Traceback (most recent call last):
        ...
    ValueError: `num_particles` must be an even number, 2 or more, got 3
    """

    def __init__(self, num_particles: int = 2):
        super().__init__(num_particles, least=2, even=True)

    def _get_trace(self, model: Function, guide: Function, args: Any, kwargs: Any) -> Any:
        with _Antithetic(self.num_particles // 2):
            return super()._get_trace(model, guide, args, kwargs)

    def surrogate(self, draws: Particles) -> Tensor:
        half = self.num_particles // 2
        f = draws.f.detach()
        difference = 0.5 * (f[:half] - f[half:])  # (K/2, B)
        total = torch.zeros(())
        for site in draws.guide.values():
            logits, z = base_distribution(site["fn"]).logits[:half], site["value"]
            first, second = z[:half], z[half:]
            direction = (1 - 2 * second) * (first != second) * logits.detach().abs().sigmoid()
            total = total + difference * sum_events(direction * logits, site)
        passed_on = draws.log_likelihood + draws.log_prior
        return passed_on.mean(0) + total.mean(0)


class _Antithetic(Messenger):
    """Draw each latent of a guide in antithetic pairs, the first ones above the second ones."""

    def __init__(self, pairs: int):
        super().__init__()
        self.pairs = pairs
        self.drawn: list[Tensor] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or site_is_subsample(msg):
            return
        base = base_distribution(msg["fn"])
        transformed = isinstance(msg["fn"], torch.distributions.TransformedDistribution)
        if transformed or not isinstance(base, dist.Bernoulli | torch.distributions.Bernoulli):
            raise ValueError(
                f"`DisARM` must be Bernoullis: site {msg['name']!r} of the guide is a {type(msg['fn'] if transformed else base).__name__}"
            )
        probs = base.probs
        if self._depends(probs):
            raise ValueError(
                f"`DisARM` must be Bernoullis that depend on the data alone: site {msg['name']!r} of the guide "
                "depends on other latents. LeaveOneOut takes any"
            )
        probs = probs.detach()[: self.pairs]
        u = torch.rand(probs.shape, dtype=probs.dtype, device=probs.device)
        value = torch.cat([u > 1 - probs, u < probs]).to(probs.dtype)
        self.drawn.append(value.requires_grad_(torch.is_grad_enabled()))  # so that what depends on it is known
        msg["value"], msg["done"] = value, True

    def _depends(self, probs: Tensor) -> bool:
        """Whether the graph leads from earlier draws here; where there is no graph, whether the pairs differ."""
        if not torch.equal(probs[: self.pairs], probs[self.pairs :]):
            return True
        if not self.drawn or not probs.requires_grad or not torch.is_grad_enabled():
            return False
        found = torch.autograd.grad(probs.sum(), self.drawn, retain_graph=True, allow_unused=True)
        return any(slope is not None for slope in found)
