"""The mixture of normals: its density, moments and pathwise gradients, compared with torch and quadrature."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pyro_vae.distributions.mixture import MixtureOfNormals

SCORES = 6.5


def mixture(k=3, d=2, seed=0, batch=()):
    torch.manual_seed(seed)
    shapes = [(*batch, k), (*batch, k, d), (*batch, k, d)]
    logits, loc, log_scale = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
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
    theirs = dist.MixtureSameFamily(torch.distributions.Categorical(logits=logits.double()), normals)
    expected = theirs.log_prob(value.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    of_found, of_expected = (torch.autograd.grad(log_p.sum(), [logits, loc, log_scale]) for log_p in (found, expected))
    torch.testing.assert_close(of_found, of_expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("far", "scale"), [(1e3, 1e-3), (1e4, 1e-4), (1e2, 1e-6), (1e4, 1.0)])
def test_components_up_to_1e8_scales_apart_keep_their_digits(far, scale, dtype):
    """Near one component, the density is that component's; squared distances of 1e16 cancel in a matrix product."""
    loc = torch.tensor([[-far, 0.25 * far], [far, 0.0], [0.3 * far, far]], dtype=dtype).requires_grad_()
    log_scale = torch.full((3, 2), scale, dtype=dtype).log().requires_grad_()
    value = (loc.detach() + scale * torch.tensor([[1.0, -2.0], [0.5, 0.25], [-3.0, 0.0]], dtype=dtype)).requires_grad_()
    log_p = MixtureOfNormals(torch.zeros(3, dtype=dtype), loc, log_scale.exp()).log_prob(value)
    steps, scales = (value - loc).detach().double(), log_scale.detach().double().exp()  # the difference is exact
    expected = -0.5 * ((steps / scales) ** 2).sum(-1) - scales.log().sum(-1) - math.log(2 * math.pi) - math.log(3)
    torch.testing.assert_close(log_p.double(), expected, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-9)
    of_loc, of_scale, of_value = torch.autograd.grad(log_p.sum(), [loc, log_scale, value])
    torch.testing.assert_close(of_loc.double(), steps / scales**2, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(of_scale.double(), (steps / scales) ** 2 - 1, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_value, -of_loc)


def test_usual_components_are_scored_by_matrix_products():
    """Without a number for each of 300,000 values, 100 components and 10 dimensions: 2.4 GB in float64."""
    loc = 3 * torch.randn(100, 10)
    with FlopCounterMode(display=False) as flops:
        MixtureOfNormals(torch.zeros(100), loc, torch.ones(100, 10)).log_prob(torch.randn(1000, 10))
    assert flops.get_total_flops() == 2 * 2 * 1000 * 100 * 10


def test_a_mixture_of_each_draw_runs_under_vmap():
    loc, value = torch.randn(5, 3, 2), torch.randn(5, 7, 2)

    def log_prob(loc, value):
        return MixtureOfNormals(torch.zeros(3), loc, torch.ones(3, 2), validate_args=False).log_prob(value)

    expected = torch.stack([log_prob(*pair) for pair in zip(loc, value, strict=True)])
    torch.testing.assert_close(torch.vmap(log_prob)(loc, value), expected)


@pytest.mark.parametrize("fixed_weights", [False, True], ids=["", "fixed weights"])
@pytest.mark.parametrize(("k", "d"), [(1, 1), (3, 1), (2, 2), (4, 2)])
def test_draws_of_a_mixture_carry_the_gradient_of_every_expectation(k, d, fixed_weights):
    """Of a function without symmetry, against quadrature."""
    parameters, q = mixture(k, d)
    if fixed_weights:
        q, parameters = MixtureOfNormals(q.logits.detach(), q.loc, q.scale), parameters[1:]

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
    # By quadrature 0.3217 and 0.3452: far apart there are no draws between the components.
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


def test_a_mixture_expands_and_refuses_shapes_and_scales_that_make_none():
    _, q = mixture()
    assert q.expand((4, 3)).rsample((2,)).shape == (2, 4, 3, 2)
    with pytest.raises(ValueError, match=r"`logits` and `loc` must be .*got shapes \(2,\) and \(3, 2\)"):
        MixtureOfNormals(torch.zeros(2), torch.zeros(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="scale"):
        MixtureOfNormals(torch.zeros(3), torch.zeros(3, 2), -torch.ones(3, 2), validate_args=True)
