"""NumPyro: SVI with an epoch in one ``lax.scan`` under ``jax.jit``."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from inputs import Inputs
from jax import Array
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from numpyro_scan import LogConcrete, ScanVAE, run_epoch
from problems import Problem
from reports import Report, fixed


class StandardizedVAE(ScanVAE):
    """The VAE of the benchmarks with standardized inputs, and the discrete KL of relaxed codes in closed form."""

    def network(self, part: str, inputs: Array) -> Array:
        loc, scale = (self.given.weights.get(f"{part}.{name}", else_) for name, else_ in (("loc", 0.0), ("scale", 1.0)))
        return super().network(part, (inputs - loc) / scale)

    def model(self, x: Array, kl_weight: Array, temperature: Array) -> None:
        with numpyro.plate("data", len(x)):
            if self.case.guide == "gumbel":
                prior = LogConcrete(self.case.temperatures[0], jnp.zeros(self.case.latent)).to_event(1)
                z = jnp.exp(numpyro.sample("z", prior.mask(False))).reshape(len(x), -1)
            else:
                with numpyro.handlers.scale(scale=kl_weight):
                    z = numpyro.sample("z", dist.Normal(jnp.zeros(self.case.latent), 1.0).to_event(1))
            numpyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Array, kl_weight: Array, temperature: Array) -> None:
        if self.case.guide != "gumbel":
            with numpyro.handlers.scale(scale=kl_weight):
                return super().guide(x)
        logits = self.network("encoder", x).reshape(len(x), *self.case.latent)
        log_q = jax.nn.log_softmax(logits)
        with numpyro.plate("data", len(x)):
            numpyro.factor("kl", (jnp.exp(log_q) * (log_q + math.log(logits.shape[-1]))).sum((-2, -1)))
            numpyro.sample("z", LogConcrete(temperature, logits).to_event(1).mask(False))


def program(problem: Problem, given: Inputs) -> SVI:
    """Make a VAE and its SVI, with the learning rate of each epoch."""
    vae = StandardizedVAE(problem, given)
    rates = jnp.asarray([problem.rate(epoch) for epoch in range(problem.epochs)])
    adam = numpyro.optim.Adam(lambda step: rates[jnp.minimum(step // problem.steps_of_epoch, len(rates) - 1)])
    if problem.guide == "bernoulli":
        return SVI(lambda x, *options: vae.enumerated(x), lambda x, *options: None, adam, Trace_ELBO())
    return SVI(vae.model, vae.guide, adam, Trace_ELBO() if problem.guide == "gumbel" else TraceMeanField_ELBO())


def options_of(problem: Problem, epoch: int) -> tuple[Array, Array]:
    """Return the numbers that change from epoch to epoch: the weight of the KL and the temperature."""
    return jnp.asarray(problem.kl_weight(epoch)), jnp.asarray(problem.temperature(epoch))


def train(problem: Problem, given: Inputs, report: Report, *, epochs: int, seed: int) -> None:
    """Train with one compiled call per epoch, and report after each."""
    svi, x, key = program(problem, given), jnp.asarray(given.x[: problem.rows]), jax.random.key(seed)
    state = svi.init(key, x[: problem.batch_size].astype(jnp.float32), *options_of(problem, 0))
    run = jax.jit(partial(run_epoch, svi, problem, full_batch_steps=problem.steps_of_epoch), donate_argnums=0)

    def weights() -> dict[str, np.ndarray]:
        return fixed(given) | {name: np.asarray(value) for name, value in svi.get_params(state).items()}

    for epoch in range(epochs):
        key, now = jax.random.split(key)
        state, losses = run(state, x, now, options=options_of(problem, epoch))
        losses.block_until_ready()
        report(len(losses), weights)
