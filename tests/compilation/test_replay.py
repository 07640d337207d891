"""A replay without a compiler: the bits of the function, by fewer operations."""

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm

from pyro_vae.compilation.graph import Graph
from pyro_vae.compilation.replay import Replay

X = torch.linspace(-2.0, 2.0, 12).reshape(4, 3)


def replayed(function, *inputs):
    graph = Graph(function, inputs)
    return graph, Replay(graph)


@pytest.mark.parametrize(
    ("function", "most"),
    [
        (lambda x: [(x * 1).exp(), x.exp() + 1], 2),  # one exponential
        (lambda x: [(x / 1).neg().neg() + torch.tensor(2.0) * torch.ones(3)], 1),  # numbers of the code
        (lambda x: [x.t().t().reshape(4, 3) + torch.arange(3).float()], 1),
    ],
)
def test_what_is_known_before_a_call_is_not_computed_in_it(function, most):
    _, replay = replayed(function, X)
    assert len(replay.nodes) <= most
    for x in (X, X + 1):
        for found, expected in zip(replay(x), function(x), strict=True):
            assert torch.equal(found, expected)


def test_parameters_that_change_in_place_are_read_at_each_call():
    weight = torch.ones(2, 3)
    _, replay = replayed(lambda x: [x @ weight.t()], X)
    before = replay(X)[0]
    weight.mul_(2)
    assert torch.equal(replay(X)[0], 2 * before)


def test_tensors_that_are_changed_in_place_are_those_of_the_function():
    total = torch.zeros(3)
    _, replay = replayed(lambda x: [total.add_(x.sum(0)) * 1], X)
    (first,), (second,) = replay(X), replay(X)
    assert torch.equal(second, 2 * X.sum(0))
    assert torch.equal(total, second)
    assert torch.equal(first, X.sum(0))  # a copy, as of the function


def test_running_statistics_are_updated():
    mean, var = torch.zeros(3), torch.ones(3)
    _, replay = replayed(lambda x: [batch_norm(x, mean, var, training=True)], X + 1)
    replay(X + 1)
    torch.testing.assert_close(mean, 0.1 * (X + 1).mean(0))


def test_results_do_not_share_memory():
    weight = torch.ones(3)
    _, replay = replayed(lambda x: [x + 1, x + 1, x.t(), weight * 1, weight * 1], X)
    results = replay(X)
    for result in results:
        result.mul_(5)
    assert torch.equal(weight, torch.ones(3))
    assert torch.equal(X, torch.linspace(-2.0, 2.0, 12).reshape(4, 3))
    assert torch.equal(results[0], 5 * (X + 1))
    assert torch.equal(results[0], results[1])


def test_random_numbers_are_those_of_the_function():
    def function(x):
        torch.rand(5)  # unused, but drawn
        return [torch.randn_like(x) + nn.functional.dropout(x, 0.5)]

    _, replay = replayed(function, X)
    torch.manual_seed(3)
    expected = function(X)[0], torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(replay(X)[0], expected[0])
    assert torch.equal(torch.rand(2), expected[1])


def test_gradients_have_the_bits_of_autograd():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def gradients(x):
        return list(torch.autograd.grad(net(x).square().sum(), list(net.parameters())))

    graph, replay = replayed(gradients, X)
    assert len(replay.nodes) < len(graph.nodes)
    for x in (X, -X):
        assert all(map(torch.equal, replay(x), gradients(x)))
