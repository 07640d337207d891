"""Rows are taken in the way that is right for a pair, or refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.model_guide import ModelGuide

X = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))


class Amortized(nn.Module):
    """q(z | x), without pyro.subsample."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(2, 1)

    def forward(self, x):
        pyro.module("amortized", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.network(x), 1.0).to_event(1))


def sliced_model(x):
    loading = pyro.param("loading", torch.tensor([1.0, -1.0]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z * loading, 1.0).to_event(1), obs=x)


def sliced_global_model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0).expand([2]).to_event(1), obs=x)


def mean_over_batches(model, guide, size):
    """The mean of the loss over all batches of a partition: equals that on all rows, if each is an unbiased part."""
    take = ModelGuide.on_batches(model, guide, (X,), size, "data").take
    losses = []
    for rows in torch.arange(24).split(size):
        with take(rows) as arguments, torch.no_grad():
            losses.append(Trace_ELBO().loss(model, guide, *arguments))
    return torch.tensor(losses).mean()


def deterministic(network):
    """A guide that puts all mass near one point of z for each row."""

    def guide(x):
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            pyro.sample("z", dist.Normal(network(x), 1e-6).to_event(1))

    return guide


def subsampled_model(x):
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=1)
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], 2), 1.0).to_event(1), obs=x)


def test_the_mean_over_a_partition_of_batches_is_the_loss_on_all_rows():
    network = nn.Linear(2, 1)
    guide = deterministic(network)
    pyro.set_rng_seed(0)
    whole = torch.tensor(Trace_ELBO().loss(subsampled_model, guide, X))
    # Both carry -eps^2 / 2 of log q for each of the 24 rows, of variance 1/2.
    noise = 4.5 * (24 / 2 + 24 / 2) ** 0.5
    assert torch.isclose(mean_over_batches(subsampled_model, guide, 6), whole, rtol=0, atol=noise)


def test_slices_of_an_amortized_pair_are_scaled_to_all_rows():
    guide = Amortized()
    take = ModelGuide.on_batches(sliced_model, guide, (X,), 6, "data").take
    with take(torch.tensor([1, 5, 7])) as (rows,):
        trace = poutine.trace(sliced_model).get_trace(rows)
    assert torch.equal(rows, X[[1, 5, 7]])
    assert trace.nodes["x"]["scale"] == 8.0


def test_planning_leaves_no_parameter_of_its_own_and_moves_none():
    guide = Amortized()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    guide(X)
    names = set(pyro.get_param_store().keys())
    ModelGuide.on_batches(sliced_model, guide, (X,), 6, "data")
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert set(pyro.get_param_store().keys()) == names | {"loading"}
    assert pyro.param("amortized$$$network.weight") is guide.network.weight


def test_fit_trains_an_amortized_pair_on_slices():
    history = pv.fit(sliced_model, Amortized(), X, epochs=100, batch_size=6, lr=0.03).history
    assert history["elbo"][-1] > history["elbo"][0]


def per_datum(x):
    loc = pyro.param("loc", lambda: torch.zeros(len(x), 1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


def per_place(x):
    """Rows take parameters by their place in the batch: the wrong ones, once batches are drawn."""
    loc = pyro.param("loc", torch.zeros(24, 1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc[: len(x)], 1.0).to_event(1))


def global_guide(x):
    pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


def unfollowing_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :1], 1.0).to_event(1))


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (sliced_global_model, global_guide, r"latents are global, got \['mean'\]"),
        (sliced_model, per_datum, "not amortized"),
        (sliced_model, per_place, "not amortized"),
        (sliced_model, AutoNormal(sliced_model), "not amortized"),
        (subsampled_model, unfollowing_guide, "a guide that follows the subsample"),
    ],
)
def test_pairs_that_batches_would_train_wrong_are_refused(model, guide, message):
    with pytest.raises(ValueError, match=message):
        pv.fit(model, guide, X, epochs=1, batch_size=6)
    pyro.clear_param_store()
    assert pv.fit(model, guide, X, epochs=1).steps == 1  # all rows at once are right


def test_an_autoguide_is_as_before_after_mini_batches():
    guide = AutoNormal(subsampled_model)
    pv.fit(subsampled_model, guide, X, epochs=3, batch_size=7)
    assert guide.create_plates is None
    assert guide.median(X)["z"].shape == (24, 1)


def test_every_row_is_seen_once_an_epoch_in_an_order_of_its_own():
    seen = []

    def model(x):
        with pyro.plate("data", len(x)) as rows:
            seen.append(rows)
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=pyro.subsample(x, event_dim=0))

    pv.fit(model, lambda x: None, X[:, 0], epochs=2, batch_size=7)
    epochs = torch.cat(seen[-8:-4]), torch.cat(seen[-4:])
    assert all(torch.equal(rows.sort().values, torch.arange(24)) for rows in epochs)
    assert not torch.equal(*epochs)


def test_a_vae_is_subsampled():
    network = networks.mlp([8])
    vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, network), likelihoods.Normal(1, 2, network))
    take = ModelGuide.on_batches(vae.model, vae.guide, (X,), 6, "data").take
    with take(torch.arange(6)) as arguments:
        assert arguments[0] is X
        trace = poutine.trace(vae.model).get_trace(*arguments)
    assert trace.nodes["z"]["value"].shape == (6, 1)
    assert trace.nodes["x"]["scale"] == 4.0


def test_a_plate_of_a_fixed_size_is_subsampled():
    def model(x):
        with pyro.plate("data", 24):
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=pyro.subsample(x, event_dim=0))

    assert pv.fit(model, lambda x: None, X[:, 0], epochs=1, batch_size=6).steps == 4


def test_parameters_for_each_datum_in_the_model_are_subsampled_or_refused():
    def subsampled(x):
        shift = pyro.param("shift", lambda: torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            x, shift = pyro.subsample(x, event_dim=0), pyro.subsample(shift, event_dim=0)
            pyro.sample("x", dist.Normal(shift, 1.0), obs=x)

    def sliced(x):
        shift = pyro.param("shift", lambda: torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(shift, 1.0), obs=x)

    pv.fit(subsampled, lambda x: None, X[:, 0], epochs=500, batch_size=6, lr=0.05)
    assert torch.allclose(pyro.param("shift"), X[:, 0], atol=0.05)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="the model is not amortized"):
        pv.fit(sliced, lambda x: None, X[:, 0], epochs=1, batch_size=6)
    assert "shift" not in pyro.get_param_store()


def two_layer_model(x):
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(top, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def two_layer_guide(x):
    slope = pyro.param("slope", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Normal(slope * x, 1.0))
        pyro.sample("z", dist.Normal(slope * (top + x), 1.0))


def centring_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("top", dist.Normal(x - x.mean(0), 1.0))
        pyro.sample("z", dist.Normal(x, 1.0))


def test_a_guide_of_two_layers_is_amortized():
    assert pv.fit(two_layer_model, two_layer_guide, X[:, 0], epochs=1, batch_size=6).steps == 4


def test_a_guide_that_looks_at_the_whole_batch_is_not():
    with pytest.raises(ValueError, match="the guide is not amortized"):
        pv.fit(two_layer_model, centring_guide, X[:, 0], epochs=1, batch_size=6)


@pytest.mark.parametrize("transform", [None, torch.Tensor.double], ids=["as they are", "transformed"])
def test_planning_runs_a_pair_that_subsamples_on_no_more_rows_than_a_batch(transform):
    """A decoder of images on all rows at once would need more memory than there is."""
    network = networks.mlp([8])
    vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, network), likelihoods.Normal(1, 2, network))
    vae = vae if transform is None else vae.double()
    seen = {"encoder": [], "decoder": []}
    for part, rows in seen.items():
        for module in getattr(vae, part).modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda module, inputs, output, rows=rows: rows.append(len(inputs[0])))
    ModelGuide.on_batches(vae.model, vae.guide, (X,), 6, "data", transform)
    assert all(seen.values())
    assert max(seen["encoder"] + seen["decoder"]) <= 6
