"""The logit-normal distribution: its density, draws and gradients, compared with a transformed normal."""

import pytest
import torch
from torch.distributions import AffineTransform, Normal, SigmoidTransform, TransformedDistribution

from pyro_vae.distributions import LogitNormal
from pyro_vae.distributions.properties import support_bounds

LOC, SCALE = torch.linspace(-3, 3, 7, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)


def test_density_and_gradients_are_those_of_a_transformed_normal():
    loc, scale = LOC.clone().requires_grad_(), SCALE.clone().requires_grad_()
    theirs = TransformedDistribution(Normal(loc, scale), [SigmoidTransform(), AffineTransform(-1.0, 3.0)])
    ours = LogitNormal(loc, scale, -1.0, 2.0)
    x = theirs.sample((50,))
    found = []
    for q in (ours, theirs):
        value = x.clone().requires_grad_()
        log_p = q.log_prob(value)
        found.append([log_p, *torch.autograd.grad(log_p.sum(), [loc, scale, value])])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1000.0, 1001.0), (-1e-6, 1e-6)])
def test_draws_lie_strictly_inside_and_have_a_finite_density(dtype, low, high):
    q = LogitNormal(torch.tensor([-80.0, 0.0, 80.0], dtype=dtype), 1.0, low, high)
    x = q.rsample((100,))
    assert ((x > q.low) & (x < q.high)).all()
    assert q.log_prob(x).isfinite().all()
    assert q.support.check(x).all()


def test_the_pathwise_gradient_is_that_of_the_logit():
    loc = LOC.clone().requires_grad_()
    x = LogitNormal(loc, SCALE).rsample()
    (slope,) = torch.autograd.grad(x.sum(), loc)
    torch.testing.assert_close(slope, (x * (1 - x)).detach())


def test_expansion_keeps_bounds_and_values_outside_are_refused():
    q = LogitNormal(LOC, SCALE, -1.0, LOC.abs() + 1)
    assert torch.equal(support_bounds(q.expand((4, 7)).to_event(1))[1][0], LOC.abs() + 1)
    with pytest.raises(ValueError, match="support"):
        q.log_prob(torch.full((7,), -2.0, dtype=torch.float64))
