"""Data, and pairs of a user's own, for the tests of exports."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pairs import bernoulli, gaussian, guide_of, gumbel, model_of, one_hot, relaxed

N = 6
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(1))
SIGMAS = 5
VAES = {
    "gaussian": gaussian, "relaxed": partial(relaxed, straight_through=True), "gumbel": gumbel,
    "bernoulli": bernoulli, "one_hot": one_hot,
}  # fmt: skip


def on_data(vae):
    return vae.model, vae.guide, X


def shared_model(x):
    """A global latent and local ones."""
    mu = pyro.sample("mu", dist.Normal(1.0, 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def shared_guide(x):
    pyro.sample("mu", dist.Normal(pyro.param("mean", torch.tensor(0.7)), 0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x, 0.4))


SHARED = (shared_model, shared_guide, X[:, 0])


def local_pair(prior, q):
    """One latent of each datum, with this prior and ``q(x)``, and a normal likelihood around it."""
    return model_of(prior, lambda z: dist.Normal(z.float(), 1.0).to_event(len(prior.event_shape))), guide_of(q)


def two_plate_model(x):
    with pyro.plate("people", 2, dim=-2), pyro.plate("days", N, dim=-1):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)


def two_plate_guide(x):
    with pyro.plate("people", 2, dim=-2), pyro.plate("days", N, dim=-1):
        pyro.sample("z", dist.Normal(x, 0.1))


TWO_PLATES = (two_plate_model, two_plate_guide, X[:, :2].T)
