"""Importance sampling of log p(x) against exact answers: estimates, bounds, errors and chunks.

Models and guides that it refuses are in the tests of ``exact/model_density`` and ``exact/guide_density``.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_cases import KINDS, TANH, conjugate, conjugate_evidence, vae_of
from pairs import gaussian, guide_of, model_of
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta

import pyro_vae as pv
from pyro_vae import exact, guides, likelihoods, model_guide, networks
from pyro_vae.compilation.graph import CaptureError, Graph
from pyro_vae.evidence import importance_sampling
from pyro_vae.evidence.pareto import pareto_shape
from pyro_vae.exact.guide_density import GuideDensity

SIGMAS = 5  # 4.5 is a failure probability of 7e-6, and there are tens of data in a test
X = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
Y = X[:, 0]
WIDE = Y.double()
EXACT = conjugate(0.5, 0.5**0.5)
WIDER = conjugate(0.4, 0.9)


def assert_agree(estimate, expected):
    """Errors are within the standard errors, where the effective number of draws is large."""
    reliable = estimate.ess > 0.02 * estimate.num_samples
    assert reliable.float().mean() > 0.8
    scores = (estimate.log_evidence - expected).double() / (estimate.standard_error + 2e-5)  # rounding of float32
    assert scores[reliable].abs().max() < SIGMAS


def assert_exact(estimate, x, tolerance=1e-9):
    """All weights are p(x)."""
    count = torch.full((len(x),), float(estimate.num_samples)).double()
    torch.testing.assert_close(estimate.log_evidence, conjugate_evidence(x), rtol=1e-9, atol=tolerance)
    torch.testing.assert_close(estimate.ess, count, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_the_exact_evidence_within_its_standard_error(kind):
    vae = vae_of(kind)
    assert_agree(pv.log_evidence(vae.model, vae.guide, X, num_samples=20_000), exact.log_evidence(vae.model, X))


def test_the_guide_may_draw_two_latents_in_another_order():
    """It is wider than the posterior, so that weights are bounded."""

    def model(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(1.0, 1.0))
            second = pyro.sample("second", dist.Normal(first, 0.5))
            pyro.sample("x", dist.Normal(second, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            second = pyro.sample("second", dist.Normal(0.8 * x + 0.2, 0.7))
            pyro.sample("first", dist.Normal(0.7 * second + 0.3, 0.6))

    assert_agree(pv.log_evidence(model, guide, Y, num_samples=20_000), dist.Normal(1.0, 1.5**0.5).log_prob(Y))


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
def test_all_weights_of_the_exact_posterior_are_p_of_x(num_samples):
    estimate = pv.log_evidence(*EXACT, WIDE, num_samples=num_samples)
    assert_exact(estimate, WIDE)
    assert num_samples == 1 or (estimate.standard_error < 1e-4).all()
    far = torch.tensor([300.0, 400.0, 500.0], dtype=torch.float64)  # log p(x) is about -1e5: logarithms are added
    assert_exact(pv.log_evidence(*EXACT, far, num_samples=10), far, tolerance=0)


def test_the_weights_of_an_exact_posterior_of_the_package_are_p_of_x():
    model, x = vae_of("linear 8-D").double().model, X.double()
    posterior = exact.posterior(model, x)
    estimate = pv.log_evidence(model, guide_of(lambda x: posterior), x, num_samples=3)
    torch.testing.assert_close(estimate.log_evidence, exact.log_evidence(model, x), rtol=0, atol=1e-8)
    assert (estimate.ess > 3 - 1e-6).all()


@pytest.fixture
def graphs(monkeypatch):
    """The captured graphs, which run without the compiler: that takes seconds."""
    made, original = [], Graph.__init__
    monkeypatch.setattr(Graph, "__init__", lambda self, *args: made.append(self) or original(self, *args))
    monkeypatch.setattr(Graph, "compile", lambda self, inputs: None)
    monkeypatch.setattr(importance_sampling, "_BUDGET", 20 * 64 * 10)  # ten draws of each datum at once
    return made


def assert_same(estimate, expected, rtol=1e-5):
    for name in ("log_evidence", "ess"):
        torch.testing.assert_close(getattr(estimate, name), getattr(expected, name), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", KINDS)
def test_captured_weights_give_the_same_estimate(kind, graphs):
    vae, x = vae_of(kind).double(), X.double()
    estimates = [pv.log_evidence(vae.model, vae.guide, x, num_samples=105, compile=it) for it in (False, True)]
    assert len(graphs) == 1  # a second chunk size, of five draws, occurs only once
    assert_same(*estimates, rtol=1e-10)


def test_captured_weights_of_batches_use_the_rows_of_each_batch(graphs, monkeypatch):
    monkeypatch.setattr(importance_sampling, "_ROWS", 20)
    encoder = guides.DiagonalNormal(3, 1, networks.with_missing(TANH))
    vae = gaussian(1, encoder=encoder, decoder=likelihoods.Normal(1, 3, TANH, missing=True))
    x = torch.randn(70, 3)
    x[::7, 1] = torch.nan
    estimates = [pv.log_evidence(vae.model, vae.guide, x, num_samples=30, compile=it) for it in (False, True)]
    assert len(graphs) == 1
    assert_same(*estimates)


def test_many_chunks_are_captured_by_themselves_with_the_same_bits(graphs):
    vae = vae_of("normal 2-D")
    eager, chosen = (pv.log_evidence(vae.model, vae.guide, X, num_samples=205, compile=it) for it in (False, None))
    assert len(graphs) == 1  # of twenty chunks of ten draws; that of five is alone
    assert torch.equal(chosen.log_evidence, eager.log_evidence)
    assert torch.equal(chosen.ess, eager.ess)
    graphs.clear()
    pv.log_evidence(vae.model, vae.guide, X, num_samples=100)
    assert not graphs, "ten chunks do not pay for a capture"


@pytest.mark.integration
def test_compiled_weights_give_the_same_estimate(monkeypatch):
    monkeypatch.setattr(importance_sampling, "_BUDGET", 20 * 64 * 10)
    vae = vae_of("normal 2-D")
    assert_same(*(pv.log_evidence(vae.model, vae.guide, X, num_samples=100, compile=it) for it in (True, False)))


def test_a_branch_on_data_cannot_be_captured(graphs):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z if x.sum() > 0 else -z, 1.0), obs=x)

    with pytest.raises(CaptureError, match=r"reads the value of a tensor .*test_importance_sampling.py"):
        pv.log_evidence(model, EXACT[1], Y, num_samples=100, compile=True)
    eager, chosen = (pv.log_evidence(model, EXACT[1], Y, num_samples=400, compile=it) for it in (False, None))
    assert torch.equal(eager.log_evidence, chosen.log_evidence)


REPEATS = 20_000


def repeated(x, pair, num_samples, seed=0):
    """Independent estimates for each datum, ``(len(x), REPEATS)``: data occur many times, each time with new draws."""
    estimate = pv.log_evidence(*pair, x.repeat_interleave(REPEATS, 0), num_samples=num_samples, seed=seed)
    return estimate.log_evidence.double().reshape(len(x), REPEATS)


def assert_mean(draws, expected):
    error = draws.mean(-1) - expected
    assert (error.abs() < SIGMAS * draws.std(-1) / REPEATS**0.5).all()


@pytest.mark.parametrize("kind", ["normal", "bernoulli", "gumbel"])
def test_the_mean_with_one_draw_is_the_exact_elbo(kind):
    vae, x = vae_of(kind), X[:3]
    assert_mean(repeated(x, (vae.model, vae.guide), 1), exact.elbo(vae.model, vae.guide, x))


def test_the_estimate_grows_with_the_number_of_draws_and_stays_below_the_truth():
    x = Y[:4]
    draws = torch.stack([repeated(x, WIDER, count, seed=count).mean(0) for count in (1, 2, 5, 20)])
    means, errors = draws.mean(1), draws.std(1) / REPEATS**0.5
    assert (means.diff() > SIGMAS * torch.hypot(errors[1:], errors[:-1])).all()
    assert (means < conjugate_evidence(x).mean() - SIGMAS * errors).all()


@pytest.mark.parametrize("count", [1, 3])
def test_the_exponential_is_unbiased_for_few_draws(count):
    x = Y[:4]
    assert_mean(repeated(x, WIDER, count).exp(), conjugate_evidence(x).exp())


@pytest.mark.parametrize("pair", [WIDER, conjugate(0.5, 1.2)], ids=["shifted", "wider"])
def test_the_standard_error_is_the_standard_deviation_of_estimates(pair):
    x, repeats = Y[:4], 2000
    estimate = pv.log_evidence(*pair, x.repeat_interleave(repeats), num_samples=500)
    assert (estimate.ess > 0.3 * 500).all()
    spread = estimate.log_evidence.double().reshape(4, repeats).std(-1)
    expected = (estimate.standard_error.double() ** 2).reshape(4, repeats).mean(-1) ** 0.5
    # The relative error of a standard deviation of 2000 numbers is 1/63; the delta method and the tails add 2 %.
    assert ((spread / expected - 1).abs() < SIGMAS / (2 * repeats) ** 0.5 + 0.02).all()


def test_the_effective_number_of_draws_has_a_closed_form_for_normals():
    """E[w]^2 / E[w^2] for a normal posterior and a wider normal guide with the same mean is sqrt(2 r - 1) / r."""
    ratio = 1.2**2 / 0.5
    estimate = pv.log_evidence(*conjugate(0.5, 1.2), Y, num_samples=50_000)
    share = (2 * ratio - 1) ** 0.5 / ratio
    torch.testing.assert_close(estimate.ess / 50_000, torch.full((20,), share), rtol=0.02, atol=0)
    # A guide that is too narrow misses most of the posterior: the estimate is too low by more than its standard error.
    narrow = pv.log_evidence(*conjugate(0.5, 0.05), Y, num_samples=1000)
    assert (narrow.ess < 0.3 * 1000).all()
    assert ((narrow.log_evidence - conjugate_evidence(Y)) / narrow.standard_error).median() < -3


@pytest.fixture
def chunks(monkeypatch):
    """The log-weights of every chunk."""
    log_weights, chunks = importance_sampling._log_weights, []

    def recording(model, guide, count, *data):
        chunks.extend(log_weights(model, guide, count, *data))
        return chunks[-1:]

    monkeypatch.setattr(importance_sampling, "_log_weights", recording)
    return chunks


@pytest.mark.parametrize("budget", [20 * 64 * 17, 20 * 64 * 400, 10**9])
def test_khat_is_that_of_all_weights_for_any_chunks(monkeypatch, chunks, budget):
    """Only the largest weights so far are stored."""
    monkeypatch.setattr(importance_sampling, "_BUDGET", budget)
    estimate = pv.log_evidence(*conjugate(0.5, 0.5), Y, num_samples=1000, compile=False)
    torch.testing.assert_close(estimate.khat, pareto_shape(torch.cat(chunks)).float(), rtol=0, atol=1e-6)


def test_khat_is_that_of_the_distribution_of_weights():
    """For a normal posterior of variance v and a normal guide of variance s < v, the tail of w has shape 1 - s/v."""
    for ratio in (0.1, 0.6):
        estimate = pv.log_evidence(*conjugate(0.5, (0.5 * ratio) ** 0.5), Y, num_samples=100_000)
        assert abs(float(estimate.khat.mean()) - (1 - ratio)) < 0.15
        assert estimate.unreliable.float().mean().round() == (1 - ratio > 0.7)
    assert not pv.log_evidence(*WIDER, Y, num_samples=5000).unreliable.any()
    exact_guide = pv.log_evidence(*EXACT, Y, num_samples=200)
    assert (exact_guide.khat == -math.inf).all()
    assert not exact_guide.unreliable.any()
    few = pv.log_evidence(*EXACT, Y, num_samples=20)
    assert few.khat.isnan().all()
    assert few.unreliable.all()


def test_the_bias_of_the_logarithm_is_corrected():
    """The remaining bias is of the next order."""
    x, repeats = Y[:4], 5000
    estimate = pv.log_evidence(*conjugate(0.5, 2.0), x.repeat_interleave(repeats), num_samples=10)
    means = (v.double().reshape(4, repeats).mean(1) for v in (estimate.log_evidence, estimate.bias_corrected))
    plain, corrected = (mean - conjugate_evidence(x.double()) for mean in means)
    assert (plain < -0.05).all()
    assert (corrected.abs() < 0.4 * plain.abs()).all()


def test_print_shows_a_summary():
    values, khat = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([0.1, 0.6, math.nan, -math.inf])
    shown = str(pv.Evidence(values, torch.full((4,), 50.0), khat, 100)).splitlines()
    assert shown == [
        "log p(x), in expectation at least -2.500 nats per datum",
        "standard error 0.645 over 4 data, of it 0.050 from 100 draws each",
        "median ess 50.0 of 100; k̂ plus its error above 0.50 for 50.0 % of the data",
    ]
    assert "nan" in str(pv.Evidence(values[:1], torch.ones(1), khat[:1], 1))


def test_progress_is_shown_on_request(capsys):
    pv.log_evidence(*WIDER, Y, num_samples=5)
    pv.log_evidence(*WIDER, Y, num_samples=5, progress=False)
    assert capsys.readouterr().err == ""
    pv.log_evidence(*WIDER, Y, num_samples=5, progress=True)
    assert "100%" in capsys.readouterr().err


def test_shapes_types_and_gradients():
    one = pv.log_evidence(*WIDER, Y, num_samples=1)
    torch.testing.assert_close(one.ess, torch.ones(20))
    assert one.standard_error.isnan().all()
    for x in (Y, WIDE):
        estimate = pv.log_evidence(*WIDER, x, num_samples=7)
        assert estimate.num_samples == 7
        for values in (estimate.log_evidence, estimate.ess, estimate.standard_error):
            assert (values.shape, values.dtype, values.requires_grad) == ((20,), x.dtype, False)
    vae = vae_of("normal")
    pv.log_evidence(vae.model, vae.guide, X, num_samples=7)
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_a_seed_fixes_the_draws_and_nothing_outside_changes(random_states):
    first, again, other = (pv.log_evidence(*WIDER, Y, num_samples=5, seed=seed).log_evidence for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()
    vae = vae_of("gumbel")
    vae.register()
    before, stored = random_states(), {name: value.clone() for name, value in pyro.get_param_store().items()}
    with pyro.validation_enabled(False):
        pv.log_evidence(vae.model, vae.guide, X, num_samples=50)
        assert not torch.distributions.Distribution._validate_args
    assert random_states() == before
    torch.testing.assert_close(dict(pyro.get_param_store().items()), stored, rtol=0, atol=0)


@pytest.mark.parametrize(("budget", "size"), [(1, 1), (20, 1), (3 * 64 * 20, 3), (10**9, 1000)])
def test_chunks_do_not_change_the_distribution(monkeypatch, chunks, budget, size):
    monkeypatch.setattr(importance_sampling, "_BUDGET", budget)
    estimate = pv.log_evidence(*WIDER, Y, num_samples=1000, compile=False)
    sizes = [len(chunk) for chunk in chunks]
    assert (sum(sizes), max(sizes)) == (1000, size)
    assert_agree(estimate, conjugate_evidence(Y))
    assert_exact(pv.log_evidence(*EXACT, WIDE, num_samples=10), WIDE)


def test_a_wide_network_on_narrow_data_does_not_get_all_draws_at_once(monkeypatch):
    monkeypatch.setattr(importance_sampling, "_BUDGET", 64 * len(X) * 50)
    vae, hidden, counts = gaussian(1, decoder=likelihoods.Normal(1, 3, networks.mlp([256]))), [], []
    for module in vae.decoder.modules():
        module.register_forward_hook(lambda module, inputs, output: hidden.append(inputs[0].shape))
    sample = GuideDensity.sample
    monkeypatch.setattr(GuideDensity, "sample", lambda q, count: (counts.append(count), sample(q, count))[1])
    pv.log_evidence(vae.model, vae.guide, X, num_samples=1000)
    assert {len(shape) for shape in hidden} == {2}
    assert max(len(X), *(shape[0] for shape in hidden)) <= 1.5 * len(X)  # rows are compared among others
    assert max(counts) == 50


def test_rows_are_run_in_batches_from_the_first_run_on(monkeypatch):
    vae, x, seen = gaussian(1), torch.randn(400, 3), []
    expected = pv.log_evidence(vae.model, vae.guide, x, num_samples=20)
    for part in (vae.encoder, vae.decoder):
        part.register_forward_pre_hook(lambda part, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(model_guide, "_BUDGET", 64 * 32)
    found = pv.log_evidence(vae.model, vae.guide, x, num_samples=20)
    assert max(seen) <= 128
    torch.testing.assert_close(found.log_evidence, expected.log_evidence)
    x[333, 1] = math.nan
    with pytest.raises(ValueError, match="`data` must hold finite numbers, got nan at row 333"):
        pv.log_evidence(vae.model, vae.guide, x, num_samples=20)


def test_chunks_have_different_draws(monkeypatch):
    """With the same draws in all chunks, the error would be that of one chunk."""
    monkeypatch.setattr(importance_sampling, "_BUDGET", 20 * 64 * 100)
    estimate = pv.log_evidence(*WIDER, Y, num_samples=100 * 100)
    error = (estimate.log_evidence - conjugate_evidence(Y)).double()
    one_chunk = estimate.standard_error.double() * 10
    assert (error / one_chunk).square().mean() < 0.1


def test_a_guide_marked_for_enumeration_is_sampled():
    vae = vae_of("bernoulli")
    estimate = pv.log_evidence(vae.model, config_enumerate(vae.guide), X, num_samples=5000)
    assert_agree(estimate, exact.log_evidence(vae.model, X))


def test_a_point_is_allowed_for_a_discrete_latent_alone():
    """The weights of a continuous one would be log p(x, z), which bounds nothing."""
    point = AutoDelta(WIDER[0])
    pv.fit(WIDER[0], point, Y, epochs=1)
    with pytest.raises(ValueError, match=r"`guide` must have a density .*got a point .* for 'z'"):
        pv.log_evidence(WIDER[0], point, Y)
    model = model_of(dist.Bernoulli(0.3), lambda z: dist.Normal(z, 1.0))
    guide = guide_of(lambda x: dist.Delta((x > 0.5).float()))
    z = (Y > 0.5).float()
    expected = dist.Bernoulli(0.3).log_prob(z) + dist.Normal(z, 1.0).log_prob(Y)
    torch.testing.assert_close(pv.log_evidence(model, guide, Y, num_samples=3).log_evidence, expected)


def test_a_covariate_inside_the_pair_stays_with_its_row():
    """The data are sorted by it, so the first rows of a batch do not show that rows differ."""
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
    assert "Pass covariates as data" in found.skipped["calibration"]
