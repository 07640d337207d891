"""Linear Gaussian models in closed form: factor analysis, and pPCA where the noise is one number."""

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.handlers import observed_sites
from pyro_vae.joint_density import Problem, base_distribution
from pyro_vae.randomness import seeded

__all__ = ["LinearGaussian", "linear_gaussian"]


@dataclass(frozen=True)
class LinearGaussian:
    """z ~ N(mean, factor factor'), x = weight z + bias + N(0, diag noise): all in float64."""

    mean: Tensor
    factor: Tensor
    weight: Tensor
    bias: Tensor
    noise: Tensor
    x: Tensor
    dtype: torch.dtype

    def log_evidence(self) -> Tensor:
        """log p(x) of each datum, from the normal that x is."""
        loc = self.bias + self.weight @ self.mean
        return dist.LowRankMultivariateNormal(loc, self.weight @ self.factor, self.noise).log_prob(self.x)

    def posterior(self) -> dist.TorchDistribution:
        """p(z | x) of each datum, a multivariate normal."""
        prior_precision = torch.cholesky_inverse(self.factor)
        scaled = self.weight.T / self.noise
        precision = prior_precision + scaled @ self.weight
        loc = torch.linalg.solve(precision, ((self.x - self.bias) @ scaled.T + prior_precision @ self.mean).T).T
        return dist.MultivariateNormal(loc.to(self.dtype), precision_matrix=precision.to(self.dtype))


def linear_gaussian(problem: Problem) -> LinearGaussian | None:
    """The model as a linear Gaussian one, if it is: tried on probes near and far, to rounding error."""
    if len(problem.latents) != 1 or len(problem.observed) != 1:
        return None
    (name, latent), (x_name, observed) = next(iter(problem.latents.items())), next(iter(problem.observed.items()))
    prior = _normal_moments(latent["fn"])
    if prior is None or not isinstance(base_distribution(observed["fn"]), dist.Normal) or observed["mask"] is not None:
        return None
    mean, factor = prior
    dims = len(mean)
    with seeded(0):
        far = 3 * torch.randn(16 + 2 * dims, dims, dtype=torch.float64)
    probes = torch.cat([torch.zeros(1, dims), torch.eye(dims), far]).to(mean)
    with poutine.block():
        trace = poutine.trace(
            poutine.condition(problem.model, data={name: probes[:, None].to(problem.dtype)})
        ).get_trace(*problem.data)
    likelihood = base_distribution(observed_sites(trace)[x_name]["fn"])
    if likelihood.loc.stride(1) or likelihood.scale.stride(1):
        return None  # it depends on the datum by more than z
    loc, scale = (moment[:, 0].double().flatten(1) for moment in (likelihood.loc, likelihood.scale))
    bias, weight = loc[0], (loc[1 : dims + 1] - loc[0]).T
    rounding = 64 * torch.finfo(problem.dtype).eps * (bias.abs() + probes.abs() @ weight.abs().T)
    if ((loc - bias - probes @ weight.T).abs() > rounding + 1e-30).any():
        return None
    if (scale - scale[0]).abs().max() > 1e-6 * scale[0].min():
        return None
    x = observed["value"].double().flatten(1)
    return LinearGaussian(mean, factor, weight, bias, scale[0] ** 2, x, problem.dtype)


def _normal_moments(fn: dist.TorchDistribution) -> tuple[Tensor, Tensor] | None:
    """Mean and a factor of the covariance of a normal of one event dimension that is the same for all data."""
    base = base_distribution(fn)
    if len(fn.event_shape) != 1 or not isinstance(base, dist.Normal | dist.MultivariateNormal):
        return None
    if base.loc.stride(0) and len(base.loc.shape) > 1:
        return None
    mean = base.loc.reshape(-1, *fn.event_shape)[0].double()
    if isinstance(base, dist.Normal):
        return mean, torch.diag(base.scale.reshape(-1, *fn.event_shape)[0].double())
    return mean, base.scale_tril.reshape(-1, *base.scale_tril.shape[-2:])[0].double()
