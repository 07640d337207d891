"""The density of a model: chunks of states, and models without an exact answer."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import bernoulli, gaussian, model_of
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae import exact, likelihoods
from pyro_vae.distributions.product import Product
from pyro_vae.exact import model_density
from pyro_vae.exact.model_density import ModelDensity
from pyro_vae.model_guide import ModelGuide


def test_chunks_bound_the_memory_and_do_not_change_the_answer(monkeypatch):
    vae, x = bernoulli(10, 2), torch.randn(7, 2)
    whole, mean = exact.log_evidence(vae.model, x), exact.posterior(vae.model, x).mean
    shapes, log_joint = [], model_density.ModelDensity.log_joint

    def recording(*arguments):
        result = log_joint(*arguments)
        shapes.append(result.shape)
        return result

    monkeypatch.setattr(model_density, "_BUDGET", 7 * 64 * 50)
    monkeypatch.setattr(model_density.ModelDensity, "log_joint", recording)
    assert torch.allclose(exact.log_evidence(vae.model, x), whole, atol=1e-5)
    assert torch.allclose(exact.posterior(vae.model, x).mean, mean, atol=1e-5)
    assert max(shape[0] for shape in shapes) <= 50
    assert len(shapes) >= 2 * 1024 // 50


def global_latent(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def nothing_latent(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def subsampled(x):
    with pyro.plate("data", len(x), subsample_size=2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=pyro.subsample(x, event_dim=0))


counts = model_of(dist.Poisson(3.0), lambda z: dist.Normal(z, 1.0))


binary = model_of(dist.Bernoulli(0.5), lambda z: dist.Normal(z, 1.0))


def of_two_kinds(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(0.5))
        z = pyro.sample("z", dist.Normal(c, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def many_states(x):
    with pyro.plate("data", len(x)):
        a, b = (pyro.sample(name, Product(dist.Bernoulli(torch.full((12,), 0.5)), 1)) for name in "ab")
        pyro.sample("x", dist.Normal((a + b).sum(-1), 1.0), obs=x)


def estimated_evidence(model, *data):
    return pv.log_evidence(model, poutine.block(model, hide=["x"]), *data).log_evidence


ESTIMATES = pytest.mark.parametrize("evidence", [exact.log_evidence, estimated_evidence])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (poutine.scale(binary, scale=torch.arange(1.0, 5)), r"use all data, .* got site 'z' with the scale tensor"),
    ],
)
@ESTIMATES
def test_models_of_another_structure_are_refused(evidence, model, message):
    with pytest.raises(ValueError, match="`model` must .*" + message):
        evidence(model, torch.rand(4))


@ESTIMATES
def test_a_plate_that_takes_a_subsample_of_its_own_has_all_of_its_rows(evidence):
    x = torch.linspace(-1.0, 1.0, 4)
    expected = dist.Normal(0.0, 2**0.5).log_prob(x)
    torch.testing.assert_close(
        evidence(subsampled, x), expected, atol=0.2 * (evidence is not exact.log_evidence), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (global_latent, r"every site in one plate, 'data'.*got site 'mean' in the plates \[\]"),
        (nothing_latent, r"latent and observed sites, got the latents \[\] and the observed sites \['x'\]"),
        (poutine.mask(binary, mask=torch.arange(4) > 1), r"latents without a mask, got 'z'"),
    ],
)
def test_models_without_an_exact_density_of_each_row_are_refused(model, message):
    with pytest.raises(ValueError, match="`model` must .*" + message):
        ModelDensity(ModelGuide(model, None, torch.rand(4)))


@ESTIMATES
def test_soft_targets_have_no_evidence(evidence):
    vae = gaussian(1, 2, decoder=likelihoods.Bernoulli(1, 2, nn.Linear, soft_targets=True))
    with pytest.raises(ValueError, match=r"`model` must have a normalised likelihood, got soft targets .* at \['x'\]"):
        evidence(vae.model, torch.rand(4, 2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (of_two_kinds, r"got \['c'\] with such states and \['z'\] without; use pv.log_evidence"),
        (counts, r"discrete latents with `enumerate_support`, got 'z' without it"),
        (many_states, r"at most 65536 states together in one sum, got 16777216 states of \['a', 'b'\]"),
    ],
)
def test_models_without_an_exact_answer_are_refused_with_the_reason(model, message):
    with pytest.raises(ValueError, match="`model` must .*" + message):
        exact.log_evidence(model, torch.rand(4))


def test_too_many_states_of_one_latent_are_refused():
    with pytest.raises(ValueError, match="1048576 states"):
        exact.log_evidence(bernoulli(20, 2).model, torch.rand(4, 2))


class Normalised(nn.Module):
    """Batch normalisation that takes what stands on the left of the rows for more rows."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(in_features, 5), nn.BatchNorm1d(5), nn.Linear(5, out_features)

    def forward(self, inputs):
        hidden = self.first(inputs)
        return self.last(self.norm(hidden.reshape(-1, 5)).reshape(hidden.shape).relu())


@ESTIMATES
@pytest.mark.parametrize("layer", [Normalised, lambda i, o: nn.Sequential(nn.Linear(i, o), nn.Dropout(0.5))])
def test_a_network_in_training_mode_has_the_numbers_of_evaluation_mode_and_stays_as_it_is(evidence, layer):
    vae, x = bernoulli(2, 3), torch.randn(5, 3)
    vae.decoder = likelihoods.Normal(2, 3, layer, scale=0.1)
    list(vae.decoder.modules())[-1].eval()
    modes = [module.training for module in vae.modules()]
    buffers = {name: value.clone() for name, value in vae.named_buffers()}
    in_training = evidence(vae.model, x)
    assert [module.training for module in vae.modules()] == modes
    assert all(torch.equal(value, buffers[name]) for name, value in vae.named_buffers())
    torch.testing.assert_close(evidence(vae.eval().model, x), in_training)


def shifted_model(shift):
    """z ~ N(0, 1), x ~ N(shift(z), 1): the rows of ``shift`` may depend on each other."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(shift(z), 1.0).to_event(1), obs=x)

    return model


def attended(z):
    return torch.softmax(z @ z.mT, -1) @ z


MIXING = {
    "the next row": lambda z: z + z.roll(1, -2),
    "both neighbours": lambda z: z + z.roll(1, -2) + z.roll(-1, -2),
    "the mean": lambda z: z - 0.1 * z.mean(-2, keepdim=True),
    "the largest": lambda z: z / z.abs().amax(-2, keepdim=True),
    "the order": lambda z: z.sort(-2).values,
    "attention": attended,
    "statistics of the batch": nn.BatchNorm1d(1, track_running_stats=False),
}


@ESTIMATES
@pytest.mark.parametrize("rows", [4, 150])
@pytest.mark.parametrize("shift", MIXING.values(), ids=MIXING)
def test_rows_that_depend_on_each_other_are_refused(evidence, shift, rows):
    with pytest.raises(ValueError, match="`model` must have a density of each row that depends on that row alone"):
        evidence(shifted_model(shift), torch.randn(rows, 1))


@ESTIMATES
def test_random_numbers_outside_of_sites_are_refused(evidence):
    with pytest.raises(ValueError, match=r"`model` must have one log p\(x, z\) at each z, .*outside of its sites"):
        evidence(shifted_model(lambda z: nn.functional.dropout(z, 0.5)), torch.randn(30, 1))
