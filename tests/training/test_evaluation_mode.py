"""Training is in the mode of the networks; held-out data are evaluated in evaluation mode, in batches of rows."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import bernoulli, gaussian
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods

X = pv.datasets.two_gaussians(60, seed=0).x
HELD_OUT = pv.datasets.two_gaussians(41, seed=1).x
LAYERS = {
    "dropout": lambda: nn.Dropout(0.3),
    "batch normalisation": lambda: nn.BatchNorm1d(6),
    "random slopes": nn.RReLU,
    "dropped channels": lambda: nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Dropout1d(0.3), nn.Flatten()),
}


def network_with(layer):
    return lambda inputs, outputs: nn.Sequential(nn.Linear(inputs, 6), layer, nn.Tanh(), nn.Linear(6, outputs))


def vae_with(layer, part="encoder"):
    made = {"encoder": guides.DiagonalNormal(2, 1, network_with(layer))}
    if part == "decoder":
        made = {"decoder": likelihoods.Normal(1, 2, network_with(layer))}
    return gaussian(1, 2, **made)


def modes(vae):
    return [module.training for module in vae.modules()]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_validation_is_in_evaluation_mode_and_training_is_not(make, part, compiled, uncompiled):
    layer, seen = make(), set()
    vae = vae_with(layer, part)
    frozen = list(vae.encoder.modules())[-1].eval()  # a module that the user has set to evaluation mode
    layer.register_forward_hook(lambda module, *_: seen.add(module.training))
    options = {"batch_size": 20, "validation": HELD_OUT, "patience": 2, "seed": 3, "compile": compiled}
    fitted = pv.fit(vae.model, vae.guide, X, epochs=2, **options)
    assert seen == {True, False}
    assert not frozen.training
    assert sum(modes(vae)) == len(modes(vae)) - 1
    best = max(fitted.history["validation_elbo"])  # whose parameters and buffers `patience` has set
    found = pv.evaluate(vae.eval().model, vae.guide, HELD_OUT, batch_size=20, seed=3)
    assert found["elbo"] == pytest.approx(best, abs=1e-4)


def test_the_modes_are_put_back_if_an_evaluation_fails():
    vae = vae_with(nn.Dropout(0.3), "decoder")
    before = modes(vae)
    with torch.no_grad():
        vae.decoder.network[-1].bias.fill_(torch.inf)
    with pytest.raises((ValueError, FloatingPointError)):
        pv.evaluate(vae.model, vae.guide, HELD_OUT)
    assert modes(vae) == before


def test_generated_and_reconstructed_data_are_those_of_evaluation_mode():
    vae = vae_with(nn.BatchNorm1d(6), "decoder")
    pv.fit(vae.model, vae.guide, X, epochs=3)
    means = []
    for mode in (True, False):
        torch.manual_seed(0)
        means.append(vae.train(mode).generate(1, mean=True))
    torch.testing.assert_close(*means)


@pytest.mark.parametrize("rows", [21, 41, 61])
def test_a_single_row_that_is_left_joins_the_batch_before(rows):
    vae = vae_with(nn.BatchNorm1d(6), "decoder")
    x, seen = torch.randn(rows, 2), []
    vae.decoder.network[0].register_forward_hook(lambda module, inputs, _: seen.append(len(inputs[0])))
    for options in ({}, {"validation": X}):
        seen.clear()
        steps = pv.fit(vae.model, vae.guide, x, epochs=1, batch_size=20, **options).steps
        assert steps == rows // 20
        assert 1 not in seen


@pytest.mark.parametrize("subsamples", [True, False])
def test_batches_of_one_row_under_batch_normalisation_are_refused_before_any_step(subsamples):
    vae = vae_with(nn.BatchNorm1d(6))
    before = {name: value.clone() for name, value in vae.state_dict().items()}

    def guide(x):
        vae.register()
        with pyro.plate("data", len(x)):
            pyro.sample("z", vae.encoder(x))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", vae.decoder(z), obs=x)

    pair = (vae.model, vae.guide) if subsamples else (model, guide)
    with pytest.raises(ValueError, match="`batch_size` must be 2 or more where the guide runs on two rows but not on"):
        pv.fit(*pair, X, epochs=1, batch_size=1)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert pv.fit(*pair, X, epochs=1, batch_size=2).steps == 30


def test_sums_over_batches_are_those_over_all_rows_and_no_more_rows_run_at_once():
    vae, seen = bernoulli(2, 2), []
    vae.decoder.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0].shape[-2]))
    pair = vae.model, config_enumerate(vae.guide)
    whole = pv.evaluate(*pair, X, elbo=TraceEnum_ELBO(max_plate_nesting=1))
    seen.clear()
    parts = pv.evaluate(*pair, X, elbo=TraceEnum_ELBO(max_plate_nesting=1), batch_size=7)
    assert parts == pytest.approx(whole, abs=1e-5)
    assert max(seen) <= 7


def with_a_global_latent(read):
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).expand([2]).to_event(1), obs=read(x))

    return model


def test_a_global_latent_counts_once_in_batches():
    model = with_a_global_latent(lambda x: pyro.subsample(x, event_dim=1))
    guide = AutoDelta(model)
    whole = pv.evaluate(model, guide, X)
    assert pv.evaluate(model, guide, X, batch_size=7) == pytest.approx(whole, abs=1e-5)
    options = {"batch_size": 7, "validation": X, "lr": 1e-12}
    fitted = pv.fit(model, guide, X[:20], epochs=1, **options)
    (found,) = fitted.history["validation_surrogate"]  # a point has no density
    assert found == pytest.approx(whole["surrogate"], abs=1e-5)
    sliced = with_a_global_latent(lambda x: x)
    with pytest.raises(ValueError, match="`batch_size` needs a model that reads its data"):
        pv.evaluate(sliced, guide, X, batch_size=7)


def test_a_large_evaluation_takes_batches_by_itself(monkeypatch):
    monkeypatch.setattr("pyro_vae.model_guide._BUDGET", 64 * 20)
    vae, seen = gaussian(1, 2), []
    vae.decoder.register_forward_hook(lambda module, inputs, _: seen.append(len(inputs[0])))
    assert pv.evaluate(vae.model, vae.guide, X)["elbo"] < 0
    assert {20, 4} <= set(seen)
    assert max(seen) == 21  # in the first look, whose rows are more than a batch
    sliced = with_a_global_latent(lambda x: x)
    assert pv.evaluate(sliced, AutoDelta(sliced), X)["surrogate"] < 0  # no batches are right here
