"""Captured steps give the losses and parameters of eager ones, and refuse what changes from step to step."""

import math

import pairs
import part_cases
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae import families, guides, likelihoods, networks, objectives, priors, schedules
from pyro_vae.compilation.graph import CaptureError, Graph
from pyro_vae.handlers import WeightKL
from pyro_vae.training import compiled_step

X = pv.datasets.two_gaussians(64, seed=3).x
STANDARD_NORMAL = dist.Normal(torch.zeros(1), 1.0).to_event(1)


UNCOMPILED = pytest.mark.usefixtures("uncompiled")


def gaussian():
    return pairs.gaussian(1, 2, prior=priors.Normal(1))


def batch_norm(in_features, out_features):
    first, last = nn.Linear(in_features, 8, bias=False), nn.Linear(8, out_features)
    return nn.Sequential(first, nn.BatchNorm1d(8), nn.Tanh(), last)


def bernoulli():
    return pairs.gaussian(3, 2, prior=priors.Bernoulli(3, learnable=True), encoder=pairs.bernoulli(3, 2).encoder)


def binary_data():
    return pairs.gaussian(1, 2, decoder=likelihoods.Bernoulli(1, 2, pairs.NET))


def mixed_table():
    """A table with a column of each kind of operations, and with missing entries."""
    columns = {**part_cases.mixed_columns(), "visits": families.ZeroInflated(families.NegativeBinomial(1))}
    encoder = guides.DiagonalNormal(4, 1, networks.with_missing(pairs.NET))
    return pairs.gaussian(1, 4, encoder=encoder, decoder=likelihoods.Columns(1, columns, pairs.NET))


def hidden_noise(change):
    """The noise of the model's runs, in a generator, whose next value nobody can see."""
    yield from [dist.Normal(0.0, 1.0)] * 15
    while True:
        yield change


def neural_baseline():
    return objectives.ScoreFunction(pv.baselines.NeuralBaseline(2, networks.mlp([4])).double())


OBJECTIVES = {
    "TraceGraph": (bernoulli, TraceGraph_ELBO),
    "gaussian": (gaussian, Trace_ELBO),
    "batch norm": (lambda: pairs.gaussian(2, 2, decoder=likelihoods.Normal(2, 2, batch_norm)), Trace_ELBO),
    "particles": (gaussian, lambda: Trace_ELBO(num_particles=3)),
    "vectorized": (gaussian, lambda: Trace_ELBO(num_particles=3, vectorize_particles=True)),
    "mean field": (gaussian, TraceMeanField_ELBO),
    "renyi": (gaussian, lambda: RenyiELBO(alpha=0.5, num_particles=4)),
    "importance-weighted": (gaussian, lambda: objectives.ImportanceWeighted(5, "doubly-reparameterized")),
    "gumbel": (lambda: pairs.gumbel(features=2), Trace_ELBO),
    "enumerated": (bernoulli, lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "score function": (bernoulli, Trace_ELBO),
    "learned baseline": (bernoulli, neural_baseline),
    "DisARM": (bernoulli, objectives.DisARM),
    "VIMCO": (bernoulli, objectives.VIMCO),
}


def eager_and_captured(make, elbo=Trace_ELBO, dtype=torch.float32, data=X, **settings):
    """Train twice; return both results, each with all parameters and buffers."""
    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae, objective = make().to(dtype), elbo()
        torch.manual_seed(1)
        guide = config_enumerate(vae.guide) if isinstance(objective, TraceEnum_ELBO) else vae.guide
        options = {"epochs": 20, "batch_size": 16, "lr": 1e-2, "elbo": objective, "compile": compile} | settings
        fitted = pv.fit(vae.model, guide, data if data is not X else X.to(dtype), **options)
        found.append((fitted, torch.cat([tensor.flatten().to(dtype) for tensor in vae.state_dict().values()])))
    return found


@UNCOMPILED
@pytest.mark.parametrize(
    ("name", "batch_size", "steps"), [*((name, 16, 80) for name in OBJECTIVES), ("gaussian", 25, 60)]
)
def test_captured_steps_are_the_eager_ones(name, batch_size, steps):
    (eager, theirs), (captured, ours) = eager_and_captured(*OBJECTIVES[name], torch.float64, batch_size=batch_size)
    assert captured.steps == steps
    assert captured.history["elbo"] == pytest.approx(eager.history["elbo"], rel=1e-10)
    assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["gaussian", "enumerated", "learned baseline"])
def test_compiled_steps_are_the_eager_ones_over_a_hundred_steps_in_float32(name):
    (eager, theirs), (captured, ours) = eager_and_captured(*OBJECTIVES[name], epochs=25)
    assert captured.steps == 100
    for term, values in eager.history.items():
        assert captured.history[term] == pytest.approx(values, rel=1e-5, abs=1e-5)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@UNCOMPILED
def test_captured_steps_are_the_eager_ones_over_a_hundred_steps_on_all_rows_in_float32():
    settings = {"epochs": 100, "batch_size": None, "lr": 1e-3}
    (eager, theirs), (captured, ours) = eager_and_captured(*OBJECTIVES["batch norm"], **settings)
    assert captured.history["elbo"] == pytest.approx(eager.history["elbo"], rel=0, abs=1e-5)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.integration
def test_compiled_steps_on_a_mixed_table_with_holes_are_the_eager_ones():
    torch.manual_seed(0)
    x = mixed_table().generate(64)
    x = x.masked_fill(torch.rand(x.shape) < 0.2, math.nan).double()
    (eager, theirs), (captured, ours) = eager_and_captured(mixed_table, dtype=torch.float64, data=x, epochs=5)
    assert captured.history["elbo"] == pytest.approx(eager.history["elbo"], rel=1e-10)
    assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.integration
def test_compiled_steps_give_the_eager_elbo_in_float64():
    (eager, _), (captured, _) = eager_and_captured(gaussian, dtype=torch.float64, batch_size=None)
    assert captured.history["elbo"] == pytest.approx(eager.history["elbo"], abs=1e-10)


@UNCOMPILED
@pytest.mark.parametrize("order", [1, -1], ids=["first batch has all states", "first batch lacks some"])
def test_states_of_probability_zero_add_nothing_in_a_captured_step(order):
    """Pyro drops them from its sums by a branch on data."""
    x = X[:, 0].double()
    batches = [x.abs() + 0.1, x.abs() + 0.2, x, -x, x / 2][::order]

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3, dtype=torch.float64) / 3))
            pyro.sample("x", dist.Normal(y - 1.0, 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", lambda: torch.tensor(1.0, dtype=torch.float64))
        never = torch.where(x > 0, 0.0, -math.inf)  # the third state, for negative data
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=torch.stack([-slope * x, 0 * x, slope * x + never], -1)))

    def losses(compile):
        pyro.clear_param_store()
        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        svi = pv.SVI(model, config_enumerate(guide), Adam({"lr": 0.1}), elbo, compile=compile)
        return [svi.step(batch) for batch in batches * 2]

    assert losses(True) == pytest.approx(losses(False), rel=1e-10)


@UNCOMPILED
def test_schedules_change_values_without_another_capture(monkeypatch):
    captures = []
    original = Graph.__init__
    monkeypatch.setattr(Graph, "__init__", lambda self, *args: captures.append(1) or original(self, *args))
    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae, beta = pairs.gumbel(features=2).double(), torch.zeros(())
        temperature = schedules.exponential(1.0, 0.05, 0.3)
        changes = {beta: schedules.linear(0.0, 1.0, 15), vae.encoder.family.temperature: temperature}
        pair = (WeightKL(beta)(part) for part in (vae.model, vae.guide))
        options = {"lr": schedules.linear(1e-2, 1e-3, 20), "schedules": changes, "compile": compile}
        fitted = pv.fit(*pair, X.double(), epochs=20, **options)
        found.append((fitted.history, torch.cat([p.detach().flatten() for p in vae.parameters()])))
    assert len(captures) == 3  # log-densities, written tensors, and the step
    assert found[1][0]["elbo"] == pytest.approx(found[0][0]["elbo"], rel=1e-9)
    assert torch.allclose(found[1][1], found[0][1], rtol=1e-8, atol=1e-10)


@UNCOMPILED
@pytest.mark.parametrize("batch_size", [None, 16])
def test_transforms_are_captured(batch_size):
    settings = {"data": torch.randint(0, 256, (64, 2), dtype=torch.uint8), "transform": pv.datasets.resample}
    (eager, _), (captured, _) = eager_and_captured(binary_data, batch_size=batch_size, epochs=10, **settings)
    assert captured.history["elbo"] == pytest.approx(eager.history["elbo"], rel=1e-6)


@UNCOMPILED
@pytest.mark.parametrize("make", [AutoNormal, AutoLowRankMultivariateNormal])
@pytest.mark.parametrize("batch_size", [None, 16])
def test_any_pyro_pair_is_captured(make, batch_size):
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


@UNCOMPILED
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dist.Normal(0.0, 3.0), "another log_prob of site 'x' of the model"),
        (dist.Laplace(0.0, 1.0), r"a Independent\(Laplace\) .* but site 'x' of the model, a Independent\(Normal\)"),
    ],
)
def test_a_model_that_changes_after_the_capture_is_refused_with_the_site(change, message):
    vae, noise = gaussian(), iter(hidden_noise(change))

    def likelihood(z):
        now = next(noise)
        return type(now)(vae.decoder(z).mean, now.scale).to_event(1)

    model = pairs.model_of(STANDARD_NORMAL, likelihood)
    with pytest.raises(CaptureError, match=f"`compile` must be False where steps run different .*: .*{message}"):
        pv.fit(model, vae.guide, X, epochs=2000, compile=True)


@UNCOMPILED
def test_a_weight_that_changes_unseen_is_refused_by_the_loss():
    vae, weights = gaussian(), iter([1.0] * 15 + [2.0] * 100)
    model = pairs.model_of(STANDARD_NORMAL, lambda z: vae.decoder(z))

    def weighted(x):
        with pyro.poutine.scale(scale=next(weights)):
            model(x)

    with pytest.raises(CaptureError, match=r"where a weight changes: step .* has the loss"):
        pv.fit(weighted, vae.guide, X, epochs=2000, compile=True)


class Counted:
    """A pair with a warm-up of the KL by a counter."""

    def __init__(self, make_scale):
        self.vae, self.runs, self.make_scale = gaussian(), 0, make_scale

    def model(self, x):
        self.runs += 1
        with WeightKL(self.make_scale(self.runs)):
            self.vae.model(x)

    def guide(self, x):
        self.vae.guide(x)


@UNCOMPILED
@pytest.mark.parametrize(
    "make_scale",
    [
        lambda runs: min(1.0, runs / 1e6),  # the difference between two runs is far below the digits of the loss
        lambda runs: 0.1 if runs < 10_000 else 1.0,
        lambda runs: torch.tensor(min(1.0, runs / 50)),
    ],
    ids=["slow", "late", "tensor"],
)
def test_a_weight_by_a_counter_is_refused_at_the_capture(make_scale):
    pair = Counted(make_scale)
    with pytest.raises(CaptureError, match=r"change a Python number that they read: Counted\.runs was \d+ before"):
        pv.fit(pair.model, pair.guide, X, epochs=50, compile=True)


@UNCOMPILED
def test_weights_of_a_generator_are_refused_at_the_capture():
    vae, betas = gaussian(), (step / 1e6 for step in range(1, 10**6))

    def model(x):
        with WeightKL(next(betas)):
            vae.model(x)

    with pytest.raises(CaptureError, match="two runs on the same data differ"):
        pv.fit(model, vae.guide, X, epochs=50, compile=True)


@UNCOMPILED
def test_callbacks_that_change_python_values_are_heard_in_the_next_epoch():
    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae, elbo = (
            pairs.gaussian(2, 2, decoder=likelihoods.Normal(2, 2, batch_norm)).double(),
            objectives.FreeBits(2.0),
        )

        def change(epoch, vae=vae, elbo=elbo):
            if epoch.number == 4:
                elbo.nats = 0.01
            if epoch.number == 6:
                vae.decoder.network[1].momentum = 0.9
            if epoch.number == 8:
                vae.eval()

        settings = {"epochs": 12, "lr": 1e-2, "elbo": elbo, "callbacks": [change], "compile": compile}
        found.append(pv.fit(vae.model, vae.guide, X.double(), **settings).history["elbo"])
    assert found[1] == pytest.approx(found[0], rel=1e-9)


@pytest.mark.slow
@UNCOMPILED
def test_a_value_that_changes_in_each_epoch_is_refused():
    vae, elbo = gaussian(), objectives.FreeBits(2.0)

    def change(epoch):
        elbo.nats = 2.0 / epoch.number

    with pytest.raises(
        CaptureError, match=r"changes again and again: FreeBits\.nats was .* Keep a number that changes"
    ):
        pv.fit(vae.model, vae.guide, X, epochs=50, elbo=elbo, callbacks=[change], compile=True)


@UNCOMPILED
def test_recurrent_layers_are_captured():
    class Recurrent(nn.Module):
        def __init__(self, in_features, out_features):
            super().__init__()
            self.lstm, self.last = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, out_features)

        def forward(self, x):
            return self.last(self.lstm(x[..., None])[0][:, -1])

    (eager, theirs), (captured, ours) = eager_and_captured(
        lambda: pairs.gaussian(1, 2, decoder=likelihoods.Normal(1, 2, Recurrent)), dtype=torch.float64, epochs=5
    )
    assert captured.history["elbo"] == pytest.approx(eager.history["elbo"], rel=1e-9)
    assert torch.allclose(ours, theirs, rtol=1e-7)


@UNCOMPILED
def test_what_cannot_be_captured_is_named_with_its_line():
    vae = gaussian()
    model = pairs.model_of(STANDARD_NORMAL, lambda z: vae.decoder(z + z.cpu().detach().numpy().sum()))
    with pytest.raises(CaptureError, match=r"`compile` must be False .*test_compiled_step\.py"):
        pv.fit(model, vae.guide, X, epochs=5, compile=True)


@UNCOMPILED
def test_a_branch_on_a_latent_is_refused_with_the_site():
    vae = gaussian()
    model = pairs.model_of(STANDARD_NORMAL, lambda z: vae.decoder(z if z.mean() > 0 else -z))
    with pytest.raises(CaptureError, match="site 'z', reads the value of a tensor"):
        pv.fit(model, vae.guide, X, epochs=5, compile=True)


@UNCOMPILED
def test_one_bad_row_is_refused_before_the_first_step_or_named_by_its_number():
    binary, vae, data = (X > 0).float(), binary_data(), X.double()
    binary[-1, 0] = 0.5
    with pytest.raises(ValueError, match="0s and 1s"):
        pv.fit(vae.model, vae.guide, binary, epochs=2, batch_size=16, compile=True)
    vae = gaussian().double()
    data[37] = 1e200  # its square is not finite
    with pytest.raises(
        FloatingPointError, match=r"step \d+: the loss is -?(inf|nan); .*site 'x'.*in rows 37 of the data"
    ):
        pv.fit(vae.model, vae.guide, data, epochs=3, batch_size=16, compile=True)
    assert all(parameter.isfinite().all() for parameter in vae.parameters())


def chain(sequences, lengths):
    """A hidden Markov model that runs to the largest length, and reads it, as Pyro's examples do."""
    assert lengths.max() <= sequences.shape[1]
    transition = pyro.param("transition", torch.full((2, 2), 0.5), constraint=constraints.simplex)
    locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", len(sequences)):
        state = 0
        for step in pyro.markov(range(lengths.max())):
            with poutine.mask(mask=step < lengths):
                probs = transition[state]
                state = pyro.sample(f"z_{step}", dist.Categorical(probs), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{step}", dist.Normal(locs[state], 1.0), obs=sequences[:, step])


@UNCOMPILED
def test_a_step_that_reads_lengths_is_captured_for_each_largest_one():
    sequences = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    batches = [[3, 1, 2, 2], [3, 3, 1, 1], [2, 2, 2, 1], [3, 1, 2, 2], [2, 2, 2, 2]]
    losses = []
    for compile in (False, True):
        with pyro.get_param_store().scope():
            svi = pv.SVI(
                chain, lambda *_: None, Adam({"lr": 0.1}), TraceEnum_ELBO(max_plate_nesting=1), compile=compile
            )
            losses.append([svi.step(sequences, torch.tensor(lengths)) for lengths in batches])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@UNCOMPILED
def test_values_that_are_read_must_not_change_for_ever(monkeypatch):
    monkeypatch.setattr(compiled_step, "_MOST_VALUES", 2)
    sequences = torch.randn(2, 40)
    svi = pv.SVI(chain, lambda *_: None, Adam({"lr": 0.1}), TraceEnum_ELBO(max_plate_nesting=1), compile=True)
    for longest in (1, 2, 3):
        svi.step(sequences, torch.tensor([longest, 1]))
    with pytest.raises(CaptureError, match=r"step 4 has the set of values number 3.*range\(x.shape\[1\]\)"):
        svi.step(sequences, torch.tensor([4, 1]))


def annealed_pair(uses):
    """A model and guide whose densities have a weight among the arguments."""

    def model(x, weight=1.0):
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=uses(weight)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, weight=1.0):
        slope = pyro.param("slope", lambda: torch.tensor(0.1, dtype=torch.float64))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=uses(weight)):
            pyro.sample("z", dist.Normal(slope * x, 1.0))

    return model, guide


def annealed_losses(uses, weights, compile):
    pyro.clear_param_store()
    torch.manual_seed(0)
    svi = pv.SVI(*annealed_pair(uses), Adam({"lr": 0.01}), Trace_ELBO(), compile=compile)
    return [svi.step(X[:, 0].double(), weight=weight) for weight in weights]


def count_captures(monkeypatch):
    captures = []
    original = Graph.__init__
    monkeypatch.setattr(Graph, "__init__", lambda self, *args: captures.append(1) or original(self, *args))
    return captures


@UNCOMPILED
@pytest.mark.parametrize(("scale", "digits"), [(1.0, 1e-10), (1, 1e-6)], ids=["float", "int, divided in float32"])
def test_a_number_that_changes_from_step_to_step_becomes_an_input(monkeypatch, scale, digits):
    captures = count_captures(monkeypatch)
    weights = [1 * scale, 1 * scale, *(k * scale for k in range(2, 22))]
    ours = annealed_losses(lambda weight: weight / 20, weights, compile=True)
    assert len(captures) == 2 * 3  # as a constant, and as an input: log-densities, written tensors, and the step
    assert ours == pytest.approx(annealed_losses(lambda weight: weight / 20, weights, compile=False), rel=digits)


@UNCOMPILED
def test_a_number_that_python_reads_is_a_constant_and_is_refused_when_it_keeps_changing():
    weights = [1.0, 1.0, 0.5, 0.5, 0.25, 1.0]
    ours = annealed_losses(lambda weight: min(weight, 0.7), weights, compile=True)
    assert ours == pytest.approx(annealed_losses(lambda weight: min(weight, 0.7), weights, compile=False), rel=1e-10)
    with pytest.raises(CaptureError, match=r"Python reads a number among the arguments that changes.*got 6 different"):
        annealed_losses(lambda weight: min(weight, 0.7), [k / 20 for k in range(1, 20)], compile=True)


def hooked_losses(register, compile, before=1):
    """Train with a hook that is registered after some steps."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    vae = gaussian().double()
    svi = pv.SVI(vae.model, vae.guide, Adam({"lr": 0.1}), Trace_ELBO(), compile=compile)
    found = []
    for step in range(6):
        if step == before:
            register(vae)
        found.append(svi.step(X.double()))
    return found


@UNCOMPILED
@pytest.mark.parametrize("before", [1, 3], ids=["before the capture", "after it"])
def test_hooks_that_change_gradients_are_captured(before):
    def register(vae):
        for parameter in vae.decoder.parameters():
            parameter.register_hook(lambda gradient: torch.zeros_like(gradient))

    ours = hooked_losses(register, True, before)
    assert ours == pytest.approx(hooked_losses(register, False, before), rel=1e-10)
    assert ours != pytest.approx(hooked_losses(lambda vae: None, True), rel=1e-4)


def linear(module):
    return next(part for part in module.modules() if isinstance(part, nn.Linear))


HOOKS = {
    "of a tensor": lambda vae, seen: next(vae.parameters()).register_hook(seen.append),
    "after accumulation": lambda vae, seen: next(vae.parameters()).register_post_accumulate_grad_hook(seen.append),
    "of a module": lambda vae, seen: linear(vae.decoder).register_full_backward_hook(lambda *of: seen.append(of)),
}


@UNCOMPILED
@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("before", [1, 3], ids=["before the capture", "after it"])
def test_hooks_that_a_replay_would_not_call_are_refused(name, before):
    with pytest.raises(CaptureError, match=r"`compile` must be False where a hook .*got one (at|of) "):
        hooked_losses(lambda vae: HOOKS[name](vae, []), True, before)


@UNCOMPILED
def test_a_hook_in_the_model_that_returns_nothing_is_refused():
    norms = []

    def model(x):
        z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))
        z.register_hook(lambda gradient: norms.append(gradient))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0))

    svi = pv.SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO(), compile=True)
    svi.step(torch.tensor(1.0))
    with pytest.raises(CaptureError, match=r"hook on gradients returns nothing, got one at .*test_compiled_step.py"):
        svi.step(torch.tensor(1.0))
