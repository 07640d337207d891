"""A long graph runs its repetitions together or in loops, and gives the numbers of the graph as it was captured."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import nn

from pyro_vae.compilation.graph import Graph
from pyro_vae.compilation.rolling import Loop, Program, Together, simplified


def program(graph):
    """The program of a graph, of which nothing is compiled."""
    return Program(simplified(graph.inputs, graph.nodes, graph.results), lambda run, tensors, same: Graph(run, tensors))


def results(run, inputs, written=()):
    """What a run returns, from a fixed random state, and what it writes, which is undone."""
    before = [tensor.clone() for tensor in written]
    torch.manual_seed(3)
    with torch.no_grad():
        found = [result.clone() for result in run(*inputs)]
        found += [tensor.clone() for tensor in written]
        for tensor, old in zip(written, before, strict=True):
            tensor.copy_(old)
    return [*found, torch.rand(1)]


def same_numbers(function, inputs):
    """Assert that the program gives the numbers of the graph; return the program."""
    graph = Graph(function, inputs)
    rolled = program(graph)
    rolled.prepare([*inputs, *graph.constants])
    expected = results(graph, inputs, graph.written)
    for ours, theirs in zip(
        results(lambda *x: rolled(*x, *graph.constants), inputs, graph.written), expected, strict=True
    ):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    return rolled


@pytest.mark.integration
def test_the_bodies_of_a_long_graph_are_compiled_by_another_process(monkeypatch, tmp_path):
    """This process takes them from the cache, for a sequence of another length as well."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, pieces, counts = torch.randn(4, 240, 2, dtype=torch.float64), {}, []
    for inputs in ([x], [x[:, :200]]):
        graph = Graph(recurrent, inputs)
        assert graph.is_long
        expected = results(graph, inputs)
        compilation = graph.compile_in_background(inputs, pieces)
        assert compilation.done() == bool(counts)  # nothing is left for the second length
        compilation.wait()
        counts.append(len(pieces))
        for ours, theirs in zip(results(graph, inputs), expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)
        assert isinstance(graph._run, Program)
    assert counts[0] == counts[1] > 0


def kinds(rolled):
    return [type(step).__name__ for step in rolled.steps]


torch.manual_seed(0)
CELL, READ = nn.Linear(5, 3).double(), nn.Linear(3, 2).double()


def recurrent(x):
    """The loss of a recurrent network, and the gradients of its parameters."""
    state, loss = torch.zeros(len(x), 3, dtype=x.dtype), 0.0
    for step in range(x.shape[1]):
        state = CELL(torch.cat([state, x[:, step]], 1)).tanh()
        loss = loss + (READ(state) - x[:, step]).square().sum()
    parameters = [*CELL.parameters(), *READ.parameters()]
    return [loss, *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("steps", [6, 13])
def test_a_recurrent_network_and_its_gradients(steps):
    rolled = same_numbers(recurrent, [torch.randn(4, steps, 2, dtype=torch.float64)])
    loops = [step for step in rolled.steps if isinstance(step, Loop)]
    assert len(loops) == 2  # forward and backward
    assert all(len(loop.group) < 8 for loop in loops)  # the read-out is in neither
    assert any(isinstance(step, Together) for step in rolled.steps)


def test_the_program_of_a_longer_sequence_has_the_same_parts():
    first, second = (program(Graph(recurrent, [torch.randn(4, steps, 2).double()])) for steps in (7, 30))
    assert kinds(first) == kinds(second)


def test_random_numbers_come_in_the_order_of_the_graph():
    def walk(x):
        state, path = x, []
        for _ in range(9):
            noise = torch.randn(3, dtype=x.dtype)
            state = state + noise * torch.bernoulli(torch.sigmoid(state))
            path.append(state + torch.rand(3, dtype=x.dtype))
        return [torch.stack(path), state]

    same_numbers(walk, [torch.zeros(3, dtype=torch.float64)])


def test_independent_noise_is_no_part_of_a_loop_with_operations():
    def noisy(x):
        return [sum((row + torch.randn(3, dtype=x.dtype)).exp() for row in x)]

    rolled = same_numbers(noisy, [torch.zeros(8, 3, dtype=torch.float64)])
    assert [len(step.group) for step in rolled.steps if isinstance(step, Loop)] == [1]


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers(layer):
    network = layer(2, 3, batch_first=True).double()

    def loss(x):
        value = network(x)[0].square().sum()
        return [value, *torch.autograd.grad(value, network.parameters())]

    rolled = same_numbers(loss, [torch.randn(4, 9, 2, dtype=torch.float64)])
    assert sum(isinstance(step, Loop) for step in rolled.steps) >= 2


def forward_algorithm(x):
    """Log-density of a hidden Markov model, and its gradient."""
    log_joint = x[0].clone()
    for emission in x[1:]:
        log_joint = (log_joint[:, None] + WEIGHT.log_softmax(-1)).logsumexp(0) + emission
    total = log_joint.logsumexp(0)
    return [total, *torch.autograd.grad(total, [WEIGHT])]


WEIGHT = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
FUNCTIONS = {
    "forward algorithm": forward_algorithm,
    "two steps back": lambda x: [_fibonacci(x)],
    "rows backwards": lambda x: [torch.stack([x[-1 - i].exp() * x[i] for i in range(len(x))])],
    "windows": lambda x: [torch.stack([x[i : i + 2].sum() for i in range(0, len(x) - 1, 2)])],
    "unequal rows": lambda x: [sum(x[i * i % len(x)].sin() for i in range(len(x)))],
    "in-place sums": lambda x: [_added_in_place(x)],
    "different numbers": lambda x: [torch.stack([x[i] * (i + 0.5) for i in range(len(x))])],
    "cumulative products": lambda x: [torch.stack(_products(x))],
    "each term twice": lambda x: [sum(row.exp() @ WEIGHT.detach() for row in x), sum(row.exp() for row in x)],
    "a state that is read from place to place": lambda x: [_shifting(x)],
    "a state that is stored by columns": lambda x: [_by_columns(x)],
    "differences": lambda x: [_less(x)[0], _less(x)[1]],
    "chunks": lambda x: [sum(a * b.tanh() for a, b in (row.chunk(2) for row in x))],
    "nothing repeated": lambda x: [x.exp().sum(), x.sin()],
    "an input itself": lambda x: [x, x.t()],
}


def _fibonacci(x):
    before, now = x[0], x[1]
    for row in x:
        before, now = now, (before * now).sin() + row
    return now


def _added_in_place(x):
    total = torch.zeros_like(x[0])
    for row in x:
        total += row.exp()
    return total


def _shifting(x):
    state = x
    for step in range(len(x)):
        state = (state + state[step] * state[0]).sin()
    return state


def _by_columns(x):
    """A state whose transpose can be viewed as one row; its values of all copies are stored in another order."""
    state = x.exp().t()
    for row in x:
        state = (state * row[:, None]).sin()
    return state.t().view(-1).cos()


def _less(x):
    total, alternating = x[0].exp(), x[0].exp()
    for row in x:
        total, alternating = total - row.sin(), row.sin() - alternating
    return total, alternating


def _products(x):
    found = [x[0].exp()]
    for row in x[1:]:
        found.append(found[-1] * row.exp())
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_repetitions(name):
    same_numbers(FUNCTIONS[name], [torch.randn(12, 4, dtype=torch.float64)])


def test_sums_of_matrix_products_are_one_product():
    def gradient(x):
        weight = torch.zeros(4, 4, dtype=x.dtype, requires_grad=True)
        return torch.autograd.grad(sum((row @ weight).sin().sum() for row in x), [weight])

    rolled = same_numbers(gradient, [torch.randn(9, 3, 4, dtype=torch.float64)])
    assert len(rolled.absorbed) == 8  # the products of the other copies are never made


def test_a_step_that_writes_to_parameters_comes_last():
    total = torch.zeros(4, dtype=torch.float64)

    def step(x):
        loss = sum(row.exp() * (1 + total) for row in x)
        total.add_(0.1 * loss)
        return [loss.sum() + total.sum()]

    same_numbers(step, [torch.randn(7, 4, dtype=torch.float64)])


def test_a_view_that_is_changed_is_left_alone():
    def function(x):
        values = torch.zeros(3, dtype=x.dtype)
        values[1] = x.sum()
        return [values * 2]

    graph = Graph(function, [torch.ones(3, dtype=torch.float64)])
    assert simplified(graph.inputs, graph.nodes, graph.results) is None


def test_a_hidden_markov_model_of_pyro_in_a_program():
    """By the sum over its states in parallel."""
    logits = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    location = torch.randn(3, dtype=torch.float64, requires_grad=True)

    @config_enumerate
    def model(x):
        state = 0
        for step in pyro.markov(range(len(x))):
            state = pyro.sample(f"z{step}", dist.Categorical(logits=logits[state]))
            pyro.sample(f"x{step}", dist.Normal(location[state], 1.0), obs=x[step])

    def loss(x):
        value = TraceEnum_ELBO(max_plate_nesting=0).differentiable_loss(model, lambda x: None, x)
        return [value, *torch.autograd.grad(value, [logits, location])]

    same_numbers(loss, [torch.randn(9, dtype=torch.float64)])


@pytest.mark.integration
def test_compiled_bodies_are_shared_by_sequences_of_all_lengths(monkeypatch):
    monkeypatch.setattr("pyro_vae.compilation.graph._LONG", 0)
    pieces = {}
    for steps in (20, 30, 33):
        x = torch.randn(4, steps, 2, dtype=torch.float64)
        graph = Graph(recurrent, [x])
        graph.compile([x], pieces)
        for ours, theirs in zip(graph(x), recurrent(x), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)
        if steps == 20:
            count = len(pieces)
    assert len(pieces) == count > 0
