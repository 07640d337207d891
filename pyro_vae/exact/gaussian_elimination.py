r"""Linear Gaussian programs of any form in closed form: chains, trees, hierarchies, regressions, crossed effects.

Each latent and observed site is normal, its mean is affine in the latents before it, and its scale is constant. Then

.. math:: \log p(x, z) = \sum_r \log N(c_r + J_r z; 0, 1) - \log s_r,

a sum over the standardised residuals r of all sites. The rows of J are sparse: those of a chain have two entries, a
state and the one before it. So :math:`p(z \mid x)` is normal with the sparse precision
:math:`\Lambda = J^\top J`. Its factor :math:`LDL^\top` costs T operations for a chain of T steps, as a Kalman filter
does, and

.. math:: \log p(x) = \log p(x, \mu) + \tfrac{n}{2} \log 2\pi - \tfrac{1}{2} \log |\Lambda|

at the posterior mean :math:`\mu`, in float64. The result has a value for each cell of the plates that all sites share.

Source: Rue and Held 2005, "Gaussian Markov Random Fields", sections 2.3 and 2.4.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from scipy import sparse
from scipy.sparse.linalg import splu
from torch import Tensor

from pyro_vae._utils.display import Result, Table, count_of
from pyro_vae._utils.rng import random_states, seeded
from pyro_vae._utils.traces import latent_sites, log_density, masked, observed_sites, summed_to
from pyro_vae._utils.typing import Function
from pyro_vae.compilation.affine_tensor import AffineForm, AffineTensor, NotAffineError, affine_form, affine_variables
from pyro_vae.distributions.missing import WithMissing
from pyro_vae.distributions.properties import base_distribution, is_point
from pyro_vae.model_guide import ModelGuide

__all__ = [
    "GaussianPosterior", "counted_entries", "gaussian_elimination", "gaussian_kl", "normal_inside", "standardised",
]  # fmt: skip

_NORMALS = (dist.Normal, dist.MultivariateNormal, dist.LowRankMultivariateNormal)
_CHUNK = 2**22  # numbers in the solutions of a chunk of right-hand sides
_LOG_2PI = math.log(2 * math.pi)
Sites = dict[str, dict[str, Any]]


class _Span(NamedTuple):
    """The variables of a latent: their first column, and the shape of its value."""

    first: int
    shape: torch.Size

    @property
    def columns(self) -> slice:
        return slice(self.first, self.first + self.shape.numel())


class _AffineLatents(Messenger):
    """Give each latent a tensor of variables as its value; points keep theirs, a function of other latents."""

    def __init__(self, spans: Mapping[str, _Span], total: int):
        super().__init__()
        self.spans, self.total = spans, total

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg) or is_point(msg["fn"]):
            return
        span, shape = self.spans.get(msg["name"]), msg["fn"].shape()
        if span is None or span.shape != shape:
            raise NotAffineError(f"the latent {msg['name']!r} has another shape in another run")
        msg["value"] = affine_variables(shape, span.first, self.total, like=normal_inside(msg["fn"])[0].loc)


@dataclass(frozen=True)
class _Rows:
    """Standardised residuals ``constant + matrix @ z``, the logarithms of their scales, and the cell of each."""

    form: AffineForm
    log_scale: np.ndarray
    cell: np.ndarray

    def log_prob(self, z: np.ndarray, num_cells: int) -> np.ndarray:
        """Sum the log-densities at z by cell, ``(cells,)``."""
        residual = self.form.constant + self.form.matrix @ z
        return np.bincount(self.cell, -0.5 * (residual**2 + _LOG_2PI) - self.log_scale, num_cells)


class _Density:
    """The joint density of a linear Gaussian run, of a model on its data or of a guide.

    Args:
        run, data: model or guide, and its arguments.
        sites: its latent sites.
        units: the plates whose cells have a value each.
        seed: of random numbers that the run draws outside of its sites.

    Raises:
        NotAffineError: if it is not proved to be linear and Gaussian.
    """

    def __init__(self, run: Function, data: Sequence[Any], sites: Sites, units: Sequence[Any], seed: int):
        self.sizes = torch.Size(frame.size for frame in units)
        self.units = units
        self.spans: dict[str, _Span] = {}
        self.total = 0
        for name, site in sites.items():
            if not is_point(site["fn"]):
                normal_inside(site["fn"])
                self.spans[name] = _Span(self.total, site["value"].shape)
                self.total += site["value"].numel()
        latents = _AffineLatents(self.spans, self.total)
        with poutine.block(), torch.no_grad(), seeded(seed), pyro.validation_enabled(False):
            before = random_states()
            with latents:
                trace = poutine.trace(run).get_trace(*data)
            self.draws_random_numbers = not _same_states(before, random_states())
        self.latents, observed = latent_sites(trace), observed_sites(trace)
        self.absent = np.zeros(self.total, dtype=bool)  # variables whose prior is masked: they count nowhere
        self.cell = np.zeros(self.total, dtype=np.int64)
        parts = []
        for name, site in (self.latents | observed).items():
            if not is_point(site["fn"]):
                rows, counted, cell = self._rows(site)
                parts.append(rows)
                if name in self.spans:
                    self.absent[self.spans[name].columns] = ~counted
                    self.cell[self.spans[name].columns] = cell
        matrix = sparse.vstack([part.form.matrix for part in parts], format="csr")
        form = AffineForm(np.concatenate([part.form.constant for part in parts]), sparse.csr_array(matrix))
        log_scale, cell = (np.concatenate(each) for each in zip(*((p.log_scale, p.cell) for p in parts), strict=True))
        self.rows = _Rows(form, log_scale, cell)

    def _rows(self, site: dict[str, Any]) -> tuple[_Rows, np.ndarray, np.ndarray]:
        """The residuals of a site that count, which of all count, and the cell of each of all."""
        if torch.as_tensor(site["scale"]).ne(1).any():
            raise NotAffineError("a scaled density is not normal")
        fn, value = site["fn"], site["value"]
        base, _ = normal_inside(fn)
        shape = torch.broadcast_shapes(fn.shape(), value.shape)
        batch = shape[: len(shape) - len(fn.event_shape)]
        residual, log_scale = standardised(base, value, shape)
        form = affine_form(residual, shape, self.total)
        keep = counted_entries(site, shape).cpu()
        cell = _cells(self.units, batch).reshape(batch + (1,) * len(fn.event_shape)).expand(shape)
        flags, cells = keep.reshape(-1).numpy(), cell.reshape(-1).numpy()
        kept = np.flatnonzero(flags)
        scales = log_scale.expand(shape).reshape(-1).numpy()
        return _Rows(form.rows(kept), scales[kept], cells[kept]), flags, cells

    def values(self, sites: Sites) -> np.ndarray:
        """Return the variables at the values of a trace."""
        z = np.zeros(self.total)
        for name, span in self.spans.items():
            z[span.columns] = sites[name]["value"].detach().double().cpu().reshape(-1).numpy()
        return z

    def check_cells(self, owner: str, pair: ModelGuide) -> None:
        """Raise if a residual depends on a latent of another cell, or on one whose own density is masked."""
        entries = self.rows.form.matrix.tocoo()
        nonzero = entries.data != 0
        row, column = entries.row[nonzero], entries.col[nonzero]
        if self.absent[column].any():
            names = [name for name, span in self.spans.items() if self.absent[span.columns].any()]
            raise ValueError(
                f"`{owner}` must mask the data that depend on masked latents, got a density that depends on {names} "
                "where they are masked"
            )
        if (self.rows.cell[row] != self.cell[column]).any():
            pair.check_rows(owner)  # names the site, where the cells are rows of data
            raise ValueError(
                f"`{owner}` must have a density of each cell of its plates {[frame.name for frame in self.units]} "
                "that depends on the latents of that cell alone, got one that depends on those of others"
            )

    def log_volume(self) -> np.ndarray:
        """Sum the log-densities of the points, functions of other latents, by cell: those of a change of variables."""
        total = np.zeros(self.sizes.numel())
        for site in self.latents.values():
            if is_point(site["fn"]):
                point = base_distribution(site["fn"])
                added = _constant(point.log_density).expand(point.batch_shape)
                added = masked(sum_rightmost(added, len(site["fn"].event_shape) - len(point.event_shape)), site)
                total += summed_to(added.double(), self.units).reshape(-1).cpu().numpy()
        return total

    def functions(self, spans: Mapping[str, _Span]) -> AffineForm:
        """Return latents of a model, the guide's values, as functions of the variables of the guide."""
        parts = [affine_form(self.latents[name]["value"], span.shape, self.total) for name, span in spans.items()]
        matrix = sparse.csr_array(sparse.vstack([part.matrix for part in parts], format="csr"))
        return AffineForm(np.concatenate([part.constant for part in parts]), matrix)


def _same_states(one: Any, other: Any) -> bool:
    same = all(torch.equal(state, other[1][name]) for name, state in one[1].items())
    return same and one[0] == other[0]


def _is_joint(base: Any) -> bool:
    return not isinstance(base, dist.Normal)


def normal_inside(fn: Any) -> tuple[Any, list[tuple[Any, int]]]:
    """The normal distribution inside of wrappers, and each mask with the number of event dimensions at its place."""
    found: list[tuple[Any, int]] = []
    while not isinstance(fn, _NORMALS):
        if isinstance(fn, dist.MaskedDistribution):
            found.append((fn._mask, len(fn.event_shape)))
        elif not isinstance(fn, torch.distributions.Independent | WithMissing):
            raise NotAffineError(f"a {type(fn).__name__} is not normal")
        fn = fn.base_dist
    return fn, found


def counted_entries(site: dict[str, Any], shape: torch.Size) -> Tensor:
    """Whether each entry of a normal site counts, ``(*shape)``: it is neither masked nor missing."""
    fn, device = site["fn"], torch.as_tensor(site["value"]).device
    keep = torch.ones(shape, dtype=torch.bool, device=device)
    masks = [] if site["mask"] is None else [(site["mask"], len(fn.event_shape))]
    for mask, event_dims in [*masks, *normal_inside(fn)[1]]:
        mask = torch.as_tensor(mask, device=device)
        keep = keep & mask.reshape(mask.shape + (1,) * event_dims)
    return keep & ~site["value"].isnan() if _accepts_missing(fn) else keep


def _accepts_missing(fn: Any) -> bool:
    while not isinstance(fn, WithMissing):
        if not hasattr(fn, "base_dist"):
            return False
        fn = fn.base_dist
    return True


def standardised(base: Any, value: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The residuals of a site in units of their scale, and the logarithms of the scales, ``(*shape)`` each."""
    residual = (value.double() - base.loc.double()).expand(shape)
    if not _is_joint(base):
        scale = _constant(base.scale).double()
        return residual / scale, scale.log().cpu()
    root = _constant(base.scale_tril).double()
    inverse = torch.linalg.solve_triangular(root, torch.eye(shape[-1]).to(root).expand_as(root), upper=False)
    return (inverse @ residual[..., None])[..., 0], root.diagonal(dim1=-2, dim2=-1).log().cpu()


def _constant(value: Any) -> Tensor:
    if isinstance(value, AffineTensor):
        raise NotAffineError("a scale, or a change of volume, that depends on a latent is not constant")
    return torch.as_tensor(value)


def _cells(units: Sequence[Any], batch: torch.Size) -> Tensor:
    """The number of the cell of the shared plates for each place of a batch."""
    shape = [1] * len(batch)
    for frame in units:
        shape[frame.dim] = frame.size
    count = math.prod(frame.size for frame in units)
    return torch.arange(count, device="cpu").reshape(shape).expand(batch)


class _Factor:
    """The factor of a sparse precision matrix."""

    def __init__(self, precision: sparse.csc_array):
        self.precision = precision
        # Pivots stay on the diagonal, so that each one belongs to a variable.
        self._lu = splu(precision, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        self.log_pivots = np.log(np.abs(self._lu.U.diagonal()[self._lu.perm_c]))

    def solve(self, right: np.ndarray) -> np.ndarray:
        """Solve with a step of refinement, ``(n,)`` or ``(n, S)``."""
        found = self._lu.solve(right)
        return found + self._lu.solve(right - self.precision @ found)


class GaussianPosterior(Result):
    r"""The exact posterior of a linear Gaussian program: a joint normal distribution of all latents.

    Attributes:
        log_evidence: log p(x) in nats, a number for each cell of the plates that all sites share; ``()`` without one.

    Values of latents are dictionaries by site name. Masked latents, such as the states of padded steps, are NaN.
    """

    log_evidence: Tensor

    def __init__(self, density: _Density, dtype: torch.dtype, device: torch.device):
        self._density, self._dtype, self._device = density, dtype, device
        self._kept = np.flatnonzero(~density.absent)
        form = density.rows.form
        self._matrix = sparse.csc_array(form.matrix)[:, self._kept]
        self._factor = _Factor(sparse.csc_array(self._matrix.T @ self._matrix))
        self._mean = np.zeros(density.total)
        self._mean[self._kept] = self._factor.solve(-(self._matrix.T @ form.constant))
        cells, count = density.cell[self._kept], density.sizes.numel()
        self._log_det = np.bincount(cells, self._factor.log_pivots, count)  # of the precision, by cell
        self._num_variables = np.bincount(cells, minlength=count)
        log_joint = density.rows.log_prob(self._mean, count)
        evidence = log_joint + 0.5 * self._num_variables * _LOG_2PI - 0.5 * self._log_det
        self.log_evidence = self._by_cell(evidence)

    def _by_cell(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).reshape(self._density.sizes).to(self._device, self._dtype)

    def _by_site(self, values: np.ndarray) -> dict[str, Tensor]:
        """Tensors by site of numbers for each variable, ``(*, n)``."""
        values = values.copy()
        values[..., self._density.absent] = np.nan
        found = {}
        for name, span in self._density.spans.items():
            part = torch.from_numpy(values[..., span.columns]).to(self._device, self._dtype)
            found[name] = part.reshape(values.shape[:-1] + span.shape)
        return found

    @property
    def sites(self) -> list[str]:
        """The names of the latents."""
        return list(self._density.spans)

    @cached_property
    def mean(self) -> dict[str, Tensor]:
        """The posterior mean of each latent, of the shape of its value; for a chain, the smoothed states."""
        return self._by_site(self._mean)

    @cached_property
    def stddev(self) -> dict[str, Tensor]:
        """The posterior standard deviation of each latent, of the shape of its value."""
        variance = np.full(self._density.total, np.nan)
        for columns, block in self._covariances([np.array([place]) for place in self._kept]):
            variance[columns] = block[0, 0]
        return self._by_site(np.sqrt(variance))

    @cached_property
    def marginals(self) -> dict[str, dist.TorchDistribution]:
        """The posterior of each latent alone, normal with the batch and event shape of its site."""
        found: dict[str, dist.TorchDistribution] = {}
        for name, site in self._density.latents.items():
            if name not in self._density.spans:
                continue
            events = len(site["fn"].event_shape)
            if events == 0:
                found[name] = dist.Normal(self.mean[name], self.stddev[name], validate_args=False)
                continue
            size, span = site["fn"].event_shape.numel(), self._density.spans[name]
            groups = np.arange(span.columns.start, span.columns.stop).reshape(-1, size)
            blocks = np.full((len(groups), size, size), np.nan)
            present = [place for place, group in enumerate(groups) if not self._density.absent[group].any()]
            for place, (_, block) in zip(present, self._covariances([groups[each] for each in present]), strict=True):
                blocks[place] = block
            batch = span.shape[: len(span.shape) - events]
            covariance = torch.from_numpy(blocks).reshape(*batch, size, size).to(self._device)
            root = torch.linalg.cholesky_ex(covariance)[0].to(self._dtype)
            loc = self.mean[name].reshape(*batch, size)
            found[name] = dist.MultivariateNormal(loc, scale_tril=root, validate_args=False)
        return found

    def single_marginal(self) -> dist.TorchDistribution | None:
        """Return the posterior of the only latent, if it is independent in each place of its batch; else ``None``."""
        names = list(self._density.latents)
        if len(names) > 1 or self._density.latents[names[0]]["fn"].batch_shape != self._density.sizes:
            return None
        return self.marginals[names[0]]

    def covariance(self, name: str, other: str | None = None) -> Tensor:
        """Compute the posterior covariance of the numbers of a latent, flattened, with those of another or its own."""
        spans = [self._density.spans[each] for each in (name, other or name)]
        rows, columns = (np.arange(span.columns.start, span.columns.stop) for span in spans)
        place = np.full(self._density.total, -1)
        place[self._kept] = np.arange(len(self._kept))
        found = np.full((len(rows), len(columns)), np.nan)
        left, right = (np.flatnonzero(place[each] >= 0) for each in (rows, columns))
        for part in _split(right, len(self._kept)):
            unit = np.zeros((len(self._kept), len(part)))
            unit[place[columns[part]], np.arange(len(part))] = 1.0
            found[np.ix_(left, part)] = self._factor.solve(unit)[place[rows[left]]]
        return torch.from_numpy(found).to(self._device, self._dtype)

    def _covariances(self, groups: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterate over groups of variables and their covariances.

        Variables that are not connected in the precision have no covariance. So one solution serves a variable of each
        connected component.
        """
        place = np.full(self._density.total, -1)
        place[self._kept] = np.arange(len(self._kept))
        _, component = sparse.csgraph.connected_components(self._factor.precision, directed=False)
        rank: dict[int, int] = {}  # how many variables of a component have a solution
        solution = np.zeros(len(self._kept), dtype=np.int64)
        for group in groups:
            for each in place[group]:
                solution[each] = rank.get(component[each], 0)
                rank[component[each]] = solution[each] + 1
        wanted = np.concatenate([place[group] for group in groups]) if len(groups) else np.zeros(0, dtype=np.int64)
        needed: dict[int, list[int]] = {}
        for number, group in enumerate(groups):
            for each in place[group]:
                needed.setdefault(int(solution[each]), []).append(number)
        blocks = [np.zeros((len(group), len(group))) for group in groups]
        for part in _split(np.arange(max(rank.values(), default=0)), len(self._kept)):
            chosen = wanted[(solution[wanted] >= part[0]) & (solution[wanted] <= part[-1])]
            unit = np.zeros((len(self._kept), len(part)))
            unit[chosen, solution[chosen] - part[0]] = 1.0
            columns = self._factor.solve(unit)
            for number in {number for each in part for number in needed[int(each)]}:
                rows = place[groups[number]]
                for position, each in enumerate(rows):
                    if part[0] <= solution[each] <= part[-1]:
                        blocks[number][:, position] = columns[rows, solution[each] - part[0]]
        yield from zip(groups, blocks, strict=True)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> dict[str, Tensor]:
        r"""Draw all latents together, ``(*sample_shape, *shape)`` by site.

        :math:`\Lambda^{-1}(J^\top \varepsilon - J^\top c)` has the posterior's mean and covariance.

        Source: Papandreou and Yuille 2010, "Gaussian sampling by local perturbations".
        """
        count = math.prod(sample_shape)
        draws = np.zeros((count, self._density.total))
        for part in _split(np.arange(count), len(self._density.rows.log_scale)):
            noise = torch.randn(len(self._density.rows.log_scale), len(part), dtype=torch.float64, device="cpu").numpy()
            draws[np.ix_(part, self._kept)] = self._factor.solve(self._matrix.T @ noise).T
        return self._by_site((self._mean + draws).reshape(*sample_shape, -1))

    @torch.no_grad()
    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Compute log p(z | x) at values of all latents, ``(*, *shape)`` by site; ``(*, *cells)``."""
        spans = self._density.spans
        if values.keys() != spans.keys():
            raise ValueError(f"`values` must have the latents {list(spans)}, got {list(values)}")
        first = next(iter(spans))
        sample_shape = values[first].shape[: values[first].dim() - len(spans[first].shape)]
        z = np.zeros((math.prod(sample_shape), self._density.total))
        for name, span in spans.items():
            flat = values[name].expand(sample_shape + span.shape).reshape(len(z), -1)
            z[:, span.columns] = flat.detach().double().cpu().numpy()
        standard = ((z - self._mean)[:, self._kept] @ self._matrix.T) ** 2
        count = self._density.sizes.numel()
        squares = np.stack([np.bincount(self._density.rows.cell, each, count) for each in standard])
        log_prob = 0.5 * (self._log_det - squares - self._num_variables * _LOG_2PI)
        shape = sample_shape + self._density.sizes
        return torch.from_numpy(log_prob).reshape(shape).to(self._device, self._dtype)

    def kl(self, guide: _Density, log_volume: np.ndarray) -> Tensor:
        """Compute KL(q || p(z | x)) by cell, of a Gaussian density q and the volume of its change of variables."""
        cells, count = self._density.rows.cell, self._density.sizes.numel()
        latents, used = guide.functions(self._density.spans), np.flatnonzero(~guide.absent)
        if sparse.csc_array(latents.matrix[self._kept])[:, np.flatnonzero(guide.absent)].count_nonzero():
            raise ValueError("`guide` must have the mask of the model at each latent, got another one")
        square = sparse.csc_array(guide.rows.form.matrix)[:, used]
        factor = splu(square)
        loc = factor.solve(-guide.rows.form.constant)
        forward = latents.matrix[self._kept][:, used]
        shift = latents.constant[self._kept] + forward @ loc - self._mean[self._kept]
        spread = sparse.csr_array(self._matrix @ forward)  # the residuals of the model as functions of the variables
        squares = (self._matrix @ shift) ** 2
        diagonal = square.diagonal()
        if square.count_nonzero() == len(diagonal):
            squares += spread.power(2) @ (1 / diagonal**2)
        else:
            for part in _split(np.arange(spread.shape[0]), len(diagonal)):
                squares[part] += (factor.solve(spread[part].T.toarray(), trans="T") ** 2).sum(0)
        log_q = np.bincount(guide.rows.cell, -0.5 * (1 + _LOG_2PI) - guide.rows.log_scale, count) + log_volume
        log_p = 0.5 * (self._log_det - self._num_variables * _LOG_2PI - np.bincount(cells, squares, count))
        return self._by_cell(log_q - log_p)

    def _line(self) -> str:
        names, more = self.sites[:3], len(self.sites) - 3
        at = ", ".join(names) + (f" and {more} more" if more > 0 else "")
        total = self.log_evidence.double().sum().item()
        variables = count_of(len(self._kept), "variable")
        return f"p(z | x) of {variables} at {at}, normal; log p(x) {total:.3f} nats for all data"

    def _table(self) -> Table:
        rows = [(name, tuple(span.shape)) for name, span in self._density.spans.items()]
        total = self.log_evidence.double().sum().item()
        return Table(("latent", "shape"), rows, f"Jointly normal. log p(x) is {total:.3f} nats for all data.")


def _split(index: np.ndarray, height: int) -> list[np.ndarray]:
    """Split right-hand sides of a height into parts that fit the memory."""
    width = max(1, _CHUNK // max(1, height))
    return [index[start : start + width] for start in range(0, len(index), width)]


def gaussian_elimination(pair: ModelGuide) -> GaussianPosterior | None:
    """Return the posterior of a linear Gaussian model, or ``None`` if the model is not proved to be one."""

    def again(seed: int) -> _Density:
        return _Density(pair.model, pair.data, pair.latents, pair.units, seed)

    try:
        for site in (pair.latents | pair.observed).values():
            if not is_point(site["fn"]):
                normal_inside(site["fn"])
        density = again(1)
    except (NotAffineError, RuntimeError, TypeError):  # also code that needs the values of its tensors
        return None
    if not density.total or not pair.observed:
        return None
    pair.check_likelihood()
    _check_repeatable("model", density, pair.latents | pair.observed, again)
    density.check_cells("model", pair)
    terms = [log_density(site) for site in pair.observed.values()]
    return GaussianPosterior(density, terms[0].dtype, terms[0].device)


def _check_repeatable(owner: str, density: _Density, sites: Sites, again: Callable[[int], _Density]) -> None:
    """Raise if the density differs between runs: random numbers outside of its sites do that.

    Only a run that draws random numbers, or has another density than the run of ``sites``, is repeated: the latter may
    be the rounding of the run's own dtype.
    """
    sites = {name: site for name, site in sites.items() if not is_point(site["fn"])}
    terms = [summed_to(log_density(site).double(), density.units).cpu() for site in sites.values()]
    sizes = torch.stack([term.abs() for term in terms]).sum(0)
    found = torch.from_numpy(density.rows.log_prob(density.values(sites), density.sizes.numel()))
    same = ((found.reshape(density.sizes) - torch.stack(terms).sum(0)).abs() <= 1e-3 * (1 + sizes)).all()
    if same and not density.draws_random_numbers:
        return
    form, other = density.rows.form, again(2).rows.form
    if not np.array_equal(form.constant, other.constant) or (form.matrix != other.matrix).nnz:
        raise ValueError(
            f"`{owner}` must have one {'log p(x, z)' if owner == 'model' else 'log q(z | x)'} at each z, got two "
            "different ones at the same z: it draws random numbers outside of its sites"
        )


def gaussian_kl(pair: ModelGuide, posterior: GaussianPosterior) -> Tensor | None:
    r"""Compute KL(q || p(z | x)) of a Gaussian guide by cell, or ``None`` if the guide is not proved to be one.

    The guide's variables u are those of its sites, or of an autoguide's auxiliary site, with standardised residuals
    :math:`\varepsilon = g + G u`; the latents are affine functions of them.
    """
    sites = latent_sites(pair.guide_trace)
    pair.check_density()

    def again(seed: int) -> _Density:
        return _Density(pair.guide, pair.data, sites, pair.units, seed)

    try:
        guide = again(1)
        log_volume = guide.log_volume()
    except (NotAffineError, RuntimeError, TypeError):
        return None
    _check_repeatable("guide", guide, sites, again)
    guide.check_cells("guide", pair)
    return posterior.kl(guide, log_volume)
