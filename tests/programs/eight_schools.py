"""Eight schools (Rubin 1981), with the effects of the schools in their non-centred form."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal

from programs.by_hand import leave_one_out, moments, normal_leave_one_out
from programs.program import Program

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0, 5))
    tau = pyro.sample("tau", dist.HalfCauchy(scale=torch.tensor(5.0)))
    with pyro.plate("J", len(sigma)):
        eta = pyro.sample("eta", dist.Normal(0, 1))
        theta = pyro.deterministic("theta", mu + tau * eta)
        return pyro.sample("obs", dist.Normal(theta, sigma), obs=y)


def make():
    def integrate():
        log_tau = torch.linspace(-9, 7, 2001)  # tau from 1e-4 to 1100
        tau = log_tau.exp()
        covariance = 25.0 + (SIGMA**2 + tau[:, None] ** 2).diag_embed()
        joint = dist.MultivariateNormal(torch.zeros(8), covariance).log_prob(Y) + dist.HalfCauchy(5.0).log_prob(tau)
        precision = torch.linalg.inv(covariance)
        mu = 25.0 * (precision @ Y).sum(-1)
        others = normal_leave_one_out(torch.zeros(8), covariance, Y)
        return *moments(joint + log_tau, (log_tau[1] - log_tau[0]).log(), mu=mu), leave_one_out(joint + log_tau, others)

    return Program(
        model,
        AutoDiagonalNormal(model),
        (SIGMA, Y),
        how="quadrature and a closed form",
        steps=600,
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
        loo=lambda: integrate()[2],
    )
