"""Quadrature against known integrals and sharp models, and errors where it does not converge."""

import math

import pyro.distributions as dist
import pytest
import torch
from pairs import model_of
from torch.nn.functional import relu

from pyro_vae import exact
from pyro_vae.exact.quadrature import Box, QuadratureError, QuadratureRule, log_integral, refine_to_tolerance


def box(*corners):
    """A box of low, middle and high corner."""
    return Box(*(torch.tensor([values], dtype=torch.float64) for values in corners))


@pytest.mark.parametrize("scale", [1.0, 0.05])
@pytest.mark.parametrize("dims", [1, 2])
def test_a_normal_density_integrates_to_one(dims, scale):
    loc = torch.tensor([0.3, -0.2], dtype=torch.float64)[:dims]
    density = dist.Normal(loc, scale).to_event(1)
    value, _ = log_integral(density.log_prob, box([-8.0] * dims, [0.0] * dims, [8.0] * dims), 1e-8, 4096)
    assert value.abs().max() < 1e-7


def test_a_rule_of_order_8_is_exact_for_polynomials_of_degree_15():
    ((nodes, log_weights, _),) = list(QuadratureRule(box([-1.0], [0.25], [2.0]), 2).chunks(1000))
    integral = (log_weights.exp() * nodes[..., 0] ** 15).sum()
    assert math.isclose(float(integral), (2.0**16 - 1) / 16, rel_tol=1e-12)


def test_a_jump_at_the_break_point_adds_no_error():
    def log_integrand(points):
        return torch.where(points > 0.1234, 1.0, 0.5).log().sum(-1) - (points - 0.1234).abs().sum(-1)

    value, rule = log_integral(log_integrand, box([-40.0], [0.1234], [40.0]), 1e-10, 4096)
    assert abs(float(value) - math.log(1.5)) < 1e-9
    assert len(rule) <= 1024


def test_chunks_do_not_change_the_sum():
    rule = QuadratureRule(box([-1.0, 0.0], [0.0, 0.5], [1.0, 2.0]), 4)
    whole, parts = (torch.cat([w.exp() for _, w, _ in rule.chunks(size)]) for size in (10**6, 37))
    assert torch.equal(whole, parts)
    assert math.isclose(float(whole.sum()), 4.0, rel_tol=1e-12)


def test_cells_tile_the_box_and_hold_their_nodes():
    rule = QuadratureRule(box([-1.0], [0.5], [3.0]), 8)
    starts, widths, nodes = rule.starts[:, 0, 0], rule.widths[:, 0, 0], rule.nodes[:, 0, 0]
    assert torch.allclose(starts[1:], (starts + widths)[:-1])
    assert ((starts < nodes) & (nodes < starts + widths)).all()
    assert torch.allclose(widths.sum(), torch.tensor(4.0, dtype=torch.float64))


def test_draws_from_all_cells_by_their_widths_are_uniform():
    rule = QuadratureRule(box([-1.0], [0.0], [3.0]), 4)
    index = torch.multinomial(rule.widths[:, 0, 0], 4000, replacement=True)[:, None]
    cdf = (rule.draw(index).flatten().sort().values + 1) / 4
    steps = torch.arange(1, 4001, dtype=torch.float64) / 4000
    assert (cdf - steps).abs().max() < 2.4 / 4000**0.5  # Kolmogorov-Smirnov at about 1e-5


def test_a_box_grows_until_its_edges_do_not_matter():
    far = dist.Normal(torch.tensor([25.0], dtype=torch.float64), 1.0).to_event(1)
    value, rule = log_integral(far.log_prob, box([-4.0], [0.0], [4.0]), 1e-6, 4096)
    assert abs(float(value)) < 1e-5
    assert rule.box.high > 30


def test_no_convergence_and_infinite_mass_raise():
    def log_integrand(points):
        return 50 * torch.sin(1e7 * points).sum(-1) - points.abs().sum(-1)

    with pytest.raises(QuadratureError, match=r"differs by \S+ nats, more than the tolerance of 0.0001"):
        log_integral(log_integrand, box([-40.0], [0.0], [40.0]), 1e-4, 4096)
    with pytest.raises(QuadratureError, match="edge of the box"):
        log_integral(lambda points: 0 * points.sum(-1), box([-1.0], [0.0], [1.0]), 1e-4, 4096)


def test_rounding_widens_the_tolerance_in_proportion():
    values = iter([torch.tensor([1000.0, 0.0]), torch.tensor([1000.01, 0.0])])
    value, panels = refine_to_tolerance(lambda panels: next(values), 1, tolerance=1e-4, max_nodes=512, rounding=1e-4)
    assert panels == 64
    assert value[0] == 1000.01


def test_equal_boxes_are_shared():
    corners = torch.tensor([[0.0], [0.0]], dtype=torch.float64)
    assert len(Box(corners - 1, corners, corners + 1).shared().low) == 1
    moved = corners + torch.tensor([[0.0], [1.0]])
    assert len(Box(moved - 1, moved, moved + 1).shared().low) == 2


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
