"""Guides and priors with correlations and modes, and guides for each datum, against quadrature and closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

import pyro_vae as pv
from pyro_vae import families, guides, likelihoods, networks, priors
from pyro_vae.distributions.mixture import MixtureOfNormals
from pyro_vae.parts.families import multivariate

TANH = networks.mlp([4], activation=nn.Tanh)
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double()
SCORES = 6.5

GUIDES = {
    "diagonal": lambda latent: guides.DiagonalNormal(3, latent, TANH),
    "full rank": lambda latent: guides.FullRankNormal(3, latent, TANH),
    "low rank": lambda latent: guides.LowRankNormal(3, latent, TANH, rank=1),
    "mixture": lambda latent: guides.MixtureOfNormals(3, latent, TANH, num_components=3),
    "per datum": lambda latent: guides.PerDatum(multivariate.FullRankNormal(latent), 6),
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
    encoder = GUIDES[guide](2)
    vae = pv.VAE(PRIORS[prior](encoder), encoder, likelihoods.Normal(2, 3, TANH)).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return vae


# --- Each pair of prior and guide ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_exact_evidence_elbo_and_gap_agree(prior, guide):
    vae = vae_of(prior, guide)
    evidence, bound = pv.exact.log_evidence(vae.model, X), pv.exact.elbo(vae.model, vae.guide, X)
    gap = pv.exact.kl(vae.model, vae.guide, X)
    assert (gap > 0).all()
    torch.testing.assert_close(evidence, bound + gap, atol=2e-3, rtol=0)


# A mixture has no KL in closed form, and there Pyro's TraceMeanField_ELBO draws as Trace_ELBO does.
CLOSED = [(TraceMeanField_ELBO, p, g) for p, g in PAIRS if p in {"standard", "normal"} and g != "mixture"]


@pytest.mark.parametrize(
    ("elbo", "prior", "guide"), [*((Trace_ELBO, p, g) for p, g in PAIRS if p != "normal"), *CLOSED]
)
def test_the_elbo_of_draws_is_the_exact_one_and_its_gradient_too(elbo, prior, guide):
    vae = vae_of(prior, guide)
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    copies, per_datum = 200, guide == "per datum"
    losses, gradients = [], []
    for _ in range(60):
        estimator = elbo(num_particles=copies, vectorize_particles=True, max_plate_nesting=1)
        loss = estimator.differentiable_loss(vae.model, vae.guide, X)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        losses.append(-loss.detach() / len(X))
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]) / -len(X))
    losses, gradients = torch.stack(losses), torch.stack(gradients)
    exact = pv.exact.elbo(vae.model, vae.guide, X).mean()
    assert abs(losses.mean() - exact) < SCORES * losses.std() / 60**0.5 + 1e-4
    assert gradients.abs().max() > 1e-3
    first = 0
    for number, (name, parameter) in enumerate(vae.named_parameters()):
        flat = parameter.data.view(-1)
        if number % 3:  # one number of every third tensor: each slope costs two quadratures
            first += len(flat)
            continue
        index = (7 * len(name)) % len(flat) if not per_datum else 0
        old, slopes = float(flat[index]), []
        for step in (1e-3, -1e-3):
            flat[index] = old + step
            slopes.append(float(pv.exact.elbo(vae.model, vae.guide, X, tolerance=1e-6).mean()))
        flat[index] = old
        column = gradients[:, first + index]
        slope = (slopes[0] - slopes[1]) / 2e-3
        assert abs(column.mean() - slope) < SCORES * column.std() / 60**0.5 + 1e-3, name
        first += len(flat)


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_each_pair_trains_a_step_with_fit_and_svi(prior, guide):
    vae = vae_of(prior, guide).float()
    x = X.float()
    before = [parameter.detach().clone() for parameter in vae.parameters()]
    fitted = pv.fit(vae.model, vae.guide, x, epochs=2, batch_size=3, lr=1e-2)
    assert set(fitted.history) == {"elbo", "distortion", "rate"}
    assert all(not torch.equal(p, b) for p, b in zip(vae.parameters(), before, strict=True))
    assert math.isfinite(SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), Trace_ELBO()).step(x))


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


# --- Normals with covariance -----------------------------------------------------------------------------------------


def test_full_rank_reaches_every_covariance_and_low_rank_those_of_its_form():
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [-0.3, 0.7, 0.4]])
    raw = torch.cat([torch.arange(3.0), factor.diagonal().log(), torch.tensor([0.5, -0.3, 0.7])])
    q = multivariate.FullRankNormal(3)(raw)
    torch.testing.assert_close(q.covariance_matrix, factor @ factor.T)
    torch.testing.assert_close(q.mean, torch.arange(3.0))
    raw = torch.cat([torch.arange(3.0), torch.tensor([0.1, 0.2, 0.3]).log(), torch.tensor([1.0, 2.0, -1.0])])
    q = multivariate.LowRankNormal(3, 1)(raw)
    column = torch.tensor([[1.0], [2.0], [-1.0]])
    torch.testing.assert_close(q.covariance_matrix, column @ column.T + torch.tensor([0.01, 0.04, 0.09]).diag())


@pytest.mark.parametrize("scale", [0.1, 1e-2, 1e-3, 1e-4])
def test_low_rank_keeps_its_digits_in_float32_where_scales_are_small_beside_the_factor(scale):
    torch.manual_seed(0)
    raw = torch.cat([torch.zeros(5), torch.full((5,), math.log(scale)), torch.randn(10)])
    q = multivariate.LowRankNormal(5, 2)(raw)
    z = q.sample((1000,))
    exact = dist.MultivariateNormal(q.loc.double(), _covariance(q))
    torch.testing.assert_close(q.log_prob(z), exact.log_prob(z.double()).float(), atol=1e-4, rtol=1e-4)
    slopes = [torch.autograd.grad(p.log_prob(y).sum(), y)[0] for p, y in ((q, leaf(z)), (exact, leaf(z.double())))]
    torch.testing.assert_close(slopes[0], slopes[1].float(), atol=1e-3 / scale, rtol=1e-3)
    assert q.expand((2, 3)).log_prob(z[0]).shape == (2, 3)


def leaf(value):
    return value.detach().clone().requires_grad_()


def _covariance(q):
    factor, diagonal = q.cov_factor.double(), q.cov_diag.double()
    return factor @ factor.mT + diagonal.diag_embed()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: multivariate.FullRankNormal((2, 3)), r"`event_shape` must be \(D,\), one vector.*got \(2, 3\)"),
        (lambda: multivariate.LowRankNormal(3, 4), "`rank` must be 1 to 3.*got 4"),
        (lambda: multivariate.LowRankNormal(3, 0), "`rank` must be .*got 0"),
        (lambda: guides.MixtureOfNormals(3, 2, TANH, num_components=0), "`num_components` must be .*got 0"),
        (lambda: priors.MixtureOfNormals(2, 1.5), "`num_components` must be .*got 1.5"),
    ],
)
def test_what_is_no_family_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- The mixture -----------------------------------------------------------------------------------------------------


def mixture(k=3, d=2, seed=0, batch=()):
    torch.manual_seed(seed)
    logits, loc, log_scale = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((*batch, k), (*batch, k, d), (*batch, k, d))
    )
    return [logits, loc, log_scale], MixtureOfNormals(logits, loc, (0.3 * log_scale).exp())


def test_a_mixture_is_torchs_with_its_moments():
    (logits, loc, log_scale), q = mixture(batch=(4,))
    normal = dist.Normal(loc, (0.3 * log_scale).exp()).to_event(1)
    other = dist.MixtureSameFamily(torch.distributions.Categorical(logits=logits), normal)
    value = torch.randn(7, 4, 2).double()
    torch.testing.assert_close(q.log_prob(value), other.log_prob(value))
    torch.testing.assert_close(q.mean, other.mean)
    torch.testing.assert_close(q.variance, other.variance)


@pytest.mark.parametrize("batch", [(), (3,)], ids=["alone", "in a plate"])
def test_components_of_all_values_keep_their_digits_in_float32(batch):
    """Far from zero, narrow and wide, far apart: what the squares lose in float32 they must not lose."""
    torch.manual_seed(0)
    loc = (1000 + 3 * torch.randn(20, 8)).requires_grad_()
    log_scale = (2 * torch.randn(20, 8) - 3).requires_grad_()
    logits = torch.randn(20, requires_grad=True)
    value = loc.detach()[:3] + 0.1 * torch.randn(5, 3, 8)
    found = MixtureOfNormals(logits, loc, log_scale.exp()).expand(batch).log_prob(value)
    normals = dist.Normal(loc.double(), log_scale.double().exp()).to_event(1)
    expected = dist.MixtureSameFamily(torch.distributions.Categorical(logits=logits.double()), normals).log_prob(
        value.double()
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    of_found, of_expected = (torch.autograd.grad(log_p.sum(), [logits, loc, log_scale]) for log_p in (found, expected))
    for one, other in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("k", "d"), [(1, 1), (3, 1), (2, 2), (4, 2)])
def test_draws_of_a_mixture_carry_the_gradient_of_every_expectation(k, d):
    """Of a function without symmetry, against quadrature."""
    parameters, q = mixture(k, d)

    def function(z):
        return torch.sin(z[..., 0]) * z[..., -1] + 0.3 * z[..., -1] ** 2 + torch.tanh(2 * z).sum(-1)

    axis = torch.linspace(-9, 9, 500).double()
    points = torch.cartesian_prod(*[axis] * d).reshape(-1, d)
    mass = q.log_prob(points).exp() * (axis[1] - axis[0]) ** d
    expected = torch.autograd.grad((mass * function(points)).sum(), parameters, retain_graph=True)
    estimates = [
        torch.autograd.grad(function(q.rsample((5000,))).mean(), parameters, retain_graph=True) for _ in range(100)
    ]
    for index, wanted in enumerate(expected):
        found = torch.stack([estimate[index] for estimate in estimates])
        assert ((found.mean(0) - wanted).abs() < SCORES * found.std(0) / 10 + 1e-9).all()


@pytest.mark.parametrize(("distance", "found"), [(4.0, 0.3217), (16.0, 0.0)])
def test_weights_of_a_guide_have_a_gradient_as_long_as_components_touch(distance, found):
    torch.manual_seed(0)
    loc, scale = torch.tensor([[0.0], [distance]]), torch.ones(2, 1)
    logits = torch.zeros(2, requires_grad=True)
    q, p = MixtureOfNormals(logits, loc, scale), MixtureOfNormals(torch.tensor([0.2, 0.8]).log(), loc, scale)
    z = q.rsample((200_000,))
    slope = torch.autograd.grad((p.log_prob(z) - q.log_prob(z)).mean(), logits)[0][1].item()
    # By quadrature 0.3217 and 0.3452: far apart no draw is where it crosses over, as the docstring says.
    assert slope == pytest.approx(found, abs=0.02)


def test_gradients_are_finite_where_components_coincide_or_are_far_apart_in_float32():
    for spread in (0.0, 100.0):
        loc = (spread * torch.randn(4, 5, 50)).requires_grad_()
        logits = torch.zeros(4, 5, requires_grad=True)
        z = MixtureOfNormals(logits, loc, torch.full((4, 5, 50), 0.01)).rsample((20,))
        slopes = torch.autograd.grad(z.sum(), [logits, loc])
        assert all(slope.isfinite().all() for slope in slopes)
        torch.testing.assert_close(slopes[1].sum(), torch.tensor(20.0 * 4 * 50), rtol=1e-3, atol=0)


def test_draws_without_gradient_are_the_same():
    _, q = mixture()
    pyro.set_rng_seed(0)
    moving = q.rsample((10,))
    pyro.set_rng_seed(0)
    torch.testing.assert_close(q.sample((10,)), moving.detach(), rtol=1e-14, atol=0)
    with torch.no_grad():
        assert not q.rsample((3,)).requires_grad


def test_a_mixture_expands_and_broadcasts():
    _, q = mixture()
    wide = q.expand((4, 3))
    assert (wide.batch_shape, wide.event_shape, wide.rsample((2,)).shape) == ((4, 3), (2,), (2, 4, 3, 2))
    value = torch.randn(4, 3, 2).double()
    torch.testing.assert_close(wide.log_prob(value), q.log_prob(value))
    with pytest.raises(ValueError, match=r"logits, loc: got shapes \(2,\) and \(3, 2\)"):
        MixtureOfNormals(torch.zeros(2), torch.zeros(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="scale"):
        MixtureOfNormals(torch.zeros(3), torch.zeros(3, 2), -torch.ones(3, 2), validate_args=True)


def test_a_mixture_guide_finds_both_modes_and_closes_the_gap_of_a_normal():
    """x = |z| + noise: the posterior has two modes."""
    torch.manual_seed(0)
    x = torch.randn(200, 1).abs() + 0.1 * torch.randn(200, 1)

    class Fold(nn.Module):
        def forward(self, z):
            return z.abs()

    gaps = {}
    decoder = likelihoods.Normal(1, 1, lambda *sizes: Fold(), scale=0.3)
    for name, encoder in {
        "normal": guides.DiagonalNormal(1, 1, networks.mlp([16])),
        "mixture": guides.MixtureOfNormals(1, 1, networks.mlp([16]), num_components=2),
    }.items():
        vae = pv.VAE(priors.StandardNormal(1), encoder, decoder)
        elbo = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
        pv.fit(vae.model, vae.guide, x, epochs=600, lr=1e-2, elbo=elbo)
        gaps[name] = float(pv.exact.kl(vae.model, vae.guide, x).mean())
    assert gaps["mixture"] < 0.2
    assert gaps["normal"] > gaps["mixture"] + 0.15


# --- VampPrior -------------------------------------------------------------------------------------------------------


def test_a_vamp_prior_is_the_average_of_the_guide_and_draws_from_it():
    vae = vae_of("VampPrior", "diagonal")
    p, q = vae.prior(), vae.encode(vae.prior.pseudo_data)
    z = torch.randn(50, 2).double()
    average = q.log_prob(z[:, None]).logsumexp(-1) - math.log(4)
    torch.testing.assert_close(p.log_prob(z), average)
    torch.testing.assert_close(p.mean, q.mean.mean(0))


def test_a_vamp_priors_encoder_is_registered_once_under_its_own_name():
    vae = vae_of("VampPrior", "diagonal")
    names = [name for name, _ in vae.named_parameters()]
    assert [name for name in names if name.startswith("prior")] == ["prior.pseudo_data"]
    assert len({id(parameter) for parameter in vae.parameters()}) == len(names)
    vae.model(X)
    vae.guide(X)
    assert {name.rpartition("$$$")[2] for name in pyro.get_param_store()} == set(names)


def test_a_vae_with_a_vamp_prior_goes_through_a_state_dict():
    vae, other = vae_of("VampPrior", "diagonal"), vae_of("VampPrior", "diagonal")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(vae.state_dict())
    torch.testing.assert_close(pv.exact.log_evidence(other.model, X), pv.exact.log_evidence(vae.model, X))


def test_the_optimal_prior_is_the_average_of_the_guide_over_the_data():
    """With all data as pseudo-data no prior has a lower rate."""
    torch.manual_seed(0)
    encoder = guides.DiagonalNormal(3, 2, TANH)
    x = 3 * X.float()
    decoder = likelihoods.Normal(2, 3, TANH)
    rates = {
        name: pv.evaluate(vae.model, vae.guide, x, num_samples=4000)["rate"]
        for name, vae in {
            "standard": pv.VAE(priors.StandardNormal(2), encoder, decoder),
            "VampPrior": pv.VAE(priors.VampPrior(encoder, x), encoder, decoder),
        }.items()
    }
    assert 0 <= rates["VampPrior"] < rates["standard"]
    assert rates["VampPrior"] < math.log(6)  # no more than which of the six it was


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: priors.VampPrior(GUIDES["diagonal"](2), torch.randn(3)),
            ValueError,
            r"`pseudo_data` must be .*got shape \(3,\)",
        ),
        (
            lambda: priors.VampPrior(GUIDES["diagonal"](2), torch.randn(4, 2)),
            ValueError,
            r"accepted is \(K, 3\), K >= 1",
        ),
        (lambda: priors.VampPrior(GUIDES["diagonal"](2), torch.randn(0, 3)), ValueError, "K >= 1"),
        (
            lambda: priors.VampPrior(guides.Bernoulli(3, 2, TANH), torch.randn(4, 3)),
            ValueError,
            "`encoder` must be .*got a Bern",
        ),
        (
            lambda: priors.VampPrior(guides.RelaxedBernoulli(3, 2, TANH, 0.5), torch.randn(4, 3)),
            ValueError,
            "`encoder` must be a guide of Gaussian latents.*got a RelaxedBernoulli",
        ),
        (
            lambda: priors.VampPrior(GUIDES["per datum"](2), torch.randn(4, 3)),
            TypeError,
            "`encoder` must be .*got a PerDatum",
        ),
    ],
)
def test_what_is_no_vamp_prior_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- Priors with heavier tails ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (lambda: priors.Laplace(1, learnable=True), 1e-4),
        (lambda: priors.Laplace(2), 5e-3),  # around q the cusp of the prior is inside a panel
        (lambda: priors.StudentT(1, df=3.0, learnable=True), 1e-4),
    ],
    ids=["Laplace", "Laplace 2-D", "t3"],
)
def test_priors_with_heavy_tails_have_the_evidence_of_a_long_sum(make, tolerance):
    torch.manual_seed(0)
    prior = make()
    size = prior.event_shape[0]
    vae = pv.VAE(prior, guides.DiagonalNormal(3, size, TANH), likelihoods.Normal(size, 3, TANH)).double()
    exact = pv.exact.log_evidence(vae.model, X, tolerance=tolerance)
    chunks = [vae.decode(vae.prior().sample((100_000, 1))).log_prob(X).logsumexp(0) for _ in range(10)]
    sampled = torch.stack(chunks) - math.log(100_000)
    error = sampled.std(0) / 10**0.5
    assert ((sampled.mean(0) - exact).abs() < 7 * error + 1e-3).all()
    bound, gap = (f(vae.model, vae.guide, X, tolerance=tolerance) for f in (pv.exact.elbo, pv.exact.kl))
    assert (exact - bound - gap).abs().max() < 2e-3 + tolerance


def test_a_cauchy_prior_is_too_wide_for_quadrature_and_says_so():
    vae = pv.VAE(priors.StudentT(1, df=1.0), guides.DiagonalNormal(3, 1, TANH), likelihoods.Normal(1, 3, TANH)).double()
    with pytest.raises(pv.exact.QuadratureError, match="did not converge"):
        pv.exact.log_evidence(vae.model, X)


# --- A guide for each datum ------------------------------------------------------------------------------------------


def linear_vae(encoder):
    torch.manual_seed(0)
    decoder = likelihoods.Normal(2, 3, networks.linear(), scale=0.5).requires_grad_(False)
    return pv.VAE(priors.StandardNormal(2), encoder, decoder)


def of_many_draws():
    return TraceMeanField_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_full_rank_guide_for_each_datum_finds_the_posterior_of_each(batch_size):
    vae, x = linear_vae(guides.PerDatum(multivariate.FullRankNormal(2), 6)), X.float()
    epochs = 400 if batch_size is None else 150
    pv.fit(vae.model, vae.guide, x, epochs=epochs, batch_size=batch_size, lr=2e-2, elbo=of_many_draws())
    pv.fit(vae.model, vae.guide, x, epochs=epochs, batch_size=batch_size, lr=1e-3, elbo=of_many_draws())
    exact = pv.exact.posterior(vae.model, x)
    q = vae.encode(x)
    torch.testing.assert_close(q.mean, exact.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(q.covariance_matrix, exact.covariance_matrix, atol=0.03, rtol=0)


def test_refining_starts_at_the_amortized_guide_and_closes_its_gap():
    torch.manual_seed(1)
    vae, x = linear_vae(guides.DiagonalNormal(3, 2, networks.mlp([2]))), X.float()
    refined = pv.VAE(vae.prior, guides.PerDatum.refining(vae.encoder, x), vae.decoder)
    torch.testing.assert_close(pv.exact.elbo(refined.model, refined.guide, x), pv.exact.elbo(vae.model, vae.guide, x))
    for lr in (2e-2, 1e-3):
        pv.fit(refined.model, refined.guide, x, epochs=300, lr=lr, elbo=of_many_draws())
    posterior = pv.exact.posterior(vae.model, x)
    precision = posterior.precision_matrix
    mean_field_gap = 0.5 * (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) - precision.logdet())
    torch.testing.assert_close(pv.exact.kl(refined.model, refined.guide, x), mean_field_gap, atol=5e-3, rtol=0)
    assert not any(parameter is other for parameter in refined.encoder.parameters() for other in vae.parameters())


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_data_are_enough_for_a_guide_of_their_own(n):
    vae = linear_vae(guides.PerDatum(families.Normal(2), n))
    assert pv.exact.elbo(vae.model, vae.guide, X[:n].float()).shape == (n,)


def test_a_mixture_for_each_datum_starts_with_components_that_differ_and_finds_both_modes():
    x = torch.tensor([[1.0], [1.2]])

    def model(x):
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.abs(), 0.3).to_event(1), obs=x)  # either sign explains it

    torch.manual_seed(0)
    encoder = guides.PerDatum(multivariate.MixtureOfNormals(1, num_components=2), 2)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", encoder(pyro.subsample(x, event_dim=1)))

    pv.fit(model, guide, x, epochs=400, lr=2e-2, elbo=of_many_draws())
    assert (encoder(x).loc.squeeze(-1).sign().sum(-1) == 0).all()
    assert (pv.exact.kl(model, guide, x) < 0.3).all()  # one normal: log 2 and more


def test_other_data_than_its_own_are_refused():
    vae = linear_vae(guides.PerDatum(families.Normal(2), 6))
    with pytest.raises(ValueError, match="`PerDatum` must be the 6 data that it was made for.*got 4 rows"):
        vae.encode(X[:4].float())
    with pytest.raises(ValueError, match="6"):
        vae.guide(X[:4].float())
    with pytest.raises(ValueError, match="validation: the guide is not amortized"):
        pv.fit(vae.model, vae.guide, X.float(), epochs=1, validation=X.float())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: guides.PerDatum(families.Normal(2), 0), ValueError, "`raw` must be .*got 0"),
        (
            lambda: guides.PerDatum(families.Normal(2), torch.zeros(5, 3)),
            ValueError,
            r"`raw` must be .*got shape \(5, 3\); .*\(N, 4\)",
        ),
        (lambda: guides.PerDatum.refining(priors.Normal(2), X), TypeError, "`encoder` must be .*got a Normal"),
        (lambda: guides.PerDatum(2, 5), TypeError, "`family` must be a family.*got a int"),
    ],
)
def test_what_is_no_guide_for_each_datum_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_relaxed_latents_of_each_datum_have_a_twin():
    raw = torch.randn(5, 3)
    encoder = guides.PerDatum(families.RelaxedBernoulli(3, 0.5), raw)
    vae = pv.VAE(priors.RelaxedBernoulli(3, 0.5), encoder, likelihoods.Normal(3, 3, TANH))
    twin = vae.discrete()
    torch.testing.assert_close(twin.encode(X[:5]).mean, raw.sigmoid())
    assert twin.encoder.raw is encoder.raw


def test_it_is_the_same_under_particles_and_importance_weighting():
    vae = linear_vae(guides.PerDatum(families.Normal(2), 6))
    elbo = pv.objectives.ImportanceWeighted(50, "doubly-reparameterized")
    fitted = pv.fit(vae.model, vae.guide, X.float(), epochs=30, batch_size=2, lr=5e-2, elbo=elbo)
    assert fitted.history["elbo"][-1] > fitted.history["elbo"][0]
