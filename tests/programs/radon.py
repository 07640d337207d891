"""A hierarchical regression: an intercept for each county, partially pooled (Gelman and Hill 2007, radon)."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

from programs.by_hand import grid, leave_one_out, moments, normal_leave_one_out
from programs.program import Program

COUNTIES = 6


def model(county, floor, log_radon):
    mu_a = pyro.sample("mu_a", dist.Normal(0.0, 2.0))
    sigma_a = pyro.sample("sigma_a", dist.HalfNormal(1.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 2.0))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("county", COUNTIES):
        a = pyro.sample("a", dist.Normal(mu_a, sigma_a))
    with pyro.plate("homes", len(log_radon)):
        pyro.sample("obs", dist.Normal(a[county] + beta * floor, sigma_y), obs=log_radon)


def make():
    county = torch.arange(36) % COUNTIES
    floor = (torch.rand(36) < 0.4).float()
    log_radon = 1.2 + 0.8 * torch.randn(COUNTIES)[county] - 0.6 * floor + 0.5 * torch.randn(36)

    def integrate():
        (sigma_a, sigma_y), volume = grid(torch.linspace(0.01, 5, 80), torch.linspace(0.2, 1.5, 40))
        same = (county[:, None] == county).float()

        def squared(sigma):
            return sigma[:, None, None] ** 2

        covariance = 4.0 + 4.0 * floor[:, None] * floor + squared(sigma_a) * same + squared(sigma_y) * torch.eye(36)
        likelihood = dist.MultivariateNormal(torch.zeros(36), covariance).log_prob(log_radon)
        prior = torch.distributions.HalfNormal(1.0)
        joint = prior.log_prob(sigma_a) + prior.log_prob(sigma_y) + likelihood
        others = normal_leave_one_out(torch.zeros(36), covariance, log_radon)
        return *moments(joint, volume, sigma_a=sigma_a, sigma_y=sigma_y), leave_one_out(joint, others)

    return Program(
        model,
        AutoMultivariateNormal(model),
        (county, floor, log_radon),
        how="quadrature and a closed form",
        steps=800,
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
        loo=lambda: integrate()[2],
    )
