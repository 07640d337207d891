"""A VAE on the mixture problem, trained with and without the KL term: its codes and generated points."""

import matplotlib.pyplot as plt
import torch

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.handlers import WeightKL

data = pv.datasets.two_gaussians(1000, seed=0)
figure, axes = plt.subplots(2, 2, figsize=(8, 6.6), layout="constrained")
for (codes, points), weight in zip(axes, (1.0, 0.0), strict=True):
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=priors.StandardNormal(1),
        encoder=guides.DiagonalNormal(2, 1, networks.mlp([32], activation=torch.nn.Tanh)),
        decoder=likelihoods.Normal(1, 2, networks.mlp([32], activation=torch.nn.Tanh)),
    )
    weighted = WeightKL(weight)
    pv.fit(weighted(vae.model), weighted(vae.guide), data.x, epochs=1000, lr=1e-2, seed=0)
    with torch.no_grad():
        z = vae.encode(data.x).sample()[:, 0]
    bins = torch.linspace(-4, 4, 81)
    share = 1 / (len(z) * float(bins[1] - bins[0]))  # so that both clusters together have area one, as the prior has
    for label in (0, 1):
        code = z[data.labels == label]
        codes.hist(
            code,
            bins.tolist(),
            weights=[share] * len(code),
            color=pv.plots.colours.PALETTE[label],
            label=f"codes of cluster {label}",
        )
    grid = torch.linspace(-4, 4, 200)
    codes.plot(grid, torch.distributions.Normal(0.0, 1.0).log_prob(grid).exp(), "--k", label="prior p(z)")
    codes.set(title=f"weight of the KL term: {weight:g}", ylabel="density", xlabel="z, one draw of q(z|x) per point")
    codes.set(ylim=(0, 1.6))
    points.scatter(
        *vae.generate(1000).T, s=6, marker="x", linewidths=0.6, color=pv.plots.colours.GUIDE, label="generated"
    )
    points.scatter(*data.x[:200].T, s=8, color="black", linewidths=0, label="data")
    nats = float(pv.exact.log_evidence(vae.model, data.x).mean())
    points.set(title=f"log p(x) = {nats:.2f} nats per point", xlabel="$x_1$", ylabel="$x_2$")
    points.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
axes[0, 0].legend(loc="upper left", fontsize=9)
axes[0, 1].legend(loc="upper left", fontsize=9)
