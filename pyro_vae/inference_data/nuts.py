"""A reference for q(z | x) that needs no exact answer: the No-U-Turn sampler on p(z | x), for a few data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import deterministic_sites, latent_sites, observed_sites
from pyro_vae._utils.validation import positive_int
from pyro_vae.exact.model_density import ModelDensity
from pyro_vae.handlers import ResampleObserved
from pyro_vae.inference_data.datatree import attributes
from pyro_vae.inference_data.dims import DimensionNames

__all__ = ["reference"]


def reference(
    model: Callable[..., Any],
    *data: Tensor,
    draws: int = 1000,
    chains: int = 2,
    warmup: int = 500,
    seed: int = 0,
    plate: str = "data",
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    """Draws from the posterior p(z | x) of a model as it is, trained or not, by Hamiltonian Monte Carlo.

    Names and dimensions are those of :func:`pyro_vae.to_datatree`, so that ArviZ draws q and the reference side by
    side. Groups: ``posterior`` (the latents, and what is deterministic given them), ``sample_stats`` (of each draw
    whether it is ``diverging``, and ``lp``, log p(x, z) of all data in nats) and ``observed_data``. Unlike for draws
    of a guide, ``r_hat`` and ``ess`` say whether these can be believed: look at them first. Each chain starts from a
    draw of the prior, so that one that stays in a mode of its own shows in ``r_hat``.

    Parameters are held as they are. Data are sampled together, and a step costs hundreds of runs of the decoder: hand
    over a few, such as ``x[:10]``.

    Args:
        model: a Pyro model of continuous latents with one data plate, as the rightmost dimension, that holds all sites.
        data: what it takes.
        draws: of each chain.
        chains: one after the other, each with random numbers of its own.
        warmup: steps of each chain before its draws, in which step size and mass are adapted.
        seed: of the draws.
        plate: name of the data plate, whose dimension is called ``obs``.
        dims: names of a site's event dimensions, by site, as for ``to_datatree``.
        coords: coordinates by dimension, as for ``to_datatree``.

    Raises:
        ValueError: if a latent is discrete, or the model is of another form.

    Source: Hoffman and Gelman 2014, "The No-U-Turn Sampler"; the sampler is Pyro's.

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(1),
    ...     encoder=guides.DiagonalNormal(2, 1, networks.linear()),
    ...     decoder=likelihoods.Normal(1, 2, networks.linear()),
    ... )
    >>> tree = reference(vae.model, torch.zeros(3, 2), draws=20, warmup=20)
    >>> dict(tree["posterior"]["z"].sizes), list(tree.children)
    ({'chain': 2, 'draw': 20, 'obs': 3, 'latent': 1}, ['posterior', 'sample_stats', 'observed_data'])
    """
    for name, value in (("draws", draws), ("chains", chains), ("warmup", warmup)):
        positive_int(value, name)
    store = pyro.get_param_store()
    with store.scope(store.get_state()), seeded(seed):
        problem = ModelDensity(model, data, plate)
        discrete = [name for name, site in problem.latents.items() if site["fn"].support.is_discrete]
        if discrete:
            raise ValueError(
                f"`model` must be continuous ones: its latents {discrete} are discrete. Over discrete ones "
                "pyro_vae.exact.inference.posterior sums"
            )
        with poutine.block(), torch.no_grad():
            trace = poutine.trace(model).get_trace(*data)
        latents, observed, deterministic = latent_sites(trace), observed_sites(trace), deterministic_sites(trace)
        names = DimensionNames(
            latents | deterministic, observed, plate, dims or {}, coords or {}, draws, {}, {}, chains
        )
        runs = [_chain(model, data, draws, warmup) for _ in range(chains)]
        values = {name: torch.stack([run[name] for run, _, _ in runs]) for name in latents}
        flat = {name: value.flatten(0, 1) for name, value in values.items()}
        with torch.no_grad():
            given = (
                Predictive(ResampleObserved()(model), flat, return_sites=tuple(deterministic))(*data)
                if deterministic
                else {}
            )
            log_p = torch.cat([_log_joint(problem, flat, first) for first in range(0, draws * chains, problem.chunk)])

    def by_chain(name: str, value: Tensor) -> np.ndarray:
        return value.detach().cpu().reshape(chains, draws, *names.shapes[name]).numpy()

    attrs: dict[str, Any] = attributes(draws, seed) | {
        "warmup": warmup,
        "acceptance_rate": [rate for _, _, rate in runs],
    }
    stats = xr.Dataset(
        {
            "diverging": (("chain", "draw"), torch.stack([diverging for _, diverging, _ in runs]).numpy()),
            "lp": (("chain", "draw"), log_p.reshape(chains, draws).cpu().numpy()),
        },
        coords={"chain": range(chains), "draw": range(draws)},
    )
    groups = {
        "posterior": names.dataset({name: by_chain(name, value) for name, value in (flat | given).items()}, drawn=True),
        "sample_stats": stats,
        "observed_data": names.dataset({name: site["value"].detach().cpu().numpy() for name, site in observed.items()}),
    }
    tree = xr.DataTree.from_dict({name: group.assign_attrs(attrs) for name, group in groups.items()})
    tree.attrs = attrs
    return tree


def _chain(
    model: Callable[..., Any], data: tuple[Tensor, ...], draws: int, warmup: int
) -> tuple[dict[str, Tensor], Tensor, float]:
    """Draws ``(draws, N, *event)`` of each latent, which of them ended in a divergence, and the rate of acceptance."""
    sampler = MCMC(NUTS(model, init_strategy=init_to_sample), draws, warmup, disable_progbar=True)
    sampler.run(*data)
    found: Any = sampler._diagnostics[0]  # `diagnostics()` computes much else besides
    diverging = torch.zeros(draws, dtype=torch.bool)
    diverging[found["divergences"]] = True
    return sampler.get_samples(), diverging, float(found["acceptance rate"])


def _log_joint(problem: ModelDensity, values: dict[str, Tensor], first: int) -> Tensor:
    return problem.log_joint({name: value[first : first + problem.chunk] for name, value in values.items()}).sum(1)
