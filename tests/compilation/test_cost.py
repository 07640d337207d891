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


def test_many_calls_are_captured_and_few_are_not():
    for calls, expected in ((5, 20), (100, 3)):  # the first run, the capture and a comparison
        runs = []
        function = cost.automatic(lambda x, runs=runs: runs.append(1) or [2 * x], calls)
        for _ in range(20):
            assert torch.equal(function(torch.ones(3))[0], torch.full((3,), 2.0))
        assert len(runs) == expected


def test_what_cannot_be_captured_or_differs_runs_as_it_is():
    branch = cost.automatic(lambda x: [x if x.sum() > 0 else -x], 100)
    assert [float(branch(torch.tensor([sign]))[0]) for sign in (1.0, -1.0, 2.0, -3.0)] == [1.0, 1.0, 2.0, 3.0]
    runs = []
    counted = cost.automatic(lambda x: runs.append(1) or [len(runs) * x], 100)
    # The second call captures, compares, finds another result, and runs the function once more.
    assert [float(counted(torch.ones(1))[0]) for _ in range(4)] == [1.0, 4.0, 5.0, 6.0]


def test_values_that_change_often_end_the_captures():
    runs = []
    function = cost.automatic(lambda x, n: runs.append(1) or [x[: int(n)].sum()[None]], 100)
    x = torch.arange(40.0)
    for n in range(1, 40):
        assert function(x, torch.tensor(n))[0] == x[:n].sum()
    assert len(runs) == 1 + 2 * 8 + 30  # eight captures, each with a comparison, and then the function alone
