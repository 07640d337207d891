"""Noise by a hash of a key and an index is uniform, and independent across bits, indices and calls."""

import pyro
import pytest
import torch
from scipy import stats

from pyro_vae._utils.noise import uniform_like
from pyro_vae.compilation.graph import Graph

ROWS, COLUMNS = 200, 5000
LIMIT = 5.5  # standard errors; with at most some thousand comparisons a test fails by chance once in 10,000 seeds


@pytest.fixture(scope="module")
def draws():
    """Many calls, one per row; each has its own key."""
    pyro.set_rng_seed(0)
    return torch.stack([uniform_like(torch.zeros(COLUMNS)) for _ in range(ROWS)])


def bits_of(draws):
    """The 24 bits of each number, as -1 and 1."""
    return ((draws.double() * 2**24).long()[..., None] >> torch.arange(24) & 1).double() * 2 - 1


def test_numbers_are_multiples_in_the_half_open_interval(draws):
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    assert torch.equal(draws.double() * 2**24, (draws.double() * 2**24).round())


def test_the_distribution_of_all_and_of_each_call_is_uniform(draws):
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-5
    calls = [stats.kstest(row.numpy(), "uniform").pvalue for row in draws]
    assert stats.kstest(calls, "uniform").pvalue > 1e-5  # neither too far from uniform nor too regular
    columns = [stats.kstest(column.numpy(), "uniform").pvalue for column in draws.T[:500]]
    assert stats.kstest(columns, "uniform").pvalue > 1e-5


def test_bits_are_fair_and_independent_of_each_other(draws):
    bits = bits_of(draws[:40]).reshape(-1, 24)
    products = bits.T @ bits / len(bits) - torch.eye(24)
    assert bits.mean(0).abs().max() < LIMIT / len(bits) ** 0.5
    assert products.abs().max() < LIMIT / len(bits) ** 0.5


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 8, 16, 28, 64, 128, 256, 784, 1024, 4096])
def test_bits_of_indices_at_a_distance_are_independent(draws, distance):
    bits = bits_of(draws[:40])
    first, second = bits[:, :-distance].reshape(-1, 24), bits[:, distance:].reshape(-1, 24)
    assert (first.T @ second / len(first)).abs().max() < LIMIT / len(first) ** 0.5


def test_calls_are_independent_at_the_same_index_and_at_neighbours(draws):
    bits = bits_of(draws)
    for shift in (0, 1):
        first, second = bits[:-1, shift:].reshape(-1, 24), bits[1:, : COLUMNS - shift].reshape(-1, 24)
        assert (first.T @ second / len(first)).abs().max() < LIMIT / len(first) ** 0.5


@pytest.mark.parametrize("bit", range(0, 32, 5))
def test_keys_that_differ_in_one_bit_give_independent_numbers(bit, monkeypatch):
    first = torch.tensor([12345, -678910], dtype=torch.int32)
    keys = [first, first ^ torch.tensor([0, 2**bit], dtype=torch.int32)]
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: keys.pop())
    one, other = (bits_of(uniform_like(torch.zeros(40_000))) for _ in range(2))
    assert (one.T @ other / len(one)).abs().max() < LIMIT / len(one) ** 0.5


def test_a_replayed_graph_draws_the_same_bits_as_the_function():
    x = torch.zeros(30, 7)
    graph = Graph(lambda x: [uniform_like(x)], [x])
    pyro.set_rng_seed(1)
    eager = [uniform_like(x), uniform_like(x)]
    pyro.set_rng_seed(1)
    assert all(torch.equal(graph(x)[0], one) for one in eager)
    assert not torch.equal(*eager)


@pytest.mark.integration
@pytest.mark.parametrize("shape", [(40, 784), (7, 13)])
def test_a_compiled_graph_draws_the_same_bits_as_the_function(shape):
    x = torch.full(shape, 0.3)
    graph = Graph(lambda x: [(uniform_like(x) < x).float(), uniform_like(x)], [x])
    graph.compile([x])
    pyro.set_rng_seed(1)
    eager = (uniform_like(x) < x).float(), uniform_like(x)
    pyro.set_rng_seed(1)
    assert all(map(torch.equal, graph(x), eager))


def test_float64_has_noise_of_its_own_precision_and_sizes_may_be_zero():
    assert uniform_like(torch.zeros(3, dtype=torch.float64)).dtype == torch.float64
    assert uniform_like(torch.zeros(0, 3)).shape == (0, 3)
    assert uniform_like(torch.zeros(())).shape == ()
