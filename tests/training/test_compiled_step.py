"""The captured step is the eager one: the same losses and parameters, guards, schedules and refusals."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI as PyroSVI
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from pyro.optim import Adam, ClippedAdam, ExponentialLR
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, objectives, priors, schedules
from pyro_vae.compilation.graph import CaptureError, Graph
from pyro_vae.handlers import WeightKL

TANH = networks.mlp([8], activation=nn.Tanh)
X = pv.datasets.two_gaussians(64, seed=3).x


@pytest.fixture
def uncompiled(monkeypatch):
    """Replay graphs as they are captured: what is tested does not depend on the compiler, and it takes seconds."""
    monkeypatch.setattr(Graph, "compile", lambda self, inputs: None)


def gaussian_vae():
    torch.manual_seed(0)
    return pv.VAE(priors.Normal(1), guides.DiagonalNormal(2, 1, TANH), likelihoods.Normal(1, 2, TANH))


def bernoulli_vae():
    torch.manual_seed(0)
    encoder = guides.Bernoulli(2, 3, TANH)
    return pv.VAE(priors.Bernoulli(3, learnable=True), encoder, likelihoods.Normal(3, 2, TANH))


def gumbel_vae():
    torch.manual_seed(0)
    encoder = guides.GumbelSoftmax(2, (2, 3), TANH, temperature=0.66)
    return pv.VAE(priors.GumbelSoftmax((2, 3), temperature=0.5), encoder, likelihoods.Normal((2, 3), 2, TANH))


OBJECTIVES = {
    "gaussian": (gaussian_vae, Trace_ELBO),
    "particles": (gaussian_vae, lambda: Trace_ELBO(num_particles=3)),
    "vectorized": (gaussian_vae, lambda: Trace_ELBO(num_particles=3, vectorize_particles=True)),
    "mean field": (gaussian_vae, TraceMeanField_ELBO),
    "renyi": (gaussian_vae, lambda: RenyiELBO(alpha=0.5, num_particles=4)),
    "importance-weighted": (gaussian_vae, lambda: objectives.ImportanceWeighted(5, "doubly-reparameterized")),
    "gumbel": (gumbel_vae, Trace_ELBO),
    "enumerated": (bernoulli_vae, lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "score function": (bernoulli_vae, Trace_ELBO),
    "learned baseline": (
        bernoulli_vae,
        lambda: objectives.ScoreFunction(pv.baselines.NeuralBaseline(2, networks.mlp([4])).double()),
    ),
    "DisARM": (bernoulli_vae, objectives.DisARM),
    "VIMCO": (bernoulli_vae, objectives.VIMCO),
}


def run(make, elbo, compile, dtype=torch.float32, **settings):
    pyro.clear_param_store()
    vae = make().to(dtype)
    torch.manual_seed(1)
    objective = elbo()
    guide = config_enumerate(vae.guide) if isinstance(objective, TraceEnum_ELBO) else vae.guide
    settings = {"epochs": 20, "batch_size": 16, "lr": 1e-2} | settings
    fitted = pv.fit(vae.model, guide, X.to(dtype), elbo=objective, compile=compile, **settings)
    return fitted, torch.cat([parameter.detach().flatten() for parameter in vae.parameters()])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_captured_steps_are_the_eager_ones(name):
    (eager, theirs), (captured, ours) = (run(*OBJECTIVES[name], compile, torch.float64) for compile in (False, True))
    assert captured.steps == 80
    assert captured.history["elbo"] == pytest.approx(eager.history["elbo"], rel=1e-10)
    assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["gaussian", "enumerated", "learned baseline"])
def test_compiled_they_are_the_same_over_a_hundred_steps_in_float32(name):
    (eager, theirs), (captured, ours) = (run(*OBJECTIVES[name], compile, epochs=25) for compile in (False, True))
    assert captured.steps == 100
    for term, values in eager.history.items():
        assert captured.history[term] == pytest.approx(values, rel=1e-5, abs=1e-5)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_compiled_the_elbo_in_float64_is_that_of_the_eager_step():
    settings = {"dtype": torch.float64, "batch_size": None}
    (eager, _), (captured, _) = (run(gaussian_vae, Trace_ELBO, compile, **settings) for compile in (False, True))
    assert captured.history["elbo"] == pytest.approx(eager.history["elbo"], abs=1e-10)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("order", [1, -1], ids=["all states at first", "not all"])
def test_states_of_no_probability_count_for_nothing_in_a_captured_step(order):
    """Pyro leaves them out of its sums where there are any, by a branch on data."""
    x = X[:, 0].double()
    batches = [x.abs() + 0.1, x.abs() + 0.2, x, -x, x / 2][::order]

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3, dtype=torch.float64) / 3))
            pyro.sample("x", dist.Normal(y - 1.0, 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", lambda: torch.tensor(1.0, dtype=torch.float64))
        never = torch.where(x > 0, 0.0, -math.inf)  # the third, of negative data
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=torch.stack([-slope * x, 0 * x, slope * x + never], -1)))

    def losses(compile):
        pyro.clear_param_store()
        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        svi = pv.SVI(model, config_enumerate(guide), Adam({"lr": 0.1}), elbo, compile=compile)
        return [svi.step(batch) for batch in batches * 2]

    assert losses(True) == pytest.approx(losses(False), rel=1e-10)


@pytest.mark.usefixtures("uncompiled")
def test_a_last_batch_of_other_size_is_captured_too():
    (eager, theirs), (captured, ours) = (
        run(gaussian_vae, Trace_ELBO, compile, torch.float64, batch_size=25) for compile in (False, True)
    )
    assert captured.steps == 60
    assert captured.history["elbo"] == pytest.approx(eager.history["elbo"], rel=1e-10)
    assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("uncompiled")
def test_schedules_change_values_and_nothing_is_captured_anew(monkeypatch):
    captures = []
    original = Graph.__init__
    monkeypatch.setattr(Graph, "__init__", lambda self, *args: captures.append(1) or original(self, *args))
    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        vae = gumbel_vae().double()
        beta = torch.zeros(())
        changes = {
            beta: schedules.linear(0.0, 1.0, 15),
            vae.encoder.family.temperature: schedules.exponential(1.0, 0.05, 0.3),
        }
        fitted = pv.fit(
            *(WeightKL(beta)(part) for part in (vae.model, vae.guide)),
            X.double(),
            epochs=20,
            lr=schedules.linear(1e-2, 1e-3, 20),
            schedules=changes,
            compile=compile,
        )
        found.append((fitted.history, torch.cat([p.detach().flatten() for p in vae.parameters()])))
    assert len(captures) == 3  # densities, what is written, and the step
    assert found[1][0]["elbo"] == pytest.approx(found[0][0]["elbo"], rel=1e-9)
    assert torch.allclose(found[1][1], found[0][1], rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("batch_size", [None, 16])
def test_rows_are_transformed_within_the_graph(batch_size):
    pixels = torch.randint(0, 256, (64, 2), dtype=torch.uint8)
    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = pv.VAE(priors.Normal(1), guides.DiagonalNormal(2, 1, TANH), likelihoods.Bernoulli(1, 2, TANH))
        settings = {"epochs": 10, "batch_size": batch_size, "lr": 1e-2}
        fitted = pv.fit(vae.model, vae.guide, pixels, transform=pv.datasets.resample, compile=compile, **settings)
        found.append(fitted.history["elbo"])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("make", [AutoNormal, AutoLowRankMultivariateNormal])
@pytest.mark.parametrize("batch_size", [None, 16])
def test_pairs_of_ones_own_are_captured(make, batch_size):
    def model(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            pyro.sample("x", dist.Normal(mean, scale).to_event(1), obs=x)

    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        pv.fit(model, make(model), X, epochs=10, batch_size=batch_size, lr=1e-2, compile=compile)
        found.append({name: value.detach().clone() for name, value in pyro.get_param_store().items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-5) for name in found[0])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: dist.Normal(p.mean, 3.0).to_event(1), "another log_prob of site 'x' of the model"),
        (
            lambda p: dist.Laplace(p.mean, 1.0).to_event(1),
            r"runs site 'x' of the model, a Independent\(Laplace\) .* where .*, a Independent\(Normal\)",
        ),
    ],
)
def test_a_model_that_drifts_from_what_was_captured_is_refused_with_the_site(change, message):
    vae, likelihoods = gaussian_vae(), [lambda p: dist.Normal(p.mean, 1.0).to_event(1)]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", likelihoods[-1](vae.decoder(z)), obs=x)

    def drift(epoch):
        if epoch.number == 500:
            likelihoods.append(change)

    with pytest.raises(CaptureError, match=message):
        pv.fit(model, vae.guide, X, epochs=2000, compile=True, callbacks=[drift])


@pytest.mark.usefixtures("uncompiled")
def test_a_branch_on_a_latent_is_refused_with_the_site():
    vae = gaussian_vae()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.prior())
            p = vae.decoder(z)
            if z.mean() > 0:
                p = dist.Normal(p.mean, 2.0).to_event(1)
            pyro.sample("x", p, obs=x)

    with pytest.raises(CaptureError, match="site 'z', asks a tensor for its value"):
        pv.fit(model, vae.guide, X, epochs=5, compile=True)


@pytest.mark.usefixtures("uncompiled")
def test_numbers_that_would_be_those_of_the_first_step_for_ever_are_refused():
    with pytest.raises(CaptureError, match=r"as pyro\.infer\.TraceGraph_ELBO does"):
        run(bernoulli_vae, TraceGraph_ELBO, True)


@pytest.mark.usefixtures("uncompiled")
def test_data_are_validated_before_the_first_step_though_the_captured_one_is_not():
    data = torch.zeros(64, 2)
    data[-1, 0] = 0.5
    vae = pv.VAE(priors.Normal(1), guides.DiagonalNormal(2, 1, TANH), likelihoods.Bernoulli(1, 2, TANH))
    with pytest.raises(ValueError, match="0s and 1s"):
        pv.fit(vae.model, vae.guide, data, epochs=2, batch_size=16, compile=True)


@pytest.mark.usefixtures("uncompiled")
def test_what_is_not_finite_changes_nothing_and_names_step_site_and_rows():
    data = X.clone().double()
    vae = gaussian_vae().double()
    pair = poutine.scale(vae.model, scale=1.0), vae.guide
    data[37] = 1e200  # whose square is not finite
    with pytest.raises(
        FloatingPointError, match=r"step \d+: the loss is -?(inf|nan); log_prob of site 'x'.*in rows 37 of the data"
    ):
        pv.fit(*pair, data, epochs=3, batch_size=16, compile=True, lr=1e-2)
    assert all(parameter.isfinite().all() for parameter in vae.parameters())


# pv.SVI


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "optim", [Adam({"lr": 1e-2, "betas": (0.8, 0.99)}), pyro.optim.SGD({"lr": 1e-4, "momentum": 0.9})]
)
def test_svi_steps_are_those_of_pyro(compile, optim):
    ours, theirs = gaussian_vae().double(), gaussian_vae().double()
    x = X.double()
    torch.manual_seed(2)
    svi = PyroSVI(theirs.model, theirs.guide, optim, Trace_ELBO())
    expected = [svi.step(x) for _ in range(30)]
    torch.manual_seed(2)
    fast = pv.SVI(ours.model, ours.guide, optim, Trace_ELBO(), compile=compile)
    assert [fast.step(x) for _ in range(30)] == pytest.approx(expected, rel=1e-9)
    assert all(torch.allclose(a, b, rtol=1e-8) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    torch.manual_seed(3)
    loss = fast.evaluate_loss(x)
    torch.manual_seed(3)
    assert loss == pytest.approx(svi.evaluate_loss(x))


def regression(x, y=None, *, scale=1.0):
    slope = pyro.param("slope", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * x + z, scale), obs=y)


def regression_guide(x, y=None, *, scale=1.0):
    loc = pyro.param("loc", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.5))


@pytest.mark.usefixtures("uncompiled")
def test_svi_takes_new_values_new_shapes_and_arguments_by_name():
    batches = [(torch.randn(n), torch.randn(n), s) for n, s in [(8, 1.0), (8, 1.0), (8, 2.0), (5, 1.0), (8, 1.0)] * 3]
    losses = []
    for make in (
        lambda optim: PyroSVI(regression, regression_guide, optim, Trace_ELBO()),
        lambda optim: pv.SVI(regression, regression_guide, optim, Trace_ELBO(), compile=True),
    ):
        pyro.clear_param_store()
        svi = make(Adam({"lr": 1e-2}))
        torch.manual_seed(0)
        losses.append([svi.step(x, y=y, scale=scale) for x, y, scale in batches])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_svi_takes_data_that_lie_otherwise_in_memory():
    ours, theirs = gaussian_vae(), gaussian_vae()
    batches = [X[:2], X[:2], X[:2].t(), X[:2].t(), X[:2]]
    losses = []
    for make, vae, options in ((PyroSVI, theirs, {}), (pv.SVI, ours, {"compile": True})):
        pyro.clear_param_store()
        torch.manual_seed(1)
        svi = make(vae.model, vae.guide, Adam({"lr": 1e-2}), Trace_ELBO(), **options)
        losses.append([svi.step(x) for x in batches])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.usefixtures("uncompiled")
def test_svi_raises_for_what_is_not_finite_and_goes_on_after_it():
    svi = pv.SVI(regression, regression_guide, Adam({"lr": 1e-2}), Trace_ELBO(), compile=True)
    x = torch.linspace(0.0, 1.0, 8)
    for _ in range(5):
        svi.step(x, x)
    before = pyro.param("slope").item()
    with pytest.raises(FloatingPointError, match="step 6: the loss is nan; log_prob of site 'y' in the model"):
        svi.step(x, x * math.nan)
    assert pyro.param("slope").item() == before
    svi.step(x, x)
    assert pyro.param("slope").item() != before


@pytest.mark.usefixtures("uncompiled")
def test_a_scheduler_of_torch_drives_the_optimizer_of_svi():
    vae = gaussian_vae()
    svi = pv.SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), Trace_ELBO(), compile=True)
    svi.step(X)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(svi.optimizer, gamma=0.0)
    svi.step(X)
    scheduler.step()
    before = [parameter.detach().clone() for parameter in vae.parameters()]
    svi.step(X)
    assert all(torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optim": torch.optim.Adam}, TypeError, "`optim` must be one of pyro.optim.*got"),
        (
            {"optim": ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9})},
            ValueError,
            "a scheduler",
        ),
        ({"optim": Adam({"lr": 0.1}, {"clip_norm": 1.0})}, ValueError, "`optim` must be .*got clip_args"),
        ({"optim": ClippedAdam({"lr": 0.1}), "compile": True}, ValueError, "ClippedAdam, which counts its steps"),
        ({"loss": Trace_ELBO}, TypeError, "loss: got"),
        ({"compile": "yes"}, TypeError, "`compile` must be .*got 'yes'"),
        ({"clip_norm": 0.0}, ValueError, "`clip_norm` must be .*got 0.0"),
    ],
)
def test_wrong_arguments_of_svi_are_refused_by_name(arguments, error, message):
    vae = gaussian_vae()
    with pytest.raises(error, match=message):
        pv.SVI(**{"model": vae.model, "guide": vae.guide, "optim": Adam({"lr": 0.1}), "loss": Trace_ELBO()} | arguments)
