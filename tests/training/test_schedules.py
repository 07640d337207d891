"""Schedules have their formulas; scheduled values are set before each step, and keep the last value."""

import math
from functools import partial
from itertools import pairwise

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import pyro_vae as pv
from pyro_vae import exact, guides, likelihoods, networks, priors
from pyro_vae.handlers import WeightKL
from pyro_vae.training.schedules import constant, cyclical, decayed, exponential, from_torch, linear, on_plateau

X = pv.datasets.two_gaussians(32, seed=1).x


class RecordingPair:
    """A model with a scheduled noise scale, which it records in each run."""

    def __init__(self, value=1.0):
        self.scale = torch.tensor(value)
        self.seen = []

    def model(self, x):
        self.seen.append(self.scale.item())
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            loc = pyro.param("loc", torch.zeros(2))
            pyro.sample("x", dist.Normal(loc, self.scale).to_event(1), obs=x)

    def guide(self, x):
        pass

    def fit(self, schedule, **options):
        return pv.fit(self.model, self.guide, X, schedules={self.scale: schedule}, **({"epochs": 5} | options))


def relaxed_vae(latent=2):
    torch.manual_seed(0)
    return pairs.relaxed(latent, 2)


def temperatures(vae):
    return vae.encoder.family.temperature, vae.prior.family.temperature


def test_the_decay_is_exponential_and_its_logarithm_falls_by_the_rate():
    schedule = exponential(2.0, rate=1e-3)
    for step in (0, 1, 10, 1000, 100_000):
        assert schedule(step) == pytest.approx(2.0 * math.exp(-1e-3 * step), rel=1e-12)
    falls = [math.log(schedule(step) / schedule(step + 1)) for step in range(100)]
    assert falls == pytest.approx([1e-3] * 100, rel=1e-9)
    assert {exponential(0.7, rate=0)(step) for step in range(50)} == {0.7}


def test_the_decay_ends_at_the_floor():
    schedule = exponential(1.0, rate=0.1, floor=0.5)
    values = [schedule(step) for step in range(1000)]
    assert min(values) == values[-1] == schedule(10**9) == 0.5
    assert values[6] == pytest.approx(math.exp(-0.6))
    assert all(before >= after for before, after in pairwise(values))
    assert exponential(1.0, rate=1.0)(10**9) == 0.0
    assert [exponential(0.1, rate=1.0, floor=0.5)(step) for step in (0, 10)] == [0.5, 0.5]


def test_the_decay_is_constant_between_multiples_of_every():
    schedule, smooth = exponential(1.0, rate=0.01, every=4), exponential(1.0, rate=0.01)
    assert [schedule(step) for step in range(12)] == [smooth(step) for step in (0, 4, 8) for _ in range(4)]


def test_a_line_goes_from_start_to_end_and_stays_at_the_end():
    schedule = linear(0.2, 1.2, steps=10)
    assert [schedule(step) for step in range(11)] == pytest.approx([0.2 + 0.1 * step for step in range(11)])
    assert {schedule(step) for step in (10, 11, 10**9)} == {1.2}
    assert linear(1.0, 0.0, steps=4)(1) == 0.75


def test_a_cycle_is_a_line_and_then_constant():
    schedule = cyclical(0.0, 1.0, period=8, rise=0.5)
    assert [schedule(step) for step in range(8)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert [schedule(step + 8) for step in range(800)] == [schedule(step) for step in range(800)]
    assert [cyclical(0.0, 1.0, period=4, rise=1.0)(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: exponential(0.0, 0.1), "`start` must be a positive.*got 0.0"),
        (lambda: exponential(math.nan, 0.1), "`start` must be .*got nan"),
        (lambda: exponential(1.0, -0.1), r"`rate` must be a finite number, 0 or more.*got -0\.1"),
        (lambda: exponential(1.0, math.inf), "`rate` must be .*got inf"),
        (lambda: exponential(1.0, 0.1, floor=-0.5), r"`floor` must be .*got -0\.5"),
        (lambda: exponential(1.0, 0.1, floor=math.nan), "`floor` must be .*got nan"),
        (lambda: exponential(1.0, 0.1, every=0), "`every` must be a positive integer.*got 0"),
        (lambda: exponential(1.0, 0.1, every=2.5), r"`every` must be .*got 2\.5"),
        (lambda: linear(math.nan, 1.0, steps=3), "`start` must be a finite number.*got nan"),
        (lambda: cyclical(0.0, math.inf, period=3), "`end` must be .*got inf"),
        (lambda: cyclical(0.0, 1.0, period=2.5), r"`period` must be .*got 2\.5"),
        (lambda: cyclical(0.0, 1.0, period=3, rise=1.5), "`rise` must be a share above 0 and at most 1, got 1.5"),
        (lambda: from_torch(SCHEDULERS["StepLR"], start=0), "`start` must be .*got 0"),
    ],
)
def test_wrong_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("batch_size", [None, 16])
def test_histories_hold_the_elbo_while_the_weight_of_the_kl_changes(batch_size):
    net, beta, seen = networks.mlp([8], activation=nn.Tanh), torch.tensor(1.0), []
    vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    weight = WeightKL(beta)

    def model(x):
        vae.model(x)
        seen.append(beta.item())

    options = {"epochs": 4, "batch_size": batch_size, "schedules": {beta: linear(0.0, 1.0, steps=4)}}
    history = pv.fit(weight(model), weight(vae.guide), X, lr=1e-12, **options).history
    assert {0.0, 0.25, 0.5, 0.75} <= set(seen)
    assert beta == (0.75 if batch_size is None else 1.0)
    for elbo, distortion, rate in zip(history["elbo"], history["distortion"], history["rate"], strict=True):
        assert elbo == pytest.approx(-distortion - rate, rel=1e-5)
    expected = float(exact.elbo(vae.model, vae.guide, X).mean())
    assert history["elbo"] == pytest.approx([expected] * 4, abs=0.5)


@pytest.mark.parametrize("batch_size", [None, 10])
def test_a_schedule_is_called_once_per_step_before_it_and_the_last_value_stays(batch_size, random_states):
    pair, steps, before = RecordingPair(), [], random_states()
    for _ in range(2):  # a second fit starts at step 0
        steps.clear()
        fitted = pair.fit(lambda step: steps.append(step) or 1.0 + step, batch_size=batch_size)
        assert steps == list(range(fitted.steps))
        assert pair.seen[-fitted.steps :] == [1.0 + step for step in steps]
        assert pair.scale.item() == fitted.steps
    assert random_states() == before


def test_validation_and_evaluation_are_at_the_last_value():
    pair = RecordingPair()
    pair.fit(lambda step: 1.0 + step, epochs=3, validation=X[:4], lr=1e-12)
    assert pair.seen[-6:] == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    elbo = pv.evaluate(pair.model, pair.guide, X)["elbo"]
    expected = dist.Normal(0.0, 3.0).log_prob(X).sum(-1).mean()
    assert elbo == pytest.approx(expected.item(), rel=1e-5)


def test_guide_and_prior_have_their_own_schedules_of_the_temperature():
    vae, seen = relaxed_vae(), []
    ours, theirs = temperatures(vae)

    def guide(x):
        seen.append((vae.encode(x).base_dist.temperature.unique().tolist(), theirs.item()))
        vae.guide(x)

    schedules = {ours: exponential(1.0, rate=0.1, floor=0.5), theirs: exponential(0.5, rate=0.01)}
    pv.fit(vae.model, guide, X, epochs=20, schedules=schedules)
    for step, (of_guide, of_prior) in enumerate(seen[-20:]):
        assert of_guide == pytest.approx([max(0.5, math.exp(-0.1 * step))])
        assert of_prior == pytest.approx(0.5 * math.exp(-0.01 * step))
    assert (ours.item(), theirs.item()) == (0.5, pytest.approx(0.5 * math.exp(-0.19)))


def test_the_elbo_is_that_of_the_relaxed_model_at_the_last_temperature():
    """Densities and draws follow the value, which a state dict holds."""
    vae = relaxed_vae(1)
    pv.fit(vae.model, vae.guide, X, epochs=30, lr=1e-2, schedules=dict.fromkeys(temperatures(vae), lambda step: 0.9))
    other = relaxed_vae(1)
    other.load_state_dict(vae.state_dict())
    assert all(value.item() == pytest.approx(0.9) for value in temperatures(vae) + temperatures(other))
    terms = pv.evaluate(vae.model, vae.guide, X, num_samples=2000)
    assert terms["elbo"] == pytest.approx(exact.elbo(vae.model, vae.guide, X).mean().item(), abs=0.02)
    assert (exact.kl(vae.model, vae.guide, X) > 0).all()


SCHEDULERS = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 7, gamma=0.3),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [5, 20]),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 30, power=2.0),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 30),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-4, 1e-2, 6, cycle_momentum=False),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-2, 40, cycle_momentum=False),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer, 0.1), lr_scheduler.ExponentialLR(optimizer, 0.9)], [10]
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1), lr_scheduler.ExponentialLR(optimizer, 0.9)], optimizer
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_torch_give_their_values_in_any_order_of_steps(name):
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(2))], lr=5e-3)
    scheduler = SCHEDULERS[name](optimizer)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    forwards, at_once = (from_torch(SCHEDULERS[name], start=5e-3) for _ in range(2))
    assert [forwards(step) for step in range(40)] == expected
    assert at_once(39) == expected[39]
    assert [at_once(step) for step in (3, 0, 17)] == [expected[step] for step in (3, 0, 17)]
    assert len(set(expected)) > 1


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("compile", [False, True])
def test_a_scheduler_changes_the_learning_rate_of_a_run_as_in_torch(compile):
    make = SCHEDULERS["CosineAnnealingLR"]

    def model(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    pv.fit(model, lambda x: None, X, epochs=20, lr=from_torch(make, start=0.1), compile=compile)
    trained = pyro.param("loc").detach().clone()
    pyro.clear_param_store()
    loc = pyro.param("loc", torch.zeros(2))
    optimizer = torch.optim.Adam([loc], lr=0.1)
    scheduler = make(optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        (-dist.Normal(loc, 1.0).to_event(1).log_prob(X).sum()).backward()
        optimizer.step()
        scheduler.step()
    assert torch.allclose(trained, loc, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda opt: 0.1,
            TypeError,
            "a function from an optimizer to a scheduler.*got a function that returns a float",
        ),
        (0.1, TypeError, "a function from an optimizer to a scheduler.*got 0.1"),
        (lambda opt: lr_scheduler.ReduceLROnPlateau(opt, "max"), ValueError, "with mode='min', .*, got mode='max'"),
    ],
)
def test_other_functions_are_refused(make, error, message):
    with pytest.raises(error, match=f"`make` must .*{message}"):
        from_torch(make)


def test_a_scheduler_is_refused_after_its_last_step():
    schedule = from_torch(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, 5, cycle_momentum=False))
    assert schedule(4) < schedule(1)
    message = "`lr` must be a scheduler for all steps of the run, got a OneCycleLR without a value for step 7"
    with pytest.raises(ValueError, match=message):
        schedule(6)


@pytest.mark.parametrize("batch_size", [None, 10])
def test_a_constant_schedule_changes_nothing(batch_size):
    runs = []
    for scheduled in (True, False):
        vae = relaxed_vae()
        values = {value: exponential(value.item(), rate=0) for value in temperatures(vae)} if scheduled else None
        fitted = pv.fit(vae.model, vae.guide, X, epochs=5, batch_size=batch_size, lr=1e-2, schedules=values)
        runs.append((fitted.history, [parameter.tolist() for parameter in vae.parameters()]))
    assert runs[0] == runs[1]


KEYS = [torch.ones(1), torch.ones(2, 2), torch.ones((), requires_grad=True), nn.Parameter(torch.tensor(1.0))]
KEYS += [torch.tensor(1), torch.tensor(True), "beta"]


@pytest.mark.parametrize(
    ("schedules", "error", "message"),
    [
        ({key: constant(1.0)}, ValueError, "each key of .* must be a 0-dim tensor without.*got .* as a key")
        for key in KEYS
    ]
    + [
        (kind([(X[0, 0], 0.5)]), TypeError, f"must be a dict from tensors.*got a {kind.__name__}")
        for kind in (list, tuple)
    ]
    + [({X[0, 0]: 0.5}, TypeError, r"each value of .* must be a function of the step.*got 0\.5")],
)
def test_other_schedules_are_refused_before_the_first_step(schedules, error, message):
    pair = RecordingPair()
    with pytest.raises(error, match=message):
        pv.fit(pair.model, pair.guide, X, epochs=1, schedules=schedules)
    assert pair.seen == []


def shifted(**options):
    """A run on one distribution, with data for validation from another one, on which the ELBO soon falls."""

    def model(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    pyro.clear_param_store()
    return pv.fit(model, lambda x: None, X + 2.0, **{"epochs": 30, "batch_size": 16} | options)


def rates_by_torch(history, name, make, start):
    """The rates of the epochs by a scheduler of torch that gets the losses of a history."""
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(2))], lr=start)
    scheduler, rates = make(optimizer), []
    for bound in history[name]:
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(-bound)
    return rates


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("validation", "name"), [(X, "validation_elbo"), (None, "elbo")])
def test_a_plateau_of_the_loss_lowers_the_rate_as_in_torch(validation, name, compile):
    def make(optimizer):
        return lr_scheduler.ReduceLROnPlateau(optimizer, patience=3, factor=0.5, threshold=0.01, threshold_mode="abs")

    lr, seen = from_torch(make, start=0.1), []
    options = {"lr": lr, "validation": validation, "compile": compile}
    history = shifted(callbacks=[lambda epoch: seen.append(epoch.record["lr"])], **options).history
    assert history["lr"] == seen == rates_by_torch(history, name, make, 0.1)
    assert len(set(history["lr"])) > 2
    assert history == shifted(**options).history  # each run begins with a rate of its own


@pytest.mark.parametrize("batch_size", [None, 16, 31])  # of 32 rows: 1, 2 and 1 steps, since a single row joins
def test_a_decay_without_steps_is_that_of_all_steps_of_the_run(batch_size):
    steps = 30 * (2 if batch_size == 16 else 1)
    runs = [shifted(lr=lr, batch_size=batch_size) for lr in (decayed(0.1, hold=0.2), decayed(0.1, steps, hold=0.2))]
    assert runs[0].steps == steps
    assert runs[0].history == runs[1].history
    assert runs[0].history["lr"][0] == 0.1
    assert runs[0].history["lr"][-1] < 0.002


def test_a_decay_without_steps_is_refused_for_a_stream_of_unknown_length():
    loader = torch.utils.data.DataLoader(X, batch_size=16)
    message = r"`lr` must be a schedule with a number of steps, .*got decayed\(start=0.1, hold=0.5, end=0.01\)"
    with pytest.raises(ValueError, match=message):
        pv.fit(RecordingPair().model, lambda x: None, loader, epochs=2, lr=decayed(0.1))


def test_on_plateau_is_the_scheduler_of_torch_with_differences_in_nats():
    lr = on_plateau(0.1, factor=0.5, patience=2, threshold=0.01, floor=0.03)
    history = shifted(lr=lr, validation=X).history

    def make(optimizer):
        settings = {"factor": 0.5, "patience": 2, "threshold": 0.01, "min_lr": 0.03}
        return lr_scheduler.ReduceLROnPlateau(optimizer, threshold_mode="abs", **settings)

    assert history["lr"] == rates_by_torch(history, "validation_elbo", make, 0.1)
    assert sorted(set(history["lr"])) == [0.03, 0.05, 0.1]


def test_a_higher_loss_below_zero_is_no_improvement():
    """Torch's own threshold is relative, which takes -0.9 * 100 for lower than -100."""
    ours = on_plateau(1.0, factor=0.5, patience=1, threshold=0.0).begin()
    theirs = from_torch(partial(lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=1, threshold=0.1), 1.0).begin()
    for loss in (-100.0, -99.0, -98.0, -97.0):
        ours.update(loss)
        theirs.update(loss)
    assert (ours(0), theirs(0)) == (0.5, 1.0)


def test_the_history_has_the_rate_of_the_last_step_of_each_epoch():
    lr = linear(0.1, 0.0, steps=60)
    for options in ({}, {"validation": X}):
        fitted = shifted(lr=lr, **options)
        history = fitted.history
        assert history["lr"] == [lr(2 * epoch + 1) for epoch in range(30)]
        assert list(history)[:4] == ["elbo", "distortion", "rate", "lr"]
        assert all(len(values) == 30 for values in history.values())
        assert "lr" not in fitted._repr_html_()  # it is not in nats
