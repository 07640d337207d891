"""Capture and recapture of animals (Cormack, Jolly and Seber): states of animals are enumerated in the model."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal

from programs.by_hand import grid, moments
from programs.program import Program


def model(capture_history):
    animals, occasions = capture_history.shape
    phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))  # survival
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))  # recapture
    with pyro.plate("animals", animals, dim=-1):
        z = torch.ones(animals)
        first_capture_mask = torch.zeros(animals).bool()
        for t in pyro.markov(range(occasions)):
            with poutine.mask(mask=first_capture_mask):
                mu_z_t = first_capture_mask.float() * phi * z + (1 - first_capture_mask.float())
                z = pyro.sample(f"z_{t}", dist.Bernoulli(mu_z_t), infer={"enumerate": "parallel"})
                pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=capture_history[:, t])
            first_capture_mask = first_capture_mask | capture_history[:, t].bool()


def make():
    alive = torch.bernoulli(torch.full((40, 6), 0.8)).cumprod(1)
    capture_history = alive * torch.bernoulli(torch.full((40, 6), 0.6))

    def integrate():
        axis = torch.linspace(0.0025, 0.9975, 200)
        (phi, rho), volume = grid(axis, axis)
        joint = torch.zeros(())
        for history in capture_history:
            if not history.any():
                continue
            first, last = history.nonzero()[0].item(), history.nonzero()[-1].item()
            joint = joint + (last - first) * phi.log()
            for y in history[first + 1 : last + 1]:
                joint = joint + (rho if y else 1 - rho).log()
            never = torch.ones_like(phi)  # the probability of no capture after the last one
            for _ in range(last + 1, 6):
                never = 1 - phi + phi * (1 - rho) * never
            joint = joint + never.log()
        return moments(joint, volume, phi=phi, rho=rho)

    guide = AutoDiagonalNormal(poutine.block(model, expose=["phi", "rho"]))
    return Program(
        model,
        guide,
        (capture_history,),
        elbo=TraceEnum_ELBO(max_plate_nesting=1),
        how="quadrature",
        by_hand=lambda: integrate()[0],
        means=lambda: integrate()[1],
    )
