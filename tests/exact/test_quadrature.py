"""Integrals whose value is known, and the errors of those that do not settle."""

import math

import pytest
import torch

from pyro_vae.exact.quadrature import Box, QuadratureError, QuadratureRule, log_integral, refine_to_tolerance


def box(low, middle, high):
    return Box(*(torch.tensor([values], dtype=torch.float64) for values in (low, middle, high)))


def normal_log_density(points, loc, scale):
    return torch.distributions.Normal(loc, scale).log_prob(points).sum(-1)


@pytest.mark.parametrize("scale", [1.0, 0.05])
@pytest.mark.parametrize("dims", [1, 2])
def test_a_normal_density_integrates_to_one(dims, scale):
    loc = torch.tensor([0.3, -0.2], dtype=torch.float64)[:dims]
    value, _ = log_integral(
        lambda points: normal_log_density(points, loc, scale),
        box([-8.0] * dims, [0.0] * dims, [8.0] * dims),
        1e-8,
        4096,
    )
    assert value.abs().max() < 1e-7


def test_a_rule_of_order_8_is_exact_for_polynomials_of_degree_15():
    ((nodes, log_weights, _),) = list(QuadratureRule(box([-1.0], [0.25], [2.0]), 2).chunks(1000))
    integral = (log_weights.exp() * nodes[..., 0] ** 15).sum()
    assert math.isclose(float(integral), (2.0**16 - 1) / 16, rel_tol=1e-12)


def test_a_jump_at_the_break_costs_nothing():
    def log_integrand(points):
        return torch.where(points > 0.1234, 1.0, 0.5).log().sum(-1) - (points - 0.1234).abs().sum(-1)

    value, rule = log_integral(log_integrand, box([-40.0], [0.1234], [40.0]), 1e-10, 4096)
    assert abs(float(value) - math.log(1.5)) < 1e-9
    assert len(rule) <= 1024


def test_chunks_do_not_change_the_sum():
    rule = QuadratureRule(box([-1.0, 0.0], [0.0, 0.5], [1.0, 2.0]), 4)
    whole = torch.cat([log_weights.exp() for _, log_weights, _ in rule.chunks(10**6)])
    parts = torch.cat([log_weights.exp() for _, log_weights, _ in rule.chunks(37)])
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
    draws = rule.draw(index).flatten().sort().values
    cdf = (draws + 1) / 4
    steps = torch.arange(1, 4001, dtype=torch.float64) / 4000
    assert (cdf - steps).abs().max() < 2.4 / 4000**0.5  # Kolmogorov-Smirnov at about 1e-5


def test_a_box_grows_until_its_edges_do_not_matter():
    value, rule = log_integral(
        lambda points: normal_log_density(points, 25.0, 1.0), box([-4.0], [0.0], [4.0]), 1e-6, 4096
    )
    assert abs(float(value)) < 1e-5
    assert rule.box.high > 30


def test_an_integrand_that_does_not_settle_raises_with_the_discrepancy():
    def log_integrand(points):
        return 50 * torch.sin(1e7 * points).sum(-1) - points.abs().sum(-1)

    with pytest.raises(QuadratureError, match=r"differs by \S+ nats, and 0.0001 are asked for"):
        log_integral(log_integrand, box([-40.0], [0.0], [40.0]), 1e-4, 4096)


def test_mass_that_never_ends_raises():
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
