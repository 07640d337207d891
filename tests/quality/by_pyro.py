"""Plain Pyro: model and guide as in its tutorials, trained by ``pyro.infer.SVI``."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from inputs import Inputs
from plain_pyro import PlainVAE
from problems import Problem
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.optim import LambdaLR
from reports import Report, of_module
from torch import Tensor, nn


class Standardize(nn.Module):
    def __init__(self, loc: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs - self.loc) / self.scale


class StandardizedVAE(PlainVAE):
    """The VAE of the benchmarks with standardized inputs, and the discrete KL of relaxed codes in closed form."""

    def __init__(self, problem: Problem, given: Inputs):
        super().__init__(problem, given)
        fixed = {name: torch.from_numpy(value) for name, value in given.weights.items()}
        for part in ("encoder", "decoder"):
            if f"{part}.loc" in fixed:
                scale = fixed.get(f"{part}.scale", torch.ones(()))
                setattr(self, part, nn.Sequential(Standardize(fixed[f"{part}.loc"], scale), *getattr(self, part)))

        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the numbers that change from epoch to epoch."""
        self.kl_weight, self.temperature = self.case.kl_weight(epoch), self.case.temperature(epoch)

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=self.kl_weight):
                z = pyro.sample("z", self.prior(x))
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x)), poutine.scale(scale=self.kl_weight):
            pyro.sample("z", self.posterior(self.encoder(x)))

    def prior(self, like: Tensor) -> Any:
        prior = super().prior(like)
        return prior.mask(False) if self.case.guide == "gumbel" else prior

    def posterior(self, raw: Tensor) -> Any:
        if self.case.guide != "gumbel":
            return super().posterior(raw)
        logits = raw.reshape(len(raw), *self.case.latent)
        log_q = logits.log_softmax(-1)
        kl = (log_q.exp() * (log_q + math.log(self.case.latent[-1]))).sum((-2, -1))
        pyro.factor("kl", kl, has_rsample=True)
        relaxed = dist.RelaxedOneHotCategorical(raw.new_tensor(self.temperature), logits=logits)
        return relaxed.to_event(1).mask(False)


def program(problem: Problem, given: Inputs) -> tuple[StandardizedVAE, Any, Any, Any]:
    """Make a VAE, its model, guide and objective."""
    vae = StandardizedVAE(problem, given)
    if problem.guide == "bernoulli":
        return vae, vae.model, config_enumerate(vae.guide), TraceEnum_ELBO(max_plate_nesting=1)
    return vae, vae.model, vae.guide, Trace_ELBO() if problem.guide == "gumbel" else TraceMeanField_ELBO()


def train(problem: Problem, given: Inputs, report: Report, *, epochs: int, seed: int) -> None:
    """Train, and report after each epoch."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    vae, model, guide, elbo = program(problem, given)
    x = torch.from_numpy(given.x)[: problem.rows]
    rate = {"lr_lambda": lambda epoch: problem.rate(epoch) / problem.lr}
    scheduler = LambdaLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": problem.lr}, **rate})
    svi = SVI(model, guide, scheduler, elbo)
    steps, size = problem.steps_of_epoch, problem.batch_size
    for epoch in range(epochs):
        vae.set_epoch(epoch)
        rows = [slice(None)] * steps if problem.full_batch else torch.randperm(len(x)).split(size)
        for index in rows:
            svi.step(torch.bernoulli(x[index].float() / 255) if problem.binarized else x[index])
        scheduler.step()
        report(steps, lambda: of_module(given, vae))
