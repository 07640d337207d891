"""Item response theory (two parameters): crossed plates of students and items, abilities and difficulties unknown."""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from programs.by_hand import grid, moments, normal
from programs.program import Program

STUDENTS, ITEMS = 20, 2


def model(correct):
    students, items = pyro.plate("students", STUDENTS, dim=-2), pyro.plate("items", ITEMS, dim=-1)
    with items:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
        discrimination = pyro.sample("discrimination", dist.LogNormal(0.0, 0.5))
    with students:
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with students, items:
        pyro.sample("obs", dist.Bernoulli(logits=discrimination * (ability - difficulty)), obs=correct)


def guide(correct):
    positive = constraints.positive
    with pyro.plate("items", ITEMS, dim=-1):
        loc, scale = (
            pyro.param("d_loc", torch.zeros(ITEMS)),
            pyro.param("d_scale", torch.ones(ITEMS), constraint=positive),
        )
        pyro.sample("difficulty", dist.Normal(loc, scale))
        loc = pyro.param("a_loc", torch.zeros(ITEMS))
        scale = pyro.param("a_scale", 0.5 * torch.ones(ITEMS), constraint=positive)
        pyro.sample("discrimination", dist.LogNormal(loc, scale))
    with pyro.plate("students", STUDENTS, dim=-2):
        loc = pyro.param("t_loc", torch.zeros(STUDENTS, 1))
        scale = pyro.param("t_scale", torch.ones(STUDENTS, 1), constraint=positive)
        pyro.sample("ability", dist.Normal(loc, scale))


def make():
    logits = torch.randn(STUDENTS, 1) - torch.tensor([-0.5, 0.5])
    correct = torch.bernoulli(torch.sigmoid(logits))

    def integrate():
        axes = [
            torch.linspace(-4, 4, 17),
            torch.linspace(-4, 4, 17),
            torch.linspace(-4, 4, 17),
            torch.linspace(-4, 4, 17),
        ]
        (d1, d2, a1, a2), volume = grid(*axes)
        ability = torch.linspace(-5, 5, 21)
        difficulty, slope = torch.stack([d1, d2], -1), (0.5 * torch.stack([a1, a2], -1)).exp()
        patterns, counts = correct.unique(dim=0, return_counts=True)
        joint = sum(normal(value, 0.0, 1.0) for value in (d1, d2, a1, a2))
        logits = slope[:, None] * (ability[:, None] - difficulty[:, None])
        for pattern, count in zip(patterns, counts, strict=True):
            likelihood = dist.Bernoulli(logits=logits).log_prob(pattern).sum(-1) + normal(ability, 0.0, 1.0)
            joint = joint + count * (likelihood.logsumexp(-1) + torch.tensor(0.5).log())
        return moments(joint, volume, difficulty=difficulty, discrimination=slope)

    return Program(
        model,
        guide,
        (correct,),
        how="quadrature",
        lr=0.05,
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
    )
