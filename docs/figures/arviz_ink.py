"""Posterior predictive check of a statistic, the number of black pixels of a held-out image."""

import matplotlib.pyplot as plt
import numpy as np
import torch

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, priors

torch.manual_seed(0)
network = networks.mlp([64], activation=torch.nn.Tanh)
vae = pv.VAE(
    prior=priors.StandardNormal(2),
    encoder=guides.DiagonalNormal(64, 2, network),
    decoder=likelihoods.Bernoulli(2, 64, network),
)
train, test = datasets.digits("train"), datasets.digits("test")
pv.fit(vae.model, vae.guide, datasets.binarize(train.x), epochs=60, batch_size=100, lr=5e-3, seed=0)

x = datasets.binarize(test.x[:200])
tree = pv.to_datatree(vae.model, vae.guide, x, draws=500, parallel=True, dims={"x": ["pixel"]})
bins = np.arange(8.5, 31.5, 2)
figure, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
for group, style, label in (
    ("observed_data", {"color": "0.8"}, "200 held-out images"),
    ("prior_predictive", {"histtype": "step", "color": "black", "linestyle": "--"}, "drawn from p(x)"),
    (
        "posterior_predictive",
        {"histtype": "step", "color": pv.plots.colours.GUIDE},
        "drawn again from p(x|z), z from q(z|x)",
    ),
):
    ax.hist(tree[group]["x"].sum("pixel").values.ravel(), bins, density=True, label=label, **style)
ax.set(xlabel="black pixels of an image", ylabel="share of the images, per pixel")
pv.plots.axes.legend_below(ax)
