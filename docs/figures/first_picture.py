"""Codes of handwritten digits: the first picture of the documentation."""

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors

digits, network = pv.datasets.digits("train"), networks.mlp([64])
x = pv.datasets.binarize(digits.x)  # (1500, 64), pixels 0 or 1
vae = pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(64, 2, network), likelihoods.Bernoulli(2, 64, network))
pv.fit(vae.model, vae.guide, x, epochs=60, batch_size=100, lr=3e-3, seed=0)
pv.plots.latent_map(vae.encode(x).mean.detach(), digits.labels)
