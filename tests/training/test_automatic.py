"""``fit`` chooses how its steps are computed: replayed ones have the bits of eager ones, compiled ones come later."""

import os
import re
import warnings
from contextlib import nullcontext

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from stand_in_cuda_graphs import cuda_graphs
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, objectives, priors, schedules
from pyro_vae.compilation import cost
from pyro_vae.compilation.graph import Graph
from pyro_vae.training import replayed_step
from pyro_vae.training.automatic import AutomaticEngine
from pyro_vae.training.replayed_step import EAGER_STEPS

X = pv.datasets.two_gaussians(64, seed=3).x
STEPS = 100
CPU = torch.device("cpu")


def batch_norm(in_features, out_features):
    layers = nn.Linear(in_features, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, out_features)
    return nn.Sequential(*layers)


def gaussian(**parts):
    return pairs.gaussian(1, 2, prior=priors.Normal(1), **parts)


def bernoulli():
    return pairs.gaussian(3, 2, prior=priors.Bernoulli(3, learnable=True), encoder=pairs.bernoulli(3, 2).encoder)


PROGRAMS = {
    "gaussian": (gaussian, Trace_ELBO),
    "batch norm and dropout": (lambda: gaussian(decoder=likelihoods.Normal(1, 2, batch_norm)), Trace_ELBO),
    "importance-weighted": (gaussian, lambda: objectives.ImportanceWeighted(5, "doubly-reparameterized")),
    "gumbel": (lambda: pairs.gumbel(features=2), Trace_ELBO),
    "enumerated": (bernoulli, lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "score function": (bernoulli, TraceGraph_ELBO),
    "learned baseline": (bernoulli, lambda: objectives.ScoreFunction(pv.baselines.NeuralBaseline(2, pairs.NET))),
    "VIMCO": (bernoulli, objectives.VIMCO),
    "particles": (gaussian, lambda: Trace_ELBO(num_particles=3, vectorize_particles=True)),
}


def trained(make, elbo=Trace_ELBO, model=None, **settings):
    """Train a pair; return the result, and all its parameters and buffers."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    vae, objective = make(), elbo()
    guide = config_enumerate(vae.guide) if isinstance(objective, TraceEnum_ELBO) else vae.guide
    options = {"epochs": STEPS // 4, "batch_size": 16, "lr": 1e-2, "elbo": objective} | settings
    fitted = pv.fit(vae.model if model is None else model(vae), guide, X, **options)
    return fitted, [tensor.detach().clone() for tensor in vae.state_dict().values()]


def check_same_bits(one, other):
    assert one[0].history == other[0].history
    assert all(map(torch.equal, one[1], other[1]))


@pytest.mark.parametrize("name", PROGRAMS)
def test_replayed_steps_have_the_bits_of_eager_ones(name):
    eager, chosen = (trained(*PROGRAMS[name], compile=compile) for compile in (False, None))
    assert eager[0].engine == "eager"
    assert chosen[0].engine.startswith("replayed, and not compiled in a run of less than about ")
    check_same_bits(eager, chosen)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 25, "epochs": 34},  # an odd last batch
        {"batch_size": None, "epochs": 100},
        {"clip_norm": 0.1},
        {"optimizer": torch.optim.AdamW},
        {"lr": schedules.linear(1e-2, 1e-3, STEPS)},
        {"validation": X[:20], "patience": 3},
    ],
    ids=["odd batch", "all rows", "clipped", "AdamW", "rate", "validation"],
)
def test_replayed_steps_have_the_bits_of_eager_ones_with_any_setting(settings):
    eager, chosen = (trained(gaussian, compile=compile, **settings) for compile in (False, None))
    assert chosen[0].engine.startswith("replayed")
    check_same_bits(eager, chosen)


def test_a_temperature_that_changes_is_read_at_each_step():
    found = []
    for compile in (False, None):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = pairs.gumbel(features=2)
        changes = {vae.encoder.family.temperature: schedules.exponential(1.0, 0.05, 0.3)}
        found.append(pv.fit(vae.model, vae.guide, X, epochs=STEPS, lr=1e-2, schedules=changes, compile=compile))
    assert found[1].engine.startswith("replayed")
    assert found[0].history == found[1].history


class Counted:
    """A model that counts its runs, and weights its KL by that."""

    def __init__(self, vae):
        self.vae, self.runs = vae, 0

    def __call__(self, x):
        self.runs += 1
        with poutine.scale(scale=min(1.0, self.runs / 50)):
            self.vae.model(x)


class Kept(nn.Module):
    """A decoder that keeps its last input."""

    def __init__(self, vae):
        super().__init__()
        self.decoder, self.last = vae.decoder, None

    def forward(self, x):
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            self.last = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", self.decoder(self.last), obs=x)


def with_weight(make_weight):
    def model_of(vae):
        weight = make_weight()

        def model(x):
            with poutine.scale(scale=weight()):
                vae.model(x)

        return model

    return model_of


def from_iterator():
    weights = (1 / (1 + step) for step in range(10_000))
    return lambda: next(weights)


def from_numpy():
    return lambda: np.random.rand() + 0.5  # noqa: NPY002


def from_generator():
    generator = np.random.default_rng(0)
    return lambda: generator.random() + 0.5


def into_list():
    seen = []
    return lambda: seen.append(torch.ones(())) or 1.0


def branching(vae):
    def model(x):
        with poutine.scale(scale=2.0 if x.mean() > 0 else 1.0):
            vae.model(x)

    return model


def with_hook(vae):
    vae.decoder.register_forward_hook(lambda *_: None)
    return vae.model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (branching, "where the operations depend on data"),
        (Counted, r"where model or guide keep what they compute or count, in .*Counted\.runs"),
        (Kept, r"where model or guide keep what they compute or count, in .*Kept\.last"),
        (with_weight(into_list), "where model or guide keep what they compute or count, in seen"),
        (with_weight(from_iterator), "where model or guide read an iterator or a random generator, weights"),
        (with_weight(from_generator), "where model or guide read an iterator or a random generator, generator"),
        (with_weight(from_numpy), "where random numbers are not torch's"),
        (with_hook, "where a hook runs before or after a module"),
    ],
    ids=["branch", "counter", "attribute", "list", "iterator", "generator", "NumPy", "hook"],
)
def test_what_cannot_be_captured_is_eager_with_the_reason(model, reason):
    eager, chosen = (trained(gaussian, model=model, compile=compile) for compile in (False, None))
    assert chosen[0].engine.startswith("eager, and not captured ")
    assert re.search(reason, chosen[0].engine)
    check_same_bits(eager, chosen)


def test_short_runs_are_eager():
    assert trained(gaussian, epochs=5)[0].engine == "eager: 20 steps are too few for a capture"


def changing(vae, number, change):
    def call(epoch):
        if epoch.number == number:
            change(vae)

    return call


def freeze(vae):
    vae.decoder.requires_grad_(False)


def set_momentum(vae):
    vae.encoder.network[1].momentum = 0.9


@pytest.mark.parametrize("change", [freeze, nn.Module.eval, set_momentum], ids=["frozen", "mode", "momentum"])
def test_changes_by_callbacks_are_heard(change):
    found = []
    for compile in (False, None):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = gaussian(encoder=guides.DiagonalNormal(2, 1, batch_norm))
        settings = {"callbacks": [changing(vae, 12, change)], "compile": compile, "epochs": 40, "batch_size": 16}
        found.append((pv.fit(vae.model, vae.guide, X, **settings), list(vae.state_dict().values())))
    assert found[1][0].engine.startswith("replayed")
    check_same_bits(*found)


@pytest.mark.parametrize(("size", "differing", "replays"), [(1e-3, 2, True), (1e-3, 3, False), (0.1, 1, False)])
def test_a_unit_at_its_kink_differs_in_a_few_steps_and_other_operations_in_all(monkeypatch, size, differing, replays):
    """Gradients of some comparisons in a row are off by a share of their size; a large one is no rounding at all."""
    agree, compared = replayed_step._Gradients.agree, []

    def off(self, eager, replayed):
        compared.append(self)
        factor = 1 + size if 1 < len(compared) < 2 + differing else 1.0
        return agree(self, eager, [factor * gradient for gradient in replayed])

    monkeypatch.setattr(replayed_step._Gradients, "agree", off)
    fitted, _ = trained(gaussian)
    assert fitted.engine.startswith("replayed") == replays
    assert len(compared) > 1 + differing if replays else len(compared) == 1 + differing


def test_a_change_that_cannot_be_seen_ends_the_replays_with_a_warning(monkeypatch, compiled_soon):
    begin, begun = AutomaticEngine._begin, []
    monkeypatch.setattr(AutomaticEngine, "_begin", lambda *args: begun.append(args) or begin(*args))
    monkeypatch.setenv("PYRO_VAE_TEST_WEIGHT", "1")

    def model_of(vae):
        def model(x):
            with poutine.scale(scale=float(os.environ["PYRO_VAE_TEST_WEIGHT"])):
                vae.model(x)

        return model

    def change(epoch):
        if epoch.number == 3:  # before the compiler begins
            monkeypatch.setenv("PYRO_VAE_TEST_WEIGHT", "3")

    with pytest.warns(UserWarning, match=r"fit: step \d+ runs other operations than the captured ones\. The \d+ steps"):
        fitted, _ = trained(gaussian, model=model_of, callbacks=[change])
    assert fitted.engine == "eager, and not captured other operations than the captured ones"
    assert not begun  # a capture would run the model once more


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_step_that_is_not_finite_is_that_of_eager_steps(nonfinite):
    def model_of(vae):
        def model(x):
            with poutine.scale(scale=torch.where(torch.rand(()) < 0.02, torch.inf, 1.0)):
                vae.model(x)

        return model

    found = []
    for compile in (False, None):
        try:
            found.append(trained(gaussian, model=model_of, nonfinite=nonfinite, epochs=50, compile=compile))
        except FloatingPointError as error:
            found.append(str(error))
    if nonfinite == "stop":
        assert found[0] == found[1]
        assert int(found[0].split()[1].rstrip(":")) > EAGER_STEPS + 3
    else:
        assert found[0][0].skipped == found[1][0].skipped > 0
        assert found[0][0].history == found[1][0].history
        assert all(map(torch.equal, found[0][1], found[1][1]))


def test_parameters_outside_of_their_range_are_found_in_a_long_first_epoch():
    x = torch.rand(250, 2) + 0.5
    x[-1, 0] = -0.5  # log-densities are finite
    vae = gaussian()

    def model(x):
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            rate = vae.decoder(z).mean[:, 1].exp()
            pyro.sample("x", dist.Gamma(x[:, 0], rate), obs=x[:, 1])

    for compile in (False, None):
        pyro.clear_param_store()
        with pytest.raises(ValueError, match="Expected parameter concentration"):
            pv.fit(model, vae.guide, x, epochs=1, batch_size=2, compile=compile)


@pytest.fixture
def compiled_soon(monkeypatch):
    """Let a run wait for the compiler after few steps."""
    monkeypatch.setattr(cost, "compilation_seconds", lambda graph: 40 * cost.replay_seconds(graph))


@pytest.fixture
def captured_soon(compiled_soon, monkeypatch, uncompiled):
    """Let the captured step take over after few steps, without a compiler."""
    monkeypatch.setattr("pyro_vae.compilation.graph.Compilation.succeeded", True)


OPTIMIZERS = [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam]


@pytest.mark.usefixtures("captured_soon")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_captured_steps_continue_replayed_ones(optimizer):
    first, again = (trained(gaussian, optimizer=optimizer) for _ in range(2))
    assert first[0].engine == "compiled from step 61"
    check_same_bits(first, again)
    eager = trained(gaussian, optimizer=optimizer, compile=False)
    assert first[0].history["elbo"] == pytest.approx(eager[0].history["elbo"], rel=1e-4)
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-4) for one, other in zip(first[1], eager[1], strict=True))


@pytest.mark.usefixtures("captured_soon")
@pytest.mark.parametrize("stop", [5, 15, 16, 20], ids=["before", "at", "just after", "after"])
def test_a_run_that_resumes_has_the_bits_of_one_without_a_stop(stop, tmp_path):
    whole = trained(gaussian)
    trained(gaussian, checkpoints=tmp_path, epochs=stop)
    resumed = trained(gaussian, checkpoints=tmp_path)
    assert resumed[0].engine == whole[0].engine == "compiled from step 61"
    check_same_bits(whole, resumed)


@pytest.mark.usefixtures("captured_soon")
def test_a_change_after_the_compiler_leads_back_to_eager_steps():
    found = []
    for compile in (False, None):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = gaussian()
        settings = {"callbacks": [changing(vae, 18, freeze)], "compile": compile, "epochs": 40, "batch_size": 16}
        found.append((pv.fit(vae.model, vae.guide, X, **settings), list(vae.parameters())))
    assert found[1][0].engine == "replayed, and not compiled after a change of modules or of Python's values"
    assert found[1][0].history["elbo"] == pytest.approx(found[0][0].history["elbo"], rel=1e-4)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_without_a_compiler_steps_stay_replayed(compiled_soon, uncompiled):
    with warnings.catch_warnings(action="error"):
        fitted, _ = trained(gaussian)
    assert fitted.engine.startswith("replayed, and not compiled without a working C++ compiler")


@pytest.mark.integration
def test_the_compiler_works_in_the_background(compiled_soon):
    first, again = (trained(gaussian, epochs=50) for _ in range(2))
    assert first[0].engine == "compiled from step 61"
    check_same_bits(first, again)
    eager = trained(gaussian, epochs=50, compile=False)
    assert first[0].history["elbo"] == pytest.approx(eager[0].history["elbo"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gaussian", {"batch_size": 25, "epochs": 34, "clip_norm": 0.1}),
        ("batch norm and dropout", {}),
        ("VIMCO", {"optimizer": torch.optim.AdamW}),
    ],
)
def test_replays_as_cuda_graphs_have_the_bits_of_eager_steps(name, settings):
    eager = trained(*PROGRAMS[name], compile=False, **settings)
    with cuda_graphs(CPU) as cuda:
        chosen = trained(*PROGRAMS[name], **settings)
    assert chosen[0].engine.startswith("replayed as CUDA graphs, and not compiled in a run of less than about ")
    assert cuda.replays > STEPS / 2
    check_same_bits(eager, chosen)


def test_a_temperature_that_changes_is_read_by_cuda_graphs():
    found = []
    for context in (nullcontext(), cuda_graphs(CPU)):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = pairs.gumbel(features=2)
        schedule = {vae.encoder.family.temperature: schedules.exponential(1.0, 0.05, 0.3)}
        with context:
            found.append(pv.fit(vae.model, vae.guide, X, epochs=STEPS, lr=1e-2, schedules=schedule))
    assert found[1].engine.startswith("replayed as CUDA graphs")
    assert found[0].history == found[1].history


def test_where_cuda_refuses_a_graph_its_operations_are_replayed_one_by_one(monkeypatch):
    eager = trained(gaussian, compile=False)
    with cuda_graphs(CPU) as cuda:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", raise_out_of_memory)
        chosen = trained(gaussian)
    assert chosen[0].engine.startswith(
        "replayed, not as CUDA graphs where CUDA refuses it: CUDA out of memory, and not compiled in a run of less"
    )
    assert not cuda.replays
    check_same_bits(eager, chosen)


def raise_out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_compiled_steps_are_cuda_graphs_with_the_same_numbers(monkeypatch):
    monkeypatch.setattr(Graph, "compile", lambda *args: None)  # their operations as they are, without the compiler
    plain = trained(gaussian, compile=True)
    with cuda_graphs(CPU) as cuda:
        found = trained(gaussian, compile=True)
    assert [plain[0].engine, found[0].engine] == ["compiled", "compiled as CUDA graphs"]
    assert cuda.replays > STEPS / 2
    check_same_bits(plain, found)
