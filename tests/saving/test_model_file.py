"""A saved model is the same model elsewhere, to the bit: densities, shared and frozen parameters, modes, buffers."""

import copy
import functools
import io
import os
import pickle
import sys
import types
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pair_cases
import pyro
import pytest
import torch
from pair_cases import PAIRS, marked, vae_of
from pairs import gaussian, gumbel, relaxed
from part_cases import ALL, HAS_ZUKO, Case
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, networks, priors
from pyro_vae.parts import base
from pyro_vae.saving import model_file, tensor_file
from pyro_vae.saving.files import FileFormatError

NET = networks.mlp([4])


def perturb(module):
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))


def figures(vae, x):
    """Return draws and log-densities, which two processes compare to the bit."""
    torch.manual_seed(0)
    q, p = vae.encode(x), vae.prior()
    z = q.sample()
    numbers = (z, q.log_prob(z), p.log_prob(z), vae.decode(z).log_prob(x), p.sample((3,)))
    return [number.double().flatten().tolist() for number in numbers]


def figures_of_files(folder):
    """Return the figures of all models in a folder. This runs in a new process."""
    torch.set_num_threads(1)
    return {path.name: figures(pv.VAE.load(path), torch.load(f"{path}.x")) for path in folder.glob("*.pt")}


def through_a_file(vae, path, **arguments):
    vae.save(path)
    return pv.VAE.load(path, **arguments)


def assert_same_state(one, other):
    """The same tensors, modes, frozen parameters and settings."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert (flags(one), repr(one)) == (flags(other), repr(other))


def flags(module):
    training = {name: child.training for name, child in module.named_modules()}
    return training, {name: parameter.requires_grad for name, parameter in module.named_parameters()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


@pytest.fixture
def vamp():
    """A VAE whose prior and encoder share a network with buffers."""
    encoder = guides.DiagonalNormal(3, 2, networks.standardized(NET, torch.zeros(3)))
    return gaussian(prior=priors.VampPrior(encoder, torch.randn(4, 3)), encoder=encoder)


@pytest.mark.parametrize("build", ALL)
def test_every_part_comes_back_with_the_same_density(build, path):
    case = Case(build)  # in float64
    model_file.save(path, case.part)
    part = model_file.load(path, base.Part, None, ())
    assert_same_state(case.part, part)
    assert type(part) is type(case.part)
    contexts = case.contexts(5)
    torch.manual_seed(1)
    value = case.part(*contexts).sample()
    assert torch.equal(part(*contexts).log_prob(value), case.part(*contexts).log_prob(value))
    torch.manual_seed(1)
    assert torch.equal(part(*contexts).sample(), value)
    assert torch.equal(part.read(value), case.part.read(value))


class AttentionOfSlots(nn.Module):
    """Two slots that read each feature as an input, one of whose values are the raw outputs."""

    def __init__(self, outputs):
        super().__init__()
        self.slots = networks.SlotAttention(2, outputs, iterations=np.int64(2))

    def forward(self, inputs):
        slots, _ = self.slots(inputs[..., None].expand(*inputs.shape, self.slots.start.shape[1]))
        return slots[..., 0, :]


NETWORKS = {
    "linear": networks.linear(),
    "linear without bias": networks.linear(bias=False),
    "mlp": networks.mlp([4, 5], activation=nn.SiLU),
    "mlp of numpy": networks.mlp((np.int64(4),), functools.partial(nn.LeakyReLU, negative_slope=0.3)),
    "starting_at": networks.starting_at(NET, torch.tensor([0.5, -0.5] * 4)),
    "standardized": networks.standardized(NET, loc=torch.arange(4.0), scale=np.full(4, 2.0)),
    "with_missing": networks.standardized(networks.with_missing(NET), 0.5),
    "one_hot": networks.one_hot(np.int64(3), NET),
    "convolutional": networks.convolutional(tuple(np.array([1, 2, 2])), channels=[np.int64(3)]),
    "reshaped": networks.reshaped(lambda i, o: nn.Sequential(nn.Conv2d(1, o, 2), nn.Flatten()), [1, np.int64(2), 2]),
    "deconvolutional": networks.deconvolutional(
        (1, np.int64(2), 2), channels=tuple(np.array([3, 2])), activation=nn.ELU
    ),
    "spatial_broadcast": networks.spatial_broadcast((1, np.int64(2), 2), hidden=[np.int64(3)], activation=nn.Tanh),
    "SlotAttention": lambda features, outputs: AttentionOfSlots(outputs),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_every_network_comes_back(network, path):
    part, x = guides.DiagonalNormal(4, 4, network), torch.rand(5, 4)
    model_file.save(path, part)
    again = model_file.load(path, base.Part, None, (AttentionOfSlots,))
    assert_same_state(part, again)
    assert torch.equal(again(x).mean, part(x).mean)


def test_every_network_is_in_the_list_above():
    assert set(networks.__all__) - {"NetworkFactory", "build"} <= set(NETWORKS)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """All pairs of priors and guides, saved here, and the numbers that a new process computes from the files."""
    folder, here = tmp_path_factory.mktemp("models"), {}
    for index, (prior, guide) in enumerate(PAIRS):
        if "Flow" in prior + guide and not HAS_ZUKO:
            continue
        vae, x = vae_of(prior, guide, list(pair_cases.LIKELIHOODS)[index % len(pair_cases.LIKELIHOODS)])
        perturb(vae)
        name = f"{prior}-{guide}.pt"
        vae.save(folder / name)
        here[name] = figures(vae, x)
        torch.save(x, folder / f"{name}.x")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return here, process.submit(figures_of_files, folder).result()


@pytest.mark.parametrize(("prior", "guide"), [marked(*pair) for pair in PAIRS])
def test_a_new_process_has_the_same_numbers_to_the_bit(elsewhere, prior, guide):
    here, there = elsewhere
    assert there[f"{prior}-{guide}.pt"] == here[f"{prior}-{guide}.pt"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_dtype_is_that_of_the_model_saved_whatever_the_default(path, dtype):
    vae = gaussian(prior=priors.MixtureOfNormals(2, 3)).to(dtype)
    perturb(vae)
    vae.save(path)
    torch.set_default_dtype(torch.float64)
    try:
        again = pv.VAE.load(path)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_state(vae, again)
    assert {tensor.dtype for tensor in again.state_dict().values()} == {dtype}


def test_a_guide_refined_from_the_encoder_of_the_prior_shares_its_family_again(path):
    first = guides.DiagonalNormal(3, 2, NET)
    refined = guides.PerDatum.refining(first, torch.randn(5, 3))
    vae = gaussian(prior=priors.VampPrior(first, torch.randn(4, 3)), encoder=refined)
    again = through_a_file(vae, path)
    assert again.encoder.family is again.prior.encoder.family
    assert_same_state(vae, again)


def test_a_discrete_twin_comes_back(path):
    twin = relaxed().discrete()
    again = through_a_file(twin, path)
    assert_same_state(twin, again)
    assert again.prior().has_enumerate_support
    x = torch.randn(5, 3)
    assert torch.equal(pv.exact.elbo(again.model, again.guide, x), pv.exact.elbo(twin.model, twin.guide, x))


def test_temperature_modes_and_frozen_parameters_come_back(path):
    vae = gumbel(straight_through=True)
    vae.decoder.requires_grad_(False)
    vae.encoder.family.temperature.fill_(0.123)
    vae.encoder.eval()
    again = through_a_file(vae, path)
    assert_same_state(vae, again)
    assert again.encoder.family.temperature.item() == pytest.approx(0.123)
    assert again.prior.straight_through
    assert not through_a_file(vae.eval(), path).training


def test_every_loaded_model_has_a_name_of_its_own(path):
    vae = gaussian(name="mine")
    vae.save(path)
    one, two = pv.VAE.load(path), pv.VAE.load(path)
    assert len({vae.name, one.name, two.name}) == 3
    x = torch.randn(6, 3)
    for epochs, model in enumerate((vae, one, two)):
        pv.fit(model.model, model.guide, x, epochs=epochs + 1)  # in one param store
    weights = [model.encoder.network[0].weight for model in (vae, one, two)]
    assert not any(map(torch.equal, weights[:2], weights[1:]))  # each has its own parameters


def in_memory(vae):
    torch.save(vae, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae)), in_memory])
def test_trained_models_and_their_copies_are_saved(vamp, path, copied):
    """Pyro adds weak references to parameters, which pickle refuses."""
    pv.fit(vamp.model, vamp.guide, torch.randn(6, 3), epochs=1)
    twin = copied(vamp)
    perturb(twin)
    again = through_a_file(twin, path)
    assert_same_state(twin, again)
    assert again.prior.encoder is again.encoder
    for vae in (vamp, again):
        pv.fit(vae.model, vae.guide, torch.randn(6, 3), epochs=1)
        assert_same_state(vae, through_a_file(vae, path))


def test_torch_reads_the_file(vamp, path):
    vamp.save(path)
    for mmap in (False, True):
        assert_same_state(vamp, torch.load(path, weights_only=False, mmap=mmap))


def test_the_process_stays_as_it_was(path, random_states):
    vae = gaussian(prior=priors.MixtureOfNormals(2, 3))
    vae.register()
    store = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    with torch.serialization.safe_globals([nn.Linear, (nn.Linear, "torch.nn.modules.linear.Linear")]):
        before = random_states(), set(torch.serialization.get_safe_globals())
        again = through_a_file(vae, path)
        assert (random_states(), set(torch.serialization.get_safe_globals())) == before
    assert store.keys() == set(pyro.get_param_store().keys())
    assert again.training


@pytest.mark.parametrize("map_location", ["cpu", torch.device("cpu"), {"cpu": "cpu"}, lambda storage, _: storage])
def test_a_device_is_chosen_as_in_torch(path, map_location):
    vae = gaussian()
    assert_same_state(vae, through_a_file(vae, path, map_location=map_location))


def test_a_device_that_is_not_there_is_no_fault_of_the_file(path):
    gaussian().save(path)
    with pytest.raises(RuntimeError, match="nonsense"):
        pv.VAE.load(path, map_location="nonsense")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_model_goes_to_another_device(vamp, path):
    there = through_a_file(vamp, path, map_location="cuda")
    assert {tensor.device.type for tensor in there.state_dict().values()} == {"cuda"}
    x = torch.randn(5, 3)
    torch.testing.assert_close(there.encode(x.cuda()).mean.cpu(), vamp.encode(x).mean)
    assert_same_state(vamp, through_a_file(there, path))


def squashed(x):
    return x.tanh()


class Residual(nn.Module):
    """With a function, a class, plain values, a buffer outside the state_dict, and a state of its own."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.register_buffer("factor", torch.full((), 2.5), persistent=False)
        self.function, self.kind, self.partial = squashed, nn.Tanh, functools.partial(squashed)
        self.options = {"a": (1, [None, 2.5, b"\xff"]), (3, "b"): {4, 5}, "size": torch.Size([2]), "big": -(2**70)}
        self.support, self.dtype, self.device = pyro.distributions.constraints.positive, torch.int8, torch.device("cpu")

    def forward(self, x):
        return self.factor * self.linear(x) + self.function(self.partial(self.kind()(self.linear(x))))

    def get_extra_state(self):
        return torch.zeros(())

    def set_extra_state(self, state):
        raise AssertionError


class Recurrent(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.gru = nn.GRU(1, out_features, batch_first=True)

    def forward(self, x):
        return self.gru(x.reshape(-1, x.shape[-1], 1))[0][:, -1].reshape(*x.shape[:-1], -1)


class Robust(nn.Module):
    """x ~ Student-t, as a module that does not derive from Part."""

    def __init__(self, loc):
        super().__init__()
        self.loc = loc

    def forward(self, z):
        return pyro.distributions.StudentT(4.0, self.loc(z), 1.0).to_event(1)


class MyPrior(priors.Normal):
    """Without a constructor of its own."""


class MyVAE(pv.VAE):
    pass


def test_modules_of_the_user_come_back(path):
    vae = gaussian(prior=MyPrior(2), encoder=guides.DiagonalNormal(3, 2, Recurrent), decoder=Robust(Residual(2, 3)))
    vae = MyVAE(vae.prior, vae.encoder, vae.decoder).double()
    own = [MyVAE, MyPrior, Recurrent, Robust, Residual, squashed]
    again = through_a_file(vae, path, using=own)
    assert type(again) is MyVAE
    assert_same_state(vae, again)
    theirs, ours = vars(again.decoder.loc), vars(vae.decoder.loc)
    for key in ("function", "kind", "options", "dtype", "device"):
        assert theirs[key] == ours[key]
    assert type(again.decoder.loc.support) is type(vae.decoder.loc.support)
    x, z = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    assert torch.equal(again.encode(x).mean, vae.encode(x).mean)
    assert torch.equal(again.decode(z).mean, vae.decode(z).mean)
    for index, thing in enumerate(own):
        message = rf"`using` must have .*\[{thing.__name__}\].*model\.pt' needs test_model_f"
        with pytest.raises(ValueError, match=message):
            pv.VAE.load(path, using=own[:index] + own[index + 1 :])


def test_parts_that_were_changed_come_back_as_they_are(vamp, path):
    vamp.decoder.missing = True
    vamp.encoder.network[1][0] = nn.Linear(3, 4, bias=False)
    vamp.decoder.network[0].bias = vamp.prior.encoder.network[1][2].bias
    again = through_a_file(vamp, path)
    assert_same_state(vamp, again)
    assert again.decoder.missing
    assert again.decoder.network[0].bias is again.encoder.network[1][2].bias


@pytest.mark.parametrize(("using", "found"), [(["Robust"], "'Robust'"), (Robust, "<class"), (3, "3")])
def test_what_is_no_list_of_classes_and_functions_is_refused(using, found, path):
    with pytest.raises(TypeError, match=f"`using` must be a list of classes and functions.*got {found}"):
        pv.VAE.load(path, using=using)
    with pytest.raises(ValueError, match=r"`using` must have one thing of each name, got two .*'Robust'"):
        pv.VAE.load(path, using=[Robust, type("Robust", (), {})])


class Local:
    class Inner(nn.Linear):
        pass


def with_hook():
    linear = nn.Linear(2, 6)
    linear.register_forward_hook(lambda *_: None)
    return linear


UNSTORABLE = {
    "lambda": (lambda x: x, r"network\.attribute` must be .*no lambda.*got <function"),
    "in a list": ([1, {"a": lambda x: x}], r"network\.attribute` must .*got \[1, "),
    "local class": (type("Hidden", (nn.Linear,), {})(2, 6), r"network` must be .*top level.*got <class '.*Hidden'>"),
    "inner class": (Local.Inner(2, 6), r"network` must be .*got <class '.*Inner'>"),
    "hook": (with_hook(), r"network\._forward_hooks` must be"),
    "array": (np.ones(2), r"network\.attribute` must be .*got array"),
    "file": (sys.stdout, r"network\.attribute` must be"),
    "builtin": (os.getcwd, r"network\.attribute` must be .*needs posix\.getcwd"),
    "object key": ({(1, (2, 3)): 1}, r"network\.attribute` must be .*the key"),
    "expanded": (torch.ones(1).expand(10**6), r"network\.attribute` .*more than"),
}


@pytest.mark.parametrize(("value", "message"), UNSTORABLE.values(), ids=UNSTORABLE)
def test_what_cannot_be_stored_is_refused_by_its_path(value, message, path):
    vae = gaussian()
    if isinstance(value, nn.Module):
        vae.decoder.network = value
    else:
        vae.decoder.network.attribute = value
    with pytest.raises(ValueError, match=rf"`decoder\.{message}"):
        vae.save(path)
    assert not path.exists()


def test_two_things_of_one_name_are_refused(path, monkeypatch):
    other = types.ModuleType("other")
    exec("def squashed(x):\n    return x", vars(other))
    monkeypatch.setitem(sys.modules, "other", other)
    vae = gaussian()
    vae.encoder.one, vae.decoder.other = squashed, other.squashed
    with pytest.raises(ValueError, match=r"two classes or functions are named 'squashed': rename one"):
        vae.save(path)


def test_damaged_files_are_refused(path):
    gaussian().save(path)
    whole = path.read_bytes()
    lengths = {*range(0, len(whole), 97), *range(len(whole) - 130, len(whole))}
    damaged = [whole[:length] for length in lengths] + [whole + b"\0"]
    for place in {*range(0, len(whole), 29), *range(len(whole) - 130, len(whole))}:
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"model\.pt"):
            pv.VAE.load(path)


def test_foreign_files_are_refused(path):
    torch.save(gaussian(), buffer := io.BytesIO())
    foreign = {
        buffer.getvalue(): r"`path` must be a model file: .*model\.pt' is another file, or its end is lost",
        b"pyro_vae file, version 1, sha256 ...": r"has version 1, which pyro_vae wrote before 0\.1\.0",
        b"pyro_vae model file, version 12, sha256 " + b"0" * 64: r"a model file of version 2: .* has version 12",
    }
    for content, message in foreign.items():
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=message):
            pv.VAE.load(path)
    tensor_file.write(path, "checkpoint", {}, {"w": torch.ones(2)})
    with pytest.raises(FileFormatError, match=r"model\.pt' is another file"):
        pv.VAE.load(path)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        pv.VAE.load(path.with_name("none.pt"))


def test_a_model_of_another_class_is_refused(path):
    no_decoder, no_shape = gaussian(), gaussian()
    del no_decoder.decoder, no_shape.data_shape
    for other in (nn.Linear(2, 3), {"a": 1}, no_decoder, no_shape):
        model_file.save(path, other)
        with pytest.raises(FileFormatError, match=r"model\.pt' (holds no VAE|lacks parts)"):
            pv.VAE.load(path)
