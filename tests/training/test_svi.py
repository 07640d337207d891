"""``pv.SVI`` takes the steps of Pyro's, eagerly and captured, and refuses what it cannot do."""

import copy
import math

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI as PyroSVI
from pyro.infer import Trace_ELBO, TraceTailAdaptive_ELBO
from pyro.optim import SGD, Adam
from torch import nn

import pyro_vae as pv

X = pv.datasets.two_gaussians(64, seed=3).x


def vae_of():
    torch.manual_seed(0)
    return pairs.gaussian(1, 2)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("optim", [Adam({"lr": 1e-2, "betas": (0.8, 0.99)}), SGD({"lr": 1e-4, "momentum": 0.9})])
def test_steps_are_those_of_pyro(compile, optim):
    ours, theirs, x = vae_of().double(), vae_of().double(), X.double()
    torch.manual_seed(2)
    svi = PyroSVI(theirs.model, theirs.guide, optim, Trace_ELBO())
    expected = [svi.step(x) for _ in range(30)]
    torch.manual_seed(2)
    fast = pv.SVI(ours.model, ours.guide, optim, Trace_ELBO(), compile=compile)
    assert [fast.step(x) for _ in range(30)] == pytest.approx(expected, rel=1e-9)
    assert all(torch.allclose(a, b, rtol=1e-8) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    losses = []
    for one in (fast, svi):
        torch.manual_seed(3)
        losses.append(one.evaluate_loss(x))
    assert losses[0] == pytest.approx(losses[1])


def regression(x, y=None, *, scale=1.0):
    slope = pyro.param("slope", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * x + z, scale), obs=y)


def regression_guide(x, y=None, *, scale=1.0):
    loc = pyro.param("loc", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.5))


def assert_same_losses(make_pair, take_steps):
    """Compare the losses of Pyro's SVI with those of the captured one."""
    losses = []
    for svi_class, options in ((PyroSVI, {}), (pv.SVI, {"compile": True})):
        pyro.clear_param_store()
        svi = svi_class(*make_pair(), Adam({"lr": 1e-2}), Trace_ELBO(), **options)
        torch.manual_seed(1)
        losses.append(take_steps(svi))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.usefixtures("uncompiled")
def test_values_shapes_and_keyword_arguments_may_change():
    batches = [(torch.randn(n), torch.randn(n), s) for n, s in [(8, 1.0), (8, 1.0), (8, 2.0), (5, 1.0), (8, 1.0)] * 3]
    assert_same_losses(
        lambda: (regression, regression_guide),
        lambda svi: [svi.step(x, y=y, scale=scale) for x, y, scale in batches],
    )


@pytest.mark.usefixtures("uncompiled")
def test_tensors_may_be_given_by_place_or_by_name_in_any_order():
    x, y = torch.randn(8), torch.randn(8)

    def losses(svi):
        return [loss for _ in range(4) for loss in (svi.step(x, y), svi.step(y=x, x=y), svi.step(x, y=y))]

    assert_same_losses(lambda: (regression, regression_guide), losses)


@pytest.mark.integration
def test_data_may_have_other_strides():
    """Compiled: a graph that is replayed uncompiled takes any strides."""

    def pair():
        vae = vae_of()
        return vae.model, vae.guide

    assert_same_losses(pair, lambda svi: [svi.step(x) for x in (X[:2], X[:2], X[:2].t(), X[:2].t(), X[:2])])


@pytest.mark.usefixtures("uncompiled")
def test_a_step_that_is_not_finite_raises_and_the_next_one_continues():
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


def test_a_batch_of_another_size_is_compiled_when_it_takes_over_or_that_pays(monkeypatch):
    compiled = []
    monkeypatch.setattr("pyro_vae.compilation.graph.Graph.compile", lambda self, inputs, _: compiled.append(inputs[0]))
    monkeypatch.setattr("pyro_vae.compilation.cost.paying_calls", lambda _: 3)
    vae = vae_of()
    svi = pv.SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), Trace_ELBO(), compile=True)

    def sizes(*rows):
        for count in rows:
            svi.step(X[:count])
        return list(map(len, compiled))

    assert sizes(8, 8, 8, 5, 8, 5, 8, 5, 8) == [8]  # the first of a size is eager, or its capture
    assert sizes(5, 8, 6, 8, 5) == [8, 5]  # as many replays as take the time of a compilation
    assert sizes(6, 8, 7, 7) == [8, 5, 7]  # twice in a row


@pytest.mark.usefixtures("uncompiled")
def test_the_optimizer_takes_a_scheduler_of_torch():
    vae = vae_of()
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
        ({"optim": torch.optim.Adam}, TypeError, "`optim` must be an optimizer of pyro.optim.*got"),
        ({"loss": Trace_ELBO}, TypeError, "`loss` must be an ELBO.*got <class"),
        ({"compile": "yes"}, TypeError, "`compile` must be .*got 'yes'"),
        ({"clip_norm": 0.0}, ValueError, "`clip_norm` must be .*got 0.0"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, error, message):
    vae = vae_of()
    with pytest.raises(error, match=message):
        pv.SVI(**{"model": vae.model, "guide": vae.guide, "optim": Adam({"lr": 0.1}), "loss": Trace_ELBO()} | arguments)


def dropout(in_features, out_features):
    middle = [nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh()]
    return nn.Sequential(nn.Linear(in_features, 8), *middle, nn.Linear(8, out_features))


def set_data(vae):
    for parameter in vae.decoder.parameters():
        parameter.data = torch.zeros_like(parameter)


def zero_data(vae):
    for parameter in vae.decoder.parameters():
        parameter.data.zero_()


def set_groups(**settings):
    """Set these on all groups of the optimizer, as Pyro has one for each parameter."""
    return lambda vae, optim: [
        group.update(settings) for one in optim.optim_objs.values() for group in one.param_groups
    ]


CHANGES = {
    "frozen": lambda vae, optim: vae.decoder.requires_grad_(False),
    "evaluation": lambda vae, optim: vae.eval(),
    "momentum": lambda vae, optim: setattr(vae.decoder.network[1], "momentum", 0.9),
    "dropout": lambda vae, optim: setattr(vae.decoder.network[2], "p", 0.6),
    "child": lambda vae, optim: setattr(vae.decoder.network, "3", nn.ReLU()),
    "min_scale": lambda vae, optim: setattr(vae.decoder.family, "min_scale", 2.0),
    "data": lambda vae, optim: set_data(vae),
    "zero": lambda vae, optim: zero_data(vae),
    "store": lambda vae, optim: pyro.clear_param_store(),
    "lr": set_groups(lr=0.3),
    "betas": set_groups(betas=(0.5, 0.9)),
    "eps": set_groups(eps=1e-2),
}


QUICK = {"frozen", "min_scale", "data", "lr"}


def losses_of(kind, vae, change, optim, steps=12):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    settings = vae.model, vae.guide, optim, Trace_ELBO()
    svi = PyroSVI(*settings) if kind == "pyro" else pv.SVI(*settings, compile=kind == "captured")
    losses = []
    for step in range(steps):
        if step == steps // 2:
            change(vae, optim)
        losses.append(svi.step(X.double()))
    return losses


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "eager") for name in CHANGES]
    + [(name, "captured") for name in sorted(QUICK)]
    + [pytest.param(name, "captured", marks=pytest.mark.slow) for name in sorted(CHANGES.keys() - QUICK)],
)
def test_changes_in_the_middle_of_a_run_are_heard_as_in_pyro(kind, name):
    found = []
    for one in ("pyro", kind):
        torch.manual_seed(0)
        vae = pairs.gaussian(2, 2, decoder=pv.likelihoods.Normal(2, 2, dropout)).double()
        found.append(losses_of(one, vae, CHANGES[name], Adam({"lr": 1e-2})))
    assert found[1] == pytest.approx(found[0], rel=1e-9)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("compile", [False, True])
def test_what_is_thawed_or_put_in_later_is_trained(compile):
    class Growing(nn.Module):
        def __init__(self, in_features, out_features):
            super().__init__()
            self.linear, self.extra = nn.Linear(in_features, out_features), None

        def forward(self, z):
            return self.linear(z) if self.extra is None else self.linear(z) + self.extra(z)

    vae = pairs.gaussian(1, 2, decoder=pv.likelihoods.Normal(1, 2, Growing))
    network = vae.decoder.network.requires_grad_(False)
    svi = pv.SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), Trace_ELBO(), compile=compile)
    for _ in range(5):
        svi.step(X)
    network.extra = nn.Linear(1, 2)
    network.requires_grad_(True)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    for _ in range(5):
        svi.step(X)
    assert all((old - new).abs().max() > 0.01 for old, new in zip(before, network.parameters(), strict=True))


def store_pair(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, pyro.param("s", torch.tensor(1.0), dist.constraints.positive)), obs=x)


def store_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(5)), 0.1))


STORE = {
    "item": lambda store, saved: store.__setitem__("s", torch.tensor(0.2)),
    "state": lambda store, saved: store.set_state(saved),
    "cleared": lambda store, saved: store.clear(),
    "deleted": lambda store, saved: store.__delitem__("m"),
    "data": lambda store, saved: setattr(dict(store.named_parameters())["m"], "data", torch.ones(5)),
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", ["eager", "captured"])
@pytest.mark.parametrize("name", STORE)
def test_changes_of_the_param_store_are_heard_as_in_pyro(kind, name):
    found = []
    for one in ("pyro", kind):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        settings = store_pair, store_guide, Adam({"lr": 0.05}), Trace_ELBO()
        svi = PyroSVI(*settings) if one == "pyro" else pv.SVI(*settings, compile=one == "captured")
        store, losses = pyro.get_param_store(), []
        for step in range(16):
            if step == 5:
                saved = copy.deepcopy(store.get_state())
            if step == 8:
                STORE[name](store, saved)
            losses.append(svi.step(torch.arange(5.0)))
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("before", "kind"),
    [("pyro", "eager"), ("eager", "pyro"), ("pyro", "captured"), ("captured", "pyro"), ("captured", "captured")],
)
def test_the_state_of_the_optimizer_passes_between_all_kinds(before, kind):
    def run(first, second):
        pyro.clear_param_store()
        vae = vae_of().double()
        pyro.set_rng_seed(0)
        losses, state = [], {}
        for one, lr in ((first, 1e-2), (second, 0.5)):  # the state brings its own rate, as in Pyro
            optim = Adam({"lr": lr})
            optim.set_state(state)
            settings = vae.model, vae.guide, optim, Trace_ELBO()
            svi = PyroSVI(*settings) if one == "pyro" else pv.SVI(*settings, compile=one == "captured")
            losses += [svi.step(X.double()) for _ in range(8)]
            state = optim.get_state()
        return losses

    assert run(before, kind) == pytest.approx(run("pyro", "pyro"), rel=1e-9)


def test_an_optimizer_in_use_is_refused_by_pyro_with_the_way_out():
    vae, optim = vae_of(), Adam({"lr": 1e-2})
    pv.SVI(vae.model, vae.guide, optim, Trace_ELBO()).step(X)
    with pytest.raises(RuntimeError, match=r"`optim` must be an optimizer of its own.*set_state"):
        PyroSVI(vae.model, vae.guide, optim, Trace_ELBO()).step(X)


def test_an_elbo_without_a_loss_is_refused():
    vae = vae_of()
    with pytest.raises(ValueError, match=r"`loss` must be an ELBO with a loss.*got TraceTailAdaptive_ELBO"):
        pv.SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), TraceTailAdaptive_ELBO(num_particles=2))
    with pytest.raises(ValueError, match=r"`elbo` must be an ELBO with a loss"):
        pv.fit(vae.model, vae.guide, X, epochs=1, elbo=TraceTailAdaptive_ELBO(num_particles=2))
