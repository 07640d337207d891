"""Small VAEs, estimators by name, and the comparison of gradient estimates with their expectation."""

import torch
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.objectives import VIMCO, DisARM, LeaveOneOut, ScoreFunction
from pyro_vae.objectives.baselines import NeuralBaseline, RunningAverage

TANH = networks.mlp([4], activation=nn.Tanh)
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).double()
CALLS = 200
SCORES = 6.5  # for 200 calls: a failure probability of 1e-9 each, and there are fewer than 3000 numbers here
GRADIENTS = ["pathwise", "sticking-the-landing", "doubly-reparameterized"]


KINDS = {  # prior, guide, shape of the latent, and further arguments of both
    "bernoulli": (priors.Bernoulli, guides.Bernoulli, 3, [0.3], []),
    "one-hot": (priors.OneHotCategorical, guides.OneHotCategorical, (2, 3), [torch.tensor([0.2, 0.3, 0.5])], []),
    "relaxed": (priors.RelaxedBernoulli, guides.RelaxedBernoulli, 3, [0.5, 0.3], [0.66]),
    "gumbel": (priors.GumbelSoftmax, guides.GumbelSoftmax, (2, 3), [0.5, torch.tensor([0.2, 0.3, 0.5])], [0.66]),
    "normal": (priors.Normal, guides.DiagonalNormal, 1, [], []),
}


def vae_of(kind):
    """A small VAE in float64, far from symmetric. Prior, encoder and decoder are all trained."""
    torch.manual_seed(0)
    prior, guide, latent, arguments, others = KINDS[kind]
    options = {} if kind == "normal" else {"learnable": True}
    decoder = likelihoods.Normal(latent, 2, TANH, scale="shared")
    return pv.VAE(prior(latent, *arguments, **options), guide(2, latent, TANH, *others), decoder).double()


def normal_vae():
    """A VAE with a normal latent and random parameters."""
    vae = vae_of("normal")
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return vae


def enumerated(vae):
    """log q(z | x), log p(z) and log p(x | z) of every state, ``(S, N)``."""
    states = vae.prior().enumerate_support()[:, None]
    return vae.encode(X).log_prob(states), vae.prior().log_prob(states), vae.decode(states).log_prob(X)


def neural_baseline():
    torch.manual_seed(5)
    return ScoreFunction(NeuralBaseline(2, TANH).double())


ANY_DISCRETE = {
    "running average": lambda: ScoreFunction(RunningAverage()),
    "running average, 3 draws": lambda: ScoreFunction(RunningAverage(), num_particles=3),
    "neural": neural_baseline,
    "leave-one-out 2": lambda: LeaveOneOut(2),
    "leave-one-out 4": lambda: LeaveOneOut(4),
    "VIMCO 2": lambda: VIMCO(2),
    "VIMCO 3": lambda: VIMCO(3),
}
FOR_BERNOULLI = ANY_DISCRETE | {"DisARM 2": lambda: DisARM(2), "DisARM 4": lambda: DisARM(4)}
OF_ELBO = {name: make for name, make in FOR_BERNOULLI.items() if "VIMCO" not in name}
DISCRETE_CASES = [("bernoulli", name) for name in FOR_BERNOULLI] + [("one-hot", name) for name in ANY_DISCRETE]


def flat(values):
    return torch.cat([value.detach().flatten() for value in values])


def gradient(elbo, model, guide, data, parameters):
    """Minus the estimated gradient of the loss, per datum."""
    loss = elbo.differentiable_loss(model, guide, data)
    slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
    zeros = [torch.zeros_like(parameter) for parameter in parameters]
    return -flat(z if g is None else g for g, z in zip(slopes, zeros, strict=True)) / len(data)


def gradients(elbo, model, guide, data, parameters):
    """Estimates of 200 calls. Data occur many times in a call, each time with new draws."""
    return torch.stack([gradient(elbo, model, guide, data, parameters) for _ in range(CALLS)])


def standard_scores(estimates, expected):
    """Distance of the mean in standard errors, with room for the rounding of float64."""
    return (estimates.mean(0) - expected).abs() / (estimates.std(0) / len(estimates) ** 0.5 + 1e-10)


def assert_mean(estimates, expected, calls=CALLS):
    assert len(estimates) == calls
    assert (standard_scores(estimates, expected) < SCORES).all()
