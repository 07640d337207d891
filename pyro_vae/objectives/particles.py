"""Draws of the latents beside each other, and their log-densities for each datum: what gradient estimators work on."""

from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae._utils.traces import latent_sites, log_density, observed_sites

__all__ = ["Particles"]

Site = dict[str, Any]


Sites = dict[str, Site]


class Particles:
    """K draws of the latents of B data, from a pair of traces: sites, and their log-densities, each ``(K, B)``.

    Args:
        who: that needs them, for its errors.
        model_trace: of the model, run against the guide.
        guide_trace: of the guide.
        num_draws: K, in a plate on the left of the data's.

    Raises:
        ValueError: if a site is not in the one data plate, or the guide has other latents than the model.
    """

    def __init__(self, who: str, model_trace: Trace, guide_trace: Trace, num_draws: int):
        self.observed = observed_sites(model_trace)
        self.prior = latent_sites(model_trace)
        self.guide = latent_sites(guide_trace)
        _check_plate(who, self.observed | self.prior | self.guide)
        # An autoguide draws an auxiliary site, and gives the latent as a Delta with the Jacobian: together they are q.
        ours = {name for name, site in self.guide.items() if not site["infer"].get("is_auxiliary")}
        if self.prior.keys() != ours:
            raise ValueError(
                f"`{who}` must be a guide of the same latents: the model's latents are {sorted(self.prior)}, those of "
                f"the guide {sorted(ours)}"
            )
        if not self.observed or not self.guide:
            raise ValueError(f"{who}: the model has no {'latent' if self.observed else 'observed'} sites to learn from")
        first = next(iter(self.observed.values()))
        self.scale: Any = first["scale"]  # N/B of a mini-batch, and any that the whole model was given
        self.shape = torch.Size([num_draws, next(f.size for f in first["cond_indep_stack"] if f.dim == -1)])
        self.log_likelihood = self.log_density(self.observed)
        self.log_prior = self.log_density(self.prior)
        self.log_q = self.log_density(self.guide)
        # log q of what passes no gradient on, without the weight or mask that a handler may have given it
        self.score = self._sum(site["score_parts"].score_function for site in self.guide.values())

    def log_density(self, sites: Sites) -> Tensor:
        """Summed over sites, each with its weight relative to the data's."""
        return self._sum(log_density(site) * (site["scale"] / self.scale) for site in sites.values())

    def pairs(self, who: str) -> list[tuple[str, Site, Site]]:
        """Name of each latent, and its sites in guide and model."""
        auxiliary = sorted(self.guide.keys() - self.prior.keys())
        if auxiliary:
            raise ValueError(
                f"`{who}` must be a guide that draws each latent from a distribution of its own: the guide draws its "
                f"latents from {auxiliary}, as autoguides do, and has no KL of each"
            )
        return [(name, site, self.prior[name]) for name, site in self.guide.items()]

    def _sum(self, terms: Any) -> Tensor:
        return sum(terms, self.x.new_zeros(())).expand(self.shape)

    def check_one_scale(self, who: str) -> None:
        """Raise if observed sites are weighted differently: no one factor is then outside of a logarithm."""
        scales = {name: torch.as_tensor(site["scale"]).flatten().tolist() for name, site in self.observed.items()}
        if len({tuple(scale) for scale in scales.values()}) > 1:
            raise ValueError(f"`{who}` must be one scale for all: observed sites have the scales {scales}")

    @property
    def f(self) -> Tensor:
        """log p(x, z) - log q(z | x)."""
        return self.log_likelihood + self.log_prior - self.log_q

    @property
    def x(self) -> Tensor:
        """The first observed site of each datum, ``(B, features)``."""
        site = next(iter(self.observed.values()))
        return site["value"].detach().reshape(self.shape[1], -1)


def _check_plate(who: str, sites: Sites) -> None:
    first: Any = None
    for name, site in sites.items():
        frames = [frame for frame in site["cond_indep_stack"] if frame.name != "num_particles_vectorized"]
        first = first or (frames or [None])[0]
        if [frame.dim for frame in frames] != [-1] or (frames[0].name, frames[0].size) != (first.name, first.size):
            raise ValueError(
                f"`{who}` must be one data plate around all sites, as the rightmost batch dimension. "
                f"pyro.infer.Trace_ELBO has no such limit: site {name!r} is in the plates {[frame.name for frame in frames]}"
            )
