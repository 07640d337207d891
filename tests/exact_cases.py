"""Pairs with an exact answer: VAEs with every kind of latent, and a conjugate pair of normals."""

import math

import pyro.distributions as dist
import torch
from pairs import guide_of, model_of
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors

TANH = networks.mlp([8], activation=nn.Tanh)
KINDS = ["normal", "normal 2-D", "linear 8-D", "bernoulli", "one-hot", "relaxed", "gumbel"]


def vae_of(kind, features=3, scale=1.0):
    """A VAE with random parameters. ``" hard"`` after a relaxed kind rounds its latents in the decoder."""
    hard = {"straight_through": kind.endswith(" hard")}
    prior, encoder = {
        "normal": (priors.Normal(1), guides.DiagonalNormal(features, 1, TANH)),
        "normal 2-D": (priors.StandardNormal(2), guides.DiagonalNormal(features, 2, TANH)),
        "linear 8-D": (priors.StandardNormal(8), guides.DiagonalNormal(features, 8, TANH)),
        "bernoulli": (priors.Bernoulli(3, 0.3), guides.Bernoulli(features, 3, TANH)),
        "one-hot": (priors.OneHotCategorical((2, 3)), guides.OneHotCategorical(features, (2, 3), TANH)),
        "relaxed": (priors.RelaxedBernoulli(1, 0.5, 0.3, **hard), guides.RelaxedBernoulli(features, 1, TANH, 0.66)),
        "gumbel": (priors.GumbelSoftmax((1, 2), 0.5, **hard), guides.GumbelSoftmax(features, (1, 2), TANH, 0.66)),
    }[kind.removesuffix(" hard")]
    network = networks.linear() if kind.startswith("linear") else TANH
    torch.manual_seed(0)
    return pv.VAE(prior, encoder, likelihoods.Normal(tuple(prior().event_shape), features, network, scale=scale))


def conjugate(slope, scale):
    """z ~ N(0, 1), x ~ N(z, 1), and a guide N(slope x, scale^2). At 1/2 and 1/sqrt 2 it is the exact posterior."""
    model = model_of(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
    return model, guide_of(lambda x: dist.Normal(slope * x, scale))


def conjugate_evidence(x):
    """log N(x; 0, 2)."""
    return -(x**2) / 4 - 0.5 * math.log(4 * math.pi)
