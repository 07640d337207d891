r"""Quadrature over one or two latents, with all others integrated in closed form: conjugate and conditionally normal.

Given a few latents :math:`\theta`, such as the scale of a hierarchy or two hyperparameters, the rest of many models is
linear and Gaussian, or conjugate. Then

.. math:: p(x) = \int p(\theta) \int p(z \mid \theta)\,p(x \mid z, \theta)\,dz\,d\theta

has an inner integral in closed form, and the outer one is a quadrature. Without :math:`\theta` all is in closed form.

* Linear Gaussian latents, see :mod:`pyro_vae.exact.gaussian_elimination`.
* A Beta latent that is the probability of Bernoulli or binomial data; a Gamma latent that is the rate of Poisson or
  exponential data, times a constant; a Dirichlet latent that is the probabilities of categorical or multinomial data.

That a latent is such a parameter is proved operation by operation: the parameter is the latent itself, or a choice of
its entries, see :class:`pyro_vae.compilation.affine_tensor.AffineTensor`.

Source: Bernardo and Smith 1994, "Bayesian Theory", section 5.2 and appendix A.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from scipy import sparse
from torch import Tensor

from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import latent_sites, log_density, observed_sites, summed_to
from pyro_vae.compilation.affine_tensor import AffineTensor, NotAffineError, affine_form, affine_variables
from pyro_vae.distributions.properties import is_masked, is_point, without_independent
from pyro_vae.draws import PerDraw, Values
from pyro_vae.exact.coordinates import LatentCoordinates
from pyro_vae.exact.gaussian_elimination import counted_entries, normal_inside, standardised
from pyro_vae.exact.model_density import CellLayout, ModelDensity
from pyro_vae.exact.quadrature import Box, check_draws, integrate
from pyro_vae.model_guide import ModelGuide

__all__ = ["Collapsed", "collapsed_density"]

_MOST_NORMAL = {0: 256, 1: 256, 2: 32}  # dimensions of the normal latents, by those of the quadrature
_FLOOR = 1000.0  # nats below the largest density at draws from the prior
_LOG_2PI = math.log(2 * math.pi)
Sites = dict[str, dict[str, Any]]


class _Variables(Messenger):
    """Give latents that are to be integrated in closed form tensors of variables as their values."""

    def __init__(self, spans: Mapping[str, tuple[int, int]], total: int):
        super().__init__()
        self.spans, self.total = spans, total

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.spans or msg["is_observed"] or site_is_subsample(msg):
            return
        first, _ = self.spans[msg["name"]]
        shape, like = msg["fn"].shape(), torch.empty((), device="cpu")
        base = without_independent(msg["fn"])
        like = next((value for value in vars(base).values() if isinstance(value, Tensor)), like)
        if isinstance(base, dist.Dirichlet):  # the last entry is one minus the others
            free = affine_variables((*shape[:-1], shape[-1] - 1), first, self.total, like)
            msg["value"] = torch.cat([free, 1 - free.sum(-1, keepdim=True)], -1)
        else:
            msg["value"] = affine_variables(shape, first, self.total, like)


@dataclass(frozen=True)
class _Parameter:
    """A data site whose parameter is a conjugate latent: its entries at ``index``, times constants."""

    latent: str
    index: Tensor  # of the batch of the data, into the flattened batch of the latent


_FAMILIES: dict[type, dict[type, str]] = {
    dist.Beta: {dist.Bernoulli: "probs", dist.Binomial: "probs"},
    dist.Gamma: {dist.Poisson: "rate", dist.Exponential: "rate"},
    dist.Dirichlet: {dist.Categorical: "probs", dist.Multinomial: "probs"},
}
"""By the prior of a conjugate latent: the distributions of data, and their parameter that the latent is."""


def _family(fn: Any) -> type | None:
    """The conjugate prior that a distribution is, if any."""
    base = without_independent(fn)
    return next((family for family in _FAMILIES if type(base) is family), None)


class _Structure:
    """Which latents are integrated in closed form given the others, proved at one value of these others.

    Raises:
        NotAffineError: if it is not proved.
    """

    def __init__(self, pair: ModelGuide, given: Sequence[str], at: Mapping[str, Tensor] | None = None):
        self.given = list(given)
        latents = {name: site for name, site in pair.latents.items() if name not in given and not is_point(site["fn"])}
        self.conjugate = [name for name, site in latents.items() if _family(site["fn"])]
        self.normal = [name for name in latents if name not in self.conjugate]
        spans: dict[str, tuple[int, int]] = {}
        total = 0
        for name, site in latents.items():
            if site["mask"] is not None or is_masked(site["fn"]):
                raise NotAffineError("a masked latent has no conjugate distribution")
            shape = site["value"].shape
            count = shape.numel()
            if _family(site["fn"]) is dist.Dirichlet:
                count = count // shape[-1] * (shape[-1] - 1)
            spans[name] = total, total + count
            total += count
        values = at or {name: pair.latents[name]["value"] for name in given}
        run = poutine.condition(pair.model, data=dict(values))
        with poutine.block(), torch.no_grad(), seeded(1), pyro.validation_enabled(False), _Variables(spans, total):
            trace = poutine.trace(run).get_trace(*pair.data)
        self._spans, self._total = spans, total
        self.gaussian: list[str] = []  # the sites that are normal given the rest
        self.parameters: dict[str, _Parameter] = {}
        self.constant: list[str] = []  # the sites that depend on no latent that is integrated in closed form
        sites = observed_sites(trace) | latent_sites(trace)
        for name, site in sites.items():
            if name in self.conjugate:
                _constant(site["fn"].log_prob(pair.latents[name]["value"]))
            elif not is_point(site["fn"]):
                self._sort(name, site, sites)

    def same_as(self, other: "_Structure") -> bool:
        """Whether another structure has the same roles of all sites."""
        ours, theirs = ((each.gaussian, each.constant, list(each.parameters)) for each in (self, other))
        pairs = zip(self.parameters.values(), other.parameters.values(), strict=False)
        same = all(one.latent == two.latent and torch.equal(one.index, two.index) for one, two in pairs)
        return ours == theirs and same

    def _sort(self, name: str, site: dict[str, Any], sites: Sites) -> None:
        if _is_constant(site):
            self.constant.append(name)
            return
        if (parameter := self._parameter(site, sites)) is not None:
            self.parameters[name] = parameter
            return
        base, _ = normal_inside(site["fn"])
        shape = torch.broadcast_shapes(site["fn"].shape(), site["value"].shape)
        residual, _ = standardised(base, site["value"], shape)
        used = np.unique(affine_form(residual, shape, self._total).matrix.nonzero()[1])
        allowed = np.concatenate([np.zeros(0, dtype=int), *(np.arange(*self._spans[name]) for name in self.normal)])
        if not np.isin(used, allowed).all():
            raise NotAffineError("a mean that depends on a conjugate latent")
        self.gaussian.append(name)

    def _parameter(self, site: dict[str, Any], sites: Sites) -> _Parameter | None:
        """The conjugate latent that is the parameter of a site, with its entries; ``None`` for a normal site."""
        base = without_independent(site["fn"])
        for family, members in _FAMILIES.items():
            if type(base) not in members:
                continue
            value = getattr(base, members[type(base)])
            if isinstance(site["value"], AffineTensor) or not isinstance(value, AffineTensor):
                break
            form = affine_form(value, value.shape, self._total)
            for name in self.conjugate:
                if _family(sites[name]["fn"]) is family:
                    found = self._entries(form, value.shape, name, sites[name]["value"], family)
                    if found is not None:
                        return found
            break
        return None

    def _entries(self, form: Any, shape: torch.Size, name: str, latent: Tensor, family: type) -> _Parameter | None:
        """Compare the parameter with entries of a latent."""
        source = affine_form(latent, latent.shape, self._total)
        first, last = self._spans[name]
        width = shape[-1] if family is dist.Dirichlet else 1
        free = width - 1 if family is dist.Dirichlet else 1
        heads = form.matrix[::width]  # the first entry of each
        if (np.diff(heads.indptr) != 1).any() or ((heads.indices < first) | (heads.indices >= last)).any():
            return None
        if family is dist.Dirichlet and latent.shape[-1] != width:
            return None
        place, offset = divmod(heads.indices - first, free)
        factor = heads.data
        if offset.any() or (family is not dist.Gamma and (factor != 1).any()) or (factor <= 0).any():
            return None
        rows = source.rows((place[:, None] * width + np.arange(width)).reshape(-1))
        scale = np.repeat(factor, width)
        if abs(rows.constant * scale - form.constant).max(initial=0) > 0:
            return None
        if (sparse.diags_array(scale) @ rows.matrix - form.matrix).count_nonzero():
            return None
        batch = shape[:-1] if family is dist.Dirichlet else shape
        return _Parameter(name, torch.from_numpy(place).reshape(batch))


def _is_constant(site: dict[str, Any]) -> bool:
    """Whether the log-density of a site depends on no variable."""
    try:
        _constant(log_density(site))
    except (NotAffineError, RuntimeError):
        return False
    return True


def _constant(value: Tensor) -> None:
    if isinstance(value, AffineTensor):
        raise NotAffineError("a density that depends on a latent is not constant")


class Collapsed:
    r"""log p(x, theta) of a model whose other latents are integrated in closed form, for each cell of shared plates.

    Args:
        pair: the model.
        structure: which latents are theta, and which are integrated.

    Attributes:
        given: the latents theta of the quadrature, by name; none if all are integrated in closed form.
    """

    def __init__(self, pair: ModelGuide, structure: _Structure):
        self.p, self.given, self._structure = ModelDensity(pair, by_rows=False), structure.given, structure
        self.num_data = self.p.num_data
        if self.p.latents.keys() != pair.latents.keys():
            raise NotAffineError("a latent that is summed out has no place here")
        sites = {name: site for name, site in pair.latents.items() if not is_point(site["fn"])}
        self._values = {name: self.p.layouts[name].to_cells(site["value"][None]) for name, site in sites.items()}
        self._sizes = {name: self._values[name][0, 0].numel() for name in structure.normal}
        self.num_normal = sum(self._sizes.values())
        self.coordinates = {name: self._coordinates(name, sites[name]) for name in structure.given}
        self.dims = sum(each.dims for each in self.coordinates.values())
        if self.dims > 2 or self.num_normal > _MOST_NORMAL[self.dims]:
            raise NotAffineError("a quadrature of too many dimensions")
        if self.num_data > 1:
            self._check_cells()
        points = 1 + self.num_normal  # runs of the model for each value of theta
        self.chunk = max(1, self.p.chunk // points)

    def _check_cells(self) -> None:
        """Raise if the density of a cell changes with the latents of other cells."""
        expected = self.p.log_joint(self._values)[0]
        with seeded(0):
            kept = torch.randperm(self.num_data, device=expected.device) < -(-self.num_data // 2)
        for each in (kept, ~kept):
            mixed = {}
            for name, value in self._values.items():
                chosen = each.reshape(1, -1, *[1] * (value.dim() - 2))
                mixed[name] = torch.where(chosen, value, value.roll(1, 1))
            if not torch.allclose(self.p.log_joint(mixed)[0][each], expected[each], rtol=1e-3, atol=1e-3):
                raise ValueError("`model` must have cells that do not depend on each other")

    def _coordinates(self, name: str, site: dict[str, Any]) -> LatentCoordinates:
        units = [frame.dim for frame in self.p.units if frame.dim is not None]
        batch = len(site["fn"].batch_shape)
        inner = batch if not units else -1 - units[-1]
        if len(units) > 1 or batch - inner > len(units):
            raise NotAffineError("the quadrature has cells of one plate, the leftmost dimension")
        return LatentCoordinates(name, site["fn"].to_event(inner) if inner else site["fn"], self.p.dtype)

    def box(self) -> Box:
        """Return a box with nearly all mass of p(theta), one for all cells."""
        boxes = [each.integration_box(each.fn, self.num_data).union() for each in self.coordinates.values()]
        if len(boxes) == 1:
            return boxes[0]
        low, middle, high = (torch.cat([getattr(box, name) for box in boxes], -1) for name in ("low", "middle", "high"))
        first, second = (box.parts for box in boxes)
        pairs = [(one, other) for one in first.unbind(1) for other in second.unbind(1)]
        return Box(low, middle, high, torch.stack([torch.cat(pair, -1) for pair in pairs], 1))

    def to_values(self, points: Tensor) -> Values:
        """Return values of theta, ``(C, B, *event)`` by site, at coordinates ``(C, B, d)``."""
        parts = points.split([each.dims for each in self.coordinates.values()], -1)
        return {name: each.to_site(part) for (name, each), part in zip(self.coordinates.items(), parts, strict=True)}

    def log_jacobian(self, points: Tensor) -> Tensor:
        """The logarithm of the volume of theta for that of its coordinates, ``(C, B)``."""
        parts = points.split([each.dims for each in self.coordinates.values()], -1)
        each = zip(self.coordinates.values(), parts, strict=True)
        return sum((one.log_jacobian(part) for one, part in each), points.new_zeros(points.shape[:-1]))

    def log_prob(self, values: Values, count: int = 1) -> Tensor:
        """Compute log p(x, theta) at values ``(C, 1 or N, *event)`` of theta, as ``(C, N)`` in float64."""
        count = len(next(iter(values.values()))) if values else count
        parts = [
            self._log_prob({name: value[start : start + self.chunk] for name, value in values.items()}, size)
            for start in range(0, count, self.chunk)
            for size in [min(self.chunk, count - start)]
        ]
        return torch.cat(parts)

    def log_evidence(self, tolerance: float) -> Tensor:
        """Compute log p(x) of each cell, ``(N,)`` in float64."""
        if not self.given:
            return self.log_prob({})[0]
        box, draws = self.box(), _Draws(self)
        evidence, _, _ = integrate(_Integrand(self, draws.floor), box, tolerance, reach=1.0)
        draws.check(evidence, tolerance)
        return evidence

    def by_cell(self, values: Tensor) -> Tensor:
        """Return numbers of cells in the shape of their plates, in the dtype of the model."""
        return values.reshape([frame.size for frame in self.p.units]).to(self.p.dtype)

    def conjugate_posterior(self) -> dist.TorchDistribution | None:
        """Return the posterior of the only latent, a conjugate one, or ``None``."""
        if list(self.p.latents) != self._structure.conjugate or len(self.p.latents) != 1:
            return None
        (name,) = self._structure.conjugate
        fn = self.p.latents[name]["fn"]
        base = without_independent(fn)
        posterior = _conjugate_posteriors(self._structure, dict(self.p.sites))[name]
        batch, prior = base.batch_shape, [getattr(base, each) for each in _NATURAL[type(base)]]
        shaped = [each.to(old.dtype).expand(batch + old.shape[len(old.shape) - len(base.event_shape) :])
                  for each, old in zip(posterior, prior, strict=True)]  # fmt: skip
        return type(base)(*shaped).to_event(len(fn.event_shape) - len(base.event_shape))

    def conjugate_kl(self) -> Tensor | None:
        """Compute KL(q || p(z | x)) of a guide of the same family for the only latent, or ``None`` of another."""
        if (posterior := self.conjugate_posterior()) is None:
            return None
        pair = self.p.pair
        pair.check_density()
        site = pair.guide_latents[next(iter(self.p.latents))]
        if pair.auxiliary or type(without_independent(site["fn"])) is not type(without_independent(posterior)):
            return None
        return summed_to(torch.distributions.kl_divergence(site["fn"], posterior), self.p.units)

    def _log_prob(self, values: Values, count: int) -> Tensor:
        basis = 1 + self.num_normal
        at, first = {}, 1
        for name, value in self._values.items():
            value = values.get(name, value).expand(-1, self.num_data, *value.shape[2:])
            if name in self._sizes:
                unit = torch.zeros(basis, self._sizes[name]).to(value)
                unit[first : first + self._sizes[name]] = torch.eye(self._sizes[name]).to(value)
                first += self._sizes[name]
                unit = unit.reshape(basis, 1, *value.shape[2:]).expand(-1, self.num_data, *value.shape[2:])
                at[name] = unit.repeat(count, *[1] * (value.dim() - 1))
            else:
                at[name] = value.expand(count, *value.shape[1:]).repeat_interleave(basis, 0)
        with pyro.validation_enabled(False):
            found = self.p.read(at, self._read)
        log_prob = found.pop(("log", "")).reshape(count, basis, self.num_data)[:, 0].double()
        if not found:
            return log_prob
        residual = torch.cat([self._cells(name, value) for (_, name), value in found.items()], -1)
        residual = residual.unflatten(0, (count, basis)).movedim(1, -1)  # (C, N, R, 1 + n)
        matrix = torch.cat([residual[..., 1:] - residual[..., :1], residual[..., :1]], -1)
        return log_prob + _log_integral(matrix)

    def _cells(self, name: str, residual: Tensor) -> Tensor:
        """The residuals of a site for each cell, ``(C, N, R)``."""
        batch = len(residual.shape) - 1 - self.p.sites[name]["fn"].event_dim
        cells = CellLayout(self.p.units, batch).to_cells(residual)
        return cells.reshape(*cells.shape[:2], -1)

    def _read(self, sites: Sites) -> dict[Any, Tensor]:
        """The residuals of the normal sites, and all else of log p(x, theta)."""
        structure, found, terms = self._structure, {}, []
        for name in structure.gaussian:
            site = sites[name]
            base, _ = normal_inside(site["fn"])
            shape = torch.broadcast_shapes(site["fn"].shape(), site["value"].shape)
            residual, log_scale = standardised(base, site["value"], shape)
            keep = counted_entries(site, shape)
            found["residual", name] = torch.where(keep, residual, 0.0)
            each = torch.where(keep, -log_scale.to(keep.device) - 0.5 * _LOG_2PI, 0.0)
            terms.append(each.sum(list(range(-site["fn"].event_dim, 0))) if site["fn"].event_dim else each)
        terms += [log_density(sites[name]).double() for name in structure.constant]
        terms += _conjugate_terms(structure, sites)
        summed = [summed_to(term, self.p.units).flatten() for term in terms]
        found["log", ""] = torch.stack(summed).sum(0)
        return found


def _log_integral(matrix: Tensor) -> Tensor:
    """The logarithm of the integral of exp(-|c + J z|^2 / 2) over z, of matrices [J, c], ``(*, R, n + 1)``.

    Rows in the order of their size keep the digits of small ones, as with a prior that is much narrower than the
    likelihood (Cox and Higham 1998, "Stability of Householder QR factorization for weighted least squares problems").
    """
    count = matrix.shape[-1] - 1
    order = matrix[..., :-1].abs().amax(-1).argsort(-1, descending=True) if count else None
    if order is not None:
        matrix = matrix.gather(-2, order[..., None].expand_as(matrix))
    finite = matrix.isfinite().all(-1).all(-1)
    matrix = torch.nn.functional.pad(torch.where(finite[..., None, None], matrix, 0.0), (0, 0, 0, 1))
    diagonal = torch.linalg.qr(matrix, mode="r").R.diagonal(dim1=-2, dim2=-1)
    log_det = diagonal[..., :-1].abs().log().sum(-1)
    found = 0.5 * count * _LOG_2PI - log_det - 0.5 * diagonal[..., -1] ** 2
    return torch.where(finite, found, torch.nan)


def _conjugate_terms(structure: _Structure, sites: Sites) -> list[Tensor]:
    """The log-densities of data with their conjugate latents integrated out: a term for each latent and data site."""
    terms = []
    for name, parameter in structure.parameters.items():
        _, coefficient = _statistics(sites[name], sites[parameter.latent], parameter)
        terms.append(_summed_events(coefficient, sites[name]["fn"]))
    for name, posterior in _conjugate_posteriors(structure, sites).items():
        base = without_independent(sites[name]["fn"])
        normalizer, prior = _LOG_NORMALIZER[type(base)], _natural(base)
        change = (normalizer(*posterior) - normalizer(*prior)).expand(base.batch_shape)
        terms.append(_summed_events(change, sites[name]["fn"]))
    return terms


def _conjugate_posteriors(structure: _Structure, sites: Sites) -> dict[str, list[Tensor]]:
    """The parameters of the posterior of each conjugate latent, in float64."""
    found = {name: _natural(without_independent(sites[name]["fn"])) for name in structure.conjugate}
    for name, parameter in structure.parameters.items():
        counts, coefficient = _statistics(sites[name], sites[parameter.latent], parameter)
        width = without_independent(sites[parameter.latent]["fn"]).event_shape
        shape = torch.broadcast_shapes(parameter.index.shape, coefficient.shape)
        index = parameter.index.expand(shape).reshape(-1)
        for place, (prior, count) in enumerate(zip(found[parameter.latent], counts, strict=True)):
            flat = count.expand((*shape, *width)).reshape(-1, *width)
            total = flat.new_zeros(prior.numel() // width.numel(), *width).index_add(0, index.to(flat.device), flat)
            found[parameter.latent][place] = prior + total.reshape(prior.shape)
    return found


def _natural(base: Any) -> list[Tensor]:
    """The parameters of a conjugate prior, expanded to its batch, in float64."""
    shape = base.batch_shape + base.event_shape
    return [getattr(base, each).double().expand(shape) for each in _NATURAL[type(base)]]


def _statistics(site: dict[str, Any], latent: dict[str, Any], parameter: _Parameter) -> tuple[list[Tensor], Tensor]:
    """What a data site adds to the parameters of its latent, and the part of its log-density without the latent."""
    fn = site["fn"]
    base, value = without_independent(fn), site["value"].double()
    factor = torch.ones((), dtype=torch.float64, device=value.device)
    if isinstance(without_independent(latent["fn"]), dist.Gamma):  # a constant may depend on theta
        entries = latent["value"].double().reshape(-1)[parameter.index.to(value.device)]
        factor = base.rate.double() / entries
    counts, coefficient = _STATISTICS[type(base)](base, value, factor.to(value.device))
    if site["mask"] is None:
        return counts, coefficient
    mask = torch.as_tensor(site["mask"], device=value.device)
    mask = mask.reshape(mask.shape + (1,) * (len(fn.event_shape) - len(base.event_shape)))
    masked = [
        torch.where(mask.reshape(mask.shape + (1,) * (each.dim() - coefficient.dim())), each, 0.0) for each in counts
    ]
    return masked, torch.where(mask, coefficient, 0.0)


def _summed_events(term: Tensor, fn: Any) -> Tensor:
    """Sum over the dimensions that ``to_event`` has made one variable."""
    events = len(fn.event_shape) - len(without_independent(fn).event_shape)
    return term.sum(list(range(-events, 0))) if events else term


def _binomial(base: Any, x: Tensor, _: Tensor) -> tuple[list[Tensor], Tensor]:
    total = base.total_count.double() if isinstance(base, dist.Binomial) else torch.ones_like(x)
    ways = (total + 1).lgamma() - (x + 1).lgamma() - (total - x + 1).lgamma()
    return [x, total - x], ways


def _poisson(base: Any, x: Tensor, factor: Tensor) -> tuple[list[Tensor], Tensor]:
    return list(torch.broadcast_tensors(x, factor)), x.xlogy(factor) - (x + 1).lgamma()


def _exponential(base: Any, x: Tensor, factor: Tensor) -> tuple[list[Tensor], Tensor]:
    return [torch.ones_like(factor * x), factor * x], factor.log() + torch.zeros_like(x)


def _categorical(base: Any, x: Tensor, _: Tensor) -> tuple[list[Tensor], Tensor]:
    states = torch.arange(base.event_size if hasattr(base, "event_size") else base._num_events, device=x.device)
    return [(x[..., None] == states).double()], torch.zeros_like(x)


def _multinomial(base: Any, x: Tensor, _: Tensor) -> tuple[list[Tensor], Tensor]:
    return [x], (x.sum(-1) + 1).lgamma() - (x + 1).lgamma().sum(-1)


_STATISTICS: dict[type, Callable[[Any, Tensor, Tensor], tuple[list[Tensor], Tensor]]] = {
    dist.Bernoulli: _binomial,
    dist.Binomial: _binomial,
    dist.Categorical: _categorical,
    dist.Exponential: _exponential,
    dist.Multinomial: _multinomial,
    dist.Poisson: _poisson,
}
"""What data add to the parameters of the prior, and the part of their log-density without the latent."""

_NATURAL: dict[type, tuple[str, ...]] = {
    dist.Beta: ("concentration1", "concentration0"),
    dist.Dirichlet: ("concentration",),
    dist.Gamma: ("concentration", "rate"),
}
_LOG_NORMALIZER: dict[type, Callable[..., Tensor]] = {
    dist.Beta: lambda a, b: a.lgamma() + b.lgamma() - (a + b).lgamma(),
    dist.Dirichlet: lambda a: a.lgamma().sum(-1) - a.sum(-1).lgamma(),
    dist.Gamma: lambda a, b: a.lgamma() - a * b.log(),
}


class _Integrand:
    """log p(x, theta) at coordinates of theta.

    What lies below ``floor`` is that floor, far below the values at draws from the prior: a density falls without end
    as a scale goes to zero, and the distance of two nodes there would not bound what lies between them.
    """

    def __init__(self, density: Collapsed, floor: Tensor):
        self.density, self.floor = density, floor
        self.num_data, self.chunk = density.num_data, density.chunk
        self.rounding = 32 * torch.finfo(density.p.dtype).eps

    def __call__(self, points: Tensor) -> tuple[Tensor, None]:
        found = self.density.log_prob(self.density.to_values(points)) + self.density.log_jacobian(points)
        found = found.masked_fill(found == torch.inf, torch.nan)  # a number has overflowed: an error
        return found.expand(len(points), self.num_data).clamp(min=self.floor), None

    def few_rows(self, count: int) -> "tuple[_Integrand, Tensor] | None":
        rows = torch.arange(self.num_data, device=self.density.p.data[0].device)
        return (self, rows) if self.num_data <= count else None


def collapsed_density(pair: ModelGuide) -> Collapsed | None:
    """Return the density of a model with as few latents left for quadrature as possible, or ``None`` if not proved."""
    latents = {name: site for name, site in pair.latents.items() if not is_point(site["fn"])}
    cells = math.prod(frame.size for frame in pair.units)
    sizes = {name: site["value"].numel() // cells for name, site in latents.items()}
    must = [name for name, site in latents.items() if not _family(site["fn"]) and not _is_normal(site["fn"])]
    may = [name for name in latents if name not in must and sizes[name] <= 2]
    for count in range(3):
        for more in combinations(may, count):
            given = [name for name in latents if name in must or name in more]
            if sum(sizes[name] for name in given) > 3:  # a simplex of three entries has two coordinates
                continue
            try:
                structure = _Structure(pair, given)
                if all(structure.same_as(_Structure(pair, given, at)) for at in _other_values(pair, given)):
                    return Collapsed(pair, structure)
            except (ValueError, RuntimeError, TypeError):  # not proved, or no density: the reason follows elsewhere
                continue
    return None


def _other_values(pair: ModelGuide, given: Sequence[str], count: int = 2) -> Iterator[dict[str, Tensor]]:
    """Iterate over other values of the latents of the quadrature, at which a branch may take another way."""
    for seed in range(count if given else 0):
        with poutine.block(), seeded(seed):
            sites = latent_sites(poutine.trace(pair.model).get_trace(*pair.data))
        yield {name: sites[name]["value"] for name in given}


def _is_normal(fn: Any) -> bool:
    try:
        normal_inside(fn)
    except NotAffineError:
        return False
    return True


class _Draws:
    """Draws of theta from the prior, and log p(x | theta) at them: an estimate of p(x) by importance sampling."""

    def __init__(self, density: Collapsed, count: int = 512):
        p = density.p

        def run(_: Values) -> tuple[dict[Any, Tensor], None]:
            sites = latent_sites(poutine.trace(p.model).get_trace(*p.data))
            found: dict[Any, Tensor] = {("value", name): sites[name]["value"] for name in density.given}
            terms = [summed_to(log_density(sites[name]), p.units).flatten() for name in density.given]
            return {**found, ("log", ""): torch.stack(terms).sum(0)}, None

        with seeded(0), pyro.validation_enabled(False), poutine.block():
            drawn = PerDraw()(run, count)
        values = {name: p.layouts[name].to_cells(drawn.each(("value", name), count)) for name in density.given}
        self.density = density
        self.log_joint = density.log_prob(values).nan_to_num(nan=-torch.inf, posinf=-torch.inf)
        self.log_likelihood = self.log_joint - drawn.each(("log", ""), count).double()
        self.floor = self.log_joint.amax(0) - _FLOOR

    def check(self, evidence: Tensor, tolerance: float) -> None:
        """Raise if they find more than the quadrature: mass that it has missed."""
        check_draws(self.log_likelihood - evidence, "cell", tolerance)
