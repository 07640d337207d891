"""A reference for q(z | x) that needs no exact answer: draws of p(z | x) for a few data, by the No-U-Turn sampler."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from pyro_vae._utils.param_store import without_training
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import positive_int
from pyro_vae.arguments import any_arguments
from pyro_vae.exact.model_density import ModelDensity
from pyro_vae.handlers import ResampleObserved
from pyro_vae.inference_data.dims import DimensionNames, data_labels
from pyro_vae.inference_data.groups import attributes, tree_of
from pyro_vae.inference_data.settings import ExportSettings, as_array
from pyro_vae.model_guide import ModelGuide

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["reference"]


@any_arguments
@without_training
def reference(
    model: Function,
    *data: Data,
    draws: int = 1000,
    chains: int = 2,
    warmup: int = 500,
    seed: int = 0,
    plate: str = "data",
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
) -> "xr.DataTree":
    """Draw from the posterior p(z | x) of a model, trained or not, by Hamiltonian Monte Carlo.

    Names and dimensions are those of :func:`pyro_vae.to_datatree`, so that ArviZ can draw q next to the reference.
    Groups: ``posterior`` (latents, and the deterministic sites given them), ``sample_stats`` (for each draw, whether it
    is ``diverging``, and ``lp``, log p(x, z) of all data in nats) and ``observed_data``. For these draws ``r_hat`` and
    ``ess`` apply, unlike for those of a guide: read them first. Each chain starts from a draw of the prior, so a chain
    that stays in another mode than the others increases ``r_hat``.

    Parameters keep their values. All data are sampled together, at hundreds of runs of the decoder a step: pass few.

    Args:
        model: a Pyro model of continuous latents with one data plate, as the rightmost dimension, that has all sites.
        data: its arguments.
        draws, seed: number of draws of each chain, and their seed.
        chains: number of chains, which run one after the other on different random numbers.
        warmup: number of steps before the draws of a chain, in which step size and mass matrix are adapted.
        plate: name of the data plate, whose dimension is called ``obs``.
        dims, coords: names and coordinates of dimensions, as for ``to_datatree``.

    Raises:
        ValueError: if a latent is discrete, or the model has another form.

    Source: Hoffman and Gelman 2014, "The No-U-Turn Sampler"; the sampler is Pyro's.

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> net = networks.linear()
    >>> vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> tree = reference(vae.model, torch.zeros(3, 2), draws=20, warmup=20)
    >>> dict(tree["posterior"]["z"].sizes), list(tree.children)
    ({'chain': 2, 'draw': 20, 'obs': 3, 'latent': 1}, ['posterior', 'sample_stats', 'observed_data'])
    """
    positive_int(chains, "chains")
    positive_int(warmup, "warmup")
    settings = ExportSettings(draws, seed, plate, dims, coords)
    with seeded(seed):
        pair = ModelGuide(model, None, data, plate)
        settings.plate = pair.plate
        density = ModelDensity(pair)
        if discrete := [name for name, site in pair.latents.items() if site["fn"].support.is_discrete]:
            got = f"the discrete {discrete}; use pv.exact.posterior for these"
            raise ValueError(f"`model` must have continuous latents, got {got}")
        names = DimensionNames(pair.latents | pair.deterministic, pair.observed, settings, chains, data_labels(pair))
        runs = [_chain(model, pair.data, draws, warmup) for _ in range(chains)]
        values = {name: torch.cat([run[name] for run, _, _ in runs]) for name in pair.latents}
        with torch.no_grad():
            chunks = zip(*(value.split(density.chunk) for value in values.values()), strict=True)
            log_p = [density.log_joint(dict(zip(values, chunk, strict=True))).sum(1) for chunk in chunks]
            if pair.deterministic:
                values |= Predictive(ResampleObserved()(model), values, return_sites=tuple(pair.deterministic))(
                    *pair.data
                )
    arrays = {name: as_array(value).reshape(chains, draws, *names.shapes[name]) for name, value in values.items()}
    stats = {"diverging": torch.cat([diverging for _, diverging, _ in runs]), "lp": torch.cat(log_p)}
    shaped = {name: (("chain", "draw"), as_array(value).reshape(chains, draws)) for name, value in stats.items()}
    groups = {
        "posterior": names.dataset(arrays, drawn=True),
        "sample_stats": names.named(shaped),
        "observed_data": names.dataset({name: as_array(site["value"]) for name, site in pair.observed.items()}),
    }
    rates = [rate for _, _, rate in runs]
    return tree_of(groups, attributes(draws, seed) | {"warmup": warmup, "acceptance_rate": rates})


def _chain(
    model: Function, data: tuple[Tensor, ...], draws: int, warmup: int
) -> tuple[dict[str, Tensor], Tensor, float]:
    """Return draws ``(draws, N, *event)`` of each latent, which of them diverged, and the acceptance rate."""
    sampler = MCMC(NUTS(model, init_strategy=init_to_sample), draws, warmup, disable_progbar=True)
    device = data[0].device
    with nullcontext() if torch.get_default_device().type == device.type else device:  # Pyro's tensors are made there
        sampler.run(*data)
    found: Any = sampler._diagnostics[0]  # `diagnostics()` computes much more
    diverging = torch.zeros(draws, dtype=torch.bool, device="cpu")
    diverging[found["divergences"]] = True
    return sampler.get_samples(), diverging, float(found["acceptance rate"])
