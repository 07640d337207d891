"""Bias and noise of relaxed gradients as the temperature falls, on a trained VAE of eight bits."""

import matplotlib.pyplot as plt
import torch
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, objectives, priors
from pyro_vae.gradients import Estimator, compare

TEMPERATURES = [4.0, 2.0, 1.0, 0.5, 0.25, 0.125]

torch.manual_seed(0)
x = datasets.binarize(datasets.digits("train").x)
hard = pv.VAE(
    prior=priors.Bernoulli(8),
    encoder=guides.Bernoulli(64, 8, networks.mlp([16])),
    decoder=likelihoods.Bernoulli(8, 64, networks.mlp([16])),
)
pv.fit(hard.model, hard.guide, x, epochs=5, batch_size=100, lr=5e-3, elbo=objectives.LeaveOneOut(4), seed=0)


def relaxed(temperature, straight_through=False):
    """Make a relaxed VAE with the trained networks; its twin is the trained VAE at every temperature."""
    vae = pv.VAE(
        prior=priors.RelaxedBernoulli(8, temperature, straight_through=straight_through),
        encoder=guides.RelaxedBernoulli(64, 8, networks.mlp([16]), temperature),
        decoder=likelihoods.Bernoulli(8, 64, networks.mlp([16])),
    )
    weights = {name: value for name, value in hard.state_dict().items() if name in dict(hard.named_parameters())}
    vae.load_state_dict(weights, strict=False)
    return vae


def measured(vae, elbo):
    """Compare the gradient of the encoder with the exact one of the twin."""
    twin = vae.discrete()
    estimator = Estimator(vae.model, vae.guide, elbo, target=(twin.model, twin.guide))
    return compare({"one": estimator}, x[:20], repeats=250).measured["one"]["encoder"]


kinds = {
    "discrete KL": lambda temperature: (relaxed(temperature), objectives.DiscreteKL()),
    "discrete KL, straight-through": lambda temperature: (relaxed(temperature, True), objectives.DiscreteKL()),
    "relaxed KL": lambda temperature: (relaxed(temperature), Trace_ELBO()),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), sharex=True, layout="constrained")
for number, (name, make) in enumerate(kinds.items()):
    rows = [measured(*make(temperature)) for temperature in TEMPERATURES]
    bias = [row.bias / row.target_norm for row in rows]
    error = [row.bias_error / row.target_norm for row in rows]
    left.errorbar(TEMPERATURES, bias, error, capsize=3, label=name, **pv.plots.colours.style(number))
    noise = [row.variance**0.5 / row.target_norm for row in rows]
    right.plot(TEMPERATURES, noise, label=name, **pv.plots.colours.style(number))
pairs = Estimator(hard.model, hard.guide, objectives.DisARM(2))
row = compare({"pairs": pairs}, x[:20], repeats=250).measured["pairs"]["encoder"]
right.axhline(row.variance**0.5 / row.target_norm, color="0.4", linestyle="--", label="DisARM, without bias")
left.set(xscale="log", xlabel="temperature", ylabel="bias / |exact gradient|", ylim=(0, None))
right.set(xscale="log", xlabel="temperature", ylabel="noise / |exact gradient|", yscale="log")
right.legend()
left.invert_xaxis()
for ax in (left, right):
    ax.set_xticks(TEMPERATURES, [f"{temperature:g}" for temperature in TEMPERATURES])
    ax.minorticks_off()
