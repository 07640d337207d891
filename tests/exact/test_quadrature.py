"""Quadrature against known integrals and sharp models, and errors where it does not converge."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import gaussian, guide_of, model_of
from scipy import stats
from torch.nn.functional import relu

from pyro_vae import exact, likelihoods, networks, priors
from pyro_vae.distributions.relaxed import LogitRelaxedBernoulli
from pyro_vae.exact import inference
from pyro_vae.exact.quadrature import Box, Cells, QuadratureError, integrate, sum_on_lattice


class Density:
    """The density, and the function of which it is the weight, of one datum."""

    num_data, chunk, rounding = 1, 4096, 0.0

    def __init__(self, log_density, function=None):
        self.log_density, self.function, self.evaluations = log_density, function, 0

    def __call__(self, points):
        self.evaluations += len(points)
        return self.log_density(points), None if self.function is None else self.function(points)

    def few_rows(self, count):
        return self, torch.arange(1)


def box(*corners):
    """A box of low, middle and high corner."""
    return Box.around(*(torch.tensor([values], dtype=torch.float64) for values in corners))


@pytest.mark.parametrize("scale", [1.0, 0.05, 1e-4])
@pytest.mark.parametrize("dims", [1, 2])
def test_a_normal_density_integrates_to_one(dims, scale):
    loc = torch.tensor([0.3, -0.2], dtype=torch.float64)[:dims]
    density = Density(dist.Normal(loc, scale).to_event(1).log_prob)
    value, _, _ = integrate(density, box([-8.0] * dims, [0.0] * dims, [8.0] * dims), 1e-8)
    assert value.abs().max() < 1e-7


def test_a_rule_of_order_8_is_exact_for_polynomials_of_degree_15():
    cells = Cells(*(torch.tensor(ends, dtype=torch.float64).reshape(2, 1, 1) for ends in ([-1.0, 0.25], [1.25, 1.75])))
    nodes, log_weights = cells.nodes()
    integral = (log_weights.exp() * nodes[..., 0] ** 15).sum()
    assert math.isclose(float(integral), (2.0**16 - 1) / 16, rel_tol=1e-12)


def test_halves_tile_their_cell_and_the_cells_of_nodes_hold_them():
    cells = Cells(torch.tensor([[[-1.0, 2.0]]]).double(), torch.tensor([[[0.5, 3.0]]]).double())
    for parts in (cells.split(), Cells(*(part.flatten(0, 1) for part in cells.subcells()))):
        assert math.isclose(float(parts.width.prod(-1).sum()), 1.5, rel_tol=1e-12)
        assert torch.allclose((parts.low + parts.width).flatten(0, 1).amax(0), torch.tensor([-0.5, 5.0]).double())
    nodes, log_weights = cells.nodes()
    around = cells.subcells()
    assert ((around.low < nodes) & (nodes < around.low + around.width)).all()
    assert torch.allclose(around.width.prod(-1), log_weights.exp())


@pytest.mark.parametrize("place", [0.1234, 0.5])
def test_a_jump_is_bisected(place):
    def log_integrand(points):
        return torch.where(points > place, 1.0, 0.5).log().sum(-1) - (points - place).abs().sum(-1)

    density = Density(log_integrand)
    value, _, _ = integrate(density, box([-40.0], [0.1234], [40.0]), 1e-10)
    assert abs(float(value) - math.log(1.5)) < 1e-9
    assert density.evaluations < 2**15


def test_chunks_do_not_change_the_sum():
    density = Density(dist.Normal(torch.zeros(2).double(), 1.0).to_event(1).log_prob)
    _, _, rule = integrate(density, box([-9.0, -9.0], [0.0, 0.0], [9.0, 9.0]), 1e-6)
    whole, parts = (torch.cat([w.exp() for _, w, _ in rule.chunks(size)]) for size in (10**6, 37))
    volume = (2 * 36.0) ** 2  # four times the box
    assert math.isclose(float(whole.sum()), volume, rel_tol=1e-9)
    assert math.isclose(float(parts.sum()), volume, rel_tol=1e-9)


@pytest.mark.parametrize("place", [12.0, 25.0, 500.0, 3e4])
def test_a_density_far_outside_of_the_box_is_reached(place):
    far = dist.Normal(torch.tensor([place], dtype=torch.float64), 1.0).to_event(1)
    value, _, rule = integrate(Density(far.log_prob), box([-4.0], [0.0], [4.0]), 1e-6)
    assert abs(float(value)) < 1e-5
    assert rule.box.high > place + 5


@pytest.mark.parametrize("width", [0.007, 0.002])
def test_a_bump_between_the_nodes_is_found(width):
    def log_integrand(points):
        return -0.5 * points[..., 0] ** 2 + 50 * torch.exp(-0.5 * ((points[..., 0] - 0.7212) / width) ** 2)

    grid = torch.linspace(-9, 9, 4_000_001, dtype=torch.float64)[:, None]
    expected = log_integrand(grid).logsumexp(0) + math.log(18 / 4e6)
    value, _, _ = integrate(Density(log_integrand), box([-9.0], [0.0], [9.0]), 1e-6)
    assert abs(float(value - expected)) < 1e-5


def test_each_part_of_a_box_has_its_scale():
    """Two components, 1e6 scales apart, of which neither shows at the nodes of the other."""
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.5, 0.5]).double()),
        dist.Normal(torch.tensor([[0.0], [20.0]]).double(), torch.tensor([[1.0], [1e-6]]).double()).to_event(1),
    )
    ends = torch.tensor([[[[-9.0]], [[20 - 9e-6]]], [[[9.0]], [[20 + 9e-6]]]]).double()
    both = Box(torch.tensor([[-9.0]]).double(), torch.zeros(1, 1).double(), torch.tensor([[20.1]]).double(), ends)
    value, _, _ = integrate(Density(mixture.log_prob), both, 1e-6)
    assert abs(float(value)) < 1e-6


@pytest.mark.parametrize(("df", "tolerance"), [(5.0, 1e-4), (2.5, 1e-4), (2.1, 1e-3)])
def test_an_expectation_with_heavy_tails_is_extrapolated(df, tolerance):
    """E[z^2] of a Student-t is df / (df - 2)."""
    q = dist.StudentT(torch.tensor([df]).double()).to_event(1)
    density = Density(q.log_prob, lambda points: points[..., 0] ** 2)
    _, value, _ = integrate(density, box([-100.0], [0.0], [100.0]), 1e-5, reach=1.0)
    assert value is not None
    assert abs(float(value) - df / (df - 2)) < tolerance


@pytest.mark.parametrize("df", [2.0, 1.5])
def test_an_infinite_expectation_raises(df):
    density = Density(
        dist.StudentT(torch.tensor([df]).double()).to_event(1).log_prob, lambda points: points[..., 0] ** 2
    )
    with pytest.raises(QuadratureError, match=r"the expectation under .* of datum 0 is infinite, or depends on tails"):
        integrate(density, box([-100.0], [0.0], [100.0]), 1e-4, reach=1.0)


def test_no_convergence_and_infinite_mass_and_nan_raise():
    def log_integrand(points):
        return 50 * torch.sin(1e7 * points).sum(-1) - points.abs().sum(-1)

    with pytest.raises(QuadratureError, match=r"differs by \S+ nats, more than the tolerance of 0.0001"):
        integrate(Density(log_integrand), box([-40.0], [0.0], [40.0]), 1e-4)
    with pytest.raises(QuadratureError, match="edge of the box"):
        integrate(Density(lambda points: 0 * points.sum(-1)), box([-1.0], [0.0], [1.0]), 1e-4)
    with pytest.raises(QuadratureError, match="datum 0 is NaN"):
        integrate(Density(lambda points: points.sum(-1).sqrt()), box([-1.0], [0.0], [1.0]), 1e-4)


def test_equal_boxes_are_shared():
    corners = torch.tensor([[0.0], [0.0]], dtype=torch.float64)
    assert len(Box.around(corners - 1, corners, corners + 1).shared().low) == 1
    moved = corners + torch.tensor([[0.0], [1.0]])
    assert len(Box.around(moved - 1, moved, moved + 1).shared().low) == 2
    assert Box.around(moved - 1, moved, moved + 1).union().parts.shape == (2, 2, 1, 1)


def standard(*shape):
    """A standard normal prior in float64."""
    return dist.Normal(torch.zeros(shape, dtype=torch.float64), 1.0).to_event(len(shape))


def summed(likelihood, x, end, count):
    """log p(x) of ``(N,)`` data as a sum over a fine grid from -end to end."""
    z = torch.linspace(-end, end, count + 1, dtype=torch.float64)
    log_joint = standard().log_prob(z) + likelihood(z).log_prob(x[:, None])
    return log_joint.logsumexp(1) + math.log(2 * end / count)


@pytest.mark.parametrize("sigma", [1e-2, 1e-3])
def test_two_narrow_modes_are_both_found_or_an_error_is_raised(sigma):
    def likelihood(z):
        return dist.Normal((z - 0.1) ** 2, sigma)

    x = torch.linspace(0.3, 2.5, 40, dtype=torch.float64)
    expected = summed(likelihood, x, 6, 1_200_000)
    try:
        evidence = exact.log_evidence(model_of(standard(), likelihood), x)
    except exact.QuadratureError:
        assert sigma < 1e-2
    else:
        assert torch.allclose(evidence, expected, atol=2e-4)


def test_two_narrow_modes_are_both_found_in_two_dimensions():
    def likelihood(z):
        return dist.Normal(torch.stack([(z[..., 0] - 0.1) ** 2, z[..., 1]], -1), 0.05).to_event(1)

    x = torch.tensor([[0.5, 0.2], [1.7, -0.4]], dtype=torch.float64)
    first = summed(lambda z: dist.Normal((z - 0.1) ** 2, 0.05), x[:, 0], 6, 120_000)
    expected = first + dist.Normal(0.0, (1 + 0.05**2) ** 0.5).log_prob(x[:, 1])
    assert torch.allclose(exact.log_evidence(model_of(standard(2), likelihood), x), expected, atol=3e-4)


@pytest.mark.parametrize("value", [1.0, 2.0, 2.5])
def test_a_bump_of_a_tenth_of_the_prior_is_found(value):
    def likelihood(z):
        return dist.Normal(relu(50 * (z - 0.8)) - 2 * relu(50 * (z - 0.85)) + relu(50 * (z - 0.9)), 0.3)

    x = torch.tensor([value], dtype=torch.float64)
    evidence = exact.log_evidence(model_of(standard(), likelihood), x, tolerance=1e-3)
    assert torch.allclose(evidence, summed(likelihood, x, 8, 1_600_000), atol=2e-3)


def test_a_comb_that_is_too_fine_raises():
    model = model_of(dist.Normal(0.0, 1.0), lambda z: dist.Normal(torch.sin(1e6 * z), 1e-3))
    with pytest.raises(exact.QuadratureError, match="did not converge"):
        exact.log_evidence(model, torch.zeros(2))


ONE = torch.ones((), dtype=torch.float64)
DECODERS = {
    "a step": (lambda z: dist.Normal((z > 0.3).double(), 0.1), [0.0, 1.0, 0.5]),
    "a bump": (lambda z: dist.Normal(torch.exp(-0.5 * ((z - 0.72) / 0.007) ** 2), 0.1), [0.0, 1.0, 0.5]),
    "a step beyond nine standard deviations": (
        lambda z: dist.Normal(torch.where(z > 12, 5 * ONE, 0 * ONE), 0.1),
        [5.0],
    ),
    "a bump beyond nine standard deviations": (
        lambda z: dist.Normal(5 * torch.exp(-0.5 * ((z + 9.5) / 0.1) ** 2), 0.2),
        [0.0, 5.0],
    ),
    "a hinge": (lambda z: dist.Normal(z + relu(z - 7.5), 0.5), [12.0, 16.0]),
    "a narrow mode 20 standard deviations out": (lambda z: dist.Normal(z + 1e-3 * z**3, 0.01), [0.0, 28.0]),
    "a fold": (lambda z: dist.Normal(z.abs(), 0.02), [0.0, 5.0]),
}


@pytest.mark.parametrize(("likelihood", "x"), DECODERS.values(), ids=DECODERS)
def test_the_evidence_of_sharp_and_far_decoders_is_that_of_a_fine_grid(likelihood, x):
    x = torch.tensor(x, dtype=torch.float64)
    expected = torch.cat([summed(likelihood, row, 32, 1_600_000) for row in x[:, None]])
    assert torch.allclose(exact.log_evidence(model_of(standard(), likelihood), x), expected, atol=3e-4)


def test_a_jump_at_any_place_is_within_the_tolerance():
    x = torch.tensor([-3.0, 0.0, 1.5, 4.0], dtype=torch.float64)
    for place in torch.linspace(-2.03, 2.17, 12, dtype=torch.float64):
        parts = [  # p(x, z < place) and p(x, z > place): a normal of x, and one of z given x
            dist.Normal(0.0, 1.25**0.5).log_prob(x - shift)
            + dist.Normal(0.0, 1.0).cdf(sign * (place - 0.8 * (x - shift)) / 0.2**0.5).log()
            for shift, sign in ((0.0, 1.0), (1.0, -1.0))
        ]
        model = model_of(standard(), lambda z, place=place: dist.Normal(z + (z > place).double(), 0.5))
        assert torch.allclose(exact.log_evidence(model, x), torch.logaddexp(*parts), atol=1e-4)


def mixture(weights, means, scales):
    weights, means, scales = (torch.tensor(values, dtype=torch.float64) for values in (weights, means, scales))
    return dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(means, scales).to_event(1))


@pytest.mark.parametrize(
    ("weights", "means", "scales"),
    [
        ([0.998, 0.002], [[0.0], [25.0]], [[1.0], [1.0]]),
        ([0.6, 0.399, 0.001], [[0.0, 0.0], [3.0, -2.0], [40.0, 25.0]], [[1.0, 1.0], [0.1, 0.5], [0.01, 0.02]]),
    ],
)
def test_rare_and_far_components_of_a_prior_are_reached(weights, means, scales):
    """x = z + noise is a mixture with the same weights and means."""
    x = torch.tensor(means, dtype=torch.float64)
    broad = (torch.tensor(scales, dtype=torch.float64) ** 2 + 4).sqrt().tolist()
    model = model_of(mixture(weights, means, scales), lambda z: dist.Normal(z, 2.0).to_event(1))
    expected = mixture(weights, means, broad).log_prob(x)
    assert torch.allclose(exact.log_evidence(model, x), expected, atol=2e-4)


def test_a_bump_in_two_dimensions_is_found():
    """A bump of radius 0.05 at (0.72, 0.72), on a flat rest."""

    def bump(first, second):
        return torch.exp(-0.5 * ((first - 0.72) ** 2 + (second - 0.72) ** 2) / 0.05**2)

    x = torch.tensor([0.5, 1.0], dtype=torch.float64)
    model = model_of(standard(2), lambda z: dist.Normal(bump(z[..., 0], z[..., 1]), 0.1))
    near = torch.linspace(0.12, 1.32, 601, dtype=torch.float64)
    first, second = torch.meshgrid(near, near, indexing="ij")
    prior = (standard().log_prob(first) + standard().log_prob(second)).exp()
    likelihood = dist.Normal(bump(first, second), 0.1).log_prob(x[:, None, None]).exp()
    flat = dist.Normal(0.0, 0.1).log_prob(x).exp()
    expected = (flat + (prior * (likelihood - flat[:, None, None])).sum((1, 2)) * 0.002**2).log()
    assert torch.allclose(exact.log_evidence(model, x), expected, atol=2e-4)


def test_a_jump_that_no_axis_follows_raises_in_two_dimensions():
    model = model_of(standard(2), lambda z: dist.Normal((z.sum(-1) > 0.5).double(), 0.3))
    with pytest.raises(QuadratureError, match="did not converge"):
        exact.log_evidence(model, torch.ones(1).double())


@pytest.mark.parametrize("temperature", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("size", [1, 2])
def test_relaxed_latents_at_a_low_temperature_are_resolved_between_0_and_1(temperature, size):
    vae = gaussian(
        size,
        size,
        prior=priors.RelaxedBernoulli(size, temperature),
        decoder=likelihoods.Normal(size, size, networks.linear(), scale=0.05),
    ).double()
    with torch.no_grad():
        vae.decoder.network.weight.copy_(torch.eye(size))
        vae.decoder.network.bias.zero_()
    y = torch.linspace(-12, 12, 400_001, dtype=torch.float64)  # beyond, the likelihood of x = 1/2 is nothing
    prior = LogitRelaxedBernoulli(torch.tensor(temperature).double(), torch.zeros(()).double())
    log_joint = prior.log_prob(y) + dist.Normal(y.sigmoid(), 0.05).log_prob(0.5 * ONE)
    expected = size * (log_joint.logsumexp(0) + math.log(24 / 400_000))
    evidence = exact.log_evidence(vae.model, torch.full((1, size), 0.5).double())
    assert math.isclose(float(evidence), float(expected), abs_tol=3e-4)


class Secretive(dist.Normal):
    """A prior with a component of weight 1/100 that its mean and variance do not show."""

    def __init__(self, loc, scale, validate_args=None):
        super().__init__(loc, scale, validate_args=False)

    def log_prob(self, value):
        rare = dist.Normal(1e4, 1e-3).log_prob(value) + math.log(0.01)
        return torch.logaddexp(super().log_prob(value) + math.log(0.99), rare)

    def sample(self, sample_shape=()):
        shape = self._extended_shape(sample_shape)
        rare = torch.rand(shape, dtype=torch.float64) < 0.01
        return torch.where(rare, 1e4 + 1e-3 * torch.randn(shape).double(), super().sample(sample_shape))

    def expand(self, batch_shape, _instance=None):
        return Secretive(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


def test_mass_that_only_draws_from_the_prior_find_raises():
    model = model_of(Secretive(0 * ONE, ONE), lambda z: dist.Normal(1e-4 * z + torch.sin(z) / 99, 0.1))
    with pytest.raises(QuadratureError, match=r"draws from the prior find p\(x\) of datum 0"):
        exact.log_evidence(model, torch.ones(1).double())


@pytest.mark.parametrize("df", [2.1, 3.0, 5.0])
def test_the_elbo_of_a_student_guide_is_the_closed_form(df):
    model = model_of(standard(1), lambda z: dist.Normal(z, 1.0).to_event(1))
    x = torch.tensor([[1.0]], dtype=torch.float64)
    guide = guide_of(lambda x: dist.StudentT(df * ONE, x / 2, 0.7).to_event(1))
    entropy = float(stats.t.entropy(df)) + math.log(0.7)
    expected = -(0.25 + 0.49 * df / (df - 2)) - math.log(2 * math.pi) + entropy
    assert math.isclose(float(exact.elbo(model, guide, x)), expected, abs_tol=2e-4)
    log_p = -0.25 - 0.5 * math.log(4 * math.pi)
    assert math.isclose(float(exact.kl(model, guide, x)), log_p - expected, abs_tol=2e-4)


def test_an_infinite_elbo_raises():
    model = model_of(standard(1), lambda z: dist.Normal(z, 1.0).to_event(1))
    guide = guide_of(lambda x: dist.StudentT(2 * ONE, x / 2, 0.7).to_event(1))
    with pytest.raises(QuadratureError, match=r"expectation under q\(z \| x\) of datum 0 is infinite"):
        exact.elbo(model, guide, torch.ones(1, 1).double())


@pytest.mark.parametrize("offset", [1e2, 1e6])
def test_data_of_too_few_digits_are_refused_in_float32_alone(offset):
    def likelihood(z):
        return dist.Normal(offset + 1.2 * torch.tanh(2 * z) * torch.ones(50).to(z), 0.5).to_event(1)

    x = likelihood(torch.zeros(2, 1)).sample()
    truth = exact.log_evidence(model_of(standard(1), likelihood), x.double())
    single = model_of(dist.Normal(torch.zeros(1), 1.0).to_event(1), likelihood)
    if offset == 1e6:
        with pytest.raises(QuadratureError, match=r"the last digit of the data in float32 .* compute in float64"):
            exact.log_evidence(single, x)
    else:
        assert torch.allclose(exact.log_evidence(single, x).double(), truth, atol=2e-3)


def test_a_negative_kl_raises(monkeypatch):
    vae, x = gaussian(1).double(), torch.randn(4, 3).double()
    too_low = inference._integrated_evidence
    monkeypatch.setattr(inference, "_integrated_evidence", lambda p, tol: (too_low(p, tol)[0] - 100, None))
    with pytest.raises(QuadratureError, match=r"the KL of datum \d would be -\d+\.?\d* nats, and no KL is negative"):
        exact.kl(vae.model, vae.guide, x)


@pytest.mark.parametrize("scale", [0.5, 0.1])
@pytest.mark.parametrize("size", [1, 2])
def test_draws_of_a_posterior_follow_its_density(scale, size):
    """z + 1e-3 z^2 is nearly z, so that p(z | x) is nearly normal: each variable's quantiles are uniform."""
    model = model_of(standard(size), lambda z: dist.Normal(z + 1e-3 * z**2, scale).to_event(1))
    x = torch.tensor([[0.3, -0.4]], dtype=torch.float64)[:, :size]
    torch.manual_seed(0)
    z = exact.posterior(model, x).sample((20_000,))[:, 0]
    expected = dist.Normal(x[0] / (1 + scale**2), scale / (1 + scale**2) ** 0.5)
    assert ((z.std(0) / expected.scale - 1).abs() < 4.5 / 40_000**0.5 + 1e-3).all()
    for variable in expected.cdf(z).T:
        assert stats.kstest(variable.numpy(), "uniform").statistic < 2.4 / 20_000**0.5 + 2e-3


def test_the_answers_in_batches_of_rows_are_those_of_all_rows(monkeypatch):
    vae, x = gaussian(1).double(), torch.randn(40, 3).double()
    whole = [exact.log_evidence(vae.model, x), exact.elbo(vae.model, vae.guide, x), exact.kl(vae.model, vae.guide, x)]
    posterior = exact.posterior(vae.model, x)
    monkeypatch.setattr(inference, "_batches", lambda p: list(p.batches(16)))
    parts = [exact.log_evidence(vae.model, x), exact.elbo(vae.model, vae.guide, x), exact.kl(vae.model, vae.guide, x)]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=3e-4)
    again = exact.posterior(vae.model, x)
    assert len(list(again._parts.rules())) == 3
    torch.testing.assert_close(again.mean, posterior.mean, rtol=0, atol=1e-3)
    assert again.sample((5,)).shape == (5, 40, 1)


class OnLattice:
    """A function of points ``(C, N, d)``."""

    chunk, rounding = 100, 0.0

    def __init__(self, function):
        self.function = function

    def __call__(self, points):
        return self.function(points)


def normal_of(dims, scale):
    loc = torch.tensor([[0.3, -0.2], [-1.1, 0.4]], dtype=torch.float64)[:, :dims]
    scale_tril = scale * torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)[:dims, :dims]
    return loc, scale_tril.expand(2, dims, dims)


@pytest.mark.parametrize("scale", [0.7, 0.01])
@pytest.mark.parametrize("dims", [1, 2])
def test_a_lattice_has_the_expectations_of_a_normal_in_closed_form(dims, scale):
    loc, scale_tril = normal_of(dims, scale)
    variance = (scale_tril @ scale_tril.mT).sum((-1, -2))
    cosine = (-variance / 2).exp() * loc.sum(-1).cos()
    square = variance + loc.sum(-1) ** 2
    for function, expected in ((lambda z: z.sum(-1).cos(), cosine), (lambda z: z.sum(-1) ** 2, square)):
        value, precise = sum_on_lattice(OnLattice(function), loc, scale_tril, 1e-6)
        assert precise.all()
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("function", [
    lambda z: relu(z.sum(-1)), lambda z: (z.sum(-1) > 0.1).double(), lambda z: (11 * z.sum(-1)).cos(),
    lambda z: 100 * (-((z - 0.13) / 0.05) ** 2 / 2).sum(-1).exp(),
    lambda z: torch.where(z.sum(-1) > 6.0, -torch.inf, 0.0), lambda z: (4 * z.sum(-1).abs()).exp(),
], ids=["kink", "jump", "fast", "peak", "infinite", "tails"])  # fmt: skip
def test_a_lattice_that_is_too_coarse_is_not_called_precise(dims, function):
    _, precise = sum_on_lattice(OnLattice(lambda z: function(z).double()), *normal_of(dims, 1.0), 1e-6)
    assert not precise.any()


def relu_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(relu(3 * z), 0.3).to_event(1), obs=x)


@pytest.mark.parametrize("model", [gaussian(2, 2).model, relu_model], ids=["smooth", "kinks"])
def test_an_elbo_is_the_same_on_a_lattice_and_on_cells(model, monkeypatch):
    x = torch.randn(6, 2)
    guide = guide_of(lambda x: dist.Normal(0.3 * x, 0.2 + 0.4 * x.sigmoid()).to_event(1))
    found = exact.elbo(model, guide, x)
    monkeypatch.setattr("pyro_vae.exact.guide_density.GuideDensity._on_lattice", lambda *_: None)
    torch.testing.assert_close(found, exact.elbo(model, guide, x), rtol=1e-5, atol=2e-4)
