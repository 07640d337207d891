"""Graphs are compiled in another process, which leaves nothing, and this process goes on with the same numbers."""

import operator
import os
import subprocess
import sys
import time

import pytest
import torch

from pyro_vae.compilation import background
from pyro_vae.compilation.background import BackgroundProcess, Piece, from_text, to_text
from pyro_vae.compilation.graph import Graph

X = torch.linspace(-1.0, 1.0, 6)


def captured(function, *inputs):
    graph = Graph(function, inputs)
    return graph.module, [*inputs, *graph.constants]


def a_graph():
    graph = Graph(lambda x: [(x * 3).exp().sum() + torch.randn(6)], [X])
    return graph, graph.compile_in_background([X])


def test_a_graph_that_is_sent_is_the_same_graph():
    weight = torch.randn(6, 6, dtype=torch.float64)

    def function(x):
        first, second = x.double().split(3)
        noise = torch.randn(6, dtype=torch.float64)
        filled = torch.full((3,), float("inf")).where(torch.tensor([True, False, True]), torch.tensor(0.5))
        product = (weight @ (x.double() + noise)).clamp(min=-1e-3)
        return [torch.stack([first, second]).sum(0, keepdim=True), product, filled.to(torch.float16)]

    module, examples = captured(function, X)
    sent, shapes = from_text(to_text(module, examples))
    assert sent.code == module.code
    assert operator.getitem in [node.target for node in sent.graph.nodes]
    for one, other in zip(shapes, examples, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
    torch.manual_seed(1)
    expected = module(*examples)
    torch.manual_seed(1)
    for one, other in zip(sent(*examples), expected, strict=True):
        assert torch.equal(one, other)


def test_examples_that_share_memory_share_it_in_the_other_process():
    whole = torch.zeros(4, 3)
    _, (first, second, third) = from_text(to_text(captured(lambda x: [x], X)[0], [whole[1:].t(), whole[0], X]))
    assert (first.shape, first.stride(), first.storage_offset()) == ((3, 3), (1, 3), 3)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert second.untyped_storage().nbytes() == whole.nbytes
    assert third.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()


def test_what_cannot_be_sent_is_left_to_this_process(monkeypatch):
    started = []
    monkeypatch.setattr(background.subprocess, "Popen", lambda *args, **kwargs: started.append(args))
    graph = torch.fx.Graph()
    graph.output([graph.call_function(torch.ops.aten.mul.Tensor, (graph.placeholder("x"), 2j))])
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    with pytest.raises(TypeError, match=r"a graph with 2j is not sent"):
        to_text(module, [X])
    on_meta = Piece(captured(lambda x: [2 * x], X)[0], [X.to("meta")])
    assert BackgroundProcess([Piece(module, [X]), on_meta]).is_done()
    assert not started


def test_without_a_cache_nothing_is_started():
    with torch.compiler.config.patch(force_disable_caches=True):
        assert a_graph()[1].done()


@pytest.mark.parametrize("executable", ["/opt/some-application", "", "/no/such/python3"])
def test_without_an_interpreter_nothing_is_started(monkeypatch, executable):
    monkeypatch.setattr(sys, "executable", executable)
    graph, compilation = a_graph()
    assert compilation.done()
    compilation.cancel()
    assert graph(X)[0].shape == (6,)


def alive(pid):
    """Whether a process runs, and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_a_cancelled_compilation_leaves_no_process_and_the_graph_as_it_is():
    graph, compilation = a_graph()
    pid = compilation._process._process.pid
    assert not compilation.done()
    compilation.cancel()
    assert not os.path.exists(f"/proc/{pid}")  # not even a zombie
    assert compilation.done()
    compilation.wait()
    assert graph(X)[0].shape == (6,)


def test_a_compilation_that_nothing_refers_to_ends():
    _, compilation = a_graph()
    pid = compilation._process._process.pid
    del compilation
    assert not os.path.exists(f"/proc/{pid}")


def test_the_process_ends_with_its_parent():
    code = """
import os, torch
from pyro_vae.compilation.graph import Graph
graph = Graph(lambda x: [x.sin()], [torch.ones(3)])
compilation = graph.compile_in_background([torch.ones(3)])
print(compilation._process._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    assert wait_until(lambda: not alive(int(printed)))


@pytest.mark.integration
def test_a_graph_is_compiled_by_another_process_and_loaded_from_the_cache(tmp_path):
    """In a script without a guard of its main part, whose folder has modules of the standard library's names."""
    (tmp_path / "json.py").write_text("raise RuntimeError('not this one')")
    script = tmp_path / "script.py"
    script.write_text("""
import sys, time
sys.path.pop(0)
import torch
from pyro_vae.compilation.graph import Graph
from pyro_vae.compilation.kernels import decompositions
print("started")
x, weight, total = torch.randn(128, 100), torch.randn(90, 100), torch.zeros(())
def step(x):
    total.add_(1.0)
    return [(x @ weight.t()).tanh() + torch.randn(128, 90), total + x.sum()]
graph = Graph(step, [x])
torch.manual_seed(1)
plain = graph(x)
total.zero_()
compilation = graph.compile_in_background([x])
assert not compilation.done()
while not compilation.done():
    time.sleep(0.1)
assert "torch._inductor.compile_fx" not in sys.modules
compilation.wait()
from torch._dynamo.utils import counters
assert counters["inductor"]["fxgraph_cache_hit"] == 1, counters
torch.manual_seed(1)
for one, other in zip(graph(x), plain, strict=True):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
assert graph._run is not None and total == 1
""")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "started\n"


@pytest.mark.integration
def test_a_cancelled_compiler_leaves_no_half_written_file(tmp_path):
    code = """
import sys, time, torch
from pathlib import Path
from pyro_vae.compilation.graph import Graph
folder, x = Path(sys.argv[1]), torch.ones(64)
graph = Graph(lambda x: [(x * 3).exp().sum() + 1], [x])
compilation = graph.compile_in_background([x])
while not list(folder.rglob("*.main.cpp")):
    time.sleep(0.01)
time.sleep(0.3)
compilation.cancel()
"""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kinds = {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert ".cpp" in kinds
    assert kinds <= {".cpp", ".lock", ".py"}  # sources, written whole, and no library
    assert not list((tmp_path / "tmp").glob("cc*"))


@pytest.mark.integration
def test_without_a_folder_for_the_cache_this_process_compiles(tmp_path):
    """A file has the place of the folder: an administrator may write anywhere."""
    (tmp_path / "file").touch()
    code = """
import os, sys, torch
import torch._dynamo  # which makes a folder when it is imported
os.environ["TORCHINDUCTOR_CACHE_DIR"] = sys.argv[1]
from pyro_vae.compilation.graph import Graph
x = torch.ones(64)
graph = Graph(lambda x: [(x * 3).exp().sum() + 1], [x])
compilation = graph.compile_in_background([x])
compilation.wait()
assert graph._run is not None
print(graph(torch.zeros(64))[0].item())
"""
    command = [sys.executable, "-c", code, str(tmp_path / "file" / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "65.0"
