"""Runs on arrays, data sets and loaders of torch are those on tensors with the same batches; none reads data whole."""

import itertools

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import bernoulli, gaussian
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from scipy import sparse
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

import pyro_vae as pv
from pyro_vae._utils import data as data_module
from pyro_vae.training.step import Step
from pyro_vae.training.streams import as_source

N, B = 22, 5
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(1))
BYTES = (X.sigmoid() * 255).to(torch.uint8)


class Rows(Dataset):
    """Rows of a tensor, and more tensors; ``fails`` is a row that raises an error while it is positive."""

    fails = -1

    def __init__(self, *tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, number):
        if number == self.fails:
            raise OSError(f"row {number} is damaged")
        items = tuple(tensor[number] for tensor in self.tensors)
        return items if len(items) > 1 else items[0]


class Shuffled(Sampler):
    """The order that `fit` draws with the same seed, without its merging of a single row."""

    def __init__(self, count=N, seed=0):
        self.count, self.generator = count, torch.Generator().manual_seed(seed)

    def __len__(self):
        return self.count

    def __iter__(self):
        yield from torch.randperm(self.count, generator=self.generator).tolist()


class Resumable(Shuffled):
    """A sampler whose own state is not a generator of torch."""

    generator = None

    def __init__(self):
        self.passes = 0

    def __len__(self):
        return N

    def __iter__(self):
        self.passes += 1
        yield from torch.randperm(N, generator=torch.Generator().manual_seed(self.passes)).tolist()

    def state_dict(self):
        return {"passes": self.passes}

    def load_state_dict(self, state):
        self.passes = state["passes"]


class Lines(IterableDataset):
    """Rows in order, as from a file; each worker has its share."""

    def __init__(self, tensor=X, passes=None):
        self.tensor, self.passes = tensor, passes

    def __iter__(self):
        if self.passes is not None:
            self.passes -= 1
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter(self.tensor[first::step] if self.passes is None or self.passes >= 0 else [])


def read_only(array):
    array.flags.writeable = False
    return array


def run(data, vae=None, **options):
    """Train a new VAE; return history and parameters."""
    torch.manual_seed(0)
    vae = vae or gaussian()
    fitted = pv.fit(vae.model, vae.guide, data, **{"epochs": 3, "lr": 1e-2} | options)
    return fitted.history, [parameter.detach().clone() for parameter in vae.parameters()], fitted


def assert_same(ours, theirs, tolerance=0.0):
    assert ours[0].keys() == theirs[0].keys()
    for name, values in ours[0].items():
        np.testing.assert_allclose(values, theirs[0][name], rtol=tolerance, atol=tolerance)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def loader(data=None, batch_size=B, **options):
    return DataLoader(Rows(X) if data is None else data, batch_size, **{"sampler": Shuffled()} | options)


@pytest.fixture
def never_whole(monkeypatch):
    monkeypatch.setattr(data_module, "_MOST_BYTES", 8)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.usefixtures("uncompiled", "never_whole")
def test_every_form_of_data_trains_to_the_same_bits_without_being_read_whole(compile, tmp_path):
    np.save(tmp_path / "x.npy", X.double().numpy())
    expected = run(X, batch_size=B, validation=X[:7], compile=compile)
    forms = [
        X.numpy(),
        pd.DataFrame(X),
        np.load(tmp_path / "x.npy", mmap_mode="r"),
        sparse.csr_array(X.numpy()),
        Rows(X),
        Rows(read_only(X.double().numpy())),
        TensorDataset(X),
        Subset(Rows(torch.cat([X, X])), range(N)),
    ]
    for form in forms[4:5] if compile else forms:
        validation = form[:7] if isinstance(form, np.ndarray | sparse.csr_array) else Rows(X[:7])
        assert_same(run(form, batch_size=B, validation=validation, compile=compile), expected)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("uncompiled")
def test_a_loader_with_the_same_batches_trains_to_the_same_bits(compile):
    expected = run(X, batch_size=B, compile=compile)
    assert_same(run(loader(), compile=compile), expected)
    if not compile:
        assert_same(run(loader(Rows(read_only(X.double().numpy())))), expected)


def test_workers_give_the_same_bits():
    assert_same(run(loader(num_workers=2), epochs=2), run(X, batch_size=B, epochs=2))


def test_bytes_stay_bytes_for_a_transform():
    expected = run(BYTES, batch_size=B, transform=pv.datasets.grey, validation=BYTES[:6])
    for form in (BYTES.numpy(), Rows(BYTES), sparse.csr_array(BYTES.numpy()), pd.DataFrame(BYTES)):
        assert_same(run(form, batch_size=B, transform=pv.datasets.grey, validation=BYTES[:6]), expected)
    assert_same(run(loader(Rows(BYTES)), transform=pv.datasets.grey, validation=BYTES[:6]), expected)


def global_scale(x, y):
    """A global latent, and two data tensors that are read with `pyro.subsample`."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        x, y = pyro.subsample(x, event_dim=1), pyro.subsample(y, event_dim=0)
        pyro.sample("x", dist.Normal(y[:, None], scale).expand([len(y), 3]).to_event(1), obs=x)


def global_guide(x, y):
    loc = pyro.param("loc", torch.tensor(0.3))
    pyro.sample("scale", dist.LogNormal(loc, 0.1))


@pytest.mark.parametrize("guide", [global_guide, None])
def test_the_scale_of_a_global_latent_is_that_of_all_rows(guide):
    histories = []
    sources = ((X, X[:, 0]), (X.numpy(), pd.Series(X[:, 0])), Rows(X, X[:, 0]), loader(Rows(X, X[:, 0])))
    for data in sources:
        pyro.clear_param_store()
        q = guide or AutoNormal(global_scale)
        options = {} if isinstance(data, DataLoader) else {"batch_size": B}
        histories.append(pv.fit(global_scale, q, data, epochs=3, lr=1e-2, **options).history)
    assert all(history == histories[0] for history in histories)


def sliced(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[:, None], 1.0).expand([len(x), 3]).to_event(1), obs=x)


def sliced_guide(x):
    weight = pyro.param("weight", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(weight * x.sum(-1), 1.0))


@pytest.mark.usefixtures("never_whole")
def test_a_model_without_subsample_gets_slices():
    histories = []
    for data in (X, Rows(X), sparse.csr_array(X.numpy()), loader()):
        pyro.clear_param_store()
        options = {} if isinstance(data, DataLoader) else {"batch_size": B}
        histories.append(pv.fit(sliced, sliced_guide, data, epochs=3, lr=1e-2, **options).history)
    assert all(history == histories[0] for history in histories)


def per_datum_guide(x):
    with pyro.plate("data", len(x)) as rows:
        loc = pyro.param("locs", torch.zeros(N))[rows]
        pyro.sample("z", dist.Normal(loc, 1.0))


def subsampled(x):
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=1)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[:, None], 1.0).expand([len(x), 3]).to_event(1), obs=x)


def test_parameters_of_each_datum_need_numbers_of_rows():
    histories = []
    for data in (X, Rows(X)):
        pyro.clear_param_store()
        histories.append(pv.fit(subsampled, per_datum_guide, data, epochs=3, lr=1e-2, batch_size=B).history)
    assert histories[0] == histories[1]
    for model, make in itertools.product((subsampled, sliced), (lambda model: per_datum_guide, AutoNormal)):
        pyro.clear_param_store()
        guide = make(model)
        with pytest.raises(ValueError, match=r"`(data|batch_size)` .* where the guide is not amortized"):
            pv.fit(model, guide, loader(), epochs=1)


def whole_mean(x):
    centre = x.mean()
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=1)
        z = pyro.sample("z", dist.Normal(centre, 1.0))
        pyro.sample("x", dist.Normal(z[:, None], 1.0).expand([len(x), 3]).to_event(1), obs=x)


def test_a_model_that_reads_all_rows_is_refused_where_they_are_read_on_demand():
    for data in (Rows(X), sparse.csr_array(X.numpy())):
        with pytest.raises(ValueError, match=r"pyro\.subsample"):
            pv.fit(whole_mean, sliced_guide, data, epochs=1, batch_size=B)


def test_an_exact_elbo_is_the_same_in_any_batches(monkeypatch):
    vae = bernoulli()
    elbo, guide = TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(vae.guide)
    expected = pv.evaluate(vae.model, guide, X, elbo=elbo)
    monkeypatch.setattr(data_module, "_MOST_BYTES", 8)
    for data in (Rows(X), sparse.csr_array(X.numpy()), Lines()):
        assert pv.evaluate(vae.model, guide, data, elbo=elbo, batch_size=4) == pytest.approx(expected, rel=1e-5)
    for data in (loader(), DataLoader(Lines(), 4), DataLoader(Lines(), 4, num_workers=2)):
        assert pv.evaluate(vae.model, guide, data, elbo=elbo) == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("never_whole")
def test_evidence_reads_rows_in_batches(tmp_path):
    vae, many = gaussian(), torch.randn(9000, 3)
    expected = pv.log_evidence(vae.model, vae.guide, many, num_samples=5).log_evidence
    np.save(tmp_path / "x.npy", many.double().numpy())
    for data in (sparse.csr_array(many.numpy()), np.load(tmp_path / "x.npy", mmap_mode="r"), Rows(many)):
        assert torch.equal(pv.log_evidence(vae.model, vae.guide, data, num_samples=5).log_evidence, expected)


def test_the_number_of_rows_is_that_of_the_data_set_or_of_a_pass():
    vae = gaussian()

    def num_data(data, **options):
        return len(as_source(data, "data", vae.model, **options).data[0])

    assert num_data(DataLoader(Rows(X), 4, drop_last=True)) == N
    assert num_data(DataLoader(Rows(X), 4, sampler=SubsetRandomSampler(range(9)))) == 9
    assert num_data(DataLoader(Rows(X), batch_sampler=BatchSampler(range(9), 4, False))) == N
    assert num_data(DataLoader(Lines(), 4)) == num_data(Lines(), batch_size=4) == N
    assert num_data(DataLoader(Lines(), 4), num_data=100) == 100
    assert num_data(DataLoader([X[:4], X[4:9]], None)) == 9  # items are batches


def test_an_epoch_is_a_pass_over_the_batches_as_they_come():
    _, _, fitted = run(DataLoader(Rows(X), 4, drop_last=True), epochs=2)
    assert fitted.steps == 2 * (N // 4)
    history, _, fitted = run(DataLoader(Lines(), 4), epochs=2, validation=DataLoader(Rows(X), 7))
    assert fitted.steps == 2 * -(-N // 4)
    assert len(history["elbo"]) == len(history["validation_elbo"]) == 2


def test_arguments_come_from_tuples_and_a_collate_function():
    def pair(items):
        return [torch.stack(items), np.array([float(item[0]) for item in items])]

    histories = []
    for data in (loader(Rows(X, X[:, 0])), loader(collate_fn=pair)):
        pyro.clear_param_store()
        histories.append(pv.fit(global_scale, global_guide, data, epochs=2, lr=1e-2).history)
    assert histories[0] == histories[1]


def test_what_a_data_set_draws_changes_no_other_draw(random_states):
    class Noisy(Rows):
        def __getitem__(self, number):
            torch.rand(3), np.random.rand(3)  # noqa: NPY002
            return super().__getitem__(number)

    before = random_states()
    noisy = run(loader(Noisy(X)))
    plain = run(loader())
    assert_same(noisy, plain)
    pv.evaluate(gaussian().model, gaussian().guide, DataLoader(Noisy(X), 4, shuffle=True))
    torch.manual_seed(0)
    assert random_states()[0] == before[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rows(X),
        lambda: DataLoader(Rows(X), B, shuffle=True),
        lambda: loader(),
        lambda: DataLoader(Rows(X), B, shuffle=True, generator=torch.Generator().manual_seed(3)),
        lambda: DataLoader(Rows(X), B, sampler=Resumable()),
    ],
    ids=["data set", "shuffled", "sampler", "generator", "state_dict"],
)
def test_a_run_that_an_error_ends_resumes_to_the_same_bits(make, tmp_path, monkeypatch):
    def start(folder):
        data = make()
        options = {} if isinstance(data, DataLoader) else {"batch_size": B}
        return run(data, checkpoints=pv.Checkpoints(folder, every_steps=1), validation=X[:6], epochs=3, **options)

    monkeypatch.setattr(Shuffled, "state_dict", lambda self: {}, raising=False)
    monkeypatch.setattr(Shuffled, "load_state_dict", lambda self, state: None, raising=False)
    whole, steps, step = start(tmp_path / "whole"), [], Step.__call__

    def stopped(*args, **options):
        steps.append(1)
        if len(steps) == 8:  # in the second pass
            raise OSError("the disk is gone")
        return step(*args, **options)

    monkeypatch.setattr(Step, "__call__", stopped)
    with pytest.raises(OSError, match="the disk is gone"):
        start(tmp_path / "killed")
    assert_same(start(tmp_path / "killed"), whole)


def test_an_error_of_a_worker_has_its_cause():
    data = Rows(X)
    data.fails = 13
    with pytest.raises(OSError, match=r"(?s)Caught OSError in DataLoader worker process.*row 13 is damaged"):
        run(DataLoader(data, B, num_workers=1), epochs=1)


def test_rows_that_are_not_finite_are_named_by_their_number():
    bad = X.clone()
    bad[13] = 1e30
    for data, options in ((Rows(bad), {"batch_size": B}), (DataLoader(Rows(bad), B), {})):
        with pytest.raises(FloatingPointError, match=r"in rows 13 of the data"):
            run(data, **options)


def test_a_stream_that_is_used_up_is_named():
    with pytest.raises(ValueError, match=r"`data` must give batches in each pass, got none in a later one"):
        run(DataLoader(Lines(passes=2), 4), num_data=N)
    with pytest.raises(ValueError, match=r"`data` must give batches in each pass, got none in a later one"):
        pv.evaluate(gaussian().model, gaussian().guide, DataLoader(Lines(passes=2), 4))
    with pytest.raises(ValueError, match=r"`data` must give batches of one row or more, got a DataLoader without any"):
        run(DataLoader(Lines(passes=0), 4))


def test_batches_of_another_form_are_refused():
    def ragged(items):
        return torch.stack(items)[:, : 2 + (len(items) == 4)]

    with pytest.raises(ValueError, match=r"`data` must give batches of one form, .*\(4, 3\) at first, got .*\(2, 2\)"):
        run(DataLoader(Rows(X), 4, collate_fn=ragged), epochs=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: DataLoader(Lines(), 4), "got a Lines, an iterable data set"),
        (lambda: loader(), r"got a Shuffled without `state_dict` and `load_state_dict`"),
        (lambda: DataLoader(Rows(X), 4, num_workers=1, persistent_workers=True), "workers that keep their random"),
    ],
)
def test_checkpoints_of_what_does_not_come_again_are_refused(data, message, tmp_path):
    with pytest.raises(ValueError, match=f"`checkpoints` need data whose batches come again.*{message}"):
        run(data(), checkpoints=tmp_path)
    assert list(tmp_path.iterdir()) == []
