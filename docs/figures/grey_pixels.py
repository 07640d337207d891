"""The constant that a cross-entropy on grey values leaves out, as a function of the decoder's probability."""

import matplotlib.pyplot as plt
import torch

import pyro_vae as pv

pi = torch.linspace(0.001, 0.999, 999)
constant = pv.distributions.ContinuousBernoulli(pi.logit()).log_normalizer

figure, ax = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
ax.plot(pi, constant, "-", color="black")
ax.set(xlabel="π, the decoder's output for a pixel", ylabel="log C, nats per pixel", ylim=(0, None))
