"""Draws from a model and guide as an ``xarray.DataTree``, the form that ArviZ reads."""

import importlib.metadata
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import detach_provenance, get_provenance
from torch import Tensor

from pyro_vae.checks import data_tensors, positive_int
from pyro_vae.handlers import Anew, latent_sites, observed_sites
from pyro_vae.missing import check_model
from pyro_vae.randomness import seeded

__all__ = ["to_arviz", "to_datatree"]

_MAX_BYTES = 4 * 2**30
_LATENT_DIMS = {0: (), 1: ("latent",), 2: ("latent", "category")}
_OBSERVED_DIMS = {0: (), 1: ("feature",), 2: ("row", "column"), 3: ("channel", "row", "column")}


@torch.no_grad()
def to_datatree(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *data: Tensor,
    draws: int = 1000,
    seed: int = 0,
    plate: str = "data",
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    parallel: bool = False,
) -> xr.DataTree:
    """Draw from a model and guide, and name everything.

    Groups: ``posterior`` (the guide's latents, and what is deterministic given them, such as ``code``, what the decoder
    reads of a relaxed latent), ``prior``, ``posterior_predictive`` and ``prior_predictive`` (data drawn **anew**, not
    the observed data repeated), ``observed_data``, and ``guide``: the parameters of each q(z | x), such as ``z_loc``
    and ``z_scale``, without draws (of latents whose parameters hang on the draw of another there are none).
    Dimensions are ``(chain, draw, obs, ...)`` with one chain: draws from a guide are independent, so ``r_hat`` and
    ``ess`` say nothing about them; ``az.summary(..., kind="stats")`` is what fits.

    Save with ``tree.to_netcdf("run.nc", engine="h5netcdf")``, load with ``xarray.open_datatree("run.nc")``. What the
    installed ArviZ takes is :func:`to_arviz` of it.

    Args:
        model: a Pyro model.
        guide: its guide.
        data: what both take.
        draws: number of draws.
        seed: of the draws.
        plate: name of the data plate, whose dimension is called ``obs``.
        dims: names of a site's event dimensions, by site, such as ``{"x": ["height", "width"]}``.
        coords: coordinates by dimension, such as ``{"obs": names}``, counted from 0 where left out; and further ones
            along a dimension, such as ``{"label": ("obs", labels)}``, by which to select and to colour.
        parallel: draw all at once, as ``pyro.infer.Predictive(parallel=True)``: faster, for models and guides whose
            networks take a dimension more on the left.

    Raises:
        ValueError: if the draws would take more than 4 GiB, with the number of bytes; if ``dims`` or ``coords`` do not
            fit.

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
    ['posterior', 'prior', 'posterior_predictive', 'prior_predictive', 'observed_data', 'guide']
    >>> dict(tree["posterior"]["z"].sizes)
    {'chain': 1, 'draw': 50, 'obs': 10, 'latent': 1}
    >>> tree["guide"]["z_loc"].groupby("label").mean().sizes["label"]
    2
    """
    positive_int(draws, "draws")
    data = data_tensors(data, "data")
    check_model(model, data, "data")
    generative = Anew()(model)
    with seeded(seed):
        with poutine.block():
            guide_trace = poutine.trace(guide).get_trace(*data)
            model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*data)
        latents, observed = _not_auxiliary(latent_sites(guide_trace)), observed_sites(model_trace)
        deterministic = deterministic_sites(model_trace)
        _check_latents(latent_sites(model_trace), latents)
        _check_size(latents | deterministic | observed, draws)
        names = Names(latents | deterministic, observed, plate, dims or {}, coords or {}, draws)
        q = Predictive(guide, num_samples=draws, parallel=parallel, return_sites=tuple(latents))(*data)
        rest = (*deterministic, *observed)
        given_q = Predictive(generative, q, parallel=parallel, return_sites=rest)(*data)
        p = Predictive(generative, num_samples=draws, parallel=parallel, return_sites=(*latents, *rest))(*data)
        parametric = {} if len(latents) < len(latent_sites(guide_trace)) else _given_data(latents, guide, data)
    attrs = attributes(draws, seed)
    groups = {
        "posterior": names.dataset(q | {name: given_q[name] for name in deterministic}),
        "prior": names.dataset({name: p[name] for name in (*latents, *deterministic) if name in p}),
        "posterior_predictive": names.dataset({name: given_q[name] for name in observed}),
        "prior_predictive": names.dataset({name: p[name] for name in observed}),
        "observed_data": names.dataset({name: site["value"] for name, site in observed.items()}, drawn=False),
        "guide": names.guide(parametric),
    }
    tree = xr.DataTree.from_dict({name: group.assign_attrs(attrs) for name, group in groups.items() if group})
    tree.attrs = attrs
    return tree


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

    if not hasattr(arviz, "from_datatree"):
        return tree
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "guide group is not defined in the InferenceData scheme", UserWarning)
        return arviz.from_datatree(tree)


def _event_shape(site: dict[str, Any], batch: Mapping[str, int]) -> torch.Size:
    """``pyro.deterministic`` takes all dimensions for the event's, unless told; the plates' are none."""
    shape = site["fn"].event_shape
    told = not site["infer"].get("_deterministic") or len(shape) < site["value"].dim()
    return shape if told or tuple(shape[: len(batch)]) != tuple(batch.values()) else shape[len(batch) :]


def _not_auxiliary(sites: dict[str, Any]) -> dict[str, Any]:
    """Without the sites that autoguides make for themselves."""
    return {name: site for name, site in sites.items() if not site["infer"].get("is_auxiliary")}


def deterministic_sites(trace: Any) -> dict[str, Any]:
    """The sites of ``pyro.deterministic``, by name."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site["infer"].get("_deterministic")
    }


def _given_data(latents: dict[str, Any], guide: Callable[..., Any], data: tuple[Tensor, ...]) -> dict[str, Any]:
    """Those whose parameters are of the data alone: the others hang on draws of latents before them."""
    with poutine.block(), torch.no_grad(), TrackProvenance():
        tracked = latent_sites(poutine.trace(guide).get_trace(*data))

    def hangs(name: str) -> bool:
        ours, theirs = _parameters(latents[name]["fn"]), _parameters(tracked[name]["fn"])
        return any(
            get_provenance(theirs[key]) & latents.keys()
            or not torch.allclose(value, detach_provenance(theirs[key]), equal_nan=True)  # by way of NumPy, say
            for key, value in ours.items()
        )

    return {name: site for name, site in latents.items() if not hangs(name)}


def _check_latents(of_model: dict[str, Any], of_guide: dict[str, Any]) -> None:
    missing = sorted(set(of_model) - set(of_guide))
    if missing:
        raise ValueError(
            f"guide: the model's latents {missing} are not in it, so that there are no posterior draws of them"
        )


def _check_size(sites: dict[str, Any], draws: int) -> None:
    size = 2 * draws * sum(site["value"].numel() * site["value"].element_size() for site in sites.values())
    if size > _MAX_BYTES:
        raise ValueError(
            f"draws: {draws} draws of {', '.join(sites)} from posterior and prior take {size} bytes; at most "
            f"{_MAX_BYTES} are drawn. Ask for fewer draws, or hand over fewer data."
        )


def _is_along(values: Any) -> bool:
    """Whether values of a coordinate are told with their dimension, ``("obs", labels)``, and are not two names."""
    return (
        isinstance(values, tuple) and len(values) == 2 and isinstance(values[0], str) and not isinstance(values[1], str)
    )


class Names:
    """Dimension names and coordinates of sites."""

    def __init__(
        self,
        unobserved: dict[str, Any],
        observed: dict[str, Any],
        plate: str,
        dims: Mapping[str, Sequence[str]],
        coords: Mapping[str, Any],
        draws: int,
        chains: int = 1,
    ):
        sites = unobserved | observed
        unknown = sorted(set(dims) - set(sites))
        if unknown:
            raise ValueError(f"dims: names the sites {unknown}; the model has {sorted(sites)}")
        self.dims: dict[str, tuple[str, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        sizes = {"chain": chains, "draw": draws}
        self.chains = chains
        for name, site in sites.items():
            frames = sorted((frame for frame in site["cond_indep_stack"] if frame.vectorized), key=lambda f: f.dim)
            batch = {"obs" if frame.name == plate else frame.name: frame.size for frame in frames}
            event_shape = _event_shape(site, batch)
            event = dims.get(name) or self._event_dims(name, event_shape, name in observed, sizes)
            if len(event) != len(event_shape):
                raise ValueError(f"dims: names {list(event)} for {name}, whose event shape is {tuple(event_shape)}")
            self.dims[name] = (*batch, *event)
            if len({"chain", "draw", *self.dims[name]}) < 2 + len(self.dims[name]):
                raise ValueError(f"dims: {name} would have a dimension twice: {['chain', 'draw', *self.dims[name]]}")
            self.shapes[name] = (*batch.values(), *event_shape)
            for dim, size in zip(self.dims[name], self.shapes[name], strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise ValueError(f"dims: {dim!r} of {name} has size {size}, and {sizes[dim]} elsewhere")
        self.coords: dict[str, tuple[str, np.ndarray]] = {dim: (dim, np.arange(size)) for dim, size in sizes.items()}
        for name, values in coords.items():
            dim, values = values if _is_along(values) else (name, values)
            coordinate = np.asarray(values)
            if coordinate.shape != (sizes.get(dim),):
                along = "" if name == dim else f", along {dim!r},"
                found = f"{len(coordinate)} entries" if coordinate.ndim == 1 else f"shape {coordinate.shape}"
                raise ValueError(f"coords: {name!r}{along} has {found}; accepted are {sizes}")
            if name in sizes and name != dim:
                raise ValueError(f"coords: {name!r} is a dimension, and its coordinate cannot lie along {dim!r}")
            if name in self.dims:
                raise ValueError(f"coords: {name!r} is the name of a site; accepted is another")
            self.coords[name] = (dim, coordinate)

    @staticmethod
    def _event_dims(name: str, shape: torch.Size, is_observed: bool, sizes: dict[str, int]) -> tuple[str, ...]:
        defaults = _OBSERVED_DIMS if is_observed else _LATENT_DIMS
        dims = defaults.get(len(shape), tuple(f"dim_{axis}" for axis in range(len(shape))))
        clash = any(sizes.get(dim, size) != size for dim, size in zip(dims, shape, strict=True))
        return tuple(f"{name}_{dim}" for dim in dims) if clash else dims

    def dataset(self, values: Mapping[str, Tensor], drawn: bool = True) -> xr.Dataset:
        """Named values: ``(chains * draws, *shape)`` of each variable if drawn, those of one chain together."""
        lead = ("chain", "draw") if drawn else ()
        arrays = {}
        for name, value in values.items():
            shape = (self.chains, -1, *self.shapes[name]) if drawn else self.shapes[name]
            arrays[name] = ((*lead, *self.dims[name]), value.detach().cpu().reshape(shape).numpy())
        return self._dataset(arrays)

    def guide(self, latents: Mapping[str, Any]) -> xr.Dataset:
        """The parameters of each latent's distribution, without draws."""
        arrays = {}
        for name, site in latents.items():
            fn, shape = site["fn"], self.shapes[name]
            batch = shape[: len(shape) - len(fn.event_shape)]
            for parameter, value in _parameters(fn).items():
                if value.dim() < len(fn.batch_shape):
                    value = value.expand(fn.batch_shape)
                value = value.reshape((*batch, *value.shape[len(fn.batch_shape) :]))
                arrays[f"{name}_{parameter}"] = (
                    self._parameter_dims(name, parameter, value.shape, len(batch)),
                    value.cpu().numpy(),
                )
        taken = sorted(arrays.keys() & self.coords.keys())
        if taken:
            raise ValueError(f"coords: {taken[0]!r} is the name of a parameter of the guide; accepted is another")
        return self._dataset(arrays)

    def _parameter_dims(self, name: str, parameter: str, shape: tuple[int, ...], num_batch: int) -> tuple[str, ...]:
        """Those of the site; the columns of a matrix along a second, ``_bis``; any other shape by number."""
        dims, sizes = self.dims[name], self.shapes[name]
        own, event = tuple(shape[num_batch:]), sizes[num_batch:]
        if own == event[: len(own)] and parameter != "component_logits":
            return dims[: len(shape)]
        if parameter in _MATRICES and own == 2 * event:
            columns = f"{dims[-1]}_bis"
            self.coords.setdefault(columns, (columns, self.coords[dims[-1]][1]))
            return (*dims, columns)
        numbered = tuple(f"{name}_{parameter}_{axis}" for axis in range(num_batch, len(shape)))
        for dim, size in zip(numbered, own, strict=True):
            self.coords.setdefault(dim, (dim, np.arange(size)))
        return (*dims[:num_batch], *numbered)

    def _dataset(self, arrays: Mapping[str, tuple[tuple[str, ...], np.ndarray]]) -> xr.Dataset:
        used = {dim for dims, _ in arrays.values() for dim in dims}
        coords = {name: (dim, values) for name, (dim, values) in self.coords.items() if dim in used}
        return xr.Dataset(arrays, coords=coords)


_MATRICES = {"covariance_matrix", "precision_matrix", "scale_tril"}
_ALIASES = {"logits": "probs", "precision_matrix": "covariance_matrix", "scale_tril": "covariance_matrix"}


def _parameters(fn: Any) -> dict[str, Tensor]:
    """What a distribution was made from, each once; nothing of a transformed one that has no parameters of its own."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    names = [name for name in fn.arg_constraints if _ALIASES.get(name) not in fn.arg_constraints]
    values = {name: getattr(fn, name) for name in names if name != "log_density"}
    return {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}


def attributes(draws: int, seed: int) -> dict[str, str | int]:
    """Those that ArviZ looks for, and how the draws were made."""
    return {
        "created_at": datetime.now(UTC).isoformat(),
        "creation_library": "pyro_vae",
        "creation_library_version": importlib.metadata.version("pyro-vae"),
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "draws": draws,
        "seed": seed,
    }
