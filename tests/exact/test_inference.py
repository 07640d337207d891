"""Exact answers against independent ones: scikit-learn, closed forms, sums by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from sklearn.decomposition import FactorAnalysis
from sklearn.mixture import GaussianMixture
from torch import nn

import pyro_vae as pv
from pyro_vae import exact, guides, likelihoods, networks, priors
from pyro_vae.exact import densities
from pyro_vae.exact.model_density import ModelDensity

TANH = networks.mlp([8], activation=nn.Tanh)


def vae_of(kind, decoder_features=2):
    """A VAE with random parameters that are large enough to matter."""
    latent = {"gumbel": (1, 2), "gumbel hard": (1, 2), "one-hot": (2, 3), "bernoulli": 3, "normal 2-D": 2}.get(kind, 1)
    prior, encoder = {
        "normal": (priors.Normal(1), guides.DiagonalNormal(2, 1, TANH)),
        "normal 2-D": (priors.StandardNormal(2), guides.DiagonalNormal(2, 2, TANH)),
        "relaxed": (priors.RelaxedBernoulli(1, 0.5, probs=0.3), guides.RelaxedBernoulli(2, 1, TANH, 0.66)),
        "relaxed hard": (
            priors.RelaxedBernoulli(1, 0.5, probs=0.3, straight_through=True),
            guides.RelaxedBernoulli(2, 1, TANH, 0.66),
        ),
        "gumbel": (priors.GumbelSoftmax((1, 2), 0.5), guides.GumbelSoftmax(2, (1, 2), TANH, 0.66)),
        "gumbel hard": (
            priors.GumbelSoftmax((1, 2), 0.5, straight_through=True),
            guides.GumbelSoftmax(2, (1, 2), TANH, 0.66),
        ),
        "bernoulli": (priors.Bernoulli(3, probs=0.3), guides.Bernoulli(2, 3, TANH)),
        "one-hot": (priors.OneHotCategorical((2, 3)), guides.OneHotCategorical(2, (2, 3), TANH)),
    }[kind]
    vae = pv.VAE(prior, encoder, likelihoods.Normal(latent, decoder_features, TANH, scale=0.4))
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(2.0)
    return vae


KINDS = ["normal", "normal 2-D", "relaxed", "relaxed hard", "gumbel", "gumbel hard", "bernoulli", "one-hot"]


@pytest.mark.parametrize("kind", KINDS)
def test_log_evidence_is_elbo_plus_kl_for_each_datum(kind):
    vae, x = vae_of(kind), torch.randn(20, 2)
    evidence = exact.log_evidence(vae.model, x)
    elbo, kl = exact.elbo(vae.model, vae.guide, x), exact.kl(vae.model, vae.guide, x)
    assert (kl > 0).all()
    assert (elbo < evidence).all()
    assert (evidence - elbo - kl).abs().max() < 3e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_elbo_is_what_monte_carlo_estimates(kind):
    vae, x = vae_of(kind), torch.randn(4, 2)
    with torch.no_grad():
        q = vae.encode(x)
        z = q.sample(torch.Size([20_000]))
        terms = vae.decode(z).log_prob(x) + vae.prior().log_prob(z) - q.log_prob(z)
    error = (terms.double().mean(0) - exact.elbo(vae.model, vae.guide, x)).abs()
    assert (error < 4.5 * terms.double().std(0) / 20_000**0.5 + 1e-4).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_evidence_is_what_naive_monte_carlo_estimates(kind):
    vae, x = vae_of(kind), 0.5 * torch.randn(4, 2)
    with torch.no_grad():
        z = vae.prior().sample(torch.Size([50_000]))[:, None]
        weights = vae.decode(z).log_prob(x).double().exp()
    error = (weights.mean(0) - exact.log_evidence(vae.model, x).exp()).abs()
    assert (error < 4.5 * weights.std(0) / 50_000**0.5).all()


@pytest.mark.parametrize("kind", ["relaxed hard", "gumbel hard"])
def test_a_relaxed_model_read_hard_has_the_evidence_of_its_twin(kind):
    vae, x = vae_of(kind), torch.randn(10, 2)
    twin = vae.discrete()
    assert torch.allclose(exact.log_evidence(vae.model, x), exact.log_evidence(twin.model, x), atol=1e-4)


def mixture_vae(weight, means, scales):
    vae = pv.VAE(
        priors.Bernoulli(1, probs=weight), guides.Bernoulli(2, 1, TANH),
        likelihoods.Normal(1, 2, networks.linear(), scale="per_dimension", min_scale=0.0),
    ).double()  # fmt: skip
    with torch.no_grad():
        vae.prior.raw.copy_(torch.logit(torch.tensor([weight], dtype=torch.float64)))
        vae.decoder.network.bias.copy_(means[0])
        vae.decoder.network.weight.copy_((means[1] - means[0])[:, None])
        vae.decoder.family.log_scale.copy_(scales.log())
    return vae


def test_enumeration_agrees_with_scikit_learns_gaussian_mixture():
    means = torch.tensor([[-1.0, -0.7], [0.8, 1.2]], dtype=torch.float64)
    scales = torch.tensor([0.3, 0.5], dtype=torch.float64)
    vae, x = mixture_vae(0.3, means, scales), torch.randn(500, 2, dtype=torch.float64)
    mixture = GaussianMixture(2, covariance_type="diag")
    mixture.weights_, mixture.means_ = torch.tensor([0.7, 0.3]).double().numpy(), means.numpy()
    mixture.covariances_ = (scales**2).expand(2, 2).numpy()
    mixture.precisions_cholesky_ = (1 / scales).expand(2, 2).numpy()
    expected = torch.from_numpy(mixture.score_samples(x.numpy()))
    assert (exact.log_evidence(vae.model, x) - expected).abs().max() < 1e-7
    assert (exact.log_evidence(vae.float().model, x.float()) - expected).abs().max() < 1e-5
    responsibilities = torch.from_numpy(mixture.predict_proba(x.numpy()))[:, 1]
    assert torch.allclose(exact.posterior(vae.double().model, x).probs[1], responsibilities, atol=1e-6)


def linear_vae(x, latent, scale="shared"):
    """A linear Gaussian VAE at the optimum of pPCA (Tipping and Bishop 1999), and the closed form of its evidence."""
    centre = x.mean(0)
    values, vectors = torch.linalg.eigh((x - centre).T @ (x - centre) / len(x))
    values, vectors = values.flip(0), vectors.flip(1)
    noise = values[latent:].mean()
    vae = pv.VAE(
        priors.StandardNormal(latent), guides.DiagonalNormal(x.shape[1], latent, TANH),
        likelihoods.Normal(latent, x.shape[1], networks.linear(), scale=scale, min_scale=0.0),
    ).to(x.dtype)  # fmt: skip
    with torch.no_grad():
        vae.decoder.network.weight.copy_(vectors[:, :latent] * (values[:latent] - noise).sqrt())
        vae.decoder.network.bias.copy_(centre)
        vae.decoder.family.log_scale.copy_(0.5 * noise.log())
    dims = x.shape[1]
    nll = 0.5 * (dims * math.log(2 * math.pi) + values[:latent].log().sum() + (dims - latent) * noise.log() + dims)
    return vae, -nll


@pytest.mark.parametrize("latent", [1, 2, 10])
def test_a_linear_gaussian_model_at_the_ppca_optimum_has_the_ppca_evidence(latent):
    x = pv.datasets.digits("train").x.double()
    vae, expected = linear_vae(x, latent)
    assert abs(exact.log_evidence(vae.model, x).mean() - expected) < 1e-8
    assert abs(exact.log_evidence(vae.float().model, x.float()).mean() - expected) < 1e-4


def test_factor_analysis_agrees_with_scikit_learn():
    x = pv.datasets.digits("train").x.double()[:, 2:6]
    analysis = FactorAnalysis(2, random_state=0).fit(x.numpy())
    vae, _ = linear_vae(x, 2, scale="per_dimension")
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
    vae, _ = linear_vae(x, latent)
    problem = ModelDensity(vae.model, (x,), "data")
    with torch.no_grad():
        evidence, rule = exact._integrated_evidence(problem, 1e-6)
    assert torch.allclose(evidence, exact.log_evidence(vae.model, x), atol=1e-6)
    closed, integrated = exact.posterior(vae.model, x), exact.Posterior(problem, evidence, rule)
    z = torch.randn(7, 50, latent, dtype=torch.float64)
    assert torch.allclose(closed.log_prob(z), integrated.log_prob(z), atol=1e-6)
    assert torch.allclose(closed.mean, integrated.mean, atol=1e-5)
    draws = integrated.sample(torch.Size([1000]))
    standardized = (draws - closed.mean) / closed.variance.sqrt()
    assert (standardized.mean(0).abs() < 5.5 / 1000**0.5).all()
    assert (standardized.var(0) - 1).abs().max() < 5.5 * (2 / 1000) ** 0.5


@pytest.mark.parametrize("kind", ["normal", "relaxed", "gumbel"])
def test_a_posterior_by_quadrature_is_normalised_and_its_samples_follow_it(kind):
    vae, x = vae_of(kind), torch.tensor([[0.3, -0.5]])
    posterior = exact.posterior(vae.model, x)
    chart = ModelDensity(vae.model, (x,), "data").chart()
    grid = torch.linspace(-80, 80, 200_001, dtype=torch.float64)
    log_prob = torch.cat([posterior.log_prob(chart.to_site(part[:, None, None])) for part in grid.split(20_000)])
    density = log_prob[:, 0].double().exp()
    cdf = torch.cumulative_trapezoid(density, grid)
    assert abs(cdf[-1] - 1) < 1e-4
    draws = chart.to_points(posterior.sample(torch.Size([4000]))).flatten().sort().values.double()
    reached = cdf[torch.searchsorted(grid, draws).clamp(1, len(cdf)) - 1]
    steps = torch.arange(1, 4001, dtype=torch.float64) / 4000
    assert (reached - steps).abs().max() < 2.4 / 4000**0.5 + 1e-3


def test_a_posterior_of_states_sums_to_one_and_its_samples_follow_it():
    vae, x = vae_of("one-hot"), torch.randn(3, 2)
    posterior = exact.posterior(vae.model, x)
    states = posterior.enumerate_support()
    assert torch.allclose(posterior.probs.sum(0), torch.ones(3))
    assert torch.allclose(posterior.probs, posterior.log_prob(states).exp(), atol=1e-6)
    assert torch.allclose(posterior.mean, (posterior.probs[..., None, None] * states).sum(0), atol=1e-6)
    draws = posterior.sample(torch.Size([5000]))
    found = (draws[:, None] == states[None]).all(-1).all(-1).double().mean(0)
    error = (posterior.probs * (1 - posterior.probs) / 5000).sqrt()
    assert ((found - posterior.probs).abs() < 5 * error + 1e-3).all()


def test_several_discrete_sites_are_summed_over_jointly():
    probs = torch.tensor([[0.7, 0.2], [0.4, 0.9]])

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.3))
            b = pyro.sample("b", dist.Categorical(torch.tensor([0.2, 0.8])))
            pyro.sample("x", dist.Bernoulli(probs[a.long(), b.long()]), obs=x)

    x = torch.tensor([0.0, 1.0])
    chance = float((torch.tensor([0.7, 0.3])[:, None] * torch.tensor([0.2, 0.8]) * probs).sum())
    expected = torch.tensor([1 - chance, chance]).log()
    assert torch.allclose(exact.log_evidence(model, x), expected)
    with pytest.raises(ValueError, match="of a single site"):
        exact.posterior(model, x)


def test_memory_is_bounded_by_chunks_that_do_not_change_the_answer(monkeypatch):
    vae = pv.VAE(priors.Bernoulli(10), guides.Bernoulli(2, 10, TANH), likelihoods.Normal(10, 2, TANH, scale=0.5))
    x = torch.randn(7, 2)
    whole, mean = exact.log_evidence(vae.model, x), exact.posterior(vae.model, x).mean
    shapes = []
    run = densities.log_joint

    def watched(model, values, data):
        result = run(model, values, data)
        shapes.append(result.shape)
        return result

    monkeypatch.setattr(densities, "_BUDGET", 7 * 64 * 50)
    monkeypatch.setattr(densities, "log_joint", watched)
    assert torch.allclose(exact.log_evidence(vae.model, x), whole, atol=1e-5)
    assert torch.allclose(exact.posterior(vae.model, x).mean, mean, atol=1e-5)
    assert max(shape[0] for shape in shapes) <= 50
    assert len(shapes) >= 2 * 1024 // 50


def test_a_datum_far_out_in_the_prior_is_still_integrated():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + 1e-3 * z**3, 0.1).to_event(1), obs=x)

    x = torch.tensor([[0.5], [20.0]], dtype=torch.float64)
    z = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    log_joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z + 1e-3 * z**3, 0.1).log_prob(x)
    expected = torch.trapezoid((log_joint - log_joint.amax(1, keepdim=True)).exp(), z).log() + log_joint.amax(1)
    assert torch.allclose(exact.log_evidence(model, x), expected, atol=1e-4)


def test_nothing_of_the_users_is_touched(random_states):
    vae, x = vae_of("normal"), torch.randn(5, 2)
    vae.model(x)
    before, parameters = random_states(), {name: value.clone() for name, value in vae.state_dict().items()}
    names = set(pyro.get_param_store().keys())
    exact.log_evidence(vae.model, x)
    exact.elbo(vae.model, vae.guide, x)
    exact.kl(vae.model, vae.guide, x)
    assert random_states() == before
    assert set(pyro.get_param_store().keys()) >= names
    assert all(torch.equal(value, parameters[name]) for name, value in vae.state_dict().items())


def refused(prior, encoder, decoder):
    return pv.VAE(prior, encoder, decoder).model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: refused(
                priors.Bernoulli(20), guides.Bernoulli(2, 20, TANH), likelihoods.Normal(20, 2, TANH)
            ),
            "1048576 states",
        ),
        (
            lambda: refused(
                priors.StandardNormal(3), guides.DiagonalNormal(2, 3, TANH), likelihoods.Normal(3, 2, TANH)
            ),
            "3 dimensions, and quadrature goes up to 2",
        ),
        (
            lambda: refused(
                priors.StandardNormal(1), guides.DiagonalNormal(2, 1, TANH),
                likelihoods.Bernoulli(1, 2, TANH, soft_targets=True),
            ),
            "not normalised",
        ),
    ],
)  # fmt: skip
def test_models_without_an_exact_answer_are_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        exact.log_evidence(make(), torch.rand(4, 2).round())


def cauchy(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Cauchy(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def global_latent(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def nothing_latent(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def subsampled(x):
    with pyro.plate("data", len(x), subsample_size=2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=pyro.subsample(x, event_dim=0))


def counts(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Poisson(3.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (cauchy, "without a finite mean and variance"),
        (global_latent, "site 'mean' is in the plates \\[\\]"),
        (nothing_latent, "needs latent and observed sites"),
        (subsampled, "subsampled or scaled"),
        (poutine.scale(global_latent, scale=0.5), "site 'mean'"),
        (counts, "discrete and has no enumerate_support"),
    ],
)
def test_structures_that_have_no_exact_answer_are_refused_with_the_reason(model, message):
    with pytest.raises(ValueError, match=message):
        exact.log_evidence(model, torch.randn(4))


def test_a_guide_of_other_latents_is_refused():
    vae = vae_of("normal")

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="are not those of the model"):
        exact.elbo(vae.model, guide, torch.randn(3, 2))


def test_a_comb_that_quadrature_cannot_resolve_raises_and_is_not_answered():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.sin(1e6 * z), 1e-3), obs=x)

    with pytest.raises(exact.QuadratureError, match="did not settle"):
        exact.log_evidence(model, torch.zeros(2))


def test_a_linear_model_that_does_not_read_its_latent_has_the_density_of_its_noise():
    x = torch.randn(5, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.5).to_event(1), obs=x)

    torch.testing.assert_close(pv.exact.log_evidence(model, x), dist.Normal(0.0, 1.5).log_prob(x).sum(1))
