"""A VAE on scikit-learn's digits, drawn by ArviZ: q(z|x) of twelve held-out images."""

import warnings

import matplotlib.pyplot as plt
import torch

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, priors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ArviZ 0.23 announces version 1, and lags behind matplotlib
    import arviz as az

    torch.manual_seed(0)
    network = networks.mlp([64], activation=torch.nn.Tanh)
    vae = pv.VAE(
        prior=priors.StandardNormal(2),
        encoder=guides.DiagonalNormal(64, 2, network),
        decoder=likelihoods.Bernoulli(2, 64, network),
    )
    train, test = datasets.digits("train"), datasets.digits("test")
    pv.fit(vae.model, vae.guide, datasets.binarize(train.x), epochs=60, batch_size=100, lr=5e-3, seed=0)

    chosen = torch.cat([(test.labels == label).nonzero()[:3, 0] for label in (0, 4, 1, 9)])
    names = [f"image {index}, a {test.labels[index]}" for index in chosen]
    x = datasets.binarize(test.x[chosen])
    tree = pv.to_datatree(
        vae.model, vae.guide, x, draws=2000, parallel=True, dims={"x": ["pixel"]}, coords={"obs": names}
    )
    data = pv.to_arviz(tree)
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 4), layout="constrained")
    for latent, ax in enumerate(axes):
        one = {"latent": [latent]}
        az.plot_forest(
            data, var_names=["z"], coords=one, combined=True, ax=ax, textsize=9, labeller=az.labels.NoVarLabeller()
        )
        ax.set_title(f"$z_{latent + 1}$", fontsize=11)
        ax.set_xlim(-3, 3)
        ax.axvline(0, color="0.6", linestyle=":")
    axes[1].set_yticks([])
    figure.supxlabel("value of z: interval of 94 % of q(z|x), quartiles, median", fontsize=10)
