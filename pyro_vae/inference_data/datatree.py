"""Export draws from a model and guide as an ``xarray.DataTree``, the format of ArviZ, in memory or in a file."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.param_store import without_training
from pyro_vae._utils.progress import progress_bar
from pyro_vae._utils.ranks import ranks
from pyro_vae._utils.shared_calls import report_of_ranks
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import describe, positive_int
from pyro_vae.arguments import any_arguments
from pyro_vae.evidence.pareto import pareto_shape, reliable_shape, tail_length
from pyro_vae.inference_data.groups import GroupLayout
from pyro_vae.inference_data.likelihood import resampled
from pyro_vae.inference_data.netcdf import check_space, new_path, writing
from pyro_vae.inference_data.sampler import Groups, JointSampler
from pyro_vae.inference_data.settings import ExportSettings
from pyro_vae.training.fit import Fitted

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["save_draws", "to_arviz", "to_datatree"]

_MAX_BYTES = 4 * 2**30
_LARGEST_KHAT = 0.7  # above which importance weights correct nothing
_LEAST_TAIL = 5  # draws to which k̂ is fitted


@report_of_ranks("to_datatree")
@any_arguments
@without_training
def to_datatree(
    model: Function,
    guide: Function,
    *data: Data,
    draws: int = 1000,
    seed: int = 0,
    plate: str = "data",
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    history: Fitted | Mapping[str, Sequence[float]] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    parallel: bool = False,
    local_draws: int = 100,
    predictions: Data | None = None,
    max_bytes: int = _MAX_BYTES,
) -> "xr.DataTree":
    r"""Draw latents and data from a model and guide, with names for all variables and dimensions.

    The groups, each if there is something in it:

    * ``posterior``: the guide's latents, and the deterministic sites given them, such as the ``code`` of a relaxed one.
      Discrete latents that the guide leaves out, as for ``TraceEnum_ELBO``, are drawn from their exact conditional.
    * ``sample_stats``, in nats, for each draw in ``posterior``: ``lp``, :math:`\log p(x_i, z_i)`; ``log_q``,
      :math:`\log q(z_i \mid x_i)`; ``log_weight``, their difference. The mean of ``log_weight`` estimates the ELBO of
      datum i, and the logarithm of its mean exponential is the estimate of :func:`pyro_vae.log_evidence`. All are
      unscaled, and sum over observed entries alone if some are missing. ``khat``, without draws, says whether the
      weights can be trusted, see :func:`pyro_vae.evidence.pareto.pareto_shape`; it needs 21 draws.
    * ``log_likelihood``, for ``az.loo`` and ``az.compare``: log p(x_i | θ) of each observation at the latents θ that
      observations share, see below.
    * ``prior``; ``posterior_predictive`` and ``prior_predictive``: newly drawn data, not the observed ones.
    * ``predictions``: observed and deterministic sites at the new arguments ``predictions``, which are the group
      ``predictions_constant_data``. Latents outside of the data plate have the values of the draw; those of the data
      plate belong to new data and are drawn from their prior given the others.
    * ``observed_data`` and ``constant_data``: the data, and the argument; ``training``: the history, along ``epoch``.
    * ``guide``: the parameters of each q(z | x), such as ``z_loc`` and ``z_scale``, without draws. Latents whose
      parameters depend on the draw of another latent have none.

    Dimensions are ``(chain, draw, obs, ...)`` with one chain. Draws from a guide are independent, so ``r_hat`` and
    ``ess`` do not apply; use ``az.summary(..., kind="stats")``.

    **Names.** A variable has the name of its site, and a dimension that would have the same name is called ``obs_dim``,
    ``latent_dim`` and so on. A slash in the name of a site, as ``pyro.contrib.autoname.scope`` makes, is a dot: ``a/z``
    is ``a.z``. A site that is called ``chain``, ``draw`` or ``sample``, as ArviZ calls its dimensions, is
    ``chain_site`` and so on. The attribute ``site`` of such a variable has the name of the site, which is also its key
    in ``dims``.

    **Plates.** The data plate is the dimension ``obs``; each other plate is a dimension of its own name. A plate that
    is a loop is none: its sites are variables. Log-densities in ``sample_stats``, and ``khat``, have a value for each
    cell of the plates that all latent and observed sites share: for each datum where all latents are local to it, for
    each group where they are local to an outer plate, and one for all data, ``(chain, draw)``, where some latent is
    global or the guide draws all rows together. Latents that the guide leaves out are summed out of them.

    **Masks.** Where a site is masked, by ``poutine.mask``, ``fn.mask`` or ``obs_mask``, as in the padded steps of a
    sequence, its values are NaN, and integers are floats. Missing data (NaN) that a likelihood accepts are drawn.

    **Leave-one-out.** An observation is a cell of the plates that all observed sites share, or a datum where latents
    are local to the data plate; several observed sites of it are one variable, ``observed``. ``log_likelihood`` is
    marginal over the latents of the observation: discrete ones are summed out, others integrated by importance sampling
    with ``local_draws``; the attribute ``standard_error`` has the largest error of an observation, in nats. Draws of a
    guide are not those of the posterior: this group has draws of θ that are resampled by their weights p(x, θ) / q(θ),
    with truncation, so that ``az.loo(pv.to_arviz(tree))`` is right if ``khat`` of these weights, an attribute, is at
    most 0.7; above that, :func:`to_arviz` warns. The attribute ``reliable`` is 0 also for fewer draws with k̂ above
    :func:`pyro_vae.evidence.pareto.reliable_shape`. The order of draws is not that of
    ``posterior``, so ``az.loo_pit`` does not apply. Where there is no such likelihood, the tree has the reason as its
    attribute ``why_no_log_likelihood``: where all latents are local, compare models by held-out log p(x) with
    :func:`pyro_vae.compare_evidence`.

    A density that does not exist is left out: ``lp`` if the likelihood is not normalised (soft targets) or the prior is
    discrete and q is relaxed; ``log_q`` if the guide is a point (``AutoDelta``); ``log_weight`` if one of these is
    missing, or if the guide has latents that the model does not have.

    Save the tree with ``tree.to_netcdf("run.nc", engine="h5netcdf")``, load it with ``xarray.open_datatree("run.nc")``,
    and convert it for the installed ArviZ with :func:`to_arviz`. :func:`save_draws` takes more draws than memory holds.

    Args:
        model, guide: a Pyro model and its guide.
        data: the arguments of both.
        draws, seed: number of draws, and their seed.
        plate: name of the data plate, whose dimension is called ``obs``, or ``obs_dim`` next to a site ``obs``.
        dims: names of the event dimensions of a site, ``{"x": ["height", "width"]}``, of constant data, or a history.
        coords: coordinates of a dimension, such as ``{"obs": names}``, by default 0, 1, ...; and further ones along a
            dimension, such as ``{"label": ("obs", labels)}``, for selections and colours.
        history: the result of :func:`pyro_vae.fit`, or values for each epoch.
        constant_data: tensors, arrays or lists by name, such as ``{"covariates": c}``, along ``obs`` if of its length.
        parallel: whether to make many draws at once, by ``torch.vmap``; faster. Each is the draw of a run of its own.
        local_draws: number of draws of the latents of an observation for each draw of shared ones, of which
            ``log_likelihood`` is the mean; at most 10 for a model that ``torch.vmap`` does not take.
        max_bytes: largest size of the draws in memory.

        predictions: new arguments of the model, in the form of ``data``, such as ``(new_x, None)`` for
            ``model(x, y=None)``, or :class:`pyro_vae.Arguments`; for the group ``predictions``.

    Raises:
        TypeError, ValueError: if the draws would take more than ``max_bytes``, or arguments do not fit each other.

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> net = networks.linear()
    >>> vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> x, labels = torch.randn(10, 2), torch.arange(10) % 2
    >>> tree = to_datatree(vae.model, vae.guide, x, draws=50, coords={"label": ("obs", labels)})
    >>> list(tree.children)
    ['posterior', 'sample_stats', 'prior', 'posterior_predictive', 'prior_predictive', 'observed_data', 'guide']
    >>> dict(tree["posterior"]["z"].sizes)
    {'chain': 1, 'draw': 50, 'obs': 10, 'latent': 1}
    >>> {name: values.dims[2:] or values.dims for name, values in tree["sample_stats"].data_vars.items()}
    {'lp': ('obs',), 'log_q': ('obs',), 'log_weight': ('obs',), 'khat': ('obs',)}
    >>> tree["guide"]["z_loc"].groupby("label").mean().sizes["label"]
    2
    """
    positive_int(max_bytes, "max_bytes")
    settings = ExportSettings(
        draws, seed, plate, dims, coords, history, constant_data, parallel, local_draws, predictions
    )
    sampler = JointSampler(model, guide, data, settings)
    if sampler.nbytes > max_bytes:
        sites = ", ".join(sampler.latents | sampler.deterministic | sampler.observed)
        raise ValueError(
            f"`draws` must take at most {max_bytes} bytes of memory (`max_bytes`), got {draws} draws of {sites} from "
            f"posterior and prior, with densities, of {sampler.nbytes} bytes. Use fewer draws, fewer rows, or write "
            "chunks to a file: pyro_vae.save_draws('draws.nc', model, guide, ...)"
        )
    layout = GroupLayout(sampler)
    groups, largest = sampler.empty(1, draws), _LargestWeights(sampler)
    for chunk, values in sampler.chunks():
        largest.add(values)
        for group, variables in values.items():
            for name, value in variables.items():
                groups[group][name][0, chunk] = value
    attrs: dict[str, Any] = {}
    if "log_likelihood" in groups:
        index, attrs = _corrected(sampler)
        groups["log_likelihood"] = {name: value[:, index] for name, value in groups["log_likelihood"].items()}
    return layout.tree(groups, largest.khat(), attrs)


@report_of_ranks("save_draws")
@any_arguments
@without_training
def save_draws(
    path: str | os.PathLike[str],
    model: Function,
    guide: Function,
    *data: Data,
    draws: int = 1000,
    seed: int = 0,
    plate: str = "data",
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    history: Fitted | Mapping[str, Sequence[float]] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    parallel: bool = False,
    local_draws: int = 100,
    predictions: Data | None = None,
    chunk: int | None = None,
    progress: bool | None = None,
) -> Path:
    """Draw as :func:`to_datatree` does, and write the draws to a netCDF file in chunks.

    The file has the groups, names and values of ``to_datatree`` with the same seed; with ``parallel`` only if ``chunk``
    is left out, since the draws of a chunk are made together. The memory holds one chunk. A chunk is a number of draws
    and not of rows: draws are always independent, rows are not if they share a latent.

    Several ranks share the chunks, and rank 0, which then holds a chunk of each of them, writes the one file.

    The file appears when it is complete; an interrupted export leaves an older file unchanged. Open it with
    ``xarray.open_datatree(path)``, which reads only what you select, and pass that to ArviZ.

    Args:
        path: path of the file, which is also returned; an existing file is replaced.
        model, guide, data, draws, seed, plate, dims, coords: see :func:`to_datatree`.
        history, constant_data, parallel, local_draws, predictions: see :func:`to_datatree`.
        chunk: number of draws in a chunk; by default as many as take about 64 MiB.
        progress: whether to show a progress bar; by default only on a terminal or in a notebook.

    Raises:
        ValueError, OSError: before the first draw, if the path is unusable or the disk is full; and as ``to_datatree``.

    >>> import tempfile
    >>> import pyro_vae as pv
    >>> import xarray as xr
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> net = networks.linear()
    >>> vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> x = torch.randn(10, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_draws(f"{folder}/draws.nc", vae.model, vae.guide, x, draws=50, chunk=20)
    ...     with xr.open_datatree(path) as loaded:
    ...         loaded["posterior"].equals(to_datatree(vae.model, vae.guide, x, draws=50)["posterior"])
    True
    """
    if chunk is not None:
        positive_int(chunk, "chunk")
    writes = ranks().is_first
    path = new_path(path) if writes else Path(path)
    settings = ExportSettings(
        draws, seed, plate, dims, coords, history, constant_data, parallel, local_draws, predictions
    )
    sampler = JointSampler(model, guide, data, settings)
    if writes:
        check_space(path, sampler.nbytes)
    layout, largest = GroupLayout(sampler), _LargestWeights(sampler)
    if not writes:  # and makes its share of the draws
        for _ in sampler.chunks(chunk, on_first=True):
            pass
        return path
    with writing(path, layout.tree()) as file:
        for group, variables in sampler.variables.items():
            for name, variable in variables.items():
                every = ("chain", "draw", *layout.dims[group][name])
                file.add(group, layout.variables.get(name, name), every, variable.dtype, layout.attrs(group, name))
        with progress_bar("save_draws", progress, total=draws, unit="draw") as bar:
            for taken, values in sampler.chunks(chunk, on_first=True):
                largest.add(values)
                file.write(taken, layout.named(values))
                bar.advance(taken.stop - taken.start)
        if "log_likelihood" in sampler.variables:
            file.take("log_likelihood", *_corrected(sampler))
        if (khat := largest.khat()) is not None:
            file.put("sample_stats", "khat", layout.dims["sample_stats"]["log_weight"], khat)
    return path


def to_arviz(tree: "xr.DataTree") -> Any:
    """Convert a tree for the installed ArviZ: version 1 takes the tree itself, version 0.23 an ``InferenceData``.

    Warn if the tree has a ``log_likelihood`` with which ``az.loo`` must not be trusted, since the guide is too far from
    the posterior: k̂ of its weights is above 0.7.

    >>> import warnings
    >>> import xarray as xr
    >>> with warnings.catch_warnings():  # ArviZ 0.23 warns on import that version 1 will be different
    ...     warnings.simplefilter("ignore")
    ...     posterior = xr.Dataset({"z": (("chain", "draw"), np.zeros((1, 9)))})
    ...     data = to_arviz(xr.DataTree.from_dict({"posterior": posterior}))
    >>> data["posterior"]["z"].sizes["draw"]
    9
    """
    import arviz
    import xarray as xr

    if not isinstance(tree, xr.DataTree):
        raise TypeError(f"`tree` must be an `xarray.DataTree`, such as pv.to_datatree returns, got {describe(tree)}")
    if "log_likelihood" in tree.children and tree["log_likelihood"].attrs.get("khat", 0.0) > _LARGEST_KHAT:
        warnings.warn(
            f"az.loo and az.waic of this tree must not be trusted: k̂ of the guide's weights, p(x, z) / q(z), is "
            f"{tree['log_likelihood'].attrs['khat']:.2f}, above {_LARGEST_KHAT}, so that its draws cannot be corrected "
            "to those of the posterior. Use draws of pv.reference, or a guide closer to the posterior",
            UserWarning,
            stacklevel=2,
        )
    if not hasattr(arviz, "from_datatree"):
        return tree
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(guide|training|imputed) group is not defined", UserWarning)
        return arviz.from_datatree(tree)


def _corrected(sampler: JointSampler) -> tuple[np.ndarray, dict[str, Any]]:
    """Which draws of the guide represent the posterior of the shared latents, and how reliable that is."""
    weights, draws = torch.cat(sampler.log_weights), sampler.settings.draws
    khat = pareto_shape(weights.to(sampler.dtype)[:, None], draws)
    reliable = bool(khat <= reliable_shape(draws))
    attrs = {
        "sampling": "draws of the guide, resampled by their importance weights: they are those of the posterior if k̂ "
        "of the weights, khat, is small, and have another order than in the group posterior",
        "khat": float(khat),
        "reliable": int(reliable),
    }
    if sampler.likelihood.sampled:
        attrs |= {"local_draws": sampler.likelihood.repeats, "standard_error": sampler.likelihood.largest_error}
    return resampled(weights, sampler.settings.seed).numpy(), attrs


class _LargestWeights:
    """The largest weights of each datum, or of all data together, from which k̂ is computed, collected by chunk."""

    def __init__(self, sampler: JointSampler):
        self._draws, self._dtype = sampler.settings.draws, sampler.dtype
        self._exists = "log_weight" in sampler.statistics and tail_length(self._draws) >= _LEAST_TAIL
        self._top: Tensor | None = None

    def add(self, values: Groups) -> None:
        if self._exists:
            # In the dtype of the densities, from which k̂ takes the size of a rounding error.
            new = torch.from_numpy(values["sample_stats"]["log_weight"]).to(self._dtype)
            top = new if self._top is None else torch.cat([self._top, new])
            self._top = top.topk(min(tail_length(self._draws) + 1, len(top)), dim=0).values

    def khat(self) -> np.ndarray | None:
        """Return k̂ of each datum, ``(obs)``, or one number; nothing if there are no weights, or too few."""
        if self._top is None:
            return None
        khat = pareto_shape(self._top.reshape(len(self._top), -1), self._draws)
        return khat.reshape(self._top.shape[1:]).numpy()
