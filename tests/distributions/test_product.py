"""Products of discrete variables: all states once, a mass of one, and the sum of the log-masses."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_vae.distributions.bernoulli import Bernoulli
from pyro_vae.distributions.product import Product


def bernoullis(*shape):
    return dist.Bernoulli(logits=torch.randn(*shape, dtype=torch.float64))


def one_hots(*shape):
    return dist.OneHotCategorical(logits=torch.randn(*shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("base", "num_dims", "count", "event_shape"),
    [
        (bernoullis(3), 1, 8, (3,)),
        (bernoullis(5, 2), 1, 4, (2,)),
        (bernoullis(5, 2, 2), 2, 16, (2, 2)),
        (one_hots(2, 3), 1, 9, (2, 3)),
        (one_hots(5, 1, 4), 1, 4, (1, 4)),
        (one_hots(2, 2, 2), 2, 16, (2, 2, 2)),
    ],
)
def test_product_enumerates_every_state_once_and_its_mass_is_one(base, num_dims, count, event_shape):
    q = Product(base, num_dims)
    states = q.enumerate_support(expand=False)
    assert states.shape == (count, *[1] * len(q.batch_shape), *event_shape)
    assert len(states.flatten(1).unique(dim=0)) == count
    assert q.support.check(states).all()
    full = q.enumerate_support()
    assert full.shape == (count, *q.batch_shape, *event_shape)
    assert torch.equal(full, states.expand(full.shape))
    torch.testing.assert_close(q.log_prob(full).exp().sum(0), torch.ones(q.batch_shape, dtype=torch.float64))
    assert q.has_enumerate_support
    assert q.expand((5, *q.batch_shape)).enumerate_support().shape == (count, 5, *q.batch_shape, *event_shape)


@pytest.mark.parametrize(
    ("logits", "value", "batch"),
    [
        ((4, 1, 3), (5, 3), (4, 5)),  # data of states
        ((5, 3), (4, 1, 3), (4, 5)),  # states of data
        ((4, 1, 3), (5, 3), (2, 4, 5)),
        ((2, 1, 6, 1, 3), (7, 1, 5, 3), (2, 7, 6, 5)),
        ((4, 1, 2, 3), (5, 2, 3), (4, 5)),
        ((4, 5, 3), (5, 3), (4, 5)),
        ((4, 1, 1), (5, 3), (4, 5)),
        ((3,), (5, 3), (5,)),
    ],
)
def test_product_of_bernoullis_has_the_sum_of_their_log_masses(logits, value, batch):
    torch.manual_seed(0)
    event = value[-2:] if value[-2:] == (2, 3) else value[-1:]
    x = (torch.rand(value, dtype=torch.float64) > 0.5).double()
    found = []
    for kind in (Bernoulli, dist.Bernoulli):
        of = torch.linspace(-40, 40, math.prod(logits), dtype=torch.float64).view(logits).requires_grad_()
        each = kind(logits=of).expand(torch.Size(logits[: -len(event)] + event))
        log_p = Product(each, len(event)).expand(torch.Size(batch)).log_prob(x)
        assert log_p.shape == batch
        found.append([log_p, *torch.autograd.grad(log_p.sum(), [of])])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shapes", [((3, 1, 0), (4, 0)), ((0, 1, 3), (4, 3)), ((3, 1, 2), (0, 2))], ids=str)
def test_product_of_bernoullis_takes_what_is_empty(shapes):
    logits, value = map(torch.zeros, shapes)
    log_p = Product(Bernoulli(logits=logits), 1).log_prob(value)
    assert torch.equal(log_p, torch.zeros(torch.broadcast_shapes(logits.shape[:-1], value.shape[:-1])))


def test_product_of_bernoullis_loses_no_digits_under_autocast():
    torch.manual_seed(0)
    q, x = Product(Bernoulli(logits=torch.randn(16, 1, 784)), 1), (torch.rand(8, 784) > 0.5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_p = q.log_prob(x)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p, q.base_dist.log_prob(x).double().sum(-1).float(), rtol=1e-6, atol=0)


def test_product_of_bernoullis_keeps_its_digits_and_refuses_grey_values():
    q = Product(Bernoulli(logits=torch.tensor([[[60.0, 60.0]], [[-60.0, 1e6]]]), validate_args=True), 1).expand([2, 2])
    certain = math.exp(-60)
    expected = torch.tensor([[-60 - certain, -2 * certain], [-certain, -60.0]], dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(torch.tensor([[0.0, 1.0], [1.0, 1.0]])).double(), expected, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"must be 0s and 1s, got 0 to 0\.3"):
        q.log_prob(torch.tensor([[0.0, 0.3], [0.0, 0.0]]))


def test_product_refuses_more_states_than_its_limit_naming_both():
    assert len(Product(bernoullis(16), 1).enumerate_support(expand=False)) == 2**16
    with pytest.raises(ValueError, match="131072 states"):
        Product(bernoullis(17), 1).enumerate_support()
    with pytest.raises(ValueError, match=str(10**20)):
        Product(one_hots(20, 10), 1).enumerate_support()
