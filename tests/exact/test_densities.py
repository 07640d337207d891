"""Models that look like those with an easy answer and are not, and sharp ones: right or refused, never wrong."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.nn.functional import relu

import pyro_vae as pv
from pyro_vae import exact, guides, likelihoods, networks, priors

WEIGHT = torch.tensor([[1.0, -0.5, 0.3], [0.4, 0.8, -1.0]], dtype=torch.float64)
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


def linear(prior, likelihood=lambda loc: dist.Normal(loc, 0.5).to_event(1)):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(len(x)))
            pyro.sample("x", likelihood(z @ WEIGHT), obs=x)

    return model


def standard(count):
    return dist.Normal(zeros(2), 1.0).to_event(1)


def by_hand(model, draws=400_000):
    """log p(x) and its standard error by naive Monte Carlo, with the model's own densities."""
    trace = poutine.trace(model).get_trace(X)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z = trace.nodes["z"]["fn"].sample(torch.Size([draws]))
    conditioned = poutine.trace(poutine.condition(model, {"z": z})).get_trace(X)
    conditioned.compute_log_prob()
    weights = conditioned.nodes["x"]["log_prob"].exp()
    return weights.mean(0).log(), weights.std(0) / weights.mean(0) / draws**0.5


MASK = torch.tensor([True, True, False])
SCALES = torch.tensor([0.2, 0.5, 1.0, 1.5, 2.0, 0.1], dtype=torch.float64)
LINEAR_LOOKALIKES = {
    "a mask on columns": linear(standard, lambda loc: dist.Normal(loc, 0.5).mask(MASK).to_event(1)),
    "a shifted prior": linear(lambda count: dist.Normal(zeros(2) + 1, 2.0).to_event(1)),
    "a prior for each datum": linear(lambda count: dist.Normal(zeros(2), SCALES[:count, None]).to_event(1)),
    "a full covariance": linear(
        lambda count: dist.MultivariateNormal(zeros(2), torch.tensor([[1.0, 0.6], [0.6, 2.0]]).double())
    ),
    "a prior with all rows written out": linear(lambda count: dist.Normal(zeros(count, 2), 1.0).to_event(1)),
}


@pytest.mark.parametrize("name", LINEAR_LOOKALIKES)
def test_what_looks_linear_and_gaussian_has_the_right_evidence(name):
    model = LINEAR_LOOKALIKES[name]
    expected, error = by_hand(model)
    assert (error < 0.2).all()
    assert ((exact.log_evidence(model, X) - expected).abs() < 5 * error + 1e-4).all()


def test_a_transformed_likelihood_is_not_taken_for_a_normal():
    def likelihood(loc):
        return dist.LogNormal(loc, 0.5).to_event(1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros(1), 1.0).to_event(1))
            pyro.sample("x", likelihood(z * WEIGHT[0]), obs=x)

    x = X.exp()
    z = torch.linspace(-10, 10, 20_001, dtype=torch.float64)[:, None, None]
    log_joint = dist.Normal(0.0, 1.0).log_prob(z[..., 0]) + likelihood(z * WEIGHT[0]).log_prob(x)
    expected = log_joint.logsumexp(0) + math.log(20 / 20_000)
    assert torch.allclose(exact.log_evidence(model, x), expected, atol=1e-4)


@pytest.mark.parametrize("prior", [dist.HalfCauchy(1.0 + zeros(1)), dist.HalfNormal(1.0 + zeros(1))])
def test_a_latent_of_unknown_extent_is_refused_with_a_way_out(prior):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior.to_event(1))
            pyro.sample("x", dist.Normal(z * WEIGHT[0], 0.5).to_event(1), obs=x)

    with pytest.raises(ValueError, match="Write the latent on the real line"):
        exact.log_evidence(model, X)


def test_linearity_is_tried_where_the_prior_is():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros(1) + 50, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(relu(z - 20), 1.0).to_event(1), obs=x)

    x = torch.tensor([[30.0], [29.0]], dtype=torch.float64)
    expected = dist.Normal(30.0, 2**0.5).log_prob(x[:, 0])
    assert torch.allclose(exact.log_evidence(model, x), expected, atol=1e-6)
    assert torch.allclose(exact.log_evidence(model, x[:1]), expected[:1], atol=1e-6)


def test_a_sharp_linear_posterior_is_given_in_float32():
    weight = torch.randn(2, 50)
    weight[1] = weight[0] + 1e-3 * torch.randn(50)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 1e-3).to_event(1), obs=x)

    x = torch.randn(3, 2) @ weight
    assert exact.posterior(model, x).log_prob(exact.posterior(model, x).mean).isfinite().all()


@pytest.mark.parametrize("sigma", [1e-2, 1e-3])
def test_two_narrow_modes_are_both_found_or_it_says_that_it_could_not(sigma):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal((z - 0.1) ** 2, sigma).to_event(1), obs=x)

    x = torch.linspace(0.3, 2.5, 40, dtype=torch.float64)[:, None]
    z = torch.linspace(-6, 6, 1_200_001, dtype=torch.float64)
    log_joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal((z - 0.1) ** 2, sigma).log_prob(x)
    expected = log_joint.logsumexp(1) + math.log(1e-5)
    try:
        evidence = exact.log_evidence(model, x)
    except exact.QuadratureError:
        assert sigma < 1e-2
    else:
        assert torch.allclose(evidence, expected, atol=2e-4)


def test_two_narrow_modes_are_both_found_in_two_dimensions():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros(2), 1.0).to_event(1))
            loc = torch.stack([(z[..., 0] - 0.1) ** 2, z[..., 1]], -1)
            pyro.sample("x", dist.Normal(loc, 0.05).to_event(1), obs=x)

    x = torch.tensor([[0.5, 0.2], [1.7, -0.4]], dtype=torch.float64)
    z = torch.linspace(-6, 6, 120_001, dtype=torch.float64)
    first = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal((z - 0.1) ** 2, 0.05).log_prob(x[:, :1])
    second = dist.Normal(0.0, (1 + 0.05**2) ** 0.5).log_prob(x[:, 1])
    expected = first.logsumexp(1) + math.log(1e-4) + second
    assert torch.allclose(exact.log_evidence(model, x), expected, atol=3e-4)


@pytest.mark.parametrize("value", [1.0, 2.0, 2.5])
def test_a_bump_of_a_tenth_of_the_prior_is_not_overlooked(value):
    def bump(z):
        return relu(50 * (z - 0.8)) - 2 * relu(50 * (z - 0.85)) + relu(50 * (z - 0.9))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(bump(z), 0.3).to_event(1), obs=x)

    x = torch.tensor([[value]], dtype=torch.float64)
    z = torch.linspace(-8, 8, 1_600_001, dtype=torch.float64)
    log_joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(bump(z), 0.3).log_prob(x)
    expected = log_joint.logsumexp(1) + math.log(1e-5)
    assert torch.allclose(exact.log_evidence(model, x, tolerance=1e-3), expected, atol=2e-3)


def test_scalar_latents_have_a_posterior_mean():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.sinh(z), 1.0), obs=x)

    mean = exact.posterior(model, torch.tensor([0.0, 2.0])).mean
    assert mean.shape == (2,)
    assert abs(mean[0]) < 1e-4 < mean[1]


def masked_latent(x):
    with pyro.plate("data", len(x)), poutine.mask(mask=torch.tensor([True, False])):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def scaled_by_row(x):
    with pyro.plate("data", len(x)), poutine.scale(scale=torch.tensor([0.5, 2.0])):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def of_two_kinds(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(0.5))
        z = pyro.sample("z", dist.Normal(c, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (masked_latent, torch.zeros(2), r"latents \['z'\] are masked"),
        (scaled_by_row, torch.zeros(2), "subsampled or scaled"),
        (of_two_kinds, torch.zeros(2), "or a single continuous one"),
        (of_two_kinds, torch.zeros(0), "`data` must be .*got shape"),
    ],
)
def test_what_has_no_exact_answer_is_refused_with_the_reason(model, data, message):
    with pytest.raises(ValueError, match=message):
        exact.log_evidence(model, data)


def bernoulli_vae():
    return pv.VAE(
        priors.Bernoulli(1), guides.Bernoulli(2, 1, networks.linear()), likelihoods.Normal(1, 2, networks.linear())
    )


def test_a_guide_outside_the_plate_is_refused():
    def guide(x):
        pyro.sample("z", dist.Bernoulli(torch.full((len(x), 1), 0.3)).to_event(2))

    with pytest.raises(ValueError, match=r"guide: site 'z' is in the plates \[\]"):
        exact.elbo(bernoulli_vae().model, guide, torch.randn(2, 2))


def test_a_masked_latent_of_the_guide_is_refused_and_named():
    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("z", dist.Bernoulli(torch.full((1,), 0.3)).to_event(1))

    with pytest.raises(ValueError, match=r"guide: its latent 'z' is masked"):
        exact.elbo(bernoulli_vae().model, guide, torch.randn(2, 2))


def test_data_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"`x` must be \(N, 2\).*got shape \(4, 1\)"):
        exact.log_evidence(bernoulli_vae().model, torch.randn(4, 1))


def test_a_narrow_guide_is_found_before_its_gap_is_believed():
    vae = pv.VAE(
        priors.StandardNormal(1),
        guides.DiagonalNormal(2, 1, networks.linear()),
        likelihoods.Normal(1, 2, networks.mlp([8])),
    )

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :1], 1e-3).to_event(1))

    x = torch.randn(3, 2)
    residual = exact.log_evidence(vae.model, x) - exact.elbo(vae.model, guide, x) - exact.kl(vae.model, guide, x)
    assert residual.abs().max() < 1e-3


def test_a_network_with_dropout_is_refused_until_it_is_in_evaluation_mode():
    def network(in_features, out_features):
        return torch.nn.Sequential(
            torch.nn.Linear(in_features, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, out_features)
        )

    vae = pv.VAE(
        priors.Bernoulli(2), guides.Bernoulli(3, 2, networks.linear()), likelihoods.Normal(2, 3, network, scale=0.1)
    )
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match="evaluation mode"):
        exact.log_evidence(vae.model, x)
    assert exact.log_evidence(vae.eval().model, x).isfinite().all()


class MixturePrior(torch.nn.Module):
    """A prior of the user's own: a mixture of two normals."""

    def forward(self, context=None):
        weights = dist.Categorical(torch.tensor([0.3, 0.7]))
        return dist.MixtureSameFamily(weights, dist.Normal(torch.tensor([[-2.0], [1.0]]), 0.5).to_event(1))


def test_a_mixture_of_the_users_own_is_a_prior_with_an_exact_answer():
    vae = pv.VAE(
        MixturePrior(),
        guides.DiagonalNormal(2, 1, networks.linear()),
        likelihoods.Normal(1, 2, networks.linear(), scale=0.5),
    )
    x = torch.randn(4, 2)
    weight, bias = (tensor.detach() for tensor in (vae.decoder.network.weight, vae.decoder.network.bias))
    components = [
        dist.MultivariateNormal(weight[:, 0] * mean + bias, 0.25 * (weight @ weight.T + torch.eye(2))).log_prob(x)
        + math.log(share)
        for mean, share in ((-2.0, 0.3), (1.0, 0.7))
    ]
    assert torch.allclose(exact.log_evidence(vae.model, x), torch.stack(components).logsumexp(0), atol=1e-4)
