"""Plain Pyro: model and guide as in its tutorials, trained by ``pyro.infer.SVI``."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from cases import Case
from inputs import Inputs, Losses, Tick
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.importance import vectorized_importance_weights
from pyro.optim import Adam
from torch import Tensor, nn

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}


def network(case: Case, given: Inputs, part: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    activation = ACTIVATIONS[case.activation]
    for sizes in case.encoder if part == "encoder" else case.decoder:
        layers += [nn.Linear(*sizes), activation()]
    return copy_weights(given, part, nn.Sequential(*layers[:-1]))


@torch.no_grad()
def copy_weights(given: Inputs, part: str, module: Any) -> Any:
    """Copy the initial weights to the linear layers of an encoder or decoder, and return it."""
    for number, layer in enumerate(layer for layer in module.modules() if isinstance(layer, nn.Linear)):
        layer.weight.copy_(torch.from_numpy(given.weights[f"{part}.{number}.weight"]))
        layer.bias.copy_(torch.from_numpy(given.weights[f"{part}.{number}.bias"]))
    return module


class PlainVAE(nn.Module):
    """Two networks, a model and a guide, as in a tutorial."""

    def __init__(self, case: Case, given: Inputs):
        super().__init__()
        self.case = case
        self.encoder = network(case, given, "encoder")
        self.decoder = network(case, given, "decoder")
        if case.likelihood == "normal":
            self.log_scale = nn.Parameter(torch.zeros(()))
        if case.guide == "bernoulli":
            bits = torch.arange(2 ** case.latent[0])[:, None] >> torch.arange(case.latent[0])
            self.register_buffer("states", (bits & 1).float())

    def prior(self, like: Tensor) -> Any:
        if self.case.guide == "gumbel":
            cold = like.new_tensor(self.case.temperatures[0])
            return dist.RelaxedOneHotCategorical(cold, logits=like.new_zeros(self.case.latent)).to_event(1)
        if self.case.guide == "bernoulli":  # one number for all bits: Pyro does not enumerate them jointly
            return dist.Categorical(logits=like.new_zeros(len(self.states)))
        return dist.Normal(like.new_zeros(self.case.latent), 1.0).to_event(1)

    def likelihood(self, z: Tensor) -> Any:
        if self.case.guide == "bernoulli":
            z = self.states[z]
        elif self.case.guide == "gumbel":
            z = z.flatten(-2)
        raw = self.decoder(z)
        if self.case.likelihood == "normal":
            return dist.Normal(raw, self.log_scale.exp() + 1e-3).to_event(1)
        return dist.Bernoulli(logits=raw).to_event(1)

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x if x.is_floating_point() else x.float()))
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(self.encoder(x)))

    def posterior(self, raw: Tensor) -> Any:
        """Make q(z | x) from the raw outputs of the encoder."""
        if self.case.guide == "gumbel":
            warm = raw.new_tensor(self.case.temperatures[1])
            logits = raw.reshape(*raw.shape[:-1], *self.case.latent)
            return dist.RelaxedOneHotCategorical(warm, logits=logits).to_event(1)
        if self.case.guide == "bernoulli":  # the log-odds of a state are the sum over its bits that are 1
            return dist.Categorical(logits=raw @ self.states.T)
        loc, log_scale = raw.chunk(2, dim=-1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


def train(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> Losses:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    vae, x = PlainVAE(case, given), torch.from_numpy(given.x)[:rows]
    guide: Callable[..., Any] = vae.guide
    elbo: Any = Trace_ELBO()
    if case.guide == "bernoulli":
        guide, elbo = config_enumerate(vae.guide), TraceEnum_ELBO(max_plate_nesting=1)
    elif case.particles > 1:
        elbo = RenyiELBO(alpha=0, num_particles=case.particles, vectorize_particles=True, max_plate_nesting=1)
    svi, losses = SVI(vae.model, guide, Adam({"lr": case.lr}), elbo), []
    for _ in range(epochs):
        total = 0.0
        for index in [None] if case.full_batch else torch.randperm(rows).split(case.batch_size):
            batch = x if index is None else x[index]
            total += svi.step(torch.bernoulli(batch.float() / 255) if case.binarized else batch)
        losses.append(total / rows)
        tick(rows // case.batch_size)
    return {case.bound: losses}


@torch.no_grad()
def evaluate(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> Losses:
    """Estimate the mean log p(x) by Pyro's importance weights, 50 draws at a time to limit the memory."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    vae, x = PlainVAE(case, given), (torch.from_numpy(given.x[:rows]) > 127).float()
    chunk, found = min(case.particles, 50), []
    for _ in range(epochs):
        weights = torch.cat([_log_weights(vae, x, chunk) for _ in range(case.particles // chunk)])
        found.append(-float((weights.logsumexp(0) - torch.tensor(float(len(weights))).log()).mean()))
        tick(rows * len(weights))
    return {case.bound: found}


def _log_weights(vae: PlainVAE, x: Tensor, count: int) -> Tensor:
    """Compute log w of each draw and datum, ``(count, rows)``."""
    _, model, guide = vectorized_importance_weights(
        vae.model, vae.guide, x, num_samples=count, max_plate_nesting=1, normalized=False
    )
    terms = (model.nodes["x"], model.nodes["z"], guide.nodes["z"])
    likelihood, prior, proposal = (node["fn"].log_prob(node["value"]) for node in terms)
    return likelihood + prior - proposal


def export(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> Losses:
    """Draw the posterior and new data by ``Predictive``, as arrays; return the mean square of the draws of z."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    vae, x, found = PlainVAE(case, given), torch.from_numpy(given.x)[:rows], []
    for _ in range(epochs):
        z = Predictive(vae.guide, num_samples=case.particles, parallel=True)(x)["z"].detach()
        redrawn = Predictive(pyro.poutine.uncondition(vae.model), posterior_samples={"z": z}, parallel=True)
        arrays = {"z": z.numpy(), "x": redrawn(x)["x"].detach().numpy()}
        found.append(float((arrays["z"] ** 2).mean()))
        tick(case.particles)
    return {case.bound: found}
