"""Linear Gaussian models in closed form: factor analysis, and pPCA if all dimensions have the same noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import observed_sites
from pyro_vae.compilation.affine import AffineGraph
from pyro_vae.distributions.columns import Columns
from pyro_vae.distributions.missing import WithMissing
from pyro_vae.distributions.properties import without_independent
from pyro_vae.exact.model_density import ModelDensity

__all__ = ["LinearGaussian", "linear_gaussian"]

_ROWS = 64  # from which a graph is read, if rows do not depend on each other
_NORMALS = (dist.Normal, dist.MultivariateNormal, dist.LowRankMultivariateNormal)


@dataclass(frozen=True)
class LinearGaussian:
    """z ~ N(mean, factor factor'), x = loc + weight (z - mean) + N(0, diag noise); missing entries of x are NaN.

    All in float64, ``dtype`` is that of the answers.
    """

    mean: Tensor
    factor: Tensor
    weight: Tensor
    loc: Tensor
    noise: Tensor
    x: Tensor
    dtype: torch.dtype

    def _observed(self) -> tuple[Tensor, Tensor]:
        """Whether entries of x are observed, as 0s and 1s, in one row if all are; and x - loc, 0 at missing entries."""
        missing = self.x.isnan()
        observed = (~missing).to(self.x)
        return observed if missing.any() else observed[:1], (self.x - self.loc).masked_fill(missing, 0.0)

    def _precision(self, weight: Tensor, observed: Tensor) -> Tensor:
        """The contribution of the observed entries of each datum to the precision of z, ``(N or 1, k, k)``."""
        if len(observed) == 1:
            return ((weight.T * (observed / self.noise)) @ weight)[None]
        each = weight[:, :, None] * weight[:, None, :] / self.noise[:, None, None]
        return (observed @ each.flatten(1)).unflatten(1, each.shape[1:])

    def log_evidence(self) -> Tensor:
        """Compute log p(x) of each datum, the normal density of its observed entries, by the matrix inversion lemma."""
        observed, residual = self._observed()
        weight = self.weight @ self.factor  # for a standard normal z
        capacitance = torch.eye(len(self.mean)).to(weight) + self._precision(weight, observed)
        root = torch.linalg.cholesky(capacitance)
        pulled = _solve(partial(torch.linalg.solve_triangular, upper=False), root, (residual / self.noise) @ weight)
        quadratic = (residual**2 / self.noise).sum(1) - (pulled**2).sum(1)
        log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + observed @ self.noise.log()
        return -0.5 * (quadratic + log_det + observed.sum(1) * math.log(2 * math.pi))

    def posterior(self) -> dist.TorchDistribution:
        """Compute p(z | x) of each datum, a multivariate normal."""
        observed, residual = self._observed()
        prior_precision = torch.cholesky_inverse(self.factor)
        precision = prior_precision + self._precision(self.weight, observed)
        loc = self.mean + _solve(torch.linalg.solve, precision, (residual / self.noise) @ self.weight)
        scale_tril = dist.MultivariateNormal(torch.zeros_like(loc), precision_matrix=precision).scale_tril
        return dist.MultivariateNormal(loc.to(self.dtype), scale_tril=scale_tril.to(self.dtype))


def _solve(solve: Callable[..., Tensor], matrices: Tensor, vectors: Tensor) -> Tensor:
    """Solve for each of N vectors with its matrix, or with one common matrix, which is then not copied N times."""
    if len(matrices) == 1:
        return solve(matrices[0], vectors.T).T
    return solve(matrices, vectors[..., None]).squeeze(-1)


def linear_gaussian(p: ModelDensity) -> LinearGaussian | None:
    """Return the model as a linear Gaussian one, or ``None``.

    That the mean of x is affine in z, and its scale constant, is proved on the graph of the operations between them,
    and computed from it in float64: :class:`pyro_vae.compilation.affine.AffineGraph`.
    """
    if len(p.latents) != 1 or len(p.observed) != 1:
        return None
    (latent,), (observed,) = p.latents.values(), p.observed.values()
    prior = _normal_moments(latent["fn"])
    if prior is None or observed["mask"] is not None or not _may_be_linear(p, *prior):
        return None
    mean, factor = prior
    found = _affine_likelihood(p, mean)
    if found is None:
        return None
    x = observed["value"].double().reshape(p.num_data, -1)
    return LinearGaussian(mean, factor, *found, x, p.dtype)


def _may_be_linear(p: ModelDensity, mean: Tensor, factor: Tensor) -> bool:
    """Compare a few points in z, for all rows, at a small cost: most models are not linear."""
    name, dims = next(iter(p.latents)), len(mean)
    with seeded(0):
        far = 3 * torch.randn(3, dims, dtype=torch.float64, device="cpu")
    steps = torch.cat([torch.zeros_like(far[:1]), torch.eye(dims, device="cpu"), far]).to(
        mean
    )  # in standard deviations of the prior
    locs = []
    for values in (mean + steps @ factor.T)[:, None].to(p.dtype).split(p.chunk):
        moments = p.read({name: values}, lambda sites: dict(enumerate(_moments(sites, p, (p.num_data,)) or ())))
        if not moments or not all(_close(moment, moment[:, :1]) for moment in moments.values()):
            return False  # the likelihood is not normal, or depends on the datum
        locs.append(moments[0][:, 0].double())
    loc = torch.cat(locs)
    slope = (loc[1 : dims + 1] - loc[0]).T
    rounding = 64 * torch.finfo(p.dtype).eps * (loc[0].abs() + steps.abs() @ slope.abs().T)
    return bool(((loc - loc[0] - steps @ slope.T).abs() <= rounding + 1e-30).all())


def _affine_likelihood(p: ModelDensity, mean: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Weight ``(D, k)``, the value at the prior's mean ``(D,)`` and the variances of x, if its mean is affine."""
    rows = p.of_rows(slice(0, _ROWS)) if p.num_data > _ROWS and p.pair.is_amortized("model") else p
    (name,) = p.latents
    shape, dims = (rows.num_data,), len(mean)

    def likelihood(z: Tensor) -> list[Tensor]:
        with poutine.block():
            trace = poutine.trace(poutine.condition(p.model, data={name: z})).get_trace(*rows.data)
        moments = _moments(observed_sites(trace), p, shape)
        if moments is None:
            raise ValueError("the likelihood is not normal")
        return list(moments)

    try:
        graph = AffineGraph(likelihood, mean.to(p.dtype).expand(*shape, dims).clone())
    except (ValueError, RuntimeError):  # it reads values of tensors, or has operations that cannot be captured
        return None
    if graph.degrees[0] is None or graph.degrees[1] != 0:
        return None
    with seeded(0):  # a step for each row: a row that depends on others steps differently
        ramp = torch.randn(*shape, dims, dtype=torch.float64, device="cpu").to(mean)
    centre, scale = graph(mean.expand(*shape, dims))
    ends = [graph((mean + step).expand(*shape, dims))[0] for step in torch.eye(dims).to(mean)]
    weight, loc, scale = torch.stack([(end - centre)[0] for end in ends], -1), centre[0], scale[0]
    stepped = loc + ramp @ weight.T
    same = [(centre, loc), (graph(mean + ramp)[0], stepped), *zip(ends, (loc + weight.T)[:, None], strict=True)]
    if not all(_close(*pair) for pair in same):
        return None
    return weight, loc, scale**2


def _moments(sites: dict[str, Any], p: ModelDensity, batch: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """Mean and scale of x at the only observed site, ``(*batch, D)``, if it is normal."""
    (name,) = p.observed
    whole, moments = sites[name]["fn"], []
    for fn in whole.columns.values() if isinstance(whole, Columns) else [whole]:
        base = without_independent(fn)
        base = base.base_dist if isinstance(base, WithMissing) else base
        if not isinstance(base, dist.Normal):
            return None
        shape = (*batch, *fn.event_shape)  # the parameters have fewer dimensions if they do not read z or x
        moments.append([moment.expand(shape).reshape(*batch, -1) for moment in (base.loc, base.scale)])
    loc, scale = (torch.cat(each, -1) for each in zip(*moments, strict=True))
    return loc, scale


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether tensors are equal but for the rounding of sums over their largest numbers."""
    return bool((one - other).abs().max() <= 64 * torch.finfo(one.dtype).eps * one.abs().max())


def _normal_moments(fn: dist.TorchDistribution) -> tuple[Tensor, Tensor] | None:
    """Mean and a factor of the covariance of a normal with one event dimension, the same for all data; or ``None``."""
    base = without_independent(fn)
    if len(fn.event_shape) != 1 or not isinstance(base, _NORMALS):
        return None
    scale = base.scale if isinstance(base, dist.Normal) else base.scale_tril
    if (base.loc != base.loc[:1]).any() or (scale != scale[:1]).any():
        return None
    return base.loc[0].double(), torch.diag(scale[0].double()) if isinstance(base, dist.Normal) else scale[0].double()
