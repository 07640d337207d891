"""K draws of the latents of each datum with their log-densities, from which an ELBO is computed."""

from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae._utils.traces import latent_sites, log_density, observed_sites, set_plate_sizes
from pyro_vae.model_guide import check_one_plate, check_same_latents

__all__ = ["Particles"]

Site = dict[str, Any]
Sites = dict[str, Site]


class Particles:
    """K draws of the latents of B data, from a pair of traces: sites, and their log-densities, each ``(K, B)``.

    Args:
        objective: the name of the objective, for error messages.
        model_trace, guide_trace: of the model, replayed with the guide's draws, and of the guide.
        num_draws: K, the dimension on the left of the data plate.

    Raises:
        ValueError: if a site is not in the one data plate, or guide and model have different latents.
    """

    def __init__(self, objective: str, model_trace: Trace, guide_trace: Trace, num_draws: int):
        self.objective = objective
        set_plate_sizes(model_trace, guide_trace)
        self.observed, self.prior = observed_sites(model_trace), latent_sites(model_trace)
        self.guide, factors = latent_sites(guide_trace), observed_sites(guide_trace)
        sites = [("model", name, site) for name, site in (self.observed | self.prior).items()]
        sites += [("guide", name, site) for name, site in (self.guide | factors).items()]
        check_one_plate(sites, purpose=f" for {objective} (pyro.infer.Trace_ELBO has no such limit)")
        # An autoguide draws an auxiliary site, and the latent is a Delta with the Jacobian: together they are q.
        check_same_latents(self.prior, self.guide)
        if not self.observed or not self.guide:
            missing = "latent" if self.observed else "observed"
            raise ValueError(f"{objective} needs a model with latent and observed sites, got no {missing} sites")
        first = next(iter(self.observed.values()))
        self.scale: Any = first["scale"]  # N/B of a mini-batch, times a scale of the whole model
        self.shape = torch.Size([num_draws, log_density(first).shape[-1]])
        self.log_likelihood = self.log_density(self.observed)
        self.log_prior = self.log_density(self.prior)
        self.log_q = self.log_density(self.guide | factors)
        # log q of the latents without pathwise gradient; a handler's scale or mask has no part in it
        self.score = self._sum(site["score_parts"].score_function for site in self.guide.values())

    @property
    def log_weight(self) -> Tensor:
        """log p(x, z) - log q(z | x)."""
        return self.log_likelihood + self.log_prior - self.log_q

    @property
    def x(self) -> Tensor:
        """The first observed site of each datum, ``(B, features)``."""
        site = next(iter(self.observed.values()))
        value = site["value"].detach()
        same = value.dim() == len(site["fn"].batch_shape) + site["fn"].event_dim
        return (value if same else value[0]).reshape(self.shape[1], -1)

    def log_density(self, sites: Sites) -> Tensor:
        """Sum the log-densities of sites, each with its scale relative to that of the data."""
        return self._sum(log_density(site) * (site["scale"] / self.scale) for site in sites.values())

    def pairs(self) -> list[tuple[str, Site, Site]]:
        """List the name of each latent with its sites in guide and model."""
        if auxiliary := sorted(self.guide.keys() - self.prior.keys()):
            needs = "needs a guide that draws each latent from a distribution of its own"
            got = f"one that draws its latents from {auxiliary}, as autoguides do"
            raise ValueError(f"{self.objective} {needs}, got {got}")
        return [(name, site, self.prior[name]) for name, site in self.guide.items()]

    def check_one_scale(self) -> None:
        """Raise if observed sites have different scales: then no common factor can leave the logarithm of a bound."""
        scales = {name: torch.as_tensor(site["scale"]).flatten().tolist() for name, site in self.observed.items()}
        if len({tuple(scale) for scale in scales.values()}) > 1:
            raise ValueError(f"{self.objective} needs observed sites of one scale, got the scales {scales}")

    def _sum(self, terms: Any) -> Tensor:
        return sum(terms, self.x.new_zeros(())).expand(self.shape)
