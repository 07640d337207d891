"""``pv.SVI`` takes what ``pyro.infer.SVI`` takes: guides, losses and optimizers, eager and captured, in its numbers."""

import copy
import warnings
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import optim as optimizers
from pyro import poutine
from pyro.contrib.cevae import Guide as CevaeGuide
from pyro.contrib.cevae import Model as CevaeModel
from pyro.contrib.cevae import TraceCausalEffect_ELBO
from pyro.contrib.easyguide import EasyGuide
from pyro.contrib.gp.kernels import RBF
from pyro.distributions import constraints
from pyro.infer import SVI as PyroSVI
from pyro.infer import (
    EmpiricalMarginal,
    EnergyDistance,
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from pyro.infer import autoguide as auto
from pyro.nn import PyroModule
from pyro.optim import Adam
from pyro.optim.clipped_adam import ClippedAdam
from pyro.optim.horovod import HorovodOptimizer
from pyro.optim.multi import MixedMultiOptimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

import pyro_vae as pv
from pyro_vae.compilation.graph import CaptureError

X = torch.tensor([0.3, -1.2, 2.0, 0.7, 1.1, -0.4, 0.2, 1.9])


def global_model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def local_model(x, subsample_size=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    noise = pyro.param("noise", torch.tensor(0.7), constraint=constraints.positive)
    with pyro.plate("data", len(x), subsample_size=subsample_size) as rows:
        z = pyro.sample("z", dist.Normal(slope, 1.0))
        pyro.sample("x", dist.Normal(z, noise), obs=x[rows])


def subsampled_model(x):
    local_model(x, subsample_size=3)


def discrete_model(x):
    p = pyro.param("p", torch.tensor(0.4), constraint=constraints.unit_interval)
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(p))
        z = pyro.sample("z", dist.Normal(2 * k, 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


def discrete_guide(x):
    q = pyro.param("q", 0.5 * torch.ones(len(x)), constraint=constraints.unit_interval)
    loc = pyro.param("loc", torch.zeros(len(x)))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(q))
        pyro.sample("z", dist.Normal(loc + k, 0.5))


def continuous_guide(x):
    loc = pyro.param("loc", torch.zeros(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.5))


MODELS = {"global": global_model, "local": local_model, "subsampled": subsampled_model}


def guide_list(model):
    first = "loc" if model is global_model else "slope"
    guide = auto.AutoGuideList(model)
    guide.append(auto.AutoNormal(poutine.block(model, expose=[first])))
    guide.append(auto.AutoDelta(poutine.block(model, hide=[first])))
    return guide


def callable_list(model):
    """An ``AutoCallable`` for the global latents, next to an automatic guide of the local ones."""

    def first(x):
        loc = pyro.param("first_loc", torch.tensor(0.1))
        if model is global_model:
            pyro.sample("scale", dist.LogNormal(loc, 0.3))
        else:
            pyro.sample("slope", dist.Normal(loc, 0.3))

    name = "scale" if model is global_model else "slope"
    guide = auto.AutoGuideList(model)
    guide.append(auto.AutoCallable(poutine.block(model, expose=[name]), first))
    guide.append(auto.AutoDiagonalNormal(poutine.block(model, hide=[name])))
    return guide


def easy_guide(model):
    class Guide(EasyGuide):
        def guide(self, x):
            if model is global_model:
                group = self.group(match="loc|scale")
                loc = pyro.param("group_loc", torch.zeros(group.event_shape))
                group.sample("both", dist.Normal(loc, 0.5).to_event(1))
                return
            self.map_estimate("slope")
            group = self.group(match="z")
            with self.plate("data", len(x), subsample_size=3 if model is subsampled_model else None):
                loc = pyro.param("group_loc", torch.zeros(len(x), 1), event_dim=1)
                group.sample("all", dist.Normal(loc, 0.5).to_event(1))

    return Guide(model)


GUIDES = {
    "AutoDelta": auto.AutoDelta,
    "AutoNormal": auto.AutoNormal,
    "AutoDiagonalNormal": auto.AutoDiagonalNormal,
    "AutoMultivariateNormal": auto.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": lambda model: auto.AutoLowRankMultivariateNormal(model, rank=1),
    "AutoLaplaceApproximation": auto.AutoLaplaceApproximation,
    "AutoIAFNormal": lambda model: auto.AutoIAFNormal(model, hidden_dim=[12]),
    "AutoNormalizingFlow": lambda model: auto.AutoNormalizingFlow(model, dist.transforms.planar),
    "AutoGuideList": guide_list,
    "AutoCallable": callable_list,
    "AutoNormalMessenger": auto.AutoNormalMessenger,
    "AutoHierarchicalNormalMessenger": auto.AutoHierarchicalNormalMessenger,
    "AutoRegressiveMessenger": auto.AutoRegressiveMessenger,
    "AutoStructured": lambda model: auto.AutoStructured(model, conditionals="mvn", dependencies="linear"),
    "AutoGaussian": auto.AutoGaussian,
    "EasyGuide": easy_guide,
}
FAST = {"EasyGuide"}  # captured; the others are slow


def assert_as_pyro(run, **options):
    """Compare the numbers of a run with Pyro's SVI and with ours; ``run`` gets the class and these options."""
    found = []
    for svi_class, given in ((PyroSVI, {}), (pv.SVI, options)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        losses = run(lambda *args, svi_class=svi_class, given=given, **kwargs: svi_class(*args, **kwargs, **given))
        params = pyro.get_param_store().named_parameters()
        found.append([*losses, *(float(value.detach().sum()) for _, value in sorted(params))])
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)


EITHER = pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])


def slow_unless(fast, *values):
    return pytest.param(*values, marks=[] if fast else pytest.mark.slow)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("model", "guide", "compile"),
    [
        slow_unless(model == "subsampled" and (not compile or guide in FAST), model, guide, compile)
        for model, guide, compile in product(MODELS, GUIDES, (False, True))
    ],
)
def test_each_guide_takes_the_steps_of_pyro(model, guide, compile):
    def run(make_svi):
        program = MODELS[model]
        svi = make_svi(program, GUIDES[guide](program), Adam({"lr": 0.02}), Trace_ELBO())
        return [*(svi.step(X) for _ in range(10)), svi.evaluate_loss(X)]

    assert_as_pyro(run, compile=compile)


def hand_written(model, guide, *args, **kwargs):
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args, **kwargs)
    return guide_trace.log_prob_sum() - model_trace.log_prob_sum()


def with_gradients(model, guide, *args, **kwargs):
    loss = hand_written(model, guide, *args, **kwargs)
    loss.backward()
    return loss


class OwnELBO(Trace_ELBO):
    """An ELBO that runs the pair in its own way."""

    def loss(self, model, guide, *args, **kwargs):
        return float(hand_written(model, guide, *args, **kwargs).detach())

    def loss_and_grads(self, model, guide, *args, **kwargs):
        return with_gradients(model, guide, *args, **kwargs).detach()


def sleep_model(x, observations=None):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(pyro.param("p", torch.tensor(0.4)), 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=observations["x"])


def sleep_guide(x, observations=None):
    slope = pyro.param("m", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * observations["x"], 0.5))


def sleep_pair():
    return sleep_model, sleep_guide


def local_pair():
    return local_model, auto.AutoNormal(local_model)


def monte_carlo_model(x):
    return config_enumerate(discrete_model, default="parallel", expand=False, num_samples=3, tmc="mixture")(x)


def cevae_pair():
    config = {
        "latent_dim": 2, "feature_dim": 1, "outcome_dist": "normal", "hidden_dim": 5, "num_layers": 2, "num_samples": 3
    }  # fmt: skip
    pyro.set_rng_seed(0)
    pair = PyroModule("pair")  # without it, networks of the same names in both have the same names in Pyro's store
    pair.model, pair.guide = CevaeModel(config), CevaeGuide(config)
    treated = (X > 0.5).float()

    def call(program):
        def run(x):
            program(x[:, None], treated, x, size=len(x))

        return run

    return call(pair.model), call(pair.guide)


def baseline_pair():
    """A guide whose score-function gradient has a baseline by a network, with its own parameters."""
    network = torch.nn.Linear(len(X), len(X))

    def guide(x):
        pyro.module("network", network)
        q = pyro.param("q", 0.5 * torch.ones(len(x)), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            baseline = {"nn_baseline": network, "nn_baseline_input": x}
            k = pyro.sample("k", dist.Bernoulli(q), infer={"baseline": baseline})
            pyro.sample("z", dist.Normal(k, 0.5))

    return discrete_model, guide


def parallel_pair():
    """``AutoDiscreteParallel`` for the discrete latent of each datum."""
    guide = auto.AutoGuideList(discrete_model)
    guide.append(auto.AutoNormal(poutine.block(discrete_model, hide=["k"])))
    guide.append(auto.AutoDiscreteParallel(poutine.block(discrete_model, expose=["k"])))
    return discrete_model, guide


LOSSES: dict[str, Any] = {
    "Trace_ELBO": (local_pair, lambda: Trace_ELBO(num_particles=3)),
    "Trace_ELBO, vectorized": (local_pair, lambda: Trace_ELBO(num_particles=3, vectorize_particles=True)),
    "Trace_ELBO, score function": (lambda: (discrete_model, discrete_guide), Trace_ELBO),
    "TraceGraph_ELBO": (lambda: (discrete_model, discrete_guide), TraceGraph_ELBO),
    "TraceGraph_ELBO, baseline": (baseline_pair, TraceGraph_ELBO),
    "TraceMeanField_ELBO": (local_pair, TraceMeanField_ELBO),
    "TraceEnum_ELBO, guide": (lambda: (discrete_model, config_enumerate(discrete_guide)), TraceEnum_ELBO),
    "TraceEnum_ELBO, model": (lambda: (config_enumerate(discrete_model), continuous_guide), TraceEnum_ELBO),
    "TraceEnum_ELBO, AutoDiscreteParallel": (parallel_pair, lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "TraceTMC_ELBO": (
        lambda: (monte_carlo_model, continuous_guide),
        lambda: TraceTMC_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    ),
    "RenyiELBO": (local_pair, lambda: RenyiELBO(alpha=0.5, num_particles=3)),
    "ReweightedWakeSleep": (lambda: (discrete_model, discrete_guide), lambda: ReweightedWakeSleep(num_particles=3)),
    "ReweightedWakeSleep, sleep": (sleep_pair, lambda: ReweightedWakeSleep(num_particles=3, insomnia=0.5)),
    "Trace_MMD": (local_pair, lambda: Trace_MMD(kernel=RBF(input_dim=1), num_particles=5)),
    "TraceCausalEffect_ELBO": (cevae_pair, TraceCausalEffect_ELBO),
    "EnergyDistance": (local_pair, lambda: EnergyDistance(prior_scale=0.1, num_particles=4)),
    "differentiable_loss": (local_pair, lambda: Trace_ELBO().differentiable_loss),
    "hand-written": (local_pair, lambda: hand_written),
    "hand-written gradients": (local_pair, lambda: (hand_written, with_gradients)),
    "an ELBO of the user": (local_pair, OwnELBO),
}
FAST_LOSSES = {"ReweightedWakeSleep, sleep", "EnergyDistance", "TraceGraph_ELBO", "hand-written"}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("loss", "compile"),
    [slow_unless(not compile or loss in FAST_LOSSES, loss, compile) for loss in LOSSES for compile in (False, True)],
)
def test_each_loss_takes_the_steps_of_pyro(loss, compile):
    make_pair, make_loss = LOSSES[loss]

    def run(make_svi):
        model, guide = make_pair()
        losses = make_loss()
        own = losses if isinstance(losses, tuple) else (losses,)
        svi = make_svi(model, guide, Adam({"lr": 0.02}), *own)
        keywords = {"observations": {"x": X}} if model is sleep_model else {}
        found = [svi.step(X, **keywords) for _ in range(10)]
        if not isinstance(losses, EnergyDistance):
            found.append(svi.evaluate_loss(X, **keywords))
        return [float(number) for loss in found for number in (loss if isinstance(loss, tuple) else (loss,))]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Deterministic|.*'obs' |.*log_prob.*|Found vars in model but not guide")
        if (loss, compile) == ("an ELBO of the user", True):
            with pytest.raises(CaptureError, match=r"reads the value of a tensor .*test_svi_programs.py"):
                assert_as_pyro(run, compile=compile)
        else:
            assert_as_pyro(run, compile=compile)


def adam(**options):
    return {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, **options}


def by_name(name):
    return {"lr": 0.1 if "loc" in name else 0.02}


def clip_by_name(module, name):
    return {"clip_norm": 0.5} if "loc" in name else {}


SETTINGS = {
    "lr": 0.1,
    "clip_norm": 0.7,
    "lrd": 0.9,
    "weight_decay": 0.1,
    "betas": (0.7, 0.9),
    "centered_variance": True,
}
OPTIMIZERS = {
    name: lambda name=name: getattr(optimizers, name)({"lr": 0.02})
    for name in ("Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD", "DCTAdam")
} | {
    "Adadelta": lambda: optimizers.Adadelta({}),
    "Rprop": lambda: optimizers.Rprop({}),
    "ClippedAdam": lambda: optimizers.ClippedAdam(SETTINGS),
    "AdagradRMSProp": lambda: optimizers.AdagradRMSProp({"eta": 0.1, "t": 0.2}),
    "a function": lambda: optimizers.PyroOptim(lambda params, lr: torch.optim.Adam(params, lr=lr), {"lr": 0.03}),
    "settings by name": lambda: Adam(by_name),
    "clip_norm": lambda: Adam({"lr": 0.05}, {"clip_norm": 1.0}),
    "clip_norm and clip_value": lambda: optimizers.SGD({"lr": 0.01}, {"clip_norm": 2.0, "clip_value": 0.7}),
    "clip_args by name": lambda: optimizers.SGD({"lr": 0.01}, clip_by_name),
    "ExponentialLR": lambda: optimizers.ExponentialLR(adam(gamma=0.7), {"clip_norm": 1.0}),
    "StepLR": lambda: optimizers.StepLR(adam(step_size=2, gamma=0.5)),
    "ReduceLROnPlateau": lambda: optimizers.ReduceLROnPlateau(adam(patience=0, factor=0.5)),
    "LambdaLR": lambda: optimizers.LambdaLR(adam(lr_lambda=lambda epoch: 1 / (1 + epoch))),
    "OneCycleLR": lambda: optimizers.OneCycleLR(adam(max_lr=0.1, total_steps=30)),
    "CosineAnnealingWarmRestarts": lambda: optimizers.CosineAnnealingWarmRestarts(adam(T_0=3)),
    "ExponentialLR of ClippedAdam": lambda: optimizers.ExponentialLR(
        {"optimizer": ClippedAdam, "optim_args": {"lr": 0.05, "lrd": 0.95}, "gamma": 0.9}
    ),
}
FAST_OPTIMIZERS = {"ClippedAdam", "ExponentialLR", "clip_norm and clip_value"}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("name", "compile"),
    [
        slow_unless(not compile or name in FAST_OPTIMIZERS, name, compile)
        for name in OPTIMIZERS
        for compile in (False, True)
    ],
)
def test_each_optimizer_takes_the_steps_of_pyro(name, compile, tmp_path):
    """Ten steps with a schedule, and with rates that the user multiplies; then ten from the saved state."""

    def run(make_svi):
        guide, optim, losses = auto.AutoNormal(local_model), OPTIMIZERS[name](), []
        for phase in range(2):
            svi = make_svi(local_model, guide, optim, Trace_ELBO())
            for step in range(10):
                losses.append(svi.step(X))
                if step % 2 and isinstance(optim, optimizers.PyroLRScheduler):
                    plateau = optim.pt_scheduler_constructor is ReduceLROnPlateau
                    optim.step(*([losses[-1]] if plateau else []))
                if step == 6:
                    for one in optim.optim_objs.values():
                        for group in getattr(one, "optimizer", one).param_groups:
                            group |= {key: group[key] * 0.8 for key in {"lr", "eta"} & group.keys()}
            if phase == 0:
                optim.save(tmp_path / "optim.pt")
                optim = OPTIMIZERS[name]()
                optim.load(tmp_path / "optim.pt")
        return losses

    assert_as_pyro(run, compile=compile)


@pytest.mark.usefixtures("uncompiled")
@EITHER
def test_the_rate_of_a_single_parameter_may_be_changed(compile):
    def run(make_svi):
        optim = Adam({"lr": 0.05})
        svi = make_svi(local_model, auto.AutoNormal(local_model), optim, Trace_ELBO())
        losses = []
        for step in range(12):
            if step in (4, 8):
                store = pyro.get_param_store()
                for parameter, one in optim.optim_objs.items():
                    if "noise" in store.param_name(parameter):
                        one.param_groups[0]["lr"] *= 0.1
            losses.append(svi.step(X))
        return losses

    assert_as_pyro(run, compile=compile)


def auxiliary_loss(model, guide, x):
    return (pyro.param("noise", torch.tensor(0.7), constraint=constraints.positive) - x.std()) ** 2


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("make", "compile"),
    [
        (lambda: Adam({"lr": 0.05}), False),
        (lambda: Adam({"lr": 0.05}), True),
        (lambda: optimizers.ExponentialLR(adam(gamma=0.5)), False),
        pytest.param(lambda: optimizers.ExponentialLR(adam(gamma=0.5)), True, marks=pytest.mark.slow),
    ],
)
def test_two_svis_share_an_optimizer(make, compile):
    """As in the semi-supervised VAE of Pyro, whose auxiliary loss trains some of the parameters."""

    def run(make_svi):
        guide, optim = auto.AutoNormal(local_model), make()
        both = [make_svi(local_model, guide, optim, loss) for loss in (Trace_ELBO(), auxiliary_loss)]
        losses = []
        for step in range(10):
            losses += [svi.step(X) for svi in both]
            if step == 5 and isinstance(optim, optimizers.PyroLRScheduler):
                optim.step()
        return losses

    assert_as_pyro(run, compile=compile)


@pytest.mark.usefixtures("uncompiled")
def test_an_optimizer_is_not_shared_by_an_eager_and_a_captured_svi():
    guide, optim = auto.AutoNormal(local_model), Adam({"lr": 0.05})
    first = pv.SVI(local_model, guide, optim, Trace_ELBO())
    first.step(X)
    pv.SVI(local_model, guide, optim, Trace_ELBO(), compile=True).step(X)  # continues
    with pytest.raises(ValueError, match=r"`optim` must be an optimizer of its own .*the other `compile`"):
        first.step(X)


@pytest.mark.usefixtures("uncompiled")
@EITHER
def test_parameters_that_appear_later_are_trained_with_their_own_schedule(compile):
    phases = {"late": False}

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.1))
        scale = pyro.param("scale", torch.tensor(0.4), constraint=constraints.positive) if phases["late"] else 0.4
        pyro.sample("slope", dist.Normal(loc, scale))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.5))

    def run(make_svi):
        phases["late"] = False
        optim = optimizers.ExponentialLR(adam(gamma=0.5))
        svi = make_svi(local_model, guide, optim, Trace_ELBO())
        losses = []
        for step in range(12):
            phases["late"] = step >= 6
            losses.append(svi.step(X))
            if step % 3 == 2:
                optim.step()
        rates = {pyro.get_param_store().param_name(p): one.get_last_lr()[0] for p, one in optim.optim_objs.items()}
        assert rates["scale"] > rates["loc"]
        return losses

    assert_as_pyro(run, compile=compile)


@pytest.mark.usefixtures("uncompiled")
@EITHER
def test_arguments_may_be_of_any_kind(compile):
    def model(batch, count, weights=None, **options):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        scale = pyro.param("noise", torch.tensor(0.7), constraint=constraints.positive) * options.get("factor", 1.0)
        with pyro.plate("data", count):
            x = batch["x"] + (0.0 if weights is None else sum(weights))
            pyro.sample("x", dist.Normal(slope, scale), obs=x)

    def run(make_svi):
        svi = make_svi(model, auto.AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO())
        calls = [(), (None,), ([torch.tensor(0.5), torch.tensor(0.1)],)]
        losses = []
        for step in range(9):
            keywords = {"factor": 2.0} if step % 2 else {"label": "a"}
            losses.append(svi.step({"x": X + step, "name": None}, len(X), *calls[step % 3], **keywords))
        return losses

    assert_as_pyro(run, compile=compile)


class Batch:
    """Data of a user's own class."""

    def __init__(self, x):
        self.x = x


@pytest.mark.usefixtures("uncompiled")
def test_other_objects_in_the_arguments_of_captured_steps_are_refused():
    def model(batch):
        global_model(torch.as_tensor(batch.x if isinstance(batch, Batch) else batch))

    svi = pv.SVI(model, auto.AutoDelta(model), Adam({"lr": 0.05}), Trace_ELBO(), compile=True)
    with pytest.raises(CaptureError, match="an array of NumPy, which the captured step would keep"):
        svi.step(X.numpy())
    same = Batch(X)
    for batch in (same, same, same, same, Batch(X), Batch(X)):
        svi.step(batch)
    with pytest.raises(CaptureError, match="another object again and again, got more than 3 of Batch"):
        svi.step(Batch(X))


@pytest.mark.usefixtures("uncompiled")
@EITHER
def test_run_takes_the_deprecated_numbers_of_steps_and_draws(compile):
    def run(make_svi):
        with pytest.warns(FutureWarning):
            svi = make_svi(*local_pair(), Adam({"lr": 0.05}), Trace_ELBO(), num_samples=4, num_steps=6)
        with pytest.warns(FutureWarning):
            posterior = svi.run(X)
        draws = EmpiricalMarginal(posterior, "slope").enumerate_support()
        return draws.flatten().tolist()

    with warnings.catch_warnings():
        assert_as_pyro(run, compile=compile)


def test_fit_takes_an_elbo_that_runs_the_pair_in_its_own_way():
    def program(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 0.7), obs=x)

    found = []
    for elbo in (Trace_ELBO(), OwnELBO()):
        pyro.clear_param_store()
        fitted = pv.fit(program, continuous_guide, X, epochs=5, elbo=elbo, seed=0)
        found.append(fitted.history["elbo"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_loss_that_is_not_finite_names_the_site_of_a_loss_function():
    svi = pv.SVI(*local_pair(), Adam({"lr": 0.05}), hand_written)
    svi.step(X)
    before = copy.deepcopy(pyro.get_param_store().get_state()["params"])
    with pyro.validation_enabled(False), pytest.raises(FloatingPointError, match=r"step 2: .* site 'x' in the model"):
        svi.step(torch.full((8,), torch.nan))
    after = pyro.get_param_store().get_state()["params"]
    assert all(torch.equal(before[name], after[name]) for name in before)


class Counting(torch.optim.SGD):
    """An optimizer whose steps depend on a Python number."""

    def step(self, closure=None):
        self.count = getattr(self, "count", 0) + 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=group["lr"] / self.count)


REFUSED = {
    "tail-adaptive": ({"loss": TraceTailAdaptive_ELBO(num_particles=2)}, ValueError, "`loss` must be an ELBO with"),
    "Jit": ({"loss": JitTrace_ELBO(), "compile": True}, ValueError, "`loss` must be the ELBO .* without Jit"),
    "class": ({"loss": Trace_ELBO}, TypeError, "`loss` must be an ELBO .*or a function"),
    "gradients twice": ({"loss_and_grads": with_gradients}, ValueError, "`loss_and_grads` must be None where"),
    "gradients": ({"loss_and_grads": 3}, TypeError, "`loss_and_grads` must be a function, or None, got 3"),
    "Horovod": ({"optim": HorovodOptimizer(Adam({"lr": 0.1}))}, ValueError, "`optim` must be an optimizer of one"),
    "multi": (
        {"optim": MixedMultiOptimizer([(["loc"], Adam({"lr": 0.1}))])},
        TypeError,
        "`optim` must be an optimizer of pyro.optim",
    ),
    "Adafactor": (
        {"optim": optimizers.Adafactor({"lr": 0.1}), "compile": True},
        CaptureError,
        "`optim` must be one whose steps can be captured with compile=True.* got Adafactor",
    ),
    "counter": (
        {"optim": optimizers.PyroOptim(Counting, {"lr": 0.1}), "compile": True},
        CaptureError,
        "`optim` must be one whose steps can be captured .* got Counting",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_is_refused_with_the_reason(name):
    arguments, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        pv.SVI(
            **{"model": global_model, "guide": auto.AutoNormal(global_model), "optim": Adam({"lr": 0.1})}
            | {"loss": Trace_ELBO()}
            | arguments
        )


def test_a_scheduler_does_not_take_the_state_of_an_optimizer():
    guide, optim = auto.AutoNormal(local_model), Adam({"lr": 0.05})
    pv.SVI(local_model, guide, optim, Trace_ELBO()).step(X)
    scheduler = optimizers.ExponentialLR(adam(gamma=0.5))
    scheduler.set_state(optim.get_state())
    with pytest.raises(ValueError, match=r"`optim` must be an optimizer, as the one whose state .* got a scheduler"):
        pv.SVI(local_model, guide, scheduler, Trace_ELBO()).step(X)


def test_dct_adam_is_captured_only_where_its_steps_are_those_of_clipped_adam():
    optim = optimizers.DCTAdam({"lr": 0.05, "subsample_aware": True})
    svi = pv.SVI(*local_pair(), optim, Trace_ELBO(), compile=True)
    with pytest.raises(CaptureError, match="`compile` must be False with DCTAdam for parameters with a time dimension"):
        svi.step(X)
