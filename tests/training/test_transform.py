"""What a transform makes of the rows of a step is what model and guide see, once, and the data stay as they were."""

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
    """A transform that notes what it was given and what it made of it: floats, with noise of each call's own."""

    def __init__(self):
        self.given = []
        self.made = []

    def __call__(self, *tensors):
        made = tuple(tensor.float() + 0.01 * torch.randn(tensor.shape) for tensor in tensors)
        self.given.append(tensors)
        self.made.append(made)
        return made[0] if len(made) == 1 else made


class Pair:
    """A model and an amortized guide that note what they see; ``read`` is how they take the rows of their plate."""

    def __init__(self, read):
        self.read = read
        self.seen = {"model": [], "guide": []}

    def model(self, *tensors):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(tensors[0])):
            tensors = self._note("model", tensors)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal((z + loc)[..., None], 1.0).expand([*z.shape, 2]).to_event(1), obs=tensors[-1])

    def guide(self, *tensors):
        slope = pyro.param("slope", torch.tensor(0.1))
        with pyro.plate("data", len(tensors[0])):
            tensors = self._note("guide", tensors)
            pyro.sample("z", dist.Normal(slope * tensors[0][:, 0] / 100, 1.0))

    def _note(self, who, tensors):
        tensors = tuple(self.read(tensor) for tensor in tensors)
        self.seen[who].append(tensors)
        return tensors


READINGS = {"subsampled": lambda tensor: pyro.subsample(tensor, event_dim=1), "sliced": lambda tensor: tensor}


@pytest.fixture(params=READINGS.values(), ids=READINGS.keys())
def pair(request):
    return Pair(request.param)


@pytest.fixture(params=[None, 8, 5], ids=["all rows", "batches of 8", "batches of 5"])
def batch_size(request):
    return request.param


@pytest.fixture(params=[1, 2], ids=["one tensor", "two tensors"])
def data(request):
    return (IDS, IDS + 100)[: request.param]


def steps_of(batch_size):
    return len(torch.arange(N).split(batch_size or N))


def bernoulli_vae(latent=2):
    torch.manual_seed(0)
    return pv.VAE(
        priors.StandardNormal(latent), guides.DiagonalNormal(D, latent, TANH), likelihoods.Bernoulli(latent, D, TANH)
    )


def same(ours, theirs):
    """Whether these are the very same tensors."""
    return len(ours) == len(theirs) and all(one is other for one, other in zip(ours, theirs, strict=True))


# --- Who sees what ---------------------------------------------------------------------------------------------------


def test_it_is_called_once_a_step(pair, batch_size, data):
    calls = []
    for epochs in (1, 4):
        recorder = Recorder()
        fitted = pv.fit(pair.model, pair.guide, data, epochs=epochs, batch_size=batch_size, transform=recorder)
        calls.append(len(recorder.given))
        assert fitted.steps == epochs * steps_of(batch_size)
    assert calls[1] - calls[0] == 3 * steps_of(batch_size)  # what is tried out before the first step is alike


def test_it_is_given_each_row_of_each_tensor_once_an_epoch(pair, batch_size, data):
    recorder = Recorder()
    pv.fit(pair.model, pair.guide, data, epochs=3, batch_size=batch_size, transform=recorder)
    steps = steps_of(batch_size)
    for epoch in (recorder.given[-steps:], recorder.given[-2 * steps : -steps]):
        for tensor, given in zip(data, zip(*epoch, strict=True), strict=True):
            assert all(rows.dtype == torch.uint8 for rows in given)
            rows = torch.cat(given)
            assert torch.equal(rows[rows[:, 0].argsort()], tensor)
    for first, *others in recorder.given:
        assert all(torch.equal(other, first + 100) for other in others), "rows of the tensors are not the same ones"


def test_it_is_given_the_validation_data_once(pair, batch_size, data):
    recorder, held_out = Recorder(), (HELD_OUT, HELD_OUT + 20)[: len(data)]
    pv.fit(
        pair.model, pair.guide, data, epochs=3, batch_size=batch_size, transform=recorder, validation=held_out
    )  # fmt: skip
    of_validation = [given for given in recorder.given if given[0][0, 0] >= 200]
    assert len(of_validation) == 1
    assert all(torch.equal(given, tensor) for given, tensor in zip(of_validation[0], held_out, strict=True))


def test_model_and_guide_see_what_it_made_and_the_same_of_it(pair, batch_size, data):
    recorder = Recorder()
    pv.fit(pair.model, pair.guide, data, epochs=2, batch_size=batch_size, transform=recorder)
    for made, model, guide in zip(
        recorder.made[-2 * steps_of(batch_size) :],
        pair.seen["model"][-2 * steps_of(batch_size) :],
        pair.seen["guide"][-2 * steps_of(batch_size) :],
        strict=True,
    ):
        assert same(model, made)
        assert same(guide, made)


def test_particles_of_a_step_see_the_same(pair):
    recorder = Recorder()
    elbo = Trace_ELBO(num_particles=3)
    pv.fit(pair.model, pair.guide, IDS, epochs=1, batch_size=5, transform=recorder, elbo=elbo)
    for step, made in enumerate(recorder.made[-4:]):
        runs = pair.seen["model"][-12:][3 * step : 3 * step + 3]
        assert all(same(run, made) for run in runs)


def test_a_plate_of_particles_leaves_the_rows_alone(pair):
    recorder = Recorder()
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    pv.fit(pair.model, pair.guide, IDS, epochs=1, batch_size=5, transform=recorder, elbo=elbo)
    assert all(same(*both) for both in zip(pair.seen["model"][-4:], recorder.made[-4:], strict=True))


def test_an_autoguide_goes_with_it():
    pair, recorder = Pair(READINGS["subsampled"]), Recorder()
    pv.fit(pair.model, AutoNormal(pair.model), IDS, epochs=1, batch_size=5, transform=recorder)
    assert all(same(*both) for both in zip(pair.seen["model"][-4:], recorder.made[-4:], strict=True))


@pytest.mark.parametrize("batch_size", [None, 5])
def test_one_tensor_in_two_roles_is_transformed_in_each(batch_size):
    """A denoising pair: the guide sees spoilt data, the model the data themselves."""
    pair = Pair(READINGS["subsampled"])

    def spoil_the_first(inputs, targets):
        return inputs.float() + 1000, targets.float()

    pv.fit(pair.model, pair.guide, (IDS, IDS), epochs=1, batch_size=batch_size, transform=spoil_the_first)
    inputs, targets = pair.seen["model"][-1]
    assert torch.equal(inputs, targets + 1000)


# --- What comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elbo", [None, Trace_ELBO(num_particles=2)], ids=["default", "two particles"])
def test_training_on_bytes_is_training_on_what_they_are_transformed_to(batch_size, elbo):
    ours, theirs = bernoulli_vae(), bernoulli_vae()
    held_out = 255 - GREY[:7]
    options = {"epochs": 5, "batch_size": batch_size, "lr": 1e-2, "elbo": elbo, "seed": 4}
    fitted = pv.fit(ours.model, ours.guide, GREY, transform=datasets.binarize, validation=held_out, **options)
    binary, binary_held_out = datasets.binarize(GREY), datasets.binarize(held_out)
    expected = pv.fit(theirs.model, theirs.guide, binary, validation=binary_held_out, **options)
    assert fitted.history == expected.history
    for ours_now, theirs_now in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours_now, theirs_now)


def test_enumerated_latents_go_with_it(batch_size):
    def vae():
        torch.manual_seed(0)
        return pv.VAE(priors.Bernoulli(2), guides.Bernoulli(D, 2, TANH), likelihoods.Bernoulli(2, D, TANH))

    histories = []
    for x, transform in ((GREY, datasets.binarize), (datasets.binarize(GREY), None)):
        ours, elbo = vae(), TraceEnum_ELBO(max_plate_nesting=1)
        guide = config_enumerate(ours.guide)
        fitted = pv.fit(ours.model, guide, x, epochs=3, batch_size=batch_size, elbo=elbo, transform=transform)
        histories.append(fitted.history)
    assert histories[0] == histories[1]


def pixelwise(read):
    """Bernoulli pixels with a logit each, and nothing latent."""

    def model(x):
        logits = pyro.param("logits", torch.linspace(-1, 1, D))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=read(x))

    return model


@pytest.mark.parametrize("kind", ["enumerated", "particles"])
def test_plates_that_the_elbo_finds_out_are_those_of_the_transformed_data(batch_size, kind):
    """Pyro counts them in a first run, which is given the data as they are: bytes."""

    def fitted(x, transform, **nesting):
        torch.manual_seed(0)
        if kind == "enumerated":
            vae = pv.VAE(priors.Bernoulli(2), guides.Bernoulli(D, 2, TANH), likelihoods.Bernoulli(2, D, TANH))
            elbo, guide = TraceEnum_ELBO(**nesting), config_enumerate(vae.guide)
        else:
            vae = bernoulli_vae()
            elbo, guide = Trace_ELBO(num_particles=3, vectorize_particles=True, **nesting), vae.guide
        return pv.fit(vae.model, guide, x, epochs=3, batch_size=batch_size, elbo=elbo, transform=transform).history

    ours = fitted(GREY, datasets.binarize)
    assert ours == fitted(GREY, datasets.binarize, max_plate_nesting=1)
    assert ours == fitted(datasets.binarize(GREY), None, max_plate_nesting=1)


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS.keys())
@pytest.mark.parametrize("size", [None, 5])
def test_resampled_data_give_the_elbo_of_the_grey_values_in_expectation(read, size):
    fitted = pv.fit(
        pixelwise(read), lambda x: None, GREY, epochs=1000, batch_size=size, lr=1e-12, transform=datasets.resample
    )
    elbos = np.array(fitted.history["elbo"])
    log_probs = torch.nn.functional.logsigmoid(torch.stack([torch.linspace(-1, 1, D), torch.linspace(1, -1, D)]))
    grey = datasets.grey(GREY)
    expected = (grey @ log_probs[0] + (1 - grey) @ log_probs[1]).mean().item()
    assert abs(elbos.mean() - expected) < SIGMAS * elbos.std() / len(elbos) ** 0.5
    # Drawn anew for each row and each epoch: pixel by pixel the variances add up.
    variance = (torch.linspace(-1, 1, D) ** 2 * grey * (1 - grey)).sum().item() / N**2
    assert abs(elbos.var() / variance - 1) < SIGMAS * (2 / len(elbos)) ** 0.5


@pytest.mark.parametrize("size", [None, 5])
def test_resampled_data_teach_the_mean_grey_of_each_pixel(size):
    model = pixelwise(READINGS["subsampled"])
    for lr in (0.1, 0.01, 0.001):
        pv.fit(model, lambda x: None, GREY, epochs=300, batch_size=size, lr=lr, transform=datasets.resample)
    learned, expected = pyro.param("logits").sigmoid(), datasets.grey(GREY).mean(0)
    # Adam at 0.001 averages hundreds of steps, each of N = 20 pixels: the noise left is about 0.5 / (20 * 100)**0.5.
    assert (learned - expected).abs().max() < SIGMAS * 0.5 / (N * 100) ** 0.5


@pytest.mark.parametrize("size", [None, 5])
def test_held_out_data_are_resampled_once_and_change_nothing(size):
    histories = []
    for held_out in (None, GREY[:4]):
        vae = bernoulli_vae()
        fitted = pv.fit(
            vae.model, vae.guide, GREY, epochs=4, batch_size=size, transform=datasets.resample, validation=held_out
        )
        histories.append(fitted.history)
    assert {name: histories[1][name] for name in histories[0]} == histories[0]
    fitted = pv.fit(
        pixelwise(READINGS["subsampled"]), lambda x: None, GREY, epochs=4, batch_size=size, lr=1e-12,
        transform=datasets.resample, validation=GREY,
    )  # fmt: skip
    assert len(set(fitted.history["elbo"])) == 4
    assert len(set(fitted.history["validation_elbo"])) == 1


def test_one_seed_gives_one_run_and_another_other_draws(batch_size):
    histories = []
    for seed in (1, 1, 2):
        pyro.clear_param_store()
        model = pixelwise(READINGS["sliced"])
        fitted = pv.fit(
            model, lambda x: None, GREY, epochs=3, batch_size=batch_size, seed=seed, transform=datasets.resample
        )
        histories.append(fitted.history["elbo"])
    assert histories[0] == histories[1]
    assert not set(histories[0]) & set(histories[2])


def test_the_data_and_the_users_random_streams_are_as_before(batch_size, random_states):
    vae, data = bernoulli_vae(), GREY.clone()
    before = random_states()
    pv.fit(
        vae.model, vae.guide, data, epochs=2, batch_size=batch_size, transform=datasets.resample, validation=data
    )  # fmt: skip
    assert random_states() == before
    assert data.dtype == torch.uint8
    assert torch.equal(data, GREY)


def test_tensors_of_inference_mode_go_with_it(batch_size):
    with torch.inference_mode():
        data = GREY / 255
    histories = []
    for x in (data, GREY / 255):
        vae = bernoulli_vae()
        fitted = pv.fit(vae.model, vae.guide, x, epochs=2, batch_size=batch_size, transform=datasets.binarize)
        histories.append(fitted.history)
    assert histories[0] == histories[1]


# --- What is refused -------------------------------------------------------------------------------------------------

MISFITS = {
    "fewer rows": (
        lambda x: x[:-1].float(),
        r"`transform` must .*got tensors of \[\d+\] rows for 1 tensors of \d+ rows",
    ),
    "two tensors": (
        lambda x: (x.float(), x.float()),
        r"`transform` must .*got tensors of \[\d+, \d+\] rows for 1 tensors of \d+ rows",
    ),
    "no tensor": (lambda x: (), r"`transform` must .*got tensors of \[\] rows for 1 tensors of \d+ rows"),
    "nothing": (lambda x: None, "`transform` must be a function"),
    "a number": (lambda x: x.float().mean(), "`transform` must be a function"),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("size", [None, 5])
def test_other_tensors_than_it_was_given_are_refused_before_the_first_step(size, misfit):
    pair, (transform, message) = Pair(READINGS["subsampled"]), MISFITS[misfit]
    with pytest.raises((ValueError, TypeError), match=message):
        pv.fit(pair.model, pair.guide, IDS, epochs=1, batch_size=size, transform=transform)
    assert pair.seen["model"] == []


def test_a_transform_that_fits_all_rows_but_not_a_batch_is_refused():
    pair = Pair(READINGS["subsampled"])
    with pytest.raises(ValueError, match=r"`transform` must .*got tensors of \[20\] rows for 1 tensors of 5 rows"):
        pv.fit(pair.model, pair.guide, IDS, epochs=1, batch_size=5, transform=lambda x: IDS.float())


def test_what_is_no_function_is_refused():
    pair = Pair(READINGS["subsampled"])
    with pytest.raises(TypeError, match="`transform` must be a function"):
        pv.fit(pair.model, pair.guide, IDS, epochs=1, transform="binarize")


@pytest.mark.parametrize(
    "change", [torch.clone, torch.Tensor.double, lambda x: x[:]], ids=["copy", "another type", "view"]
)
def test_a_model_that_subsamples_something_else_is_refused(change):
    """It would never see the transformed rows."""
    pair = Pair(lambda tensor: pyro.subsample(change(tensor), event_dim=1))
    with pytest.raises(
        ValueError, match="`transform` needs a model that reads every data tensor .*does not read tensor 0"
    ):
        pv.fit(pair.model, pair.guide, IDS.float(), epochs=1, batch_size=5, transform=torch.Tensor.double)
    pyro.clear_param_store()
    pv.fit(pair.model, pair.guide, IDS.float(), epochs=1, transform=lambda x: x)  # all rows at once are right


OTHERWISE = {
    "a copy": lambda x: pyro.subsample(x.clone(), event_dim=1)[:, 0],
    "other units": lambda x: pyro.subsample(x.float() / 255, event_dim=1)[:, 0],
    "a sum": lambda x: pyro.subsample(x.sum(-1), event_dim=0),
    "the mean of all": lambda x: x.mean(0)[:1],
}


@pytest.mark.parametrize("who", ["model", "guide"])
@pytest.mark.parametrize("otherwise", OTHERWISE)
def test_who_reads_some_data_otherwise_is_refused_and_named(otherwise, who):
    """Beside the rows that are transformed it would see others that are not, and train on both."""

    def reading(x, reader):
        rows = pyro.subsample(x, event_dim=1)
        return rows + OTHERWISE[otherwise](x)[:, None] if reader == who else rows

    def model(x):
        with pyro.plate("data", len(x)):
            x = reading(x, "model")
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 2]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.1)) * reading(x, "guide")[:, 0], 1.0))

    data, scaled = 100 * IDS.float(), lambda x: x / 100
    with pytest.raises(ValueError, match=rf"`transform` needs a {who} that reads its data with .* alone, got"):
        pv.fit(model, guide, data, epochs=1, batch_size=5, transform=scaled)
    pv.fit(model, guide, data, epochs=1, transform=scaled)  # all rows at once are right


def test_a_guide_that_sees_nothing_of_the_transform_is_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.subsample(x / 255, event_dim=1)[:, 0], 1.0))

    pair = Pair(READINGS["subsampled"])
    with pytest.raises(ValueError, match="`transform` needs a guide that reads its data with .* alone, got"):
        pv.fit(pair.model, guide, IDS, epochs=1, batch_size=5, transform=lambda x: x.float())


IN_PLACE = {
    "a method": lambda x: x.div_(255),
    "an item": lambda x: x.__setitem__(0, 0.0) or x,
    "through a view": lambda x: x.view(-1).mul_(2).view_as(x),
    "and a new one": lambda x: x.add_(1) / 255,
}


@pytest.mark.parametrize("mode", [torch.inference_mode(False), torch.inference_mode(True)], ids=["tensor", "inference"])
@pytest.mark.parametrize("change", IN_PLACE)
def test_a_transform_in_place_is_refused_before_it_touches_the_data(batch_size, change, mode):
    pair = Pair(READINGS["subsampled"])
    with mode:
        data = IDS.float() + 1
    with pytest.raises(ValueError, match="`transform` must .*got one that changes its rows in place, and so the data"):
        pv.fit(pair.model, pair.guide, data, epochs=1, batch_size=batch_size, transform=IN_PLACE[change])
    assert torch.equal(data, IDS.float() + 1)
    assert pair.seen["model"] == []


def test_the_tensor_that_is_not_read_is_named():
    def model(x, y):
        with pyro.plate("data", len(x)):
            x, y = pyro.subsample(x, event_dim=1), pyro.subsample(y + 0, event_dim=1)
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0).expand([2]).to_event(1), obs=x + y)

    data = (IDS.float(), IDS.float() + 1)
    with pytest.raises(ValueError, match="`transform` needs a model .*does not read tensor 1"):
        pv.fit(model, lambda x, y: None, data, epochs=1, batch_size=5, transform=lambda x, y: (x, y))


def test_bytes_without_a_transform_are_refused_by_their_type(batch_size):
    vae = bernoulli_vae()
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"(?i)uint8|byte|unsigned char"):
        pv.fit(vae.model, vae.guide, GREY, epochs=1, batch_size=batch_size)


def test_grey_values_where_0s_and_1s_are_wanted_are_refused(batch_size):
    vae = bernoulli_vae()
    with pytest.raises(ValueError, match="threshold the data"):
        pv.fit(vae.model, vae.guide, GREY, epochs=1, batch_size=batch_size, transform=datasets.grey)


# --- The handler -----------------------------------------------------------------------------------------------------

X = torch.arange(10.0).reshape(5, 2)


def reader(*tensors, event_dim=1):
    with pyro.plate("data", 5):
        return tuple(pyro.subsample(tensor, event_dim=event_dim) for tensor in tensors)


def test_drawn_rows_take_the_place_of_the_subsample():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    with SubsampleRows("data", torch.tensor([4, 0, 2])), FixedSubsample([X], [rows]) as drawn:
        assert not any(drawn.read)
        assert same(reader(X), [rows])
        assert drawn.read == [True]


def test_drawn_rows_may_be_of_another_type_and_shape():
    rows = torch.ones(3, 4, 7, dtype=torch.float64)
    with SubsampleRows("data", torch.tensor([4, 0, 2])), FixedSubsample([X], [rows]):
        assert same(reader(X), [rows])


def test_only_the_very_tensor_is_replaced():
    rows, index = -torch.ones(3, 2), torch.tensor([4, 0, 2])
    twin = X.clone()
    with SubsampleRows("data", index), FixedSubsample([X], [rows]) as drawn:
        (left,) = reader(twin)
        assert drawn.read == [False]
    assert torch.equal(left, twin[index])


def test_each_tensor_has_rows_of_its_own_and_is_counted():
    others = [X.clone(), X.clone()]
    rows = [torch.zeros(3, 2), torch.ones(3, 2), 2 * torch.ones(3, 2)]
    with SubsampleRows("data", torch.tensor([4, 0, 2])), FixedSubsample([X, *others], rows) as drawn:
        assert same(reader(others[1], X), [rows[2], rows[0]])
        assert drawn.read == [True, False, True]


def test_all_rows_are_drawn_as_well_as_some():
    rows = -X
    with SubsampleRows("data", torch.arange(5)), FixedSubsample([X], [rows]):
        assert same(reader(X), [rows])


def test_densities_are_scaled_to_all_data_as_without():
    def model(x):
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=pyro.subsample(x, event_dim=1))

    with SubsampleRows("data", torch.tensor([4, 0])), FixedSubsample([X], [torch.ones(2, 2)]):
        site = poutine.trace(model).get_trace(X).nodes["x"]
    assert site["scale"] == 2.5
    assert torch.equal(site["value"], torch.ones(2, 2))


def test_outside_the_handler_all_is_as_before():
    with FixedSubsample([X], [torch.ones(3, 2)]):
        pass
    assert same(reader(X), [X])
