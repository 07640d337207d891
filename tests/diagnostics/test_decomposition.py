"""Decomposition of the ELBO, compared with closed forms of linear Gaussian guides, quadrature and enumeration."""

import math
import re
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import gaussian, gumbel, one_hot, relaxed
from pyro import poutine
from pyro.distributions.transforms import conditional_affine_autoregressive
from pyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal, AutoMultivariateNormal, AutoNormal

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.diagnostics import aggregate_posterior, decomposition

SURE = 4.5  # standard errors
WEIGHTS = torch.tensor([0.7, -0.4])
A = torch.tensor([[1.5, 0.0, 0.5], [0.0, 0.6, -0.3]])
SHIFT = torch.tensor([0.5, -0.2])
SCALE = torch.tensor([0.4, 0.7])
ROOT = torch.tensor([[1.0, 0.0, 0.0], [0.3, 0.8, 0.0], [-0.2, 0.1, 1.2]])  # of the covariance of x
MARGINAL = A @ ROOT @ ROOT.T @ A.T + SCALE.diag() ** 2  # covariance of the aggregate posterior of the population


def population(num_data, seed=0):
    return torch.randn(num_data, 3, generator=torch.Generator().manual_seed(seed)) @ ROOT.T


def linear_vae(weight=A, shift=SHIFT, scale=SCALE):
    """q(z | x) = N(weight x + shift, scale^2)."""
    decoder = likelihoods.Normal(2, 3, networks.linear(), scale=1.0)
    vae = gaussian(encoder=guides.DiagonalNormal(3, 2, networks.linear()), decoder=decoder)
    with torch.no_grad():
        vae.encoder.network.weight.copy_(torch.cat([weight, torch.zeros(2, 3)]))
        vae.encoder.network.bias.copy_(torch.cat([shift, scale.log()]))
    return vae


def close(estimate, expected):
    assert abs(estimate.value - expected) < SURE * estimate.standard_error + 1e-5


def test_a_linear_gaussian_guide_has_the_closed_forms():
    x, vae = population(2000), linear_vae()
    nats, mean = pv.decompose(vae.model, vae.guide, x), x @ A.T + SHIFT
    rate = 0.5 * (SCALE**2 + mean**2 - 1 - 2 * SCALE.log())
    close(nats.rate, rate.sum(1).mean().item())
    torch.testing.assert_close(nats.units["z"].rate, rate.mean(0).double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(nats.units["z"].activity, (x @ A.T).var(0).double(), rtol=1e-4, atol=1e-5)
    truth = 0.5 * (MARGINAL.logdet() - 2 * SCALE.log().sum()).item()
    lower, upper = nats.population_information
    assert lower.value < upper.value < lower.value + 0.05
    assert lower.value < truth + SURE * lower.standard_error
    assert upper.value > truth - SURE * upper.standard_error
    marginal_kl = 0.5 * (MARGINAL.trace() + SHIFT @ SHIFT - 2 - MARGINAL.logdet()).item()
    error = math.hypot(lower.standard_error, 3 / math.sqrt(len(x)))  # and that of the rate over data
    assert abs(nats.marginal_kl.value - marginal_kl) < SURE * error
    for d in range(2):
        alone = 0.5 * math.log(MARGINAL[d, d] / SCALE[d] ** 2)
        assert nats.units["z"].information[d].item() == pytest.approx(alone, abs=SURE * lower.standard_error)
    assert nats.collapse == ()
    assert nats.units["z"].active.all()


def test_the_terms_add_up_and_are_those_of_evaluate():
    x, vae = population(500), linear_vae()
    nats = pv.decompose(vae.model, vae.guide, x, num_samples=20)
    found = nats.elbo.value, nats.rate.value
    sums = -nats.distortion.value - nats.rate.value, nats.mutual_information.value + nats.marginal_kl.value
    assert found == pytest.approx(sums, abs=1e-6)
    terms = pv.evaluate(vae.model, vae.guide, x, num_samples=200, seed=1)
    for name in ("elbo", "distortion", "rate"):
        estimate = getattr(nats, name)
        assert abs(estimate.value - terms[name]) < SURE * 1.1 * estimate.standard_error


def test_the_bracket_contains_the_information_of_the_population_in_expectation():
    """With few data, its ends differ from the truth by more than chance."""
    truth, vae = 0.5 * (MARGINAL.logdet() - 2 * SCALE.log().sum()).item(), linear_vae()
    found = [pv.decompose(vae.model, vae.guide, population(8, seed), seed=seed) for seed in range(60)]
    for end, side in ((0, 1), (1, -1)):
        values = torch.tensor([nats.population_information[end].value for nats in found]).double()
        margin = side * (truth - values.mean()) / (values.std() / math.sqrt(len(values)))
        assert margin > SURE
    assert all(nats.mutual_information.value <= math.log(8) for nats in found)
    assert all(nats.population_information[0].value <= nats.population_information[1].value for nats in found)


def test_without_overlap_the_information_is_that_of_the_index():
    vae = linear_vae(weight=100 * A, scale=torch.full((2,), 1e-3))
    nats = pv.decompose(vae.model, vae.guide, population(50))
    assert nats.mutual_information.value == pytest.approx(math.log(50), abs=1e-5)
    assert nats.population_information[1].value > 100  # for the population there is no upper bound


def test_it_agrees_with_quadrature_on_the_mixture():
    x = pv.datasets.two_gaussians(300, seed=0).x
    vae = gaussian(1, 2, encoder=guides.DiagonalNormal(2, 1, networks.linear()))
    with torch.no_grad():
        vae.encoder.network.weight.copy_(torch.tensor([[0.6, 0.5], [0.2, -0.1]]))
        vae.encoder.network.bias.copy_(torch.tensor([0.1, -0.8]))
    z, step = torch.linspace(-12, 12, 6001).double()[:, None, None], 24 / 6000
    with torch.no_grad():
        log_q = vae.double().encode(x.double()).log_prob(z)
        log_mixture = log_q.logsumexp(1) - math.log(300)
        expected = ((log_q.exp() * (log_q - log_mixture[:, None])).sum(0).mean() * step).item()
        log_p = vae.prior().log_prob(z)[:, 0]
        marginal_kl = ((log_mixture.exp() * (log_mixture - log_p)).sum() * step).item()
    nats = pv.decompose(vae.model, vae.guide, x.double())
    close(nats.mutual_information, expected)
    close(nats.marginal_kl, marginal_kl)
    assert 0.3 < expected < 1
    assert nats.units["z"].information.item() == pytest.approx(nats.mutual_information.value, abs=1e-6)


def bits():
    torch.manual_seed(1)
    vae = gaussian(3, 2, prior=priors.Bernoulli(3), encoder=guides.Bernoulli(2, 3, networks.linear()))
    with torch.no_grad():
        vae.encoder.network.weight.copy_(torch.tensor([[2.0, 1.0], [0.5, -1.0], [-1.0, 2.0]]))
    return vae


def test_sums_over_states_and_draws_agree(monkeypatch):
    x, vae = pv.datasets.two_gaussians(40, seed=0).x, bits()
    with torch.no_grad():
        states = vae.prior().enumerate_support(expand=False).reshape(8, 1, 3)
        log_q = vae.encode(x).log_prob(states).double()
        log_mixture = log_q.logsumexp(1, keepdim=True) - math.log(40)
        log_p = vae.prior().log_prob(states).double()
        expected = (log_q.exp() * (log_q - log_mixture)).sum(0).mean().item()
        rate = (log_q.exp() * (log_q - log_p)).sum(0).mean().item()
        others = (log_q.exp().sum(1, keepdim=True) - log_q.exp()).log() - math.log(39)
        upper = (log_q.exp() * (log_q - others)).sum(0).mean().item()
        probs = vae.encode(x).base_dist.probs
    exactly = pv.decompose(vae.model, vae.guide, x)
    assert (exactly.num_samples, exactly.mutual_information.standard_error) == (0, 0)
    found = (exactly.mutual_information, exactly.rate, exactly.population_information[1], exactly.elbo)
    elbo = pv.exact.elbo(vae.model, vae.guide, x).mean().item()
    assert [estimate.value for estimate in found] == pytest.approx([expected, rate, upper, elbo], abs=1e-5)
    torch.testing.assert_close(exactly.units["z"].activity, probs.var(0).double())
    monkeypatch.setattr(decomposition, "MAX_SUMMED", 0)
    drawn = pv.decompose(vae.model, vae.guide, x, num_samples=300)
    assert drawn.num_samples == 300
    for name in ("elbo", "distortion", "rate", "mutual_information", "marginal_kl"):
        close(getattr(drawn, name), getattr(exactly, name).value)
    torch.testing.assert_close(drawn.units["z"].information, exactly.units["z"].information, rtol=0, atol=0.03)


@pytest.mark.parametrize("build", [relaxed, gumbel, one_hot])
def test_relaxed_and_discrete_latents_have_numbers_for_each_variable(build):
    vae, x = build(), population(60)
    nats = pv.decompose(vae.model, vae.guide, x, num_samples=50)
    units = nats.units["z"]
    assert units.activity.shape == units.rate.shape == units.information.shape == (2,)
    assert units.rate.sum().item() == pytest.approx(nats.rate.value, abs=SURE * nats.rate.standard_error + 1e-5)
    assert (units.information <= units.rate + SURE * nats.rate.standard_error + 1e-5).all()


@pytest.mark.parametrize("build", [relaxed, gumbel])
def test_a_relaxed_latent_is_as_active_as_its_twin_and_carries_more_information(build):
    vae, x = build(), population(60)
    nats, twin = (pv.decompose(pair.model, pair.guide, x, num_samples=100) for pair in (vae, vae.discrete()))
    torch.testing.assert_close(nats.units["z"].activity, twin.units["z"].activity)
    slack = SURE * nats.mutual_information.standard_error
    assert nats.mutual_information.value > twin.mutual_information.value - slack  # the twin is a function of it


@pytest.mark.parametrize("part", [guides.FullRankNormal, guides.LowRankNormal, guides.MixtureOfNormals])
def test_a_guide_that_is_no_product_has_only_the_information_of_all_variables(part):
    vae = gaussian(encoder=part(3, 2, networks.linear()))
    nats = pv.decompose(vae.model, vae.guide, population(40))
    assert (nats.units["z"].information, nats.units["z"].rate, nats.units["z"].activity.shape) == (None, None, (2,))
    assert 0 < nats.mutual_information.value < math.log(40)
    with torch.no_grad():
        means = vae.encode(population(40)).mean
    torch.testing.assert_close(nats.units["z"].activity, means.var(0).double(), rtol=1e-4, atol=1e-6)


def test_an_identity_flow_agrees_with_its_normal_guide():
    pytest.importorskip("zuko")
    encoder = guides.InverseAutoregressiveFlow(3, 2, networks.linear(), transforms=1, hidden=(8,))
    vae = gaussian(encoder=encoder)
    normal = linear_vae(encoder.network.weight[:2], encoder.network.bias[:2], torch.ones(2))
    with torch.no_grad():
        encoder.network.weight[2:4] = encoder.network.bias[2:4] = 0.0
    x = population(60)
    nats, same = (pv.decompose(pair.model, pair.guide, x, num_samples=200) for pair in (vae, normal))
    error = math.hypot(nats.mutual_information.standard_error, same.mutual_information.standard_error)
    assert abs(nats.mutual_information.value - same.mutual_information.value) < SURE * error
    torch.testing.assert_close(nats.units["z"].activity, same.units["z"].activity, rtol=0, atol=0.1)


def test_a_flow_of_pyro_with_a_context_has_the_information_of_a_sum_over_data():
    pyro.set_rng_seed(0)
    x, flow = 2 * torch.randn(6, 2), conditional_affine_autoregressive(2, 2, hidden_dims=[8], stable=True)

    def q(x):
        return dist.TransformedDistribution(dist.Normal(x, 0.5).to_event(1), [flow.condition(x)])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x))

    nats = pv.decompose(model, guide, x, num_samples=2000)
    with torch.no_grad():
        by_hand = []
        for row in x:
            z = q(row).sample((2000,))
            log_q = torch.stack([q(other).log_prob(z.clone()) for other in x])
            by_hand.append(q(row).log_prob(z.clone()) - log_q.logsumexp(0) + math.log(len(x)))
    by_hand = torch.cat(by_hand)
    error = math.hypot(nats.mutual_information.standard_error, by_hand.std().item() / math.sqrt(len(by_hand)))
    assert 0.2 < by_hand.mean() < math.log(6)
    assert abs(nats.mutual_information.value - by_hand.mean().item()) < SURE * error


def two_sites_model(x):
    with pyro.plate("data", len(x)):
        x, z = pyro.subsample(x, event_dim=1), pyro.sample("z", dist.Normal(0.0, 1.0))
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.7])))
        loc = z[..., None] * WEIGHTS + kind[..., None]
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def two_sites_guide(x, slope=0.0):
    """The two latents are independent, given x, where the slope is zero."""
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=1)
        kind = pyro.sample("kind", dist.Categorical(logits=torch.stack([x[..., 0], x[..., 1]], -1)))
        pyro.sample("z", dist.Normal(x[..., 0] + slope * kind if slope else x[..., 0], 0.5))


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_the_information_of_two_latent_sites_agrees_with_a_grid_of_one_for_each_value_of_the_other(slope):
    guide = partial(two_sites_guide, slope=slope)
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    nats = pv.decompose(two_sites_model, guide, x, num_samples=200)
    z, step = torch.linspace(-9, 9, 3001)[:, None], 18 / 3000
    log_kind, expected = torch.stack([x[:, 0], x[:, 1]], -1).log_softmax(-1).double(), 0.0
    for kind in (0, 1):
        log_q = dist.Normal(x[:, 0] + slope * kind, 0.5).log_prob(z).double() + log_kind[:, kind]
        log_mixture = log_q.logsumexp(1, keepdim=True) - math.log(30)
        expected += (log_q.exp() * (log_q - log_mixture)).sum(0).mean().item() * step
    close(nats.mutual_information, expected)
    assert (nats.units["z"].information is None, nats.units["kind"].activity.shape) == (slope > 0, ())
    assert nats.units["kind"].activity.item() == pytest.approx(log_kind.exp().var(0).sum().item(), abs=1e-5)


def test_a_guide_without_information_has_collapsed():
    vae = linear_vae(weight=torch.zeros(2, 3), shift=torch.zeros(2), scale=torch.ones(2))
    nats = pv.decompose(vae.model, vae.guide, population(50))
    assert nats.collapse == ("z carries nothing about x: 0.000 nats; q(z|x) is the prior for every x",)
    assert nats.rate.value == pytest.approx(0, abs=1e-6)
    assert "collapse: z carries nothing" in str(nats)
    assert not nats.units["z"].active.any()
    vae = linear_vae(weight=torch.zeros(2, 3))
    (line,) = pv.decompose(vae.model, vae.guide, population(50)).collapse
    pattern = r"carries nothing about x: 0.000 nats; the rate of .* is wasted: q\(z\|x\) is the same for every x"
    assert re.search(pattern, line)


def test_a_variable_without_information_is_named():
    weight = A.clone()
    weight[1] = 0
    vae = linear_vae(weight, shift=torch.zeros(2), scale=torch.tensor([0.4, 1.0]))
    nats = pv.decompose(vae.model, vae.guide, population(50))
    assert nats.collapse == ("1 of 2 variables of z carry nothing about x (less than 0.01 nats each): z[1]",)
    assert nats.units["z"].active.tolist() == [True, False]
    vae = linear_vae(weight, shift=torch.tensor([0.0, 1.0]), scale=torch.tensor([0.4, 1.0]))
    lines = pv.decompose(vae.model, vae.guide, population(50)).collapse
    assert lines[1] == "these variables of z still cost a rate of 0.50 nats: their q is not the prior"


def test_information_in_the_scale_alone_is_no_collapse():
    vae = linear_vae(weight=torch.zeros(2, 3), shift=torch.zeros(2))
    with torch.no_grad():
        vae.encoder.network.weight[2:] = A
    nats = pv.decompose(vae.model, vae.guide, population(50))
    assert not nats.units["z"].active.any()
    assert nats.collapse == ()


@pytest.mark.parametrize("budget", [1, 3 * 40 * 16, 10**9])
@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_chunks_do_not_change_the_numbers(monkeypatch, budget, slope):
    x, guide = torch.randn(40, 2), partial(two_sites_guide, slope=slope)
    whole = pv.decompose(two_sites_model, guide, x)
    monkeypatch.setattr(aggregate_posterior, "_BUDGET", budget)
    again = pv.decompose(two_sites_model, guide, x)
    for ours, theirs in zip(again.population_information, whole.population_information, strict=True):
        assert ours.value == pytest.approx(theirs.value, abs=1e-5)


def test_the_standard_error_is_the_spread_over_seeds():
    x, vae = population(30), linear_vae()
    found = [pv.decompose(vae.model, vae.guide, x, num_samples=4, seed=seed) for seed in range(100)]
    for name in ("elbo", "rate", "mutual_information", "marginal_kl"):
        values = torch.tensor([getattr(nats, name).value for nats in found])
        reported = torch.tensor([getattr(nats, name).standard_error for nats in found]).square().mean().sqrt()
        assert 0.65 < (reported / values.std()).item() < 1.5


def test_a_seed_fixes_the_numbers_and_the_users_state_stays(random_states):
    vae, x = linear_vae(), population(20)
    before, first = random_states(), pv.decompose(vae.model, vae.guide, x)
    assert random_states() == before
    assert not list(pyro.get_param_store().keys())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in vae.parameters())
    again, other = (pv.decompose(vae.model, vae.guide, x, seed=seed) for seed in (0, 1))
    assert first.rate == again.rate != other.rate


def one_site(prior, q):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(x[:, 0]))
            pyro.sample("x", dist.Normal(z[..., None] * WEIGHTS, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x[:, 0]))

    return model, guide


PER_DATUM_PRIOR = one_site(lambda x: dist.Normal(x, 1.0), lambda x: dist.Normal(x, 1.0))
POINT_GUIDE = one_site(lambda x: dist.Normal(0.0, 1.0), dist.Delta)


@pytest.mark.parametrize(("model", "guide", "x", "num_samples", "message"), [
    (two_sites_model, two_sites_guide, torch.zeros(5, 2), 1, "`num_samples` must be 2 or more.*got 1"),
    (two_sites_model, two_sites_guide, torch.zeros(5, 2), 0, "`num_samples` must be .*got 0"),
    (*POINT_GUIDE, torch.randn(5, 2), 5, "`guide` must have a density for .*got a point .* for 'z'"),
])  # fmt: skip
def test_invalid_arguments_raise(model, guide, x, num_samples, message):
    with pytest.raises(ValueError, match=message):
        pv.decompose(model, guide, x, num_samples=num_samples)


def test_many_discrete_variables_are_sampled():
    torch.manual_seed(0)
    vae = gaussian(200, prior=priors.Bernoulli(200, probs=0.3), encoder=guides.Bernoulli(3, 200, networks.linear()))
    x = population(60)
    found = pv.decompose(vae.model, vae.guide, x)
    q, p = vae.encode(x).base_dist, dist.Bernoulli(0.3)
    assert found.num_samples == 10
    close(found.rate, torch.distributions.kl_divergence(dist.Bernoulli(logits=q.logits), p).sum(1).mean().item())


def kl_of_normals(loc, scale, prior_scale):
    return torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, prior_scale)).sum().item()


def mean_model(x):
    """A global mean."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def mean_guide(x):
    pyro.sample("mean", dist.Normal(torch.tensor(0.3), 0.5))


X = torch.linspace(-1, 2, 6)


def log_likelihood_of(x, loc, scale):
    """E_q[log N(x; mean, 1)] for a mean ~ N(loc, scale), summed over the data."""
    return (-0.5 * math.log(2 * math.pi) - 0.5 * ((x - loc) ** 2 + scale**2)).sum().item()


def test_a_global_latent_has_one_distortion_and_rate_of_all_data_and_no_information():
    nats = pv.decompose(mean_model, mean_guide, X, num_samples=500)
    close(nats.distortion, -log_likelihood_of(X, 0.3, 0.5))
    close(nats.rate, kl_of_normals(torch.tensor(0.3), 0.5, 2.0))
    assert nats.elbo.value == pytest.approx(-nats.distortion.value - nats.rate.value, abs=1e-5)
    assert (nats.num_data, nats.plates, nats.num_samples, list(nats.rates)) == (1, (), 500, ["mean"])
    assert nats.rates["mean"] == nats.rate
    assert (nats.mutual_information, nats.marginal_kl, nats.population_information, nats.units) == (
        None,
        None,
        None,
        {},
    )
    assert nats.why_no_information == "a datum has no latents of its own, since ['mean'] are those of many data"
    assert str(nats).startswith(f"ELBO {nats.elbo} nats of all data\n")
    assert str(nats).endswith(f"no mutual information of x and z: {nats.why_no_information}")
    assert (nats.collapse, nats.is_collapsed) == ((), False)
    assert "nats of all data" in repr(nats)
    assert nats.why_no_information in nats._repr_html_().replace("&#x27;", "'")


def test_the_standard_error_of_a_global_latent_is_the_spread_over_seeds():
    found = [pv.decompose(mean_model, mean_guide, X, num_samples=10, seed=seed).elbo for seed in range(150)]
    reported = math.sqrt(sum(elbo.standard_error**2 for elbo in found) / len(found))
    spread = torch.tensor([elbo.value for elbo in found]).std().item()
    assert reported / spread == pytest.approx(1, abs=0.3)


def groups(x):
    with pyro.plate("group", x.shape[1], dim=-1):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of_groups(x):
    with pyro.plate("group", x.shape[1], dim=-1):
        pyro.sample("mean", dist.Normal(x.mean(0), 0.5))
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x, 0.7))


def test_latents_of_groups_have_the_mean_over_groups_and_the_rate_of_each_site():
    x = torch.linspace(-1, 2, 12).reshape(4, 3)
    nats = pv.decompose(groups, guide_of_groups, x, num_samples=500)
    assert (nats.num_data, nats.plates) == (3, ("group",))
    assert "nats per cell of 'group', of 3 cells" in str(nats)
    close(nats.rates["mean"], kl_of_normals(x.mean(0), 0.5, 2.0) / 3)
    # E_q of KL(N(x, 0.7) || N(mean, 1)), with the mean of the group ~ N(mean of x, 0.5)
    of_z = (0.7**2 + (x - x.mean(0)) ** 2 + 0.5**2 - 1) / 2 - math.log(0.7)
    close(nats.rates["z"], of_z.sum().item() / 3)
    assert nats.rates["mean"].value + nats.rates["z"].value == pytest.approx(nats.rate.value, abs=1e-5)
    close(nats.distortion, -sum(log_likelihood_of(value, value, 0.7) for value in x.flatten()) / 3)


@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoIAFNormal])
def test_autoguides_have_numbers_of_all_data_that_agree_with_evaluate(make):
    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.sum(-1), scale), obs=x)

    torch.manual_seed(0)
    guide = make(model)
    nats = pv.decompose(model, guide, X, num_samples=400)
    terms = pv.evaluate(model, guide, X, num_samples=400, seed=3)
    for name in ("elbo", "distortion", "rate"):  # of all data, and of each of the 6
        assert abs(getattr(nats, name).value - 6 * terms[name]) < SURE * 1.5 * getattr(nats, name).standard_error
    by_site = make is AutoNormal
    assert list(nats.rates) == (["scale", "z"] if by_site else [])
    if by_site:
        assert sum(rate.value for rate in nats.rates.values()) == pytest.approx(nats.rate.value, abs=1e-4)


def test_autoguides_of_all_rows_together_have_no_information_and_say_so():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    together = pv.decompose(model, AutoMultivariateNormal(model), X)
    assert (together.plates, together.mutual_information) == ((), None)
    assert "the guide draws the latents of all data together" in together.why_no_information
    alone = pv.decompose(model, AutoNormal(model), X)
    assert (alone.plates, alone.why_no_information) == (None, "")
    assert alone.mutual_information is not None


def test_latents_that_are_summed_out_belong_to_the_likelihood_and_to_the_prior_of_the_others():
    """p(z) is a mixture of two normals, and p(x | z) depends on the class, too."""

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
            z = pyro.sample("z", dist.Normal(2.0 * c - 1, 0.5))
            pyro.sample("x", dist.Normal(z + c, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.6))

    nats = pv.decompose(model, guide, X, num_samples=1000)
    z, step = torch.linspace(-8, 8, 4001)[:, None, None].double(), 16 / 4000
    c = torch.tensor([0, 1])
    log_both = torch.tensor([0.3, 0.7]).log() + dist.Normal(2.0 * c - 1, 0.5).log_prob(z)
    log_x = dist.Normal(z + c, 1.0).log_prob(X[:, None])  # (4001, 6, 2)
    log_prior, log_joint = log_both.logsumexp(-1), (log_both + log_x).logsumexp(-1)
    log_q = dist.Normal(X / 2, 0.6).log_prob(z[..., 0])
    rate = ((log_q.exp() * (log_q - log_prior)).sum(0) * step).mean().item()
    elbo = ((log_q.exp() * (log_joint - log_q)).sum(0) * step).mean().item()
    close(nats.rate, rate)
    close(nats.elbo, elbo)
    assert (nats.plates, nats.num_data, nats.rates) == (None, 6, {})
    assert nats.why_no_information == "the guide leaves out ['c'], which are summed out"


def test_a_guide_that_draws_nothing_has_the_exact_evidence_as_elbo():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Normal(2.0 * c - 1, 1.0), obs=x)

    nats = pv.decompose(model, lambda x: None, X)
    log_p = torch.logsumexp(
        torch.tensor([0.3, 0.7]).log() + dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).log_prob(X[:, None]), -1
    )
    assert (nats.elbo.value, nats.elbo.standard_error) == (pytest.approx(log_p.mean().item(), abs=1e-5), 0.0)
    assert (nats.rate.value, nats.num_samples) == (pytest.approx(0, abs=1e-6), 0)


def test_masked_steps_of_a_sequence_count_in_no_term():
    lengths = torch.tensor([1, 3, 2])
    x = torch.linspace(-1, 1, 9).reshape(3, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = 0.0
            for t in range(3):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                    pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    def guide(x):
        with pyro.plate("data", len(x)):
            for t in range(3):
                with poutine.mask(mask=t < lengths):
                    pyro.sample(f"z_{t}", dist.Normal(x[:, t], 0.5))

    nats = pv.decompose(model, guide, x, num_samples=1000)
    before = torch.cat([torch.zeros(3, 1), x[:, :2]], 1)
    noise = torch.tensor([0.0, 0.25, 0.25])  # of the step before
    rates = (0.25 + (x - before) ** 2 + noise - 1) / 2 + math.log(2)
    for t in range(3):
        close(nats.rates[f"z_{t}"], (rates[:, t] * (t < lengths)).sum().item() / 3)
    close(nats.distortion, lengths.sum().item() / 3 * (0.5 * math.log(2 * math.pi) + 0.125))
    assert nats.why_no_information == "the latents of a datum lie in further plates, or are masked"


@pytest.mark.parametrize(("model", "guide", "x", "reason"), [
    (two_sites_model, two_sites_guide, torch.zeros(1, 2), "one datum has none with its index"),
    (*PER_DATUM_PRIOR, torch.randn(5, 2), "there is no single prior p(z), since that of 'z' depends on x"),
])  # fmt: skip
def test_rows_without_information_have_the_other_terms_and_the_reason(model, guide, x, reason):
    nats = pv.decompose(model, guide, x, num_samples=300)
    assert (nats.why_no_information, nats.plates, nats.num_data) == (reason, None, len(x))
    elbo = pv.evaluate(model, guide, x, num_samples=300, seed=2)["elbo"]
    assert abs(nats.elbo.value - elbo) < SURE * 1.5 * nats.elbo.standard_error + 1e-5
    assert f"no mutual information of x and z: {reason}" in str(nats)


@pytest.mark.parametrize("summed", [True, False])
def test_the_rates_of_sites_add_up_for_sums_over_states_and_for_draws(monkeypatch, summed):
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(torch.tensor([0.3, 0.7])))
            b = pyro.sample("b", dist.Bernoulli(torch.tensor([0.2, 0.9])[a]))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(logits=torch.stack([-x, x], -1)))
            pyro.sample("b", dist.Bernoulli(logits=x - a))

    if not summed:
        monkeypatch.setattr(decomposition, "MAX_SUMMED", 0)
    nats = pv.decompose(model, guide, X, num_samples=400)
    q = torch.stack([-X, X], -1).softmax(-1).double()
    exact = (q * (q / torch.tensor([0.3, 0.7])).log()).sum(-1).mean().item()
    close(nats.rates["a"], exact) if not summed else None
    assert not summed or nats.rates["a"].value == pytest.approx(exact, abs=1e-6)
    assert nats.rates["a"].value + nats.rates["b"].value == pytest.approx(nats.rate.value, abs=1e-5)
