"""NumPyro: SVI with an epoch in one ``lax.scan`` under ``jax.jit``, and mini-batches drawn in JAX."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from cases import Case
from inputs import Inputs, Losses, Tick
from jax import Array, lax
from jax.scipy.special import gammaln, logsumexp
from numpyro.distributions import constraints
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO

jax.config.update("jax_platforms", "cpu")

STEPS = 500  # in one scan, if an epoch is one step on all data


class LogConcrete(dist.Distribution):
    """The logarithm of a relaxed one-hot variable, which NumPyro lacks."""

    support = constraints.real_vector
    reparametrized_params = ["logits"]

    def __init__(self, temperature: float, logits: Array):
        self.temperature, self.logits = temperature, logits
        super().__init__(logits.shape[:-1], logits.shape[-1:])

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        noise = jax.random.gumbel(key, sample_shape + self.logits.shape)
        return jax.nn.log_softmax((self.logits + noise) / self.temperature)

    def log_prob(self, value: Array) -> Array:
        """Compute the density with respect to the log-ratios to the last class."""
        classes = self.logits.shape[-1]
        score = jax.nn.log_softmax(self.logits - self.temperature * value).sum(-1)
        return score + gammaln(classes) + (classes - 1) * jnp.log(self.temperature)


class ScanVAE:
    def __init__(self, case: Case, given: Inputs):
        self.case, self.given = case, given
        if case.guide == "bernoulli":
            bits = jnp.arange(2 ** case.latent[0])[:, None] >> jnp.arange(case.latent[0])
            self.states = (bits & 1).astype(jnp.float32)

    def network(self, part: str, inputs: Array) -> Array:
        activation = {"tanh": jnp.tanh, "relu": jax.nn.relu, "silu": jax.nn.silu}[self.case.activation]
        for number in range(len(self.case.hidden) + 1):
            inputs = activation(inputs) if number else inputs
            names = f"{part}.{number}.weight", f"{part}.{number}.bias"
            weight, bias = (numpyro.param(name, jnp.asarray(self.given.weights[name])) for name in names)
            inputs = inputs @ weight.T + bias
        return inputs

    def likelihood(self, z: Array) -> dist.Distribution:
        raw = self.network("decoder", z)
        if self.case.likelihood == "normal":
            log_scale = numpyro.param("log_scale", jnp.asarray(self.given.weights["log_scale"]))
            return dist.Normal(raw, jnp.exp(log_scale) + 1e-3).to_event(1)
        return dist.Bernoulli(logits=raw).to_event(1)

    def model(self, x: Array) -> None:
        with numpyro.plate("data", len(x)):
            if self.case.guide == "gumbel":
                prior = LogConcrete(self.case.temperatures[0], jnp.zeros(self.case.latent)).to_event(1)
                z = jnp.exp(numpyro.sample("z", prior)).reshape(len(x), -1)
            else:
                z = numpyro.sample("z", dist.Normal(jnp.zeros(self.case.latent), 1.0).to_event(1))
            numpyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Array) -> None:
        raw = self.network("encoder", x)
        with numpyro.plate("data", len(x)):
            if self.case.guide == "gumbel":
                logits = raw.reshape(len(x), *self.case.latent)
                numpyro.sample("z", LogConcrete(self.case.temperatures[1], logits).to_event(1))
            else:
                loc, log_scale = jnp.split(raw, 2, axis=-1)
                numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    def enumerated(self, x: Array) -> None:
        """Add the ELBO of Bernoulli variables as a factor, summed by hand: NumPyro does not enumerate them jointly."""
        logits = self.network("encoder", x)
        on, off = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        log_guide = self.states @ on.T + (1 - self.states) @ off.T  # (states, rows)
        log_joint = self.likelihood(self.states[:, None]).log_prob(x) - self.case.latent[0] * jnp.log(2.0)
        numpyro.factor("elbo", (jnp.exp(log_guide) * (log_joint - log_guide)).sum())

    def svi(self) -> SVI:
        adam = numpyro.optim.Adam(self.case.lr)
        if self.case.guide == "bernoulli":
            return SVI(self.enumerated, lambda x: None, adam, Trace_ELBO())
        elbo = RenyiELBO(0, self.case.particles) if self.case.particles > 1 else Trace_ELBO()
        return SVI(self.model, self.guide, adam, elbo)


def run_epoch(
    svi: SVI, case: Case, state: Any, x: Array, key: Array, *, full_batch_steps: int = STEPS, options: Any = ()
) -> tuple[Any, Array]:
    """Run all steps of an epoch, or some epochs of full batches; return each loss, in nats per datum.

    Model and guide are called with the batch and the ``options``.
    """

    def step(state: Any, given: Any) -> tuple[Any, Array]:
        key, index = given
        batch = x if index is None else x[index]
        if case.binarized:
            batch = jax.random.bernoulli(key, batch.astype(jnp.float32) / 255).astype(jnp.float32)
        state, loss = svi.update(state, batch, *options)
        return state, loss / len(batch)

    order, noise = jax.random.split(key)
    index = None if case.full_batch else jax.random.permutation(order, len(x)).reshape(-1, case.batch_size)
    steps = full_batch_steps if index is None else len(index)
    return lax.scan(step, state, (jax.random.split(noise, steps), index))


def train(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> Losses:
    """Train with one compiled call per epoch."""
    svi, x, key = ScanVAE(case, given).svi(), jnp.asarray(given.x[:rows]), jax.random.key(seed)
    state = svi.init(key, x[: case.batch_size].astype(jnp.float32))
    run = jax.jit(partial(run_epoch, svi, case), donate_argnums=0)
    losses: list[float] = []
    while len(losses) < epochs:
        key, now = jax.random.split(key)
        state, found = run(state, x, now)
        found.block_until_ready()
        losses += found.tolist() if case.full_batch else [float(found.mean())]
        tick(len(found))
    return {case.bound: losses[:epochs]}


def evaluate(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> Losses:
    """Estimate the mean log p(x) by importance weighting, in one compiled call with a loop to limit the memory."""
    vae, chunk = ScanVAE(case, given), min(case.particles, 50)
    x = (jnp.asarray(given.x[:rows]) > 127).astype(jnp.float32)

    def log_weights(key: Array) -> Array:
        with numpyro.handlers.seed(rng_seed=key), numpyro.handlers.block():
            loc, log_scale = jnp.split(vae.network("encoder", x), 2, axis=-1)
            q = dist.Normal(loc, jnp.exp(log_scale)).to_event(1)
            z, prior = q.sample(key, (chunk,)), dist.Normal(jnp.zeros(case.latent), 1.0).to_event(1)
            return vae.likelihood(z).log_prob(x) + prior.log_prob(z) - q.log_prob(z)

    @jax.jit
    def evidence(key: Array) -> Array:
        parts = lax.map(log_weights, jax.random.split(key, case.particles // chunk))
        log_weight = parts.reshape(-1, rows)
        return (logsumexp(log_weight, axis=0) - jnp.log(len(log_weight))).mean()

    found = []
    for key in _keys(seed, epochs):
        found.append(-float(evidence(key)))
        tick(rows * chunk * (case.particles // chunk))
    return {case.bound: found}


def _keys(seed: int, count: int) -> Any:
    key = jax.random.key(seed)
    for _ in range(count):
        key, now = jax.random.split(key)
        yield now
