"""Three densities on the mixture problem: the truth, one full Gaussian, and the optimum of Jensen's bound."""

import matplotlib.pyplot as plt
import torch

import pyro_vae as pv

data = pv.datasets.two_gaussians(1000, seed=0)
test = pv.datasets.two_gaussians(10_000, seed=1).x
mean = data.x.mean(0)
full = torch.distributions.MultivariateNormal(mean, data.x.T.cov(correction=0))
diagonal = torch.distributions.Normal(mean, data.x.std(0, correction=0))
densities = {
    "the truth": data.log_prob,
    "one full Gaussian": full.log_prob,
    "Jensen's optimum:\none diagonal Gaussian": lambda x: diagonal.log_prob(x).sum(-1),
}

axis = torch.linspace(-3, 3, 241)
grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
figure, axes = plt.subplots(1, 3, figsize=(9, 3.9), sharex=True, sharey=True, layout="compressed")
for ax, (name, log_density) in zip(axes, densities.items(), strict=True):
    ax.scatter(*data.x[:300].T, s=4, color="0.35", linewidths=0)
    below_the_peak = log_density(grid) - log_density(grid).max()
    ax.contour(axis, axis, below_the_peak, levels=[-4.5, -2, -0.5], colors="black", linestyles=["dotted", "--", "-"])
    nats = float(log_density(test).mean())
    ax.set(title=f"{name}\n{nats:.2f} nats per point", xlabel="$x_1$", aspect="equal")
axes[0].set_ylabel("$x_2$")
