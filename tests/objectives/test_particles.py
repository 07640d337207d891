"""Particles from traces: sites, masks and scales that are used, and models that are refused."""

import math
import re
import warnings
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from gradient_estimates import FOR_BERNOULLI, OF_ELBO, X, assert_mean, enumerated, flat, gradients, vae_of
from pairs import guide_of, model_of
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import pyro_vae as pv
from pyro_vae.objectives import VIMCO, FreeBits, LeaveOneOut

Y = X[:, 0].float()
MASK = torch.tensor([True, True, False, True])


class MaskLatents(poutine.messenger.Messenger):
    def _pyro_sample(self, msg):
        if msg["name"] == "z":
            msg["mask"] = MASK.repeat(msg["cond_indep_stack"][0].size // 4)


@pytest.mark.parametrize("name", [name for name in OF_ELBO if "draws" not in name])
def test_a_masked_latent_that_the_likelihood_reads_keeps_its_score(name):
    """A masked datum has a likelihood, and no rate."""
    vae = vae_of("bernoulli")
    parameters = list(vae.parameters())
    log_q, log_p, log_likelihood = enumerated(vae)
    elbo = (log_q.exp() * (log_likelihood - torch.where(MASK, log_q - log_p, 0.0))).sum(0).mean()
    expected = flat(torch.autograd.grad(elbo, parameters))
    pair = MaskLatents()(vae.model), MaskLatents()(vae.guide)
    assert_mean(gradients(OF_ELBO[name](), *pair, X.repeat(100, 1), parameters), expected)


@pytest.mark.parametrize("order", [1, -1])
def test_bounds_of_several_draws_refuse_observed_sites_of_different_scales(order):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4).double()))
            for name, scale in (("a", 0.1), ("b", 1.0))[::order]:
                with poutine.scale(scale=scale):
                    pyro.sample(name, dist.Normal(z, 1.0), obs=x)

    guide = guide_of(lambda x: dist.Bernoulli(logits=x))
    with pytest.raises(ValueError, match=r"VIMCO needs observed sites of one scale, got the scales {'\w': \[(0.1|1.0)"):
        VIMCO(4).loss(model, guide, X[:, 0])
    assert math.isfinite(LeaveOneOut(4).loss(model, guide, X[:, 0]))


@pytest.mark.parametrize("plate", [[], ["one"]])
@pytest.mark.parametrize("name", FOR_BERNOULLI)
def test_a_site_outside_the_plate_is_refused_and_named(name, plate):
    """In a plate of its own, it would count once for each datum."""

    def model(x):
        with pyro.plate("one", 1) if plate else nullcontext():
            weather = pyro.sample("weather", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z + weather, 1.0), obs=x)

    got = re.escape(f"got site 'weather' in the plates {plate}")
    with pytest.raises(ValueError, match=rf"every site in one plate, 'data'.*{got}"):
        FOR_BERNOULLI[name]().loss(model, poutine.block(model, hide=["x"]), Y)


@pytest.mark.parametrize("name", FOR_BERNOULLI)
def test_a_guide_of_other_latents_is_refused(name):
    vae, elbo = vae_of("bernoulli"), FOR_BERNOULLI[name]()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("other", dist.Bernoulli(torch.full((3,), 0.5).double()).to_event(1))

    with pytest.raises(ValueError, match=r"`guide` must draw .* the model, \['z'\], got .*\['other'\]"):
        pv.fit(vae.model, guide, X, epochs=1, elbo=elbo)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pyro warns of the same
        with pytest.raises(ValueError, match=r"`guide` must draw .* the model, \['z'\], got \['other'\]"):
            elbo.loss(vae.model, guide, X)


def test_a_model_without_data_is_refused():
    prior = guide_of(lambda x: dist.Bernoulli(0.5))
    with pytest.raises(ValueError, match="LeaveOneOut needs a model with latent and observed sites, got no observed"):
        LeaveOneOut(2).loss(prior, prior, X)


def test_an_autoguide_has_no_distribution_for_each_latent():
    model = model_of(dist.LogNormal(0.0, 1.0), lambda z: dist.Normal(z.log(), 1.0))
    with pytest.raises(ValueError, match=r"FreeBits needs a guide .*, got one that .* from \['z_unconstrained'\]"):
        FreeBits(0.1).loss(model, AutoNormal(model), Y)
