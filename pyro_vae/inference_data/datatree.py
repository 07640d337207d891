"""Draws from a model and guide as an ``xarray.DataTree``, the form that ArviZ reads, in memory or in a file."""

import importlib.metadata
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae._utils.param_store import scoped_param_store
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import boolean, describe, function, mapping, positive_int, tqdm_disable
from pyro_vae.evidence.pareto import pareto_shape, tail_length
from pyro_vae.inference_data.netcdf import check_space, new_path, writing
from pyro_vae.inference_data.sampler import Groups, JointSampler
from pyro_vae.training.fit import Fitted

__all__ = ["save_draws", "to_arviz", "to_datatree"]

_MAX_BYTES = 4 * 2**30


_GROUPS = (
    *("posterior", "sample_stats", "prior", "posterior_predictive", "prior_predictive"),
    *("observed_data", "constant_data", "guide", "training"),
)


_LEAST_TAIL = 5  # draws that k̂ is fitted to


_INDEPENDENT = "independent draws in one chain: r_hat and ess say nothing of them; use summary(kind='stats')"


@scoped_param_store()
def to_datatree(
    model: Function,
    guide: Function,
    *data: Tensor,
    draws: int = 1000,
    seed: int = 0,
    plate: str = "data",
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    history: Fitted | Mapping[str, Sequence[float]] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    parallel: bool = False,
    max_bytes: int = _MAX_BYTES,
) -> xr.DataTree:
    r"""Draw from a model and guide, and name everything.

    Groups, each where there is something for it:

    * ``posterior``: the guide's latents, and what is deterministic given them, such as ``code``, what the decoder reads
      of a relaxed latent.
    * ``sample_stats``, in nats, of the very draws in ``posterior``: ``lp``, :math:`\log p(x_i, z_i)`; ``log_q``,
      :math:`\log q(z_i \mid x_i)`; ``log_weight``, the first less the second, whose mean is the ELBO of datum i, and
      whose logarithm of the mean exponential is the estimate of :func:`pyro_vae.log_evidence`. Each is unscaled, of the
      observed entries where some are missing. ``khat``, without draws, tells whether to trust the weights, see
      :func:`pyro_vae.evidence.pareto.pareto_shape`; from 21 draws on.
    * ``prior``; ``posterior_predictive`` and ``prior_predictive``: data drawn **anew**, not the observed repeated.
    * ``observed_data``, and ``constant_data``: what is given as such.
    * ``guide``: the parameters of each q(z | x), such as ``z_loc`` and ``z_scale``, without draws (of latents whose
      parameters hang on the draw of another there are none).
    * ``training``: the history, along ``epoch``.

    Dimensions are ``(chain, draw, obs, ...)`` with one chain: draws from a guide are independent, so ``r_hat`` and
    ``ess`` say nothing about them; ``az.summary(..., kind="stats")`` is what fits.

    A **latent outside the data plate**, of the model or of an autoguide, is shared by all data, so that log p(x, z) and
    log q are no sums over data that each had a weight of its own: ``sample_stats`` then has the joint densities of all
    data, along ``(chain, draw)``, and one ``khat``. What is no density is left out: ``lp`` where the likelihood is not
    normalised (soft targets) or a relaxed q stands for a discrete prior; ``log_q`` where the guide is a point
    (``AutoDelta``); ``log_weight`` where either is, or where the guide has latents that the model has not.

    Save with ``tree.to_netcdf("run.nc", engine="h5netcdf")``, load with ``xarray.open_datatree("run.nc")``. What the
    installed ArviZ takes is :func:`to_arviz` of it. What is too large for the memory is written by :func:`save_draws`.

    Args:
        model: a Pyro model.
        guide: its guide.
        data: what both take.
        draws: number of draws.
        seed: of the draws.
        plate: name of the data plate, whose dimension is called ``obs``.
        dims: names of a site's event dimensions, by site, such as ``{"x": ["height", "width"]}``; and those of constant
            data and of a history.
        coords: coordinates by dimension, such as ``{"obs": names}``, counted from 0 where left out; and further ones
            along a dimension, such as ``{"label": ("obs", labels)}``, by which to select and to colour.
        history: what :func:`pyro_vae.fit` returned, or values by epoch.
        constant_data: tensors, arrays or lists by name, such as ``{"covariates": c}``: along ``obs`` where their first
            axis has as many entries.
        parallel: draw many at once, as ``pyro.infer.Predictive(parallel=True)``: faster, for models and guides whose
            networks take a dimension more on the left.
        max_bytes: the most that the draws may take in memory; 4 GiB if left out.

    Raises:
        ValueError: if the draws would take more than ``max_bytes``, with the number of bytes; if ``dims``, ``coords``,
            ``history`` or ``constant_data`` do not fit.

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(1),
    ...     encoder=guides.DiagonalNormal(2, 1, networks.linear()),
    ...     decoder=likelihoods.Normal(1, 2, networks.linear()),
    ... )
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
    drawing = _joint_sampler(
        *(model, guide, data, draws, seed, plate, dims, coords, history, constant_data, parallel),
        check_size=lambda drawing: _check_size(drawing, max_bytes),
    )
    groups: Groups = {
        group: {name: np.empty((1, draws, *of.shape), of.dtype) for name, of in variables.items()}
        for group, variables in drawing.variables.items()
    }
    largest = _Largest(drawing)
    with seeded(seed):
        for taken, values in drawing.chunks():
            largest.add(values)
            for group, variables in values.items():
                for name, value in variables.items():
                    groups[group][name][0, taken] = value
    return _tree(drawing, seed, groups, largest)


@scoped_param_store()
def save_draws(
    path: str | os.PathLike[str],
    model: Function,
    guide: Function,
    *data: Tensor,
    draws: int = 1000,
    seed: int = 0,
    plate: str = "data",
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    history: Fitted | Mapping[str, Sequence[float]] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    parallel: bool = False,
    chunk: int | None = None,
    progress: bool | None = None,
) -> Path:
    """Draw as :func:`to_datatree` does, and write the draws to a netCDF file, some at a time.

    The file has the groups, names and values of ``to_datatree`` under the same seed (with ``parallel`` only where
    ``chunk`` is left out, or equal in two files: draws beside each other are drawn together). The memory holds one
    chunk. It is of draws, not of rows, since draws are independent whatever the model is, and rows are not where a
    latent is shared; one draw of everything is about as large as the data, which are in memory.

    The file comes to be under another name beside the path, and is moved there when it is whole: an interrupted export
    leaves what was there before. Read it with ``xarray.open_datatree(path)``, which takes from the file what is asked
    for, such as ``tree["posterior"]["z"].isel(obs=slice(10))``, and hand that to ArviZ.

    Args:
        path: of the file; one that is there is replaced.
        model: a Pyro model.
        guide: its guide.
        data: what both take.
        draws: number of draws.
        seed: of the draws.
        plate: as for :func:`to_datatree`.
        dims: as for :func:`to_datatree`.
        coords: as for :func:`to_datatree`.
        history: as for :func:`to_datatree`.
        constant_data: as for :func:`to_datatree`.
        parallel: as for :func:`to_datatree`.
        chunk: how many draws at a time; if left out, what takes about 64 MiB.
        progress: whether to show a progress bar; only on a terminal if left out.

    Returns:
        The path.

    Raises:
        ValueError, FileNotFoundError, OSError: before anything is drawn, if the path will not do or the disk is full;
            and as :func:`to_datatree`.

    >>> import tempfile
    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(1),
    ...     encoder=guides.DiagonalNormal(2, 1, networks.linear()),
    ...     decoder=likelihoods.Normal(1, 2, networks.linear()),
    ... )
    >>> x = torch.randn(10, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_draws(f"{folder}/draws.nc", vae.model, vae.guide, x, draws=50, chunk=20)
    ...     with xr.open_datatree(path) as loaded:
    ...         loaded["posterior"].equals(to_datatree(vae.model, vae.guide, x, draws=50)["posterior"])
    True
    """
    if chunk is not None:
        positive_int(chunk, "chunk")
    path = new_path(path)
    drawing = _joint_sampler(
        *(model, guide, data, draws, seed, plate, dims, coords, history, constant_data, parallel),
        check_size=lambda drawing: check_space(path, drawing.nbytes),
    )
    largest = _Largest(drawing)
    with writing(path, _tree(drawing, seed)) as file:
        for group, variables in drawing.variables.items():
            for name, of in variables.items():
                file.add(group, name, ("chain", "draw", *of.dims), of.dtype, of.attrs)
        with seeded(seed), tqdm(total=draws, disable=tqdm_disable(progress), unit="draw") as bar:
            for taken, values in drawing.chunks(chunk):
                largest.add(values)
                file.write(taken, values)
                bar.update(taken.stop - taken.start)
        if largest.suffice:
            file.put("sample_stats", "khat", drawing.variables["sample_stats"]["log_weight"].dims, largest.khat())
    return path


def to_arviz(tree: xr.DataTree) -> Any:
    """What the installed ArviZ takes: from version 1 on the tree itself, in version 0.23 its ``InferenceData``.

    Draws of a guide are independent, and one chain: of ``arviz.summary`` the statistics are of use, not ``r_hat`` and
    ``ess``.

    >>> import warnings
    >>> with warnings.catch_warnings():  # ArviZ 0.23 warns on import that version 1 will be another
    ...     warnings.simplefilter("ignore")
    ...     data = to_arviz(
    ...         xr.DataTree.from_dict({"posterior": xr.Dataset({"z": (("chain", "draw"), np.zeros((1, 9)))})})
    ...     )
    >>> data["posterior"]["z"].sizes["draw"]
    9
    """
    import arviz

    if not isinstance(tree, xr.DataTree):
        raise TypeError(f"`tree` must be what pv.to_datatree returns, or an `xarray.DataTree`, got {describe(tree)}")
    if not hasattr(arviz, "from_datatree"):
        return tree
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "(guide|training) group is not defined in the InferenceData scheme", UserWarning
        )
        return arviz.from_datatree(tree)


class _Largest:
    """The largest weights of each datum, or of all data together: what k̂ is made of, as draws come in."""

    def __init__(self, drawing: JointSampler):
        self.draws = drawing.draws
        self.suffice = "log_weight" in drawing.statistics and tail_length(drawing.draws) >= _LEAST_TAIL
        self._kept = tail_length(drawing.draws) + 1
        self._top: Tensor | None = None

    def add(self, values: Groups) -> None:
        """Take note of a chunk."""
        if self.suffice:
            new = torch.from_numpy(values["sample_stats"]["log_weight"])
            top = new if self._top is None else torch.cat([self._top, new])
            self._top = top.topk(min(self._kept, len(top)), dim=0).values

    def khat(self) -> np.ndarray:
        """``(obs)``, or one number."""
        assert self._top is not None
        khat = pareto_shape(self._top.reshape(len(self._top), -1), self.draws)
        return khat.reshape(self._top.shape[1:]).numpy()


def _joint_sampler(
    model: Function,
    guide: Function,
    data: tuple[Tensor, ...],
    draws: int,
    seed: int,
    plate: str,
    dims: Mapping[str, Sequence[str]] | None,
    coords: Mapping[str, Any] | None,
    history: Fitted | Mapping[str, Sequence[float]] | None,
    constant_data: Mapping[str, Any] | None,
    parallel: bool,
    check_size: Callable[[JointSampler], None],
) -> JointSampler:
    """With the arguments that both exports take, as they were given."""
    recorded = history.history if isinstance(history, Fitted) else history
    if not isinstance(recorded, Mapping | None):
        raise TypeError(f"`history` must be what `fit` returned, or its `history`, got {recorded!r}")
    further = (
        mapping(dims, "dims", "{'x': ['height', 'width']}"),
        mapping(coords, "coords", "{'obs': names}"),
        mapping(recorded, "history", "`fitted.history`"),
        mapping(constant_data, "constant_data", "{'labels': labels}"),
    )
    pair = function(model, "model"), function(guide, "guide")
    return JointSampler(*pair, data, draws, seed, plate, *further, boolean(parallel, "parallel"), check_size)


def _check_size(drawing: JointSampler, max_bytes: int) -> None:
    if drawing.nbytes > max_bytes:
        sites = ", ".join(drawing.latents | drawing.deterministic | drawing.observed)
        raise ValueError(
            f"draws: {drawing.draws} draws of {sites} from posterior and prior, with their densities, take "
            f"{drawing.nbytes} bytes; at most {max_bytes} are kept in memory (max_bytes). Ask for fewer draws, hand "
            "over fewer rows, or write them to a file in chunks: pyro_vae.save_draws('draws.nc', model, guide, ...)"
        )


def _tree(
    drawing: JointSampler, seed: int, drawn: Groups | None = None, largest: _Largest | None = None
) -> xr.DataTree:
    """All groups; of those that are drawn, without draws only the coordinates."""
    attrs = attributes(drawing.draws, seed)
    groups = dict(drawing.static_groups)
    for group, variables in drawing.variables.items():
        dims = {"chain", "draw"}.union(*(of.dims for of in variables.values()))
        arrays: dict[str, Any] = {}
        for name, values in (drawn[group] if drawn else {}).items():
            arrays[name] = (("chain", "draw", *variables[name].dims), values, variables[name].attrs)
        if group == "sample_stats" and largest and largest.suffice:
            arrays["khat"] = (variables["log_weight"].dims, largest.khat())
        groups[group] = xr.Dataset(arrays, coords=drawing.names.coordinates(dims))
    there = [name for name in _GROUPS if name in drawing.variables or (groups.get(name))]
    named = {name: groups[name].assign_attrs(attrs) for name in there}
    tree = xr.DataTree.from_dict(named)
    tree.attrs = attrs
    return tree


def attributes(draws: int, seed: int) -> dict[str, str | int]:
    """Those that ArviZ looks for, and how the draws were made."""
    return {
        "created_at": datetime.now(UTC).isoformat(),
        "creation_library": "pyro_vae",
        "creation_library_version": importlib.metadata.version("pyro-vae"),
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "sampling": _INDEPENDENT,
        "draws": draws,
        "seed": seed,
    }
