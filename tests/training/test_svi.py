"""``pv.SVI`` takes the steps of Pyro's, eagerly and captured, and refuses what it cannot do."""

import math

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI as PyroSVI
from pyro.infer import Trace_ELBO
from pyro.optim import SGD, Adam, ClippedAdam, ExponentialLR

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


SCHEDULER = ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9})
CLIPPED = Adam({"lr": 0.1}, {"clip_norm": 1.0})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optim": torch.optim.Adam}, TypeError, "`optim` must be an optimizer of pyro.optim.*got"),
        ({"optim": SCHEDULER}, ValueError, "`optim` must be an optimizer, got PyroLRScheduler, a scheduler"),
        ({"optim": CLIPPED}, ValueError, "`optim` must have no clip_args.*got some; use .*clip_norm"),
        (
            {"optim": ClippedAdam({"lr": 0.1}), "compile": True},
            ValueError,
            "of torch.optim.*got ClippedAdam, which counts",
        ),
        ({"loss": Trace_ELBO}, TypeError, "`loss` must be an ELBO.*got <class"),
        ({"compile": "yes"}, TypeError, "`compile` must be .*got 'yes'"),
        ({"clip_norm": 0.0}, ValueError, "`clip_norm` must be .*got 0.0"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, error, message):
    vae = vae_of()
    with pytest.raises(error, match=message):
        pv.SVI(**{"model": vae.model, "guide": vae.guide, "optim": Adam({"lr": 0.1}), "loss": Trace_ELBO()} | arguments)
