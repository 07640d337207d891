"""Linear Gaussian models in closed form: factor analysis, and pPCA if all dimensions have the same noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import observed_sites
from pyro_vae.distributions.missing import WithMissing
from pyro_vae.distributions.properties import without_independent
from pyro_vae.exact.model_density import ModelDensity

__all__ = ["LinearGaussian", "linear_gaussian"]


@dataclass(frozen=True)
class LinearGaussian:
    """z ~ N(mean, factor factor'), x = weight z + bias + N(0, diag noise), in float64; missing entries of x are NaN."""

    mean: Tensor
    factor: Tensor
    weight: Tensor
    bias: Tensor
    noise: Tensor
    x: Tensor
    dtype: torch.dtype

    def _observed(self, loc: Tensor) -> tuple[Tensor, Tensor]:
        """Whether entries of x are observed, as 0s and 1s, in one row if all are; and x - loc, 0 at missing entries."""
        missing = self.x.isnan()
        observed = (~missing).to(self.x)
        return observed if missing.any() else observed[:1], (self.x - loc).masked_fill(missing, 0.0)

    def _precision(self, weight: Tensor, observed: Tensor) -> Tensor:
        """The contribution of the observed entries of each datum to the precision of z, ``(N or 1, k, k)``."""
        if len(observed) == 1:
            return ((weight.T * (observed / self.noise)) @ weight)[None]
        each = weight[:, :, None] * weight[:, None, :] / self.noise[:, None, None]
        return (observed @ each.flatten(1)).unflatten(1, each.shape[1:])

    def log_evidence(self) -> Tensor:
        """Compute log p(x) of each datum, the normal density of its observed entries, by the matrix inversion lemma."""
        observed, residual = self._observed(self.bias + self.weight @ self.mean)
        weight = self.weight @ self.factor  # for a standard normal z
        capacitance = torch.eye(len(self.mean)).to(weight) + self._precision(weight, observed)
        root = torch.linalg.cholesky(capacitance)
        pulled = _solve(partial(torch.linalg.solve_triangular, upper=False), root, (residual / self.noise) @ weight)
        quadratic = (residual**2 / self.noise).sum(1) - (pulled**2).sum(1)
        log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + observed @ self.noise.log()
        return -0.5 * (quadratic + log_det + observed.sum(1) * math.log(2 * math.pi))

    def posterior(self) -> dist.TorchDistribution:
        """Compute p(z | x) of each datum, a multivariate normal."""
        observed, residual = self._observed(self.bias)
        prior_precision = torch.cholesky_inverse(self.factor)
        precision = prior_precision + self._precision(self.weight, observed)
        pull = (residual / self.noise) @ self.weight + prior_precision @ self.mean
        loc = _solve(torch.linalg.solve, precision, pull)
        scale_tril = dist.MultivariateNormal(torch.zeros_like(loc), precision_matrix=precision).scale_tril
        return dist.MultivariateNormal(loc.to(self.dtype), scale_tril=scale_tril.to(self.dtype))


def _solve(solve: Callable[..., Tensor], matrices: Tensor, vectors: Tensor) -> Tensor:
    """Solve for each of N vectors with its matrix, or with one common matrix, which is then not copied N times."""
    if len(matrices) == 1:
        return solve(matrices[0], vectors.T).T
    return solve(matrices, vectors[..., None]).squeeze(-1)


def linear_gaussian(p: ModelDensity) -> LinearGaussian | None:
    """Return the model as a linear Gaussian one, or ``None``. Linearity is tested on probes, to rounding error."""
    if len(p.latents) != 1 or len(p.observed) != 1:
        return None
    (name, latent), (x_name, observed) = next(iter(p.latents.items())), next(iter(p.observed.items()))
    prior = _normal_moments(latent["fn"])
    if prior is None or observed["mask"] is not None:
        return None
    mean, factor = prior
    dims = len(mean)
    with seeded(0):
        far = 3 * torch.randn(16 + 2 * dims, dims, dtype=torch.float64)
    steps = torch.cat([torch.zeros(1, dims), torch.eye(dims), far]).to(mean)  # in standard deviations of the prior
    probes = mean + steps @ factor.T
    with poutine.block():
        conditioned = poutine.condition(p.model, data={name: probes[:, None].to(p.dtype)})
        trace = poutine.trace(conditioned).get_trace(*p.data)
    likelihood = without_independent(observed_sites(trace)[x_name]["fn"])
    if isinstance(likelihood, WithMissing):
        likelihood = likelihood.base_dist
    if not isinstance(likelihood, dist.Normal):
        return None
    shape = (len(probes), p.num_data, *observed["fn"].event_shape)  # smaller if the likelihood does not read z or x
    loc, scale = (moment.expand(shape) for moment in (likelihood.loc, likelihood.scale))
    if (loc != loc[:, :1]).any() or (scale != scale[:, :1]).any():
        return None  # the likelihood depends on the datum
    loc, scale = (moment[:, 0].double().flatten(1) for moment in (loc, scale))
    slope = (loc[1 : dims + 1] - loc[0]).T
    rounding = 64 * torch.finfo(p.dtype).eps * (loc[0].abs() + steps.abs() @ slope.abs().T)
    curved = ((loc - loc[0] - steps @ slope.T).abs() > rounding + 1e-30).any()
    if curved or (scale - scale[0]).abs().max() > 1e-6 * scale[0].min():
        return None
    weight = torch.linalg.solve(factor.T, slope.T).T
    x = observed["value"].double().flatten(1)
    return LinearGaussian(mean, factor, weight, loc[0] - weight @ mean, scale[0] ** 2, x, p.dtype)


def _normal_moments(fn: dist.TorchDistribution) -> tuple[Tensor, Tensor] | None:
    """Mean and a factor of the covariance of a normal with one event dimension, the same for all data; or ``None``."""
    base = without_independent(fn)
    if len(fn.event_shape) != 1 or not isinstance(base, dist.Normal | dist.MultivariateNormal):
        return None
    scale = base.scale if isinstance(base, dist.Normal) else base.scale_tril
    if (base.loc != base.loc[:1]).any() or (scale != scale[:1]).any():
        return None
    return base.loc[0].double(), torch.diag(scale[0].double()) if isinstance(base, dist.Normal) else scale[0].double()
