"""A particle filter: log p(x) of sequences, whose latents and observations follow each other in time."""

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae._utils.param_store import without_training
from pyro_vae._utils.shared_calls import report_of_ranks
from pyro_vae._utils.traces import latent_sites, log_density, observed_sites
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import function, positive_int
from pyro_vae.arguments import any_arguments
from pyro_vae.draws import PerDraw, Values
from pyro_vae.evidence.importance_sampling import (
    Evidence,
    ReportProgress,
    WeightSampler,
    batched_estimate,
    densities,
    draws_at_once,
)
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.exact.model_density import ModelDensity, plus

__all__ = ["particle_log_evidence"]

_ESS = 0.5  # share of the particles; resampled below it


@report_of_ranks("particle_log_evidence")
@torch.no_grad()
@any_arguments
@without_training
def particle_log_evidence(
    model: Function,
    guide: Function | None,
    *data: Data,
    num_particles: int = 100,
    num_filters: int = 50,
    plate: str = "data",
    seed: int = 0,
    progress: bool | None = None,
) -> Evidence:
    r"""Estimate the log marginal likelihood of each sequence by particle filters (sequential importance resampling),

    .. math:: \hat p(x) = \prod_{t=1}^T \frac1K \sum_{k=1}^K w_t^k, \qquad
              w_t = \frac{p(z_t, x_t \mid z_{<t}, x_{<t})}{q(z_t \mid z_{<t}, x)},\quad z_t \sim q(z_t \mid z_{<t}, x).

    The model is a plain Pyro program that observes data between its latents, mostly a loop over time. A step has the
    latents up to the next observation, and the observations after them: z_1, x_1, z_2, x_2 are two steps. After a step,
    the K particles of a sequence are drawn again in proportion to their weights where their effective number is below
    K/2 (systematic resampling); in the formula, in each step. So particles that explain the past badly die out, and the
    error grows with the number of steps, where that of :func:`pyro_vae.log_evidence` grows exponentially with it, if
    the guide does not know the future.

    :math:`\hat p(x)` is unbiased for p(x). Each filter gives one weight, and the estimate is the logarithm of the mean
    over independent filters: in expectation a lower bound, with the error and k̂ of these weights, see
    :class:`pyro_vae.Evidence`, where the number of draws is that of the filters.

    A guide that reads the whole sequence, and is close to the posterior, may be better served by
    :func:`pyro_vae.log_evidence`: its draws know the observations to come, and resampling by those of the past alone
    takes some of that away. All three are lower bounds in expectation: the highest is the closest.

    Args:
        model: a Pyro model with several steps. Step t may depend on all earlier values: programs are run from the start
            in each step, so that the time grows with the square of the number of steps.
        guide: the proposal, which draws the latents of the steps in the order of the model. Without one, ``None``, each
            latent is proposed from the model's p(z_t | z_{<t}), which is the bootstrap filter.
        data: arguments of both.
        num_particles: K, particles of each filter.
        num_filters: independent filters, weights of each sequence. More than 20 have a k̂.
        plate: name of the data plate.
        seed: of the draws.
        progress: whether to show a progress bar; by default only on a terminal or in a notebook.

    Raises:
        ValueError: if model and guide are not of this form: all latents come before the observations; the guide draws
            them in another order, leaves one out, or computes it from an auxiliary site, as autoguides do.

    Source: Gordon, Salmond and Smith 1993, "Novel approach to nonlinear/non-Gaussian Bayesian state estimation"; Del
    Moral 2004, "Feynman-Kac formulae", for the unbiasedness; Maddison et al. 2017, "Filtering variational objectives".

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):  # a random walk with steps N(0, 1), seen with noise N(0, 1)
    ...     z = torch.zeros(len(x))
    ...     with pyro.plate("data", len(x)):
    ...         for t in pyro.markov(range(x.shape[1])):
    ...             z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
    ...             pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])
    >>> x = torch.randn(3, 4)
    >>> found = particle_log_evidence(model, None, x, num_particles=200)
    >>> time = torch.arange(1.0, 5)
    >>> exact = dist.MultivariateNormal(torch.zeros(4), torch.minimum(time, time[:, None]) + torch.eye(4)).log_prob(x)
    >>> bool(((found.log_evidence - exact).abs() < 0.1).all())
    True
    """
    positive_int(num_particles, "num_particles")
    positive_int(num_filters, "num_filters")
    p, q = densities(model, _prior(model) if guide is None else guide, data, plate)
    steps = _Steps(q)

    def make_sampler(part: ModelDensity, report: ReportProgress) -> WeightSampler:
        at_once = max(1, draws_at_once(part) // num_particles)

        def sample(count: int) -> Tensor:
            counts = [min(at_once, count - first) for first in range(0, count, at_once)]
            return torch.cat([steps.filter(part, filters, num_particles, report) for filters in counts])

        return sample

    return batched_estimate("particle_log_evidence", p, num_filters, make_sampler, seed, progress)


def _prior(model: Function) -> Function:
    """The guide that draws the latents of a model from the model."""
    model = function(model, "model")
    return poutine.block(model, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])


class _Steps:
    """The steps of a model and its guide, each with latents and the observations that follow them."""

    def __init__(self, q: GuideDensity):
        p = q.p
        self.q, self.latents, self.observed = q, list[list[str]](), list[list[str]]()
        self._proposals, self._densities = PerDraw(), PerDraw()
        if p.eliminated:
            hint = "draw them, or pass None for the guide, which proposes from the model"
            raise ValueError(f"`guide` must draw all latents of the model, got one without {p.eliminated}; {hint}")
        if p.pair.auxiliary:
            hint = "write a guide of your own, or pass None, which proposes from the model"
            raise ValueError(
                f"`guide` must draw each latent itself, got one that computes latents from {p.pair.auxiliary}; {hint}"
            )
        for name in p.pair.model_trace.nodes:
            if name in p.latents:
                if not self.latents or self.observed[-1]:
                    self.latents.append([])
                    self.observed.append([])
                self.latents[-1].append(name)
            elif name in p.observed:
                if not self.latents:
                    self.latents.append([])
                    self.observed.append([])
                self.observed[-1].append(name)
        self._check()

    def _check(self) -> None:
        if sum(map(bool, self.latents)) < 2:
            raise ValueError(
                "`model` must observe data between its latents, as a loop over time does, got the latents "
                f"{list(self.q.p.latents)}, drawn before the observations; use pv.log_evidence, which weighs all of "
                "them at once"
            )
        step_of = {name: step for step, names in enumerate(self.latents) for name in names}
        drawn = [name for name in self.q.p.pair.guide_trace.nodes if name in step_of]
        for earlier, later in pairwise(drawn):
            if step_of[later] < step_of[earlier]:
                raise ValueError(
                    f"`guide` must draw the latents of the steps in the order of the model, got {later!r} after "
                    f"{earlier!r}; use pv.log_evidence, or pass None, which proposes from the model"
                )

    def filter(self, p: ModelDensity, filters: int, particles: int, report: ReportProgress) -> Tensor:
        """Run filters on some rows, and return log p(x) by each, ``(filters, N)``."""
        weights = _Weights(filters, particles, p)
        values: Values = {}
        for step in range(len(self.latents)):
            values = weights.resample(values)
            drawn, log_q = self._propose(p, values, step, filters * particles)
            values = values | drawn
            weights.add(self._log_density(p, values, step, filters * particles) - log_q)
            report(filters * p.num_data / len(self.latents))
        return weights.log_mean()

    def _propose(self, p: ModelDensity, values: Values, step: int, count: int) -> tuple[Values, Tensor]:
        """Draw the latents of a step given those before, ``(count, N, *event)``, with their log q, ``(count, N)``."""
        names, later = self.latents[step], _flat(self.latents[step + 1 :])

        def run(values: Values) -> tuple[dict[Any, Tensor], None]:
            sites = latent_sites(_trace_until(later, self.q.guide, values, p))
            found: dict[Any, Tensor] = {name: sites[name]["value"] for name in names}
            return found | {"log_q": self._summed(sites, names, p)}, None

        with poutine.block():
            results = self._proposals(run, count, self._at_sites(values))
        layouts = self.q.p.layouts
        return {name: layouts[name].to_cells(results.each(name, count)) for name in names}, results.each("log_q", count)

    def _log_density(self, p: ModelDensity, values: Values, step: int, count: int) -> Tensor:
        """log p(z_t, x_t | z_<t, x_<t) of a step at values of all latents up to it, ``(count, N)``."""
        names = [*self.latents[step], *self.observed[step]]
        later = _flat([*self.latents[step + 1 :], *self.observed[step + 1 :]])

        def run(values: Values) -> tuple[dict[Any, Tensor], None]:
            trace = _trace_until(later, self.q.p.model, values, p)
            return {"log_p": self._summed(observed_sites(trace) | latent_sites(trace), names, p)}, None

        with poutine.block():
            return self._densities(run, count, self._at_sites(values)).each("log_p", count)

    def _at_sites(self, values: Values) -> Values:
        return {name: self.q.p.layouts[name].to_site(value) for name, value in values.items()}

    def _summed(self, sites: Mapping[str, Any], names: Iterable[str], p: ModelDensity) -> Tensor:
        """The log-density of some sites together, ``(N,)``, in the dtype of sums."""
        return plus(self.q.p.runs.summed(log_density(sites[name])).double() for name in names) + p.zeros()


class _Weights:
    """The log-weights of K particles of each of F filters on N sequences, since they were resampled."""

    def __init__(self, filters: int, particles: int, p: ModelDensity):
        self.log_weight = p.zeros().expand(filters, particles, -1)
        self.log_past = p.zeros().expand(filters, -1)  # the logarithm of the mean weights up to the last resampling

    def add(self, increment: Tensor) -> None:
        """Add the log-weights of a step, ``(F K, N)``."""
        self.log_weight = self.log_weight + increment.reshape(self.log_weight.shape)

    def log_mean(self) -> Tensor:
        """Return the logarithm of the estimates, ``(F, N)``."""
        return self.log_past + self.log_weight.logsumexp(1) - math.log(self.log_weight.shape[1])

    def resample(self, values: Values) -> Values:
        """Draw the particles again where few have most of the weight; values are ``(F K, N, *event)``."""
        count = self.log_weight.shape[1]
        log_sum = self.log_weight.logsumexp(1)
        ess = (2 * log_sum - (2 * self.log_weight).logsumexp(1)).exp()  # NaN where all weights are zero: all stay
        few = ess < _ESS * count
        if not values or not few.any():
            return values
        self.log_past = torch.where(few, self.log_mean(), self.log_past)
        index = _systematic(self.log_weight.softmax(1))
        index = torch.where(few[:, None], index, torch.arange(count, device=index.device)[:, None])
        self.log_weight = torch.where(few[:, None], 0.0, self.log_weight)
        return {name: _take(value, index) for name, value in values.items()}


def _take(value: Tensor, index: Tensor) -> Tensor:
    """Take particles ``(F K, N, *event)`` by numbers ``(F, K, N)`` in their filter."""
    split = value.reshape(*index.shape[:2], *value.shape[1:])
    index = index.reshape(index.shape + (1,) * (split.dim() - 3)).expand_as(split)
    return split.gather(1, index).reshape(value.shape)


def _systematic(weight: Tensor) -> Tensor:
    """Draw numbers of particles, ``(F, K, N)``, in proportion to weights along K: each is K w of them, up to one."""
    count = weight.shape[1]
    start = torch.rand_like(weight[:, :1])
    points = (start + torch.arange(count, device=weight.device)[:, None]) / count
    bounds = weight.nan_to_num(1 / count).cumsum(1).movedim(1, -1).contiguous()
    index = torch.searchsorted(bounds, points.movedim(1, -1).contiguous(), right=True)
    return index.clamp(max=count - 1).movedim(-1, 1)


class _Stop(Exception):
    """The end of the sites that are needed."""


class _StopBefore(Messenger):
    """End a run at the first of some sites."""

    def __init__(self, names: frozenset[str]):
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            raise _Stop


def _trace_until(later: frozenset[str], run: Function, values: Values, p: ModelDensity) -> Any:
    """The trace of a run at values of some latents, up to the first of the sites ``later``."""
    with poutine.trace() as tracer:
        try:
            with _StopBefore(later):
                poutine.condition(run, data=values)(*p.data)
        except _Stop:
            pass
    return tracer.trace


def _flat(steps: Iterable[Iterable[str]]) -> frozenset[str]:
    return frozenset(name for names in steps for name in names)
