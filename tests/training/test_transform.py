"""Model and guide run on the transformed rows of a step, each transformed once, and the data stay as they were."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, priors
from pyro_vae.handlers import FixedSubsample, SubsampleRows

N, D = 20, 6
GREY = torch.randint(0, 256, (N, D), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IDS = torch.arange(N, dtype=torch.uint8)[:, None].expand(N, 2).contiguous()
HELD_OUT = 200 + IDS
TANH = networks.mlp([8], activation=nn.Tanh)
SIGMAS = 5


class Recorder:
    """A transform to floats with new noise in each call, that keeps its arguments and results."""

    def __init__(self):
        self.given, self.made = [], []

    def __call__(self, *tensors):
        made = tuple(tensor.float() + 0.01 * torch.randn(tensor.shape) for tensor in tensors)
        self.given.append(tensors)
        self.made.append(made)
        return made[0] if len(made) == 1 else made


class Pair:
    """A model and an amortized guide that record the rows they get; ``read`` is how they read those of their plate."""

    def __init__(self, read):
        self.read = read
        self.seen = {"model": [], "guide": []}

    def model(self, *tensors):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(tensors[0])):
            tensors = self._record("model", tensors)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal((z + loc)[..., None], 1.0).expand([*z.shape, 2]).to_event(1), obs=tensors[-1])

    def guide(self, *tensors):
        slope = pyro.param("slope", torch.tensor(0.1))
        with pyro.plate("data", len(tensors[0])):
            tensors = self._record("guide", tensors)
            pyro.sample("z", dist.Normal(slope * tensors[0][:, 0] / 100, 1.0))

    def _record(self, owner, tensors):
        self.seen[owner].append(tuple(self.read(tensor) for tensor in tensors))
        return self.seen[owner][-1]


def subsampled(tensor):
    return pyro.subsample(tensor, event_dim=1)


READINGS = pytest.mark.parametrize("read", [subsampled, lambda tensor: tensor], ids=["subsampled", "sliced"])
SOME_OR_ALL = pytest.mark.parametrize("batch_size", [None, 5], ids=["all rows", "batches of 5"])


@pytest.fixture(params=[None, 8, 5], ids=["all rows", "batches of 8", "batches of 5"])
def batch_size(request):
    return request.param


def bernoulli_vae(binary_latents=False):
    torch.manual_seed(0)
    parts = (priors.Bernoulli, guides.Bernoulli) if binary_latents else (priors.StandardNormal, guides.DiagonalNormal)
    return pv.VAE(parts[0](2), parts[1](D, 2, TANH), likelihoods.Bernoulli(2, D, TANH))


def pixelwise(read=subsampled):
    """Bernoulli pixels with a logit each, and no latent."""

    def model(x):
        logits = pyro.param("logits", torch.linspace(-1, 1, D))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=read(x))

    return model, lambda x: None


def same(ours, theirs):
    """Whether these are the very same tensors."""
    return len(ours) == len(theirs) and all(one is other for one, other in zip(ours, theirs, strict=True))


@READINGS
@pytest.mark.parametrize("count", [1, 2], ids=["one tensor", "two tensors"])
def test_each_row_is_transformed_once_an_epoch_and_model_and_guide_get_the_result(read, batch_size, count):
    data, held_out = (IDS, IDS + 100)[:count], (HELD_OUT, HELD_OUT + 20)[:count]
    steps, calls = len(torch.arange(N).split(batch_size or N)), []
    for epochs in (1, 4):
        pair, recorder = Pair(read), Recorder()
        settings = {"epochs": epochs, "batch_size": batch_size, "transform": recorder}
        assert pv.fit(pair.model, pair.guide, data, **settings, validation=held_out).steps == epochs * steps
        validations = [given for given in recorder.given if given[0][0, 0] >= 200]
        assert len(validations) == 1
        assert all(torch.equal(*both) for both in zip(validations[0], held_out, strict=True))
        calls.append(len(recorder.given))
    assert calls[1] - calls[0] == 3 * steps  # the calls before the first step are the same
    pair, recorder = Pair(read), Recorder()
    pv.fit(pair.model, pair.guide, data, **settings | {"transform": recorder})
    for epoch in (recorder.given[-steps:], recorder.given[-2 * steps : -steps]):
        for tensor, given in zip(data, zip(*epoch, strict=True), strict=True):
            rows = torch.cat(given)
            assert torch.equal(rows[rows[:, 0].argsort()], tensor)
            assert rows.dtype == torch.uint8
    for first, *others in recorder.given:
        assert all(torch.equal(other, first + 100) for other in others), "rows of the tensors are not the same ones"
    for owner in ("model", "guide"):
        seen = pair.seen[owner][-2 * steps :]
        assert all(same(*both) for both in zip(seen, recorder.made[-2 * steps :], strict=True))


@READINGS
@pytest.mark.parametrize("runs", [3, 1], ids=["particles", "a plate of particles"])
def test_all_particles_of_a_step_get_the_same_rows(read, runs):
    pair, recorder = Pair(read), Recorder()
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=runs == 1, max_plate_nesting=1)
    pv.fit(pair.model, pair.guide, IDS, epochs=1, batch_size=5, transform=recorder, elbo=elbo)
    made = [rows for rows in recorder.made[-4:] for _ in range(runs)]
    assert all(same(*both) for both in zip(pair.seen["model"][-4 * runs :], made, strict=True))


def test_the_model_of_an_autoguide_gets_transformed_rows():
    pair, recorder = Pair(subsampled), Recorder()
    pv.fit(pair.model, AutoNormal(pair.model), IDS, epochs=1, batch_size=5, transform=recorder)
    assert all(same(*both) for both in zip(pair.seen["model"][-4:], recorder.made[-4:], strict=True))


@SOME_OR_ALL
def test_one_tensor_in_two_roles_is_transformed_in_each(batch_size):
    """A denoising pair: the guide gets noisy data, the model the data themselves."""
    pair = Pair(subsampled)

    def shift_the_first(inputs, targets):
        return inputs.float() + 1000, targets.float()

    pv.fit(pair.model, pair.guide, (IDS, IDS), epochs=1, batch_size=batch_size, transform=shift_the_first)
    inputs, targets = pair.seen["model"][-1]
    assert torch.equal(inputs, targets + 1000)


ELBOS = {
    "default": lambda **nesting: Trace_ELBO(**nesting) if nesting else None,
    "two particles": lambda **nesting: Trace_ELBO(num_particles=2, **nesting),
    "a plate of particles": lambda **nesting: Trace_ELBO(num_particles=3, vectorize_particles=True, **nesting),
    "enumerated": lambda **nesting: TraceEnum_ELBO(**nesting),
}


@pytest.mark.parametrize("name", ELBOS)
def test_training_on_bytes_is_training_on_what_they_are_transformed_to(batch_size, name):
    """Pyro counts plates that it is not given in a first run, on the data without their transform."""
    held_out, nesting, found = 255 - GREY[:7], {"max_plate_nesting": 1}, []
    for options, known in (
        ({"transform": datasets.binarize}, {}),
        ({"transform": datasets.binarize}, nesting),
        ({}, nesting),
    ):
        vae = bernoulli_vae(name == "enumerated")
        guide = config_enumerate(vae.guide) if name == "enumerated" else vae.guide
        x, validation = (GREY, held_out) if options else (datasets.binarize(GREY), datasets.binarize(held_out))
        options |= {"epochs": 5, "batch_size": batch_size, "lr": 1e-2, "seed": 4}
        fitted = pv.fit(vae.model, guide, x, validation=validation, elbo=ELBOS[name](**known), **options)
        found.append((fitted.history, [parameter.tolist() for parameter in vae.parameters()]))
    assert found[0] == found[1] == found[2]


@READINGS
@SOME_OR_ALL
def test_resampled_data_give_the_elbo_of_the_grey_values_in_expectation(read, batch_size):
    settings = {"epochs": 1000, "batch_size": batch_size, "lr": 1e-12, "transform": datasets.resample}
    elbos = np.array(pv.fit(*pixelwise(read), GREY, **settings).history["elbo"])
    log_probs = torch.nn.functional.logsigmoid(torch.stack([torch.linspace(-1, 1, D), torch.linspace(1, -1, D)]))
    grey = datasets.grey(GREY)
    expected = (grey @ log_probs[0] + (1 - grey) @ log_probs[1]).mean().item()
    assert abs(elbos.mean() - expected) < SIGMAS * elbos.std() / len(elbos) ** 0.5
    # Each row has new draws in each epoch, so the variances of all pixels add up.
    variance = (torch.linspace(-1, 1, D) ** 2 * grey * (1 - grey)).sum().item() / N**2
    assert abs(elbos.var() / variance - 1) < SIGMAS * (2 / len(elbos)) ** 0.5


@SOME_OR_ALL
def test_the_mean_grey_of_each_pixel_is_learnt_from_resampled_data(batch_size):
    for lr in (0.1, 0.01, 0.001):
        pv.fit(*pixelwise(), GREY, epochs=300, batch_size=batch_size, lr=lr, transform=datasets.resample)
    learned, expected = pyro.param("logits").sigmoid(), datasets.grey(GREY).mean(0)
    # Adam at 0.001 averages hundreds of steps, each of N = 20 pixels: the noise left is about 0.5 / (20 * 100)**0.5.
    assert (learned - expected).abs().max() < SIGMAS * 0.5 / (N * 100) ** 0.5


@SOME_OR_ALL
def test_held_out_data_are_resampled_once_and_change_nothing(batch_size):
    settings = {"epochs": 4, "batch_size": batch_size, "lr": 1e-12, "transform": datasets.resample}
    alone, validated = (pv.fit(*pixelwise(), GREY, **settings, validation=x).history for x in (None, GREY))
    assert validated["elbo"] == alone["elbo"]
    assert len(set(validated["elbo"])) == 4
    assert len(set(validated["validation_elbo"])) == 1


def test_a_seed_gives_one_run_and_leaves_data_and_random_streams_as_they_were(batch_size, random_states):
    data, before, histories = GREY.clone(), random_states(), []
    for seed in (1, 1, 2):
        pyro.clear_param_store()
        options = {"epochs": 3, "batch_size": batch_size, "seed": seed, "validation": data}
        fitted = pv.fit(*pixelwise(lambda tensor: tensor), data, transform=datasets.resample, **options)
        histories.append(fitted.history["elbo"])
    assert histories[0] == histories[1]
    assert not set(histories[0]) & set(histories[2])
    assert random_states() == before
    assert data.dtype == torch.uint8
    assert torch.equal(data, GREY)


def test_tensors_of_inference_mode_are_transformed(batch_size):
    histories = []
    for mode in (True, False):
        with torch.inference_mode(mode):
            data = GREY / 255
        vae = bernoulli_vae()
        fitted = pv.fit(vae.model, vae.guide, data, epochs=2, batch_size=batch_size, transform=datasets.binarize)
        histories.append(fitted.history)
    assert histories[0] == histories[1]


NO_TENSOR = "must be a function that returns a tensor for each data tensor, .*got "
NO_ROWS = r"must return one tensor for each data tensor, .*got tensors of \[{}\] rows for 1 tensors of \d+ rows"
MISFITS = {
    "fewer rows": (lambda x: x[:-1].float(), NO_ROWS.format(r"\d+")),
    "two tensors": (lambda x: (x.float(), x.float()), NO_ROWS.format(r"\d+, \d+")),
    "no tensor": (lambda x: (), NO_ROWS.format("")),
    "all rows for a batch": (lambda x: IDS.float(), NO_ROWS.format("20")),
    "None": (lambda x: None, NO_TENSOR + "None"),
    "a number": (lambda x: x.float().mean(), NO_TENSOR + "tensor"),
    "no function": ("binarize", NO_TENSOR + "'binarize'"),
}


@pytest.mark.parametrize(
    ("name", "batch_size"), [(name, size) for name in MISFITS for size in (None, 5) if size or "all" not in name]
)
def test_other_results_are_refused_before_the_first_step(name, batch_size):
    pair, (transform, message) = Pair(subsampled), MISFITS[name]
    with pytest.raises((ValueError, TypeError), match=f"`transform` {message}"):
        pv.fit(pair.model, pair.guide, IDS, epochs=1, batch_size=batch_size, transform=transform)
    assert pair.seen["model"] == []


@pytest.mark.parametrize("change", [torch.clone, torch.Tensor.double, lambda x: x[:]], ids=["copy", "double", "view"])
def test_a_model_that_subsamples_another_tensor_is_refused(change):
    """It would never get the transformed rows."""
    pair = Pair(lambda tensor: subsampled(change(tensor)))
    message = r"`transform` needs a model that reads every data tensor .*does not read tensor 0"
    with pytest.raises(ValueError, match=message):
        pv.fit(pair.model, pair.guide, IDS.float(), epochs=1, batch_size=5, transform=torch.Tensor.double)
    pyro.clear_param_store()
    pv.fit(pair.model, pair.guide, IDS.float(), epochs=1, transform=lambda x: x)  # all rows at once are right


def test_the_tensor_that_is_not_read_is_named():
    def model(x, y):
        with pyro.plate("data", len(x)):
            total = subsampled(x) + subsampled(y + 0)
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0).expand([2]).to_event(1), obs=total)

    data = (IDS.float(), IDS.float() + 1)
    with pytest.raises(ValueError, match=r"`transform` needs a model .*does not read tensor 1"):
        pv.fit(model, lambda x, y: None, data, epochs=1, batch_size=5, transform=lambda x, y: (x, y))


OTHERWISE = {
    "a copy": lambda x: subsampled(x.clone())[:, 0],
    "other units": lambda x: subsampled(x.float() / 255)[:, 0],
    "a sum": lambda x: pyro.subsample(x.sum(-1), event_dim=0),
    "the mean of all": lambda x: x.mean(0)[:1],
}


@pytest.mark.parametrize("reader", ["model", "guide", "guide that reads nothing else"])
@pytest.mark.parametrize("otherwise", OTHERWISE)
def test_a_pair_that_reads_data_without_the_transform_is_refused(otherwise, reader):
    def reading(x, owner):
        rows = 0.0 if "else" in reader and owner == "guide" else subsampled(x)
        return rows + OTHERWISE[otherwise](x)[:, None] if reader.startswith(owner) else rows

    def model(x):
        with pyro.plate("data", len(x)):
            x = reading(x, "model")
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 2]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.1)) * reading(x, "guide")[:, 0], 1.0))

    data, scaled = 100 * IDS.float(), lambda x: x / 100
    owner = reader.partition(" ")[0]
    with pytest.raises(ValueError, match=rf"`transform` needs a {owner} that reads its data with .* alone, got"):
        pv.fit(model, guide, data, epochs=1, batch_size=5, transform=scaled)
    pv.fit(model, guide, data, epochs=1, transform=scaled)  # all rows at once are right


IN_PLACE = {
    "a method": lambda x: x.div_(255),
    "an item": lambda x: x.__setitem__(0, 0.0) or x,
    "through a view": lambda x: x.view(-1).mul_(2).view_as(x),
    "and a new one": lambda x: x.add_(1) / 255,
}


@pytest.mark.parametrize("inference", [False, True], ids=["tensor", "inference"])
@pytest.mark.parametrize("change", IN_PLACE)
def test_a_transform_in_place_is_refused_before_it_changes_the_data(batch_size, change, inference):
    pair = Pair(subsampled)
    with torch.inference_mode(inference):
        data = IDS.float() + 1
    with pytest.raises(ValueError, match=r"`transform` must .*got one that changes its rows in place, and so the data"):
        pv.fit(pair.model, pair.guide, data, epochs=1, batch_size=batch_size, transform=IN_PLACE[change])
    assert torch.equal(data, IDS.float() + 1)
    assert pair.seen["model"] == []


def test_bytes_and_grey_values_where_0s_and_1s_are_wanted_are_refused(batch_size):
    vae = bernoulli_vae()
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"(?i)uint8|byte|unsigned char"):
        pv.fit(vae.model, vae.guide, GREY, epochs=1, batch_size=batch_size)
    with pytest.raises(ValueError, match="threshold the data"):
        pv.fit(vae.model, vae.guide, GREY, epochs=1, batch_size=batch_size, transform=datasets.grey)


X = torch.arange(10.0).reshape(5, 2)
INDEX = torch.tensor([4, 0, 2])


def read_rows(*tensors):
    with pyro.plate("data", 5):
        return tuple(subsampled(tensor) for tensor in tensors)


@pytest.mark.parametrize(
    ("index", "rows"),
    [(INDEX, torch.ones(3, 2)), (INDEX, torch.ones(3, 4, 7, dtype=torch.float64)), (torch.arange(5), -X)],
    ids=["some rows", "another type and shape", "all rows"],
)
def test_fixed_rows_replace_those_of_the_subsample(index, rows):
    twin = X.clone()
    with SubsampleRows("data", index), FixedSubsample([X], [rows]) as drawn:
        assert torch.equal(read_rows(twin)[0], twin[index])  # an equal tensor is another one
        assert drawn.read == [False]
        assert same(read_rows(X), [rows])
        assert drawn.read == [True]
    assert same(read_rows(X), [X])


def test_each_tensor_has_rows_of_its_own_and_is_counted():
    others = [X.clone(), X.clone()]
    rows = [torch.zeros(3, 2), torch.ones(3, 2), 2 * torch.ones(3, 2)]
    with SubsampleRows("data", INDEX), FixedSubsample([X, *others], rows) as drawn:
        assert same(read_rows(others[1], X), [rows[2], rows[0]])
        assert drawn.read == [True, False, True]


def test_densities_of_fixed_rows_are_scaled_to_all_data():
    def model(x):
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=subsampled(x))

    with SubsampleRows("data", torch.tensor([4, 0])), FixedSubsample([X], [torch.ones(2, 2)]):
        site = poutine.trace(model).get_trace(X).nodes["x"]
    assert site["scale"] == 2.5
    assert torch.equal(site["value"], torch.ones(2, 2))
