"""Many rows: what has a value for each row is computed in batches of rows, and equals that of all rows at once."""

import json
import subprocess
import sys
from pathlib import Path

import large_data
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import bernoulli, gaussian, guide_of, model_of, record_traces
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from pyro_vae import exact, guides, likelihoods, model_guide, networks, priors
from pyro_vae.diagnostics import decomposition, inference_gap
from pyro_vae.model_guide import ModelGuide
from pyro_vae.training import elbo_evaluator

N, FEW = 50, 16


@pytest.fixture
def few_rows(monkeypatch):
    """Let at most ``FEW`` rows run together."""

    def use():
        monkeypatch.setattr(model_guide, "_BUDGET", 64 * FEW)

    return use


def two_classes(x):
    """Two discrete latents of each row, of which the second one depends on the first."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * k))
        pyro.sample("x", dist.Normal((k + 2.0 * b)[..., None] * torch.ones(2), 1.0).to_event(1), obs=x)


def own_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Categorical(logits=x))
        pyro.sample("b", dist.Bernoulli(logits=x[:, 1]))


def pairs():
    torch.manual_seed(0)
    linear = gaussian(1, 2, decoder=likelihoods.Normal(1, 2, networks.linear()))
    return {"normal": gaussian(1, 2), "bernoulli": bernoulli(2, 2), "linear": linear}


X = torch.randn(N, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["normal", "bernoulli", "linear"])
def test_exact_answers_in_batches_are_those_of_all_rows(few_rows, name):
    vae = pairs()[name]

    def answers():
        args = vae.model, vae.guide, X
        return [exact.log_evidence(vae.model, X), exact.elbo(*args), exact.kl(*args)]

    whole = answers()
    few_rows()
    assert len(ModelGuide.in_batches(vae.model, vae.guide, X)) == 4
    for one, other in zip(whole, answers(), strict=True):
        assert one.shape == (N,)
        torch.testing.assert_close(other, one, rtol=0, atol=3e-4)


def test_several_discrete_latents_are_summed_out_in_batches(few_rows):
    def answers():
        return exact.log_evidence(two_classes, X), exact.kl(two_classes, own_guide, X)

    whole = answers()
    few_rows()
    assert len(ModelGuide.in_batches(two_classes, own_guide, X)) == 4
    for one, other in zip(whole, answers(), strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("name", ["normal", "bernoulli"])
def test_a_posterior_in_batches_is_that_of_all_rows(few_rows, name):
    vae = pairs()[name]
    whole = exact.posterior(vae.model, X)
    few_rows()
    parts = exact.posterior(vae.model, X)
    assert parts.batch_shape == (N,)
    assert str(parts) == str(whole)
    value = whole.sample((7,))
    torch.testing.assert_close(parts.log_prob(value), whole.log_prob(value), rtol=0, atol=3e-4)
    torch.testing.assert_close(parts.log_prob(value[:, :1]), whole.log_prob(value[:, :1]), rtol=0, atol=3e-4)
    torch.testing.assert_close(parts.mean, whole.mean, rtol=0, atol=1e-3)
    if whole.has_enumerate_support:
        torch.testing.assert_close(parts.probs, whole.probs)
    draws = parts.sample((4000,)).double()
    error = (whole.sample((4000,)).double().var(0) / 4000).sqrt()
    assert ((draws.mean(0) - whole.mean).abs() < 5.5 * error + 1e-3).all()


def test_modules_are_as_they_were_after_a_posterior_in_batches(few_rows):
    vae = pairs()["normal"]
    few_rows()
    posterior = exact.posterior(vae.model, X)
    assert posterior.mean.shape == (N, 1)
    assert all(module.training for module in vae.modules())


def test_rows_that_depend_on_others_run_together(few_rows):
    few_rows()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.tanh() + x.mean(), 1.0), obs=x)

    assert len(ModelGuide.in_batches(model, None, X[:, 0])) == 1
    assert len(ModelGuide.in_batches(model_of(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0)), None, X[:, 0])) > 1


def test_errors_count_rows_among_all_rows(few_rows):
    model = model_of(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z.sin(), 1.0))
    x = X[:, 0].clone()
    x[37] = 1e6  # whose last digit is far more than the noise
    few_rows()
    with pytest.raises(exact.QuadratureError, match="datum 37 "):
        exact.log_evidence(model, x)
    x[37] = torch.nan
    with pytest.raises(ValueError, match="row 37"):
        exact.log_evidence(model, x)


def test_rows_of_a_data_set_are_read_in_batches(few_rows):
    vae = pairs()["normal"]
    few_rows()
    data = torch.utils.data.TensorDataset(X)
    torch.testing.assert_close(exact.log_evidence(vae.model, data), exact.log_evidence(vae.model, X))
    read = []

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return N

        def __getitem__(self, row):
            read.append(row)
            return X[row]

    torch.testing.assert_close(exact.log_evidence(vae.model, Rows()), exact.log_evidence(vae.model, X))
    assert set(read) == set(range(N))
    assert pv.exact.posterior(vae.model, Rows()).mean.shape == (N, 1)


NUMBERS = ("elbo", "distortion", "rate", "mutual_information", "marginal_kl")


def agree(ours, theirs, sure=5.5):
    assert abs(ours.value - theirs.value) < sure * (ours.standard_error**2 + theirs.standard_error**2) ** 0.5 + 1e-5


def test_a_decomposition_in_batches_agrees_with_that_of_all_rows(few_rows):
    vae = pairs()["normal"]
    whole = pv.decompose(vae.model, vae.guide, X, num_samples=50)
    few_rows()
    parts = pv.decompose(vae.model, vae.guide, X, num_samples=50)
    assert (parts.num_data, parts.num_compared) == (N, N)
    for name in NUMBERS:
        agree(getattr(parts, name), getattr(whole, name))
        errors = getattr(parts, name).standard_error, getattr(whole, name).standard_error
        assert errors[0] == pytest.approx(errors[1], rel=0.3)
    for ours, theirs in zip(parts.population_information, whole.population_information, strict=True):
        agree(ours, theirs)
    units, expected = parts.units["z"], whole.units["z"]
    torch.testing.assert_close(units.rate, expected.rate)
    torch.testing.assert_close(units.activity, expected.activity)
    torch.testing.assert_close(units.information, expected.information, rtol=0, atol=0.1)


def test_sums_over_states_in_batches_decompose_as_those_of_all_rows(few_rows):
    vae = pairs()["bernoulli"]
    whole = pv.decompose(vae.model, vae.guide, X)
    few_rows()
    parts = pv.decompose(vae.model, vae.guide, X)
    for name in NUMBERS:
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), abs=1e-5)
    for ours, theirs in zip(parts.population_information, whole.population_information, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    torch.testing.assert_close(parts.units["z"].information, whole.units["z"].information, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.units["z"].activity, whole.units["z"].activity)


def test_the_information_from_some_rows_is_that_of_all_with_its_error(few_rows, monkeypatch):
    """The mixture is of all rows: only the rows whose draws are compared with it are chosen, in each seed others."""
    torch.manual_seed(0)
    vae = pv.VAE(
        priors.StandardNormal(1),
        guides.DiagonalNormal(2, 1, networks.mlp([8])),
        likelihoods.Normal(1, 2, networks.linear()),
    )
    with torch.no_grad():
        vae.encoder.network[-1].weight.mul_(3)
    x = torch.randn(400, 2) * torch.linspace(0.2, 3, 400)[:, None]
    whole = pv.decompose(vae.model, vae.guide, x, num_samples=200)
    monkeypatch.setattr(decomposition, "_MAX_PAIRS", 1)
    monkeypatch.setattr(decomposition, "_MIN_COMPARED", 60)
    found = [pv.decompose(vae.model, vae.guide, x, num_samples=4, seed=seed) for seed in range(60)]
    assert found[0].num_compared == 60
    assert "60 data were compared with q(z) of all data" in found[0]._table().note
    for name in ("mutual_information", "marginal_kl"):
        values = torch.tensor([getattr(nats, name).value for nats in found])
        error = (values.var() / 60 + getattr(whole, name).standard_error ** 2).sqrt()
        assert abs(values.mean() - getattr(whole, name).value) < 4.5 * error
        reported = torch.tensor([getattr(nats, name).standard_error for nats in found]).square().mean().sqrt()
        assert 0.65 < (reported / values.std()).item() < 1.5
    for nats in found:
        assert nats.rate.value == pytest.approx(nats.mutual_information.value + nats.marginal_kl.value, abs=1e-9)
    for which in (0, 1):
        values = torch.tensor([nats.population_information[which].value for nats in found])
        error = (values.var() / 60).sqrt() + 1e-3
        assert abs(values.mean() - whole.population_information[which].value) < 4.5 * error


def test_a_prior_that_differs_in_a_later_batch_is_found(few_rows):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal((x[:, 1] > 5).float(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0] / 2, 0.7))

    x = X.clone()
    x[40, 1] = 9.0
    whole = pv.decompose(model, guide, x, num_samples=100)
    few_rows()
    parts = pv.decompose(model, guide, x, num_samples=100)
    assert parts.why_no_information == "there is no single prior p(z), since that of 'z' depends on x"
    assert parts.why_no_information == whole.why_no_information
    assert parts.num_data == N
    for name in ("elbo", "distortion", "rate"):
        agree(getattr(parts, name), getattr(whole, name))
        assert getattr(parts, name).standard_error == pytest.approx(getattr(whole, name).standard_error, rel=0.3)


def test_the_gap_of_many_rows_is_that_of_evenly_spaced_ones(few_rows, monkeypatch):
    vae = pairs()["linear"]
    few_rows()
    monkeypatch.setattr(inference_gap, "_BUDGET", 64 * 32 * 10)
    found = pv.inference_gap(vae.model, vae.guide, X, steps=3)
    assert found.rows.tolist() == list(range(0, N, 5))
    torch.testing.assert_close(found.log_evidence, exact.log_evidence(vae.model, X)[found.rows])
    torch.testing.assert_close(found.elbo, exact.elbo(vae.model, vae.guide, X)[found.rows], rtol=0, atol=1e-3)


def test_many_rows_of_which_each_has_its_own_parameters_are_not_refined(few_rows, monkeypatch):
    model = model_of(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))

    def guide(x):
        loc = pyro.param("loc", torch.linspace(0, 1, N))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    few_rows()
    monkeypatch.setattr(inference_gap, "_BUDGET", 64 * 32 * 10)
    found = pv.inference_gap(model, guide, X[:, 0])
    assert found.approximation is None
    assert "all 50 of them are too many to refine at once, more than 10" in found.why_no_split
    torch.testing.assert_close(found.gap, exact.kl(model, guide, X[:, 0]), rtol=0, atol=1e-3)


def test_particles_count_in_the_rows_that_are_evaluated_together(few_rows, monkeypatch):
    vae, traces = pairs()["normal"], []
    model = record_traces(vae.model, traces)
    elbo = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    whole = pv.evaluate(model, vae.guide, X, elbo=elbo)
    monkeypatch.setattr(elbo_evaluator, "_BUDGET", 200 * 4 * 5)  # five rows of four hidden units
    few_rows()
    traces.clear()
    parts = pv.evaluate(model, vae.guide, X, elbo=elbo)
    sizes = [trace.nodes["x"]["value"].shape[0] for trace in traces if trace.nodes["x"]["fn"].batch_shape[0] == 200]
    assert sizes[2:] == [5] * 10  # after the runs on four and eight rows
    exactly = exact.elbo(vae.model, vae.guide, X).mean().item()
    for found in (whole, parts):
        assert found["elbo"] == pytest.approx(exactly, abs=0.1)


def test_a_run_on_all_rows_is_not_needed_for_batches(few_rows):
    vae, traces = pairs()["normal"], []
    few_rows()
    pv.evaluate(record_traces(vae.model, traces), record_traces(vae.guide, traces), X)
    assert max(len(trace.nodes["z"]["value"]) for trace in traces) < 2 * FEW
    traces.clear()
    pv.fit(record_traces(vae.model, traces), record_traces(vae.guide, traces), X, epochs=1, batch_size=10)
    assert max(len(trace.nodes["z"]["value"]) for trace in traces) < 2 * FEW


def test_a_calibration_simulates_rows_like_those_of_all_data(few_rows):
    vae = pairs()["normal"]
    whole = pv.calibrate(vae.model, vae.guide, X, num_simulations=100)
    few_rows()
    few = pv.calibrate(vae.model, vae.guide, X, num_simulations=100)
    assert torch.equal(few.ranks, whole.ranks)
    torch.testing.assert_close(few.elbo_corrections.variance_ratio, whole.elbo_corrections.variance_ratio)


def test_a_row_outside_of_the_support_in_a_later_batch_makes_it_no_bound(few_rows):
    model = model_of(dist.Normal(0.0, 1.0), lambda z: dist.Bernoulli(logits=z, validate_args=False))
    guide, traces = guide_of(lambda x: dist.Normal(x - 0.5, 1.0)), []
    x = (X[:, 0] > 0).float()
    few_rows()
    assert "elbo" in pv.evaluate(model, guide, x)
    x[40] = 0.5
    found = pv.evaluate(record_traces(model, traces), guide, x)
    assert "surrogate" in found
    assert "such as in row 40" in found.why_no_bound
    assert max(len(trace.nodes["z"]["value"]) for trace in traces) < 2 * FEW


def test_rows_that_share_a_quadrature_are_refused_with_the_memory_that_they_need(few_rows, monkeypatch):
    model = model_of(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z.tanh(), 1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.linspace(-1, 1, N), 1.0))

    whole = exact.elbo(model, guide, X[:, 0])
    few_rows()
    torch.testing.assert_close(exact.elbo(model, guide, X[:, 0]), whole)
    monkeypatch.setattr(exact.inference, "_MAX_ROWS", {1: 20})
    with pytest.raises(ValueError, match=r"at most 20 rows where rows differ by their places.* got 50, .* 5 GiB"):
        exact.elbo(model, guide, X[:, 0])


def measured(function, program, rows, folder):
    """The megabytes above those of the data, and the processor time, of a function on so many rows."""
    script = Path(__file__).parent / "large_data.py"
    command = [sys.executable, "-W", "ignore", str(script), function, program, str(rows), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the memory is read from /proc")
@pytest.mark.parametrize(("function", "program"), [
    *((function, "normal, 2 columns") for function in large_data.FUNCTIONS),
    *(("evaluate", program) for program in list(large_data.PROGRAMS)[1:]),
    *(("log_evidence", program) for program in list(large_data.PROGRAMS)[1:]),
    ("fit", "global latent"), ("fit", "data set"), ("fit", "mapped file"),
    ("exact.log_evidence", "mixture"), ("exact.posterior", "mixture"), ("decompose", "mixture"),
    ("decompose", "table"), ("decompose", "global latent"), ("inspect", "table"),
])  # fmt: skip
def test_a_million_rows_take_two_gibibytes_and_ten_times_the_time_of_a_tenth(function, program, tmp_path):
    tenth, all_rows = (measured(function, program, rows, tmp_path) for rows in (100_000, 1_000_000))
    assert all_rows["megabytes"] < 2048
    assert all_rows["seconds"] < 13 * tenth["seconds"]
