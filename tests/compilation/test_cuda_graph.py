import pytest
import torch
from stand_in_cuda_graphs import cuda_graphs

from pyro_vae._utils.rng import preserve_rng_state
from pyro_vae.compilation.cuda_graph import CudaGraph, CudaGraphError, cuda_graph_of
from pyro_vae.compilation.graph import Graph
from pyro_vae.compilation.replay import Replay

CPU = torch.device("cpu")


@pytest.fixture
def cuda():
    with preserve_rng_state(), cuda_graphs(CPU) as found:
        yield found


def test_a_graph_has_the_results_of_the_function_on_new_inputs_and_values(cuda):
    weight = torch.ones(3)
    graph = CudaGraph(lambda x, w: [(x * w).sum(), x * w], [torch.zeros(2, 3)], [weight], [], CPU)
    for number in (1.0, 2.0):
        x = torch.randn(2, 3)
        weight.fill_(number)
        total, product = graph(x)
        assert torch.equal(product, x * number)
        assert torch.equal(total, (x * number).sum())
    assert len(cuda.graphs) == 1


def test_the_first_result_is_a_copy_that_later_calls_leave(cuda):
    graph = CudaGraph(lambda x: [x + 1, x + 2], [torch.zeros(2)], [], [], CPU)
    first, second = graph(torch.zeros(2))
    graph(torch.ones(2))
    assert first.tolist() == [1, 1]
    assert second.tolist() == [3, 3]


def test_changes_in_place_go_on_from_call_to_call_and_none_is_made_before_the_first(cuda):
    total = torch.zeros(())
    graph = CudaGraph(lambda x, t: [t.add_(x.sum()).clone()], [torch.ones(3)], [total], [total], CPU)
    assert total == 0
    assert [graph(torch.ones(3))[0].item(), graph(torch.full((3,), 2.0))[0].item(), total.item()] == [3, 9, 9]


def test_random_numbers_are_those_of_the_function_and_differ_between_calls(cuda):
    def draw(x):
        return [x + torch.randn(3), torch.rand(3)]

    torch.manual_seed(0)
    expected = [draw(torch.zeros(3)), draw(torch.ones(3)), [torch.rand(3)]]
    torch.manual_seed(0)
    graph = CudaGraph(draw, [torch.zeros(3)], [], [], CPU)
    for x, (first, second) in zip((torch.zeros(3), torch.ones(3)), expected[:2], strict=True):
        found = graph(x)
        assert torch.equal(found[0], first)
        assert torch.equal(found[1], second)
    assert torch.equal(torch.rand(3), expected[2][0])


def test_a_function_that_reads_a_value_is_refused_and_random_numbers_can_be_drawn_after_it(cuda):
    stream, before = cuda.stream, torch.get_rng_state()
    total = torch.zeros(())
    with pytest.raises(CudaGraphError, match=r"^where CUDA refuses it: CUDA error: operation not permitted when str"):
        CudaGraph(lambda x, t: [x * t.add_(1).item()], [torch.ones(3)], [total], [total], CPU)
    assert cuda.stream is stream
    assert not cuda.waits
    assert total == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_function_with_other_results_in_each_call_is_refused(cuda):
    count = iter(range(100))
    with pytest.raises(CudaGraphError, match="where it has other results than the operations one by one"):
        CudaGraph(lambda x: [x + next(count)], [torch.ones(3)], [], [], CPU)
    total = torch.zeros(())
    with pytest.raises(CudaGraphError, match="where it has other results"):
        CudaGraph(lambda x, t: [x, t.add_(next(count)) * 0], [torch.ones(3)], [total], [total], CPU)
    assert total == 0


def test_tensors_on_other_devices_are_refused(cuda):
    x, elsewhere = torch.ones(3), torch.ones(3, device="meta")
    with pytest.raises(CudaGraphError, match="where it has tensors on cpu and meta"):
        CudaGraph(lambda x, w: [x], [x], [elsewhere], [], CPU)


def test_graphs_of_operations_start_their_kernels_together(cuda):
    weight, total = torch.randn(3), torch.zeros(())

    def step(x):
        loss = (x * weight + torch.randn(3)).square().sum()
        return [total.add_(loss) + 0, loss]

    torch.manual_seed(0)
    expected = [[one.clone() for one in step(torch.full((3,), float(number)))] for number in range(4)]
    for kind in (lambda graph: graph, Replay):
        total.zero_()
        graph = kind(Graph(step, [torch.zeros(3)]))
        assert graph.start_together([torch.zeros(3)]) == ""
        torch.manual_seed(0)
        for number, one in enumerate(expected):
            assert all(map(torch.equal, graph(torch.full((3,), float(number))), one))
    assert len(cuda.graphs) == 2


def test_without_a_gpu_nothing_is_done():
    graph = Graph(lambda x: [x + 1], [torch.zeros(3)])
    assert cuda_graph_of(graph._plain, [torch.zeros(3)], graph.constants, graph.written, graph.nodes) == (None, "")
    assert graph.start_together([torch.zeros(3)]) == ""
    assert graph(torch.zeros(3))[0].tolist() == [1, 1, 1]


def test_random_numbers_of_another_device_are_refused():
    meta = torch.device("meta")
    graph = Graph(lambda x: [x + torch.rand(3, device=CPU).sum()], [torch.zeros(3)])
    with cuda_graphs(meta) as cuda:
        reason = graph.start_together([torch.zeros(3, device=meta)])
    assert reason == "where it draws random numbers elsewhere than on meta"
    assert not cuda.graphs
