"""Fitting takes the steps of SVI, changes nothing else of the user's, and refuses by name what cannot be trained."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import gaussian, model_of
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.optim import Adam
from torch import nn

import pyro_vae as pv
from pyro_vae import exact, guides, likelihoods, networks, priors
from pyro_vae.handlers import SubsampleRows, WeightKL
from pyro_vae.training.fit import Fitted, as_history

TANH = networks.mlp([8], activation=nn.Tanh)
ENUMERATED = TraceEnum_ELBO(max_plate_nesting=1)
STANDARD_NORMAL = dist.Normal(torch.zeros(1), 1.0).to_event(1)
NAN = torch.tensor([[0.0, 1.0], [2.0, math.nan]])


def gaussian_vae():
    return gaussian(1, 2, prior=priors.Normal(1))


def bernoulli_vae():
    return pv.VAE(
        priors.Bernoulli(2, learnable=True), guides.Bernoulli(2, 2, TANH), likelihoods.Normal(2, 2, networks.linear())
    )


@pytest.fixture
def x():
    return pv.datasets.two_gaussians(64, seed=3).x


def twins(make):
    """Two VAEs of the same parameters, in float64."""
    torch.manual_seed(0)
    first, second = make().double(), make().double()
    second.load_state_dict(first.state_dict())
    return first, second


OBJECTIVES = {
    "Trace_ELBO": (gaussian_vae, Trace_ELBO, False),
    "three particles": (gaussian_vae, lambda: Trace_ELBO(num_particles=3), False),
    "vectorized": (gaussian_vae, lambda: Trace_ELBO(num_particles=3, vectorize_particles=True), False),
    "TraceMeanField_ELBO": (gaussian_vae, TraceMeanField_ELBO, False),
    "TraceGraph_ELBO": (bernoulli_vae, TraceGraph_ELBO, False),
    "score function": (bernoulli_vae, Trace_ELBO, False),
    "TraceEnum_ELBO": (bernoulli_vae, lambda: TraceEnum_ELBO(max_plate_nesting=1), True),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_steps_are_those_of_svi(name, x):
    make, elbo, enumerate_guide = OBJECTIVES[name]
    ours, theirs = twins(make)
    mark = config_enumerate if enumerate_guide else lambda guide: guide
    x = x.double()
    pyro.set_rng_seed(5)
    svi = SVI(theirs.model, mark(theirs.guide), Adam({"lr": 1e-2}), elbo())
    losses = [svi.step(x) for _ in range(30)]
    fitted = pv.fit(ours.model, mark(ours.guide), x, epochs=30, lr=1e-2, elbo=elbo(), seed=5)
    assert np.allclose(np.array(fitted.history["elbo"]) * -64, losses, rtol=1e-9) or name == "TraceMeanField_ELBO"
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(parameter, other, rtol=1e-7, atol=1e-9)


def test_mini_batches_are_those_of_svi_under_the_subsample_handler(x):
    ours, theirs = twins(gaussian_vae)
    x = x.double()
    order = torch.Generator().manual_seed(2)
    pyro.set_rng_seed(2)
    svi = SVI(theirs.model, theirs.guide, Adam({"lr": 1e-2}), Trace_ELBO())
    epochs = []
    for _ in range(4):
        losses = []
        for rows in torch.randperm(64, generator=order).split(20):
            with SubsampleRows("data", rows):
                losses.append(svi.step(x))
        epochs.append(-np.mean(losses) / 64)
    fitted = pv.fit(ours.model, ours.guide, x, epochs=4, batch_size=20, lr=1e-2, seed=2)
    assert fitted.steps == 16
    assert np.allclose(fitted.history["elbo"], epochs, rtol=1e-9)
    assert torch.allclose(ours.decoder.family.log_scale, theirs.decoder.family.log_scale, rtol=1e-7)


def test_a_batch_as_large_as_the_data_is_all_of_them(x):
    sizes = zip(twins(gaussian_vae), (None, 1000), strict=True)
    first, second = (pv.fit(vae.model, vae.guide, x.double(), epochs=5, batch_size=size) for vae, size in sizes)
    assert first.history == second.history


def test_several_tensors_go_to_model_and_guide_together(x):
    def model(inputs, targets):
        slope = pyro.param("slope", torch.zeros(2))
        with pyro.plate("data", len(inputs)):
            inputs = pyro.subsample(inputs, event_dim=1)
            targets = pyro.subsample(targets, event_dim=0)
            pyro.sample("y", dist.Normal(inputs @ slope, 0.1), obs=targets)

    slope = torch.tensor([2.0, -1.0])
    pv.fit(model, lambda inputs, targets: None, (x, x @ slope), epochs=300, batch_size=16, lr=0.05)
    assert torch.allclose(pyro.param("slope"), slope, atol=0.02)


def test_mini_batches_are_right_for_global_latents():
    x = 0.9 + torch.randn(200, generator=torch.Generator().manual_seed(0))

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=pyro.subsample(x, event_dim=0))

    guide = AutoNormal(model)
    pv.fit(model, guide, x, epochs=300, batch_size=40, lr=0.01)
    precision = 201.0
    assert abs(guide.median()["mean"] - x.sum() / precision) < 0.03
    scale = guide.quantiles([0.8413447])["mean"][0] - guide.median()["mean"]
    assert abs(scale - precision**-0.5) < 0.02


def test_mini_batches_are_right_for_autoguides_with_local_latents():
    x = torch.randn(60, generator=torch.Generator().manual_seed(1)) * 2

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=pyro.subsample(x, event_dim=0))

    guide = AutoNormal(model, init_scale=0.7)
    for lr in (0.03, 0.003):
        pv.fit(model, guide, x, epochs=400, batch_size=20, lr=lr)
    assert (guide.median(x)["z"] - x / 2).abs().max() < 0.2


def test_elbo_is_minus_distortion_minus_rate_and_near_the_exact_one(x):
    vae = gaussian_vae()
    history = pv.fit(vae.model, vae.guide, x, epochs=200, lr=1e-2).history
    assert np.allclose(history["elbo"], -np.array(history["distortion"]) - np.array(history["rate"]))
    terms = pv.evaluate(vae.model, vae.guide, x, num_samples=2000)
    assert abs(terms["elbo"] - exact.elbo(vae.model, vae.guide, x).mean()) < 0.02


def test_histories_hold_the_elbo_at_beta_1_for_any_weight(x):
    ours, theirs = twins(gaussian_vae)
    pyro.set_rng_seed(0)
    with torch.no_grad():
        expected = -Trace_ELBO().loss(theirs.model, theirs.guide, x.double()) / 64
    weight = WeightKL(0.25)
    history = pv.fit(weight(ours.model), weight(ours.guide), x.double(), epochs=1, lr=1e-9).history
    assert math.isclose(history["elbo"][0], expected, rel_tol=1e-9)


def test_soft_targets_are_reported_as_a_surrogate():
    vae = gaussian(1, 2, decoder=likelihoods.Bernoulli(1, 2, TANH, soft_targets=True))
    history = pv.fit(vae.model, vae.guide, torch.rand(10, 2), epochs=2, validation=torch.rand(4, 2)).history
    assert "elbo" not in history
    assert {"surrogate", "validation_surrogate"} <= history.keys()


def test_a_latent_that_the_model_sums_out_leaves_the_exact_evidence_as_elbo(x):
    vae = bernoulli_vae()
    history = pv.fit(config_enumerate(vae.model), lambda x: None, x, epochs=1, lr=1e-12, elbo=ENUMERATED).history
    assert history.keys() == {"elbo"}
    assert math.isclose(history["elbo"][0], exact.log_evidence(vae.model, x).mean(), rel_tol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_summed_out_latent_is_reported_alike_on_slices_and_under_a_scale(x, scale):
    def model(x):
        mean = pyro.param("mean", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(mean * (2 * z - 1), 0.5), obs=x)

    scaled, settings = poutine.scale(model, scale=scale), {"epochs": 1, "lr": 1e-9, "elbo": ENUMERATED}
    fits = [pv.fit(scaled, lambda x: None, x[:, 0], batch_size=size, **settings) for size in (None, 16)]
    expected = exact.log_evidence(model, x[:, 0]).mean()
    assert np.allclose([fitted.history["elbo"] for fitted in fits], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "error"), [({}, 1e-4), ({"num_samples": 2000, "expand": True}, 0.1)], ids=["all states", "draws"]
)
def test_enumeration_reports_the_exact_elbo(x, options, error):
    vae = bernoulli_vae()
    terms = pv.evaluate(vae.model, config_enumerate(vae.guide, **options), x, elbo=ENUMERATED)
    assert abs(terms["elbo"] - exact.elbo(vae.model, vae.guide, x).mean()) < error


def test_an_importance_weighted_objective_still_reports_the_elbo(x):
    vae = gaussian_vae()
    elbo = RenyiELBO(alpha=0, num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    history = pv.fit(vae.model, vae.guide, x, epochs=1, lr=1e-9, elbo=elbo).history
    assert abs(history["elbo"][0] - exact.elbo(vae.model, vae.guide, x).mean()) < 0.05


def test_a_guide_that_is_a_point_bounds_nothing(x):
    model = model_of(dist.Normal(0.0, 1e-3), lambda z: dist.Normal(z, 1e-3))
    assert "elbo" not in pv.fit(model, AutoDelta(model), 1e-3 * x[:, 0], epochs=2).history


def test_a_warning_of_validation_late_in_a_run_is_shown():
    net = networks.linear()
    decoder = likelihoods.Normal(1, 1, net, min_scale=0.1)
    vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(1, 1, net), decoder)
    with pytest.warns(UserWarning, match=r"min_scale = 0\.1 binds"):
        pv.fit(vae.model, vae.guide, torch.zeros(200, 1), epochs=600, lr=0.1)


def test_the_bar_is_shown_on_a_terminal_or_on_demand(x, capsys):
    vae = gaussian_vae()
    pv.fit(vae.model, vae.guide, x, epochs=2)
    assert capsys.readouterr().err == ""
    pv.fit(vae.model, vae.guide, x, epochs=2, progress=True)
    assert "elbo=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": np.full((3, 2), "x")}, TypeError, "`data` must be .*got an ndarray of dtype <U1"),
        ({"data": []}, ValueError, "`data` must be .*got no tensor"),
        ({"data": torch.zeros(0, 2)}, ValueError, r"`data` must have .* N >= 1, got shape \(0, 2\), without rows"),
        ({"data": torch.zeros(())}, ValueError, r"`data` must have shape .* with N >= 1, got shape \(\), without rows"),
        ({"data": torch.zeros(4, 2).long()}, TypeError, "must be torch.float32, as its network is, got torch.int64"),
        ({"data": NAN}, ValueError, r"`data` must hold finite numbers, got nan at row 1, column \(1,\)"),
        ({"data": NAN.nan_to_num(math.inf)}, ValueError, r"`data` must hold finite numbers, got inf at row 1"),
        ({"data": (NAN, NAN[:1])}, ValueError, "`data` must be tensors of one number of rows, got 2 and 1"),
        ({"batch_size": -3}, ValueError, "`batch_size` must be .*got -3"),
        ({"batch_size": True}, ValueError, "`batch_size` must be .*got True"),
        ({"lr": 0.0}, ValueError, "`lr` must be .*got 0.0"),
        ({"lr": lambda step: math.nan}, ValueError, "`lr` at step 0 must be a finite number, 0 or more, got nan"),
        ({"lr": lambda step: -1.0}, ValueError, "`lr` at step 0 must be a finite number, 0 or more, got -1.0"),
        ({"schedules": {torch.zeros(()): lambda step: "a"}}, ValueError, "`schedules` at step 0 must be .*, got 'a'"),
        ({"validation": torch.zeros(3, 3)}, ValueError, r"`validation` must have rows like .*got shape \(3,\)"),
        ({"validation": NAN}, ValueError, "`validation` must hold finite numbers, got nan"),
        ({"plate": "rows", "batch_size": 2}, ValueError, "`plate` must be .*got 'rows'"),
        ({"elbo": JitTrace_ELBO()}, ValueError, "`elbo` must be .*got JitTrace_ELBO, which needs TorchScript"),
    ],
)
def test_unusable_arguments_are_refused_by_name(changes, error, message):
    vae = gaussian_vae()
    with pytest.raises(error, match=message):
        pv.fit(vae.model, vae.guide, **({"data": torch.randn(10, 2), "epochs": 1} | changes))


def test_the_elbo_must_fit_the_marks_for_enumeration(x):
    vae = bernoulli_vae()
    with pytest.raises(ValueError, match="enumerate='parallel'"):
        pv.fit(vae.model, config_enumerate(vae.guide, default="sequential"), x, epochs=1, elbo=TraceEnum_ELBO())
    with pytest.raises(ValueError, match="`elbo` must be TraceEnum_ELBO"):
        pv.fit(vae.model, config_enumerate(vae.guide), x, epochs=1)
    with pytest.raises(ValueError, match="`elbo` must not be TraceEnum_ELBO where no latent is marked"):
        pv.fit(vae.model, vae.guide, x, epochs=1, elbo=TraceEnum_ELBO())


def test_validation_of_a_guide_with_parameters_for_each_datum_is_refused(x):
    model = model_of(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
    with pytest.raises(ValueError, match="`validation` needs an amortized guide"):
        pv.fit(model, AutoNormal(model), x[:, 0], epochs=1, validation=x[:, 1])


def test_a_guide_with_a_latent_that_the_model_lacks_is_refused(x):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("zz", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"`guide` must draw the latents of the model, \['z'\], got \['zz'\]"):
        pv.fit(gaussian_vae().model, guide, x, epochs=1)


def test_grey_values_are_refused_even_without_validation():
    vae = gaussian(1, 2, decoder=likelihoods.Bernoulli(1, 2, TANH))
    for run in (
        lambda x: pv.fit(vae.model, vae.guide, x, epochs=1),
        lambda x: pv.evaluate(vae.model, vae.guide, x),
        lambda x: exact.log_evidence(vae.model, x),
    ):
        with pyro.validation_enabled(False), pytest.raises(ValueError, match="threshold the data"):
            run(torch.rand(5, 2))


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_failed_run_does_not_change_the_next(x):
    vae, factor = gaussian_vae(), torch.full((1,), math.nan)

    def likelihood(z):
        return dist.Normal(vae.decoder(z).mean * factor, 1.0, validate_args=False).to_event(1)

    model = model_of(STANDARD_NORMAL, likelihood)
    with pytest.raises(FloatingPointError):
        pv.fit(model, vae.guide, x, epochs=1)
    factor.fill_(1.0)
    assert pv.fit(model, vae.guide, x, epochs=2).steps == 2


def test_parameters_that_run_away_are_reported_with_step_and_site(x):
    vae = gaussian_vae()
    with pytest.raises(FloatingPointError, match=r"step \d+: the loss is .*log_prob of site '[xz]'"):
        pv.fit(vae.model, vae.guide, x, epochs=50, lr=1e20)


def test_an_interrupted_step_leaves_no_gradient(x):
    vae = gaussian_vae()

    class Interrupted(Trace_ELBO):
        def loss_and_grads(self, *args):
            super().loss_and_grads(*args)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pv.fit(vae.model, vae.guide, x, epochs=1, elbo=Interrupted())
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_a_history_is_taken_from_the_result_of_fit_or_as_a_mapping():
    fitted = Fitted(None, None, {"elbo": [-2.0, -1.0], "rate": torch.tensor([0.5, 0.25])}, 0, 2, 1.0)
    assert as_history(fitted) is fitted.history
    assert as_history(fitted.history) is fitted.history


@pytest.mark.parametrize(
    ("history", "error", "got"),
    [
        (None, TypeError, "a NoneType"),
        ([1.0], TypeError, "a list"),
        ({1: [1.0]}, TypeError, "the key 1"),
        ({"elbo": 3.0}, ValueError, r"'elbo' of shape \(\)"),
        ({"elbo": [[1.0], [2.0]]}, ValueError, r"'elbo' of shape \(2, 1\)"),
        ({"elbo": [[1.0], 2.0]}, ValueError, r"\[\[1.0\], 2.0\] for 'elbo'"),
        ({"elbo": ["a"]}, ValueError, "'elbo' .* dtype <U1"),
    ],
)
def test_what_is_no_history_is_refused(history, error, got):
    with pytest.raises(error, match=f"`history` must .*, got {got}"):
        as_history(history)
