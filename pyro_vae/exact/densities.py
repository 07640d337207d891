"""The joint density log p(x, z) of a Pyro model, and the density log q(z | x) of a guide, at any z.

What :mod:`pyro_vae.exact` sums and integrates: a model or guide of one data plate is run with its latents conditioned
on many values at once, one more dimension on the left.
"""

import math
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import latent_sites, log_density, observed_sites
from pyro_vae._utils.typing import Function
from pyro_vae.distributions.properties import is_masked, is_normalized
from pyro_vae.exact.coordinates import LatentCoordinates
from pyro_vae.model_guide import ModelGuide

__all__ = ["MAX_STATES", "ModelDensity", "draw", "log_joint", "sample_with_log_q"]

MAX_STATES = 2**16
"""The most states of discrete latents that are summed over."""


_BUDGET = 2**20  # numbers in the largest tensor of one chunk: larger ones only cost page faults


Values = dict[str, Tensor]


class ModelDensity:
    """A model on its data, with its latents open: log p(x, z) at any z."""

    def __init__(self, model: Function, data: tuple[Tensor, ...], plate: str):
        with seeded(0):
            pair = ModelGuide(model, None, data, plate)
            with torch.no_grad(), pyro.validation_enabled():
                pair.model_trace.compute_log_prob()
        self.model, self.data, self.plate = pair.model, pair.data, plate
        self.latents, self.observed = pair.latents, pair.observed
        self.num_data = _check_structure(self.latents, self.observed, plate)
        self.dtype = log_density(next(iter(self.observed.values()))).dtype
        widths = [site["fn"].event_shape.numel() for site in (self.latents | self.observed).values()]
        self.chunk = max(1, _BUDGET // (self.num_data * max(64, *widths)))
        self._check_repeatable()

    def _check_repeatable(self) -> None:
        """Run the model twice at the same latents, alone and beside others: dropout, say, makes no one p(x, z)."""
        drawn = {name: site["value"][None] for name, site in self.latents.items()}
        beside = {name: torch.cat([value, value.roll(1, 1)]) for name, value in drawn.items()}
        with torch.no_grad(), seeded(0):
            first, second = self.log_joint(drawn)[0], self.log_joint(beside)[0]
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-3):
            raise ValueError(
                "model: gives another log p(x, z) at the same z when it is run again, beside other values. Put "
                "dropout and batch normalisation into evaluation mode: `vae.eval()`"
            )

    @property
    def is_discrete(self) -> bool:
        """Whether every latent can be enumerated."""
        return all(site["fn"].has_enumerate_support for site in self.latents.values())

    def single_site(self) -> tuple[str, dict[str, Any]]:
        """Name and site of the only latent."""
        if len(self.latents) != 1:
            raise ValueError(
                f"`model` must be several discrete ones, of at most {MAX_STATES} states together, or a single "
                f"continuous one; a posterior is given of a single site: has the latent sites {list(self.latents)}"
            )
        return next(iter(self.latents.items()))

    def chart(self) -> "LatentCoordinates":
        """Coordinates of the only latent, a continuous one."""
        name, site = self.single_site()
        return LatentCoordinates(name, site["fn"], self.dtype)

    def zeros(self) -> Tensor:
        """``(N,)`` in float64, where the data are."""
        return torch.zeros(self.num_data, dtype=torch.float64, device=self.data[0].device)

    def log_joint(self, values: Values) -> Tensor:
        """log p(x, z) at values ``(C, 1 or N, *event)`` of every latent, as ``(C, N)``."""
        return log_joint(self.model, values, self.data)

    def sites(self, values: Values) -> dict[str, Any]:
        """The sites of the model, latent and observed, at values of every latent as :meth:`log_joint` takes them."""
        return _sites(self.model, values, self.data)

    @property
    def num_states(self) -> int:
        """How many joint states the discrete latents have."""
        return math.prod(map(len, self._supports()))

    def _supports(self) -> list[Tensor]:
        return [
            site["fn"].enumerate_support(expand=False).reshape(-1, 1, *site["fn"].event_shape)
            for site in self.latents.values()
        ]

    def states(self) -> Iterator[Values]:
        """Chunks of the joint states of all latents, as values ``(C, 1, *event)``."""
        supports, count = self._supports(), self.num_states
        if count > MAX_STATES:
            raise ValueError(
                f"model: its discrete latents {list(self.latents)} have {count} states; at most {MAX_STATES} are "
                "summed over exactly"
            )
        for first in range(0, count, self.chunk):
            flat = torch.arange(first, min(first + self.chunk, count), device=supports[0].device)
            values = {}
            for name, support in zip(self.latents, supports, strict=True):
                values[name] = support[flat % len(support)]
                flat = flat // len(support)
            yield values


def _check_structure(latents: dict[str, Any], observed: dict[str, Any], plate: str) -> int:
    if not latents or not observed:
        raise ValueError(f"model: needs latent and observed sites; has {list(latents)} and {list(observed)}")
    for name, site in (latents | observed).items():
        _check_frames("model", name, site, plate)
        if torch.as_tensor(site["scale"]).ne(1).any():
            raise ValueError(
                f"model: site {name!r} is subsampled or scaled (scale {site['scale']}); exact answers need all "
                "data, and densities as they are"
            )
    masked = [name for name, site in latents.items() if site["mask"] is not None or is_masked(site["fn"])]
    if masked:
        raise ValueError(f"model: its latents {masked} are masked, and their prior is then no distribution")
    unnormalised = [name for name, site in observed.items() if not is_normalized(site["fn"])]
    if unnormalised:
        raise ValueError(
            f"model: the likelihood of {unnormalised} is not normalised (soft targets, or pyro.factor), so there is no "
            "p(x). Use likelihoods.ContinuousBernoulli for grey data, or likelihoods.Bernoulli on binarized data"
        )
    return next(iter(observed.values()))["cond_indep_stack"][0].size


def _check_frames(who: str, name: str, site: dict[str, Any], plate: str, size: int | None = None) -> None:
    frames = site["cond_indep_stack"]
    if [frame.name for frame in frames] != [plate] or frames[0].dim != -1:
        raise ValueError(
            f"{who}: site {name!r} is in the plates {[frame.name for frame in frames]}; exact answers need every "
            f"site in one plate, {plate!r}, as the rightmost batch dimension"
        )
    if size is not None and frames[0].size != size:
        raise ValueError(f"{who}: site {name!r} has {frames[0].size} rows, and the model has {size}")


def _sites(function: Function, values: Values, data: tuple[Tensor, ...]) -> dict[str, Any]:
    with poutine.block():
        trace = poutine.trace(poutine.condition(function, data=values)).get_trace(*data)
    return observed_sites(trace)


def log_joint(function: Function, values: Values, data: tuple[Tensor, ...]) -> Tensor:
    """The log-density of a model or guide, ``(C, N)``, at values ``(C, 1 or N, *event)`` of every latent."""
    return sum((log_density(site) for site in _sites(function, values, data).values()), torch.zeros(()))


def draw(guide: Function, data: tuple[Tensor, ...], count: int) -> dict[str, Any]:
    """The latent sites of a guide of one data plate, each with ``count`` draws of every datum."""
    with poutine.block(), pyro.plate("num_draws", count, dim=-2):
        return latent_sites(poutine.trace(guide).get_trace(*data))


def sample_with_log_q(guide: Function, data: tuple[Tensor, ...], count: int) -> tuple[Values, Tensor]:
    """The values of :func:`draw`, ``(count, N, *event)`` by site, and their log q(z | x), ``(count, N)``."""
    sites = draw(guide, data, count)
    log_q = sum((log_density(site) for site in sites.values()), torch.zeros(()))
    return {name: site["value"] for name, site in sites.items()}, log_q
