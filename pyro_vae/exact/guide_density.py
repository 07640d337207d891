"""The density log q(z | x) of a guide at any values of its latents, and expectations under it."""

import math
from collections.abc import Callable
from copy import copy
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import latent_sites, log_density
from pyro_vae.distributions.extent import Extent, find_extent
from pyro_vae.distributions.flow import Flow
from pyro_vae.distributions.properties import base_distribution, is_point, without_independent
from pyro_vae.draws import PerDraw, Results
from pyro_vae.exact.model_density import (
    ConditionedRuns,
    ModelDensity,
    Sites,
    Values,
    check_repeatable,
    check_site,
    common_weight,
    few_rows,
    layouts_of,
    plus,
)
from pyro_vae.exact.quadrature import Box, QuadratureError, integrate, rows_from, sum_on_lattice
from pyro_vae.handlers import MaskSites
from pyro_vae.model_guide import check_one_plate, check_same_latents

__all__ = ["GuideDensity"]

_NORMAL_ENTROPY = (1 + math.log(2 * math.pi)) / 2  # of a standard normal variable


class GuideDensity:
    """A guide on the data of a model, ``p`` of a pair with a guide: log q(z | x) at any z, and expectations under it.

    An autoguide such as ``AutoNormal`` draws an auxiliary site in unconstrained coordinates; the latent is a function
    of it, a ``Delta`` whose log-density is that of the change of variables. Then q(z | x) is the distribution of that
    function, if it is that of ``biject_to``, which is compared at the draws at hand. One auxiliary vector may also be
    that of all latents together, as of ``AutoMultivariateNormal``.

    Values and densities are those of the cells of ``p``.

    Raises:
        ValueError: if the guide does not have the latents of the model, all in the data plate, unscaled and unmasked
            where the model has a density of each row; if two runs give different densities.
    """

    def __init__(self, p: ModelDensity):
        self.p, self.guide = p, p.pair.guide
        drawn = latent_sites(p.pair.guide_trace)
        sites = {name: site for name, site in drawn.items() if name not in p.eliminated}
        summed_out = drawn.keys() - sites.keys()
        self.layouts, self._draws = layouts_of(sites, p.units), PerDraw()
        check_same_latents(p.pair.latents, sites, fewer=True)  # all of them, for the message
        check_same_latents(p.latents, sites)
        if p.by_rows:
            p.pair.check_factors()
            p.pair.check_points()
            self._check_rows(sites)
        else:
            p.pair.check_density(own_masks=False)
        for name, site in sites.items():
            check_site("guide", name, site, common_weight(p.pair), p.by_rows)
        self._origins = {
            name: origin for name, site in p.latents.items() if (origin := _origin(name, site["fn"], sites)) is not None
        }
        self._together = None if self._has_all_origins() else _common_origin(p.latents, sites)
        if masks := {} if p.by_rows else self._masks(sites):
            self.guide = MaskSites(masks)(self.guide)
        self.runs = ConditionedRuns(self.guide, self.layouts, p.units, summed_out, p.pair.max_plate_nesting)
        self.sites = self._latents(sites)
        for name in self.sites if p.by_rows else ():
            expected, shape = (tuple(of[name]["fn"].event_shape) for of in (p.latents, self.sites))
            if shape != expected:
                must = f"have the event shape of the model at site {name!r}, {expected}"
                raise ValueError(f"`guide` must {must}, got {shape}")
        if p.by_rows:
            p.pair.check_rows("guide")
        if self.has_any_density:
            with torch.no_grad(), seeded(1):
                values = {name: self.layouts[name].to_cells(site["value"][None]) for name, site in self.sites.items()}
                ours = self.log_prob(values)[0] if summed_out or masks else self._joint(sites)
                if masks:
                    values = {name: self._without_masked(name, value, masks) for name, value in values.items()}
                check_repeatable("guide", ours, self.log_prob(values)[0])

    def _check_rows(self, sites: Sites) -> None:
        """Raise if the rows are not drawn separately."""
        if together := [name for name in self.p.pair.auxiliary if not self.p.pair.is_local(sites[name])]:
            raise ValueError(
                f"`guide` must draw the latents of each row in the plate {self.p.plate!r}, got one that draws those of "
                f"all rows together, from {together}, as AutoDiagonalNormal and AutoMultivariateNormal do: it has no "
                "q(z | x) of a row. Use AutoNormal, or a guide of your own"
            )
        check_one_plate([("guide", name, site) for name, site in sites.items()], self.p.plate, self.p.num_data)

    def _latents(self, sites: Sites) -> Sites:
        """The sites of the model's latents, with q(z | x) in place of a function of an auxiliary site."""
        latents = {name: site for name, site in sites.items() if name in self.p.latents}
        for name, (auxiliary, transform) in self._origins.items():
            fn = _Transformed(sites[auxiliary]["fn"], transform, self.p.latents[name]["fn"].support)
            latents[name] = {**sites[name], "fn": fn.base_dist if _is_identity(transform) else fn}
        return latents

    def _masks(self, sites: Sites) -> dict[str, Tensor]:
        """The masks of the model for sites that the guide leaves unmasked, and for the auxiliary ones behind them.

        Cells that do not count in the model are then integrated out of a q that is independent of them.
        """
        masks = self.p.pair.left_unmasked()
        if masks and not self._has_all_origins():
            raise ValueError(
                f"`guide` must have the mask of the model at {min(masks)!r}, or a density of each cell, got one that "
                f"draws them together, from {self.p.pair.auxiliary}. Use AutoNormal, or a guide of your own"
            )
        return masks | {self._origins[name][0]: mask for name, mask in masks.items() if name in self._origins}

    def _without_masked(self, name: str, value: Tensor, masks: dict[str, Tensor]) -> Tensor:
        """Replace the masked cells of a latent by those of other cells."""
        if name not in masks:
            return value
        layout = self.layouts[name]
        mask = layout.to_cells(masks[name].expand(self.sites[name]["fn"].batch_shape)[None])
        mask = mask.reshape(mask.shape + (1,) * (value.dim() - mask.dim()))
        return torch.where(mask, value, value.flip(tuple(range(1, value.dim()))))

    def _has_all_origins(self) -> bool:
        return {auxiliary for auxiliary, _ in self._origins.values()} == set(self.p.pair.auxiliary)

    @property
    def has_any_density(self) -> bool:
        """Whether log q(z | x) is known at any z, since the auxiliary sites can be computed from the latents."""
        return self._has_all_origins() or self._together is not None

    @property
    def splits_by_site(self) -> bool:
        """Whether log q(z | x) is a sum over the latents, none of them a function of an auxiliary site of several."""
        return not any(is_point(site["fn"]) for site in self.sites.values())

    def _joint(self, sites: Sites) -> Tensor:
        """The log-density of sites together, for each cell."""
        if not sites:
            return self.p.zeros().to(self.p.dtype)
        return plus(self.runs.summed(log_density(site)) for site in sites.values())

    def of_rows(self, p: ModelDensity) -> "GuideDensity":
        """Return the density of the guide on a batch of rows, one of :meth:`ModelDensity.batches`."""
        part = copy(self)
        part.p = p
        return part

    def site(self) -> dict[str, Any]:
        """Return the site of the only latent."""
        return self.sites[self.p.single_site()[0]]

    def log_prob(self, values: Values) -> Tensor:
        """Compute log q(z | x) at values of every latent, ``(C, 1 or N, *event)``, as ``(C, N)``."""
        if not self.has_any_density:
            got = f"{sorted(self.sites.keys() - self._origins.keys())}, computed from {self.p.pair.auxiliary}"
            hint = "use AutoNormal, or pv.log_evidence, which needs log q(z | x) at draws of the guide alone"
            raise ValueError(f"`guide` must have latents whose density is known at any value, got {got}; {hint}")
        if self._together is not None:
            at = self._together(values)
        else:
            at = {name: value for name, value in values.items() if name not in self._origins}
            at |= {auxiliary: transform.inv(values[name]) for name, (auxiliary, transform) in self._origins.items()}
        return self.runs.log_prob(at, self.p.data, self.p.num_data)

    def sample(self, count: int) -> tuple[Values, Tensor]:
        """Draw values, ``(count, N, *event)`` by site, and compute their log q(z | x), ``(count, N)``."""
        results = self.sample_and_read(count, lambda sites: {name: site["value"] for name, site in sites.items()})
        values = {name: self.layouts[name].to_cells(results.each(name, count)) for name in self.sites}
        return values, self.log_prob(values) if self.runs.eliminated else results.each("log_q", count)

    def sample_and_read(self, count: int, read: Callable[[Sites], dict[Any, Tensor]]) -> Results:
        """Draw from the guide, and read tensors from its latents in each draw, besides their ``"log_q"``."""

        def run(_: Values) -> tuple[dict[Any, Tensor], None]:
            sites = latent_sites(poutine.trace(self.guide).get_trace(*self.p.data))
            return {**read(self._latents(sites)), "log_q": self._joint(sites)}, None

        with poutine.block():
            return self._draws(run, count)

    def factors(self) -> dict[str, Any] | None:
        """Return q of each latent if q(z | x) is their product, else ``None``: none is computed from another."""
        if len(self.sites) > 1 and self.p.pair.has_dependent_latents():
            return None
        return {name: site["fn"] for name, site in self.sites.items()}

    def integration_box(self) -> Box:
        """Return a box for each datum that contains q(z | x)."""
        return self.p.integration_box(self.site()["fn"])

    def sum(self, integrand: Callable[[Values], Tensor]) -> Tensor:
        """Compute an expectation as a sum over all states, ``(N,)``."""
        total = self.p.zeros()
        for values in self.p.states():
            total = total + _weighted_sum(self.log_prob(values).double(), integrand(values).double())
        return total

    def elbo(self, tolerance: float, reach: float = 1.0) -> Tensor:
        """Compute E_q[log p(x, z) - log q(z | x)] by quadrature, ``(N,)``, on a box of q that is wider by ``reach``.

        Of a normal q it is a sum over a lattice, of a flow one over a lattice of its noise; and a quadrature on cells
        for the data where that is not precise.
        """
        found = self._on_lattice(tolerance, reach)
        if found is None:
            return self._on_cells(tolerance, reach)
        value, precise = found
        if not precise.all():
            rows = (~precise).nonzero().flatten()
            if len(rows) == self.p.num_data or not self.p.has_independent_rows():
                return self._on_cells(tolerance, reach)
            value[rows] = self.of_rows(self.p.of_rows(rows))._on_cells(tolerance, reach)
        return value

    def _on_lattice(self, tolerance: float, reach: float) -> tuple[Tensor, Tensor] | None:
        """The expectation by sums over lattices, and for which data it is precise; ``None`` if q has no such sum."""
        p, integrand = self.p, _LogJoint(self.p)
        if isinstance(flow := self.site()["fn"], Flow) and flow.batch_shape == (p.pair.num_data,):
            size = flow.event_shape.numel()
            axes = torch.eye(size, dtype=torch.float64, device=flow.shift.device).expand(p.num_data, size, size)
            loc = torch.zeros_like(axes[..., 0])
            value, precise = sum_on_lattice(_LogRatioOfNoise(self, flow), loc, axes, tolerance, reach)
            for factor in (2, 4):  # a steep flow needs many nodes, but fewer than its density at values would
                if precise.all():
                    break
                left = ~precise if p.has_independent_rows() else torch.ones_like(precise)
                rows = left.nonzero().flatten()
                function = _LogRatioOfNoise(self.of_rows(p.of_rows(rows)), flow)
                found, is_precise = sum_on_lattice(function, loc[rows], axes[rows], tolerance, factor * reach)
                value[rows] = torch.where(precise[rows], value[rows], found)
                precise[rows] |= is_precise
            return value, precise
        normal = _as_normal(self.site()["fn"], integrand.coordinates.dims)
        if normal is None:
            return None
        loc, scale_tril = (part.double().expand(p.pair.num_data, *part.shape[1:])[p.rows] for part in normal)
        entropy = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + loc.shape[1] * _NORMAL_ENTROPY
        value, precise = sum_on_lattice(integrand, loc, scale_tril, tolerance, reach)
        if not precise.all() and (precise.any() or p.num_data == 1) and p.has_independent_rows(("model",)):
            rows = (~precise).nonzero().flatten()
            finer = sum_on_lattice(_LogJoint(p.of_rows(rows)), loc[rows], scale_tril[rows], tolerance, 2 * reach)
            value[rows], precise[rows] = finer
        return value + entropy, precise

    def _on_cells(self, tolerance: float, reach: float) -> Tensor:
        expectation = _Expectation(self)
        with rows_from(int(self.p.rows[0])):
            log_mass, value, _ = integrate(expectation, self.integration_box(), tolerance, reach)
        mass = log_mass.exp()
        if value is None or ((mass - 1).abs() > 2 * tolerance + expectation.rounding).any():
            masses = f"{float(mass.min()):.6g} to {float(mass.max()):.6g}"
            raise QuadratureError(f"quadrature did not converge: the mass of q(z | x) on its nodes is {masses}")
        return value


class _LogJoint:
    """log p(x, z), as a density of unconstrained coordinates of the latent."""

    def __init__(self, p: ModelDensity):
        self.p, self.coordinates, self.chunk = p, p.coordinates(), p.chunk
        self.rounding = 8 * torch.finfo(p.dtype).eps

    def __call__(self, points: Tensor) -> Tensor:
        with pyro.validation_enabled(False):
            log_joint = self.p.log_joint({self.coordinates.name: self.coordinates.to_site(points)}).double()
        return (log_joint + self.coordinates.log_jacobian(points)).expand(len(points), self.p.num_data)


class _LogRatioOfNoise:
    """log p(x, z) - log q(z | x) at the value z of each noise of a flow, which then need not be inverted."""

    def __init__(self, q: GuideDensity, flow: Flow):
        self.q, self.flow, self.chunk = q, flow, q.p.chunk
        self.rounding = 8 * torch.finfo(q.p.dtype).eps

    def __call__(self, points: Tensor) -> Tensor:
        p = self.q.p
        noise = points[:, :1].to(self.flow.shift.dtype).expand(-1, p.pair.num_data, -1)  # the same for all data
        with pyro.validation_enabled(False):
            value, log_q = self.flow.push(noise)
            log_joint = p.log_joint({p.single_site()[0]: value[:, p.rows]})
        return (log_joint - log_q[:, p.rows]).double()


class _Expectation:
    """log q(z | x), the density, and log p(x, z) - log q(z | x), at coordinates of the latent."""

    def __init__(self, q: GuideDensity):
        self.q, self.coordinates = q, q.p.coordinates()
        self.num_data, self.chunk = q.p.num_data, q.p.chunk
        self.rounding = 8 * torch.finfo(q.p.dtype).eps

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor]:
        values = {self.coordinates.name: self.coordinates.to_site(points)}
        with pyro.validation_enabled(False):
            log_q = self.q.log_prob(values)
            ratio = self.q.p.log_joint(values) - log_q
        shape = (len(points), self.num_data)
        return (log_q.double() + self.coordinates.log_jacobian(points)).expand(shape), ratio.expand(shape)

    def few_rows(self, count: int) -> "tuple[_Expectation, Tensor] | None":
        if (rows := few_rows(self.q.p, count)) is None:
            return None
        return _Expectation(self.q.of_rows(self.q.p.of_rows(rows))), rows


class _Transformed(dist.TransformedDistribution):
    """The distribution q(z | x) of a function of an autoguide's auxiliary site."""

    def __init__(self, base: Any, transform: Any, support: Any):
        super().__init__(base, [transform])
        self._support = support

    @property
    def support(self) -> Any:
        return self._support

    def with_base(self, base: Any) -> "_Transformed":
        """Return the distribution of the same function of another base."""
        return _Transformed(base, self.transforms[0], self._support)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_Transformed":
        return self.with_base(self.base_dist.expand(batch_shape))

    def extent(self) -> Extent:
        """Return the box of the auxiliary site, which has the unconstrained coordinates of the latent."""
        return find_extent(self.base_dist)


def _as_normal(fn: Any, dims: int) -> tuple[Tensor, Tensor] | None:
    """Mean ``(N, d)`` and scale ``(N, d, d)`` of a normal q in unconstrained coordinates; ``None`` for another q."""
    variables = without_independent(fn.base_dist if isinstance(fn, _Transformed) else fn)
    if isinstance(variables, torch.distributions.Normal) and variables.loc.dim():
        loc, scale = (part.reshape(len(part), -1) for part in (variables.loc, variables.scale))
        scale_tril = scale.diag_embed()
    elif isinstance(variables, torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal):
        loc, scale_tril = variables.loc, variables.scale_tril
    else:
        return None
    return (loc, scale_tril) if loc.dim() == 2 and loc.shape[1] == dims else None


def _origin(name: str, prior: Any, sites: Sites) -> tuple[str, Any] | None:
    """The auxiliary site of which an autoguide's latent is the function ``biject_to`` of the support, and the function.

    ``None`` for a latent with a distribution of its own, or with another function, as the values at hand show.
    """
    fn = base_distribution(sites[name]["fn"])
    if not isinstance(fn, dist.Delta):
        return None
    for auxiliary, site in sites.items():
        shapes = {len(each["fn"].batch_shape) for each in (site, sites[name])}
        if not site["infer"].get("is_auxiliary") or len(shapes) > 1:  # a vector of all rows is not that of each
            continue
        try:
            transform = biject_to(prior.support)
            same = torch.equal(transform(site["value"]), sites[name]["value"])
            volume = transform.inv.log_abs_det_jacobian(sites[name]["value"], site["value"])
        except (NotImplementedError, ValueError, RuntimeError):
            continue
        volume = sum_rightmost(volume, volume.dim() - len(fn.batch_shape))
        if same and torch.allclose(volume, fn.log_density, rtol=1e-3, atol=1e-3):
            return auxiliary, transform
    return None


def _common_origin(latents: Sites, sites: Sites) -> Callable[[Values], Values] | None:
    """The map from values of all latents to an auxiliary vector of all of them, which they are functions of.

    It has the unconstrained coordinates of the latents one after another, in the order of the guide, as the values at
    hand show.
    """
    names = [name for name, site in sites.items() if name in latents and is_point(site["fn"])]
    vectors = [name for name, site in sites.items() if name not in latents]
    if len(vectors) != 1 or len(names) < len(latents):
        return None
    transforms = {name: biject_to(latents[name]["fn"].support) for name in names}

    def pack(values: Values) -> Values:
        parts = [transform.inv(values[name]) for name, transform in transforms.items()]
        return {vectors[0]: torch.cat([part.reshape(part.shape[0], 1, -1) for part in parts], -1)}

    vector = sites[vectors[0]]["value"]
    packed = pack({name: sites[name]["value"][None, None] for name in names})[vectors[0]][0, 0]
    same = packed.shape == vector.shape and torch.allclose(packed, vector, rtol=1e-3, atol=1e-3)
    return pack if same else None


def _is_identity(transform: Any) -> bool:
    while isinstance(transform, torch.distributions.transforms.IndependentTransform):
        transform = transform.base_transform
    return isinstance(transform, torch.distributions.transforms.ComposeTransform) and not transform.parts


def _weighted_sum(log_weight: Tensor, value: Tensor) -> Tensor:
    weight = log_weight.exp()
    return torch.where(weight > 0, weight * value, 0.0).sum(0)
