"""What cannot be trained on is refused by name, and a run that breaks says where."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import JitTrace_ELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors

TANH = networks.mlp([8], activation=nn.Tanh)


def gaussian_vae():
    return pv.VAE(priors.Normal(1), guides.DiagonalNormal(2, 1, TANH), likelihoods.Normal(1, 2, TANH))


@pytest.fixture
def x():
    return pv.datasets.two_gaussians(64, seed=3).x


def run(**changes):
    vae = gaussian_vae()
    arguments = {"data": torch.randn(10, 2), "epochs": 1} | changes
    return pv.fit(changes.pop("model", vae.model), vae.guide, arguments.pop("data"), **arguments)


NAN = torch.tensor([[0.0, 1.0], [2.0, math.nan]])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": [1.0, 2.0]}, TypeError, "`data` must be .*got a float"),
        ({"data": np.zeros((3, 2))}, TypeError, "`data` must be .*got a ndarray"),
        ({"data": []}, ValueError, "`data` must be .*got no tensor"),
        (
            {"data": torch.zeros(0, 2)},
            ValueError,
            r"`data` must have shape .* with N >= 1, got shape \(0, 2\), without rows",
        ),
        ({"data": torch.zeros(())}, ValueError, r"`data` must have shape .* with N >= 1, got shape \(\), without rows"),
        ({"data": torch.zeros(4, 3)}, ValueError, r"`x` must be \(N, 2\).*got shape \(4, 3\)"),
        (
            {"data": torch.zeros(4, 2, dtype=torch.float64)},
            TypeError,
            "context of DiagonalNormal must be torch.float32, as its network is, got torch.float64",
        ),
        (
            {"data": torch.zeros(4, 2, dtype=torch.long)},
            TypeError,
            "context of DiagonalNormal must be torch.float32, as its network is, got torch.int64",
        ),
        ({"data": NAN}, ValueError, r"`data` must hold finite numbers, got nan at row 1, column \(1,\)"),
        ({"data": NAN.nan_to_num(math.inf)}, ValueError, r"`data` must hold finite numbers, got inf at row 1"),
        (
            {"data": (torch.zeros(4, 2), torch.zeros(3, 2))},
            ValueError,
            "`data` must be tensors of one number of rows, got 4 and 3",
        ),
        ({"epochs": 0}, ValueError, "`epochs` must be .*got 0"),
        ({"epochs": 2.5}, ValueError, "`epochs` must be .*got 2.5"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be a positive integer.*got 0"),
        ({"batch_size": -3}, ValueError, "`batch_size` must be .*got -3"),
        ({"batch_size": True}, ValueError, "`batch_size` must be .*got True"),
        ({"lr": 0.0}, ValueError, "`lr` must be .*got 0.0"),
        ({"lr": math.nan}, ValueError, "`lr` must be .*got nan"),
        ({"lr": lambda step: math.nan}, ValueError, "`lr` at step 0 must be a finite number, 0 or more, got nan"),
        ({"lr": lambda step: -1.0}, ValueError, "`lr` at step 0 must be a finite number, 0 or more, got -1.0"),
        (
            {"schedules": {torch.zeros(()): lambda step: "a"}},
            ValueError,
            "`schedules` at step 0 must be a finite number, got 'a'",
        ),
        (
            {"validation": torch.zeros(3, 3)},
            ValueError,
            r"`validation` must have rows like those of `data`, .*got shape \(3,\)",
        ),
        ({"validation": NAN}, ValueError, "`validation` must hold finite numbers, got nan"),
        ({"elbo": TraceEnum_ELBO()}, ValueError, "`elbo` must not be TraceEnum_ELBO where no latent is marked"),
        ({"plate": "rows", "batch_size": 2}, ValueError, "`plate` must be .*got 'rows'"),
        ({"plate": "rows"}, ValueError, "`plate` must be .*got 'rows'"),
    ],
)
def test_unusable_arguments_are_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        run(**changes)


def test_sequential_enumeration_is_refused(x):
    vae = pv.VAE(priors.Bernoulli(1), guides.Bernoulli(2, 1, TANH), likelihoods.Normal(1, 2, TANH))
    with pytest.raises(ValueError, match="enumerate='parallel'"):
        pv.fit(vae.model, config_enumerate(vae.guide, default="sequential"), x, epochs=1, elbo=TraceEnum_ELBO())


def test_a_loss_that_is_not_finite_names_step_and_site(x):
    vae = gaussian_vae()
    calls = []

    def model(x):
        calls.append(None)
        with poutine.scale(scale=1.0), pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.prior())
            loc = vae.decoder(z).mean
            pyro.sample(
                "x", dist.Normal(loc / (0.0 if len(calls) > 4 else 1.0), 1.0, validate_args=False).to_event(1), obs=x
            )

    with pytest.raises(FloatingPointError, match=r"step 4: the loss is \S+; log_prob of site 'x' in the model"):
        pv.fit(model, vae.guide, x, epochs=10)


def test_a_gradient_that_is_not_finite_names_the_parameter_and_leaves_it_as_it_was(x):
    def model(x):
        root = pyro.param("root", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(root.sqrt(), 1.0).expand([2]).to_event(1), obs=x)

    with pytest.raises(FloatingPointError, match="step 1: the gradient is not finite in root"):
        pv.fit(model, lambda x: None, x, epochs=3)
    assert pyro.param("root") == 0.0


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_failed_run_does_not_spoil_the_next(x):
    vae = gaussian_vae()
    broken = torch.full((1,), math.nan)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", dist.Normal(vae.decoder(z).mean * broken, 1.0, validate_args=False).to_event(1), obs=x)

    with pytest.raises(FloatingPointError):
        pv.fit(model, vae.guide, x, epochs=1)
    broken.fill_(1.0)
    assert pv.fit(model, vae.guide, x, epochs=2).steps == 2


def test_parameters_that_run_away_are_reported_with_step_and_site(x):
    vae = gaussian_vae()
    with pytest.raises(FloatingPointError, match=r"step \d+: the loss is .*log_prob of site '[xz]'"):
        pv.fit(vae.model, vae.guide, x, epochs=50, lr=1e20)


def test_validation_of_a_guide_with_parameters_for_each_datum_is_refused(x):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="`validation` needs an amortized guide"):
        pv.fit(model, AutoNormal(model), x[:, 0], epochs=1, validation=x[:, 1])


def test_torchscript_elbos_are_refused(x):
    vae = gaussian_vae()
    with pytest.raises(ValueError, match="JitTrace_ELBO, which needs TorchScript"):
        pv.fit(vae.model, vae.guide, x, epochs=1, elbo=JitTrace_ELBO())


def test_a_guide_with_a_latent_that_the_model_lacks_is_refused(x):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("zz", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"`guide` must draw latents of the model, \['z'\], got the latents \['zz'\]"):
        pv.fit(gaussian_vae().model, guide, x, epochs=1)


def test_a_guide_marked_for_enumeration_needs_the_elbo_for_it(x):
    vae = pv.VAE(priors.Bernoulli(1), guides.Bernoulli(2, 1, TANH), likelihoods.Normal(1, 2, TANH))
    with pytest.raises(ValueError, match="`elbo` must be TraceEnum_ELBO"):
        pv.fit(vae.model, config_enumerate(vae.guide), x, epochs=1)


def test_a_class_in_place_of_an_elbo_and_a_vae_in_place_of_its_functions_are_refused(x):
    vae = gaussian_vae()
    with pytest.raises(TypeError, match=r"`elbo` must be an instance.*got"):
        pv.fit(vae.model, vae.guide, x, epochs=1, elbo=TraceEnum_ELBO)
    with pytest.raises(
        TypeError, match=r"`model` must be one Pyro function, `vae.model`, got a VAE, a pair of functions"
    ):
        pv.fit(vae, vae.guide, x, epochs=1)


def test_an_interrupted_step_leaves_no_gradient_behind(x):
    vae = gaussian_vae()

    class Interrupted(Trace_ELBO):
        def loss_and_grads(self, *args):
            super().loss_and_grads(*args)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pv.fit(vae.model, vae.guide, x, epochs=1, elbo=Interrupted())
    assert all(parameter.grad is None for parameter in vae.parameters())
