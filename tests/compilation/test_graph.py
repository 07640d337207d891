"""Graphs repeat what was run, leave the world as it was, and refuse what would not be the same each time."""

import math
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae.compilation import graph
from pyro_vae.compilation.graph import CaptureError, CompiledFunction, Graph

X = torch.linspace(-1.0, 1.0, 6)


def test_a_graph_repeats_the_operations_on_new_inputs_and_changes_what_the_function_changes():
    weight, total = torch.tensor(3.0), torch.zeros(())
    graph = Graph(lambda x: [total.add_((weight * x).sum()) * 1], [X])
    assert total == 0
    assert graph(torch.ones(6))[0] == 18
    weight.fill_(5.0)  # is read anew
    assert graph(torch.ones(6))[0] == 48
    assert total == 48
    assert [id(tensor) for tensor in graph.written] == [id(total)]


def test_what_is_changed_through_a_view_is_known_as_written():
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
    layer = nn.Linear(6, 1).double()
    x = X.double()

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


def refused(x):
    pyro.sample("z", dist.Normal(0.0, 1.0))
    yield "an if", lambda x: [x if x.sum() > 0 else -x]
    yield "an assertion", lambda x: [x] if (x < 2).all() else None
    yield "a number", lambda x: [x * x.sum().item()]
    yield "a float", lambda x: [x * float(x.sum())]
    yield "an integer", lambda x: [x[: int(x.sum() + 3)]]
    yield "a list", lambda x: [x * x.tolist()[0]]
    yield "an array", lambda x: [x * torch.as_tensor(x.numpy())]
    yield "a comparison", lambda x: [x if torch.equal(x, x.flip(0)) else -x]
    yield "closeness", lambda x: [x if torch.allclose(x, x.flip(0)) else -x]
    yield "a loop", lambda x: [sum(step for step in range(5) if x[step] > 0) * x]
    yield "a mask", lambda x: [x[x > 0].sum()]
    yield "where it is not zero", lambda x: [x[x.nonzero().flatten()].sum()]
    yield "unique values", lambda x: [x.unique().sum()]
    yield "chosen values", lambda x: [torch.masked_select(x, x > 0).sum()]


@pytest.mark.parametrize(
    ("name", "function"), list(refused(X)), ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_depends_on_values_is_refused(name, function):
    with pytest.raises(CaptureError, match="compile:"):
        Graph(function, [X])


@pytest.mark.parametrize(
    ("draw", "whose"),
    [
        (lambda generator: torch.tensor(np.random.rand()), "NumPy or of the module `random`"),  # noqa: NPY002
        (lambda generator: random.random(), "NumPy or of the module `random`"),
        (lambda generator: torch.rand(3, generator=generator), "a torch.Generator of its own"),
    ],
    ids=["numpy", "random", "generator"],
)
def test_random_numbers_that_a_replay_would_not_draw_are_refused(draw, whose):
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(CaptureError, match=f"draws random numbers of {whose}, which a replay does not draw anew"):
        Graph(lambda x: [x + draw(generator)], [torch.ones(3)])


def test_the_refusal_names_the_site_the_line_and_the_way_out():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        return [x if z > 0 else -x]

    with pytest.raises(
        CaptureError, match=r"site 'z', asks a tensor for its value.*test_capture.py, line \d+.*leave `compile` out"
    ):
        Graph(model, [X])


def test_a_refusal_puts_back_what_was_changed_before_it(random_states):
    total, before = torch.zeros(()), random_states()

    def function(x):
        total.add_(1.0)
        return [x * torch.randn(6) if x.sum() > 0 else x]

    with pytest.raises(CaptureError):
        Graph(function, [X])
    assert total == 0
    assert random_states() == before


def test_checks_of_distributions_are_answered():
    probs = torch.full((6,), 0.5)
    graph = Graph(lambda x: [dist.Bernoulli(probs * x.sigmoid(), validate_args=True).log_prob(torch.ones(6))], [X])
    expected = dist.Bernoulli(probs * (2 * X).sigmoid()).log_prob(torch.ones(6))
    assert torch.allclose(graph(2 * X)[0], expected)


def test_two_captures_of_one_function_have_the_same_code():
    def function(x):
        return [(x * torch.randn(6)).exp().sum()]

    assert Graph(function, [X]).code == Graph(function, [2 * X]).code


def test_compiled_it_gives_the_same_numbers_with_the_same_noise():
    weight = torch.randn(6, 6)
    counter = torch.zeros(())
    graph = Graph(lambda x: [counter.add_(1.0) + (weight @ x + torch.randn(6)).tanh().sum()], [X])
    torch.manual_seed(1)
    plain = [graph(X)[0].item() for _ in range(3)]
    counter.zero_()
    graph.compile([X])
    torch.manual_seed(1)
    assert [graph(X)[0].item() for _ in range(3)] == pytest.approx(plain, rel=1e-5)
    assert counter == 3


def test_replayed_from_the_second_inputs_of_a_form(monkeypatch):
    monkeypatch.setattr(Graph, "compile", lambda self, inputs: None)
    calls = []
    double = CompiledFunction(lambda x: calls.append(x.shape) or [2 * x])
    for count in (3, 3, 3, 2, 3, 2, 2):
        x = torch.randn(count)
        assert torch.equal(double(x)[0], 2 * x)
    # Run as it is, captured, held against itself; and then no more.
    assert calls == [(3,)] * 3 + [(2,)] * 3


def test_replayed_is_held_against_the_function(monkeypatch):
    monkeypatch.setattr(Graph, "compile", lambda self, inputs: None)
    calls = []
    counted = CompiledFunction(lambda x: calls.append(1) or [len(calls) * x])
    counted(torch.ones(3))
    with pytest.raises(CaptureError, match="captured gives numbers that are off by 1 from those"):
        counted(torch.ones(3))


def test_without_a_compiler_it_says_so_and_replays_all_the_same(monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def fail(*args, **kwargs):
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.compile", fail)
    graph = Graph(lambda x: [x + 1], [X])
    with pytest.warns(UserWarning, match=r"compile: no working C\+\+ compiler .* replayed uncompiled"):
        graph.compile([X])
    assert torch.equal(graph(X)[0], X + 1)


def test_a_compiler_that_is_not_there_is_found_missing(tmp_path):
    """In a process of its own: inductor remembers the compiler that it found."""
    import os
    import subprocess
    import sys

    code = (
        "import torch, warnings\n"
        "from pyro_vae.compilation.graph import Graph\n"
        "graph = Graph(lambda x: [(x * 3).exp().sum() + 1], [torch.ones(64)])\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    graph.compile([torch.ones(64)])\n"
        "assert any('no working C++ compiler' in str(one.message) for one in caught), caught\n"
        "print(graph(torch.zeros(64))[0].item())\n"
    )
    environment = os.environ | {"CXX": str(tmp_path / "no-such-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(65.0)


def test_optimizers_of_torch_take_the_way_that_can_be_captured_and_defaults_are_put_back():
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=torch.tensor(0.1), foreach=True, capturable=True)
    weight.grad = torch.ones(3)
    with graph.compiling():
        optimizer.step()
    assert optimizer.state[weight]["step"].dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
    assert not torch.compiler.is_compiling()
    with warnings.catch_warnings(), pytest.raises(AssertionError):
        optimizer.step()  # outside, torch refuses it on the CPU: the switch is off again


@pytest.mark.parametrize(("inputs", "outputs"), [(300, 80), (40, 300)], ids=["wide", "narrow"])
def test_large_products_are_those_of_onednn_and_the_same_numbers(inputs, outputs):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(128, inputs), torch.randn(outputs, inputs, requires_grad=True), torch.randn(outputs)

    def function(x):
        y = nn.functional.linear(x, weight, bias)
        (gradient,) = torch.autograd.grad(y.square().sum(), weight)
        return [y.detach(), gradient, gradient.view(-1) * weight.detach().view(-1)]

    graph = Graph(function, [x])
    assert graph.code.count("pyro_vae.linear") == 2
    assert ("aten.clone" in graph.code) is (inputs < outputs), "the other way round, and put back in order"
    graph.compile([x])
    for ours, theirs in zip(graph(x), function(x), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3 * theirs.abs().max().item())
    assert "pyro_vae.linear" not in Graph(function, [x[:8]]).code
    wide = weight.double().detach()
    assert "pyro_vae.linear" not in Graph(lambda x: [x @ wide.t()], [x.double()]).code


@pytest.mark.parametrize(
    "bias",
    [torch.randn(128, 2)[:, 0], torch.tensor(5.0).expand(128), torch.tensor([2.0])],
    ids=["strided", "expanded", "of one number"],
)
def test_large_products_take_any_bias(bias):
    torch.manual_seed(0)
    x, weight = torch.randn(128, 128), torch.randn(128, 128)
    graph = Graph(lambda x: [nn.functional.linear(x, weight, bias)], [x])
    assert torch.allclose(graph(x)[0], x @ weight.t() + bias, atol=1e-3)


def test_large_products_of_rows_that_overlap_stay_as_they_are():
    torch.manual_seed(0)
    x, long = torch.randn(128, 128), torch.randn(255)
    graph = Graph(lambda x: [x @ long.unfold(0, 128, 1)], [x])
    assert torch.allclose(graph(x)[0], x @ long.unfold(0, 128, 1), atol=1e-3)


def test_one_hot_is_captured_if_the_number_of_classes_is_given():
    classes = torch.tensor([[0, 2], [1, 1]])
    graph = Graph(lambda x: [nn.functional.one_hot(x, 3), nn.functional.one_hot(x, num_classes=4)], [classes])
    for other in (classes, 2 - classes):
        for ours, count in zip(graph(other), (3, 4), strict=True):
            assert ours.dtype == torch.int64
            assert torch.equal(ours, nn.functional.one_hot(other, count))
    with pytest.raises(CaptureError, match="asks a tensor for its value"):
        Graph(lambda x: [nn.functional.one_hot(x)], [classes])


def test_operations_that_change_a_shape_in_place_change_no_numbers():
    weight, vector = torch.arange(9.0).view(3, 3), torch.tensor([1.0, 2.0, 3.0])
    before = weight.clone()
    graph = Graph(lambda x: [vector @ x, weight.detach().t_() + x], [weight])
    assert torch.equal(weight, before)
    assert torch.equal(graph(weight)[0], vector @ weight)
    assert torch.equal(graph(weight)[1], weight.t() + weight)


FEW = [(1, 9, 9), (4, 9, 9), (9, 1, 9), (9, 4, 9), (9, 9, 1), (9, 9, 4), (1, 1, 1), (2, 3, 4), (9, 9, 9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_few_rows_columns_or_terms_are_the_same_numbers_of_any_view(dtype):
    torch.manual_seed(0)
    x, y = torch.randn(20, 20, dtype=dtype), torch.randn(40, 9, dtype=dtype)

    def function(x, y):
        h, tall = x.tanh(), y.exp()  # which a compiler would not store by itself
        products = [tall[20:] @ tall[3:4].t(), x[:6, 1:3] @ tall[5:7], y[7:9] @ tall[5:9].t(), tall[:3].t() @ y[1:4]]
        products += [h.view(40, 10) @ x.view(10, 40)[:, :2], h.t() @ h[:, 5:7], tall.t().contiguous() @ tall[:, 1:4]]
        products += [tall[6:26].clone() @ tall[3:4].t(), h[5:6, 5:6].clone() @ h[7:8, 7:8].clone()]
        for rows, terms, columns in FEW:
            for a in (h[2 : 2 + rows, 3 : 3 + terms], x[3 : 3 + terms, 2 : 2 + rows].t()):
                for b in (x[1 : 1 + terms, 4 : 4 + columns], h[4 : 4 + columns, 1 : 1 + terms].t()):
                    products.append(a @ b)
        return products

    graph = Graph(function, [x, y])
    assert graph.code.count("aten.mm") == 4 + 5  # nine by nine, and parts whose rows lie apart
    expected = function(x.double(), y.double())
    for _ in range(2):  # as they are, and compiled
        for ours, theirs in zip(graph(x, y), expected, strict=True):
            assert ours.dtype == dtype
            assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)
        graph.compile([x, y])


def test_products_of_few_columns_and_many_terms_stay_as_they_are():
    x, y = torch.randn(2**10, 2**10), torch.randn(2**10, 1)
    assert "pyro_vae.linear" in Graph(lambda x, y: [x @ y], [x, y]).code


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_keeps_its_digits(dtype):
    x = torch.cat([torch.logspace(-30, 2, 2000), torch.tensor([0.0, math.inf, math.nan])]).to(dtype)
    x = torch.cat([x, -x])
    graph = Graph(lambda x: [x.tanh()], [x])
    graph.compile([x])
    expected = x.double().tanh()
    assert torch.allclose(
        graph(x)[0].double(), expected, rtol=5e-7 if dtype == torch.float32 else 1e-14, atol=0, equal_nan=True
    )
