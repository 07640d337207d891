"""One small VAE of each kind of latent, for tests that need a pair and do not care which."""

import pyro
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors

NET = networks.mlp([4], nn.Tanh)


def gaussian(latent=2, features=3, **parts):
    """A standard normal prior and a diagonal normal guide; ``parts`` replace those of that role."""
    default = {
        "prior": priors.StandardNormal(latent),
        "encoder": guides.DiagonalNormal(features, latent, NET),
        "decoder": likelihoods.Normal(latent, features, NET),
    }
    return pv.VAE(**{**default, **parts})


def bernoulli(latent=2, features=3):
    """Binary latents with their exact sum over states."""
    return gaussian(latent, features, prior=priors.Bernoulli(latent), encoder=guides.Bernoulli(features, latent, NET))


def one_hot(latent=(2, 3), features=3):
    """Two latent classes of three values each."""
    parts = {"prior": priors.OneHotCategorical(latent), "encoder": guides.OneHotCategorical(features, latent, NET)}
    return gaussian(latent, features, **parts)


def relaxed(latent=2, features=3, temperature=0.5, straight_through=False):
    """Relaxed Bernoulli latents; ``.discrete()`` is their discrete twin."""
    prior = priors.RelaxedBernoulli(latent, temperature, straight_through=straight_through)
    return gaussian(latent, features, prior=prior, encoder=guides.RelaxedBernoulli(features, latent, NET, 0.66))


def gumbel(latent=(2, 3), features=3, temperature=0.5, straight_through=False):
    """Gumbel-softmax latents; ``.discrete()`` is their discrete twin."""
    prior = priors.GumbelSoftmax(latent, temperature, straight_through=straight_through)
    return gaussian(latent, features, prior=prior, encoder=guides.GumbelSoftmax(features, latent, NET, 0.66))


def record_traces(function, traces):
    """A model or guide that appends a trace of each run, with the effects of outer handlers, to a list."""

    def recording(*args):
        with poutine.trace() as tracer:
            result = function(*args)
        traces.append(tracer.trace)
        return result

    return recording


def model_of(prior, likelihood):
    """A Pyro model of local latents: z ~ ``prior``, x ~ ``likelihood(z)``."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", likelihood(z), obs=x)

    return model


def guide_of(q):
    """A Pyro guide of local latents: z ~ ``q(x)``."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x))

    return guide
