"""A pair is run few times before the first step or draw; what it is, and how its rows are taken, is found there."""

from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import bernoulli, gaussian, guide_of, model_of
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, networks
from pyro_vae.model_guide import ModelGuide, is_amortized

X = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
MOST_RUNS = 4


class FirstDraw(Exception):
    """Raised where the work begins that a check precedes."""


def stop(*args, **options):
    raise FirstDraw


class Counted:
    """A pair that counts its own calls."""

    def __init__(self, vae, enumerates=False):
        self.calls = {"model": 0, "guide": 0}
        self.model = self._counting("model", vae.model)
        guide = self._counting("guide", vae.guide)
        self.guide = config_enumerate(guide) if enumerates else guide

    def _counting(self, owner, run):
        def counting(*args):
            self.calls[owner] += 1
            return run(*args)

        return counting


def sliced_vae():
    """A VAE without ``pyro.subsample``."""
    vae = gaussian()
    vae.model, vae.guide = model_of(vae.prior(), vae.decoder), guide_of(vae.encoder)
    return vae


@pytest.mark.parametrize("make", [gaussian, sliced_vae], ids=["subsampled", "sliced"])
@pytest.mark.parametrize("batch_size", [None, 50])
@pytest.mark.parametrize("transform", [None, lambda x: 2 * x], ids=["plain", "transformed"])
@pytest.mark.parametrize("validation", [None, X[:40]], ids=["no validation", "validation"])
def test_few_runs_precede_the_first_step_of_fit(make, batch_size, transform, validation, monkeypatch):
    pair = Counted(make())
    monkeypatch.setattr("pyro_vae.training.step.Step.__call__", stop)
    options = {"batch_size": batch_size, "transform": transform, "validation": validation}
    with pytest.raises(FirstDraw):
        pv.fit(pair.model, pair.guide, X, epochs=1, **options)
    assert 1 <= pair.calls["model"] <= MOST_RUNS
    assert 1 <= pair.calls["guide"] <= MOST_RUNS


def test_few_runs_precede_the_first_step_of_an_enumerated_pair(monkeypatch):
    pair = Counted(bernoulli(), enumerates=True)
    monkeypatch.setattr(TraceEnum_ELBO, "loss_and_grads", stop)
    with pytest.raises(FirstDraw):
        pv.fit(pair.model, pair.guide, X, epochs=1, batch_size=50, elbo=TraceEnum_ELBO(max_plate_nesting=1))
    assert max(pair.calls.values()) <= MOST_RUNS


@pytest.mark.parametrize(
    ("first_draw", "call", "rows"),
    [
        ("evidence.importance_sampling._log_weights", pv.log_evidence, 100),
        ("evidence.importance_sampling._log_weights", pv.log_evidence, 200),
        ("inference_data.sampler.JointSampler.chunks", pv.to_datatree, 10),
    ],
    ids=["evidence of one batch", "evidence of batches", "export"],
)
def test_few_runs_precede_the_first_draw(first_draw, call, rows, monkeypatch):
    pair = Counted(gaussian())
    monkeypatch.setattr(f"pyro_vae.{first_draw}", stop)
    with pytest.raises(FirstDraw):
        call(pair.model, pair.guide, X[:rows])
    assert max(pair.calls.values()) <= MOST_RUNS


@pytest.mark.parametrize("transform", [None, torch.Tensor.double], ids=["plain", "transformed"])
def test_a_pair_that_subsamples_is_run_on_no_more_rows_than_a_batch(transform):
    """A decoder of images on all rows at once would need more memory than there is."""
    vae, seen = gaussian(1, 2), {"encoder": [], "decoder": []}
    vae = vae if transform is None else vae.double()
    for part, rows in seen.items():
        for module in getattr(vae, part).modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda module, inputs, output, rows=rows: rows.append(len(inputs[0])))
    ModelGuide.on_batches(vae.model, vae.guide, (ROWS,), 6, "data", transform)
    assert all(seen.values())
    assert max(seen["encoder"] + seen["decoder"]) <= 6


def hierarchical(x):
    """A global and a local latent, and a deterministic site."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("x", dist.Normal(z[:, None], 1.0).expand([len(x), 3]).to_event(1), obs=x)


def test_the_sites_of_a_pair_are_known_by_their_role():
    pair = ModelGuide(hierarchical, AutoNormal(hierarchical), X)
    assert (list(pair.latents), list(pair.observed), list(pair.deterministic)) == (["scale", "z"], ["x"], ["twice"])
    assert sorted(pair.guide_latents) == ["scale", "z"]
    assert sorted(pair.auxiliary) == ["scale_unconstrained", "z_unconstrained"]
    assert pair.global_latents == ["scale"]
    assert (pair.plates, pair.max_plate_nesting, pair.num_data, pair.enumerated) == (["data"], 1, 200, set())
    vae = bernoulli()
    assert ModelGuide(vae.model, config_enumerate(vae.guide), X).enumerated == {"parallel"}


def test_a_run_of_a_pair_changes_nothing(random_states):
    vae = gaussian()
    before, state = random_states(), {name: value.clone() for name, value in vae.state_dict().items()}
    pair = ModelGuide(vae.model, vae.guide, X)
    assert pair.is_amortized("model")
    assert pair.is_amortized("guide")
    assert random_states() == before
    assert all(value.equal(state[name]) for name, value in vae.state_dict().items())


def observing_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1), obs=x[:, :2])


def other_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x[:, :2], 1.0).to_event(1))


ENTRIES = {
    "fit": (pv.fit, {"epochs": 1}),
    "evaluate": (pv.evaluate, {}),
    "exact": (pv.exact.elbo, {}),
    "evidence": (pv.log_evidence, {"num_samples": 2}),
    "annealed": (pv.annealed_log_evidence, {}),
    "decompose": (pv.decompose, {}),
    "gap": (pv.inference_gap, {}),
    "calibrate": (pv.calibrate, {}),
    "export": (pv.to_datatree, {"draws": 2}),
}


@pytest.mark.parametrize(("call", "options"), ENTRIES.values(), ids=ENTRIES)
def test_every_entry_refuses_what_is_no_pair_in_the_same_words(call, options):
    model = gaussian().model
    for guide, changes, message in (
        (observing_guide, {}, r"`guide` must have latent sites alone, .*got one that observes \['z'\]"),
        (other_guide, {}, r"`guide` must draw the latents of the model, \['z'\], got \['y'\]"),
        (3, {}, "`guide` must be a Pyro function"),
        (gaussian().guide, {"plate": "rows"}, "(`plate` must be|`model` must have every site in one plate, 'rows')"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call(model, guide, X, **options | changes)


def shifted_model(x, shift):
    with pyro.plate("data", len(x)):
        x, shift = pyro.subsample(x, event_dim=0), pyro.subsample(shift, event_dim=0)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)


def shifted_guide(x, shift):
    with pyro.plate("data", len(x)):
        x, shift = pyro.subsample(x, event_dim=0), pyro.subsample(shift, event_dim=0)
        pyro.sample("z", dist.Normal((x - shift) / 2, 0.7))


def test_data_of_several_tensors_are_taken_together_or_one_by_one():
    data = X[:30, 0], X[:30, 1]
    model, guide = shifted_model, shifted_guide
    for answer in (
        lambda *data: pv.log_evidence(model, guide, *data, num_samples=20).log_evidence,
        lambda *data: pv.annealed_log_evidence(model, guide, *data, num_chains=3, num_temperatures=3).log_evidence,
        lambda *data: pv.exact.log_evidence(model, *data),
        lambda *data: pv.exact.posterior(model, *data).mean,
        lambda *data: pv.exact.elbo(model, guide, *data),
        lambda *data: pv.exact.kl(model, guide, *data),
        lambda *data: torch.tensor(pv.decompose(model, guide, *data).rate.value),
        lambda *data: torch.as_tensor(pv.to_datatree(model, guide, *data, draws=2)["posterior"]["z"].values),
    ):
        torch.testing.assert_close(answer(data), answer(*data), rtol=0, atol=0)
        torch.testing.assert_close(answer(list(data)), answer(*data), rtol=0, atol=0)


HIDDEN = torch.arange(200.0)[:, None]
DEPENDENT = {
    "the mean of all rows": lambda x: x[:, :2] - x[:, :2].mean(0),
    "the next row": lambda x: x[:, :2].roll(1, 0),
    "the place of a row": lambda x: x[:, :2] + 0.1 * torch.arange(len(x))[:, None],
    "a hidden covariate by place": lambda x: x[:, :2] + 0.01 * HIDDEN[: len(x)],
    "statistics of the batch": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)),
    "the range of all rows": lambda x: (x / x.abs().amax(0))[:, :2],
    "the ranks of all rows": lambda x: x[:, :2].argsort(0).argsort(0) / len(x),
    "both neighbours": lambda x: (x + x.roll(1, 0) + x.roll(-1, 0))[:, :2],
    "attention over rows": lambda x: (torch.softmax(x @ x.T, -1) @ x)[:, :2],
    "random numbers": lambda x: x[:, :2] + 0.1 * torch.randn(len(x), 2),
    "one row among many": lambda x: x[:, :2] + (torch.arange(len(x)) == 137)[:, None],
}


def normal_guide(network):
    return guide_of(lambda x: dist.Normal(network(x), 1.0).to_event(1))


@pytest.mark.parametrize("network", DEPENDENT.values(), ids=DEPENDENT)
def test_a_guide_whose_rows_depend_on_more_than_themselves_is_not_amortized(network):
    assert not is_amortized(normal_guide(network), (X,), "data")


INDEPENDENT = {
    "linear": nn.Linear(3, 2),
    "running statistics": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
    "dropout": nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)),
    "random slopes": nn.Sequential(nn.Linear(3, 2), nn.RReLU()),
    "statistics of the row": nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.GroupNorm(1, 2)),
    "statistics of the feature map": nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1), nn.Flatten(), nn.Linear(3, 2)
    ),
    "an index": lambda x: torch.eye(2)[(x[:, 0] > 0).long()],
}


@pytest.mark.parametrize("rows", [1, 2, 3, 200])
@pytest.mark.parametrize("network", INDEPENDENT.values(), ids=INDEPENDENT)
def test_a_guide_whose_rows_depend_on_themselves_is_amortized(network, rows):
    assert is_amortized(normal_guide(network), (X[:rows],), "data")
    assert is_amortized(AutoDelta(lambda x: pyro.sample("w", dist.Normal(0.0, 1.0))), (X[:rows],), "data")


FLOW = {"transforms": 2, "hidden": [320], "context": 32}


@pytest.mark.parametrize("seed", range(3))
def test_a_flow_of_many_variables_is_amortized_and_one_with_parameters_for_each_row_is_not(seed):
    pyro.set_rng_seed(seed)
    x, network = torch.randn(len(X), 400), networks.mlp([256, 256])
    flow = guides.InverseAutoregressiveFlow(400, 32, network, **FLOW)
    flow.rows = nn.Parameter(torch.zeros(2 * len(X), flow.family.num_raw))  # equal for all rows until they are trained

    def guide(x):
        pyro.module("flow", flow)
        guide_of(flow)(x)

    def guide_of_rows(x):
        pyro.module("flow", flow)
        guide_of(lambda x: flow.family(flow.rows[: len(x)]))(x)

    assert is_amortized(guide, (x,), "data")
    assert not is_amortized(guide_of_rows, (x,), "data")


class Amortized(nn.Module):
    """q(z | x), without pyro.subsample."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(2, 1)

    def forward(self, x):
        pyro.module("amortized", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.network(x), 1.0).to_event(1))


def sliced_model(x):
    loading = pyro.param("loading", torch.tensor([1.0, -1.0]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z * loading, 1.0).to_event(1), obs=x)


def sliced_global_model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0).expand([2]).to_event(1), obs=x)


def subsampled_model(x):
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=1)
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], 2), 1.0).to_event(1), obs=x)


def no_guide(x):
    pass


def take_batches(model, guide):
    return ModelGuide.on_batches(model, guide, (ROWS,), 6, "data").take


def test_the_mean_over_a_partition_of_batches_is_the_loss_on_all_rows():
    network = nn.Linear(2, 1)

    def guide(x):  # nearly all mass is near one point of z for each row
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(network(pyro.subsample(x, event_dim=1)), 1e-6).to_event(1))

    pyro.set_rng_seed(0)
    whole, losses = torch.tensor(Trace_ELBO().loss(subsampled_model, guide, ROWS)), []
    take = take_batches(subsampled_model, guide)
    for rows in torch.arange(24).split(6):
        with take(rows) as arguments, torch.no_grad():
            losses.append(Trace_ELBO().loss(subsampled_model, guide, *arguments))
    # Both have -eps^2 / 2 of log q for each of the 24 rows, of variance 1/2.
    noise = 4.5 * (24 / 2 + 24 / 2) ** 0.5
    assert torch.isclose(torch.tensor(losses).mean(), whole, rtol=0, atol=noise)


def test_slices_of_an_amortized_pair_are_scaled_to_all_rows_and_nothing_else_changes():
    guide = Amortized()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    guide(ROWS)
    names = set(pyro.get_param_store().keys())
    with take_batches(sliced_model, guide)(torch.tensor([1, 5, 7])) as (rows,):
        trace = poutine.trace(sliced_model).get_trace(rows)
    assert torch.equal(rows, ROWS[[1, 5, 7]])
    assert trace.nodes["x"]["scale"] == 8.0
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert set(pyro.get_param_store().keys()) == names | {"loading"}
    assert pyro.param("amortized$$$network.weight") is guide.network.weight
    history = pv.fit(sliced_model, guide, ROWS, epochs=100, batch_size=6, lr=0.03).history
    assert history["elbo"][-1] > history["elbo"][0]


def test_a_vae_is_subsampled():
    vae = gaussian(1, 2)
    with take_batches(vae.model, vae.guide)(torch.arange(6)) as arguments:
        assert arguments[0] is ROWS
        trace = poutine.trace(vae.model).get_trace(*arguments)
    assert trace.nodes["z"]["value"].shape == (6, 1)
    assert trace.nodes["x"]["scale"] == 4.0


def test_every_row_of_a_plate_of_fixed_size_is_seen_once_an_epoch_in_a_new_order():
    seen = []

    def model(x):
        with pyro.plate("data", 24) as rows:
            seen.append(rows)
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=pyro.subsample(x, event_dim=0))

    assert pv.fit(model, no_guide, ROWS[:, 0], epochs=2, batch_size=7).steps == 8
    epochs = torch.cat(seen[-8:-4]), torch.cat(seen[-4:])
    assert all(torch.equal(rows.sort().values, torch.arange(24)) for rows in epochs)
    assert not torch.equal(*epochs)


def test_parameters_for_each_datum_in_the_model_are_subsampled_or_refused():
    def model(x, read):
        shift = pyro.param("shift", lambda: torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(read(shift), 1.0), obs=read(x))

    def subsampled(x):
        return model(x, lambda tensor: pyro.subsample(tensor, event_dim=0))

    pv.fit(subsampled, no_guide, ROWS[:, 0], epochs=500, batch_size=6, lr=0.05)
    assert torch.allclose(pyro.param("shift"), ROWS[:, 0], atol=0.05)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="the model is not amortized"):
        pv.fit(lambda x: model(x, lambda tensor: tensor), no_guide, ROWS[:, 0], epochs=1, batch_size=6)
    assert "shift" not in pyro.get_param_store()


def test_an_autoguide_is_unchanged_after_mini_batches():
    guide = AutoNormal(subsampled_model)
    pv.fit(subsampled_model, guide, ROWS, epochs=3, batch_size=7)
    assert guide.create_plates is None
    assert guide.median(ROWS)["z"].shape == (24, 1)


def two_layer_model(x):
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(top, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def two_layer_guide(x):
    slope = pyro.param("slope", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Normal(slope * x[:, 0], 1.0))
        pyro.sample("z", dist.Normal(slope * (top + x[:, 0]), 1.0))


def centring_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("top", dist.Normal(x[:, 0] - x[:, 0].mean(0), 1.0))
        pyro.sample("z", dist.Normal(x[:, 0], 1.0))


def per_datum(x):
    loc = pyro.param("loc", lambda: torch.zeros(len(x), 1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


def per_place(x):
    """Rows take parameters by their place in the batch: the wrong ones where batches are drawn."""
    loc = pyro.param("loc", torch.zeros(24, 1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc[: len(x)], 1.0).to_event(1))


def fixed_size(x):
    """A plate that keeps its size scales the densities of a slice by itself."""
    with pyro.plate("data", 24):
        pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.5)) * x[:, :1], 1.0).to_event(1))


def global_guide(x):
    pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


def test_all_rows_are_compared_in_runs_of_bounded_size(monkeypatch):
    monkeypatch.setattr("pyro_vae.model_guide._BUDGET", 64 * 50)
    seen = []

    def network(x, rare=False):
        seen.append(len(x))
        return x[:, :2] + (x[:, :1] == X[151, :1]) * x.mean() * rare

    assert is_amortized(normal_guide(network), (X,), "data")
    assert max(seen) <= 75
    assert not is_amortized(normal_guide(lambda x: network(x, rare=True)), (X,), "data")


TREATED = torch.zeros(1000).index_fill(0, torch.tensor([17, 500, 999]), 1.0)  # rarely 1


def treated_model(x):
    effect = pyro.param("effect", torch.tensor(0.0))
    with pyro.plate("data", len(x)) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + effect * TREATED[rows], 0.5), obs=x)


def treated_guide(x):
    with pyro.plate("data", len(x)) as rows:
        pyro.sample("z", dist.Normal((x - 5 * TREATED[rows]) / 1.25, 0.2**0.5))


def test_a_covariate_that_the_rows_of_the_plate_index_is_that_of_the_rows_of_a_batch():
    x = torch.randn(1000) + 5 * TREATED
    pv.fit(treated_model, treated_guide, x, epochs=200, batch_size=100, lr=0.1)
    # At the optimum the weighted residuals x - z - effect of the three treated rows are zero on average.
    residuals = (x - (x - 5) / 1.25)[TREATED > 0]
    assert abs(pyro.param("effect").item() - residuals.mean().item()) < 0.5
    assert not is_amortized(treated_model, (x,), "data")


@pytest.mark.parametrize("of_its_own", [False, True])
def test_a_deep_guide_is_judged_though_noise_in_its_weights_would_overflow(of_its_own):
    pyro.set_rng_seed(0)
    network = nn.Sequential(*[nn.Linear(3 if i == 0 else 200, 200) for i in range(12)])
    offsets = torch.zeros(len(X), 200)

    def guide(x):
        pyro.module("deep", network)
        log_scale = network(x) + (pyro.param("offsets", offsets)[: len(x)] if of_its_own else 0.0)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, log_scale.exp()).to_event(1))

    assert is_amortized(guide, (X,), "data") == (not of_its_own)


def test_a_guide_of_two_layers_is_amortized():
    assert pv.fit(two_layer_model, two_layer_guide, ROWS, epochs=1, batch_size=6).steps == 4


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (sliced_global_model, global_guide, r"latents are global, got \['mean'\]"),
        (sliced_model, per_datum, "not amortized"),
        (sliced_model, per_place, "not amortized"),
        (sliced_model, fixed_size, "not amortized"),
        (sliced_model, AutoNormal(sliced_model), "not amortized"),
        (two_layer_model, centring_guide, "the guide is not amortized"),
        (subsampled_model, normal_guide(lambda x: x[:, :1]), "a guide that follows the subsample"),
    ],
)
def test_pairs_that_batches_would_train_wrong_are_refused(model, guide, message):
    with pytest.raises(ValueError, match=message):
        pv.fit(model, guide, ROWS, epochs=1, batch_size=6)
    pyro.clear_param_store()
    assert pv.fit(model, guide, ROWS, epochs=1).steps == 1  # all rows at once are right


def refusing_model(x):
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=1)
        if len(x) < 10:
            raise ValueError("my model wants ten rows")
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, x.new_ones(2)).to_event(1), obs=x)


def subsampled_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.subsample(x, event_dim=1)[:, :1], 1.0).to_event(1))


def indexing_guide(x):
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=1)
        pyro.sample("z", dist.Normal(x[:, :1] + x[9, 0], 1.0).to_event(1))


def normalizing_guide(x):
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=1)
        pyro.sample("z", dist.Normal(nn.BatchNorm1d(1)(x[:, :1]), 1.0).to_event(1))


@pytest.mark.parametrize(("model", "guide", "rows", "error", "message"), [
    (refusing_model, subsampled_guide, 6, ValueError, "^my model wants ten rows"),
    (subsampled_model, indexing_guide, 6, IndexError, "index 9 is out of bounds"),
    (subsampled_model, normalizing_guide, 1, ValueError, "Expected more than 1 value per channel"),
])  # fmt: skip
def test_an_error_of_the_users_own_in_a_batch_is_raised_as_it_is(model, guide, rows, error, message):
    with pytest.raises(error, match=message):
        pv.fit(model, guide, ROWS, epochs=1, batch_size=rows)


def in_plates(*plates):
    """Normal variables in nested plates of (name, size), all latents local to them."""

    def model(x):
        with ExitStack() as stack:
            for dim, (name, size) in enumerate(plates):
                stack.enter_context(pyro.plate(name, size, dim=dim - len(plates)))
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


@pytest.mark.parametrize(
    ("plates", "shape", "expected"),
    [
        ([("data", 6)], (6,), "data"),
        ([("rows", 6)], (6,), "rows"),
        ([("rows", None)], (6,), "rows"),
        ([("rows", 6), ("columns", 6)], (6, 6), "rows"),  # the outermost one of N rows
        ([("columns", 2), ("rows", 6)], (2, 6), "columns"),
        ([("rows", 6), ("data", 2)], (6, 2), "data"),  # by its name
    ],
)
def test_the_default_data_plate_is_found_by_its_role(plates, shape, expected):
    pair = ModelGuide(in_plates(*plates), None, torch.zeros(shape))
    assert pair.plate == expected
    assert [frame.name for frame in pair.units] == [name for name, _ in plates]


def test_a_plate_that_holds_some_observed_sites_is_no_data_plate_by_role():
    def model(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        pyro.sample("total", dist.Normal(0.0, 1.0), obs=x.sum())

    assert ModelGuide(model, None, torch.zeros(6)).plate == "data"  # which no site is in


@pytest.mark.parametrize("names", [("z", "x"), ("latent", "obs"), ("_z", "data_x")])
@pytest.mark.parametrize("size", [len, lambda x: None], ids=["sized", "unsized"])
def test_every_number_is_per_row_of_the_plate_found(names, size):
    def model(x):
        with pyro.plate("rows", size(x)):
            z = pyro.sample(names[0], dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample(names[1], dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", size(x)):
            pyro.sample(names[0], dist.Normal(0.5 * x, 0.5**0.5))  # the posterior

    x = torch.randn(50, generator=torch.Generator().manual_seed(1))
    log_p = dist.Normal(0.0, 2**0.5).log_prob(x)
    assert pv.evaluate(model, guide, x)["elbo"] == pytest.approx(log_p.mean().item(), abs=1e-4)
    assert pv.fit(model, guide, x, epochs=1).history["elbo"][0] == pytest.approx(log_p.mean().item(), abs=1e-4)
    torch.testing.assert_close(pv.log_evidence(model, guide, x, num_samples=5).log_evidence, log_p, atol=1e-4, rtol=0)
    torch.testing.assert_close(pv.exact.log_evidence(model, x), log_p, atol=1e-3, rtol=0)


def test_inspect_finds_the_data_plate():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("latent", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("latent", dist.Normal(0.5 * x, 0.5**0.5))

    found = pv.inspect(model, guide, ROWS[:, 0], num_samples=10, num_simulations=20, max_refined=3)
    assert (found.skipped, found.num_data["gap"]) == ({}, 3)  # rows are independent: some are enough
