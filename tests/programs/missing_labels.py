"""Labels of which some are missing, by ``obs_mask``: the missing ones are latent, and the guide enumerates them."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import nn
from torch.distributions import constraints

from programs.by_hand import normal, parameter
from programs.program import Program


def model(x, y, labelled):
    share = pyro.param("share", torch.tensor(0.5), constraint=constraints.unit_interval)
    centres = pyro.param("centres", torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    with pyro.plate("rows", len(x)):
        y = pyro.sample("y", dist.Bernoulli(share), obs=y, obs_mask=labelled)
        pyro.sample("x", dist.Normal(centres[y.long()], 1.0).to_event(1), obs=x)


def make():
    truth = (torch.rand(50) < 0.4).float()
    x = torch.randn(50, 2) + 2 * truth[:, None] - 1
    labelled = torch.rand(50) < 0.3
    classifier = nn.Linear(2, 1)

    def guide(x, y, labelled):
        pyro.module("classifier", classifier)
        with pyro.plate("rows", len(x)):
            pyro.sample("y_unobserved", dist.Bernoulli(logits=classifier(x).squeeze(-1)).mask(~labelled))

    def by_hand():
        share, centres = parameter("share"), parameter("centres")
        joint = torch.stack([(1 - share).log(), share.log()])[:, None] + normal(x, centres[:, None], 1.0).sum(-1)
        return torch.where(labelled, joint.gather(0, truth.long()[None])[0], joint.logsumexp(0))

    return Program(
        model,
        config_enumerate(guide),
        (x, truth, labelled),
        elbo=TraceEnum_ELBO(max_plate_nesting=1),
        how="closed form",
        by_hand=by_hand,
    )
