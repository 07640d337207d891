"""Exact answers on the real line, on positive numbers and in a box, compared with quadrature by SciPy."""

import math
from functools import partial
from itertools import pairwise

import pyro.distributions as dist
import pytest
import torch
from pairs import gaussian, guide_of, model_of
from scipy import integrate
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, networks, priors

NET = networks.mlp([4], nn.Tanh)
X = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()
POSITIVE = partial(guides.LogNormal, 3, 1, NET), (0.0, math.inf)
LINES = {
    "box": (lambda: priors.Uniform(1, -1.0, 2.0), lambda: guides.LogitNormal(3, 1, NET, -1.0, 2.0), (-1.0, 2.0)),
    "gamma with a pole": (lambda: priors.Gamma(1, 0.5, 2.0), *POSITIVE),
    "gamma with a mode": (lambda: priors.Gamma(1, 3.0, 2.0), *POSITIVE),
    "VampPrior": (lambda: priors.VampPrior(guides.LogNormal(3, 1, NET), X.float()), *POSITIVE),
    "real": (lambda: priors.Laplace(1), lambda: guides.DiagonalNormal(3, 1, NET), (-math.inf, math.inf)),
}


def by_scipy(function, low, high):
    """The integral over a line, split at points where these integrands bend."""
    inner = [point for point in (-1.0, 1e-6, 1e-3, 0.1, 1.0, 5.0) if low < point < high]
    ends = [low, *inner, high]
    return sum(integrate.quad(function, *pair, epsabs=1e-13, limit=500)[0] for pair in pairwise(ends))


@pytest.mark.parametrize(("prior", "guide", "ends"), LINES.values(), ids=LINES)
def test_the_exact_answers_on_a_line_are_those_of_scipy(prior, guide, ends):
    torch.manual_seed(0)
    vae = gaussian(latent=1, prior=prior(), encoder=guide()).double().requires_grad_(False)
    evidence, posterior = pv.exact.log_evidence(vae.model, X), pv.exact.posterior(vae.model, X)
    elbo, kl = pv.exact.elbo(vae.model, vae.guide, X), pv.exact.kl(vae.model, vae.guide, X)
    for row, x in enumerate(X):
        q = vae.encode(x)

        def log_joint(z, x=x):
            z = torch.tensor([z], dtype=torch.float64)
            return float(vae.prior().log_prob(z) + vae.decode(z).log_prob(x))

        def term(z, q=q, log_joint=log_joint):
            log_q = float(q.log_prob(torch.tensor([z], dtype=torch.float64)))
            return math.exp(log_q) * (log_joint(z) - log_q) if log_q > -700 else 0.0

        total = by_scipy(lambda z, log_joint=log_joint: math.exp(log_joint(z)), *ends)
        mean = by_scipy(lambda z, log_joint=log_joint: z * math.exp(log_joint(z)), *ends) / total
        assert float(evidence[row]) == pytest.approx(math.log(total), abs=1e-5)
        assert float(posterior.mean[row]) == pytest.approx(mean, rel=1e-4)
        assert float(elbo[row]) == pytest.approx(by_scipy(term, *ends), abs=2e-4)
    torch.testing.assert_close(evidence, elbo + kl, atol=2e-4, rtol=0)
    single = pv.exact.log_evidence(vae.float().model, X.float())
    torch.testing.assert_close(single.double(), evidence, atol=1e-3, rtol=1e-5)
    draws = pv.exact.posterior(vae.model, X.float()).sample((200,))
    assert ((draws > ends[0]) & (draws < ends[1])).all()


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


def test_a_guide_on_another_support_than_the_prior_is_refused():
    one, guide = torch.ones((), dtype=torch.float64), guide_of(lambda x: dist.Normal(0 * x, 1.0))
    for prior, support in ((dist.Uniform(-one, one), r"\[-1, 1\]"), (dist.Gamma(one, one), r"\[0, inf\]")):
        model = model_of(prior, lambda z: dist.Normal(z, 1.0))
        with pytest.raises(ValueError, match=rf"`guide` must have its latent 'z' on {support}.*got a Normal.*infinite"):
            pv.exact.elbo(model, guide, X[0])
