"""Importance-weighted estimates of log p(x), held against exact answers: right, from beneath, and honest about it."""

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae import exact, guides, likelihoods, networks, priors
from pyro_vae.compilation.graph import CaptureError, Graph
from pyro_vae.evidence import importance_sampling
from pyro_vae.evidence.pareto import pareto_shape

TANH = networks.mlp([8], activation=nn.Tanh)
SIGMAS = 5  # of one number; 4.5 is a failure of 7e-6, and there are tens of data in a test


def vae_of(kind):
    latent = {"normal 2-D": 2, "bernoulli": 3, "gumbel": (1, 2), "one-hot": (2, 3), "linear 8-D": 8}.get(kind, 1)
    prior, encoder = {
        "normal": (priors.Normal(1), guides.DiagonalNormal(3, 1, TANH)),
        "normal 2-D": (priors.StandardNormal(2), guides.DiagonalNormal(3, 2, TANH)),
        "linear 8-D": (priors.StandardNormal(8), guides.DiagonalNormal(3, 8, TANH)),
        "bernoulli": (priors.Bernoulli(3, probs=0.3), guides.Bernoulli(3, 3, TANH)),
        "one-hot": (priors.OneHotCategorical((2, 3)), guides.OneHotCategorical(3, (2, 3), TANH)),
        "relaxed": (priors.RelaxedBernoulli(1, 0.5, probs=0.3), guides.RelaxedBernoulli(3, 1, TANH, 0.66)),
        "gumbel": (priors.GumbelSoftmax((1, 2), 0.5), guides.GumbelSoftmax(3, (1, 2), TANH, 0.66)),
    }[kind]
    network = networks.linear() if kind.startswith("linear") else TANH
    torch.manual_seed(0)
    return pv.VAE(prior, encoder, likelihoods.Normal(latent, 3, network, scale=1.0))


KINDS = ["normal", "normal 2-D", "linear 8-D", "bernoulli", "one-hot", "relaxed", "gumbel"]
X = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))


def two_sites_model(x):
    """z1 -> z2 -> x, each a normal: x ~ N(1, 1 + 1/4 + 1/4)."""
    with pyro.plate("data", len(x)):
        first = pyro.sample("first", dist.Normal(1.0, 1.0))
        second = pyro.sample("second", dist.Normal(first, 0.5))
        pyro.sample("x", dist.Normal(second, 0.5), obs=x)


def two_sites_guide(x):
    """Not the posterior, but wider: weights are bounded."""
    with pyro.plate("data", len(x)):
        second = pyro.sample("second", dist.Normal(0.8 * x + 0.2, 0.7))
        pyro.sample("first", dist.Normal(0.7 * second + 0.3, 0.6))


Y = X[:, 0]
WIDE = Y.double()
TWO_SITES_EVIDENCE = dist.Normal(1.0, 1.5**0.5).log_prob(Y)


def conjugate(slope, scale):
    """z ~ N(0, 1), x ~ N(z, 1), and a guide N(slope x, scale^2): at 1/2 and 1/sqrt 2 the exact posterior."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, scale))

    return model, guide


EXACT = conjugate(0.5, 0.5**0.5)
WIDER = conjugate(0.4, 0.9)


def conjugate_evidence(x):
    """log N(x; 0, 2)."""
    return -(x**2) / 4 - 0.5 * math.log(4 * math.pi)


def assert_agree(estimate, expected, sure=0.02):
    """Within the standard errors, where these can be trusted: many draws count."""
    trusted = estimate.ess > sure * estimate.num_samples
    assert trusted.float().mean() > 0.8
    scores = (estimate.log_evidence - expected).double() / (estimate.standard_error + 2e-5)  # and float32's rounding
    assert scores[trusted].abs().max() < SIGMAS


# --- Right -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_the_exact_evidence_within_its_standard_error(kind):
    vae = vae_of(kind)
    assert_agree(pv.log_evidence(vae.model, vae.guide, X, num_samples=20_000), exact.log_evidence(vae.model, X))


def test_two_latent_sites_of_a_users_own_pair_in_another_order():
    assert_agree(pv.log_evidence(two_sites_model, two_sites_guide, Y, num_samples=20_000), TWO_SITES_EVIDENCE)


def test_several_data_tensors_go_to_both():
    def model(inputs, targets):
        with pyro.plate("rows", len(inputs)):
            z = pyro.sample("z", dist.Normal(inputs, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=targets)

    def guide(inputs, targets):
        with pyro.plate("rows", len(inputs)):
            pyro.sample("z", dist.Normal((inputs + targets) / 2, 0.9))

    estimate = pv.log_evidence(model, guide, X[:, 0], X[:, 1], num_samples=20_000, plate="rows")
    assert_agree(estimate, dist.Normal(X[:, 0], 2**0.5).log_prob(X[:, 1]))


@pytest.mark.parametrize("num_samples", [1, 2, 50])
def test_of_the_exact_posterior_each_weight_is_p_of_x(num_samples):
    estimate = pv.log_evidence(*EXACT, WIDE, num_samples=num_samples)
    torch.testing.assert_close(estimate.log_evidence, conjugate_evidence(WIDE), rtol=0, atol=1e-9)
    torch.testing.assert_close(estimate.ess, torch.full((20,), float(num_samples)).double(), rtol=1e-9, atol=0)
    assert num_samples == 1 or (estimate.standard_error < 1e-4).all()


def test_the_exact_posterior_that_the_package_gives_is_one():
    vae = vae_of("linear 8-D").double()
    posterior = exact.posterior(vae.model, X.double())

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior)

    estimate = pv.log_evidence(vae.model, guide, X.double(), num_samples=3)
    torch.testing.assert_close(estimate.log_evidence, exact.log_evidence(vae.model, X.double()), rtol=0, atol=1e-8)
    assert (estimate.ess > 3 - 1e-6).all()


# --- Captured --------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """What is captured, replayed as it is: in seconds, and whatever the compiler does."""
    made, original = [], Graph.__init__
    monkeypatch.setattr(Graph, "__init__", lambda self, *args: made.append(self) or original(self, *args))
    monkeypatch.setattr(Graph, "compile", lambda self, inputs: None)
    monkeypatch.setattr(importance_sampling, "_BUDGET", 20 * 64 * 10)  # ten draws of each datum at once
    return made


def assert_same(found, expected, rtol=1e-5):
    for name in ("log_evidence", "ess"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", KINDS)
def test_captured_it_is_the_same(kind, graphs):
    vae = vae_of(kind).double()
    estimates = [
        pv.log_evidence(vae.model, vae.guide, X.double(), num_samples=105, compile=compile) for compile in (False, True)
    ]
    assert len(graphs) == 1  # the last five draws are met once
    assert_same(*estimates, rtol=1e-10)


def test_captured_in_batches_each_with_its_rows(graphs, monkeypatch):
    monkeypatch.setattr(importance_sampling, "_ROWS", 20)
    vae = pv.VAE(
        priors.StandardNormal(1),
        guides.DiagonalNormal(3, 1, networks.with_missing(TANH)),
        likelihoods.Normal(1, 3, TANH, missing=True),
    )
    x = torch.randn(70, 3)
    x[::7, 1] = torch.nan
    estimates = [pv.log_evidence(vae.model, vae.guide, x, num_samples=30, compile=compile) for compile in (False, True)]
    assert len(graphs) == 1
    assert_same(*estimates)


def test_captured_and_compiled_it_is_the_same(monkeypatch):
    monkeypatch.setattr(importance_sampling, "_BUDGET", 20 * 64 * 10)
    vae = vae_of("normal 2-D")
    assert_same(*(pv.log_evidence(vae.model, vae.guide, X, num_samples=100, compile=it) for it in (True, False)))


def test_a_branch_on_data_is_not_captured(graphs):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z if x.sum() > 0 else -z, 1.0), obs=x)

    with pytest.raises(CaptureError, match=r"reads the value of a tensor.*test_importance_sampling.py"):
        pv.log_evidence(model, EXACT[1], Y, num_samples=100, compile=True)


# --- From beneath ----------------------------------------------------------------------------------------------------

REPEATS = 20_000


def repeated(x, pair, num_samples, seed=0):
    """Independent estimates for each datum, ``(len(x), REPEATS)``: data that occur many times, each with its draws."""
    estimate = pv.log_evidence(*pair, x.repeat_interleave(REPEATS, 0), num_samples=num_samples, seed=seed)
    return estimate.log_evidence.double().reshape(len(x), REPEATS)


def assert_mean(draws, expected):
    error = draws.mean(-1) - expected
    assert (error.abs() < SIGMAS * draws.std(-1) / REPEATS**0.5).all()


def test_with_one_draw_its_mean_is_the_elbo_of_a_pencil():
    x = Y[:4]
    z = dist.Normal(0.4 * x, 0.9)
    log_p_x = -0.5 * ((x - z.mean) ** 2 + z.variance) - 0.5 * math.log(2 * math.pi)
    kl = 0.5 * (z.variance + z.mean**2 - 1 - z.variance.log())
    assert_mean(repeated(x, WIDER, 1), log_p_x - kl)


@pytest.mark.parametrize("kind", ["normal", "bernoulli", "gumbel"])
def test_with_one_draw_its_mean_is_the_exact_elbo(kind):
    vae, x = vae_of(kind), X[:3]
    expected = exact.elbo(vae.model, vae.guide, x)
    assert_mean(repeated(x, (vae.model, vae.guide), 1), expected)


def test_it_grows_with_the_number_of_draws_and_stays_below_the_truth():
    x = Y[:4]
    draws = {count: repeated(x, WIDER, count, seed=count).mean(0) for count in (1, 2, 5, 20)}
    means = {count: values.mean() for count, values in draws.items()}
    errors = {count: values.std() / REPEATS**0.5 for count, values in draws.items()}
    for fewer, more in ((1, 2), (2, 5), (5, 20)):
        assert means[more] - means[fewer] > SIGMAS * (errors[more] ** 2 + errors[fewer] ** 2) ** 0.5
    for count, mean in means.items():
        assert mean < conjugate_evidence(x).mean() - SIGMAS * errors[count]


def test_its_exponential_is_unbiased_with_few_draws():
    x = Y[:4]
    for count in (1, 3):
        assert_mean(repeated(x, WIDER, count).exp(), conjugate_evidence(x).exp())


# --- Honest ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [WIDER, conjugate(0.5, 1.2)], ids=["shifted", "wider"])
def test_its_standard_error_is_its_spread(pair):
    x, repeats = Y[:4], 2000
    estimate = pv.log_evidence(*pair, x.repeat_interleave(repeats), num_samples=500)
    assert (estimate.ess > 0.3 * 500).all()
    spread = estimate.log_evidence.double().reshape(4, repeats).std(-1)
    told = (estimate.standard_error.double() ** 2).reshape(4, repeats).mean(-1) ** 0.5
    # A standard deviation of 2000 numbers is known to 1 in 63; the delta method and the tails of 500 weights add 2 %.
    assert ((spread / told - 1).abs() < SIGMAS / (2 * repeats) ** 0.5 + 0.02).all()


def test_the_effective_number_of_draws_is_between_1_and_all():
    for kind in KINDS:
        vae = vae_of(kind)
        estimate = pv.log_evidence(vae.model, vae.guide, X, num_samples=100)
        assert (estimate.ess >= 1 - 1e-5).all()
        assert (estimate.ess <= 100 * (1 + 1e-5)).all()


def test_the_effective_number_of_draws_is_that_of_a_pencil():
    """E[w]^2 / E[w^2] of a normal posterior under a wider normal guide at the same place: sqrt(2 r - 1) / r."""
    ratio = 1.2**2 / 0.5
    estimate = pv.log_evidence(*conjugate(0.5, 1.2), Y, num_samples=50_000)
    share = (2 * ratio - 1) ** 0.5 / ratio
    torch.testing.assert_close(estimate.ess / 50_000, torch.full((20,), share), rtol=0.02, atol=0)


def test_a_guide_that_is_too_narrow_confesses():
    """It misses most of the posterior: the estimate is too low by more than its error tells, and few draws count."""
    estimate = pv.log_evidence(*conjugate(0.5, 0.05), Y, num_samples=1000)
    assert (estimate.ess < 0.3 * 1000).all()
    scores = (estimate.log_evidence - conjugate_evidence(Y)) / estimate.standard_error
    assert scores.median() < -3


def test_one_draw_knows_nothing_of_its_error():
    estimate = pv.log_evidence(*WIDER, Y, num_samples=1)
    torch.testing.assert_close(estimate.ess, torch.ones(20))
    assert estimate.standard_error.isnan().all()


def test_its_khat_is_that_of_all_its_weights_whatever_the_chunks(monkeypatch):
    """Only the running top of the weights is kept."""
    log_weights, kept = importance_sampling._log_weights, []

    def recording(model, guide, count, *data):
        kept.extend(log_weights(model, guide, count, *data))
        return kept[-1:]

    monkeypatch.setattr(importance_sampling, "_log_weights", recording)
    for budget in (20 * 64 * 17, 20 * 64 * 400, 10**9):
        kept.clear()
        monkeypatch.setattr(importance_sampling, "_BUDGET", budget)
        estimate = pv.log_evidence(*conjugate(0.5, 0.5), Y, num_samples=1000)
        torch.testing.assert_close(estimate.khat, pareto_shape(torch.cat(kept)).float(), rtol=0, atol=1e-6)


def test_its_khat_is_that_of_the_law_of_its_weights():
    """A normal posterior of variance v under a normal of variance s < v: the tail of w has shape 1 - s/v."""
    for ratio in (0.1, 0.6):
        estimate = pv.log_evidence(*conjugate(0.5, (0.5 * ratio) ** 0.5), Y, num_samples=100_000)
        assert abs(float(estimate.khat.mean()) - (1 - ratio)) < 0.15
        assert estimate.unreliable.float().mean().round() == (1 - ratio > 0.7)
    assert not pv.log_evidence(*WIDER, Y, num_samples=5000).unreliable.any()


def test_the_bias_of_the_logarithm_is_corrected():
    """What is left of it is of the next order."""
    x, repeats = Y[:4], 5000
    estimate = pv.log_evidence(*conjugate(0.5, 2.0), x.repeat_interleave(repeats), num_samples=10)
    plain, corrected = (
        values.double().reshape(4, repeats).mean(1) - conjugate_evidence(x.double())
        for values in (estimate.log_evidence, estimate.bias_corrected)
    )
    assert (plain < -0.05).all()
    assert (corrected.abs() < 0.4 * plain.abs()).all()


def test_of_an_exact_guide_khat_is_minus_infinity_and_of_few_draws_it_is_unknown():
    estimate = pv.log_evidence(*EXACT, Y, num_samples=200)
    assert (estimate.khat == -math.inf).all()
    assert not estimate.unreliable.any()
    few = pv.log_evidence(*EXACT, Y, num_samples=20)
    assert few.khat.isnan().all()
    assert few.unreliable.all()


def test_printed_it_says_what_it_comes_to():
    found = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    khat = torch.tensor([0.1, 0.6, math.nan, -math.inf])
    shown = str(pv.Evidence(found, torch.full((4,), 50.0), khat, 100)).splitlines()
    assert shown == [
        "log p(x), in expectation at least -2.500 nats per datum",
        "standard error 0.645 over 4 data, of it 0.050 from 100 draws each",
        "median ess 50.0 of 100; k̂ above 0.50 for 50.0 % of the data",
    ]
    assert "nan" in str(pv.Evidence(found[:1], torch.ones(1), khat[:1], 1))


def test_progress_is_shown_if_asked_for(capsys):
    pv.log_evidence(*WIDER, Y, num_samples=5)
    pv.log_evidence(*WIDER, Y, num_samples=5, progress=False)
    assert capsys.readouterr().err == ""
    pv.log_evidence(*WIDER, Y, num_samples=5, progress=True)
    assert "100%" in capsys.readouterr().err


# --- Draws, seeds and memory -----------------------------------------------------------------------------------------


def test_shapes_types_and_gradients():
    for x in (Y, WIDE):
        estimate = pv.log_evidence(*WIDER, x, num_samples=7)
        assert estimate.num_samples == 7
        for values in (estimate.log_evidence, estimate.ess, estimate.standard_error):
            assert (values.shape, values.dtype, values.requires_grad) == ((20,), x.dtype, False)
    vae = vae_of("normal")
    pv.log_evidence(vae.model, vae.guide, X, num_samples=7)
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_one_seed_gives_the_same_numbers_and_another_other_ones():
    first, again, other = (
        pv.log_evidence(*WIDER, Y, num_samples=5, seed=seed).log_evidence for seed in (0, 0, 1)
    )  # fmt: skip
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()


def test_random_streams_parameters_and_validation_are_as_before(random_states):
    vae = vae_of("gumbel")
    vae.register()
    before, stored = random_states(), {name: value.clone() for name, value in pyro.get_param_store().items()}
    with pyro.validation_enabled(False):
        pv.log_evidence(vae.model, vae.guide, X, num_samples=50)
        assert not torch.distributions.Distribution._validate_args
    assert random_states() == before
    after = dict(pyro.get_param_store().items())
    assert after.keys() == stored.keys()
    assert all(torch.equal(after[name], value) for name, value in stored.items())


@pytest.mark.parametrize(
    "budget", [1, 20, 3 * 64 * len(Y), 10**9], ids=["one by one", "one by one too", "by three", "at once"]
)
def test_chunks_are_of_one_law(monkeypatch, budget):
    monkeypatch.setattr(importance_sampling, "_BUDGET", budget)
    sizes = []
    log_weights = importance_sampling._log_weights

    def recording(model, guide, count, *data):
        sizes.append(count)
        return log_weights(model, guide, count, *data)

    monkeypatch.setattr(importance_sampling, "_log_weights", recording)
    estimate = pv.log_evidence(*WIDER, Y, num_samples=1000)
    assert sum(sizes) == 1000
    assert max(sizes) == {3 * 64 * len(Y): 3, 10**9: 1000}.get(budget, 1)
    assert_agree(estimate, conjugate_evidence(Y))
    exactly = pv.log_evidence(*EXACT, WIDE, num_samples=10)
    torch.testing.assert_close(exactly.log_evidence, conjugate_evidence(WIDE), rtol=0, atol=1e-9)
    torch.testing.assert_close(exactly.ess, torch.full((20,), 10.0).double(), rtol=1e-9, atol=0)


def test_a_wide_network_on_narrow_data_does_not_get_all_draws_at_once(monkeypatch):
    monkeypatch.setattr(importance_sampling, "_BUDGET", 64 * len(X) * 50)
    vae = pv.VAE(
        priors.StandardNormal(1), guides.DiagonalNormal(3, 1, TANH), likelihoods.Normal(1, 3, networks.mlp([256]))
    )
    hidden = []
    for module in vae.decoder.modules():
        module.register_forward_hook(lambda module, inputs, output: hidden.append(inputs[0].shape))
    pv.log_evidence(vae.model, vae.guide, X, num_samples=1000)
    assert (20, 256) in {tuple(shape[-2:]) for shape in hidden}
    assert max(shape[0] for shape in hidden if len(shape) == 3) == 50


def test_draws_of_a_chunk_are_new_ones(monkeypatch):
    """Chunks that repeated each other's draws would leave the spread of one chunk."""
    monkeypatch.setattr(importance_sampling, "_BUDGET", 20 * 64 * 100)
    estimate = pv.log_evidence(*WIDER, Y, num_samples=100 * 100)
    error = (estimate.log_evidence - conjugate_evidence(Y)).double()
    one_chunk = estimate.standard_error.double() * 10
    assert (error / one_chunk).square().mean() < 0.1


def test_evidence_far_below_what_a_float_holds():
    """log p(x) of about -1e5: weights are added as logarithms."""
    far = torch.tensor([300.0, 400.0, 500.0], dtype=torch.float64)
    estimate = pv.log_evidence(*EXACT, far, num_samples=10)
    torch.testing.assert_close(estimate.log_evidence, conjugate_evidence(far), rtol=1e-9, atol=0)
    torch.testing.assert_close(estimate.ess, torch.full((3,), 10.0).double(), rtol=1e-6, atol=0)


def test_a_guide_marked_for_enumeration_is_drawn_from():
    vae = vae_of("bernoulli")
    estimate = pv.log_evidence(vae.model, config_enumerate(vae.guide), X, num_samples=5000)
    assert_agree(estimate, exact.log_evidence(vae.model, X))


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [0, -1, 2.5, True])
def test_no_number_of_draws_is_refused(num_samples):
    with pytest.raises(ValueError, match=rf"`num_samples` must be a positive integer.*got {num_samples}"):
        pv.log_evidence(*WIDER, Y, num_samples=num_samples)


def test_soft_targets_have_no_evidence():
    vae = pv.VAE(
        priors.StandardNormal(1),
        guides.DiagonalNormal(3, 1, TANH),
        likelihoods.Bernoulli(1, 3, TANH, soft_targets=True),
    )
    with pytest.raises(ValueError, match=r"the likelihood of \['x'\] is not normalised"):
        pv.log_evidence(vae.model, vae.guide, torch.rand(5, 3))


def test_a_guide_of_other_latents_is_refused():
    with pytest.raises(ValueError, match=r"guide: its latents \['z'\] are not those of the model, \['first', 'second'"):
        pv.log_evidence(two_sites_model, WIDER[1], Y)
    with pytest.raises(ValueError, match=r"guide: its latents .* are not those of the model"):
        pv.log_evidence(WIDER[0], AutoNormal(WIDER[0]), Y)


def test_a_guide_of_another_shape_is_refused():
    vae = vae_of("normal 2-D")

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"guide: site 'z' has event shape \(3,\), and the model \(2,\)"):
        pv.log_evidence(vae.model, guide, X)


def test_a_point_of_a_continuous_latent_is_refused():
    """Its weights would be log p(x, z), and no bound of anything."""
    guide = AutoDelta(WIDER[0])
    pv.fit(WIDER[0], guide, Y, epochs=1)
    with pytest.raises(ValueError, match=r"guide: its latent 'z' is a point \(Delta, as in AutoDelta\), without a"):
        pv.log_evidence(WIDER[0], guide, Y)


def test_a_point_of_a_discrete_latent_is_a_law_like_any_other():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta((x > 0.5).float()))

    z = (Y > 0.5).float()
    expected = dist.Bernoulli(0.3).log_prob(z) + dist.Normal(z, 1.0).log_prob(Y)
    torch.testing.assert_close(pv.log_evidence(model, guide, Y, num_samples=3).log_evidence, expected)


MASKS = {
    "by handler": (poutine.mask(mask=torch.arange(20) % 2 == 0), lambda q: q),
    "of the distribution": (nullcontext(), lambda q: q.mask(False)),
    "inside an event": (nullcontext(), lambda q: q.mask(torch.arange(20) % 2 == 0).expand([20]).to_event(0)),
}


@pytest.mark.parametrize("estimate", [pv.log_evidence, exact.elbo, exact.kl])
@pytest.mark.parametrize("mask", MASKS)
def test_a_masked_latent_of_the_guide_is_refused_and_named(mask, estimate):
    """Its draws are the same, and their density is left out: weights would be anything."""
    handler, masked = MASKS[mask]

    def guide(x):
        with pyro.plate("data", len(x)), handler:
            pyro.sample("z", masked(dist.Normal(0.4 * x, 0.9)))

    with pytest.raises(ValueError, match=r"guide: its latent 'z' is masked"):
        estimate(WIDER[0], guide, Y)


def test_global_latents_are_refused():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="model: site 'mean' is in the plates"):
        pv.log_evidence(model, guide, Y)


def test_dropout_is_refused():
    vae = pv.VAE(
        priors.StandardNormal(1),
        guides.DiagonalNormal(3, 1, TANH),
        likelihoods.Normal(1, 3, lambda i, o: nn.Sequential(nn.Linear(i, 50), nn.Dropout(0.5), nn.Linear(50, o))),
    )
    with pytest.raises(ValueError, match=r"vae\.eval\(\)"):
        pv.log_evidence(vae.model, vae.guide, X)
    vae.eval()
    assert pv.log_evidence(vae.model, vae.guide, X, num_samples=10).log_evidence.isfinite().all()


def test_a_covariate_that_the_pair_holds_itself_stays_with_its_row():
    """Data sorted by it: the first rows of each batch look as if they had nothing of their own."""
    group = torch.arange(300) // 150
    x = 5.0 * group + 2**0.5 * torch.randn(300, generator=torch.Generator().manual_seed(0))

    def model(x):
        with pyro.plate("data", len(x)) as rows:
            z = pyro.sample("z", dist.Normal(5.0 * group[rows], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)) as rows:
            pyro.sample("z", dist.Normal((x + 5.0 * group[rows]) / 2, 0.5**0.5))

    truth = dist.Normal(5.0 * group, 2**0.5).log_prob(x)
    torch.testing.assert_close(pv.log_evidence(model, guide, x, num_samples=30).log_evidence, truth)
    found = pv.inspect(model, guide, x, num_samples=30, max_rows=100, max_refined=20, num_simulations=100)
    torch.testing.assert_close(found.gap.log_evidence, truth)
    assert "Hand covariates over as data" in found.skipped["calibration"]
