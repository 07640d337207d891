"""A pair trains its own parameters, or is refused; the entries of a VAE in Pyro's store last as long as the VAE."""

import copy
import gc
import pickle
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import gaussian
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import nn

import pyro_vae as pv
from pyro_vae import networks
from pyro_vae._utils.param_store import rollback_params_on_error

X = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))


def cell(hidden=4, **options):
    """A cell of a notebook: new networks for a plain Pyro pair, under the same names."""
    encoder, decoder = networks.mlp([hidden])(2, 2), networks.mlp([hidden])(1, 2)

    def model(x):
        pyro.module("decoder", decoder, **options)
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=pyro.subsample(x, event_dim=1))

    def guide(x):
        pyro.module("encoder", encoder, **options)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(pyro.subsample(x, event_dim=1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, (encoder, decoder)


def fit(model, guide, **options):
    return pv.fit(model, guide, X, **{"epochs": 2, "lr": 0.1} | options)


def step(model, guide):
    pv.SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step(X)


ENTRIES = {
    "fit": fit,
    "fit in batches": lambda model, guide: fit(model, guide, batch_size=5),
    "SVI": step,
    "evaluate": lambda model, guide: pv.evaluate(model, guide, X),
    "evidence": lambda model, guide: pv.log_evidence(model, guide, X, num_samples=2),
    "exact": lambda model, guide: pv.exact.elbo(model, guide, X),
    "export": lambda model, guide: pv.to_datatree(model, guide, X, draws=2),
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize("hidden", [4, 8], ids=["same shapes", "other shapes"])
def test_networks_whose_names_belong_to_others_are_refused_before_any_work(entry, hidden):
    fit(*cell()[:2])
    stored = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    model, guide, networks = cell(hidden)
    before = [parameter.clone() for network in networks for parameter in network.parameters()]
    with pytest.raises(ValueError, match=r"pyro\.module\('encoder'\) must have its own parameters .*clear_param_store"):
        entry(model, guide)
    after = [parameter for network in networks for parameter in network.parameters()]
    assert all(map(torch.equal, before, after))
    assert {name: value.tolist() for name, value in pyro.get_param_store().items()} == {
        name: value.tolist() for name, value in stored.items()
    }


@pytest.mark.parametrize("train", [fit, step])
def test_the_ways_out_train_the_new_networks(train):
    model, guide, networks = cell()
    fit(model, guide)
    trained = networks[1][0].weight.detach().clone()
    train(model, guide)  # the same networks go on
    assert not torch.equal(networks[1][0].weight, trained)
    trained = networks[1][0].weight.detach().clone()
    model, guide, networks = cell(update_module_params=True)
    pv.evaluate(model, guide, X)
    assert torch.equal(networks[1][0].weight, trained)  # continues with the stored values
    train(model, guide)
    assert not torch.equal(networks[1][0].weight, trained)
    pyro.clear_param_store()
    model, guide, networks = cell()
    start = networks[1][0].weight.detach().clone()
    train(model, guide)
    assert not torch.equal(networks[1][0].weight, start)


def local_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("train", [fit, step])
def test_two_autoguides_do_not_share_their_parameters_by_name(train, alive):
    first = AutoNormal(local_model)
    fit(local_model, first)
    fit(local_model, first)
    if not alive:
        del first
        gc.collect()
    with pytest.raises(ValueError, match=r"AutoNormal must have its own parameters .* at 'locs.z': training one"):
        train(local_model, AutoNormal(local_model))
    with pyro.get_param_store().scope():
        train(local_model, AutoNormal(local_model))
    pyro.clear_param_store()
    train(local_model, AutoNormal(local_model))


def test_an_autoguide_for_other_data_is_refused():
    fit(local_model, AutoNormal(local_model))
    with pytest.raises(
        ValueError, match=r"pyro\.param\('AutoNormal.locs.z'\) must have the shape .*\(7,\), got \(20,\)"
    ):
        pv.fit(local_model, AutoNormal(local_model), X[:7], epochs=1)


class Decoding(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 2)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.linear(z), 1.0).to_event(1), obs=x)


def linear_guide(x):
    slope = pyro.param("slope", lambda: torch.zeros(2, 1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ slope, 1.0).to_event(1))


def test_modules_and_parameters_of_other_models_are_refused():
    fit(Decoding(), linear_guide)
    with pytest.raises(ValueError, match=r"pyro\.module\('linear'\) must have its own parameters"):
        fit(Decoding(), linear_guide)
    pyro.clear_param_store()
    pyro.param("slope", torch.zeros(1))  # would broadcast
    with pytest.raises(ValueError, match=r"pyro\.param\('slope'\) must have the shape .*\(2, 1\), got \(1,\)"):
        fit(Decoding(), linear_guide)


def test_a_parameter_of_the_same_shape_is_shared_by_name_as_in_pyro():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", nn.Parameter(torch.zeros(1))).expand(len(x)), 1.0))

    fit(local_model, guide)
    loc = pyro.param("loc").item()
    pv.evaluate(local_model, guide, X)
    fit(local_model, guide, epochs=1, lr=1e-6)
    assert pyro.param("loc").item() == pytest.approx(loc, abs=1e-4)


def test_entries_of_a_vae_leave_the_store_with_it():
    vae = gaussian(1, 2)
    pyro.param("mine", torch.zeros(2))
    fit(vae.model, vae.guide)
    assert len(pyro.get_param_store()) == 1 + len(list(vae.parameters()))
    pv.evaluate(vae.model, vae.guide, X)
    with pyro.get_param_store().scope(pyro.get_param_store().get_state()):
        pass
    del vae
    gc.collect()
    assert list(pyro.get_param_store().keys()) == ["mine"]


def test_a_twin_keeps_the_parameters_that_it_shares():
    vae = pv.VAE(*(getattr(gaussian(1, 2), part) for part in ("prior", "encoder", "decoder")), name="mine")
    twin = pv.VAE(vae.prior, vae.encoder, vae.decoder, name="mine")
    fit(vae.model, vae.guide)
    del vae
    gc.collect()
    before = [parameter.detach().clone() for parameter in twin.parameters()]
    fit(twin.model, twin.guide)
    assert len(pyro.get_param_store()) == len(before)
    assert not any(map(torch.equal, before, twin.parameters()))


LOADED = """
import sys, torch, pyro_vae as pv
x = torch.load(sys.argv[2])
vae = torch.load(sys.argv[1], weights_only=False)
print(pv.evaluate(vae.model, vae.guide, x)["elbo"])
assert pv.fit(vae.model, vae.guide, x, epochs=1).steps == 1
"""


def test_a_trained_vae_and_its_parts_can_be_pickled_and_copied(tmp_path):
    vae = gaussian(1, 2)
    fit(vae.model, vae.guide)
    elbo = pv.evaluate(vae.model, vae.guide, X)["elbo"]
    pickle.dumps(vae.encoder)
    torch.save(X, tmp_path / "x")
    torch.save(vae, tmp_path / "vae.pt")
    command = [sys.executable, "-c", LOADED, str(tmp_path / "vae.pt"), str(tmp_path / "x")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(result.stdout) == pytest.approx(elbo, abs=1e-6)
    for other in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert pv.evaluate(other.model, other.guide, X)["elbo"] == elbo
        fit(other.model, other.guide)
    assert pv.evaluate(vae.model, vae.guide, X)["elbo"] == elbo


def test_networks_of_a_plain_pair_can_be_pickled_after_a_fit():
    model, guide, networks = cell()
    fit(model, guide)
    pickle.dumps(networks)


def test_a_run_that_fails_leaves_no_parameter_of_two_names():
    kept, new = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    pyro.param("kept", kept)

    def fails():
        with rollback_params_on_error():
            for name, value in {"a": new, "b": new, "kept again": kept}.items():
                pyro.param(name, value)
            raise LookupError

    with pytest.raises(LookupError):
        fails()
    store = pyro.get_param_store()
    assert list(store) == ["kept"]
    assert store.param_name(kept) == "kept"
