"""A linear Gaussian VAE on the digits, held against the closed form of probabilistic PCA (Tipping and Bishop 1999)."""

import math

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors, schedules

LATENT = 4


def digits():
    return pv.datasets.digits().x


class Spectrum:
    """Eigenvalues and eigenvectors of the (1/N) covariance, largest first, and what follows from them."""

    def __init__(self, x):
        x = x.double()
        self.mean = x.mean(0)
        centred = x - self.mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
        self.values, self.vectors = values.flip(0), vectors.flip(1)
        self.noise = self.values[LATENT:].mean()
        self.weight = self.vectors[:, :LATENT] * (self.values[:LATENT] - self.noise).sqrt()

    @property
    def log_p(self):
        """The mean of log p(x) at the optimum, in nats per datum."""
        size = len(self.mean)
        logs = self.values[:LATENT].log().sum() + (size - LATENT) * self.noise.log()
        return float(-0.5 * (size * math.log(2 * math.pi) + logs + size))


def linear_vae(encoder):
    torch.manual_seed(0)
    return pv.VAE(priors.StandardNormal(LATENT), encoder, likelihoods.Normal(LATENT, 64, networks.linear()))


@pytest.mark.slow
def test_training_reaches_the_optimum_and_leaves_no_gap():
    """ELBO = log p(x) = the closed form, within 0.02 nats per datum."""
    x, steps = digits(), 3000
    encoder = guides.DiagonalNormal(64, LATENT, networks.standardized(networks.linear(), x.mean(0)))
    vae = linear_vae(encoder)
    with torch.no_grad():
        vae.decoder.network.bias.copy_(x.mean(0))
    elbo = TraceMeanField_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    pv.fit(vae.model, vae.guide, x, epochs=steps, lr=schedules.decayed(1e-2, steps), elbo=elbo)
    log_p = float(pv.exact.log_evidence(vae.model, x).mean())
    optimum = Spectrum(x).log_p
    bound = pv.evaluate(vae.model, vae.guide, x, elbo=TraceMeanField_ELBO(), num_samples=200)["elbo"]
    assert log_p == pytest.approx(optimum, abs=0.02)
    assert log_p <= optimum + 1e-3
    assert bound == pytest.approx(log_p, abs=0.02)


def rotated():
    """An orthogonal matrix that mixes all axes of the latent."""
    torch.manual_seed(3)
    return torch.linalg.qr(torch.randn(LATENT, LATENT).double())[0]


def frozen_vae(encoder, rotation, x):
    """W and the noise at a solution of pPCA, turned in the latent space: as likely as the one along the axes."""
    spectrum = Spectrum(x)
    vae = linear_vae(encoder).double()
    with torch.no_grad():
        vae.decoder.network.weight.copy_(spectrum.weight @ rotation)
        vae.decoder.network.bias.copy_(spectrum.mean)
        vae.decoder.family.log_scale.copy_((spectrum.noise.sqrt() - vae.decoder.family.min_scale).log())
    vae.decoder.requires_grad_(False)
    return vae, spectrum


@pytest.mark.parametrize("kind", ["diagonal", "full rank"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_diagonal_guide_keeps_the_mean_field_gap_of_a_rotated_solution_and_a_full_rank_one_none(kind, turned):
    x = digits().double()
    rotation = rotated() if turned else torch.eye(LATENT).double()
    part = guides.DiagonalNormal if kind == "diagonal" else guides.FullRankNormal
    vae, spectrum = frozen_vae(part(64, LATENT, networks.linear()), rotation, x)
    weight = spectrum.weight @ rotation
    precision = weight.T @ weight / spectrum.noise + torch.eye(LATENT).double()
    scale = torch.linalg.inv(precision)
    covariance_root = torch.linalg.cholesky(scale)
    with torch.no_grad():  # the best guide of its family: the posterior's mean, and its precisions or its covariance
        linear = vae.encoder.network
        linear.weight.zero_()
        linear.bias.zero_()
        linear.weight[:LATENT] = scale @ weight.T / spectrum.noise
        linear.bias[:LATENT] = -linear.weight[:LATENT] @ spectrum.mean
        if kind == "diagonal":
            linear.bias[LATENT:] = -0.5 * precision.diagonal().log()
        else:
            rows, columns = torch.tril_indices(LATENT, LATENT, offset=-1)
            linear.bias[LATENT : 2 * LATENT] = covariance_root.diagonal().log()
            linear.bias[2 * LATENT :] = covariance_root[rows, columns]
    log_p = pv.exact.log_evidence(vae.model, x).mean()
    assert float(log_p) == pytest.approx(spectrum.log_p, abs=1e-6)
    posterior = pv.exact.posterior(vae.model, x)
    q = vae.encode(x)
    full = q if kind == "full rank" else torch.distributions.MultivariateNormal(q.mean, q.variance.diag_embed())
    gap = torch.distributions.kl_divergence(full, posterior).mean()
    mean_field = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    expected = float(mean_field) if kind == "diagonal" else 0.0
    assert gap.item() == pytest.approx(expected, abs=1e-6)
    assert (expected > 0.03) == (turned and kind == "diagonal")
    # And training stays there: the gradient of the exact ELBO is zero.
    elbo = -torch.distributions.kl_divergence(full, posterior).mean()
    slopes = torch.autograd.grad(elbo, list(vae.encoder.parameters()))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-6


def test_a_trained_diagonal_guide_ends_at_the_mean_field_gap():
    x = digits().double()[:300]
    vae, spectrum = frozen_vae(
        guides.DiagonalNormal(64, LATENT, networks.standardized(networks.linear(), x.mean(0))), rotated(), x
    )
    elbo = TraceMeanField_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    for steps, lr in ((600, 1e-2), (300, 1e-3)):
        pv.fit(vae.model, vae.guide, x, epochs=steps, lr=schedules.decayed(lr, steps), elbo=elbo)
    weight = spectrum.weight @ rotated()
    precision = weight.T @ weight / spectrum.noise + torch.eye(LATENT).double()
    q, posterior = vae.encode(x), pv.exact.posterior(vae.model, x)
    full = torch.distributions.MultivariateNormal(q.mean, q.variance.diag_embed())
    gap = torch.distributions.kl_divergence(full, posterior).mean().item()
    mean_field = float(0.5 * (precision.diagonal().log().sum() - precision.logdet()))
    assert gap == pytest.approx(mean_field, abs=0.02)
