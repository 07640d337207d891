"""What the stand-ins cannot show: kernels, streams and random states of CUDA. Without a GPU, nothing of it runs.

``make cuda`` runs these tests and the benchmark of tests/cuda_benchmark.py.
"""

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, handlers, likelihoods, networks, priors, schedules
from pyro_vae._utils.rng import seeded, torch_random_states
from pyro_vae.compilation.cuda_graph import CudaGraph, CudaGraphError
from pyro_vae.compilation.graph import Graph
from pyro_vae.compilation.replay import Replay

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

STEPS = 100
GPU = torch.device("cuda", 0)
MLP = networks.mlp([32])


def image_network(in_features, out_features):
    layers = nn.Linear(in_features, 32), nn.BatchNorm1d(32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, out_features)
    return nn.Sequential(*layers)


def trained(network=MLP, weight=None, **options):
    pyro.clear_param_store()
    torch.manual_seed(0)
    encoder, decoder = guides.DiagonalNormal(16, 2, network), likelihoods.Bernoulli(2, 16, network)
    vae = pv.VAE(priors.StandardNormal(2), encoder, decoder).to(GPU)
    x = (torch.rand(256, 16, generator=torch.Generator("cpu").manual_seed(1)) < 0.5).float().to(GPU)
    beta = handlers.WeightKL(torch.ones(()) if weight is None else weight)
    fitted = pv.fit(beta(vae.model), beta(vae.guide), x, progress=False, **{"epochs": STEPS, "lr": 1e-2} | options)
    return fitted, [tensor.detach().clone() for tensor in vae.state_dict().values()]


def check_same(one, other, digits):
    for name, values in one[0].history.items():
        assert other[0].history[name] == pytest.approx(values, rel=digits, abs=digits)
    for mine, theirs in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=digits, atol=digits)


@pytest.mark.parametrize("network", [MLP, image_network], ids=["mlp", "batch norm and dropout"])
@pytest.mark.parametrize("options", [{}, {"batch_size": 100, "epochs": 40, "clip_norm": 1.0}], ids=["whole", "batches"])
def test_replays_as_cuda_graphs_have_the_numbers_of_eager_steps(network, options):
    eager, chosen = (trained(network, compile=compile, **options) for compile in (False, None))
    assert chosen[0].engine.startswith("replayed as CUDA graphs"), chosen[0].engine
    check_same(eager, chosen, 1e-4)


def test_compiled_steps_are_cuda_graphs_and_agree_with_eager_ones():
    eager, compiled = (trained(compile=compile) for compile in (False, True))
    assert compiled[0].engine == "compiled as CUDA graphs", compiled[0].engine
    check_same(eager, compiled, 1e-2)


def test_a_weight_on_the_cpu_is_read_by_each_replay():
    found = []
    for compile in (False, None):
        weight = torch.ones(())
        found.append(trained(weight=weight, schedules={weight: schedules.linear(0.0, 1.0, STEPS)}, compile=compile))
    assert found[1][0].engine.startswith("replayed as CUDA graphs"), found[1][0].engine
    check_same(*found, 1e-4)


@pytest.mark.parametrize("kind", [lambda graph: graph, Replay], ids=["graph", "replay"])
def test_random_numbers_of_graphs_are_those_of_eager_operations_and_differ_between_calls(kind):
    def draw(x):
        return [x + torch.randn(1000, device=GPU), nn.functional.dropout(x + 1, 0.5), torch.rand(7, device=GPU)]

    x = torch.zeros(1000, device=GPU)
    with seeded(3):
        expected = [[one.clone() for one in draw(x)] for _ in range(3)]
        after = torch.rand(3, device=GPU)
    graph = kind(Graph(draw, [x]))
    assert graph.start_together([x]) == ""
    with seeded(3):
        for numbers in expected:
            assert all(map(torch.equal, graph(x), numbers))
        assert torch.equal(torch.rand(3, device=GPU), after)
    assert not torch.equal(expected[0][0], expected[1][0])


def test_random_states_are_those_of_every_device():
    before = torch_random_states()
    assert list(before) == ["torch", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    with seeded(1):
        [torch.rand(3, device=device) for device in devices]
    after = torch_random_states()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_where_a_value_is_read_the_graph_is_refused_and_cuda_goes_on():
    x, total, stream = torch.ones(3, device=GPU), torch.zeros((), device=GPU), torch.cuda.current_stream()
    with pytest.raises(CudaGraphError, match="where CUDA refuses it"):
        CudaGraph(lambda x, t: [x * t.add_(1).item() + torch.rand(3, device=GPU)], [x], [total], [total], GPU)
    assert torch.cuda.current_stream() == stream
    assert total.item() == 0
    assert torch.rand(3, device=GPU).isfinite().all()
    found = CudaGraph(lambda x: [x + torch.rand(3, device=GPU)], [x], [], [], GPU)
    assert not torch.equal(found(x)[0], found(x)[0])


def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(tmp_path):
    whole = trained(epochs=60, checkpoints=tmp_path / "whole")
    for epochs in (30, 60):
        parts = trained(epochs=epochs, checkpoints=tmp_path / "parts")
    assert whole[0].history == parts[0].history
    assert all(map(torch.equal, whole[1], parts[1]))


def test_readme_on_the_default_device():
    torch.set_default_device(GPU)
    try:
        x = pv.datasets.two_gaussians(500, seed=0).x
        net = networks.mlp([16])
        vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
        pv.fit(vae.model, vae.guide, x, epochs=20, elbo=Trace_ELBO())
        assert pv.exact.log_evidence(vae.model, x).device == x.device == GPU
    finally:
        torch.set_default_device(None)
