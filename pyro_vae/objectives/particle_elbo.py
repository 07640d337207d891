"""The base class of our ELBOs: K particles per datum, one bound and one surrogate for each datum.

Model and guide run once for each particle, all at once where ``torch.vmap`` can, see :mod:`pyro_vae.draws`.
"""

import math
from abc import abstractmethod
from typing import Any

import torch
from pyro import infer
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import sum_rightmost
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.infer.enum import get_importance_trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import is_integer
from pyro_vae.arguments import Bound, unbound
from pyro_vae.draws import PerDraw, Results, Values
from pyro_vae.objectives.particles import Particles, Site

__all__ = ["ParticleELBO", "sum_events"]

Pair = tuple[Trace, Trace]
"""The traces of a model and its guide."""


class ParticleELBO(Trace_ELBO):
    """An ELBO with K = ``num_particles`` vectorized draws, ``minimum`` or more, and one surrogate for each datum."""

    sums_over_rows = True
    """Whether the loss of a batch is the sum of one of each datum, so that several ranks can share the batch."""

    def __init__(self, num_particles: int, minimum: int = 1, even: bool = False):
        wrong = not is_integer(num_particles) or num_particles < minimum
        if wrong or (even and num_particles % 2):
            kind = "an even number" if even else "an integer"
            raise ValueError(f"`num_particles` must be {kind}, {minimum} or more, got {num_particles!r}")
        super().__init__(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
        self._per_draw = PerDraw()

    @abstractmethod
    def bound(self, particles: Particles) -> Tensor:
        """Compute the reported value of each datum, ``(B,)``."""

    @abstractmethod
    def surrogate(self, particles: Particles) -> Tensor:
        """Compute a value of each datum, ``(B,)``, whose gradient is the gradient estimate."""

    def read(self, name: str, site: Site, prior: Site | None) -> dict[str, Tensor]:
        """Read further tensors of a latent in one draw, from its sites in guide and model, into ``site["read"]``."""
        return {}

    @property
    def bound_draws(self) -> int:
        """Draws in the bound whose gradient is estimated: 1 for the ELBO, K for a bound of K draws."""
        return 1

    @torch.no_grad()
    def loss(self, model: Function, guide: Function, *args: Any, **kwargs: Any) -> float:
        """Compute minus the bound, summed over all data. A baseline does not learn from this call."""
        particles = self._particles(model, guide, args, kwargs)
        return -(particles.scale * self.bound(particles)).sum().item()

    def differentiable_loss(self, model: Function, guide: Function, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss, with the estimated gradient."""
        loss, surrogate = self._losses(model, guide, args, kwargs)
        return loss + (surrogate - surrogate.detach())

    def loss_and_grads(self, model: Function, guide: Function, *args: Any, **kwargs: Any) -> float:
        """Compute the loss, and add the estimated gradient to that of the parameters."""
        loss, surrogate = self._losses(model, guide, args, kwargs)
        if surrogate.requires_grad:
            surrogate.backward()
        return loss.item()

    def _losses(self, model: Function, guide: Function, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        particles = self._particles(model, guide, args, kwargs)
        loss = -(particles.scale * self.bound(particles)).sum().detach()
        return loss, -(particles.scale * self.surrogate(particles)).sum()

    def _particles(self, model: Function, guide: Function, args: Any, kwargs: Any) -> Particles:
        model_trace, guide_trace = self._get_trace(model, guide, args, kwargs)
        return Particles(type(self).__name__, model_trace, guide_trace, self.num_particles)

    def _get_trace(self, model: Function, guide: Function, args: Any, kwargs: Any) -> Pair:
        """Return the traces of model and guide, with the K draws on the left of the tensors of their sites."""
        auto = unbound(guide)
        if isinstance(auto, AutoGuide) and auto.prototype_trace is None:  # makes parameters, which no draw must make
            of_model = guide.arguments(*args) if isinstance(guide, Bound) else (args, kwargs)
            auto._setup_prototype(*of_model[0], **of_model[1])
        validates = infer.is_validation_enabled()

        def run(_: Values) -> tuple[dict[Any, Tensor], Pair]:
            pair = self._one_draw(model, guide, args, kwargs, validates)
            return self._tensors(pair), pair

        return _with_draws(self._per_draw(run, self.num_particles), self.num_particles)

    def _one_draw(self, model: Function, guide: Function, args: Any, kwargs: Any, validates: bool) -> Pair:
        model_trace, guide_trace = get_importance_trace("flat", math.inf, model, guide, args, kwargs)
        if validates and not infer.is_validation_enabled():  # the checks of shapes, which need no values
            check_model_guide_match(model_trace, guide_trace)
            for trace in (model_trace, guide_trace):
                for site in trace.nodes.values():
                    if site["type"] == "sample":
                        check_site_shape(site, math.inf)  # type: ignore[arg-type]
        return model_trace, guide_trace

    def _tensors(self, pair: Pair) -> dict[Any, Tensor]:
        """The tensors of the sites of one draw, by owner, site and key."""
        found: dict[Any, Any] = {}
        for owner, trace in enumerate(pair):
            for name, site in _sample_sites(trace):
                for key in _SITE_TENSORS:
                    found[owner, name, key] = site.get(key)
                if "score_parts" in site:
                    found[owner, name, "score"] = site["score_parts"].score_function
                if owner == 1 and not site["is_observed"]:
                    prior: Any = pair[0].nodes.get(name)
                    for key, tensor in self.read(name, site, prior).items():
                        found[owner, name, "read", key] = tensor
        return {key: tensor for key, tensor in found.items() if isinstance(tensor, Tensor)}


_SITE_TENSORS = ("value", "unscaled_log_prob", "log_prob", "mask", "scale")


def _sample_sites(trace: Trace) -> list[tuple[str, Site]]:
    nodes: dict[str, Any] = dict(trace.nodes)
    return [(name, site) for name, site in nodes.items() if site["type"] == "sample"]


def _with_draws(results: Results, count: int) -> Pair:
    """Put the tensors of all draws into the traces of one of them, as Pyro's vectorized particles do."""
    pair = results.info
    for trace in pair:
        for _, site in _sample_sites(trace):
            dim = -1 - max((-frame.dim for frame in site["cond_indep_stack"] if frame.dim is not None), default=0)
            frame = CondIndepStackFrame("num_particles_vectorized", dim, count, 0)
            site["cond_indep_stack"] = (frame, *site["cond_indep_stack"])
            site["read"] = {}
    for key in results.tensors:
        owner, name, what, *more = key
        site, tensor = pair[owner].nodes[name], results.tensors[key]
        if what == "read":
            site["read"][more[0]] = results.each(key, count)
        elif what == "score":
            site["score_parts"] = ScoreParts(site["log_prob"], tensor, tensor)
        elif what == "scale":  # a number is the same for all draws
            site["scale"] = tensor[0] if key in results.stacked and tensor.dim() == 1 else tensor
        elif what != "value" or not site["is_observed"]:
            site[what] = results.each(key, count)
        else:
            site[what] = tensor
    return pair


def sum_events(values: Tensor, site: dict[str, Any]) -> Tensor:
    """Sum over the variables of a site, ``(*batch, *event)`` to ``(*batch)``."""
    return sum_rightmost(values, site["fn"].event_dim)
