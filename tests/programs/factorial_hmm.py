"""A factorial hidden Markov model (Ghahramani and Jordan 1997): two hidden chains, one sequence of tones."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from torch.distributions import constraints

from programs.by_hand import forward_algorithm, parameter
from programs.program import Program

W, X = 2, 3


@config_enumerate
def model(sequence):
    probs_w = pyro.param("probs_w", 0.6 * torch.eye(W) + 0.2, constraint=constraints.simplex)
    probs_x = pyro.param("probs_x", 0.7 * torch.eye(X) + 0.1, constraint=constraints.simplex)
    start = torch.linspace(-2.0, 2.0, W * X * 3).reshape(W, X, 3)
    loc = pyro.param("loc", start)
    w, x = 0, 0
    tones = pyro.plate("tones", 3, dim=-1)
    for t in pyro.markov(range(len(sequence))):
        w = pyro.sample(f"w_{t}", dist.Categorical(probs_w[w]))
        x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]))
        with tones as tone:
            pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[w, x, tone], 1.0), obs=sequence[t])


def guide(sequence):
    pass


def make():
    sequence = torch.randn(12, 3) + torch.randint(-1, 2, (12, 1))

    def by_hand():
        log_w, log_x, loc = parameter("probs_w").log(), parameter("probs_x").log(), parameter("loc").reshape(W * X, 3)
        both = (log_w[:, None, :, None] + log_x[None, :, None, :]).reshape(W * X, W * X)  # from (w, x) to (w, x)
        emission = dist.Normal(loc, 1.0).log_prob(sequence[:, None]).sum(-1)
        return forward_algorithm(both[0], both, emission)

    return Program(
        model,
        guide,
        (sequence,),
        elbo=TraceEnum_ELBO(max_plate_nesting=1),
        steps=30,
        how="forward algorithm",
        by_hand=by_hand,
    )
