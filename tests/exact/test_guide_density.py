"""The density of a guide: which guides are refused, and the product of independent latents."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import bernoulli, gaussian, guide_of, model_of
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import nn

import pyro_vae as pv
from pyro_vae import exact, guides
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.exact.model_density import ModelDensity
from pyro_vae.model_guide import ModelGuide

X = torch.randn(2, 3)


def outside(x):
    pyro.sample("z", dist.Bernoulli(torch.full((len(x), 1), 0.3)).to_event(2))


def inside(x, name="z", rows=2, width=1):
    with pyro.plate("data", rows):
        pyro.sample(name, dist.Bernoulli(torch.full((width,), 0.3)).to_event(1))


MASK = torch.tensor([True, False])
BERNOULLI = dist.Bernoulli(torch.full((1,), 0.3)).to_event(1)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (poutine.mask(inside, mask=MASK), r"have (latents without a mask, got|the mask of the model at) 'z'"),
        (guide_of(lambda x: BERNOULLI.mask(False)), r"have (latents without a mask, got|the mask of the model at) 'z'"),
        (
            guide_of(lambda x: BERNOULLI.mask(MASK).expand([2]).to_event(0)),
            r"have (latents without a mask, got|the mask of the model at) 'z'",
        ),
        (partial(inside, name="y"), r"draw the latents of the model, \['z'\], got \['y'\]"),
        (partial(inside, rows=1), r"have one number of rows at all sites, 2, got 1 at site 'z'"),
        (partial(inside, width=4), r"draw 'z' with the shape of the model's latent, \(2, 1\), got \(2, 4\)"),
        (poutine.scale(inside, scale=0.5), r"use all data, .*got site 'z' with the scale 0.5"),
    ],
)
@pytest.mark.parametrize("estimate", [pv.log_evidence, exact.elbo, exact.kl])
def test_guides_of_another_structure_are_refused(estimate, guide, message):
    with pytest.raises(ValueError, match="`guide` must " + message):
        estimate(bernoulli(1).model, guide, X)


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (bernoulli(1).model, outside, r"have every site in one plate, 'data'.*got site 'z' in the plates \[\]"),
        (bernoulli(1).model, poutine.scale(outside, scale=0.5), "have every site in one plate"),
        (
            gaussian(1).model,
            AutoDiagonalNormal(gaussian(1).model),
            r"draw .* together, from \['_AutoDiagonalNormal_latent'\].*Use AutoNormal",
        ),
    ],
)
@pytest.mark.parametrize("estimate", [exact.elbo, exact.kl])
def test_guides_without_a_density_of_each_row_are_refused(estimate, model, guide, message):
    with pytest.raises(ValueError, match="`guide` must " + message):
        estimate(model, guide, X)


def test_a_guide_of_another_event_shape_is_refused_even_if_the_model_runs_on_its_draws():
    model = model_of(BERNOULLI, lambda z: dist.Normal(z.sum(-1), 1.0))
    with pytest.raises(ValueError, match=r"`guide` must .* at site 'z', \(1,\), got \(4,\)"):
        exact.elbo(model, partial(inside, width=4), X[:, 0])


class AlwaysDropping(nn.Linear):
    """Dropout that evaluation mode leaves on, as ``F.dropout`` without ``training`` does."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (AlwaysDropping, r"one log q\(z \| x\) at each z, .*random numbers outside of its sites"),
        (
            lambda i, o: nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o, track_running_stats=False)),
            "depends on that row alone",
        ),
    ],
    ids=["functional dropout", "statistics of the batch"],
)
def test_a_guide_without_one_density_at_each_z_is_refused(network, message):
    vae = bernoulli(1)
    other = pv.VAE(vae.prior, guides.Bernoulli(3, 1, network), vae.decoder)
    with pytest.raises(ValueError, match="`guide` must have .*" + message):
        exact.kl(other.model, other.guide, X)


@pytest.mark.parametrize(
    ("logits", "independent"),
    [
        (lambda a, x: 0.5 * x, True),
        (lambda a, x: a - 0.5, False),
        (lambda a, x: torch.where((x > 50) & (a > 0), 4.0, 0.5 * x), False),  # at no datum here
        (lambda a, x: a * a.detach() * 1e-9 + x, False),
    ],
)
def test_only_latents_that_are_not_computed_from_others_have_factors(logits, independent):
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.5))
            b = pyro.sample("b", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(logits=x))
            pyro.sample("b", dist.Bernoulli(logits=logits(a, x)))

    x = torch.randn(50)
    factors = GuideDensity(ModelDensity(ModelGuide(model, guide, x))).factors()
    assert (factors is not None) == independent
    assert factors is None or (set(factors) == {"a", "b"} and torch.equal(factors["a"].logits, x))
