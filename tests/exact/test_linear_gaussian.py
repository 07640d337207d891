"""Linear Gaussian models against closed forms: pPCA (Tipping and Bishop 1999), factor analysis, and similar models."""

import math

import pyro.distributions as dist
import pytest
import torch
from pairs import model_of
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from sklearn.decomposition import FactorAnalysis
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn.functional import relu

import pyro_vae as pv
from pyro_vae import exact, guides, likelihoods, networks, priors, schedules
from pyro_vae.exact import inference
from pyro_vae.exact.linear_gaussian import linear_gaussian
from pyro_vae.exact.model_density import ModelDensity
from pyro_vae.model_guide import ModelGuide

LATENT = 4


def digits():
    return pv.datasets.digits().x


class Spectrum:
    """The optimum of pPCA, from the eigenvalues of the (1/N) covariance."""

    def __init__(self, x, latent=LATENT):
        self.mean = x.double().mean(0)
        centred, size = x.double() - self.mean, x.shape[1]
        values, vectors = (part.flip(-1) for part in torch.linalg.eigh(centred.T @ centred / len(x)))
        self.noise = values[latent:].mean()
        self.weight = vectors[:, :latent] * (values[:latent] - self.noise).sqrt()
        log_det = values[:latent].log().sum() + (size - latent) * self.noise.log()
        self.log_p = float(-0.5 * (size * math.log(2 * math.pi) + log_det + size))  # its mean, in nats per datum

    def set_decoder(self, decoder, weight):
        """Set the parameters of a linear decoder to this optimum, with a rotation of ``self.weight``."""
        with torch.no_grad():
            decoder.network.weight.copy_(weight)
            decoder.network.bias.copy_(self.mean)
            decoder.family.log_scale.copy_((self.noise.sqrt() - decoder.family.min_scale).log())


def ppca_vae(x, latent, scale="shared"):
    """A linear Gaussian VAE at the optimum of pPCA, and its mean log p(x)."""
    spectrum = Spectrum(x, latent)
    decoder = likelihoods.Normal(latent, x.shape[1], networks.linear(), scale=scale, min_scale=0.0)
    vae = pv.VAE(priors.StandardNormal(latent), guides.DiagonalNormal(x.shape[1], latent, networks.linear()), decoder)
    vae = vae.to(x.dtype)
    spectrum.set_decoder(decoder, spectrum.weight)
    return vae, spectrum.log_p


@pytest.mark.parametrize("latent", [1, 2, 10])
def test_a_linear_gaussian_model_at_the_ppca_optimum_has_the_ppca_evidence(latent):
    x = pv.datasets.digits("train").x.double()
    vae, expected = ppca_vae(x, latent)
    assert abs(exact.log_evidence(vae.model, x).mean() - expected) < 1e-8
    assert abs(exact.log_evidence(vae.float().model, x.float()).mean() - expected) < 1e-4


def test_factor_analysis_agrees_with_scikit_learn():
    x = pv.datasets.digits("train").x.double()[:, 2:6]
    analysis = FactorAnalysis(2, random_state=0).fit(x.numpy())
    vae, _ = ppca_vae(x, 2, scale="per_dimension")
    with torch.no_grad():
        vae.decoder.network.weight.copy_(torch.from_numpy(analysis.components_.T))
        vae.decoder.network.bias.copy_(torch.from_numpy(analysis.mean_))
        vae.decoder.family.log_scale.copy_(0.5 * torch.from_numpy(analysis.noise_variance_).log())
    expected = torch.from_numpy(analysis.score_samples(x.numpy()))
    assert torch.allclose(exact.log_evidence(vae.model, x), expected, atol=1e-8)
    posterior = exact.posterior(vae.model, x)
    assert torch.allclose(posterior.mean, torch.from_numpy(analysis.transform(x.numpy())), atol=1e-8)


@pytest.mark.parametrize("latent", [1, 2])
def test_quadrature_and_the_closed_form_agree_on_a_linear_model(latent):
    x = pv.datasets.digits("train").x[:50, 2:6].double()
    vae, _ = ppca_vae(x, latent)
    p = ModelDensity(ModelGuide(vae.model, None, x))
    with torch.no_grad():
        evidence, rule = inference._integrated_evidence(p, 1e-6)
    assert torch.allclose(evidence, exact.log_evidence(vae.model, x), atol=1e-6)
    closed, integrated = exact.posterior(vae.model, x), exact.Posterior(p, evidence, [(p, rule)])
    z = torch.randn(7, 50, latent, dtype=torch.float64)
    assert torch.allclose(closed.log_prob(z), integrated.log_prob(z), atol=1e-6)
    assert torch.allclose(closed.mean, integrated.mean, atol=1e-5)
    draws = integrated.sample(torch.Size([1000]))
    standardized = (draws - closed.mean) / closed.variance.sqrt()
    assert (standardized.mean(0).abs() < 5.5 / 1000**0.5).all()
    assert (standardized.var(0) - 1).abs().max() < 5.5 * (2 / 1000) ** 0.5


def linear_vae(encoder):
    torch.manual_seed(0)
    return pv.VAE(priors.StandardNormal(LATENT), encoder, likelihoods.Normal(LATENT, 64, networks.linear()))


def standardized_encoder(x):
    return guides.DiagonalNormal(64, LATENT, networks.standardized(networks.linear(), x.mean(0)))


@pytest.mark.slow
def test_training_reaches_the_optimum_and_leaves_no_gap():
    """ELBO = log p(x) = the closed form, within 0.02 nats per datum."""
    x, steps = digits(), 3000
    vae = linear_vae(standardized_encoder(x))
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
    """W and the noise at a rotated solution of pPCA, which has the same likelihood as the one along the axes.

    The posterior's precision and the KL of the best diagonal guide come with it.
    """
    spectrum, vae = Spectrum(x), linear_vae(encoder).double()
    weight = spectrum.weight @ rotation
    spectrum.set_decoder(vae.decoder, weight)
    vae.decoder.requires_grad_(False)
    precision = weight.T @ weight / spectrum.noise + torch.eye(LATENT).double()
    return vae, spectrum, precision, float(0.5 * (precision.diagonal().log().sum() - precision.logdet()))


def gap_to_posterior(vae, x):
    """The mean of KL(q(z | x) || p(z | x)) over the data."""
    q = vae.encode(x)
    full = q if isinstance(q, MultivariateNormal) else MultivariateNormal(q.mean, q.variance.diag_embed())
    return kl_divergence(full, pv.exact.posterior(vae.model, x)).mean()


@pytest.mark.parametrize("kind", ["diagonal", "full rank"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_rotated_solution_has_a_mean_field_gap_for_a_diagonal_guide_alone(kind, turned):
    x = digits().double()
    rotation = rotated() if turned else torch.eye(LATENT).double()
    part = guides.DiagonalNormal if kind == "diagonal" else guides.FullRankNormal
    vae, spectrum, precision, mean_field = frozen_vae(part(64, LATENT, networks.linear()), rotation, x)
    covariance = torch.linalg.inv(precision)
    covariance_root = torch.linalg.cholesky(covariance)
    with torch.no_grad():  # the best guide of its family: the posterior's mean, and its precisions or its covariance
        linear = vae.encoder.network
        linear.weight.zero_()
        linear.bias.zero_()
        linear.weight[:LATENT] = covariance @ vae.decoder.network.weight.T / spectrum.noise
        linear.bias[:LATENT] = -linear.weight[:LATENT] @ spectrum.mean
        if kind == "diagonal":
            linear.bias[LATENT:] = -0.5 * precision.diagonal().log()
        else:
            rows, columns = torch.tril_indices(LATENT, LATENT, offset=-1)
            linear.bias[LATENT : 2 * LATENT] = covariance_root.diagonal().log()
            correlations = (covariance_root / covariance_root.diagonal()[:, None])[rows, columns]
            linear.bias[2 * LATENT :] = correlations / min(1, 3 / LATENT)
    log_p = pv.exact.log_evidence(vae.model, x).mean()
    assert float(log_p) == pytest.approx(spectrum.log_p, abs=1e-6)
    gap, expected = gap_to_posterior(vae, x), mean_field if kind == "diagonal" else 0.0
    assert gap.item() == pytest.approx(expected, abs=1e-6)
    assert (expected > 0.03) == (turned and kind == "diagonal")
    # The gradient of the exact ELBO is zero.
    slopes = torch.autograd.grad(gap, list(vae.encoder.parameters()))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-6


def test_a_trained_diagonal_guide_ends_at_the_mean_field_gap():
    x = digits().double()[:300]
    vae, _, _, mean_field = frozen_vae(standardized_encoder(x), rotated(), x)
    elbo = TraceMeanField_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    for steps, lr in ((600, 1e-2), (300, 1e-3)):
        pv.fit(vae.model, vae.guide, x, epochs=steps, lr=schedules.decayed(lr, steps), elbo=elbo)
    assert gap_to_posterior(vae, x).item() == pytest.approx(mean_field, abs=0.02)


WEIGHT = torch.tensor([[1.0, -0.5, 0.3], [0.4, 0.8, -1.0]], dtype=torch.float64)
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


def linear(prior, likelihood=lambda loc: dist.Normal(loc, 0.5).to_event(1)):
    return model_of(prior, lambda z: likelihood(z @ WEIGHT))


def monte_carlo(model, draws=400_000):
    """log p(x) and its standard error by naive Monte Carlo, with the densities of the model."""
    trace = poutine.trace(model).get_trace(X)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z = trace.nodes["z"]["fn"].sample(torch.Size([draws]))
    conditioned = poutine.trace(poutine.condition(model, {"z": z})).get_trace(X)
    conditioned.compute_log_prob()
    weights = conditioned.nodes["x"]["log_prob"].exp()
    return weights.mean(0).log(), weights.std(0) / weights.mean(0) / draws**0.5


STANDARD, MASK = dist.Normal(zeros(2), 1.0).to_event(1), torch.tensor([True, True, False])
SCALES = torch.tensor([0.2, 0.5, 1.0, 1.5, 2.0, 0.1], dtype=torch.float64)
SIMILAR = {
    "a mask on columns": linear(STANDARD, lambda loc: dist.Normal(loc, 0.5).mask(MASK).to_event(1)),
    "a shifted prior": linear(dist.Normal(zeros(2) + 1, 2.0).to_event(1)),
    "a prior for each datum": linear(dist.Normal(zeros(2), SCALES[:, None]).to_event(1)),
    "a full covariance": linear(dist.MultivariateNormal(zeros(2), torch.tensor([[1.0, 0.6], [0.6, 2.0]]).double())),
    "a prior with all rows written out": linear(dist.Normal(zeros(6, 2), 1.0).to_event(1)),
}


@pytest.mark.parametrize("name", SIMILAR)
def test_models_similar_to_linear_gaussian_ones_have_the_right_evidence(name):
    model = SIMILAR[name]
    expected, error = monte_carlo(model)
    assert (error < 0.2).all()
    assert ((exact.log_evidence(model, X) - expected).abs() < 5 * error + 1e-4).all()


def test_a_transformed_likelihood_is_not_treated_as_normal():
    def likelihood(loc):
        return dist.LogNormal(loc, 0.5).to_event(1)

    model = model_of(dist.Normal(zeros(1), 1.0).to_event(1), lambda z: likelihood(z * WEIGHT[0]))
    x = X.exp()
    z = torch.linspace(-10, 10, 20_001, dtype=torch.float64)[:, None, None]
    log_joint = dist.Normal(0.0, 1.0).log_prob(z[..., 0]) + likelihood(z * WEIGHT[0]).log_prob(x)
    expected = log_joint.logsumexp(0) + math.log(20 / 20_000)
    assert torch.allclose(exact.log_evidence(model, x), expected, atol=1e-4)


def test_linearity_is_tested_where_the_prior_has_mass():
    model = model_of(dist.Normal(zeros(1) + 50, 1.0).to_event(1), lambda z: dist.Normal(relu(z - 20), 1.0).to_event(1))
    x = torch.tensor([[30.0], [29.0]], dtype=torch.float64)
    expected = dist.Normal(30.0, 2**0.5).log_prob(x[:, 0])
    assert torch.allclose(exact.log_evidence(model, x), expected, atol=1e-6)
    assert torch.allclose(exact.log_evidence(model, x[:1]), expected[:1], atol=1e-6)


def test_a_sharp_linear_posterior_is_finite_in_float32():
    weight = torch.randn(2, 50)
    weight[1] = weight[0] + 1e-3 * torch.randn(50)
    model = model_of(dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda z: dist.Normal(z @ weight, 1e-3).to_event(1))
    x = torch.randn(3, 2) @ weight
    assert exact.posterior(model, x).log_prob(exact.posterior(model, x).mean).isfinite().all()


def test_a_linear_model_that_does_not_read_its_latent_has_the_density_of_its_noise():
    x, noise = torch.randn(5, 3), dist.Normal(torch.zeros(3), 1.5).to_event(1)
    model = model_of(dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda z: noise)
    torch.testing.assert_close(pv.exact.log_evidence(model, x), noise.log_prob(x))


def test_data_with_a_large_offset_keep_their_digits():
    weight, offset = torch.linspace(-1, 1, 20), 1e6 + torch.arange(20.0)
    model = model_of(
        dist.Normal(torch.zeros(1), 1.0).to_event(1), lambda z: dist.Normal(z * weight + offset, 0.5).to_event(1)
    )
    x = offset + 3 * torch.randn(4, 20)
    covariance = weight.outer(weight).double() + 0.25 * torch.eye(20)
    expected = MultivariateNormal(offset.double(), covariance).log_prob(x.double())
    torch.testing.assert_close(exact.log_evidence(model, x).double(), expected, rtol=1e-6, atol=0)


BENDS = {
    "smooth, below the digits of float32": lambda z: 1e6 + 1.2 * torch.tanh(2 * z) * torch.ones(200),
    "far out": lambda z: z + relu(z - 40),
    "in a corner": lambda z: z + 4 * relu(0.5 - (z + 0.6).abs()),
    "a clamp": lambda z: z.clamp(-50, 50),
}


@pytest.mark.parametrize("bend", BENDS.values(), ids=BENDS)
def test_a_mean_that_bends_anywhere_is_not_linear(bend):
    model = model_of(dist.Normal(torch.zeros(1), 1.0).to_event(1), lambda z: dist.Normal(bend(z), 0.5).to_event(1))
    x = bend(torch.randn(3, 1))
    assert linear_gaussian(ModelDensity(ModelGuide(model, None, x))) is None


def test_rows_that_depend_on_each_other_are_not_linear_gaussian():
    model = model_of(STANDARD, lambda z: dist.Normal((z + z.roll(1, -2)) @ WEIGHT, 0.5).to_event(1))
    p = ModelDensity(ModelGuide(linear(STANDARD), None, X))
    assert linear_gaussian(p) is not None
    p.model = model
    assert linear_gaussian(p) is None


@pytest.mark.parametrize("rank", [1, 2])
def test_scalar_data_of_a_vector_are_linear_gaussian(rank):
    """x = z_1 + z_2 + noise is N(0, 3), or with a prior of correlation 1/2, N(0, 4)."""
    tril = torch.linalg.cholesky(torch.tensor([[1.0, 0.5], [0.5, 1.0]])) if rank == 2 else torch.eye(2)
    prior = dist.MultivariateNormal(torch.zeros(2), scale_tril=tril)
    x = torch.tensor([0.0, 1.0])
    evidence = exact.log_evidence(model_of(prior, lambda z: dist.Normal(z.sum(-1), 1.0)), x)
    torch.testing.assert_close(evidence, dist.Normal(0.0, (2.0 + rank) ** 0.5).log_prob(x))
