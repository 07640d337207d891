"""A saved model is the same model elsewhere: densities to the bit, what is shared, frozen and evaluating."""

import copy
import functools
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pair_cases
import pyro
import pytest
import torch
from load_models import figures
from pair_cases import PAIRS, marked, vae_of
from part_cases import ALL, HAS_ZUKO, Case
from test_tensor_file import forge
from torch import nn

import pyro_vae as pv
from pyro_vae import families, guides, likelihoods, networks, priors
from pyro_vae.parts import base
from pyro_vae.parts.constructor_args import Factory, recipe_of
from pyro_vae.saving import model_file, tensor_file
from pyro_vae.saving.tensor_file import FileFormatError

ROOT = Path(__file__).parents[2]
NET = networks.mlp([4])


def gaussian(**given):
    default = {
        "prior": priors.StandardNormal(2),
        "encoder": guides.DiagonalNormal(3, 2, NET),
        "decoder": likelihoods.Normal(2, 3, NET),
    }
    return pv.VAE(**{**default, **given})


def perturb(module):
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))


def through_a_file(vae, path, **arguments):
    vae.save(path)
    return pv.VAE.load(path, **arguments)


def assert_same_state(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert repr(one) == repr(other)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


# --- All parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", ALL)
def test_every_part_comes_back_with_the_same_density(build, path):
    case = Case(build)  # in float64
    whole = nn.ModuleDict({role: networks.mlp([3])(2, 2) for role in model_file.ROLES})
    whole["encoder"] = case.part
    model_file.save(path, whole, [3])
    loaded, shape = model_file.load(path, None, ())
    part = loaded["encoder"]
    assert_same_state(case.part, part)
    assert type(part) is type(case.part)
    assert shape == (3,)
    contexts = case.contexts(5)
    torch.manual_seed(1)
    value = case.part(*contexts).sample()
    assert torch.equal(part(*contexts).log_prob(value), case.part(*contexts).log_prob(value))
    torch.manual_seed(1)
    assert torch.equal(part(*contexts).sample(), value)
    assert torch.equal(part.read(value), case.part.read(value))
    assert [p.requires_grad for p in part.parameters()] == [p.requires_grad for p in case.part.parameters()]


NETWORKS = [
    networks.linear(),
    networks.linear(bias=False),
    networks.mlp([]),
    networks.mlp([4, 5], activation=nn.SiLU),
    networks.mlp((np.int64(4),), nn.Tanh),
    networks.mlp([4], functools.partial(nn.LeakyReLU, 0.3)),
    networks.mlp([4], functools.partial(nn.LeakyReLU, negative_slope=0.3)),
    networks.standardized(NET, loc=torch.arange(4.0), scale=np.full(4, 2.0)),
    networks.standardized(networks.with_missing(NET), 0.5),
    networks.with_missing(NET),
    networks.one_hot(3, NET),
    networks.convolutional((1, 2, 2), channels=[3]),
    networks.deconvolutional((1, 2, 2), channels=(3, 2), activation=nn.ELU),
]


@pytest.mark.parametrize("network", NETWORKS, ids=repr)
def test_every_network_comes_back(network, path):
    vae = gaussian(encoder=guides.DiagonalNormal(4, 2, network), decoder=likelihoods.Normal(2, 4, NET))
    again = through_a_file(vae, path)
    assert_same_state(vae, again)
    x = torch.rand(5, 4)
    assert torch.equal(again.encode(x).mean, vae.encode(x).mean)


def test_every_network_factory_is_in_the_list_above():
    names = set(networks.__all__) - {"NetworkFactory", "build", "factory"}
    assert {network.recipe.maker.__name__ for network in NETWORKS} == names


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """All pairs of priors and guides, saved here, and what a new process says of the files."""
    folder = tmp_path_factory.mktemp("models")
    said = {}
    for index, (prior, guide) in enumerate(PAIRS):
        if "Flow" in prior + guide and not HAS_ZUKO:
            continue
        vae, x = vae_of(prior, guide, list(pair_cases.LIKELIHOODS)[index % len(pair_cases.LIKELIHOODS)])
        perturb(vae)
        name = f"{prior}-{guide}.pt"
        vae.save(folder / name)
        said[name] = figures(vae, x)
        torch.save(x, folder / f"{name}.x")
    script = [sys.executable, str(Path(__file__).parent / "load_models.py"), str(folder)]
    result = subprocess.run(
        script, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stderr
    return said, json.loads(result.stdout)


@pytest.mark.parametrize(("prior", "guide"), [marked(*pair) for pair in PAIRS])
def test_a_new_process_has_the_same_numbers_to_the_bit(elsewhere, prior, guide):
    here, there = elsewhere
    name = f"{prior}-{guide}.pt"
    assert there[name] == here[name]


# --- State -----------------------------------------------------------------------------------------------------------


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


def test_a_model_built_under_another_default_dtype(path):
    torch.set_default_dtype(torch.float64)
    try:
        encoder = guides.DiagonalNormal(3, 2, NET)
        vae = gaussian(
            prior=priors.VampPrior(encoder, torch.rand(4, 3)), encoder=encoder, decoder=likelihoods.Normal(2, 3, NET)
        )
        vae.save(path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_state(vae, pv.VAE.load(path))


def test_parts_that_share_the_encoder_share_it_again(path):
    encoder = guides.DiagonalNormal(3, 2, NET)
    again = through_a_file(gaussian(prior=priors.VampPrior(encoder, torch.randn(4, 3)), encoder=encoder), path)
    assert again.prior.encoder is again.encoder
    assert len(list(again.parameters())) == len(list(again.encoder.parameters())) + 1 + 5


def test_a_guide_refined_from_the_encoder_of_the_prior_shares_its_family_again(path):
    first = guides.DiagonalNormal(3, 2, NET)
    vae = gaussian(
        prior=priors.VampPrior(first, torch.randn(4, 3)), encoder=guides.PerDatum.refining(first, torch.randn(5, 3))
    )
    assert vae.encoder.family is first.family
    again = through_a_file(vae, path)
    assert again.encoder.family is again.prior.encoder.family
    assert_same_state(vae, again)


def test_one_parameter_in_two_parts_is_one_again(path):
    raw = nn.Parameter(torch.randn(4))
    vae = gaussian(prior=base.Unconditional(families.Normal(2), raw))
    other = base.Unconditional(families.Normal(2), raw)
    whole = nn.ModuleDict({"prior": vae.prior, "encoder": other, "decoder": vae.decoder})
    model_file.save(path, whole, [3])
    loaded, _ = model_file.load(path, None, ())
    assert loaded["prior"].raw is loaded["encoder"].raw
    assert torch.equal(loaded["prior"].raw, raw)
    assert sorted(tensor_file.read(path, "model")[1])[-1] == "prior.raw"  # and no copy among the arguments


def test_a_discrete_twin_comes_back(path):
    relaxed = pv.VAE(
        priors.RelaxedBernoulli(2, 0.5, probs=torch.tensor([0.2, 0.6])),
        guides.RelaxedBernoulli(3, 2, NET, 0.66),
        likelihoods.Normal(2, 3, NET),
    )
    perturb(relaxed)
    twin = relaxed.discrete()
    again = through_a_file(twin, path)
    assert_same_state(twin, again)
    assert again.prior().has_enumerate_support
    x = torch.randn(5, 3)
    assert torch.equal(pv.exact.elbo(again.model, again.guide, x), pv.exact.elbo(twin.model, twin.guide, x))


def test_temperature_modes_and_frozen_parameters_come_back(path):
    vae = pv.VAE(
        priors.GumbelSoftmax((1, 3), 0.5, straight_through=True),
        guides.GumbelSoftmax(3, (1, 3), NET, 0.66),
        likelihoods.Normal((1, 3), 3, networks.mlp([4], functools.partial(nn.RReLU, 0.1))).requires_grad_(False),
    )
    vae.encoder.family.temperature.fill_(0.123)
    vae.encoder.eval()
    again = through_a_file(vae, path)
    assert again.encoder.family.temperature.item() == pytest.approx(0.123)
    assert again.prior.straight_through
    modes = [{name: module.training for name, module in one.named_modules()} for one in (vae, again)]
    assert modes[0] == modes[1]
    frozen = [{name: value.requires_grad for name, value in one.named_parameters()} for one in (vae, again)]
    assert frozen[0] == frozen[1]
    assert not through_a_file(vae.eval(), path).training


class Scaled(nn.Module):
    """With a buffer that no state_dict has."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.register_buffer("factor", torch.ones(()), persistent=False)

    def forward(self, x):
        return self.factor * self.linear(x)


def test_buffers_outside_the_state_dict_come_back(path):
    vae = gaussian(decoder=likelihoods.Normal(2, 3, Scaled)).double()
    vae.decoder.network.factor.fill_(2.5)
    again = through_a_file(vae, path, using=[Scaled])
    assert again.decoder.network.factor.item() == 2.5
    assert again.decoder.network.factor.dtype == torch.float64


def test_a_model_of_weights_that_are_not_finite_comes_back(path):
    vae = gaussian()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.fill_(torch.nan)
    again = through_a_file(vae, path)
    assert all(parameter.isnan().all() for parameter in again.parameters())


def test_every_loaded_model_has_a_name_of_its_own(path):
    vae = gaussian(name="mine")
    vae.save(path)
    one, two = pv.VAE.load(path), pv.VAE.load(path)
    assert len({vae.name, one.name, two.name}) == 3
    x = torch.randn(6, 3)
    for epochs, model in enumerate((vae, one, two)):
        pv.fit(model.model, model.guide, x, epochs=epochs + 1)  # in one store
    weights = [model.encoder.network[0].weight for model in (vae, one, two)]
    assert not torch.equal(weights[0], weights[1])  # each has its own, and each went its way
    assert not torch.equal(weights[1], weights[2])


def test_a_loaded_model_trains_and_is_saved_again(path, tmp_path):
    vae = through_a_file(gaussian(), path)
    pv.fit(vae.model, vae.guide, torch.randn(6, 3), epochs=2)
    assert_same_state(vae, through_a_file(vae, tmp_path / "second.pt"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae))])
def test_copies_and_pickled_models_are_saved_too(path, copied):
    encoder = guides.DiagonalNormal(3, 2, networks.standardized(NET, torch.zeros(3)))
    vae = copied(gaussian(prior=priors.VampPrior(encoder, torch.randn(4, 3)), encoder=encoder))
    again = through_a_file(vae, path)
    assert_same_state(vae, again)
    assert again.prior.encoder is again.encoder


def test_a_copy_is_saved_with_its_own_parameters(path):
    raw = nn.Parameter(torch.zeros(4))
    vae = copy.deepcopy(gaussian(prior=base.Unconditional(families.Normal(2), raw)))
    perturb(vae)
    assert_same_state(vae, through_a_file(vae, path))


def test_the_process_stays_as_it_was(path, random_states):
    vae = gaussian(prior=priors.MixtureOfNormals(2, 3))
    vae.register()
    store = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    before = random_states()
    again = through_a_file(vae, path)
    assert random_states() == before
    assert torch.get_default_dtype() == torch.float32
    assert store.keys() == set(pyro.get_param_store().keys())
    assert {name.partition("$")[0] for name in store} == {vae.name}
    assert again.training


LOCATIONS = {
    "text": "cpu",
    "device": torch.device("cpu"),
    "map": {"cpu": "cpu"},
    "function": lambda storage, location: storage,
}


@pytest.mark.parametrize("map_location", LOCATIONS.values(), ids=LOCATIONS)
def test_a_device_is_chosen_as_in_torch(path, map_location):
    vae = gaussian()
    assert_same_state(vae, through_a_file(vae, path, map_location=map_location))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_model_goes_to_another_device(path):
    encoder = guides.DiagonalNormal(3, 2, networks.standardized(NET, torch.zeros(3)))
    vae = gaussian(prior=priors.VampPrior(encoder, torch.randn(4, 3)), encoder=encoder)
    there = through_a_file(vae, path, map_location="cuda")
    assert {tensor.device.type for tensor in there.state_dict().values()} == {"cuda"}
    x = torch.randn(5, 3)
    torch.testing.assert_close(there.encode(x.cuda()).mean.cpu(), vae.encode(x).mean)
    assert_same_state(vae, through_a_file(there, path))


# --- Parts of a user's own -------------------------------------------------------------------------------------------


def residual(in_features, out_features):
    return nn.Sequential(nn.Linear(in_features, 8), nn.Tanh(), nn.Linear(8, out_features))


@networks.factory
def wide(width, *more, depth=1, **rest):
    sizes = [width, *more, *rest.values()] * depth
    return lambda in_features, out_features: nn.Sequential(
        *(nn.Linear(*size) for size in itertools.pairwise([in_features, *sizes, out_features]))
    )


class Laplace(families.Family):
    def __init__(self, event_shape):
        super().__init__(event_shape)
        self.num_raw = 2 * self.event_shape.numel()

    def forward(self, raw):
        loc, log_scale = raw.chunk(2, dim=-1)
        return pyro.distributions.Laplace(loc, log_scale.exp()).to_event(1)


class Robust(base.Part):
    def __init__(self, latent, out_features, network, options=None):
        super().__init__()
        self.loc = networks.build(network, latent, out_features)
        self.options = options
        self.calls = 0

    def forward(self, context=None):
        self.calls += 1
        return pyro.distributions.StudentT(4.0, self.loc(context), 1.0).to_event(1)


class MyPrior(priors.Normal):
    """Without a constructor of its own."""


class NoArguments(base.Part):
    def forward(self, context=None):
        return pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1)


def test_parts_and_networks_of_ones_own(path):
    family = Laplace(2)
    vae = gaussian(
        prior=MyPrior(latent=2),
        encoder=base.Conditional(family, 3, wide(4, 5, depth=2, last=6)(3, family.num_raw)),
        decoder=Robust(2, 3, residual, options={"a": (1, [None, 2.5]), 3: range(2), "act": nn.Tanh, "dim": True}),
    )
    again = through_a_file(vae, path, using=[MyPrior, Laplace, Robust, wide, residual])
    assert_same_state(vae, again)
    assert again.decoder.options == {"a": (1, [None, 2.5]), 3: [0, 1], "act": nn.Tanh, "dim": True}
    assert repr(recipe_of(again.encoder.network).maker) == "wide(4, 5, depth=2, last=6)"
    assert type(gaussian(prior=NoArguments()).prior) is NoArguments
    again = through_a_file(gaussian(prior=NoArguments()), path, using=[NoArguments])
    assert type(again.prior) is NoArguments


def test_what_is_of_the_users_own_must_be_handed_over(path):
    vae = gaussian(decoder=Robust(2, 3, residual))
    vae.save(path)
    with pytest.raises(ValueError, match=r"using: '.*model\.pt' needs 'Robust'.*`using=\[Robust\]`"):
        pv.VAE.load(path)
    with pytest.raises(ValueError, match="needs 'residual'"):
        pv.VAE.load(path, using=[Robust])
    with pytest.raises(TypeError, match=r"`using` must be a list of classes and functions.*got 'Robust'"):
        pv.VAE.load(path, using=["Robust"])
    with pytest.raises(TypeError, match="`using` must be .*got <function residual"):
        pv.VAE.load(path, using=residual)
    with pytest.raises(ValueError, match="`using` must be .*got two things named 'Robust'"):
        pv.VAE.load(path, using=[Robust, type("Robust", (), {})])


class Finished(nn.Module):
    """x ~ Student-t, as a module that keeps no arguments."""

    def forward(self, z):
        return pyro.distributions.StudentT(4.0, z @ torch.ones(2, 3), 1.0).to_event(1)


class Maker:
    def __call__(self, in_features, out_features):
        return nn.Linear(in_features, out_features)


FAMILY = families.Normal(2)
UNDESCRIBED = {
    "lambda": (
        lambda: {"decoder": likelihoods.Normal(2, 3, lambda i, o: nn.Linear(i, o))},
        "decoder.network: got a",
    ),
    "module": (
        lambda: {"decoder": Finished()},
        "`decoder` must be .*got a Finished, and a file cannot tell how it was made",
    ),
    "network": (
        lambda: {"encoder": base.Conditional(FAMILY, 3, nn.Linear(3, 4))},
        "encoder.network: got a Linear, and a file cannot tell",
    ),
    "object": (lambda: {"encoder": guides.DiagonalNormal(3, 2, Maker())}, "encoder.network: got a Maker, which a"),
    "activation": (
        lambda: {"encoder": guides.DiagonalNormal(3, 2, networks.mlp([4], lambda: nn.LeakyReLU(0.1)))},
        "encoder.network.activation: got a lambda",
    ),
    "partial": (
        lambda: {"encoder": guides.DiagonalNormal(3, 2, functools.partial(Maker()))},
        "encoder.network: got a Maker, which has no name",
    ),
    "inside": (lambda: {"decoder": Robust(2, 3, residual, [1, {"a": {2}}])}, r"decoder.options\[1\]\['a'\]: got a set"),
}


@pytest.mark.parametrize(("given", "message"), UNDESCRIBED.values(), ids=UNDESCRIBED)
def test_what_cannot_be_described_is_refused_by_name(given, message, path):
    with pytest.raises(ValueError, match=message + ".*; accepted are parts, families and networks of pyro_vae"):
        gaussian(**given()).save(path)
    assert not path.exists()


def test_two_things_of_one_name_are_refused(path):
    def other():
        def residual(in_features, out_features):
            return nn.Linear(in_features, out_features)

        return residual

    vae = gaussian(encoder=guides.DiagonalNormal(3, 2, residual), decoder=likelihoods.Normal(2, 3, other()))
    with pytest.raises(ValueError, match=r"decoder.network: got .* is there by the same name; rename one"):
        vae.save(path)


def changed(vae):
    vae.decoder.missing = True


def replaced(vae):
    vae.encoder.network[0] = nn.Linear(3, 5)


def tied(vae):
    vae.decoder.network[0].bias = vae.encoder.network[0].bias


def shared(vae):
    vae.decoder.family = families.Normal(3, "shared", 1e-3)
    vae.decoder.other = vae.decoder.family


@pytest.mark.parametrize("change", [changed, replaced, tied, shared])
def test_parts_that_were_changed_since_are_refused_when_they_are_saved(change, path):
    vae = gaussian()
    change(vae)
    with pytest.raises(ValueError, match=r"when its part is made again .*; accepted are parts that have not been"):
        vae.save(path)


def test_a_network_that_is_another_each_time_is_refused(path):
    sizes = iter([4, 5, 6])

    def varying(in_features, out_features):
        return networks.mlp([next(sizes)])(in_features, out_features)

    with pytest.raises(
        ValueError, match=r"decoder\.network\.0\.out_features: it is 4, and 5 when its part is made again"
    ):
        gaussian(decoder=likelihoods.Normal(2, 3, varying)).save(path)


class Stateful(nn.Linear):
    def get_extra_state(self):
        return "something"

    def set_extra_state(self, state):
        pass


def test_a_state_that_is_no_tensor_is_refused(path):
    with pytest.raises(ValueError, match=r"decoder\.network\._extra_state: .*cannot be saved"):
        gaussian(decoder=likelihoods.Normal(2, 3, Stateful)).save(path)


def test_a_subclass_is_refused(path):
    class Mine(pv.VAE):
        pass

    vae = gaussian()
    with pytest.raises(TypeError, match="got a Mine; a file holds a VAE"):
        Mine(vae.prior, vae.encoder, vae.decoder).save(path)


# --- Files -----------------------------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_refused_by_name_and_shape(path):
    def net(in_features, out_features):
        return nn.Sequential(nn.Linear(in_features, 8), nn.Linear(8, out_features))

    gaussian(encoder=guides.DiagonalNormal(3, 2, net)).save(path)

    def changed(in_features, out_features):
        return nn.Sequential(nn.Linear(in_features, 9), nn.Linear(9, out_features, bias=False), nn.PReLU())

    changed.__name__ = "net"
    with pytest.raises(ValueError, match="do not fit") as caught:
        pv.VAE.load(path, using=[changed])
    for words in (
        "encoder.network.0.weight is (8, 3) in the file and (9, 3) in the model that it describes",
        "encoder.network.1.bias is only in the file",
        "encoder.network.2.weight is only in the model",
        "model.pt",
    ):
        assert words in str(caught.value)


def test_damaged_and_foreign_files_are_refused(path, tmp_path):
    gaussian().save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:10], b"", whole[:-40] + b"\1" + whole[-39:]):
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError, match=r"model\.pt"):
            pv.VAE.load(path)
    tensor_file.write(path, "checkpoint", {}, {})
    with pytest.raises(FileFormatError, match="is a checkpoint file; accepted is a model file"):
        pv.VAE.load(path)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        pv.VAE.load(tmp_path / "none.pt")


def header_of(path):
    return tensor_file.read(path, "model")


ALARM = []


def alarm(*args, **kwargs):
    ALARM.append(args)
    return networks.linear()


HOSTILE = [
    "os.system",
    "builtins.eval",
    "eval",
    "os",
    "test_saving.alarm",
    "alarm",
    "networks.build",
    "networks.factory",
    "networks.torch.load",
    "priors.torch",
    "priors._logits",
    "families.as_shape",
    "nn.Linear",
    "nn.torch",
    "__import__",
    "",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    "form",
    [
        lambda name: {"make": name, "with": {"args": {"tuple": ["touch exploded"]}}},
        lambda name: {"make": {"make": name, "with": {}}, "with": {}},
        lambda name: {"partial": name, "args": [["touch exploded"], {"dict": []}]},
        lambda name: {"make": "priors.Normal", "with": {"latent": {"make": name, "with": {}}}},
        lambda name: {"name": name},
    ],
)
def test_a_file_calls_nothing_that_it_was_not_given(path, form, name):
    gaussian().save(path)
    header, tensors = header_of(path)
    header["parts"]["prior"] = form(name)
    tensor_file.write(path, "model", header, tensors)
    with pytest.raises(ValueError, match=f"needs {name!r}, which is not of this pyro_vae"):
        pv.VAE.load(path, using=[residual])
    assert not ALARM
    assert not (path.parent / "exploded").exists()


NONSENSE = [
    None,
    3,
    [],
    {},
    {"tuple": 3},
    {"dict": [[1, 2, 3]]},
    {"dict": [[{"dict": []}, 2]]},
    {"same": [0, ""]},
    {"same": [-1, ""]},
    {"same": ["a", "b"]},
    {"name": 3},
    {"name": "nn.Tanh"},
    {"tensor": "not there"},
    {"tensor": "decoder.network.0.bias"},
    {"make": "priors.Normal"},
    {"make": 3, "with": {}},
    {"make": {"tensor": "decoder.network.0.bias"}, "with": {}},
    {"make": {"make": "priors.Normal", "with": {"latent": 2}}, "with": {}},
    {"make": {"name": "priors.Normal"}, "with": {"latent": 2}},
    {"make": "priors.Normal", "with": []},
    {"make": "priors.Normal", "with": {"latnet": 2}},
    {"make": "priors.Normal", "with": {}},
    {"make": "priors.Normal", "with": {"latent": -1}},
    {"make": "priors.Normal", "with": {"latent": {"parameter": "decoder.network.0.bias"}}},
    {"make": "nn.Tanh", "with": {}},
    {"partial": "nn.Tanh", "args": [[], {"dict": []}]},
    {"partial": "nn.Tanh", "args": []},
    {"partial": "nn.Tanh", "args": [[], 3]},
    {"partial": "nn.Tanh", "args": [[], {"dict": [[3, 4]]}]},
    {"make": {"partial": "nn.LeakyReLU", "args": [[1, 2, 3, 4], {"dict": []}]}, "with": {}},
    json.loads("[" * 500 + "]" * 500),
]


@pytest.mark.parametrize("node", NONSENSE, ids=lambda node: str(node)[:60])
def test_a_description_that_makes_no_sense_is_refused(path, node):
    gaussian().save(path)
    header, tensors = header_of(path)
    header["parts"]["prior"] = node
    tensor_file.write(path, "model", header, tensors)
    with pytest.raises(ValueError, match=r"path: .*model\.pt'"):
        pv.VAE.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"parts": {}},
        {"parts": []},
        {"data_shape": 3},
        {"data_shape": ["a"]},
        {"dtype": "int64"},
        {"dtype": None},
        {"evaluating": 3},
        {"frozen": "x"},
    ],
)
def test_a_header_that_makes_no_sense_is_refused(path, change):
    gaussian().save(path)
    header, tensors = header_of(path)
    tensor_file.write(path, "model", {**header, **change}, tensors)
    with pytest.raises(FileFormatError, match=r"model\.pt' describes no model"):
        pv.VAE.load(path)


def nodes(value):
    """The places in a value of JSON: each container and key."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from nodes(inner)


def test_a_description_garbled_anywhere_is_a_model_or_refused_by_the_name_of_the_file(path):
    encoder = guides.DiagonalNormal(3, 2, networks.standardized(networks.mlp([4], functools.partial(nn.ELU, 0.5))))
    gaussian(prior=priors.VampPrior(encoder, torch.rand(4, 3)), encoder=encoder).save(path)
    header, tensors = header_of(path)
    words = [*NONSENSE[:-1], -1, 2.5, "x", "nn.Tanh", "priors.Normal", {"parameter": "decoder.network.0.bias"}, [1, 2]]
    chance = random.Random(0)
    said = []
    for _ in range(150):
        garbled = copy.deepcopy(header)
        container, key = chance.choice(list(nodes(garbled)))
        container[key] = copy.deepcopy(chance.choice(words))
        tensor_file.write(path, "model", garbled, tensors)
        try:
            pv.VAE.load(path)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 75
    assert all("model.pt" in words for words in said)


def test_a_pickle_in_place_of_tensors_is_not_run(path, tmp_path):
    gaussian().save(path)
    line = path.read_bytes().split(b"\n")[1]
    torch.save({"prior.raw": Laplace(2)}, tmp_path / "payload")
    forge(path, line, (tmp_path / "payload").read_bytes())
    with pytest.raises(FileFormatError, match="holds something else than tensors"):
        pv.VAE.load(path)


# --- Recipes ---------------------------------------------------------------------------------------------------------


def test_arguments_are_those_of_the_time_when_a_part_was_made(path):
    hidden, probs = [4], torch.full((2,), 0.3)
    vae = pv.VAE(
        priors.Bernoulli(2, probs), guides.Bernoulli(3, 2, networks.mlp(hidden)), likelihoods.Normal(2, 3, NET)
    )
    hidden.append(5)
    probs.fill_(7.0)
    assert_same_state(vae, through_a_file(vae, path))


def test_defaults_are_those_of_the_time_when_it_was_saved(path):
    gaussian().save(path)
    header, tensors = header_of(path)
    assert header["parts"]["decoder"]["with"]["min_scale"] == 1e-3
    header["parts"]["decoder"]["with"]["min_scale"] = 0.5  # as if the default had been that
    tensor_file.write(path, "model", header, tensors)
    assert pv.VAE.load(path).decoder.family.min_scale == 0.5


def test_parts_do_not_keep_what_no_file_could_hold():
    part = Robust(2, 3, residual, options=open)
    assert recipe_of(part).kwargs["options"].what == "a builtin_function_or_method"


def test_a_model_with_a_lambda_can_be_pickled_still():
    vae = gaussian(decoder=likelihoods.Normal(2, 3, lambda i, o: nn.Linear(i, o)))
    again = pickle.loads(pickle.dumps(vae))
    assert torch.equal(again.decoder.network.weight, vae.decoder.network.weight)
    with pytest.raises(ValueError, match=r"decoder\.network: got <lambda>, which pickling has lost"):
        again.save("nowhere/model.pt")


@pytest.mark.parametrize("network", NETWORKS, ids=repr)
def test_factories_are_read_by_people_and_copied(network):
    assert isinstance(network, Factory)
    assert copy.deepcopy(network) is network
    again = pickle.loads(pickle.dumps(network))
    assert repr(again) == repr(network)
    sizes = (4, 4)
    assert repr(again(*sizes)) == repr(network(*sizes))
