"""Conjugate latents in closed form, and quadrature of one or two latents with the others integrated inside."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import integrate, special, stats

from pyro_vae import exact
from pyro_vae.exact.collapsed import collapsed_density
from pyro_vae.model_guide import ModelGuide

DOUBLE = {"dtype": torch.float64}
ALPHA = torch.tensor([1.0, 2.0, 0.5], **DOUBLE)
EXPOSURE = torch.tensor([1.0, 2.0, 3.0], **DOUBLE)


def beta_bernoulli(x):
    p = pyro.sample("p", dist.Beta(torch.tensor(2.0, **DOUBLE), 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(p), obs=x)


def beta_binomial(x):
    with pyro.plate("data", len(x)):
        p = pyro.sample("p", dist.Beta(torch.tensor(2.0, **DOUBLE), 3.0))
        pyro.sample("x", dist.Binomial(10, p), obs=x)


def gamma_poisson(x):
    with pyro.plate("groups", 3):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0, **DOUBLE), 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate * EXPOSURE), obs=x)


def gamma_exponential(x):
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0, **DOUBLE), 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Exponential(3 * rate), obs=x)


def dirichlet_categorical(x):
    p = pyro.sample("p", dist.Dirichlet(ALPHA))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Categorical(p), obs=x)


def dirichlet_multinomial(x):
    with pyro.plate("data", len(x)):
        p = pyro.sample("p", dist.Dirichlet(ALPHA))
        pyro.sample("x", dist.Multinomial(7, p), obs=x)


def rows_of_tables(x):
    """Two vectors of probabilities, chosen by the row."""
    with pyro.plate("tables", 2):
        p = pyro.sample("p", dist.Dirichlet(ALPHA))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Categorical(p[torch.arange(len(x)) % 2]), obs=x)


BITS = torch.tensor([1.0, 0, 1, 1, 0, 1], **DOUBLE)
COUNTS = torch.tensor([[1.0, 4, 2], [0, 3, 9]], **DOUBLE)
TIMES = torch.tensor([0.3, 1.2, 0.1], **DOUBLE)
CLASSES = torch.tensor([0, 1, 2, 2, 0, 1, 1])


def sequential(x, alpha=ALPHA):
    """log p of classes one after the other, by the predictive probabilities of a Polya urn."""
    seen, total = alpha.clone(), 0.0
    for each in x:
        total += (seen[each] / seen.sum()).log()
        seen[each] += 1
    return total


def poisson_evidence(x, exposure):
    """By quadrature of scipy."""

    def density(rate):
        return stats.gamma(2, scale=2).pdf(rate) * stats.poisson(rate * exposure).pmf(x.numpy()).prod()

    return torch.tensor(integrate.quad(density, 0, 60, epsabs=0, epsrel=1e-10, points=(1, 3))[0], **DOUBLE).log()


CLOSED = {
    "Beta, Bernoulli": (beta_bernoulli, BITS, sequential(1 - BITS.long(), torch.tensor([2.0, 3.0], **DOUBLE))),
    "Beta, binomial": (beta_binomial, COUNTS[0], torch.tensor(stats.betabinom(10, 2, 3).logpmf(COUNTS[0]))),
    "Gamma, Poisson": (
        gamma_poisson, COUNTS, torch.stack([poisson_evidence(COUNTS[:, i], 1.0 + i) for i in range(3)])
    ),
    "Gamma, exponential": (
        gamma_exponential, TIMES,
        math.lgamma(5) - math.lgamma(2) + 2 * math.log(0.5) - 5 * (0.5 + 3 * TIMES.sum()).log() + 3 * math.log(3.0),
    ),
    "Dirichlet, categorical": (dirichlet_categorical, CLASSES, sequential(CLASSES)),
    "Dirichlet, multinomial": (
        dirichlet_multinomial, torch.tensor([[1.0, 2, 4], [0, 0, 7]], **DOUBLE),
        dist.DirichletMultinomial(ALPHA, 7).log_prob(torch.tensor([[1.0, 2, 4], [0, 0, 7]], **DOUBLE)),
    ),
    "rows of tables": (rows_of_tables, CLASSES, sequential(CLASSES[::2]) + sequential(CLASSES[1::2])),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED)
def test_conjugate_latents_have_the_evidence_of_their_closed_form(name):
    model, x, expected = CLOSED[name]
    assert collapsed_density(ModelGuide(model, None, x)).given == []
    torch.testing.assert_close(exact.log_evidence(model, x), expected, rtol=1e-7, atol=1e-7)


def test_conjugate_posteriors_and_their_kl_are_those_of_their_family():
    posterior = exact.posterior(gamma_poisson, COUNTS)
    torch.testing.assert_close(posterior.concentration, 2 + COUNTS.sum(0))
    torch.testing.assert_close(posterior.rate, 0.5 + 2 * EXPOSURE)
    torch.testing.assert_close(
        exact.posterior(dirichlet_categorical, CLASSES).concentration, ALPHA + torch.tensor([2, 3, 2])
    )

    def guide(x, shape=posterior.concentration):
        with pyro.plate("groups", 3):
            pyro.sample("rate", dist.Gamma(shape, posterior.rate))

    assert (exact.kl(gamma_poisson, guide, COUNTS).abs() < 1e-9).all()
    q = dist.Gamma(posterior.concentration + 1, posterior.rate)
    gap = exact.kl(gamma_poisson, lambda x: guide(x, posterior.concentration + 1), COUNTS)
    torch.testing.assert_close(gap, torch.distributions.kl_divergence(q, posterior))
    bound = exact.elbo(gamma_poisson, lambda x: guide(x, posterior.concentration + 1), COUNTS)
    torch.testing.assert_close(bound, exact.log_evidence(gamma_poisson, COUNTS) - gap)


def test_masked_data_count_nowhere():
    keep = torch.arange(len(BITS)) > 1
    masked = exact.log_evidence(poutine.mask(beta_bernoulli, mask=True), BITS)
    torch.testing.assert_close(masked, exact.log_evidence(beta_bernoulli, BITS))

    def model(x):
        p = pyro.sample("p", dist.Beta(torch.tensor(2.0, **DOUBLE), 3.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=keep):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    torch.testing.assert_close(exact.log_evidence(model, BITS), exact.log_evidence(beta_bernoulli, BITS[2:]))


def on_grid(log_joint, low, high, size=801):
    """The logarithm of an integral over two logarithms of positive latents, on a grid."""
    u = torch.linspace(low, high, size, **DOUBLE)
    a, b = torch.meshgrid(u.exp(), u.exp(), indexing="ij")
    return (log_joint(a, b) + a.log() + b.log()).logsumexp((0, 1)) + 2 * (u[1] - u[0]).log()


TRIALS = torch.tensor([5.0, 7, 10, 3], **DOUBLE)
HITS = torch.tensor([1.0, 3, 9, 0], **DOUBLE)


def test_a_beta_binomial_hierarchy_is_a_quadrature_of_its_two_hyperparameters():
    def model(hits):
        a = pyro.sample("a", dist.Gamma(torch.tensor(2.0, **DOUBLE), 0.5))
        b = pyro.sample("b", dist.Gamma(torch.tensor(2.0, **DOUBLE), 0.5))
        with pyro.plate("groups", len(hits)):
            p = pyro.sample("p", dist.Beta(a, b))
            pyro.sample("hits", dist.Binomial(TRIALS, p), obs=hits)

    def log_joint(a, b):
        prior = dist.Gamma(2.0, 0.5).log_prob(a) + dist.Gamma(2.0, 0.5).log_prob(b)
        pairs = zip(TRIALS, HITS, strict=True)
        return prior + sum(dist.BetaBinomial(a, b, n, validate_args=False).log_prob(x) for n, x in pairs)

    assert collapsed_density(ModelGuide(model, None, HITS)).given == ["a", "b"]
    expected = on_grid(log_joint, -12, 6)
    torch.testing.assert_close(exact.log_evidence(model, HITS), expected, rtol=0, atol=1e-4)


def test_an_unknown_mean_and_precision_have_the_normal_gamma_evidence():
    x = torch.randn(6, generator=torch.Generator().manual_seed(0), **DOUBLE)

    def model(x):
        precision = pyro.sample("precision", dist.Gamma(torch.tensor(3.0, **DOUBLE), 2.0))
        mean = pyro.sample("mean", dist.Normal(1.0, (2 * precision) ** -0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, precision**-0.5), obs=x)

    rate = 2 + 0.5 * ((x - x.mean()) ** 2).sum() + 0.5 * 2 * 6 / 8 * (x.mean() - 1) ** 2
    expected = math.lgamma(6) - math.lgamma(3) + 3 * math.log(2.0) - 6 * rate.log() + 0.5 * math.log(2 / 8)
    expected = expected - 3 * math.log(2 * math.pi)
    assert collapsed_density(ModelGuide(model, None, x)).given == ["precision"]
    torch.testing.assert_close(exact.log_evidence(model, x), expected, rtol=0, atol=1e-4)


EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


@pytest.mark.parametrize("centred", [True, False])
def test_eight_schools_are_a_quadrature_of_one_scale(centred):
    def model(y):
        mean, scale = pyro.sample("mean", dist.Normal(0.0, 5.0)), pyro.sample("scale", dist.HalfCauchy(5.0))
        with pyro.plate("data", len(y)):
            if centred:
                effect = pyro.sample("effect", dist.Normal(mean, scale))
            else:
                effect = mean + scale * pyro.sample("effect", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(effect, ERRORS), obs=y)

    def density(log_scale):
        scale = math.exp(log_scale)
        covariance = 25.0 + (ERRORS.double() ** 2 + scale**2).diag_embed()
        joint = torch.distributions.MultivariateNormal(torch.zeros(8, **DOUBLE), covariance).log_prob(EFFECTS.double())
        return math.exp(joint + 31) * stats.halfcauchy(scale=5).pdf(scale) * scale

    expected = math.log(integrate.quad(density, -25, 20, epsabs=0, epsrel=1e-9, limit=200)[0]) - 31
    assert abs(float(exact.log_evidence(model, EFFECTS)) - expected) < 2e-4


def test_groups_with_a_scale_each_have_an_evidence_each():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), **DOUBLE)

    def model(x):
        with pyro.plate("groups", 3):
            scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), **DOUBLE), 1.0))
            mean = pyro.sample("mean", dist.Normal(torch.zeros((), **DOUBLE), 2.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(mean, scale), obs=x)

    def evidence(column):
        def density(log_scale):
            covariance = 4.0 + math.exp(2 * log_scale) * torch.eye(4, **DOUBLE)
            joint = torch.distributions.MultivariateNormal(torch.zeros(4, **DOUBLE), covariance).log_prob(column)
            return math.exp(joint) * stats.norm.pdf(log_scale)

        return math.log(integrate.quad(density, -9, 9, epsabs=0, epsrel=1e-9)[0])

    expected = torch.tensor([evidence(column) for column in x.T], **DOUBLE)
    torch.testing.assert_close(exact.log_evidence(model, x), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [lambda p: p**2, lambda p: 1 - p, lambda p: 0.5 * p, lambda p: p.clamp(0.1, 0.9)],
    ids=["a square", "the complement", "a half", "a clamp"],
)
def test_a_parameter_that_is_not_the_latent_itself_is_integrated_by_quadrature(change):
    def model(x):
        p = pyro.sample("p", dist.Beta(torch.tensor(2.0, **DOUBLE), 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(change(p)), obs=x)

    def density(p):
        q = float(change(torch.tensor(p)))
        return stats.beta(2, 3).pdf(p) * q**4 * (1 - q) ** 2

    assert collapsed_density(ModelGuide(model, None, BITS)).given == ["p"]
    expected = math.log(integrate.quad(density, 0, 1, points=(0.1, 0.9))[0])
    assert abs(float(exact.log_evidence(model, BITS)) - expected) < 1e-4


def test_a_latent_on_which_another_prior_depends_is_not_conjugate_alone():
    """A Gamma latent is the rate of Poisson data, and the shape of another one's prior."""

    def model(x):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0, **DOUBLE), 1.0))
        other = pyro.sample("other", dist.Gamma(rate, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)
            pyro.sample("y", dist.Poisson(other), obs=x)

    x = torch.tensor([1.0, 3.0], **DOUBLE)
    assert collapsed_density(ModelGuide(model, None, x)).given == ["rate"]

    def density(rate):
        # y is negative binomial given the rate
        marginal = stats.gamma(2).pdf(rate) * stats.poisson(rate).pmf(x.numpy()).prod()
        log_y = math.lgamma(rate + 4) - math.lgamma(rate) - (rate + 4) * math.log(3.0) - math.log(6.0)
        return marginal * math.exp(log_y)

    expected = math.log(integrate.quad(density, 0, 40, points=(1, 4))[0])
    assert abs(float(exact.log_evidence(model, x)) - expected) < 1e-4


def by_quadrature(density, low, high):
    return math.log(integrate.quad(density, low, high, epsabs=0, epsrel=1e-9, limit=200)[0])


def test_an_exposure_may_be_a_latent_of_the_quadrature():
    """The factor of a conjugate rate depends on the other latent."""
    x = torch.tensor([1.0, 3.0, 2.0], **DOUBLE)

    def model(x):
        exposure = pyro.sample("exposure", dist.LogNormal(torch.zeros((), **DOUBLE), 0.5))
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0, **DOUBLE), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate * exposure), obs=x)

    def density(log_exposure):
        e = math.exp(log_exposure)
        log_p = math.lgamma(8) - math.lgamma(2) - 8 * math.log(1 + 3 * e) + 6 * log_exposure - math.log(12.0)
        return math.exp(log_p) * stats.norm(0, 0.5).pdf(log_exposure)

    assert collapsed_density(ModelGuide(model, None, x)).given == ["exposure"]
    assert abs(float(exact.log_evidence(model, x)) - by_quadrature(density, -5, 5)) < 1e-4


def test_points_are_functions_of_the_latents_of_the_quadrature():
    x = torch.tensor([0.5, -1.0], **DOUBLE)

    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), **DOUBLE), 0.5))
        twice = pyro.sample("twice", dist.Delta(2 * scale))
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), **DOUBLE), twice))
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)  # no plate: the data are broadcast

    def density(log_scale):
        covariance = 4 * math.exp(2 * log_scale) + torch.eye(2, **DOUBLE)
        joint = torch.distributions.MultivariateNormal(torch.zeros(2, **DOUBLE), covariance).log_prob(x)
        return math.exp(joint) * stats.norm(0, 0.5).pdf(log_scale)

    assert abs(float(exact.log_evidence(model, x)) - by_quadrature(density, -5, 5)) < 1e-4


def test_data_without_a_plate_are_broadcast_to_a_conjugate_latent():
    def model(x):
        p = pyro.sample("p", dist.Beta(torch.tensor(2.0, **DOUBLE), 3.0))
        pyro.sample("x", dist.Bernoulli(p), obs=x)

    torch.testing.assert_close(exact.log_evidence(model, BITS), exact.log_evidence(beta_bernoulli, BITS))


def test_global_latents_without_an_exact_answer_are_refused_with_the_structure_that_has_one():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), **DOUBLE), 1.0))
        with pyro.plate("data", len(x)):
            precision = pyro.sample("precision", dist.Gamma(torch.tensor(2.0, **DOUBLE), 2.0))
            pyro.sample("x", dist.Normal(mean, precision**-0.5), obs=x)

    got = r"got the latents \['mean', 'precision'\], of which \['mean'\] are outside of the data plate"
    with pytest.raises(ValueError, match="`model` must have at most two dimensions of latents .*" + got):
        exact.log_evidence(model, BITS)
    with pytest.raises(ValueError, match="`model` must have latents that are all linear Gaussian, or .*" + got):
        exact.posterior(model, BITS)


def test_observations_in_a_python_loop_update_a_conjugate_latent():
    """Ten flips of a coin, as single sites without a plate."""

    def model(flips):
        fairness = pyro.sample("fairness", dist.Beta(10.0, 10.0))
        for place in range(len(flips)):
            pyro.sample(f"flip_{place}", dist.Bernoulli(fairness), obs=flips[place])

    found = exact.log_evidence(model, torch.tensor([1.0] * 6 + [0.0] * 4))
    expected = special.betaln(16, 14) - special.betaln(10, 10)
    torch.testing.assert_close(found.item(), expected, rtol=1e-5, atol=0)
