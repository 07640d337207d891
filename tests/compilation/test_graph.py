"""A graph repeats a function, its capture changes nothing, and operations that depend on data are refused."""

import os
import random
import re
import subprocess
import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae.compilation.graph import CaptureError, CompiledFunction, Graph, capturable_optimizers

X = torch.linspace(-1.0, 1.0, 6)


def test_a_graph_repeats_the_operations_and_in_place_changes_on_new_inputs():
    weight, total = torch.tensor(3.0), torch.zeros(())
    graph = Graph(lambda x: [total.add_((weight * x).sum()) * 1], [X])
    assert total == 0
    assert graph(torch.ones(6))[0] == 18
    weight.fill_(5.0)  # a replay reads the new value
    assert graph(torch.ones(6))[0] == 48
    assert total == 48
    assert [id(tensor) for tensor in graph.written] == [id(total)]


def test_one_tensor_in_two_places_is_two_inputs():
    graph = Graph(lambda x, y: [x - 2 * y], [X, X])
    assert torch.equal(graph(X, torch.zeros(6))[0], X)


def test_a_tensor_that_is_changed_through_a_view_counts_as_written():
    whole = torch.zeros(4)
    graph = Graph(lambda x: [whole[1:3].add_(x[:2]).sum()], [X])
    assert torch.equal(whole, torch.zeros(4))
    assert any(tensor is whole for tensor in graph.written)


def test_a_capture_draws_no_random_numbers_and_a_replay_draws_those_of_the_function(random_states):
    before = random_states()
    graph = Graph(lambda x: [x + torch.randn(6)], [X])
    assert random_states() == before
    torch.manual_seed(4)
    expected = X + torch.randn(6)
    torch.manual_seed(4)
    assert torch.equal(graph(X)[0], expected)


def test_gradients_and_parameters_are_captured_with_the_rest():
    layer, x = nn.Linear(6, 1).double(), X.double()

    def descend(x):
        layer.zero_grad()
        layer(x).square().sum().backward()
        with torch.no_grad():
            layer.weight.sub_(0.1 * layer.weight.grad)
        return [layer.weight.grad.norm()]

    before = layer.weight.detach().clone()
    graph = Graph(descend, [x])
    assert torch.equal(layer.weight, before)
    (norm,) = graph(x)
    after = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.copy_(before)
    assert torch.allclose(descend(x)[0], norm, rtol=1e-12)
    assert torch.allclose(layer.weight, after, rtol=1e-12)


DATA_DEPENDENT = {
    "an if": lambda x: [x if x.sum() > 0 else -x],
    "an assertion": lambda x: [x] if (x < 2).all() else None,
    "a number": lambda x: [x * x.sum().item()],
    "a float": lambda x: [x * float(x.sum())],
    "a list": lambda x: [x * x.tolist()[0]],
    "an array": lambda x: [x * torch.as_tensor(x.numpy())],
    "a comparison": lambda x: [x if torch.equal(x, x.flip(0)) else -x],
    "closeness": lambda x: [x if torch.allclose(x, x.flip(0)) else -x],
    "a loop": lambda x: [sum(step for step in range(5) if x[step] > 0) * x],
    "a mask": lambda x: [x[x > 0].sum()],
    "nonzero": lambda x: [x[x.nonzero().flatten()].sum()],
    "unique values": lambda x: [x.unique().sum()],
    "masked_select": lambda x: [torch.masked_select(x, x > 0).sum()],
}


@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_operations_that_depend_on_values_are_refused(name):
    message = "where the operations depend on data: the function (reads the value|makes a tensor whose shape)"
    with pytest.raises(CaptureError, match=f"`compile` must be False {message}"):
        Graph(DATA_DEPENDENT[name], [X])


@pytest.mark.parametrize(
    ("draw", "source"),
    [
        (lambda generator: torch.tensor(np.random.rand()), "NumPy or from the module `random`"),  # noqa: NPY002
        (lambda generator: random.random(), "NumPy or from the module `random`"),
        (lambda generator: torch.rand(3, generator=generator), "a torch.Generator of its own"),
    ],
    ids=["numpy", "random", "generator"],
)
def test_random_numbers_that_a_replay_does_not_draw_are_refused(draw, source):
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(CaptureError, match=f"the function draws some from {source}, which would be the same in"):
        Graph(lambda x: [x + draw(generator)], [torch.ones(3)])


def test_the_error_names_the_site_the_line_and_the_remedy():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        return [x if z > 0 else -x]

    message = r"site 'z', reads the value of a tensor.*test_graph.py, line \d+.*`torch.where`.*leave `compile` out"
    with pytest.raises(CaptureError, match=message):
        Graph(model, [X])


def test_a_refused_capture_changes_nothing(random_states):
    total, before = torch.zeros(()), random_states()

    def function(x):
        total.add_(1.0)
        return [x * torch.randn(6) if x.sum() > 0 else x]

    with pytest.raises(CaptureError):
        Graph(function, [X])
    assert total == 0
    assert random_states() == before


def test_validation_of_distributions_may_read_values():
    probs = torch.full((6,), 0.5)
    graph = Graph(lambda x: [dist.Bernoulli(probs * x.sigmoid(), validate_args=True).log_prob(torch.ones(6))], [X])
    expected = dist.Bernoulli(probs * (2 * X).sigmoid()).log_prob(torch.ones(6))
    assert torch.allclose(graph(2 * X)[0], expected)


def test_two_captures_of_one_function_have_the_same_code():
    def function(x):
        return [(x * torch.randn(6)).exp().sum()]

    assert Graph(function, [X]).code == Graph(function, [2 * X]).code


@pytest.mark.integration
def test_a_compiled_graph_gives_the_same_numbers_with_the_same_noise():
    weight, counter = torch.randn(6, 6), torch.zeros(())
    graph = Graph(lambda x: [counter.add_(1.0) + (weight @ x + torch.randn(6)).tanh().sum()], [X])
    torch.manual_seed(1)
    plain = [graph(X)[0].item() for _ in range(3)]
    counter.zero_()
    graph.compile([X])
    torch.manual_seed(1)
    assert [graph(X)[0].item() for _ in range(3)] == pytest.approx(plain, rel=1e-5)
    assert counter == 3


@pytest.mark.usefixtures("uncompiled")
def test_a_compiled_function_is_replayed_from_the_second_call_of_a_signature():
    calls = []
    double = CompiledFunction(lambda x: calls.append(x.shape) or [2 * x])
    for count in (3, 3, 3, 2, 3, 2, 2):
        x = torch.randn(count)
        assert torch.equal(double(x)[0], 2 * x)
    # A plain run, the capture and a comparison for each signature, and no run after that.
    assert calls == [(3,)] * 3 + [(2,)] * 3


@pytest.mark.usefixtures("uncompiled")
def test_a_compiled_function_is_compared_with_the_function():
    calls = []
    counted = CompiledFunction(lambda x: calls.append(1) or [len(calls) * x])
    counted(torch.ones(3))
    with pytest.raises(CaptureError, match=r"`compile` must be False.*captured graph are off by 1 from those"):
        counted(torch.ones(3))


@pytest.mark.integration
def test_a_missing_compiler_is_a_warning_and_the_graph_is_replayed_uncompiled(tmp_path):
    """In a new process: inductor remembers the compiler that it has found."""
    code = """
import torch, warnings
from pyro_vae.compilation.graph import Graph
graph = Graph(lambda x: [(x * 3).exp().sum() + 1], [torch.ones(64)])
with warnings.catch_warnings(record=True) as caught:
    graph.compile([torch.ones(64)])
print(*(one.message for one in caught), graph(torch.zeros(64))[0].item())
"""
    environment = os.environ | {"CXX": str(tmp_path / "no-such-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "always", "-c", code]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.search(
        r"compile: no working C\+\+ compiler.* replayed uncompiled.* 65\.0\d*$", printed.strip(), re.DOTALL
    )


def test_optimizers_of_torch_can_be_captured_and_defaults_are_restored():
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=torch.tensor(0.1), foreach=True, capturable=True)
    weight.grad = torch.ones(3)
    with capturable_optimizers():
        optimizer.step()
    assert optimizer.state[weight]["step"].dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
    assert not torch.compiler.is_compiling()
    with warnings.catch_warnings(), pytest.raises(AssertionError):
        optimizer.step()  # torch refuses it on the CPU outside of the block


def test_one_hot_is_captured_if_the_number_of_classes_is_given():
    classes = torch.tensor([[0, 2], [1, 1]])
    graph = Graph(lambda x: [nn.functional.one_hot(x, 3), nn.functional.one_hot(x, num_classes=4)], [classes])
    for other in (classes, 2 - classes):
        for ours, count in zip(graph(other), (3, 4), strict=True):
            assert ours.dtype == torch.int64
            assert torch.equal(ours, nn.functional.one_hot(other, count))
    unknown = Graph(lambda x: [nn.functional.one_hot(x)], [classes])  # as many classes as the largest one says
    assert unknown.holds(2 - classes)
    assert not unknown.holds(classes + 1)


def test_integers_from_outside_may_be_read_and_the_graph_knows_for_which_it_holds():
    lengths = torch.tensor([3, 1, 2])

    def padded(x, lengths):
        assert lengths.max() <= x.shape[1]
        sums = [x[row, : lengths[row]].sum() for row in range(len(x))]
        parts = [x[lengths > 1], x[(lengths > 1).nonzero()[:, 0]], x[lengths[:, None] > torch.arange(4)]]
        return [torch.stack(sums), *parts, x[:, : int(lengths.max())] * lengths.float().mean()]

    x = torch.randn(3, 4)
    graph = Graph(padded, [x, lengths])
    assert graph.holds(2 * x, lengths)
    for ours, expected in zip(graph(2 * x, lengths), padded(2 * x, lengths), strict=True):
        torch.testing.assert_close(ours, expected)
    assert not graph.holds(x, torch.tensor([3, 2, 2]))
    assert not graph.holds(x, torch.tensor([4, 1, 2]))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, n: [x * (n * x).sum().item()],  # computed from data
        lambda x, n: [x * int(torch.randint(5, ()))],  # random
        lambda x, n: [x * int(n.clone().add_(1).sum())],  # changed in place
    ],
)
def test_other_values_are_not_read(function):
    with pytest.raises(CaptureError, match="reads the value of a tensor"):
        Graph(function, [torch.ones(3), torch.arange(3)])


def test_counts_that_are_floats_may_be_read_as_sizes():
    counts = torch.tensor([[2.0, 1.0], [0.0, 4.0]])
    graph = Graph(lambda counts: [counts / int(counts.sum(-1).max())], [counts])
    assert graph.holds(counts.flip(1))
    assert not graph.holds(counts + 1)


@pytest.mark.usefixtures("uncompiled")
def test_a_compiled_function_is_captured_again_for_other_integers():
    function = CompiledFunction(lambda x, n: [x[: int(n)].sum()[None]])
    x = torch.arange(5.0)
    for n in (2, 2, 3, 3, 5):
        assert function(x, torch.tensor(n))[0] == x[:n].sum()


def test_operations_that_change_a_shape_in_place_count_as_no_change():
    weight, vector = torch.arange(9.0).view(3, 3), torch.tensor([1.0, 2.0, 3.0])
    before = weight.clone()
    graph = Graph(lambda x: [vector @ x, weight.detach().t_() + x], [weight])
    assert torch.equal(weight, before)
    assert torch.equal(graph(weight)[0], vector @ weight)
    assert torch.equal(graph(weight)[1], weight.t() + weight)


def test_results_that_are_hidden_from_the_capture_are_refused():
    class Hidden(torch.Tensor):
        """A subclass, whose objects the capture has not seen."""

    with pytest.raises(CaptureError, match=r"hidden from the capture.*a subclass of torch\.Tensor"):
        Graph(lambda x: [(x + 1).as_subclass(Hidden)], [torch.ones(3)])
