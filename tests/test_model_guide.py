"""One door: a pair is run few times before the first step or draw, and what it is stands in one object."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import bernoulli, gaussian
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_vae as pv
from pyro_vae.model_guide import ModelGuide, is_amortized

X = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
MOST_RUNS = 4


class FirstDraw(Exception):
    """Raised where the work that a check precedes begins."""


class Counted:
    """A pair that counts its own calls."""

    def __init__(self, vae, enumerates=False):
        self.calls = {"model": 0, "guide": 0}
        self.model = self._counting("model", vae.model)
        guide = self._counting("guide", vae.guide)
        self.guide = config_enumerate(guide) if enumerates else guide

    def _counting(self, who, run):
        def counting(*args):
            self.calls[who] += 1
            return run(*args)

        return counting


def sliced_vae():
    """A VAE without ``pyro.subsample``."""
    vae = gaussian()

    def model(x):
        vae.register()
        with pyro.plate("data", len(x)):
            pyro.sample("x", vae.decoder(pyro.sample("z", vae.prior())), obs=x)

    def guide(x):
        vae.register()
        with pyro.plate("data", len(x)):
            pyro.sample("z", vae.encoder(x))

    vae.model, vae.guide = model, guide
    return vae


@pytest.mark.parametrize("make", [gaussian, sliced_vae], ids=["subsampled", "sliced"])
@pytest.mark.parametrize("batch_size", [None, 50])
@pytest.mark.parametrize("transform", [None, lambda x: 2 * x], ids=["plain", "transformed"])
@pytest.mark.parametrize("validation", [None, X[:40]], ids=["no validation", "validation"])
def test_few_runs_precede_the_first_step_of_fit(make, batch_size, transform, validation, monkeypatch):
    pair = Counted(make())

    def stop(*args, **options):
        raise FirstDraw

    monkeypatch.setattr("pyro_vae.training.step.Step.__call__", stop)
    with pytest.raises(FirstDraw):
        pv.fit(
            *(pair.model, pair.guide, X),
            epochs=1, batch_size=batch_size, transform=transform, validation=validation,
        )  # fmt: skip
    assert 1 <= pair.calls["model"] <= MOST_RUNS
    assert 1 <= pair.calls["guide"] <= MOST_RUNS


def test_few_runs_precede_the_first_step_of_an_enumerated_pair(monkeypatch):
    pair = Counted(bernoulli(), enumerates=True)
    counts = {}

    def note(self, model, guide, *args, **options):
        counts.update(pair.calls)
        raise FirstDraw

    monkeypatch.setattr(TraceEnum_ELBO, "loss_and_grads", note)
    with pytest.raises(FirstDraw):
        pv.fit(pair.model, pair.guide, X, epochs=1, batch_size=50, elbo=TraceEnum_ELBO(max_plate_nesting=1))
    assert max(counts.values()) <= MOST_RUNS


@pytest.mark.parametrize("rows", [100, 200], ids=["one batch", "batches of rows"])
def test_few_runs_precede_the_first_draw_of_log_evidence(rows, monkeypatch):
    pair = Counted(gaussian())

    def stop(*args):
        raise FirstDraw

    monkeypatch.setattr("pyro_vae.evidence.importance_sampling._log_weights", stop)
    with pytest.raises(FirstDraw):
        pv.log_evidence(pair.model, pair.guide, X[:rows])
    assert max(pair.calls.values()) <= MOST_RUNS


def test_few_runs_precede_the_first_draw_of_an_export(monkeypatch):
    pair = Counted(gaussian())

    def stop(*args):
        raise FirstDraw

    monkeypatch.setattr("pyro_vae.inference_data.sampler.JointSampler.chunks", stop)
    with pytest.raises(FirstDraw):
        pv.to_datatree(pair.model, pair.guide, X[:10], draws=5)
    assert max(pair.calls.values()) <= MOST_RUNS


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


def test_looking_at_a_pair_changes_nothing(random_states):
    vae = gaussian()
    before, state = random_states(), {name: value.clone() for name, value in vae.state_dict().items()}
    pair = ModelGuide(vae.model, vae.guide, X)
    assert pair.is_amortized("model")
    assert pair.is_amortized("guide")
    assert random_states() == before
    assert all(value.equal(state[name]) for name, value in vae.state_dict().items())


def reading(network):
    """A guide whose location is a function of all rows."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(network(x), 1.0).to_event(1))

    return guide


HIDDEN = torch.arange(200.0)[:, None]
DEPENDENT = {
    "the mean of all rows": lambda x: x[:, :2] - x[:, :2].mean(0),
    "the next row": lambda x: x[:, :2].roll(1, 0),
    "the place of a row": lambda x: x[:, :2] + 0.1 * torch.arange(len(x))[:, None],
    "a covariate of its own by place": lambda x: x[:, :2] + 0.01 * HIDDEN[: len(x)],
    "batch normalisation": torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)),
    "one row among many": lambda x: x[:, :2] + (torch.arange(len(x)) == 137)[:, None],
}


@pytest.mark.parametrize("network", DEPENDENT.values(), ids=DEPENDENT)
def test_a_guide_whose_rows_depend_on_more_than_themselves_is_not_amortized(network):
    assert not is_amortized(reading(network), (X,), "data")


@pytest.mark.parametrize("rows", [1, 2, 3, 200])
def test_a_guide_whose_rows_depend_on_themselves_is_amortized(rows):
    assert is_amortized(reading(torch.nn.Linear(3, 2)), (X[:rows],), "data")
    assert is_amortized(AutoDelta(lambda x: pyro.sample("w", dist.Normal(0.0, 1.0))), (X[:rows],), "data")


def extra_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))
        pyro.sample("other", dist.Normal(0.0, 1.0))


def observing_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1), obs=x[:, :2])


def other_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x[:, :2], 1.0).to_event(1))


ENTRIES = {
    "fit": lambda model, guide, **options: pv.fit(model, guide, X, epochs=1, **options),
    "evaluate": lambda model, guide, **options: pv.evaluate(model, guide, X, **options),
    "exact": lambda model, guide, **options: pv.exact.elbo(model, guide, X, **options),
    "evidence": lambda model, guide, **options: pv.log_evidence(model, guide, X, num_samples=2, **options),
    "annealed": lambda model, guide, **options: pv.annealed_log_evidence(model, guide, X, **options),
    "decompose": lambda model, guide, **options: pv.decompose(model, guide, X, **options),
    "gap": lambda model, guide, **options: pv.inference_gap(model, guide, X, **options),
    "calibrate": lambda model, guide, **options: pv.calibrate(model, guide, X, **options),
    "export": lambda model, guide, **options: pv.to_datatree(model, guide, X, draws=2, **options),
}


@pytest.mark.parametrize("call", ENTRIES.values(), ids=ENTRIES)
def test_every_entry_refuses_what_is_no_pair_in_the_same_words(call):
    model = gaussian().model
    with pytest.raises(ValueError, match=r"`guide` must have latent sites alone, .*got one that observes \['z'\]"):
        call(model, observing_guide)
    with pytest.raises(ValueError, match=r"`guide` must draw (the latents|latents|every latent) of the model, \['z'\]"):
        call(model, other_guide)
    with pytest.raises((ValueError, TypeError), match="`guide` must be a Pyro function"):
        call(model, 3)
    with pytest.raises(ValueError, match="(`plate` must be|`model` must have every site in one plate, 'rows')"):
        call(model, gaussian().guide, plate="rows")
