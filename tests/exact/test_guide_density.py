"""The density of a guide: which guides are refused, and the product of independent latents."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import bernoulli, gaussian, guide_of
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae import exact, guides
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.exact.model_density import ModelDensity
from pyro_vae.model_guide import ModelGuide

X = torch.randn(2, 3)


def outside(x):
    pyro.sample("z", dist.Bernoulli(torch.full((len(x), 1), 0.3)).to_event(2))


MASK = torch.tensor([True, False])
BERNOULLI = dist.Bernoulli(torch.full((1,), 0.3)).to_event(1)


def masked(x):
    with pyro.plate("data", len(x)), poutine.mask(mask=MASK):
        pyro.sample("z", BERNOULLI)


def other(x):
    with pyro.plate("data", len(x)):
        pyro.sample("y", BERNOULLI)


def fewer_rows(x):
    with pyro.plate("data", 1):
        pyro.sample("z", BERNOULLI)


wide = guide_of(lambda x: dist.Bernoulli(torch.full((4,), 0.3)).to_event(1))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (outside, r"every site in one plate, 'data'.*got site 'z' in the plates \[\]"),
        (masked, r"latents without a mask, got 'z'"),
        (guide_of(lambda x: BERNOULLI.mask(False)), r"latents without a mask, got 'z'"),
        (guide_of(lambda x: BERNOULLI.mask(MASK).expand([2]).to_event(0)), r"latents without a mask, got 'z'"),
        (AutoNormal(gaussian(1).model), r"the latents of the model, \['z'\], got \['z', 'z_unconstrained'\]"),
        (other, r"the latents of the model, \['z'\], got \['y'\]"),
        (fewer_rows, r"the 2 rows of the model at site 'z', got 1"),
        (wide, r"the event shape of the model at site 'z', \(1,\), got \(4,\)"),
        (poutine.scale(outside, scale=0.5), r"every site in one plate"),
    ],
)
@pytest.mark.parametrize("estimate", [pv.log_evidence, exact.elbo, exact.kl])
def test_guides_of_another_structure_are_refused(estimate, guide, message):
    model = gaussian(1).model if isinstance(guide, AutoNormal) else bernoulli(1).model
    with pytest.raises(ValueError, match="`guide` must have " + message):
        estimate(model, guide, X)


def test_a_scaled_guide_and_a_guide_with_dropout_are_refused():
    vae = bernoulli(1)
    with pytest.raises(ValueError, match=r"`guide` must use all data, .*got site 'z' with the scale 0.5"):
        exact.kl(vae.model, poutine.scale(vae.guide, scale=0.5), X)
    noisy = guides.Bernoulli(3, 1, lambda i, o: nn.Sequential(nn.Linear(i, 9), nn.Dropout(0.5), nn.Linear(9, o)))
    other = pv.VAE(vae.prior, noisy, vae.decoder)
    with pytest.raises(ValueError, match=r"`guide` must have one log q\(z \| x\) at each z.*evaluation mode"):
        exact.kl(other.model, other.guide, X)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_only_independent_latents_have_factors(weight):
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.5))
            b = pyro.sample("b", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(logits=x))
            pyro.sample("b", dist.Bernoulli(logits=weight * a - 0.5))

    x = torch.randn(50)
    factors = GuideDensity(ModelDensity(ModelGuide(model, guide, x))).factors()
    assert (factors is None) == (weight > 0)
    assert weight or (set(factors) == {"a", "b"} and torch.equal(factors["a"].logits, x))
