"""Crossed random effects: each row has a student and a lecturer, whose effects have variances of their own."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

from programs.by_hand import grid, leave_one_out, moments, normal_leave_one_out
from programs.program import Program

STUDENTS, LECTURERS = 5, 4


def model(student, lecturer, rating):
    tau_s = pyro.sample("tau_s", dist.LogNormal(-0.5, 0.5))
    tau_l = pyro.sample("tau_l", dist.LogNormal(-0.5, 0.5))
    mean = pyro.sample("mean", dist.Normal(3.0, 1.0))
    with pyro.plate("students", STUDENTS):
        s = pyro.sample("s", dist.Normal(0.0, tau_s))
    with pyro.plate("lecturers", LECTURERS):
        lec = pyro.sample("l", dist.Normal(0.0, tau_l))
    with pyro.plate("ratings", len(rating)) as rows:
        pyro.sample("obs", dist.Normal(mean + s[student[rows]] + lec[lecturer[rows]], 0.5), obs=rating[rows])


def make():
    student, lecturer = torch.arange(40) % STUDENTS, torch.arange(40) // 2 % LECTURERS
    rating = 3 + 0.7 * torch.randn(STUDENTS)[student] + 0.6 * torch.randn(LECTURERS)[lecturer] + 0.5 * torch.randn(40)

    def integrate():
        (tau_s, tau_l), volume = grid(torch.linspace(-3, 2, 40), torch.linspace(-3, 2, 40))  # logarithms
        same_s, same_l = (student[:, None] == student).float(), (lecturer[:, None] == lecturer).float()

        def squared(log_tau):
            return (2 * log_tau).exp()[:, None, None]

        covariance = 1.0 + squared(tau_s) * same_s + squared(tau_l) * same_l + 0.25 * torch.eye(40)
        prior = dist.Normal(-0.5, 0.5).log_prob(tau_s) + dist.Normal(-0.5, 0.5).log_prob(tau_l)
        joint = prior + dist.MultivariateNormal(3.0 * torch.ones(40), covariance).log_prob(rating)
        others = normal_leave_one_out(3.0 * torch.ones(40), covariance, rating)
        return *moments(joint, volume, tau_s=tau_s.exp(), tau_l=tau_l.exp()), leave_one_out(joint, others)

    return Program(
        model,
        AutoMultivariateNormal(model),
        (student, lecturer, rating),
        steps=800,
        how="quadrature and a closed form",
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
        loo=lambda: integrate()[2],
    )
