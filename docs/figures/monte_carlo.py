"""Error of log p(x) with samples from the prior and from a fitted q(z | x), in two and in six latent dimensions."""

import math

import matplotlib.pyplot as plt
import torch

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors

SIZES = [4**power for power in range(8)]


def linear_vae(latent):
    """Make a random linear decoder, and fit an encoder to it."""
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=priors.StandardNormal(latent),
        encoder=guides.DiagonalNormal(in_features=12, latent=latent, network=networks.linear()),
        decoder=likelihoods.Normal(latent, 12, networks.linear(), scale=0.3),
    )
    vae.decoder.requires_grad_(False)
    vae.decoder.network.weight.normal_(std=0.4)
    pv.fit(vae.model, vae.guide, vae.generate(1000), epochs=500, lr=2e-2, seed=0)  # trains the encoder
    return vae


@torch.no_grad()
def mean_error(vae, proposal, x, size, repeats=10):
    """Compute the error of K-sample estimates from the exact answer."""
    z = proposal.sample((repeats, size))
    log_weight = vae.decode(z).log_prob(x) + vae.prior().log_prob(z) - proposal.log_prob(z)
    estimate = log_weight.logsumexp(1) - math.log(size)
    return float((estimate - pv.exact.log_evidence(vae.model, x)).abs().mean())


figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
for ax, latent in zip(axes, (2, 6), strict=True):
    vae = linear_vae(latent)
    x = vae.generate(20)
    posterior = pv.exact.posterior(vae.model, x)
    standard = torch.distributions.MultivariateNormal(torch.zeros(latent), torch.eye(latent))
    information = float(torch.distributions.kl_divergence(posterior, standard).mean())
    q = vae.encode(x)
    from_prior = [mean_error(vae, vae.prior().expand([20]), x, size) for size in SIZES]
    ax.loglog(SIZES, from_prior, "o-", color="black", label="from the prior")
    from_q = [mean_error(vae, q, x, size) for size in SIZES]
    ax.loglog(SIZES, from_q, "s--", color=pv.plots.colours.GUIDE, label="from q(z|x)")
    ax.axvline(math.exp(information), color="0.5", linestyle=":", label="exp KL(p(z|x) ‖ p(z))")
    ax.set(title=f"{latent} latent dimensions, KL = {information:.1f} nats", xlabel="samples K")
axes[0].set_ylabel("mean |error| of log p(x), nats")
axes[0].legend()
