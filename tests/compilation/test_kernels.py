"""The replacements of operations give the same numbers, and are used where they are meant to be."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from pyro_vae.compilation import kernels
from pyro_vae.compilation.graph import Graph as PlainGraph

Graph = partial(PlainGraph, decompositions=kernels.decompositions)


@pytest.mark.integration
@pytest.mark.parametrize(("inputs", "outputs"), [(300, 80), (40, 300)], ids=["wide", "narrow"])
def test_large_products_are_computed_by_onednn_to_the_same_numbers(inputs, outputs):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(128, inputs), torch.randn(outputs, inputs, requires_grad=True), torch.randn(outputs)

    def function(x):
        y = nn.functional.linear(x, weight, bias)
        (gradient,) = torch.autograd.grad(y.square().sum(), weight)
        return [y.detach(), gradient, gradient.view(-1) * weight.detach().view(-1)]

    graph = Graph(function, [x])
    assert graph.code.count("pyro_vae.linear") == 2
    assert ("aten.clone" in graph.code) is (inputs < outputs), "transposed, then copied into the usual order"
    graph.compile([x])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results = graph(x)
    called = {event.key for event in profile.key_averages()}
    assert "pyro_vae::linear" not in called, "Python's implementation, of a replay without compiler"
    for ours, theirs in zip(results, function(x), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3 * theirs.abs().max().item())
    assert "pyro_vae.linear" not in Graph(function, [x[:8]]).code
    wide = weight.double().detach()
    assert "pyro_vae.linear" not in Graph(lambda x: [x @ wide.t()], [x.double()]).code


@pytest.mark.parametrize(
    "bias",
    [torch.randn(128, 2)[:, 0], torch.tensor(5.0).expand(128), torch.tensor([2.0])],
    ids=["strided", "expanded", "one number"],
)
def test_large_products_take_any_bias_and_overlapping_rows(bias):
    x, weight = torch.randn(128, 128), torch.randn(255).unfold(0, 128, 1)
    graph = Graph(lambda x: [nn.functional.linear(x, torch.ones(128, 128), bias), x @ weight], [x])
    assert torch.allclose(graph(x)[0], x @ torch.ones(128, 128) + bias, atol=1e-3)
    assert torch.allclose(graph(x)[1], x @ weight, atol=1e-3)


FEW = [(1, 9, 9), (4, 9, 9), (9, 1, 9), (9, 4, 9), (9, 9, 1), (9, 9, 4), (1, 1, 1), (2, 3, 4), (9, 9, 9)]


@pytest.mark.integration
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_few_rows_columns_or_terms_are_right_for_any_view(dtype):
    x, y = torch.randn(20, 20, dtype=dtype), torch.randn(40, 9, dtype=dtype)

    def function(x, y):
        h, tall = x.tanh(), y.exp()  # a compiler does not store these unless it must
        products = [tall[20:] @ tall[3:4].t(), x[:6, 1:3] @ tall[5:7], y[7:9] @ tall[5:9].t(), tall[:3].t() @ y[1:4]]
        products += [h.view(40, 10) @ x.view(10, 40)[:, :2], h.t() @ h[:, 5:7], tall.t().contiguous() @ tall[:, 1:4]]
        products += [tall[6:26].clone() @ tall[3:4].t(), h[5:6, 5:6].clone() @ h[7:8, 7:8].clone()]
        for rows, terms, columns in FEW:
            for a in (h[2 : 2 + rows, 3 : 3 + terms], x[3 : 3 + terms, 2 : 2 + rows].t()):
                for b in (x[1 : 1 + terms, 4 : 4 + columns], h[4 : 4 + columns, 1 : 1 + terms].t()):
                    products.append(a @ b)
        return products

    graph = Graph(function, [x, y])
    assert graph.code.count("aten.mm") == 4 + 5  # nine by nine, and parts with gaps between their rows
    expected = function(x.double(), y.double())
    for _ in range(2):  # uncompiled, then compiled
        for ours, theirs in zip(graph(x, y), expected, strict=True):
            assert ours.dtype == dtype
            assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)
        graph.compile([x, y])


def test_products_of_few_columns_and_many_terms_are_computed_by_onednn():
    x, y = torch.randn(2**10, 2**10), torch.randn(2**10, 1)
    assert "pyro_vae.linear" in Graph(lambda x, y: [x @ y], [x, y]).code


@pytest.mark.integration
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_has_all_digits(dtype):
    x = torch.cat([torch.logspace(-30, 2, 2000), torch.tensor([0.0, math.inf, math.nan])]).to(dtype)
    x = torch.cat([x, -x])
    graph = Graph(lambda x: [x.tanh()], [x])
    graph.compile([x])
    rtol = 5e-7 if dtype == torch.float32 else 1e-14
    assert torch.allclose(graph(x)[0].double(), x.double().tanh(), rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.integration
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_sigmoid_has_all_digits_and_its_gradient(dtype):
    x = torch.cat([torch.logspace(-30, 1.9, 2000), torch.tensor([0.0, 88.0, 100.0, 1000.0, math.inf, math.nan])])
    x = torch.cat([x, -x]).to(dtype)

    def function(x):
        x = x.detach().requires_grad_()
        y = nn.functional.logsigmoid(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        return [y.detach(), gradient]

    graph, exact = Graph(function, [x]), -torch.log1p(torch.exp(-x.double()))
    exact = torch.where(x < -20, x.double() - torch.exp(x.double()), exact)
    for _ in range(2):  # uncompiled, then compiled
        y, gradient = (result.double() for result in graph(x))
        digits = {"rtol": 5e-7 if dtype == torch.float32 else 1e-14, "equal_nan": True}
        assert torch.allclose(y, exact, atol=2e-38 if dtype == torch.float32 else 0, **digits)  # float32 ends there
        assert torch.allclose(gradient, torch.sigmoid(-x.double()), atol=1e-37, **digits)
        graph.compile([x])
