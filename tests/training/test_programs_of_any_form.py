"""Programs of many forms with one posterior: at it, the ELBO is log p(x), on all rows and on average over batches."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.cevae import TraceCausalEffect_ELBO
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae._utils.plates import every_row
from pyro_vae.model_guide import ModelGuide

N = 24
X = torch.randn(N, generator=torch.Generator().manual_seed(0)) + 1.0


def log_evidence(x):
    """log p(x) of mu ~ N(0, 1) and x_i ~ N(mu, 1)."""
    return dist.MultivariateNormal(torch.zeros(len(x)), torch.eye(len(x)) + 1).log_prob(x).item()


def posterior(*_, **__):
    """The posterior of mu, given all of X."""
    pyro.sample("mu", dist.Normal(X.sum() / (N + 1), (N + 1) ** -0.5))


def mu():
    return pyro.sample("mu", dist.Normal(0.0, 1.0))


def without_plate(x):
    pyro.sample("x", dist.Normal(mu(), 1.0).expand([N]).to_event(1), obs=x)


def in_a_loop_of(plate):
    def model(x):
        loc = mu()
        for row in pyro.plate(plate, len(x)):
            pyro.sample(f"x_{row}", dist.Normal(loc, 1.0), obs=x[row])

    return model


def in_a_markov_loop(x):
    loc = mu()
    for row in pyro.markov(range(len(x))):
        pyro.sample(f"x_{row}", dist.Normal(loc, 1.0), obs=x[row])


def in_two_plates(x, y):
    loc = mu()
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    with pyro.plate("others", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def one_outside(x):
    loc = mu()
    pyro.sample("first", dist.Normal(loc, 1.0), obs=x[0])
    with pyro.plate("data", len(x) - 1):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[1:])


def with_functions_of_latents(x):
    loc = pyro.sample("point", dist.Delta(pyro.deterministic("double", 2 * mu()) / 2))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def posterior_by_auxiliary(*_):
    u = pyro.sample("u", dist.Normal(X.sum() / (N + 1), (N + 1) ** -0.5), infer={"is_auxiliary": True})
    pyro.sample("mu", dist.Delta(u))


def rows_of(plate, **options):
    def model(x):
        loc = mu()
        with pyro.plate(plate, N, **options) as rows:
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=x[rows])

    return model


def random_rows(x):
    loc = mu()
    with pyro.plate("data", N, subsample=torch.randperm(N)[:8]) as rows:
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows])


def closure():
    rows_of("rows")(X)


def own_statement(x):
    loc = mu()
    with pyro.plate("data", N, subsample_size=8):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=pyro.subsample(x, event_dim=0))


def scaled_slices(x):
    loc = mu()
    with pyro.plate("rows", N, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


FORMS = {  # the model, its data, and the number of rows of its data plate
    "no plate": (without_plate, X, 1),
    "a loop over the data plate": (in_a_loop_of("data"), X, N),
    "a loop over another plate": (in_a_loop_of("rows"), X, N),
    "a markov loop": (in_a_markov_loop, X, 1),
    "two plates": (in_two_plates, (X[:10], X[10:]), 10),
    "a site outside of the plate": (one_outside, X, N - 1),
    "functions of latents": (with_functions_of_latents, X, N),
    "row numbers": (rows_of("data"), X, N),
}
SUBSAMPLED = {  # the model, its data, and how it is trained on batches
    "row numbers": (rows_of("data"), X, {"batch_size": 8}),
    "row numbers of another plate": (rows_of("rows"), X, {"batch_size": 8}),
    "row numbers of a closure": (closure, (), {"batch_size": 8}),
    "its own size": (rows_of("data", subsample_size=8), X, {}),
    "its own rows": (random_rows, X, {}),
    "its own size and pyro.subsample": (own_statement, X, {}),
    "slices that it scales": (scaled_slices, X, {"batch_size": 8}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("guide", [posterior, posterior_by_auxiliary], ids=["latents", "auxiliary site"])
@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")  # from Pyro, of the point
def test_the_elbo_at_the_posterior_is_the_evidence(form, guide):
    model, data, size = FORMS[form]
    expected = log_evidence(X) / size
    assert pv.evaluate(model, guide, data)["elbo"] == pytest.approx(expected, abs=1e-4)
    fitted = pv.fit(model, guide, data, epochs=1)
    assert fitted.history["elbo"] == pytest.approx([expected], abs=1e-4)
    assert ("nats of all data" in repr(fitted)) == (size == 1)


@pytest.mark.parametrize("form", SUBSAMPLED)
def test_batches_give_the_evidence_on_average(form):
    model, data, options = SUBSAMPLED[form]
    fitted = pv.fit(model, posterior, data, epochs=100, **options)
    found = torch.tensor(fitted.history["elbo"])
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - log_evidence(X) / N) < 5 * error + 1e-6
    assert error > 0 or "batch_size" in options  # batches of an epoch hold each row once, others differ


@pytest.mark.parametrize("form", SUBSAMPLED)
def test_a_report_is_on_all_rows(form):
    model, data, _ = SUBSAMPLED[form]
    assert pv.evaluate(model, posterior, data)["elbo"] == pytest.approx(log_evidence(X) / N, abs=1e-4)
    given = [data] if data != () else []
    found = pv.log_evidence(model, posterior, *given, num_samples=10)
    assert found.log_evidence.sum().item() == pytest.approx(log_evidence(X), abs=1e-3)


@pytest.mark.parametrize("form", ["row numbers", "its own size"])
def test_a_global_latent_is_found_from_batches(form):
    model, data, options = SUBSAMPLED[form]

    def guide(*args):
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        pyro.sample("mu", dist.Normal(loc, scale))

    schedule = pv.schedules.exponential(0.1, 0.01, 1e-3)
    pv.fit(model, guide, data, epochs=400 if not options else 130, lr=schedule, **options)
    sd = (N + 1) ** -0.5
    assert abs(pyro.param("loc").item() - X.sum().item() / (N + 1)) < 0.5 * sd
    assert pyro.param("scale").item() == pytest.approx(sd, rel=0.3)


def test_batches_of_an_outer_plate_and_its_local_latents():
    x = X.reshape(6, 4)

    def model(x):
        with pyro.plate("groups", 6, dim=-2) as rows:
            loc = mu()
            with pyro.plate("columns", 4, dim=-1):
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("groups", 6, dim=-2) as rows:
            pyro.sample("mu", dist.Normal(x[rows].sum(1, keepdim=True) / 5, 5**-0.5))

    expected = sum(map(log_evidence, x)) / 6
    assert pv.evaluate(model, guide, x)["elbo"] == pytest.approx(expected, abs=1e-4)
    fitted = pv.fit(model, guide, x, epochs=2, batch_size=3)  # both halves of an epoch
    assert fitted.history["elbo"] == pytest.approx([expected] * 2, abs=1e-4)


def test_nested_plates_with_subsamples_of_their_own():
    x = X.reshape(6, 4)

    def model(x):
        with pyro.plate("groups", 6, subsample_size=3, dim=-2) as rows:
            loc = mu()
            with pyro.plate("data", 4, subsample_size=2, dim=-1) as columns:
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows][:, columns])

    def guide(x):
        with pyro.plate("groups", 6, subsample_size=3, dim=-2) as rows:
            pyro.sample("mu", dist.Normal(x[rows].sum(1, keepdim=True) / 5, 5**-0.5))

    expected = torch.tensor([log_evidence(row) for row in x])
    torch.testing.assert_close(pv.log_evidence(model, guide, x, num_samples=5).log_evidence, expected)
    found = torch.tensor(pv.fit(model, guide, x, epochs=500).history["elbo"]) * 4  # per row of "data"
    assert abs(found.mean() - expected.sum()) < 5 * found.std() / len(found) ** 0.5


def test_a_loader_of_slices_that_the_plate_scales():
    loader = DataLoader(TensorDataset(X), batch_size=8, shuffle=True)
    found = torch.tensor(pv.fit(scaled_slices, posterior, loader, epochs=200).history["elbo"])
    assert abs(found.mean() - log_evidence(X) / N) < 5 * found.std() / len(found) ** 0.5
    with pytest.raises(ValueError, match=r"`data` must have all 24 rows of the plate 'rows', .* got 8"):
        pv.evaluate(scaled_slices, posterior, X[:8])


def test_what_batches_cannot_be_of_is_refused():
    for model, message in (
        (without_plate, r"`plate` must be the data plate .* plates are \(none\)"),
        (in_a_loop_of("data"), "`plate` must be the data plate"),
        (rows_of("data", subsample_size=6), "`batch_size` must be left out where the data plate takes a subsample"),
    ):
        with pytest.raises(ValueError, match=message):
            pv.fit(model, posterior, X, epochs=1, batch_size=8)
    with pytest.raises(ValueError, match=r"`data` must have a row for each row of the plate 'data' .* got 4 for 6"):
        pv.fit(rows_of_columns, posterior, X.reshape(4, 6), epochs=1, batch_size=2)


def rows_of_columns(x):
    loc = mu()
    with pyro.plate("data", 6) as rows:
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[0, rows])


def test_a_guide_that_takes_the_subsample_of_both_has_a_bound():
    keep = X > 0

    def model(x):
        with pyro.plate("data", N) as rows, poutine.mask(mask=keep[rows]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("data", N, subsample_size=8) as rows, poutine.mask(mask=keep[rows]):
            pyro.sample("z", dist.Normal(0.5 * x[rows], 0.5**0.5))

    expected = (dist.Normal(0.0, 2**0.5).log_prob(X) * keep).mean().item()
    assert pv.evaluate(model, guide, X)["elbo"] == pytest.approx(expected, abs=1e-4)
    found = torch.tensor(pv.fit(model, guide, X, epochs=200).history["elbo"])
    assert abs(found.mean() - expected) < 5 * found.std() / len(found) ** 0.5


def test_enumeration_without_a_discrete_latent_is_taken_where_pyro_is_to_be_silent():
    elbo = TraceEnum_ELBO(strict_enumeration_warning=False)
    found = pv.evaluate(FORMS["row numbers"][0], posterior, X, elbo=elbo)
    assert found["elbo"] == pytest.approx(log_evidence(X) / N, abs=1e-4)


def test_own_subsamples_come_back_after_a_report():
    model = rows_of("data", subsample_size=8)
    with every_row() as found:
        sites = poutine.trace(model).get_trace(X).nodes
    assert len(sites["obs"]["value"]) == N
    assert found == {"data": (N, 8)}
    assert len(poutine.trace(model).get_trace(X).nodes["obs"]["value"]) == 8


def test_observations_with_a_mask():
    keep = torch.arange(N) % 3 > 0
    seen = X[keep]

    def model(x):
        loc = mu()
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x, obs_mask=keep)

    def guide(x):
        loc = pyro.sample("mu", dist.Normal(seen.sum() / (len(seen) + 1), (len(seen) + 1) ** -0.5))
        with pyro.plate("data", len(x)), poutine.mask(mask=~keep):
            pyro.sample("x_unobserved", dist.Normal(loc, 1.0))

    assert pv.evaluate(model, guide, X)["elbo"] == pytest.approx(log_evidence(seen) / N, abs=1e-4)
    assert ModelGuide(model, guide, X).why_no_bound == ""
    joint = AutoDiagonalNormal(model)
    assert "must have the mask of the model at 'x_unobserved'" in ModelGuide(model, joint, X).why_no_bound


def test_an_autoguide_of_cells_does_not_count_what_is_observed():
    keep = torch.arange(N) % 3 > 0

    def model(x, keep):
        loc = mu()
        with pyro.plate("data", len(x)) as rows:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows], obs_mask=keep[rows])

    expected = log_evidence(X[keep]) / N
    for options in ({"epochs": 500}, {"epochs": 160, "batch_size": 8}):
        pyro.clear_param_store()
        guide = AutoNormal(model)
        pv.fit(model, guide, (X, keep), lr=pv.schedules.exponential(0.1, 0.01, 0.005), **options)
        # The unobserved values follow mu, which a mean-field guide does not: each costs log(1 + Var mu) / 2 or less.
        found = pv.evaluate(model, guide, (X, keep), num_samples=500)["elbo"]
        cost = 0.5 * math.log1p(1 / (int(keep.sum()) + 1)) * int((~keep).sum()) / N
        assert expected - cost - 0.03 < found < expected + 0.03


def test_a_factor_in_the_model_is_trained_and_called_no_bound():
    def model(x):
        loc = mu()
        with pyro.plate("data", len(x)):
            pyro.factor("x", dist.Normal(loc, 1.0).log_prob(x))

    fitted = pv.fit(model, posterior, X, epochs=1)
    assert fitted.history["surrogate"] == pytest.approx([log_evidence(X) / N], abs=1e-4)
    with pytest.raises(ValueError, match=r"`model` must have a normalised likelihood, got .*pyro.factor at \['x'\]"):
        pv.log_evidence(model, posterior, X)


def scaled(x):
    loc, scale = mu(), pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


class Easy(EasyGuide):
    """mu by a group with an auxiliary site, and a point for the scale."""

    def guide(self, x):
        self.map_estimate("scale")
        loc = pyro.param("easy", torch.zeros(1))
        self.group(match="mu").sample("aux", dist.Normal(loc, 0.2).to_event(1), infer={"is_auxiliary": True})


def listed(second):
    guide = AutoGuideList(scaled)
    guide.append(AutoNormal(poutine.block(scaled, expose=["mu"])))
    guide.append(second(poutine.block(scaled, expose=["scale"])))
    return guide


GUIDES = {  # a guide of `scaled`, its auxiliary sites, and its points
    "AutoNormal": (AutoNormal, ["mu_unconstrained", "scale_unconstrained"], []),
    "AutoDiagonalNormal": (AutoDiagonalNormal, ["_AutoDiagonalNormal_latent"], []),
    "AutoMultivariateNormal": (AutoMultivariateNormal, ["_AutoMultivariateNormal_latent"], []),
    "AutoIAFNormal": (AutoIAFNormal, ["_AutoIAFNormal_latent"], []),
    "AutoStructured": (AutoStructured, ["mu_aux", "scale_aux"], []),
    "AutoLaplaceApproximation": (
        AutoLaplaceApproximation,
        ["_AutoLaplaceApproximation_latent"],
        ["mu", "scale"],
    ),
    "AutoDelta": (AutoDelta, [], ["mu", "scale"]),
    "AutoNormalMessenger": (AutoNormalMessenger, [], []),
    "AutoHierarchicalNormalMessenger": (AutoHierarchicalNormalMessenger, [], []),
    "AutoRegressiveMessenger": (AutoRegressiveMessenger, [], []),
    "AutoGuideList": (lambda _: listed(AutoNormal), ["mu_unconstrained", "scale_unconstrained"], []),
    "AutoGuideList with a point": (lambda _: listed(AutoDelta), ["mu_unconstrained"], ["scale"]),
    "EasyGuide": (Easy, ["aux"], ["scale"]),
}


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.filterwarnings("ignore:.*is unused")
def test_every_guide_of_pyro_is_trained_and_its_sites_have_their_roles(name):
    make, auxiliary, points = GUIDES[name]
    torch.manual_seed(0)
    guide = make(scaled)
    with torch.random.fork_rng():
        fitted = pv.fit(scaled, guide, X, epochs=120, lr=0.05)
    pair = ModelGuide(scaled, guide, X)
    assert (pair.auxiliary, sorted(pair.points)) == (auxiliary, points)
    assert pair.bound == ("surrogate" if points else "elbo")
    assert ("must have a density for each continuous latent" in pair.why_no_bound) == bool(points)
    history = fitted.history[pair.bound]
    assert history[-1] > history[0]
    if not points:
        evidence = pv.log_evidence(scaled, guide, X, num_samples=200)
        bound = pv.evaluate(scaled, guide, X, num_samples=200)["elbo"] * N
        assert -0.1 < evidence.log_evidence.item() - bound < 5.0


def test_messenger_guides_find_the_rows_of_a_batch():
    def model(x):
        loc = mu()
        with pyro.plate("data", len(x)) as rows:
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    guide = AutoNormalMessenger(model)
    pv.fit(model, guide, X, epochs=100, batch_size=8, lr=pv.schedules.exponential(0.1, 0.01, 0.01))
    with torch.no_grad():
        z = torch.stack([guide(X)["z"] for _ in range(400)]).mean(0)
    expected = (X + X.sum() / (N + 2)) / 2  # the posterior means
    assert (z - expected).abs().mean() < 0.2  # 0.6 for the rows in another order
    assert math.isfinite(pv.evaluate(model, guide, X)["elbo"])


def regressing(x, y=None):
    """A guide that observes y to train a regression of it, as that of ``pyro.contrib.cevae`` does."""
    with pyro.plate("data", len(x)):
        slope = pyro.param("slope", torch.tensor(0.0))
        y = pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y, infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal((x + y) / 3, 3**-0.5))


def both_observed(x, y=None):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_a_guide_that_observes_an_auxiliary_site_has_the_density_of_its_latents():
    y = X.flip(0)
    covariance = torch.eye(2) + 1
    expected = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(torch.stack([X, y], 1))
    pair = ModelGuide(both_observed, regressing, (X, y))
    assert (pair.regressions, pair.why_no_bound) == (["y"], "")
    torch.testing.assert_close(pv.log_evidence(both_observed, regressing, X, y, num_samples=5).log_evidence, expected)
    assert pv.evaluate(both_observed, regressing, (X, y))["elbo"] == pytest.approx(expected.mean().item(), abs=1e-4)
    fitted = pv.fit(both_observed, regressing, (X, y), epochs=300, lr=0.05, elbo=TraceCausalEffect_ELBO())
    assert fitted.history["elbo"][-1] == pytest.approx(expected.mean().item(), abs=1e-4)
    assert pyro.param("slope").item() == pytest.approx((X @ y / (X @ X)).item(), abs=0.02)  # least squares
    with pytest.raises(ValueError, match=r"`elbo` must be one that trains the sites \['y'\], .* got Trace_ELBO"):
        pv.fit(both_observed, regressing, (X, y), epochs=1, elbo=Trace_ELBO())
