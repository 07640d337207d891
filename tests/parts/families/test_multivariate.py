"""Guides and priors with correlations and modes, compared with quadrature and closed forms."""

import math

import pyro.distributions as dist
import pytest
import torch
from pairs import NET
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.parts.families import multivariate

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double()
SCORES = 6.5

GUIDES = {
    "diagonal": lambda: guides.DiagonalNormal(3, 2, NET),
    "full rank": lambda: guides.FullRankNormal(3, 2, NET),
    "low rank": lambda: guides.LowRankNormal(3, 2, NET, rank=1),
    "mixture": lambda: guides.MixtureOfNormals(3, 2, NET, num_components=3),
    "per datum": lambda: guides.PerDatum(multivariate.FullRankNormal(2), 6),
}
PRIORS = {
    "standard": lambda encoder: priors.StandardNormal(2),
    "normal": lambda encoder: priors.Normal(2),
    "mixture": lambda encoder: priors.MixtureOfNormals(2, num_components=3),
    "VampPrior": lambda encoder: priors.VampPrior(encoder, X[:4].float()),
}
PAIRS = [(p, g) for p in PRIORS for g in GUIDES if (p, g) != ("VampPrior", "per datum")]


def vae_of(prior, guide):
    torch.manual_seed(0)
    encoder = GUIDES[guide]()
    vae = pv.VAE(PRIORS[prior](encoder), encoder, likelihoods.Normal(2, 3, NET)).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return vae


HEAVIEST = ("VampPrior", "mixture")  # twelve boxes in two dimensions


@pytest.mark.parametrize(
    ("prior", "guide"), [pair if pair != HEAVIEST else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS]
)
def test_exact_evidence_elbo_and_gap_agree(prior, guide):
    vae = vae_of(prior, guide)
    evidence, bound = pv.exact.log_evidence(vae.model, X), pv.exact.elbo(vae.model, vae.guide, X)
    gap = pv.exact.kl(vae.model, vae.guide, X)
    assert (gap > 0).all()
    torch.testing.assert_close(evidence, bound + gap, atol=2e-3, rtol=0)


# A mixture has no KL in closed form, and there Pyro's TraceMeanField_ELBO draws as Trace_ELBO does.
CLOSED = [(TraceMeanField_ELBO, p, g) for p, g in PAIRS if p in {"standard", "normal"} and g != "mixture"]


SAMPLED = [(Trace_ELBO, p, g) for p, g in PAIRS if p != "normal" and g != "mixture"]
SAMPLED_SLOWLY = [pytest.param(Trace_ELBO, p, "mixture", marks=pytest.mark.slow) for p in PRIORS if p != "normal"]


@pytest.mark.parametrize(("elbo", "prior", "guide"), [*SAMPLED, *SAMPLED_SLOWLY, *CLOSED])
def test_the_elbo_of_draws_is_the_exact_one_and_its_gradient_too(elbo, prior, guide):
    vae = vae_of(prior, guide)
    parameters = list(vae.parameters())
    losses, gradients = [], []
    for _ in range(60):
        estimator = elbo(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
        loss = estimator.differentiable_loss(vae.model, vae.guide, X)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        losses.append(-loss.detach() / len(X))
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]) / -len(X))
    losses, gradients = torch.stack(losses), torch.stack(gradients)
    exact = pv.exact.elbo(vae.model, vae.guide, X).mean()
    assert abs(losses.mean() - exact) < SCORES * losses.std() / 60**0.5 + 1e-4
    assert gradients.abs().max() > 1e-3
    columns = gradients.split([parameter.numel() for parameter in parameters], dim=1)
    # One number of every third tensor: each slope costs two quadratures.
    for (name, parameter), column in list(zip(vae.named_parameters(), columns, strict=True))[::3]:
        flat = parameter.data.view(-1)
        index = (7 * len(name)) % len(flat) if guide != "per datum" else 0
        old, values = float(flat[index]), []
        for step in (1e-3, -1e-3):
            flat[index] = old + step
            values.append(float(pv.exact.elbo(vae.model, vae.guide, X, tolerance=1e-6).mean()))
        flat[index] = old
        found, slope = column[:, index], (values[0] - values[1]) / 2e-3
        assert abs(found.mean() - slope) < SCORES * found.std() / 60**0.5 + 1e-3, name


@pytest.mark.parametrize("make", [multivariate.FullRankNormal, lambda size: multivariate.LowRankNormal(size, 2)])
def test_the_kl_of_a_normal_from_a_diagonal_one_is_torchs_of_two_full_ones(make):
    torch.manual_seed(0)
    family = make(3)
    q = family(torch.randn(5, family.num_raw).double())
    loc, scale = torch.randn(5, 3).double(), torch.rand(5, 3).double() + 0.5
    p = dist.Normal(loc, scale).to_event(1)
    full = dist.MultivariateNormal(loc, scale_tril=scale.diag_embed())
    as_full = dist.MultivariateNormal(q.mean, covariance_matrix=q.covariance_matrix)
    expected = torch.distributions.kl_divergence(as_full, full)
    torch.testing.assert_close(torch.distributions.kl_divergence(q, p), expected)
    with pytest.raises(NotImplementedError):
        torch.distributions.kl_divergence(q, dist.Laplace(loc, scale).to_event(1))


def test_full_rank_reaches_every_covariance_and_low_rank_those_of_its_form():
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [-0.3, 0.7, 0.4]])
    below = torch.tensor([0.5 / 2.0, -0.3 / 0.4, 0.7 / 0.4])  # in units of the diagonal of the row
    raw = torch.cat([torch.arange(3.0), factor.diagonal().log(), below])
    q = multivariate.FullRankNormal(3)(raw)
    torch.testing.assert_close(q.covariance_matrix, factor @ factor.T)
    torch.testing.assert_close(q.mean, torch.arange(3.0))
    raw = torch.cat([torch.arange(3.0), torch.tensor([0.1, 0.2, 0.3]).log(), torch.tensor([10.0, 10.0, -1.0 / 0.3])])
    q = multivariate.LowRankNormal(3, 1)(raw)
    column = torch.tensor([[1.0], [2.0], [-1.0]])
    torch.testing.assert_close(q.covariance_matrix, column @ column.T + torch.tensor([0.01, 0.04, 0.09]).diag())


@pytest.mark.parametrize("scale", [0.1, 1e-2, 1e-3, 1e-4])
def test_low_rank_keeps_its_digits_in_float32_at_small_scales(scale):
    torch.manual_seed(0)
    raw = torch.cat([torch.zeros(5), torch.full((5,), math.log(scale)), torch.randn(10)])
    q = multivariate.LowRankNormal(5, 2)(raw)
    z = q.sample((1000,))
    factor = q.cov_factor.double()
    exact = dist.MultivariateNormal(q.loc.double(), factor @ factor.mT + q.cov_diag.double().diag_embed())
    torch.testing.assert_close(q.log_prob(z), exact.log_prob(z.double()).float(), atol=1e-4, rtol=1e-4)
    z.requires_grad_()
    ours, theirs = (torch.autograd.grad(p.log_prob(y).sum(), z)[0] for p, y in ((q, z), (exact, z.double())))
    torch.testing.assert_close(ours, theirs, atol=1e-3 / scale, rtol=1e-3)


def errors_of_log_q(part, x, seed=0):
    """Errors of log q in float32, in nats, at draws and at copies of them, against the noise that they are made of."""
    q = part(x)
    torch.manual_seed(seed)
    z = q.rsample()
    torch.manual_seed(seed)
    noise = torch.randn_like(q.loc).double()
    root = q.scale_tril.detach().double()
    torch.testing.assert_close(z.double(), q.loc.double() + (root @ noise[..., None])[..., 0], rtol=1e-4, atol=1e-4)
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    expected = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1) - log_det
    return [float((q.log_prob(value).detach() - expected).abs().max()) for value in (z, z.detach())]


@pytest.mark.parametrize("size", [8, 96, 512])
def test_full_rank_keeps_its_digits_in_float32_at_the_start(size):
    torch.manual_seed(0)
    part = guides.FullRankNormal(2, size, networks.mlp([16]))
    assert max(errors_of_log_q(part, torch.randn(8, 2))) < 1e-2


def test_full_rank_trains_in_float32_with_many_variables_and_keeps_its_digits():
    torch.manual_seed(0)
    net, x = networks.mlp([16]), torch.randn(200, 2)
    vae = pv.VAE(priors.StandardNormal(128), guides.FullRankNormal(2, 128, net), likelihoods.Normal(128, 2, net))
    history = pv.fit(vae.model, vae.guide, x, epochs=20, batch_size=50, lr=5e-3, compile=False).history["elbo"]
    assert history[-1] > history[0] + 1
    assert max(errors_of_log_q(vae.encoder, x[:20])) < 1e-2
    with torch.no_grad():
        q = vae.encode(x)
        kl = torch.distributions.kl_divergence(q, vae.prior())
    exact = multivariate.FullRankNormal(128)(vae.encoder.raw_outputs(x).double())
    expected = torch.distributions.kl_divergence(exact, dist.Normal(torch.zeros(128).double(), 1.0).to_event(1))
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-3)


def test_the_density_of_an_ill_conditioned_normal_is_right_at_draws_and_elsewhere():
    """Two variables nearly on a line: the condition number of L is 1e7, beyond the digits of float32."""
    raw = torch.tensor([0.0, 0.0, 0.0, math.log(1e-4), 1e7]).requires_grad_()
    q = multivariate.FullRankNormal(2)(raw)
    z = q.rsample((500,))
    draws = q.log_prob(z)
    slope = torch.autograd.grad(draws.mean(), raw)[0]  # E[log q] = -sum of log L_dd + const
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.0, -1.0, -1.0, 0.0]), rtol=1e-3, atol=1e-3)
    assert abs(draws.mean() + q.entropy()) < 5 * draws.std() / 500**0.5
    root = q.scale_tril.detach().double()
    residual = z.detach().double() @ root.inverse().T
    expected = -0.5 * residual.square().sum(-1) - math.log(2 * math.pi) - root.diagonal().log().sum()
    torch.testing.assert_close(q.log_prob(z.detach()).double(), expected, rtol=1e-5, atol=1e-4)


def test_the_score_function_of_a_full_rank_normal_sees_the_parameters():
    raw = torch.randn(5).requires_grad_()
    q = multivariate.FullRankNormal(2)(raw)
    z = q.sample((3,))
    torch_q = torch.distributions.MultivariateNormal(q.loc, scale_tril=q.scale_tril)
    ours, theirs = (torch.autograd.grad(p.log_prob(z).sum(), raw, retain_graph=True)[0] for p in (q, torch_q))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_models_in_files_from_before_the_scales_keep_their_covariances():
    full, low = multivariate.FullRankNormal(32), multivariate.LowRankNormal(12, 1)
    raw = torch.randn(full.num_raw)
    sigma = raw[33].exp()
    torch.testing.assert_close(full(raw).scale_tril[1, 0], sigma * 3 / 32 * raw[64])
    torch.testing.assert_close(low(raw[:36]).cov_factor[1, 0], raw[13].exp() * 0.5 * raw[25])
    for family in (full, low):
        del family.is_relative
    assert full(raw).scale_tril[1, 0] == pytest.approx(3 / 32 * float(raw[64]))
    del full.below_scale, low.factor_scale
    assert full(raw).scale_tril[1, 0] == raw[64]
    assert low(raw[:36]).cov_factor[1, 0] == raw[25]


CORRELATED = {"full rank": guides.FullRankNormal, "low rank": lambda *sizes: guides.LowRankNormal(*sizes, rank=4)}


@pytest.mark.parametrize("size", [4, 32, 128])
@pytest.mark.parametrize("make", CORRELATED.values(), ids=CORRELATED)
def test_guides_with_covariance_start_near_the_diagonal_one_of_their_location_and_scale(make, size):
    torch.manual_seed(0)
    part, x = make(5, size, networks.mlp([64])), torch.randn(50, 5)
    with torch.no_grad():
        raw = part.raw_outputs(x)
        loc, log_scale = raw[:, : 2 * size].chunk(2, dim=1)
        diagonal = dist.Normal(loc, log_scale.exp()).to_event(1)
        assert torch.distributions.kl_divergence(part(x), diagonal).mean() < 0.3
        raw[:, 2 * size :] = 0
        z = diagonal.sample()
        torch.testing.assert_close(part.family(raw).log_prob(z), diagonal.log_prob(z), rtol=1e-4, atol=1e-4)


def test_guides_with_covariance_train_as_well_as_the_diagonal_one_with_many_variables():
    """Noise of the optimizer in hundreds of correlations once cost nats, which a short training shows."""
    x, found = pv.datasets.binarize(pv.datasets.digits("train").x), {}
    net = networks.mlp([64])
    for name, make in {"diagonal": guides.DiagonalNormal, **CORRELATED}.items():
        torch.manual_seed(0)
        vae = pv.VAE(priors.StandardNormal(32), make(64, 32, net), likelihoods.Bernoulli(32, 64, net))
        options = {"epochs": 15, "batch_size": 50, "lr": 3e-3, "seed": 0, "compile": False}
        pv.fit(vae.model, vae.guide, x, elbo=TraceMeanField_ELBO(), **options)
        found[name] = pv.evaluate(vae.model, vae.guide, x, num_samples=10)["elbo"]
    assert found["full rank"] > found["diagonal"] + 0.5, found
    assert found["low rank"] > found["diagonal"] - 0.5, found
