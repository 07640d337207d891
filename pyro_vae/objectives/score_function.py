r"""Score-function estimators, for latents whose draws pass no gradient. They differ in their baselines and draws.

With draws :math:`z_1, \dots, z_K \sim q(z \mid x)` of the latents of a datum, let

.. math:: f_k = \log p(x, z_k) - \log q(z_k \mid x).

A draw of a discrete z passes no gradient to q. The *score function* gives the gradient instead,
:math:`\nabla\,\mathbb{E}_q[f] = \mathbb{E}_q[(f - b)\,\nabla \log q(z \mid x)]`, for every baseline b that does not
depend on z. The estimators here differ in b, or in the dependence between their draws.
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
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import nonempty_string
from pyro_vae.compilation import torch_private
from pyro_vae.distributions.properties import base_distribution
from pyro_vae.draws import DrawError
from pyro_vae.objectives.particle_elbo import Pair, ParticleELBO, sum_events
from pyro_vae.objectives.particles import Particles, Site

__all__ = ["VIMCO", "DisARM", "LeaveOneOut", "ScoreFunction"]

_numbers = count(1)


class _ELBOEstimator(ParticleELBO):
    """An estimator of the gradient of the ELBO itself."""

    def bound(self, particles: Particles) -> Tensor:
        return particles.log_weight.mean(0)


class ScoreFunction(_ELBOEstimator):
    r"""The score function with a learned baseline, :math:`(f_k - b(x))\,\nabla \log q(z_k \mid x)`.

    Args:
        baseline: one of :mod:`pyro_vae.objectives.baselines`, or a similar module; without one, use ``Trace_ELBO``.
        num_particles: K.
        name: of the baseline's parameters in Pyro's param store, so that the optimizer trains them too; by default
            unique in the process. A ValueError at the first step if others have that name.

    Source: Williams 1992; Mnih and Gregor 2014.

    >>> from pyro_vae import VAE, baselines, fit, guides, likelihoods, networks, priors
    >>> net = networks.linear()
    >>> vae = VAE(priors.Bernoulli(3), guides.Bernoulli(2, 3, net), likelihoods.Normal(3, 2, net))
    >>> elbo = ScoreFunction(baselines.RunningAverage())
    >>> fitted = fit(vae.model, vae.guide, torch.randn(50, 2), epochs=5, elbo=elbo)
    """

    def __init__(self, baseline: nn.Module, num_particles: int = 1, name: str | None = None):
        super().__init__(num_particles)
        if not isinstance(baseline, nn.Module) or not hasattr(baseline, "learn"):
            must, hint = "a module such as baselines.RunningAverage()", "without one, use pyro.infer.Trace_ELBO()"
            raise TypeError(f"`baseline` must be {must}, got {baseline!r}; {hint}")
        self.baseline: Any = baseline
        self.name = f"baseline{next(_numbers)}" if name is None else nonempty_string(name, "name")

    def surrogate(self, particles: Particles) -> Tensor:
        f = particles.log_weight.detach()
        register(self.name, self.baseline)
        b = self.baseline(particles.x).to(f)
        error = self.baseline.learn(f, b)
        for method, value in (("forward", b), ("learn", error)):
            if value.shape not in ((), f.shape[1:]):
                must = f"return one number for each datum, of shape {tuple(f.shape[1:])}"
                raise ValueError(f"`baseline` must {must}, got shape {tuple(value.shape)} from its `{method}`")
        return _weight_score(particles, f - b.detach()) - error / particles.scale


def _weight_score(particles: Particles, signal: Tensor) -> Tensor:
    """The mean of f with the score of each draw times a signal ``(K, B)``."""
    # The gradient of -log q in f has expectation zero where there is a score: it would only add noise.
    f = particles.log_weight + (particles.score - particles.score.detach())
    return (f + signal * particles.score).mean(0)


class LeaveOneOut(_ELBOEstimator):
    r"""The score function whose baseline for each draw is the mean of the others (RLOO, similar to VarGrad),

    .. math:: \Big(f_k - \frac{1}{K - 1} \sum_{j \ne k} f_j\Big)\,\nabla \log q(z_k \mid x).

    Unbiased, without a learned baseline. For K = 2 it compares two independent draws.

    Args:
        num_particles: K, 2 or more.

    Source: Kool, van Hoof and Welling 2019, "Buy 4 REINFORCE samples, get a baseline for free!".

    >>> LeaveOneOut(num_particles=1)
    Traceback (most recent call last):
        ...
    ValueError: `num_particles` must be an integer, 2 or more, got 1
    """

    def __init__(self, num_particles: int = 2):
        super().__init__(num_particles, minimum=2)

    def surrogate(self, particles: Particles) -> Tensor:
        f = particles.log_weight.detach()
        return _weight_score(particles, (f - f.mean(0)) * (self.num_particles / (self.num_particles - 1)))


class VIMCO(ParticleELBO):
    r"""The gradient of the K-sample bound :math:`L = \log \frac1K \sum_k e^{f_k}`, not of the ELBO.

    The score of each draw is multiplied by :math:`L - L_{-k}`, where the geometric mean of the other weights replaces
    :math:`e^{f_k}` in :math:`L_{-k}`.

    Args:
        num_particles: K, 2 or more.

    Source: Mnih and Rezende 2016, "Variational inference for Monte Carlo objectives", equations 5 to 8.

    >>> VIMCO(num_particles=5).num_particles
    5
    """

    def __init__(self, num_particles: int = 2):
        super().__init__(num_particles, minimum=2)

    @property
    def bound_draws(self) -> int:
        return self.num_particles

    def bound(self, particles: Particles) -> Tensor:
        particles.check_one_scale()
        return particles.log_weight.logsumexp(0) - math.log(self.num_particles)

    def surrogate(self, particles: Particles) -> Tensor:
        f, count = particles.log_weight.detach(), self.num_particles
        others = (f.sum(0) - f) / (count - 1)
        without = torch.where(torch.eye(count, dtype=torch.bool, device=f.device)[..., None], others, f)  # (K, K, B)
        signal = f.logsumexp(0) - without.logsumexp(1)
        return self.bound(particles) + (signal * particles.score).sum(0)


class DisARM(_ELBOEstimator):
    r"""Antithetic pairs of Bernoulli draws, for guides whose latents are all Bernoulli variables.

    Each pair is computed from one uniform number for each variable, :math:`z = 1[u > 1 - \pi]` and
    :math:`\tilde z = 1[u < \pi]`. The gradient in the logit :math:`\alpha_j` of each variable is

    .. math:: \tfrac12 (f(z) - f(\tilde z))\,(-1)^{\tilde z_j}\,1[z_j \ne \tilde z_j]\,\sigma(|\alpha_j|).

    Unbiased, and its variance is at most that of ARM.

    Args:
        num_particles: K, an even number, for K/2 pairs.

    Source: Dong, Mnih and Tucker 2020, "DisARM: an antithetic gradient estimator for binary latent variables", section
    3; the same estimator is U2G in Yin, Ho, Yan, Qian and Zhou 2020.

    >>> DisARM(num_particles=3)
    Traceback (most recent call last):
        ...
    ValueError: `num_particles` must be an even number, 2 or more, got 3
    """

    def __init__(self, num_particles: int = 2):
        super().__init__(num_particles, minimum=2, even=True)

        self._pairs = _Antithetic(num_particles // 2)

    def _get_trace(self, model: Function, guide: Function, args: Any, kwargs: Any) -> Pair:
        self._pairs = _Antithetic(self.num_particles // 2)
        return super()._get_trace(model, guide, args, kwargs)

    def _one_draw(self, *args: Any) -> Pair:
        with self._pairs:
            return super()._one_draw(*args)

    def read(self, name: str, site: Site, prior: Site | None) -> dict[str, Tensor]:
        return {"logits": base_distribution(site["fn"]).logits}

    def surrogate(self, particles: Particles) -> Tensor:
        half, f = self.num_particles // 2, particles.log_weight.detach()
        difference = 0.5 * (f[:half] - f[half:])  # (K/2, B)
        total = torch.zeros((), device="cpu")
        for site in particles.guide.values():
            logits = site["read"]["logits"][:half]
            first, second = site["value"].split(half)
            direction = (1 - 2 * second) * (first != second) * logits.detach().abs().sigmoid()
            total = total + difference * sum_events(direction * logits, site)
        return (particles.log_likelihood + particles.log_prior).mean(0) + total.mean(0)


class _Antithetic(Messenger):
    """Draw each latent of a guide in antithetic pairs, first all first draws, then all second draws."""

    def __init__(self, pairs: int):
        super().__init__()
        self.pairs = pairs
        self.draws: dict[str, int] = {}  # by site, the number of draws so far that are run one by one
        self.first: dict[str, tuple[Tensor, Tensor]] = {}  # their first probabilities, and the values of all draws

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or site_is_subsample(msg):
            return
        base, name = base_distribution(msg["fn"]), msg["name"]
        transformed = isinstance(msg["fn"], torch.distributions.TransformedDistribution)
        if transformed or not isinstance(base, dist.Bernoulli | torch.distributions.Bernoulli):
            kind = type(msg["fn"] if transformed else base).__name__
            raise ValueError(f"DisARM needs Bernoulli latents, got a {kind} for site {name!r} of the guide")
        if torch_private.is_batched(base.probs):
            raise _depends_on_latents(name)
        with torch_private.outside_vmap() as level:
            if level is not None:
                value = torch_private.batched(self._values(base.probs), level)
            else:
                value = self._next_value(name, base.probs)
        msg["value"], msg["done"] = value, True

    def _next_value(self, name: str, probs: Tensor) -> Tensor:
        """Return the value of the next draw, where draws are run one by one."""
        if name not in self.first:
            self.first[name] = probs, self._values(probs)
        first, values = self.first[name]
        if not torch.equal(first, probs):
            raise _depends_on_latents(name)
        self.draws[name] = self.draws.get(name, -1) + 1
        return values[self.draws[name]]

    def _values(self, probs: Tensor) -> Tensor:
        """Draw all values, ``(K, *shape)``."""
        probs = probs.detach()
        u = torch.rand(self.pairs, *probs.shape, dtype=probs.dtype, device=probs.device)
        return torch.cat([u > 1 - probs, u < probs]).to(probs.dtype)


def _depends_on_latents(name: str) -> ValueError:
    got = f"site {name!r} of the guide, which depends on other latents"
    hint = "objectives.LeaveOneOut takes any latents"
    return DrawError(f"DisARM needs latents that depend on the data alone, got {got}; {hint}")
