"""Training on several ranks compared with one process."""

import math
import warnings
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from given_noise import Noise
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from ranks import run_on_ranks
from torch import nn
from torch.utils.data import Dataset

import pyro_vae as pv
from pyro_vae import parallel
from pyro_vae._utils.rng import seeded
from pyro_vae.training import gradient_sum

ROWS = 37


class Uniform(dist.Bernoulli):
    """A Bernoulli distribution whose draws come from given uniform numbers."""

    def __init__(self, probs, noise):
        self.noise = noise
        super().__init__(probs=probs, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Uniform(self.probs.expand(batch_shape), self.noise)

    def sample(self, sample_shape=()):
        return (self.noise < self.probs).to(self.probs.dtype)


class Pair(nn.Module):
    """A model with a local and a global latent, whose guide draws from the noise in the data."""

    def __init__(self, global_noise=0.3, discrete=False, infer=None):
        super().__init__()
        with seeded(1):
            self.encoder, self.decoder = nn.Linear(2, 2), nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2))
        self.shift = nn.Parameter(torch.tensor([0.1, -1.0]))
        self.global_noise, self.discrete, self.infer = global_noise, discrete, infer or {}

    def model(self, x, noise):
        pv.handlers.register("pair", self)
        shift = 0.0 if self.global_noise is None else pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", ROWS):
            x = pyro.subsample(x, event_dim=1)
            prior = dist.Bernoulli(0.5) if self.discrete else dist.Normal(0.0, 1.0)
            z = pyro.sample("z", prior, infer=self.infer)
            pyro.sample("x", dist.Normal(self.decoder(z[..., None]) + shift, 0.5).to_event(1), obs=x)

    def guide(self, x, noise):
        pv.handlers.register("pair", self)
        if self.global_noise is not None:
            pyro.sample("shift", Noise(self.shift[0], self.shift[1].exp(), torch.tensor(self.global_noise)))
        with pyro.plate("data", ROWS):
            x, noise = pyro.subsample(x, event_dim=1), pyro.subsample(noise, event_dim=0)
            loc, scale = self.encoder(x).unbind(-1)
            normal = Noise(loc, scale.exp(), torch.special.ndtri(noise))
            pyro.sample("z", Uniform(loc.sigmoid(), noise) if self.discrete else normal, infer=self.infer)


def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(ROWS, 2, generator=generator), torch.rand(ROWS, generator=generator) * 0.98 + 0.01


def trained(pair, **options):
    pyro.clear_param_store()
    options = {"epochs": 4, "batch_size": 10, "lr": 1e-2, "compile": False} | options
    fitted = pv.fit(pair.model, pair.guide, data(), **options)
    state = {name: tensor.detach().clone() for name, tensor in pair.state_dict().items()}
    return state, dict(fitted.history), fitted.steps, fitted.stopped


class SmallBuckets:
    """Buckets of a few numbers, so that several of them begin while the backward pass goes on."""

    def __enter__(self):
        self.before, gradient_sum._BUCKET = gradient_sum._BUCKET, 4

    def __exit__(self, *exception):
        gradient_sum._BUCKET = self.before


def in_small_buckets(**options):
    with SmallBuckets():
        return trained(Pair(), **options)


def held_out():
    return {"validation": tuple(tensor[:20] for tensor in data()), "patience": 3}


def frozen_after_five(pair):
    def freeze(epoch):
        if epoch.number == 5:
            pair.decoder.requires_grad_(False)

    return freeze


def with_a_callback_that_freezes():
    pair = Pair()
    return trained(pair, callbacks=[frozen_after_five(pair)], epochs=8)


SAME_NOISE = {
    "eager": lambda: trained(Pair(), epochs=25),
    "replayed": lambda: trained(Pair(), compile=None, epochs=25),
    "clipped": lambda: trained(Pair(), clip_norm=1.0, elbo=TraceGraph_ELBO()),
    "small buckets": in_small_buckets,
    "small buckets, two backward passes": lambda: in_small_buckets(elbo=Trace_ELBO(num_particles=2)),
    "small buckets, replayed": lambda: in_small_buckets(compile=None, epochs=15),
    "mean field": lambda: trained(Pair(None), elbo=TraceMeanField_ELBO()),
    "score function": lambda: trained(Pair(None, True)),
    "a baseline with running averages": lambda: trained(
        Pair(None, True), elbo=pv.objectives.ScoreFunction(pv.baselines.RunningAverage(), name="baseline")
    ),
    "enumeration": lambda: trained(Pair(discrete=True, infer={"enumerate": "parallel"}), elbo=TraceEnum_ELBO()),
    "importance-weighted": lambda: trained(Pair(None), elbo=pv.objectives.ImportanceWeighted(3)),
    "fewer rows than ranks": lambda: trained(Pair(), batch_size=2, epochs=1),
    "all rows in a batch": lambda: trained(Pair(), batch_size=None, epochs=15),
    "a schedule": lambda: trained(Pair(), lr=pv.schedules.decayed(1e-2)),
    "momentum": lambda: trained(Pair(), optimizer=torch.optim.AdamW, clip_norm=100.0),
    "a callback on rank 0 that freezes": with_a_callback_that_freezes,
}  # fmt: skip


ON_THREE = ("eager", "replayed", "small buckets", "fewer rows than ranks", "all rows in a batch")


def run_same_noise(names):
    return {name: SAME_NOISE[name]() for name in names}


@pytest.fixture(scope="module")
def one_process():
    with pyro.get_param_store().scope():
        return run_same_noise(SAME_NOISE)


@pytest.fixture(scope="module")
def on_ranks():
    return {2: run_on_ranks(run_same_noise, 2, SAME_NOISE.keys()), 3: run_on_ranks(run_same_noise, 3, ON_THREE)}


@pytest.mark.parametrize(("size", "case"), [*((2, case) for case in SAME_NOISE), *((3, case) for case in ON_THREE)])
def test_with_the_noise_of_one_process_parameters_are_those_of_one_process(one_process, on_ranks, size, case):
    state, history, steps, stopped = one_process[case]
    for found in on_ranks[size]:
        theirs, their_history, their_steps, why = found[case]
        assert (their_steps, why) == (steps, stopped)
        for name, tensor in state.items():
            assert torch.allclose(theirs[name], tensor, rtol=0, atol=1e-5), (name, theirs[name] - tensor)
        assert their_history.keys() == history.keys()
        for name, values in history.items():
            assert their_history[name] == pytest.approx(values, abs=1e-4)


class Drawn(nn.Module):
    """A pair that draws its own noise, with a record of the draws of each latent, and faults of one rank."""

    def __init__(self, fault=None, at=math.inf, records=True, width=1):
        super().__init__()
        with seeded(1):
            self.encoder, self.decoder = nn.Linear(2, 2), nn.Sequential(nn.Linear(1, width), nn.Linear(width, 2))
        self.loc = nn.Parameter(torch.zeros(()))
        self.fault, self.at, self.records = fault, at, records
        self.calls, self.shifts, self.draws = 0, [], []

    def model(self, x):
        pv.handlers.register("drawn", self)
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", ROWS):
            x = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.decoder(z[..., None]) + shift, 0.5).to_event(1), obs=x)

    def guide(self, x):
        pv.handlers.register("drawn", self)
        self.calls += self.records
        loc = self.loc
        if self.calls >= self.at and parallel.rank() == 1:
            if self.fault == "raises":
                raise LookupError("a fault of the guide")
            loc = loc * math.nan if self.fault == "is nan" or self.calls == self.at else loc
        shift = pyro.sample("shift", dist.Normal(loc, 0.3))
        with pyro.plate("data", ROWS):
            x = pyro.subsample(x, event_dim=1)
            loc, scale = self.encoder(x).unbind(-1)
            z = pyro.sample("z", dist.Normal(loc, scale.exp()))
        if self.records:
            self.shifts.append(shift.item())
            self.draws.append(z.detach())


class Transform:
    """A transform of the rows that fails at one of its calls, on rank 1."""

    def __init__(self, at):
        self.calls, self.at = 0, at

    def __call__(self, x):
        self.calls += 1
        if self.calls == self.at and parallel.rank() == 1:
            raise LookupError("a fault of the transform")
        return x + 0.0


def fitted(pair, **options):
    pyro.clear_param_store()
    options = {"epochs": 5, "batch_size": 10, "lr": 1e-2, "compile": None} | options
    return pv.fit(pair.model, pair.guide, data()[0], **options)


def error_of(run):
    """The error of a run on this rank, after which the ranks must still understand each other."""
    try:
        run()
    except Exception as error:
        return type(error).__name__, str(error), parallel.num_ranks()
    return "no error", "", 0


def fault_of_a_callback(epoch):
    if epoch.number == 2 and parallel.rank() == 0:
        raise LookupError("a fault of the callback")


def fault_of_a_schedule(step):
    if step >= 50 and parallel.rank() == 1:
        raise LookupError("a fault of the schedule")
    return 1e-2


def changes_python(pair):
    def change(epoch):
        pair.at = epoch.number

    return change


ERRORS = {
    "a guide": lambda: fitted(Drawn("raises", 15)),
    "a guide, eager": lambda: fitted(Drawn("raises", 15), compile=False),
    "a guide in the first run": lambda: fitted(Drawn("raises", 1)),
    "a transform": lambda: fitted(Drawn(), transform=Transform(15)),
    "a transform in the checks": lambda: fitted(Drawn(), transform=Transform(1)),
    "a callback on rank 0": lambda: fitted(Drawn(), callbacks=[fault_of_a_callback]),
    "a callback on all": lambda: fitted(Drawn(), callbacks=[parallel.on_every_rank(fault_of_a_callback)]),
    "a learning rate": lambda: fitted(Drawn(), lr=fault_of_a_schedule),
    "not finite": lambda: fitted(Drawn("is nan", 15), compile=False),
    "a hundred in a row": lambda: fitted(Drawn("is nan", 15), compile=False, nonfinite="skip", epochs=200),
    "another seed": lambda: fitted(Drawn(), seed=parallel.rank()),
    "other data": lambda: pv.fit(
        Drawn().model, Drawn().guide, data()[0] + parallel.rank(), epochs=1, batch_size=10
    ),
    "another model": lambda: fitted(Drawn(width=1 + parallel.rank())),
    "a change of Python on rank 0": lambda: (pair := Drawn()) and fitted(pair, callbacks=[changes_python(pair)]),
    "a joint bound": lambda: fitted(Drawn(), elbo=pv.objectives.ImportanceWeighted(3)),
    "an average over the batch": lambda: trained(Pair(None), elbo=pv.objectives.FreeBits(0.1)),
}  # fmt: skip


class Weighted(nn.Module):
    """A pair with a weight outside of parameters, a counter, running averages, and a parameter that comes late."""

    def __init__(self, late=False, counts=False, assigns=False):
        super().__init__()
        with seeded(1):
            self.encoder, self.decoder = nn.Linear(2, 2), nn.Linear(1, 2)
        self.late, self.counts, self.assigns, self.calls = late, counts, assigns, 0
        self.beta = {"value": torch.tensor(1.0)}
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def model(self, x):
        pv.handlers.register("weighted", self)
        with pyro.plate("data", ROWS):
            x = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = self.decoder(z[..., None])
            if self.late and self.calls > 20:
                mean = mean + pyro.param("late", lambda: torch.randn(2))
            if self.training:
                if self.assigns:
                    self.average = 0.9 * self.average + 0.1 * x.mean(0)
                else:
                    self.average.mul_(0.9).add_(0.1 * x.mean(0))
                self.seen += len(x) if self.counts else 1
            pyro.sample("x", dist.Normal(mean, 0.5 * self.beta["value"]).to_event(1), obs=x)

    def guide(self, x):
        pv.handlers.register("weighted", self)
        self.calls += 1
        with pyro.plate("data", ROWS):
            x = pyro.subsample(x, event_dim=1)
            loc, scale = self.encoder(x).unbind(-1)
            pyro.sample("z", dist.Normal(loc, scale.exp()))

    def anneals(self, epoch):
        self.beta["value"].mul_(0.9)

    def anneals_in_place_of(self, epoch):
        self.beta["value"] = self.beta["value"] * 0.9

    def replaces(self, epoch):
        self.decoder.bias = nn.Parameter(torch.zeros(2))


class Noisy(torch.optim.SGD):
    """An optimizer that adds noise, as Langevin dynamics does."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(0.01 * torch.randn_like(parameter))


def weighted(callback=None, on_all=False, **options):
    pair = Weighted(**{name: options.pop(name) for name in ("late", "counts", "assigns") if name in options})
    if callback is not None:
        method = getattr(pair, callback)
        options["callbacks"] = [parallel.on_every_rank(method) if on_all else method]
    fitted(pair, compile=False, **options)
    late = [pyro.param("late").detach()] if "late" in pyro.get_param_store() else []
    return torch.cat([*(one.detach().flatten() for one in (*pair.parameters(), pair.average, *late))]), int(pair.seen)


def flat(run):
    return torch.cat([one.flatten() for one in run[0].values()]), run[2]


def of_rank_0():
    seen = []
    fitted(Drawn(), callbacks=[seen.append] if parallel.rank() == 0 else [])
    return len(seen)


ERRORS |= {
    "a weight in place": lambda: weighted("anneals"),
    "another weight": lambda: weighted("anneals_in_place_of"),
    "another parameter": lambda: weighted("replaces"),
    "a count of rows": lambda: weighted(counts=True),
    "other callbacks": lambda: fitted(Drawn(), callbacks=[of_rank_0] * (2 - parallel.rank())),
}
SAME = {
    "a weight on all": lambda: weighted("anneals", on_all=True),
    "a parameter that comes late": lambda: weighted(late=True, epochs=10),
    "averages in place": weighted,
    "averages that are assigned": lambda: weighted(assigns=True),
    "an optimizer that draws": lambda: weighted(optimizer=Noisy, lr=1e-5),
    "a decaying average for each row, and a callback": lambda: flat(
        trained(
            Pair(None, True, {"baseline": {"use_decaying_avg_baseline": True}}),
            batch_size=None,
            epochs=10,
            elbo=TraceGraph_ELBO(),
            callbacks=[lambda epoch: None],
        )
    ),
    "a callback of rank 0 by rank": lambda: (torch.zeros(1), min(1, of_rank_0() + parallel.rank())),
}


def run_with_faults():
    found = {name: error_of(run) for name, run in ERRORS.items()} | {name: run() for name, run in SAME.items()}
    pair = Drawn("is nan once", 15)
    skipped = fitted(pair, compile=False, nonfinite="skip", epochs=15)
    found["skipped"] = skipped.skipped, skipped.steps, dict(skipped.history), pair.loc.item()
    for name, compile, records in (("eager", False, True), ("replayed", None, False)):
        pair = Drawn(records=records)
        run = fitted(pair, compile=compile, epochs=15)
        state = torch.cat([one.detach().flatten() for one in pair.parameters()])
        found[name] = state, dict(run.history), pair.shifts, pair.draws, run.engine
    return found


@pytest.fixture(scope="module")
def with_faults():
    return run_on_ranks(run_with_faults, 3)


MESSAGES = {
    "a guide": ("LookupError", "a fault of the guide"),
    "a guide, eager": ("LookupError", "a fault of the guide"),
    "a guide in the first run": ("LookupError", "a fault of the guide"),
    "a transform": ("LookupError", "a fault of the transform"),
    "a transform in the checks": ("LookupError", "a fault of the transform"),
    "a callback on rank 0": ("LookupError", "a fault of the callback"),
    "a callback on all": ("LookupError", "a fault of the callback"),
    "a learning rate": ("LookupError", "a fault of the schedule"),
    "not finite": ("FloatingPointError", "rank 1: "),
    "a hundred in a row": ("FloatingPointError", "100th in a row"),
    "another seed": ("ValueError", "`seed` must be the same on every rank, got 0 on rank 0 and 1 on rank 1"),
    "other data": ("ValueError", "`data` must be the same on every rank"),
    "another model": ("ValueError", "must be the same on every rank"),
    "a change of Python on rank 0": ("ValueError", "`callbacks` must not change 'Drawn.at' on rank 0 alone"),
    "a weight in place": ("ValueError", "`callbacks` must not change"),
    "another weight": ("ValueError", "`callbacks` must not change"),
    "another parameter": ("ValueError", "`callbacks` must not change 'decoder.bias' on rank 0 alone"),
    "a count of rows": ("ValueError", "`seen` must be the same on every rank"),
    "other callbacks": ("ValueError", "`callbacks` must be the same on every rank"),
    "a joint bound": ("ValueError", "`elbo` must be a sum over the rows"),
    "an average over the batch": ("ValueError", "`elbo` must be a sum over the rows"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_fails_on_one_rank_is_an_error_of_all_and_the_next_run_works(with_faults, case):
    kind, message = MESSAGES[case]
    for found in with_faults:
        name, text, size = found[case]
        assert (name, size) == (kind, 3)
        assert message in text


@pytest.mark.parametrize("case", SAME)
def test_ranks_stay_alike(with_faults, case):
    (first, count), *others = (found[case] for found in with_faults)
    for tensor, number in others:
        assert torch.equal(tensor, first)
        assert number == count


def test_running_averages_do_not_depend_on_how_a_buffer_is_written(with_faults):
    in_place, assigned = (with_faults[0][name][0] for name in ("averages in place", "averages that are assigned"))
    assert torch.equal(in_place, assigned)
    assert in_place[-2:].abs().min() > 0


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(with_faults):
    assert len({str(found["skipped"]) for found in with_faults}) == 1
    skipped, steps, history, loc = with_faults[0]["skipped"]
    assert (skipped, steps) == (1, 60)
    assert math.isfinite(loc)
    assert all(map(math.isfinite, history["elbo"]))


def test_latents_outside_the_plate_are_the_same_on_all_ranks_and_others_are_not(with_faults):
    first, second, third = (found["eager"] for found in with_faults)
    assert first[2][-50:] == second[2][-50:] == third[2][-50:]
    assert len({*first[2][-50:]}) == 50
    pairs = zip(first[3][-50:], second[3][-50:], strict=True)
    assert not any(torch.equal(ours[:3], theirs[:3]) for ours, theirs in pairs)


def test_replayed_steps_on_ranks_have_the_bits_of_eager_ones(with_faults):
    for found in with_faults:
        assert found["replayed"][4].startswith("replayed")
        assert torch.equal(found["eager"][0], found["replayed"][0])
        assert found["eager"][1] == found["replayed"][1]
        assert torch.equal(found["eager"][0], with_faults[0]["eager"][0])


def running_averages(compile, batch_size=10):
    pyro.clear_param_store()
    pair = Pair()
    with seeded(2):
        pair.decoder = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    pv.fit(pair.model, pair.guide, data(), epochs=1, batch_size=batch_size, lr=1e-2, compile=compile)
    norm = pair.decoder[1]
    return norm.running_mean, norm.running_var, norm.num_batches_tracked


@pytest.mark.parametrize("compile", [False, None])
def test_running_averages_of_batch_normalisation_are_alike_on_all_ranks(compile):
    (mean, variance, count), *others = run_on_ranks(running_averages, 3, compile)
    assert count == 4
    assert mean.abs().sum() > 0
    for found in others:
        assert all(map(torch.equal, found, (mean, variance, count)))


def with_few_rows_left():
    return [running_averages(False, batch_size)[0] for batch_size in (35, 34)]


def test_a_last_batch_of_two_or_three_rows_is_normalised_as_a_whole():
    first, second = run_on_ranks(with_few_rows_left, 2)
    assert all(map(torch.equal, first, second))


# All rows in a batch, which ranks cannot share


def normal(x):
    loc, scale = (
        pyro.sample("loc", dist.Normal(torch.zeros(2), 5.0).to_event(1)),
        pyro.sample("scale", dist.Gamma(2, 2)),
    )
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=pyro.subsample(x, event_dim=1))


def without_plate(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(2))
    pyro.sample("x", dist.Normal(z, 0.5).to_event(2), obs=x)


def whole(model, guide, *arguments, **options):
    """History and parameters of a run, and its warnings of ranks."""
    pyro.clear_param_store()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fitted = pv.fit(model, guide, *arguments, **{"epochs": 5, "lr": 1e-2, "compile": False} | options)
    texts = [str(one.message) for one in found if "rank 0 computes the steps alone" in str(one.message)]
    return dict(fitted.history), {name: one.detach().clone() for name, one in pyro.get_param_store().items()}, texts


def whole_with(pair, **options):
    return whole(pair.model, pair.guide, data()[0], **options)


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        with seeded(1):
            self.encoder, self.decoder = nn.Linear(2, 2), nn.Linear(1, 2)

    def model(self, x):
        pv.handlers.register("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pv.handlers.register("vae", self)
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


class Table(Dataset):
    """Rows that are read on demand, of which not all are checked before training."""

    def __len__(self):
        return 300

    def __getitem__(self, row):
        return data()[0][row % ROWS]


WHOLE = {
    "an autoguide of global latents": lambda: whole(normal, AutoNormal(normal), data()[0]),
    "replayed": lambda: whole(normal, AutoNormal(normal), data()[0], compile=None, epochs=60),
    "a data set": lambda: whole(normal, AutoNormal(normal), Table()),
    "all rows but one": lambda: whole(normal, AutoDiagonalNormal(normal), data()[0], batch_size=ROWS - 1),
    "an autoguide over all latents": lambda: whole(local, AutoMultivariateNormal(local), data()[0]),
    "a flow, whose parameters have two names": lambda: whole(normal, AutoIAFNormal(normal), data()[0]),
    "no plate": lambda: whole(without_plate, AutoNormal(without_plate), data()[0]),
    "no arguments": lambda: whole(lambda: normal(data()[0]), AutoNormal(lambda: normal(data()[0]))),
    "a bound of all rows together": lambda: whole_with(VAE(), elbo=RenyiELBO(alpha=0.5, num_particles=2)),
    "held-out data": lambda: whole_with(
        VAE(), elbo=RenyiELBO(alpha=0.5, num_particles=2), validation=data()[0][:9], patience=2
    ),
    "three rows": lambda: whole(normal, AutoNormal(normal), data()[0][:3]),
}  # fmt: skip


def run_whole():
    return {name: run() for name, run in WHOLE.items()}


@pytest.fixture(scope="module")
def whole_on_ranks():
    return run_on_ranks(run_whole, 2)


@pytest.fixture(scope="module")
def whole_alone():
    with pyro.get_param_store().scope():
        return run_whole()


@pytest.mark.parametrize("case", WHOLE)
def test_all_rows_that_ranks_cannot_share_train_as_in_one_process(whole_on_ranks, whole_alone, case):
    history, parameters, none = whole_alone[case]
    assert not none
    for rank, found in enumerate(whole_on_ranks):
        their_history, theirs, warned = found[case]
        assert len(warned) == (rank == 0)
        assert their_history == {name: pytest.approx(values, rel=1e-6) for name, values in history.items()}
        assert theirs.keys() == parameters.keys()
        for name, tensor in parameters.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-6, atol=1e-7, msg=name)


def with_an_optimizer_that_draws():
    history, parameters, _ = whole(normal, AutoNormal(normal), data()[0], optimizer=Noisy, lr=1e-5)
    return history, {name: tensor.tolist() for name, tensor in parameters.items()}


def test_an_optimizer_draws_the_same_on_a_rank_without_rows():
    first, second = run_on_ranks(with_an_optimizer_that_draws, 2)
    assert first == second


def in_float16():
    pair, x = VAE().half(), torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)).half()
    history, parameters, _ = whole(pair.model, pair.guide, x, epochs=2, optimizer=torch.optim.SGD, lr=1e-6)
    return history["elbo"], [tensor.tolist() for tensor in parameters.values()]


def test_sums_of_gradients_of_16_bits_stay_in_their_range():
    expected, _ = in_float16()
    first, second = run_on_ranks(in_float16, 2)
    assert first == second
    assert first[0] == pytest.approx(expected, abs=0.5)  # 4.5 standard deviations of a difference, each of 0.078


class Conjugate(nn.Module):
    """A pair whose ELBO, and so its gradient, has a closed form: x = w z + s + noise, for a global s."""

    def __init__(self):
        super().__init__()
        self.w, self.loc, self.log_scale = (nn.Parameter(torch.tensor(value)) for value in (0.7, 0.2, -0.5))
        self.slope, self.log_width = (nn.Parameter(torch.tensor(value)) for value in (0.4, -0.3))

    def model(self, x):
        pv.handlers.register("conjugate", self)
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 40):
            x = pyro.subsample(x, event_dim=0)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.w * z + s, 1.0), obs=x)

    def guide(self, x):
        pv.handlers.register("conjugate", self)
        pyro.sample("s", dist.Normal(self.loc, self.log_scale.exp()))
        with pyro.plate("data", 40):
            x = pyro.subsample(x, event_dim=0)
            pyro.sample("z", dist.Normal(self.slope * x, self.log_width.exp()))

    def loss(self, x):
        mean, width, scale = self.slope * x, self.log_width.exp(), self.log_scale.exp()
        prior = torch.distributions.Normal(0.0, 1.0)
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(self.loc, scale), prior)
        kls = torch.distributions.kl_divergence(torch.distributions.Normal(mean, width), prior)
        errors = (x - self.w * mean - self.loc) ** 2 + self.w**2 * width**2 + scale**2
        return kl + (kls + errors / 2 + math.log(2 * math.pi) / 2).sum()


class Recorded(torch.optim.SGD):
    """An optimizer that changes nothing and keeps the gradients."""

    found = []

    def step(self, closure=None):
        self.found.append([parameter.grad.sum().item() for parameter in self.param_groups[0]["params"]])


def recorded_gradients():
    pyro.clear_param_store()
    pair, x = Conjugate(), torch.randn(40, generator=torch.Generator().manual_seed(5)) + 1
    Recorded.found = []
    pv.fit(pair.model, pair.guide, x, epochs=200, batch_size=10, optimizer=Recorded, lr=1e-3, compile=False)
    return torch.tensor(Recorded.found[-800:], dtype=torch.float64)


def test_the_mean_of_gradients_of_ranks_is_the_gradient_of_the_elbo():
    pair, x = Conjugate(), torch.randn(40, generator=torch.Generator().manual_seed(5)) + 1
    pair.loss(x).backward()
    exact = torch.stack([parameter.grad for parameter in pair.parameters()])
    first, second = run_on_ranks(recorded_gradients, 2)
    assert torch.equal(first, second)
    epochs = first.reshape(200, 4, -1).mean(1)  # all rows once
    z = (epochs.mean(0) - exact) / (epochs.std(0) / math.sqrt(len(epochs)))
    assert z.abs().max() < 4.5


@pytest.mark.parametrize(("devices", "count"), [(("cuda:0", "cuda:1"), 1), (("cpu", "cuda:0"), 2)])
def test_each_rank_may_have_a_gpu_of_its_own(devices, count):
    tensors = [SimpleNamespace(shape=(2, 3), dtype=torch.float32, device=torch.device(device)) for device in devices]
    assert len(set(map(gradient_sum._kind, tensors))) == count


def compiled_runs():
    return trained(Pair(), compile=True, epochs=10), trained(Pair(), epochs=10)


@pytest.mark.integration
def test_compiled_gradients_of_ranks_lead_to_the_parameters_of_eager_ones():
    for (compiled, history, *_), (eager, their_history, *_) in run_on_ranks(compiled_runs, 2, timeout=200):
        for name, tensor in eager.items():
            assert torch.allclose(compiled[name], tensor, atol=1e-4), name
        assert history["elbo"] == pytest.approx(their_history["elbo"], abs=1e-4)
