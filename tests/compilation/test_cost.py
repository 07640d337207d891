"""What a graph is expected to cost: by its operations and shapes alone."""

import torch
from torch.nn.functional import conv2d

from pyro_vae.compilation import cost
from pyro_vae.compilation.graph import Graph


def test_the_products_of_a_graph_are_counted():
    x, weight = torch.randn(7, 5), torch.randn(3, 5, requires_grad=True)

    def gradient(x):
        (found,) = torch.autograd.grad((x @ weight.t()).sum(), weight)
        return [found]

    *_, products, _ = cost._counts(Graph(gradient, [x]))
    assert products == 2 * 7 * 5 * 3  # forward, and backward for the weight


def test_convolutions_count_their_window():
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True)

    def gradient(x):
        (found,) = torch.autograd.grad(conv2d(x, weight).sum(), weight)
        return [found]

    *_, products, _ = cost._counts(Graph(gradient, [x]))
    assert products == 3 * (2 * 4 * 6 * 6) * (3 * 3 * 3)


def test_a_compilation_pays_for_many_calls_alone():
    graph = Graph(lambda x: [(x * 2 + 1).exp().sin().sum()], [torch.ones(10_000)])
    assert not cost.compilation_pays(graph, 10)
    assert cost.compilation_pays(graph, 10**6)


def test_the_costs_do_not_depend_on_the_run():
    graphs = [Graph(lambda x: [(x @ x).exp()], [torch.randn(50, 50)]) for _ in range(2)]
    assert cost.replay_seconds(graphs[0]) == cost.replay_seconds(graphs[1])
