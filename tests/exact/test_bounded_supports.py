"""Exact answers on the real line, on positive numbers and in a box, compared with quadrature by SciPy."""

import math
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import gaussian
from scipy import integrate
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, networks, priors
from pyro_vae.exact.coordinates import LatentCoordinates

NET = networks.mlp([4], nn.Tanh)
X = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()
LINES = {
    "box": (lambda: priors.Uniform(1, -1.0, 2.0), lambda: guides.LogitNormal(3, 1, NET, -1.0, 2.0), (-1.0, 2.0)),
    "gamma with a pole": (lambda: priors.Gamma(1, 0.5, 2.0), lambda: guides.LogNormal(3, 1, NET), (0.0, math.inf)),
    "gamma with a mode": (lambda: priors.Gamma(1, 3.0, 2.0), lambda: guides.LogNormal(3, 1, NET), (0.0, math.inf)),
    "VampPrior": (
        lambda: priors.VampPrior(guides.LogNormal(3, 1, NET), X.float()),
        lambda: guides.LogNormal(3, 1, NET),
        (0.0, math.inf),
    ),
    "real": (lambda: priors.Laplace(1), lambda: guides.DiagonalNormal(3, 1, NET), (-math.inf, math.inf)),
}


def vae_of(prior, guide):
    torch.manual_seed(0)
    return gaussian(latent=1, prior=prior(), encoder=guide()).double().requires_grad_(False)


def by_scipy(function, low, high):
    """The integral over a line, split at points where these integrands bend."""
    inner = [point for point in (-1.0, 1e-6, 1e-3, 0.1, 1.0, 5.0) if low < point < high]
    ends = [low, *inner, high]
    return sum(integrate.quad(function, *pair, epsabs=1e-13, limit=500)[0] for pair in pairwise(ends))


@pytest.mark.parametrize(("prior", "guide", "ends"), LINES.values(), ids=LINES)
def test_the_exact_answers_on_a_line_are_those_of_scipy(prior, guide, ends):
    vae = vae_of(prior, guide)
    evidence, posterior = pv.exact.log_evidence(vae.model, X), pv.exact.posterior(vae.model, X)
    elbo, kl = pv.exact.elbo(vae.model, vae.guide, X), pv.exact.kl(vae.model, vae.guide, X)
    for row, x in enumerate(X):
        q = vae.encode(x)

        def log_joint(z, x=x):
            return float(vae.prior().log_prob(z) + vae.decode(z).log_prob(x))

        def at(function):
            return lambda z: function(torch.tensor([z], dtype=torch.float64))

        total = by_scipy(at(lambda z: math.exp(log_joint(z))), *ends)
        mean = by_scipy(at(lambda z: float(z) * math.exp(log_joint(z))), *ends) / total

        def term(z, q=q, log_joint=log_joint):
            log_q = float(q.log_prob(z))
            return math.exp(log_q) * (log_joint(z) - log_q) if log_q > -700 else 0.0

        assert float(evidence[row]) == pytest.approx(math.log(total), abs=1e-5)
        assert float(posterior.mean[row]) == pytest.approx(mean, rel=1e-4)
        assert float(elbo[row]) == pytest.approx(by_scipy(at(term), *ends), abs=2e-4)
    torch.testing.assert_close(evidence, elbo + kl, atol=2e-4, rtol=0)


def test_the_evidence_in_a_rectangle_is_that_of_scipy():
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 0.5])
    torch.manual_seed(0)
    encoder = guides.LogitNormal(3, 2, NET, low, high)
    vae = gaussian(prior=priors.Uniform(2, low, high), encoder=encoder).double().requires_grad_(False)
    found = pv.exact.log_evidence(vae.model, X)
    for row, x in enumerate(X):

        def density(z2, z1, x=x):
            z = torch.tensor([z1, z2], dtype=torch.float64)
            return float((vae.prior().log_prob(z) + vae.decode(z).log_prob(x)).exp())

        total, _ = integrate.dblquad(density, -1.0, 2.0, 0.0, 0.5, epsrel=1e-7)
        assert float(found[row]) == pytest.approx(math.log(total), abs=1e-4)
    bound, gap = (answer(vae.model, vae.guide, X) for answer in (pv.exact.elbo, pv.exact.kl))
    torch.testing.assert_close(found, bound + gap, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("prior", "guide", "ends"), LINES.values(), ids=LINES)
def test_float32_and_float64_agree_and_draws_lie_inside(prior, guide, ends):
    vae = vae_of(prior, guide)
    precise = pv.exact.log_evidence(vae.model, X)
    single = pv.exact.log_evidence(vae.float().model, X.float())
    torch.testing.assert_close(single.double(), precise, atol=1e-3, rtol=1e-5)
    draws = pv.exact.posterior(vae.model, X.float()).sample((200,))
    assert ((draws > ends[0]) & (draws < ends[1])).all()


@pytest.mark.parametrize(
    "fn",
    [
        dist.Normal(torch.zeros(2), 1.0).to_event(1),
        dist.Gamma(torch.tensor([0.3, 4.0]), 2.0).to_event(1),
        dist.Beta(torch.tensor([0.5, 2.0]), 1.5).to_event(1),
        dist.Uniform(torch.tensor([-3.0, 1.0]), 2.0).to_event(1),
        dist.Exponential(torch.tensor(2.0)),
    ],
    ids=lambda fn: type(getattr(fn, "base_dist", fn)).__name__,
)
def test_coordinates_go_to_the_site_and_back_and_the_density_over_them_is_one(fn):
    wide = fn.expand((5,))
    coordinates = LatentCoordinates("z", wide, torch.float64)
    box = coordinates.integration_box(wide, 5)
    assert (len(box.low), coordinates.dims) == (1, max(1, fn.event_shape.numel()))
    axes = [np.linspace(float(low), float(high), 801) for low, high in zip(box.low[0], box.high[0], strict=True)]
    points = torch.cartesian_prod(*map(torch.from_numpy, axes)).reshape(-1, 1, coordinates.dims)
    values = coordinates.to_site(points)
    mass = (fn.log_prob(values) + coordinates.log_jacobian(points)).exp() * math.prod(a[1] - a[0] for a in axes)
    assert float(mass.sum()) == pytest.approx(1, abs=1e-4)
    near = points[(points.abs() < 8).all(-1).flatten()]  # where a number next to a bound keeps its digits
    torch.testing.assert_close(coordinates.to_points(coordinates.to_site(near)), near, rtol=1e-6, atol=1e-6)


def test_a_guide_on_another_support_than_the_prior_is_refused():
    def model(x, prior):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z[..., None], torch.ones(3)).to_event(1), obs=x)

    def guide(x, q):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    one, normal = torch.ones((), dtype=torch.float64), dist.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    for prior, support in ((dist.Uniform(-one, one), r"\[-1, 1\]"), (dist.Gamma(one, one), r"\[0, inf\]")):
        with pytest.raises(ValueError, match=rf"`guide` must have its latent 'z' on {support}.*got a Normal.*infinite"):
            pv.exact.elbo(lambda x, prior=prior: model(x, prior), lambda x: guide(x, normal), X)
