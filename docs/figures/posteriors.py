"""A fitted Gaussian q(z | x) on three exact posteriors: a Gaussian one, a skewed one and one with two modes."""

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, networks, priors


class Curve(nn.Module):
    """x ~ N(curve(z), 0.5), without parameters."""

    def __init__(self, curve):
        super().__init__()
        self.curve = curve

    def forward(self, z):
        """p(x | z)."""
        return dist.Normal(self.curve(z), 0.5).to_event(1)


CURVES = {
    "$x \\sim N(z, 0.5)$": (lambda z: z, 1.0),
    "$x \\sim N(e^z, 0.5)$": (torch.exp, 0.3),
    "$x \\sim N(z^2, 0.5)$": (torch.square, 1.5),
}

figure, axes = plt.subplots(1, 3, figsize=(10, 4), layout="constrained")
for ax, (name, (curve, datum)) in zip(axes, CURVES.items(), strict=True):
    torch.manual_seed(0)
    vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(1, 1, networks.mlp([32])), Curve(curve))
    pv.fit(vae.model, vae.guide, vae.generate(1000), epochs=1000, lr=1e-2, seed=0)
    x = torch.tensor([[datum]])
    pv.plots.posterior(vae.model, vae.guide, x, ax=ax)
    gap = float(pv.exact.kl(vae.model, vae.guide, x))
    ax.set(title=f"{name}, x = {datum}\nKL(q ‖ p(z|x)) = {gap:.2f} nats", xlabel="z")
    ax.get_legend().remove()  # one for all three stands below
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
