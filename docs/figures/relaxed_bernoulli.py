"""The density of a relaxed Bernoulli variable at four temperatures."""

import matplotlib.pyplot as plt
import torch

import pyro_vae as pv

TEMPERATURES = (0.2, 0.5, 1.0, 2.0)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
s = torch.linspace(0.002, 0.998, 997)
for ax, pi in zip(axes, (0.5, 0.8), strict=True):
    logit = torch.tensor(pi).logit()
    for index, temperature in enumerate(TEMPERATURES):
        y = pv.distributions.LogitRelaxedBernoulli(torch.tensor(temperature), logits=logit)
        density = y.log_prob(s.logit()).exp() / (s * (1 - s))  # of s = sigmoid(y)
        look = pv.plots.colours.style(index) | {"marker": ""}
        ax.plot(s, density, **look, label=f"λ = {temperature}")
    ax.set(title=f"twin: Bernoulli({pi})", xlabel="s = sigmoid(y), the input of the decoder", ylim=(0, 5))
axes[0].set_ylabel("density of s")
axes[0].legend(title="temperature", loc="upper center")
