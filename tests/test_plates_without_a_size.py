"""``pyro.plate("data")`` has no size of its own: the rows are those of its sites, and nats are per row, as in Pyro."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_vae as pv
from pyro_vae._utils.traces import plate_scale, set_plate_sizes
from pyro_vae.model_guide import ModelGuide

N = 20
pytestmark = pytest.mark.filterwarnings("ignore:Found plate statements in guide but not model")  # of Pyro
X = torch.randn(N, generator=torch.Generator().manual_seed(0))


def model(x, size=None):
    with pyro.plate("data", size and len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x, size=None):
    slope = pyro.param("slope", torch.tensor(0.5))
    with pyro.plate("data", size and len(x)):
        pyro.sample("z", dist.Normal(slope * x, 0.7))


def sized(run):
    return lambda x: run(x, size=True)


PAIRS = {
    "neither": (model, guide), "the guide": (model, sized(guide)), "the model": (sized(model), guide),
}  # fmt: skip


@pytest.mark.parametrize(("p", "q"), PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize(
    "elbo", [Trace_ELBO(), Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)]
)
def test_nats_per_datum_are_the_loss_of_pyro_over_the_rows(p, q, elbo):
    pyro.set_rng_seed(0)
    loss = elbo.loss(p, q, X)
    found = pv.evaluate(p, q, X, elbo=elbo)
    assert found["elbo"] == pytest.approx(-loss / N, rel=1e-5)
    assert found["elbo"] == pytest.approx(-found["distortion"] - found["rate"], rel=1e-9)
    history = pv.fit(p, q, X, epochs=1, lr=1e-9, elbo=elbo).history
    assert history["elbo"][0] == pytest.approx(found["elbo"], rel=1e-5)


@pytest.mark.parametrize(("p", "q"), PAIRS.values(), ids=PAIRS)
def test_every_answer_is_that_of_a_plate_with_a_size(p, q):
    other = sized(model), sized(guide)
    weighted = {"epochs": 1, "lr": 1e-9, "elbo": pv.objectives.ImportanceWeighted(3)}
    for answer in (
        lambda p, q: pv.exact.log_evidence(p, X),
        lambda p, q: pv.exact.elbo(p, q, X),
        lambda p, q: pv.exact.kl(p, q, X),
        lambda p, q: pv.log_evidence(p, q, X, num_samples=50).log_evidence,
        lambda p, q: torch.as_tensor(pv.to_datatree(p, q, X, draws=3)["sample_stats"]["lp"].values),
        lambda p, q: torch.as_tensor(pv.to_datatree(p, q, X, draws=3)["posterior"]["twice"].values),
        lambda p, q: torch.tensor(pv.fit(p, q, X, **weighted).history["elbo"]),
    ):
        torch.testing.assert_close(answer(p, q), answer(*other))


def test_mini_batches_are_slices_and_patience_keeps_the_best_epoch():
    options = {"epochs": 30, "batch_size": 5, "lr": 0.1, "validation": X[:7], "patience": 3}
    fits = []
    for pair in ((model, guide), (sized(model), sized(guide))):
        pyro.clear_param_store()
        fits.append(pv.fit(*pair, X, **options))
    for name, values in fits[0].history.items():
        assert values == pytest.approx(fits[1].history[name])
    assert max(fits[0].history["validation_elbo"]) < 0
    best = pv.evaluate(model, guide, X[:7], batch_size=5)["elbo"]
    assert best == pytest.approx(max(fits[0].history["validation_elbo"]), rel=1e-5)


def test_a_latent_with_one_value_in_the_plate_is_counted_once():
    """As in Pyro: a distribution in a plate without a size is not expanded."""

    def shared_model(x):
        with pyro.plate("data"):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def shared_guide(x):
        with pyro.plate("data"):
            pyro.sample("mean", dist.Normal(pyro.param("m", torch.tensor(0.1)), 0.3))

    pyro.set_rng_seed(0)
    loss = Trace_ELBO().loss(shared_model, shared_guide, X)
    assert pv.evaluate(shared_model, shared_guide, X)["elbo"] == pytest.approx(-loss / N, rel=1e-5)
    assert ModelGuide(shared_model, shared_guide, X).global_latents == ["mean"]
    with pytest.raises(ValueError, match=r"latents are global, got \['mean'\]"):
        pv.fit(shared_model, shared_guide, X, epochs=1, batch_size=5)
    together = dist.MultivariateNormal(torch.zeros(N), torch.eye(N) + 1.0)
    torch.testing.assert_close(pv.exact.log_evidence(shared_model, X), together.log_prob(X.reshape(-1)))


def test_a_latent_that_only_the_guide_draws_for_each_row_is_refused_before_any_step():
    def one_value(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for estimate in (pv.evaluate, pv.log_evidence, pv.exact.elbo, pv.to_datatree, pv.calibrate):
        with pytest.raises(ValueError, match=r"`model` must draw 'z' .* \(20,\), got \(\)\. A plate needs a size"):
            estimate(one_value, guide, X)


def test_plates_inside_each_other_have_their_own_sizes():
    def nested(x, draw=True, **sizes):
        with pyro.plate("features", sizes.get("features"), dim=-1), pyro.plate("data", sizes.get("data"), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(x.shape) if draw else x / 2, 1.0 if draw else 0.7))
            if draw:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def nested_guide(x):
        nested(x, draw=False)

    x = torch.randn(8, 3)
    for sizes in ({}, {"features": 3}, {"data": 8}):
        pyro.set_rng_seed(0)
        loss = Trace_ELBO().loss(lambda x, sizes=sizes: nested(x, **sizes), nested_guide, x)
        found = pv.evaluate(lambda x, sizes=sizes: nested(x, **sizes), nested_guide, x)
        assert found["elbo"] == pytest.approx(-loss / 8, rel=1e-5)


def test_an_enumerated_latent_has_the_rows_of_its_data():
    def mixture(x):
        with pyro.plate("data"):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    loss = elbo.loss(mixture, lambda x: None, X)
    assert pv.evaluate(mixture, lambda x: None, X, elbo=elbo) == {"elbo": pytest.approx(-loss / N, rel=1e-5)}


def test_sites_are_not_scaled_by_a_plate_without_a_size():
    trace = poutine.trace(model).get_trace(X)
    set_plate_sizes(trace)
    frames = {frame for name in ("z", "x", "twice") for frame in trace.nodes[name]["cond_indep_stack"]}
    assert {(frame.size, frame.full_size) for frame in frames} == {(N, N)}
    assert plate_scale(trace.nodes["x"]) == 1.0


def subsampling(x):
    with pyro.plate("data"):
        x = pyro.subsample(x, event_dim=0)
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize(
    ("p", "q", "purpose"),
    [(subsampling, guide, "pyro.subsample"), (model, AutoNormal(model), "an autoguide")],
    ids=["subsample", "autoguide"],
)
def test_what_needs_a_size_says_so(p, q, purpose, batch_size):
    with pytest.raises(ValueError, match=f"`model` must give the plate 'data' a size for {purpose}, .*len"):
        pv.fit(p, q, X, epochs=1, batch_size=batch_size)
