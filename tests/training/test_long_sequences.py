"""A deep Markov model in captured steps: the losses are those of Pyro, and nothing is compiled for each length."""

import pyro
import pytest
import torch
from programs.deep_markov import DMM
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_vae as pv
from pyro_vae.compilation import torch_private
from pyro_vae.compilation.rolling import Loop, Program


def batch(steps, notes, rows=4):
    torch.manual_seed(steps)
    lengths = torch.randint(1, steps + 1, (rows,))
    lengths[0] = steps
    played = torch.rand(rows, steps, notes) < 0.2
    return (played & (torch.arange(steps) < lengths[:, None])[..., None]).float(), lengths


def losses(make_svi, batches, **sizes):
    pyro.clear_param_store()
    torch.manual_seed(0)
    dmm = DMM(**sizes)
    with torch.no_grad():
        dmm.combiner.weight.mul_(0.1)  # else the states of long sequences grow without bound
    svi = make_svi(dmm.model, dmm.guide, Adam({"lr": 0.01}), Trace_ELBO())
    return [svi.step(*each) for each in batches], svi


def captured(*args):
    return pv.SVI(*args, compile=True)


def programs(svi):
    """The programs of the captured steps, for each length."""
    return [graphs.step._run for found in svi._step._graphs.values() for graphs in found]


@pytest.fixture
def rolled(monkeypatch):
    """Search short graphs for repetitions, too, and replay their parts without compiling them; count these."""
    compiled = []
    monkeypatch.setattr("pyro_vae.compilation.graph._LONG", 500)
    monkeypatch.setattr(torch_private, "compile_graph", lambda module, _: compiled.append(module) or module)
    return compiled


def test_captured_steps_of_a_deep_markov_model_are_those_of_pyro(rolled):
    batches = [batch(10, 3)] * 5
    found, svi = losses(captured, batches, notes=3)
    assert found == pytest.approx(losses(SVI, batches, notes=3)[0], rel=1e-5)
    (program,) = programs(svi)
    assert isinstance(program, Program)
    assert (
        sum(isinstance(step, Loop) for step in program.steps) >= 3
    )  # of the network and the guide, forward and backward


def test_another_length_is_captured_where_that_pays_and_compiles_nothing(rolled):
    first, second = batch(20, 3), batch(17, 3)
    found, svi = losses(captured, [first] * 3 + [second] * 2, notes=3)
    assert len(programs(svi)) == 1  # until eager steps have taken as long as a capture
    count = len(rolled)
    svi._step._long_capture = 0.0
    found += [svi.step(*second) for _ in range(2)]
    assert len(programs(svi)) == 2
    assert len(rolled) == count
    assert found == pytest.approx(losses(SVI, [first] * 3 + [second] * 4, notes=3)[0], rel=1e-5)


@pytest.mark.slow
def test_compiled_steps_of_129_steps_of_88_notes_are_those_of_pyro():
    batches = [batch(129, 88, rows=8)] * 6
    sizes = {"notes": 88, "z_dim": 16, "hidden": 32}
    found, svi = losses(captured, batches, **sizes)
    assert found == pytest.approx(losses(SVI, batches, **sizes)[0], rel=1e-4)
    assert isinstance(programs(svi)[0], Program)
