"""Distributions rebuilt from free parameters are unchanged, and guides that cannot be refined raise."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import guide_of

import pyro_vae as pv
from pyro_vae.diagnostics.refinement import _MatchedNormals, _rebuildable
from pyro_vae.distributions.mixture import MixtureOfNormals


@pytest.mark.parametrize("fn", [
    dist.Normal(torch.zeros(5, 2), torch.ones(2)).to_event(1),
    dist.MultivariateNormal(torch.zeros(5, 2), precision_matrix=torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
    dist.LowRankMultivariateNormal(torch.zeros(5, 2), torch.ones(5, 2, 1), torch.ones(5, 2)),
    pv.distributions.Product(dist.Bernoulli(probs=torch.full((5, 2), 0.3)), 1),
    dist.OneHotCategorical(probs=torch.full((5, 3), 0.2)),
    dist.Categorical(logits=torch.randn(5, 3)),
    pv.distributions.LogitRelaxedBernoulli(torch.tensor(0.5), torch.randn(5, 2)).to_event(1),
    pv.distributions.LogRelaxedOneHotCategorical(torch.tensor(0.5), torch.randn(5, 2, 3)).to_event(1),
    dist.Laplace(torch.zeros(5), 2.0),
    dist.StudentT(torch.full((5,), 4.0), 0.0, 2.0),
    dist.Gamma(torch.full((5,), 4.0), 2.0),
    dist.Beta(torch.full((5,), 4.0), 2.0),
    dist.LogNormal(torch.zeros(5), 2.0),
    MixtureOfNormals(torch.zeros(5, 3), torch.randn(5, 3, 2), torch.ones(5, 3, 2)),
], ids=lambda fn: type(fn).__name__)  # fmt: skip
def test_a_rebuilt_distribution_is_the_same(fn):
    start, build = _rebuildable("z", fn)
    value = fn.sample()
    torch.testing.assert_close(build(start).log_prob(value), fn.log_prob(value), rtol=1e-4, atol=1e-4)
    assert build(start).event_shape == fn.event_shape
    assert all(parameter.isfinite().all() and not parameter.requires_grad for parameter in start)


@pytest.mark.parametrize(("fn", "has_covariance"), [
    (dist.Normal(torch.zeros(5, 2), torch.ones(2)).to_event(1), True),
    (dist.Normal(torch.zeros(5), 1.0), True),
    (dist.Normal(torch.zeros(5, 30), torch.ones(30)).to_event(1), False),
], ids=["two", "scalar", "many"])  # fmt: skip
def test_matched_draws_have_the_moments_of_the_normal_in_each_datum(fn, has_covariance):
    with _MatchedNormals(32):
        draws = fn.rsample(torch.Size([32])).reshape(32, 5, -1)
    covariance = torch.einsum("kni,knj->nij", draws, draws) / 32
    torch.testing.assert_close(draws.mean(0), torch.zeros_like(draws[0]), rtol=0, atol=1e-5)
    expected = torch.eye(draws.shape[-1]).expand_as(covariance)
    if not has_covariance:
        covariance, expected = (each.diagonal(dim1=1, dim2=2) for each in (covariance, expected))
    torch.testing.assert_close(covariance, expected, rtol=0, atol=1e-4)
    assert not torch.equal(draws[:, 0], draws[:, 1]), "each datum has draws of its own"


def test_matched_draws_have_the_marginal_distribution_nearly():
    with _MatchedNormals(32):
        draws = dist.Normal(torch.zeros(20000, 2), 1.0).rsample(torch.Size([32]))
    # The fourth moment of 16 pairs that are scaled to variance 1 is 3 * 16 / 18, and it is near that with a covariance.
    assert abs(float((draws**4).mean()) - 3 * 16 / 18) < 0.15
    assert abs(float((draws**3).mean())) < 1e-4


def test_the_gradient_of_a_quadratic_density_has_no_noise():
    start = torch.tensor([[0.5, -1.0], [0.2, 0.3]])
    precision = torch.tensor([[2.0, 0.9], [0.9, 1.5]])
    gradients = []
    for _ in range(2):
        loc, scale = start.clone().requires_grad_(), (start.abs() + 0.5).requires_grad_()
        with _MatchedNormals(16):
            z = dist.Normal(loc, scale).to_event(1).rsample(torch.Size([16]))
        density = -(z @ precision * z).sum(-1) / 2
        gradients.append(torch.autograd.grad(density.mean(0).sum(), [loc, scale]))
    exactly = -start @ precision, -precision.diagonal() * (start.abs() + 0.5)
    for found in gradients:
        for one, other in zip(found, exactly, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def model_of(**latents):
    def model(x):
        with pyro.plate("data", len(x)):
            total = sum(pyro.sample(name, prior) for name, prior in latents.items())
            pyro.sample("x", dist.Normal(total[..., None], torch.ones(2)).to_event(1), obs=x)

    return model


def chained_guide(x):
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Bernoulli(logits=x[:, 0] - 1))
        pyro.sample("z", dist.Normal(x[:, 1] - kind, 0.6))


def affine(x):
    return dist.TransformedDistribution(dist.Normal(x[:, 0], 1.0), [dist.transforms.AffineTransform(0.0, 2.0)])


NORMAL = dist.Normal(0.0, 1.0)
UNREFINABLE = {
    "chained": (model_of(z=NORMAL, kind=dist.Bernoulli(0.4)), chained_guide,
        r"`guide` must have .*independent.*got \['kind', 'z'\].*`refined`"),
    "poisson": (model_of(z=dist.Poisson(2.0)), guide_of(lambda x: dist.Poisson(x[:, 0].exp() + 1)),
        "`guide` must have .*enumerated, got 'z'.*`refined`"),
    "transformed": (model_of(z=NORMAL), guide_of(affine),
        "`guide` must have .*rebuilt.*got a TransformedDistribution for 'z'.*`refined`"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "guide", "message"), UNREFINABLE.values(), ids=UNREFINABLE.keys())
def test_a_guide_that_cannot_be_refined_has_no_split_and_the_reason(model, guide, message):
    found = pv.inference_gap(model, guide, torch.randn(5, 2))
    assert re.match(message, found.why_no_split)
    assert (found.approximation, found.amortization, found.refined) == (None, None, None)
    assert found.gap.isfinite().all()


def test_a_point_has_no_gap():
    guide = guide_of(lambda x: dist.Delta(x[:, 0]))
    with pytest.raises(ValueError, match=r"`guide` must have a density for .*, got a point .* for 'z'"):
        pv.inference_gap(model_of(z=NORMAL), guide, torch.randn(5, 2))
