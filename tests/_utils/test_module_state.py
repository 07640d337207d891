"""Modules are found behind any wrapper of a function, and their buffers can be restored."""

import threading
from functools import partial, wraps

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import gaussian
from pyro.infer import config_enumerate
from torch import nn

import pyro_vae as pv
from pyro_vae._utils.module_state import ModuleSnapshot, ModuleTensors, buffers_kept, evaluation_mode
from pyro_vae.handlers import WeightKL

NORM = nn.BatchNorm1d(2)
X = torch.randn(5, 2)


def decorated(function):
    @wraps(function)
    def inner(*args):
        return function(*args)

    return inner


class Holder:
    """An object that is no module but has one."""

    def __init__(self):
        self.norms = {"a": [nn.BatchNorm1d(2)]}

    def __call__(self, x):
        return self.norms["a"][0](x)


def from_globals(x):
    return NORM(x)


def with_argument(norm, x):
    return norm(x)


def closure(norm):
    return lambda x: norm(x)


FUNCTIONS = {
    "a module": nn.BatchNorm1d(2),
    "a closure": closure(nn.BatchNorm1d(2)),
    "a global": from_globals,
    "a partial": partial(with_argument, nn.BatchNorm1d(2)),
    "decorated": decorated(closure(nn.BatchNorm1d(2))),
    "an object": Holder(),
    "a handler": WeightKL(0.5)(closure(nn.BatchNorm1d(2))),
    "called by forward": nn.Sequential(nn.BatchNorm1d(2)).forward,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_modules_are_found_as_they_run(name):
    tensors = ModuleTensors()
    with tensors.noticed():
        FUNCTIONS[name](X)
    found = tensors.named()
    assert len(found) == 5
    counts = [tensor for path, tensor in found.items() if path.endswith("num_batches_tracked")]
    assert counts[0] > 0
    before = counts[0].item()
    tensors.load_model_state()
    assert counts[0].item() == before - 1


@pytest.mark.parametrize(
    "wrap",
    [lambda f: f, decorated, partial, config_enumerate, WeightKL(0.5), lambda f: WeightKL(0.5)(config_enumerate(f))],
)
def test_the_vae_of_a_bound_method_is_found_behind_wrappers(wrap):
    vae = gaussian()
    assert ModuleTensors(wrap(vae.model), wrap(vae.guide)).named().keys() == vae.state_dict().keys()


def test_modules_of_another_thread_are_not_found():
    tensors = ModuleTensors()
    with tensors.noticed():
        thread = threading.Thread(target=lambda: NORM(X))
        thread.start()
        thread.join()
    assert tensors.named() == {}


def test_a_replaced_buffer_is_restored_as_the_same_tensor():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return x - self.mean

    average = Average()
    mean = average.mean
    with buffers_kept():
        average(X)
    assert average.mean is mean
    assert torch.equal(mean, torch.zeros(2))


def test_buffers_are_restored_after_an_error():
    norm = nn.BatchNorm1d(2)
    with pytest.raises(RuntimeError), buffers_kept():
        nn.Sequential(norm, nn.Linear(3, 1))(X)
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("compile", [False, True])
def test_batch_norm_of_a_plain_function_counts_each_step_once(compile, monkeypatch):
    monkeypatch.setattr("pyro_vae.compilation.graph.Graph.compile", lambda *_: None)
    network = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))

    def model(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(network(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.subsample(x, event_dim=1)[:, :1], 1.0).to_event(1))

    fitted = pv.fit(model, guide, torch.randn(50, 2), epochs=4, batch_size=20, compile=compile)
    assert network[1].num_batches_tracked == fitted.steps == 12


def test_every_module_that_runs_is_in_evaluation_mode_until_the_block_ends_or_fails():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    other = nn.Dropout(0.5)
    network[1].eval()

    def fail():
        assert not other.training
        network(X)
        assert not any(module.training for module in network.modules())
        raise KeyError

    with pytest.raises(KeyError), evaluation_mode(other.forward):
        fail()
    assert [module.training for module in network.modules()] == [True, True, False, True]
    assert other.training
    assert network[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: linear.eval(),
        lambda linear: linear.weight.requires_grad_(False),
        lambda linear: setattr(linear.weight, "data", torch.zeros(2, 2)),
        lambda linear: setattr(linear, "bias", nn.Parameter(torch.zeros(2))),
        lambda linear: setattr(linear, "bias", None),
        lambda linear: linear.register_buffer("first", torch.zeros(2)),  # where there was none
        lambda linear: linear.add_module("child", nn.Linear(2, 2)),
        lambda linear: linear._parameters.clear(),
        lambda linear: pyro.get_param_store().__setitem__("own", torch.zeros(3)),
        lambda linear: pyro.clear_param_store(),
    ],
)
def test_a_snapshot_hears_each_change_of_modules_and_of_the_store(change):
    linear = nn.Linear(2, 2)
    pyro.param("own", torch.ones(3))
    snapshot = ModuleSnapshot([linear], ["own"])
    assert not snapshot.has_changed()
    with torch.no_grad():
        linear.weight.fill_(3.0)  # a value, which a graph reads
    assert not snapshot.has_changed()
    change(linear)
    assert snapshot.has_changed()


def test_a_block_inside_of_another_leaves_the_mode_to_the_outer_one():
    """The inner one names the network before the outer one has seen it run."""
    network, modes = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), []
    network[1].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    with evaluation_mode():
        with evaluation_mode(network):
            network(torch.ones(1, 2))
        network(torch.ones(1, 2))
        with evaluation_mode(network):
            pass
        network(torch.ones(1, 2))
    assert modes == [False] * 3
    assert all(module.training for module in network.modules())


class Counts(torch.nn.Module):
    """A module whose method, and not its forward, is a model that writes to its buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("average", torch.zeros(()))

    def model(self):
        self.steps += 1
        self.average = self.average + 1


def test_buffers_of_the_module_that_a_function_is_bound_to_are_restored():
    counts = Counts()
    average = counts.average
    for context in (buffers_kept(counts.model), evaluation_mode(counts.model)):
        with context:
            counts.model()
        assert (counts.steps, counts.average) == (0, 0)
        assert counts.average is average
