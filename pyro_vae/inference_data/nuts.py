"""A reference for a guide that needs no exact answer: draws of the posterior by the No-U-Turn sampler."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_median, init_to_sample, init_to_uniform
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae._utils.param_store import without_training
from pyro_vae._utils.processes import default_processes, run_in_processes
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.shared_calls import report_of_ranks
from pyro_vae._utils.traces import latent_sites, log_density, observed_sites
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import positive_int
from pyro_vae.arguments import any_arguments
from pyro_vae.distributions.properties import without_masks
from pyro_vae.draws import PerDraw, Values
from pyro_vae.exact.elimination import enumerated, log_marginal, sample_eliminated
from pyro_vae.inference_data.dims import DimensionNames, data_labels
from pyro_vae.inference_data.groups import attributes, observation_dims, observed_values, tree_of
from pyro_vae.inference_data.layouts import SiteLayout
from pyro_vae.inference_data.likelihood import PointwiseLikelihood
from pyro_vae.inference_data.settings import ExportSettings, as_array
from pyro_vae.model_guide import ModelGuide

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["reference"]

_BUDGET = 2**22  # numbers in the tensors of a chunk of draws
_STRATEGIES = (init_to_sample, init_to_uniform, init_to_median)


@report_of_ranks("reference")
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
    local_draws: int = 100,
    processes: int | None = None,
) -> "xr.DataTree":
    """Draw from the posterior p(z | x) of a model, trained or not, by Hamiltonian Monte Carlo.

    Names and dimensions are those of :func:`pyro_vae.to_datatree`, so that ArviZ can draw q next to the reference.
    Groups: ``posterior`` (latents, and the deterministic sites given them), ``sample_stats`` (for each draw, whether it
    is ``diverging``, and ``lp``, log p(x, z) of all data in nats), ``log_likelihood`` for ``az.loo``, where latents are
    shared by observations, and ``observed_data``. For these draws ``r_hat`` and ``ess`` apply, unlike for those of a
    guide: read them first, such as in ``az.summary(pv.to_arviz(tree))``. Each chain starts from a draw of the prior, so
    a chain that stays in another mode than the others increases ``r_hat``; where the density of such draws is not
    finite, it starts from uniform unconstrained coordinates, or the prior's median.

    Latents may be global, local, in any plates, and masked: masked values are NaN. Discrete latents with a finite
    support are summed out of ``lp`` and of the sampler's density, and drawn from their exact conditional for each draw.

    Parameters keep their values. All data are sampled together, at hundreds of runs of the decoder a step: pass few.

    Args:
        model: a Pyro model with continuous latents.
        data: its arguments.
        draws, seed: number of draws of each chain, and their seed.
        chains: number of chains, on different random numbers.
        warmup: number of steps before the draws of a chain, in which step size and mass matrix are adapted.
        plate: name of the data plate, whose dimension is called ``obs``.
        dims, coords: names and coordinates of dimensions, as for ``to_datatree``.
        local_draws: for ``log_likelihood``, see ``to_datatree``.
        processes: number of processes for the chains, of one thread each; by default all processors. The results are
        the
            same for any number.

    Raises:
        ValueError: if the model has no continuous latent, a discrete one without a finite support, no observed site, or
        no
            normalised likelihood; or if no start with a finite density is found.

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
    processes = default_processes() if processes is None else positive_int(processes, "processes")
    settings = ExportSettings(draws, seed, plate, dims, coords, local_draws=local_draws)
    with seeded(seed):
        pair = ModelGuide(model, None, data, plate)
        settings.plate = pair.plate
        discrete = _check_form(pair)
        names = DimensionNames(pair.latents | pair.deterministic, pair.observed, settings, chains, data_labels(pair))
        seeds = torch.randint(2**31, (chains,), device="cpu").tolist()
        with poutine.block():
            runs = run_in_processes(
                lambda number: _chain(pair, draws, warmup, seeds[number]), chains, processes, lambda: None
            )
        device = pair.data[0].device
        values = {
            name: torch.cat([torch.from_numpy(run[name]) for run, _, _ in runs]).to(device) for name in runs[0][0]
        }
        likelihood = PointwiseLikelihood(pair, local_draws)
        found = _read(pair, values, discrete, likelihood)
    arrays = {
        group: {name: value.reshape(chains, draws, *value.shape[1:]) for name, value in of.items()}
        for group, of in found.items()
    }
    lead = ("chain", "draw")
    stats = {"diverging": np.stack([diverging for _, diverging, _ in runs]), "lp": arrays["sample_stats"]["lp"]}
    groups = {
        "posterior": names.dataset(arrays["posterior"], drawn=True),
        "sample_stats": names.named({name: (lead, value) for name, value in stats.items()}),
    }
    attrs = attributes(draws, seed) | {"warmup": warmup, "acceptance_rate": [rate for _, _, rate in runs]}
    attrs["sampling"] = f"Hamiltonian Monte Carlo, {chains} chains; r_hat and ess of all variables show its quality"
    if likelihood.parts:
        of = {part.name: (*lead, *observation_dims(names, part)) for part in likelihood.parts}
        groups["log_likelihood"] = names.named({
            names.variables.get(name, name): (dimensions, arrays["log_likelihood"][name], {"units": "nats"})
            for name, dimensions in of.items()
        })  # fmt: skip
        if likelihood.sampled:
            own = {"local_draws": likelihood.repeats, "standard_error": likelihood.largest_error}
            groups["log_likelihood"].attrs = own
    else:
        attrs["why_no_log_likelihood"] = likelihood.why_not
    groups["observed_data"] = names.dataset(observed_values(pair.observed))
    return tree_of(groups, attrs)


def _check_form(pair: ModelGuide) -> list[str]:
    """Raise if the posterior of a model cannot be sampled; return the names of the latents to sum out."""
    if not pair.observed:
        raise ValueError(f"`model` must have observed sites, got the latents {list(pair.latents)} alone")
    kinds = {name: _kind(site) for name, site in pair.latents.items()}
    if infinite := [name for name, kind in kinds.items() if kind == "infinite"]:
        got = f"{infinite} without; the sampler takes continuous latents, and sums over finite supports"
        raise ValueError(f"`model` must have discrete latents with a finite support, got {got}")
    if "continuous" not in kinds.values():
        got = f"the discrete {list(kinds)}; use pv.exact.posterior for these" if kinds else "no latents"
        raise ValueError(f"`model` must have continuous latents, got {got}")
    pair.check_likelihood()
    pair.check_hidden()
    discrete = [name for name, kind in kinds.items() if kind == "finite"]
    if discrete:
        _check_one_value_for_all_states(pair, discrete)
    return discrete


@torch.no_grad()
def _check_one_value_for_all_states(pair: ModelGuide, discrete: list[str]) -> None:
    """Raise if a latent has a value for each state of the discrete latents, where these are summed out."""
    model = enumerated(_UnmaskedLatents()(pair.model), discrete, -1 - pair.max_plate_nesting)
    with seeded(0), poutine.block():
        sites = latent_sites(poutine.trace(model).get_trace(*pair.data))
    shapes = {name: tuple(torch.as_tensor(sites[name]["value"]).shape) for name in pair.latents if name not in discrete}
    wrong = {name: at for name, at in shapes.items() if at != tuple(torch.as_tensor(pair.latents[name]["value"]).shape)}
    if wrong:
        hint = "a mask that depends on these is to be poutine.mask, not fn.mask"
        must = f"have continuous latents of one value for all states of {discrete}, which are summed out"
        raise ValueError(f"`model` must {must}, got values of shape {wrong}; {hint}")


def _kind(site: dict[str, Any]) -> str:
    if site["fn"].has_enumerate_support:
        return "finite"
    return "infinite" if site["fn"].support.is_discrete else "continuous"


class _UnmaskedLatents(Messenger):
    """Take the masks off latents, whose masked values would have no density: a sampler would leave for infinity.

    Nothing depends on these values, so that the posterior of the others is the same.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["mask"], msg["fn"] = None, without_masks(msg["fn"])


def _chain(pair: ModelGuide, draws: int, warmup: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, float]:
    """Return draws ``(draws, *shape)`` of each latent, which of them diverged, and the acceptance rate."""
    device = pair.data[0].device
    model = _UnmaskedLatents()(pair.model)
    for strategy in _STRATEGIES:
        kernel = NUTS(model, init_strategy=strategy, max_plate_nesting=pair.max_plate_nesting)
        sampler = MCMC(kernel, draws, warmup, disable_progbar=True)
        try:
            # Pyro's tensors are made on the default device.
            with seeded(seed), nullcontext() if torch.get_default_device().type == device.type else device:
                sampler.run(*pair.data)
            break
        except ValueError as error:
            if "cannot find valid initial params" not in str(error):
                raise
    else:
        raise ValueError(
            "`model` must have a finite log p(x, z) near its prior, got none at 100 draws of the prior, at 100 "
            "uniform unconstrained coordinates, and the prior's median"
        )
    found: Any = sampler._diagnostics[0]  # `diagnostics()` computes much more
    diverging = np.zeros(draws, dtype=bool)
    diverging[found["divergences"]] = True
    values = {name: value.cpu().numpy() for name, value in sampler.get_samples().items()}
    return values, diverging, float(found["acceptance rate"])


@torch.no_grad()
def _read(
    pair: ModelGuide, values: Values, discrete: list[str], likelihood: PointwiseLikelihood
) -> dict[str, dict[str, np.ndarray]]:
    """The discrete latents, deterministic sites, ``lp`` and likelihoods of draws, by group."""
    layouts = {name: SiteLayout(site) for name, site in (pair.latents | pair.deterministic).items()}
    first_dim = -1 - pair.max_plate_nesting
    summed = enumerated(pair.model, discrete, first_dim) if discrete else None
    # A mask that depends on a discrete latent would leave the density of the masked ones out of some of its states.
    sampled = enumerated(_UnmaskedLatents()(pair.model), discrete, first_dim)

    def run(at: Values) -> tuple[dict[Any, Tensor], None]:
        lp: Any = None
        if summed is not None:
            trace = poutine.trace(poutine.condition(summed, data=at)).get_trace(*pair.data)
            lp = log_marginal(trace, ())
            trace = poutine.trace(poutine.condition(sampled, data=at)).get_trace(*pair.data)
            at = at | {name: value[0] for name, value in sample_eliminated(trace, 1).items()}
        trace = poutine.trace(poutine.condition(pair.model, data=at)).get_trace(*pair.data)
        nodes: dict[str, Any] = dict(trace.nodes)
        if lp is None:
            sites = latent_sites(trace) | observed_sites(trace)
            lp = torch.stack([log_density(site).double().sum() for site in sites.values()]).sum()
        drawn: dict[Any, Tensor] = {("posterior", name): layout.values(nodes[name]) for name, layout in layouts.items()}
        return drawn | {("at", name): torch.as_tensor(value) for name, value in at.items()} | {"lp": lp}, None

    per_draw, parts = PerDraw(), []
    width = sum(torch.as_tensor(site["value"]).numel() for site in (pair.latents | pair.observed).values())
    size = max(1, _BUDGET // max(64, width))
    with poutine.block():
        for chunk in zip(*(value.split(size) for value in values.values()), strict=True):
            at = dict(zip(values, chunk, strict=True))
            results = per_draw(run, len(chunk[0]), at)
            parts.append({key: results.each(key, len(chunk[0])) for key in results.tensors})
        joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        found: dict[str, dict[str, Tensor]] = {
            "posterior": {name: joined["posterior", name] for name in layouts},
            "sample_stats": {"lp": joined["lp"]},
        }
        if likelihood.parts:
            likelihood.learn({name: joined["at", name] for name in likelihood.sampled})
            found["log_likelihood"] = likelihood({name: joined["at", name] for name in likelihood.shared})
    return {group: {name: as_array(value) for name, value in of.items()} for group, of in found.items()}
