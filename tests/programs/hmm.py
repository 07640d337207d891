"""A hidden Markov model of sequences of different lengths, as in Pyro's example: hidden states are enumerated."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch.distributions import constraints

from programs.by_hand import forward_algorithm, parameter
from programs.program import Program

HIDDEN, NOTES = 3, 4


def model(sequences, lengths):
    num_sequences, max_length, data_dim = sequences.shape
    probs_x = pyro.param("probs_x", 0.7 * torch.eye(HIDDEN) + 0.1, constraint=constraints.simplex)
    start_y = torch.linspace(0.2, 0.8, HIDDEN * NOTES).reshape(HIDDEN, NOTES)
    probs_y = pyro.param("probs_y", start_y, constraint=constraints.unit_interval)
    tones_plate = pyro.plate("tones", data_dim, dim=-1)
    with pyro.plate("sequences", num_sequences, dim=-2):
        x = 0
        for t in pyro.markov(range(max_length)):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"})
                with tones_plate:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequences[:, t])


def guide(sequences, lengths):
    pass


def make():
    lengths = torch.tensor([8, 5, 7, 3, 8, 6, 4, 8, 2, 8])
    sequences = (torch.rand(10, 8, NOTES) < torch.rand(10, 8, 1)).float()

    def by_hand():
        log_x, probs_y = parameter("probs_x").log(), parameter("probs_y")
        parts = []
        for sequence, length in zip(sequences, lengths, strict=True):
            emission = dist.Bernoulli(probs_y).log_prob(sequence[:length, None]).sum(-1)
            parts.append(forward_algorithm(log_x[0], log_x, emission))
        return torch.stack(parts)

    return Program(
        model,
        guide,
        (sequences, lengths),
        elbo=TraceEnum_ELBO(max_plate_nesting=2),
        steps=30,
        how="forward algorithm",
        by_hand=by_hand,
    )
