"""A change point: two Poisson rates, and the year of the change enumerated in the model."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal

from programs.program import Program


@config_enumerate
def model(counts):
    early = pyro.sample("early", dist.Gamma(3.0, 1.0))
    late = pyro.sample("late", dist.Gamma(1.0, 1.0))
    years = torch.arange(len(counts))
    tau = pyro.sample("tau", dist.Categorical(torch.ones(len(counts)) / len(counts)))
    with pyro.plate("years", len(counts)):
        rate = torch.where(years < tau, early, late)
        pyro.sample("disasters", dist.Poisson(rate), obs=counts)


def make():
    counts = dist.Poisson(torch.cat([3.0 * torch.ones(12), torch.ones(13)])).sample()

    def parts():
        before = torch.arange(25)[:, None] > torch.arange(25)

        def conjugate(shape, rate, rows):
            """log p of the rows, and the posterior mean of the rate, for each tau."""
            total, number = (counts * rows).sum(-1), rows.sum(-1)
            a, b = shape + total, rate + number
            prior = shape * torch.tensor(rate).log() - torch.lgamma(torch.tensor(shape))
            return prior + torch.lgamma(a) - a * b.log() - (torch.lgamma(counts + 1) * rows).sum(-1), a / b

        (first, early), (second, late) = conjugate(3.0, 1.0, before), conjugate(1.0, 1.0, ~before)
        joint = first + second - torch.tensor(25.0).log()
        weights = joint.softmax(0)
        return joint.logsumexp(0), {"early": (weights * early).sum(), "late": (weights * late).sum()}

    guide = AutoNormal(poutine.block(model, hide=["tau"]))
    return Program(
        model,
        guide,
        (counts,),
        elbo=TraceEnum_ELBO(max_plate_nesting=1),
        how="closed form",
        by_hand=lambda: parts()[0],
        means=lambda: parts()[1],
    )
