"""Bias and noise of the gradient estimators, for a trained VAE with eight bits and four runs of the decoder each."""

import matplotlib.pyplot as plt
import torch
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from pyro_vae import baselines, datasets, guides, likelihoods, networks, objectives, priors
from pyro_vae.gradients import Estimator, compare

torch.manual_seed(0)
x = datasets.binarize(datasets.digits("train").x)
relaxed = pv.VAE(
    prior=priors.RelaxedBernoulli(8, temperature=0.5),
    encoder=guides.RelaxedBernoulli(64, 8, networks.mlp([16]), temperature=0.66),
    decoder=likelihoods.Bernoulli(8, 64, networks.mlp([16])),
)
pv.fit(relaxed.model, relaxed.guide, x, epochs=20, batch_size=100, lr=5e-3, elbo=objectives.DiscreteKL(), seed=0)
twin = relaxed.discrete()


def sampled(elbo):
    """Make an estimator for the discrete model, with hard draws."""
    return Estimator(twin.model, twin.guide, elbo)


def soft(elbo):
    """Make an estimator for the relaxed model, compared with the gradient of its discrete twin."""
    return Estimator(relaxed.model, relaxed.guide, elbo, target=(twin.model, twin.guide))


estimators = {
    "score function": sampled(Trace_ELBO()),
    "running average": sampled(objectives.ScoreFunction(baselines.RunningAverage())),
    "leave-one-out, K = 2": sampled(objectives.LeaveOneOut(2)),
    "leave-one-out, K = 4": sampled(objectives.LeaveOneOut(4)),
    "DisARM": sampled(objectives.DisARM(2)),
    "relaxed KL": soft(Trace_ELBO()),
    "discrete KL": soft(objectives.DiscreteKL()),
}
comparison = compare(estimators, x[:20], evaluations=4, repeats=200)
figure, ax = plt.subplots(figsize=(8, 4.2), layout="constrained")
pv.plots.bias_variance(comparison, group="encoder", ax=ax)
ax.set_title("gradient of the encoder, four runs of the decoder each")
