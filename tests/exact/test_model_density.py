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


def test_chunks_bound_the_memory_and_do_not_change_the_answer(monkeypatch):
    vae, x = bernoulli(10, 2), torch.randn(7, 2)
    whole, mean = exact.log_evidence(vae.model, x), exact.posterior(vae.model, x).mean
    shapes, log_prob_at = [], model_density.log_prob_at

    def recording(*arguments):
        result = log_prob_at(*arguments)
        shapes.append(result.shape)
        return result

    monkeypatch.setattr(model_density, "_BUDGET", 7 * 64 * 50)
    monkeypatch.setattr(model_density, "log_prob_at", recording)
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
    return pv.log_evidence(model, poutine.block(model, hide=["x"]), *data)


ESTIMATES = pytest.mark.parametrize("evidence", [exact.log_evidence, estimated_evidence])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (global_latent, r"every site in one plate, 'data'.*got site 'mean' in the plates \[\]"),
        (poutine.scale(global_latent, scale=0.5), r"got site 'mean' in the plates"),
        (nothing_latent, r"latent and observed sites, got the latents \[\] and the observed sites \['x'\]"),
        (subsampled, r"use all data, .* got site 'z' with the scale 2.0"),
        (poutine.scale(binary, scale=torch.arange(1.0, 5)), r"use all data, .* got site 'z' with the scale tensor"),
        (poutine.mask(binary, mask=torch.arange(4) > 1), r"latents without a mask, got 'z'"),
    ],
)
@ESTIMATES
def test_models_of_another_structure_are_refused(evidence, model, message):
    with pytest.raises(ValueError, match="`model` must .*" + message):
        evidence(model, torch.rand(4))


@ESTIMATES
def test_soft_targets_have_no_evidence(evidence):
    vae = gaussian(1, 2, decoder=likelihoods.Bernoulli(1, 2, nn.Linear, soft_targets=True))
    with pytest.raises(ValueError, match=r"`model` must have a normalised likelihood, got soft targets .* at \['x'\]"):
        evidence(vae.model, torch.rand(4, 2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (of_two_kinds, r"or a single continuous latent, got the latents \['c', 'z'\]"),
        (counts, r"discrete latents with `enumerate_support`, got 'z' without it"),
        (many_states, r"discrete latents with at most 65536 states together, got 16777216 states of \['a', 'b'\]"),
    ],
)
def test_models_without_an_exact_answer_are_refused_with_the_reason(model, message):
    with pytest.raises(ValueError, match="`model` must .*" + message):
        exact.log_evidence(model, torch.rand(4))


def test_too_many_states_of_one_latent_are_refused():
    with pytest.raises(ValueError, match="1048576 states"):
        exact.log_evidence(bernoulli(20, 2).model, torch.rand(4, 2))


@ESTIMATES
def test_dropout_is_refused_until_the_network_is_in_evaluation_mode(evidence):
    vae, x = bernoulli(2, 3), torch.randn(5, 3)
    vae.decoder = likelihoods.Normal(2, 3, lambda i, o: nn.Sequential(nn.Linear(i, o), nn.Dropout(0.5)), scale=0.1)
    with pytest.raises(ValueError, match=r"`model` must have one log p\(x, z\) at each z.*vae\.eval\(\)"):
        evidence(vae.model, x)
    vae.eval()
    assert exact.log_evidence(vae.model, x).isfinite().all()
    assert pv.log_evidence(vae.model, vae.guide, x, num_samples=10).log_evidence.isfinite().all()
