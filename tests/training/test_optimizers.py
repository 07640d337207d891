"""Any optimizer of torch trains as in a loop of torch, eager and captured, and one that cannot is refused by name."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.optim.lr_scheduler import OneCycleLR

import pyro_vae as pv
from pyro_vae import schedules
from pyro_vae.compilation.graph import CaptureError

X = pv.datasets.two_gaussians(32, seed=1).x.double()
UNCOMPILED = pytest.mark.usefixtures("uncompiled")

OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "Adam, decayed": partial(torch.optim.Adam, weight_decay=0.1, amsgrad=True),
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.1, betas=(0.8, 0.99)),
    "SGD": torch.optim.SGD,
    "SGD, momentum": partial(torch.optim.SGD, momentum=0.9),
    "SGD, Nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "RMSprop": partial(torch.optim.RMSprop, momentum=0.5, centered=True),
    "Adagrad": partial(torch.optim.Adagrad, lr_decay=0.1),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adamax": torch.optim.Adamax,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "Adadelta": torch.optim.Adadelta,
}
FUSED = ("Adam", "AdamW", "SGD")  # in one kernel, whose last digits may differ
SINGLE = {"NAdam": 1e-6, "ASGD": 1e-6}  # eager torch computes their coefficients in the default dtype, float32
ONE_CYCLE = {"max_lr": 0.05, "total_steps": 12, "base_momentum": 0.6}


def model(x):
    loc = pyro.param("loc", torch.zeros(2, dtype=torch.float64))
    scale = pyro.param("scale", torch.eye(2, dtype=torch.float64), constraint=dist.constraints.lower_cholesky)
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=1)
        pyro.sample("x", dist.MultivariateNormal(loc, scale_tril=scale), obs=x)


def guide(x):
    pass


def parameters():
    return {name: tensor.detach().clone() for name, tensor in pyro.get_param_store().named_parameters()}


def trained(optimizer, **options):
    """The parameters that a run ends with, and its history."""
    pyro.clear_param_store()
    fitted = pv.fit(model, guide, X, **{"epochs": 12, "optimizer": optimizer} | options)
    return parameters(), fitted.history


def trained_by_torch(make, make_scheduler=None, **options):
    """The parameters after twelve steps of a loop of torch, with the gradients of Pyro, and the rates of the steps."""
    pyro.clear_param_store()
    model(X)
    weights = [weight for _, weight in pyro.get_param_store().named_parameters()]
    optimizer, elbo, rates = make(weights, **options), Trace_ELBO(), []
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        elbo.loss_and_grads(model, guide, X)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None and len(rates) < 12:
            scheduler.step()
    return parameters(), rates


def assert_close(ours, theirs, rtol=0.0, atol=0.0):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("lr", [{}, {"lr": 0.002}], ids=["its own rate", "a given rate"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_a_loop_of_torch_to_the_bit(name, lr):
    fused = {"fused": True} if name.startswith(FUSED) and name not in ("Adamax", "Adagrad") else {}
    theirs, _ = trained_by_torch(OPTIMIZERS[name], **lr, **fused)
    ours, history = trained(OPTIMIZERS[name], **lr)
    assert_close(ours, theirs)
    assert history["elbo"][-1] != history["elbo"][0]
    assert "lr" not in history


@UNCOMPILED
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_captured_steps_are_the_eager_ones(name):
    lr = schedules.linear(0.005, 0.001, 12)
    (eager, theirs), (captured, ours) = (trained(OPTIMIZERS[name], lr=lr, compile=one) for one in (False, True))
    tolerance = SINGLE.get(name, 1e-10)
    assert_close(captured, eager, tolerance, tolerance)
    assert ours["elbo"] == pytest.approx(theirs["elbo"], rel=tolerance)
    assert ours["lr"] == theirs["lr"] == [lr(step) for step in range(12)]


CYCLED = ["Adam", "Adam, decayed", "AdamW", "SGD, momentum", "RMSprop", "NAdam", "RAdam", "Adamax"]


@UNCOMPILED
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", CYCLED)
def test_a_scheduler_changes_rate_and_momentum_as_in_torch(name, compile):
    """The cycle begins and ends at a momentum of 0.95, and has 0.6 between."""
    make = partial(OneCycleLR, **ONE_CYCLE)
    theirs, rates = trained_by_torch(OPTIMIZERS[name], make)
    ours, history = trained(OPTIMIZERS[name], lr=schedules.from_torch(make), compile=compile)
    tolerance = SINGLE.get(name, 1e-10)
    assert_close(ours, theirs, tolerance, tolerance)
    assert history["lr"] == pytest.approx(rates, rel=1e-12)
    constant, _ = trained(OPTIMIZERS[name], lr=history["lr"].__getitem__)
    assert any(not torch.allclose(ours[each], constant[each], rtol=1e-6) for each in ours)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["AdamW", "SGD, momentum"])
def test_compiled_steps_are_the_eager_ones_while_rate_and_momentum_change(name):
    lr = schedules.from_torch(partial(OneCycleLR, **ONE_CYCLE))
    eager, compiled = (trained(OPTIMIZERS[name], lr=lr, compile=compile)[0] for compile in (False, True))
    assert_close(compiled, eager, 1e-10, 1e-10)


def test_a_momentum_between_bounds_that_are_the_defaults_is_seen():
    """Adam begins at 0.9, the upper bound of the cycle."""
    cycle = partial(torch.optim.lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.05, step_size_up=3)
    schedule = schedules.from_torch(cycle)
    thirds = [0, 1, 2, 3, 2, 1, 0]
    assert [schedule.momentum(step) for step in range(7)] == pytest.approx([0.9 - 0.1 * one / 3 for one in thirds])
    assert schedules.from_torch(lambda one: OneCycleLR(one, 0.1, 9, cycle_momentum=False)).momentum is None


@pytest.mark.parametrize("optimizer", [
    partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    lambda weights: torch.optim.SGD(weights, lr=0.02, momentum=0.9),
    lambda weights, lr=0.02: torch.optim.SGD(weights, lr=lr, momentum=0.9),
])  # fmt: skip
@UNCOMPILED
@pytest.mark.parametrize("compile", [False, True])
def test_the_rate_of_the_optimizer_is_used_where_none_is_given(optimizer, compile):
    theirs, _ = trained_by_torch(partial(torch.optim.SGD, momentum=0.9), lr=0.02)
    ours, _ = trained(optimizer, compile=compile)
    assert_close(ours, theirs, 1e-10, 1e-10)


@UNCOMPILED
@pytest.mark.parametrize("compile", [False, True])
def test_groups_have_settings_and_rates_of_their_own(compile):
    def make(weights):
        matrices = [weight for weight in weights if weight.dim() > 1]
        vectors = [weight for weight in weights if weight.dim() < 2]
        return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.5, "lr": 0.1}, {"params": vectors}], lr=0.01)

    theirs, _ = trained_by_torch(make)
    ours, _ = trained(make, compile=compile)
    assert_close(ours, theirs, 1e-10, 1e-10)


@pytest.mark.parametrize(("ours", "theirs"), [
    (torch.optim.SGD, pyro.optim.SGD), (torch.optim.RMSprop, pyro.optim.RMSprop), (torch.optim.AdamW, pyro.optim.AdamW)
])  # fmt: skip
def test_parameters_of_later_steps_join_with_a_count_of_their_own(ours, theirs):
    """Pyro has one optimizer for each parameter."""
    settings = {"lr": 0.01} | ({} if ours is torch.optim.AdamW else {"momentum": 0.9})

    def growing():
        calls = []

        def model(x):
            calls.append(1)
            loc = pyro.param("loc", torch.zeros(2, dtype=torch.float64))
            if len(calls) > 5:
                loc = loc + pyro.param("late", torch.ones(2, dtype=torch.float64))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

        return model, calls

    model, calls = growing()
    svi = pyro.infer.SVI(model, guide, theirs(settings), Trace_ELBO())
    for _ in range(12):
        svi.step(X)
    expected = parameters()
    pyro.clear_param_store()
    model, calls = growing()
    optimizer = partial(ours, **{name: value for name, value in settings.items() if name != "lr"})

    def begin_again(epoch):
        """The checks before training have called the model as well."""
        calls[:] = [1] * epoch.steps

    pv.fit(model, guide, X, epochs=12, lr=0.01, optimizer=optimizer, callbacks=[begin_again])
    assert_close(parameters(), expected, 1e-12, 1e-12)


class Counting(torch.optim.Optimizer):
    """Steps that become shorter with a count that is a Python number."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                state["step"] = state.get("step", 0) + 1
                weight.sub_(weight.grad, alpha=group["lr"] / state["step"])


class Traceable(Counting):
    """Steps of a length that does not change, by operations on tensors."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.sub_(group["lr"] * weight.grad)


@UNCOMPILED
def test_an_optimizer_of_the_user_is_captured_where_its_numbers_are_tensors():
    ours, theirs = (trained(Traceable, lr=0.01, compile=compile)[0] for compile in (True, False))
    assert_close(ours, theirs, 1e-10, 1e-10)
    assert_close(theirs, trained(torch.optim.SGD, lr=0.01)[0], 1e-10, 1e-10)


@pytest.mark.parametrize("optimizer", [Counting, torch.optim.Adafactor])
def test_an_optimizer_that_cannot_be_captured_trains_eagerly_and_names_those_that_can(optimizer):
    _, history = trained(optimizer, lr=0.01)
    assert history["elbo"][-1] > history["elbo"][0]
    name = optimizer.__name__
    message = f"`optimizer` must be one whose steps can be captured .*such as Adam, AdamW, .*got {name}"
    with pytest.raises(CaptureError, match=message):
        trained(optimizer, lr=0.01, compile=True)


@UNCOMPILED
def test_a_momentum_that_a_capture_would_fix_is_refused():
    cycle = partial(OneCycleLR, **ONE_CYCLE)
    nesterov = OPTIMIZERS["SGD, Nesterov"]
    with pytest.raises(CaptureError, match=r"got SGD: .* reads the value of a tensor"):
        trained(nesterov, lr=schedules.from_torch(cycle), compile=True)
    to_zero = schedules.from_torch(partial(OneCycleLR, **ONE_CYCLE | {"base_momentum": 0.0, "pct_start": 0.5}))
    with pytest.raises(CaptureError, match="`compile` must be False where a schedule sets the momentum to 0"):
        trained(OPTIMIZERS["SGD, momentum"], lr=to_zero, compile=True)


def of_others(weights):
    return torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)


@pytest.mark.parametrize(("optimizer", "lr", "error", "message"), [
    (torch.optim.LBFGS, None, ValueError, "take a step from one gradient, got LBFGS, which computes the loss sev"),
    (torch.optim.SparseAdam, None, ValueError, "take dense gradients, got SparseAdam, whose step raises: Sparse"),
    (of_others, None, ValueError, "return an optimizer of the parameters .*from of_others of 1 tensors, 0 of the"),
    (lambda weights: None, None, TypeError, "a class of torch.optim, or a function.*<lambda>, which returns a NoneTyp"),
    (lambda: None, None, TypeError, "a class of torch.optim, or a function from.*<lambda>, which raises: .*argument"),
    ("Adam", None, TypeError, "be a class of torch.optim, or a function from a list of .*, got a str"),
    (partial(torch.optim.Adam, betas=(2.0, 0.9)), None, ValueError, "got Adam, which raises: Invalid beta parameter"),
    (lambda weights, lr: torch.optim.SGD(weights, lr=2 * lr), 0.1, ValueError, r"the `lr` that it gets, 0.1.*with 0.2"),
    (torch.optim.Adagrad, schedules.from_torch(partial(OneCycleLR, max_lr=0.1, total_steps=9)), ValueError,
     "have betas or a momentum, which this `lr` changes, got Adagrad"),
])  # fmt: skip
def test_other_optimizers_are_refused_before_any_work(optimizer, lr, error, message):
    def untouched(x):
        raise AssertionError("the model is called")

    with pytest.raises(error, match=f"`optimizer` must .*{message}"):
        pv.fit(untouched, untouched, X, epochs=1, optimizer=optimizer, lr=lr)


@pytest.mark.parametrize("lr", [0.1, schedules.constant(0.1), schedules.on_plateau(0.1)])
@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.SGD, lr=0.1), lambda weights: torch.optim.SGD(weights, lr=0.1)]
)
def test_two_learning_rates_are_a_contradiction(optimizer, lr):
    message = "`lr` must be left out where `optimizer` sets the learning rate itself, got .*0.1.* and (SGD|<lambda>)"
    with pytest.raises(ValueError, match=message):
        trained(optimizer, lr=lr)
