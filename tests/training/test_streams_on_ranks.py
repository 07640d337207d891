"""Loaders on several ranks: runs equal those of one process on the batches of all ranks, and no rank reads more."""

import itertools
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from given_noise import Noise
from pairs import bernoulli
from pyro.infer import TraceEnum_ELBO, config_enumerate
from ranks import run_on_ranks
from scipy import sparse
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

import pyro_vae as pv
from pyro_vae import guides, likelihoods, model_guide, networks, parallel, priors
from pyro_vae._utils import data as data_module
from pyro_vae._utils.data import MappedRows
from pyro_vae._utils.rng import seeded
from pyro_vae.training import state
from pyro_vae.training.streams import as_source

N, B, EPOCHS = 37, 10, 3
X, NOISE = (torch.randn(N, *size, generator=torch.Generator().manual_seed(3)) for size in ((2,), ()))
DATA = TensorDataset(X, NOISE)
SIZES = (2, 3)


class Pair(nn.Module):
    """A model with a local and a global latent, whose guide draws from the noise in the data."""

    def __init__(self):
        super().__init__()
        with seeded(1):
            self.encoder, self.decoder = nn.Linear(2, 2), nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2))
        self.shift = nn.Parameter(torch.tensor([0.1, -1.0]))

    def model(self, x, noise):
        pyro.module("pair", self)
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.decoder(z[..., None]) + shift, 0.5).to_event(1), obs=x)

    def guide(self, x, noise):
        pyro.module("pair", self)
        pyro.sample("shift", Noise(self.shift[0], self.shift[1].exp(), torch.tensor(0.3)))
        with pyro.plate("data", len(x)):
            x, noise = pyro.subsample(x, event_dim=1), pyro.subsample(noise, event_dim=0)
            loc, scale = self.encoder(x).unbind(-1)
            pyro.sample("z", Noise(loc, scale.exp(), noise))


def trained(data, **options):
    """History and parameters of a run."""
    pyro.clear_param_store()
    pair = Pair()
    fitted = pv.fit(pair.model, pair.guide, data, **{"epochs": EPOCHS, "lr": 1e-2, "compile": False} | options)
    return dict(fitted.history), {name: tensor.detach() for name, tensor in pair.named_parameters()}, fitted.steps


class Rows(IterableDataset):
    """Some rows in order, as of a file."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return (DATA[row] for row in self.rows)


class Unnamed(Sampler):
    """Rows of a rank in an order of which all ranks draw the same, without their numbers as attributes."""

    def __init__(self, rank, size):
        self.place = slice(rank, None, size)

    def __iter__(self):
        return iter(torch.randperm(N).tolist()[self.place])

    def __len__(self):
        return len(range(N)[self.place])


def shuffled(seed=5):
    return torch.Generator().manual_seed(seed)


# What all ranks read, as one process does


REPLICATED = {
    "own generator": lambda: DataLoader(DATA, B, shuffle=True, generator=shuffled()),
    "validation": lambda: DataLoader(DATA, B, sampler=SubsetRandomSampler(range(N))),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), B, drop_last=True)),
    "workers": lambda: DataLoader(DATA, B, shuffle=True, num_workers=1, generator=shuffled()),
    "one row left": lambda: DataLoader(DATA, 6, shuffle=True),
    "iterable": lambda: DataLoader(Rows(range(N)), B),
    "items are batches": lambda: DataLoader([(X[:20], NOISE[:20]), (X[20:], NOISE[20:])], None),
}
OPTIONS = {"validation": {"validation": DataLoader(TensorDataset(X[:9], NOISE[:9]), 4), "patience": 3}}


def some(names, size):
    """All of the names on three ranks, and the first two on two ranks: each run takes a second."""
    return [*names][: 2 if size == 2 else None]


def cases(names):
    return [(name, size) for size in SIZES for name in some(names, size)]


def replicated():
    names = some(REPLICATED, parallel.num_ranks())
    return {name: trained(REPLICATED[name](), **OPTIONS.get(name, {})) for name in names}


def assert_same(ours, theirs):
    assert ours[2] == theirs[2]
    assert ours[0].keys() == theirs[0].keys()
    for name, values in ours[0].items():
        assert theirs[0][name] == pytest.approx(values, abs=1e-4), name
    for name, tensor in ours[1].items():
        torch.testing.assert_close(theirs[1][name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def replicated_on_ranks():
    return {size: run_on_ranks(replicated, size) for size in SIZES}


@pytest.fixture(scope="module")
def replicated_alone():
    return replicated()


@pytest.mark.parametrize(("name", "size"), cases(REPLICATED))
def test_batches_that_all_ranks_have_train_as_in_one_process(replicated_alone, replicated_on_ranks, name, size):
    for found in replicated_on_ranks[size]:
        assert_same(found[name], replicated_alone[name])


# Rows of each rank


def shares(size):
    """Uneven rows of each rank; the last one has none."""
    ends = [0, 25, *[N] * (size - 1)]
    return [list(range(*pair)) for pair in itertools.pairwise(ends)]


OWN = {
    "sampler": lambda rank, size: DataLoader(DATA, 4, sampler=DistributedSampler(DATA, size, rank, seed=3)),
    "uneven": lambda rank, size: DataLoader(Rows(shares(size)[rank]), 4),
    "sampler in batches": lambda rank, size: DataLoader(
        DATA, batch_sampler=BatchSampler(DistributedSampler(DATA, size, rank, seed=3), 4, drop_last=False)
    ),
    "subsets": lambda rank, size: DataLoader(Subset(DATA, range(rank, N, size)), 4),
    "subset samplers": lambda rank, size: DataLoader(DATA, 4, sampler=SubsetRandomSampler([*range(rank, N, size)])),
    "unnamed sampler": lambda rank, size: DataLoader(DATA, 4, sampler=Unnamed(rank, size)),
    "iterable": lambda rank, size: DataLoader(Rows(range(rank, N, size)), 4),
    "uneven data sets": lambda rank, size: DataLoader(Subset(DATA, shares(size)[rank]), 4),
    "batch size of all": lambda rank, size: Rows(range(rank, N, size)),
}
OWN_OPTIONS = {"unnamed sampler": {"num_data": N}, "batch size of all": {"batch_size": 7}}
HELD_OUT = TensorDataset(X[:7], NOISE[:7])


class Union(Sampler):
    """The batches that the loaders of all ranks have together, of rows that are known by their values."""

    def __init__(self, name, size):
        self.name, self.size, self.epoch = name, size, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        found = []
        for rank in range(self.size):
            loader = OWN[self.name](rank, self.size)
            if isinstance(loader, IterableDataset):
                loader = DataLoader(loader, len(range(7)[rank :: self.size]))
            if isinstance(getattr(loader.batch_sampler, "sampler", None), DistributedSampler):
                loader.batch_sampler.sampler.set_epoch(self.epoch)
            found.append([[self.row(x) for x in batch] for batch, _ in loader])
        seen = set()
        for step in range(max(map(len, found))):
            batch = [row for batches in found for row in (batches[step] if step < len(batches) else [])]
            yield [row for row in batch if row not in seen]
            seen.update(batch)

    def row(self, x):
        return (x == X).all(1).nonzero().item()


def own():
    rank, size = parallel.rank(), parallel.num_ranks()
    sampled = DataLoader(HELD_OUT, 2, sampler=DistributedSampler(HELD_OUT, size, rank))
    options = OWN_OPTIONS | {"sampler": {"validation": sampled}}
    return {name: trained(OWN[name](rank, size), **options.get(name, {})) for name in some(OWN, size)}


@pytest.fixture(scope="module")
def own_on_ranks():
    return {size: run_on_ranks(own, size) for size in SIZES}


DRAWN = ["subset samplers", "unnamed sampler"]  # whose order the ranks draw in the run, and the union cannot repeat


@pytest.mark.parametrize(("name", "size"), [case for case in cases(OWN) if case[0] not in DRAWN])
def test_rows_of_each_rank_train_as_their_union_in_one_process(own_on_ranks, name, size):
    options = {"validation": DataLoader(HELD_OUT, 4)} if name == "sampler" else {}
    expected = trained(DataLoader(DATA, batch_sampler=Union(name, size)), **options)
    for found in own_on_ranks[size]:
        assert_same(found[name], expected)


@pytest.mark.parametrize("name", DRAWN)
def test_orders_that_ranks_draw_are_the_same_run_on_all(own_on_ranks, name):
    first, *others = own_on_ranks[3]
    for other in others:
        assert_same(first[name], other[name])
    assert first[name][2] == EPOCHS * -(-len(range(0, N, 3)) // 4)


def with_one_first_batch():
    data = Subset(DATA, [*range(B), *range(B + parallel.rank(), N, 2)])
    found = as_source(DataLoader(data, B), "data", None)
    return found.stream.has_own_rows, len(found.data[0]), found.stream.batch_size


def test_data_sets_that_differ_after_the_first_batch_are_those_of_each_rank():
    assert run_on_ranks(with_one_first_batch, 2) == [(True, 2 * B + N - B, 2 * B)] * 2


def grey(x):
    """A model without a bound for values between 0 and 1, which nothing else refuses."""
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=1)
        logits = pyro.sample("z", dist.Normal(0.0, 1.0))[:, None].expand(len(x), 2)
        pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=x)


def grey_guide(x):
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=1)
        pyro.sample("z", dist.Normal(pyro.param("weight", torch.tensor(0.1)) * x.sum(1), 1.0))


def names_of_terms():
    x = np.ones((N, 2))
    x[33] = 0.5
    fitted = pv.fit(grey, grey_guide, sparse.csr_array(x), epochs=1, batch_size=4, compile=False)
    own = DataLoader(torch.tensor(np.array_split(x, parallel.num_ranks())[parallel.rank()], dtype=torch.float32), 13)
    return sorted(fitted.history), sorted(pv.evaluate(grey, grey_guide, own))


def test_all_ranks_have_the_reason_of_one_whose_rows_have_no_bound():
    assert run_on_ranks(names_of_terms, 3) == [(["distortion", "rate", "surrogate"],) * 2] * 3


def evaluated():
    """The exact ELBO of all rows, of rows of each rank, some of them twice, and of those of a common loader."""
    torch.manual_seed(0)
    vae, rows = bernoulli(features=2), []
    data, pair = Noting(rows, TensorDataset(X)), (vae.model, config_enumerate(vae.guide))
    sampler = DistributedSampler(data, parallel.num_ranks(), parallel.rank())
    options = {"elbo": TraceEnum_ELBO(), "num_samples": 2}
    yield pv.evaluate(*pair, X, **options)["elbo"]
    yield pv.evaluate(*pair, DataLoader(data, 4, sampler=sampler), **options)["elbo"]
    rows.clear()
    yield pv.evaluate(*pair, DataLoader(data, 4, num_workers=0), **options)["elbo"]
    yield len(rows)


def all_evaluated():
    return list(evaluated())


def test_evaluation_counts_repeated_rows_once_and_reads_what_it_computes():
    for expected, *found, reads in run_on_ranks(all_evaluated, 5):
        assert found == pytest.approx([expected] * 2, rel=1e-6)
        assert (
            reads <= 2 * 4 + 8 + 4 * 4
        )  # two first batches, eight rows, and four of ten: two chunks of each, shared by five ranks


# Passes of a sampler


def order_of(batches, epochs, sampler, callbacks=()):
    """The rows that each pass reads, by a data set that notes them."""
    rows, passes = [], []
    callbacks = [*callbacks, parallel.on_every_rank(lambda epoch: passes.append(rows.copy()) or rows.clear())]
    data = Noting(rows)
    trained(DataLoader(data, batches, sampler=sampler), epochs=epochs, callbacks=callbacks)
    return [one[-len(sampler) :] for one in passes]


class Noting(Dataset):
    """Rows, whose numbers are noted when they are read."""

    def __init__(self, rows, data=DATA):
        self.rows, self.data = rows, data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, row):
        self.rows.append(row)
        return self.data[row]


def test_a_sampler_has_the_epoch_of_each_pass():
    def of_torch(epoch):
        sampler.set_epoch(epoch)
        return list(sampler)

    sampler = DistributedSampler(DATA, 1, 0)
    assert order_of(B, 3, sampler) == [of_torch(epoch) for epoch in range(3)]
    sampler.set_epoch(5)  # by a loop around fit
    assert order_of(B, 2, sampler) == [of_torch(5), of_torch(6)]
    sampler.set_epoch(5)
    trained(DataLoader(DATA, B, sampler=sampler), epochs=3)
    assert sampler.epoch == 5
    sampler.set_epoch(0)
    by_user = [lambda epoch: sampler.set_epoch(10 * epoch.number)]
    assert order_of(B, 3, sampler, by_user) == [of_torch(epoch) for epoch in (0, 10, 20)]


def epochs_of_ranks():
    sampler = DistributedSampler(DATA, parallel.num_ranks(), parallel.rank())
    plain = order_of(B, 2, sampler)
    return plain, order_of(B, 2, sampler, [lambda epoch: sampler.set_epoch(7)])  # on rank 0 alone


def test_all_ranks_have_the_epoch_of_rank_0():
    found = run_on_ranks(epochs_of_ranks, 2)
    for passes, epochs in zip(zip(*found, strict=True), [(0, 1), (0, 7)], strict=True):
        for place, epoch in enumerate(epochs):
            for rank, orders in enumerate(passes):
                sampler = DistributedSampler(DATA, 2, rank)
                sampler.set_epoch(epoch)
                expected = list(sampler)[: len(range(rank, N, 2))]
                assert orders[place][-len(expected) :] == expected


# Reading


class Largest(TorchDispatchMode):
    """Note the largest tensor that is made, in bytes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.most = max(self.most, one.untyped_storage().nbytes())
        return result


MANY, WIDE, READ = 1000, 40, 100


def reads(path):
    """For a data set, a loader and a file: the rows that a further pass and a run read, and the largest tensor."""
    data_module._BLOCK, model_guide._BUDGET, state._ROWS = 2**10, 64, 16  # in a copy of the process
    rows, net, read, found = [], networks.mlp([4]), MappedRows.read, {}
    MappedRows.read = lambda self, numbers: rows.extend(numbers.tolist()) or read(self, numbers)
    noting = Noting(rows, torch.zeros(1, WIDE).expand(MANY, WIDE))
    forms = {
        "data set": lambda: (noting, READ),
        "loader": lambda: (DataLoader(noting, READ, shuffle=True), None),
        "file": lambda: (np.load(path, mmap_mode="r"), READ),
    }
    for name, make in forms.items():
        counts, largest = [], Largest()
        for epochs in (1, 3):
            rows.clear()
            (data, batch_size), guide = make(), guides.DiagonalNormal(WIDE, 1, net)
            vae = pv.VAE(priors.StandardNormal(1), guide, likelihoods.Normal(1, WIDE, net))
            with largest:
                pv.fit(vae.model, vae.guide, data, epochs=epochs, batch_size=batch_size, compile=False)
            counts.append(len(rows))
        found[name] = (counts[1] - counts[0]) / 2, counts[0], largest.most
    return found


def test_each_rank_reads_its_rows_alone_and_holds_a_batch_of_them(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((MANY, WIDE)))
    found = run_on_ranks(reads, 2, tmp_path / "x.npy")
    for name in found[0]:
        for of_pass, of_run, most in (rank[name] for rank in found):
            assert of_pass == MANY / 2, name
            assert of_run <= (1 + 3) * MANY / 2 + 6 * READ, name  # a pass, and three checks, shared by the ranks
            assert most < 4 * MANY * WIDE / 4, name


# What cannot run


class Noisy(Noting):
    """Rows with noise that no seed of the run sets."""

    def __init__(self):
        super().__init__([])
        self.random = np.random.default_rng([parallel.rank()])

    def __getitem__(self, row):
        return tuple(one + self.random.normal() for one in DATA[row])


class NoisyRows(Rows):
    def __init__(self):
        super().__init__(range(N))
        self.random = np.random.default_rng([parallel.rank()])

    def __iter__(self):
        return (DATA[row] for row in self.random.permutation(N))


class Damaged(Noting):
    """Rows of which one cannot be read."""

    def __getitem__(self, row):
        if row == 33:
            raise OSError("row 33 is damaged")
        return super().__getitem__(row)


class UsedUp(Rows):
    """Rows that come a few times."""

    passes = 2

    def __iter__(self):
        self.passes -= 1
        return super().__iter__() if self.passes >= 0 else iter(())


def with_bad_row(value):
    bad = X.clone()
    bad[33] = value
    return TensorDataset(bad, NOISE)


def loader_of(data, rank):
    return DataLoader(data, B, sampler=DistributedSampler(data, 3, rank))


WRONG = {
    "a sampler of others": (
        lambda rank: DataLoader(DATA, B, sampler=DistributedSampler(DATA, 4, rank)), {},
        r"`data` must have a sampler for each of the 3 ranks, got rows of rank 0 of 4, rows of rank 1 of 4, rows of",
    ),
    "some with a sampler": (
        lambda rank: DataLoader(DATA, B, sampler=DistributedSampler(DATA, 3, rank) if rank else None), {},
        r"`data` must have a sampler for each of the 3 ranks, got all rows, rows of rank 1 of 3, rows of rank 2 of 3",
    ),
    "lengths": (
        lambda rank: loader_of(Subset(DATA, range(N - rank)), rank), {},
        r"`len\(data.dataset\)` must be the same on every rank, got 37 on rank 0 and 36 on rank 1",
    ),
    "numbers": (
        lambda rank: DataLoader(DATA, B, sampler=Unnamed(rank, 3)), {},
        r"`num_data` must be given where ranks read other rows of one data set by an? Unnamed",
    ),
    "orders": (
        lambda rank: DataLoader(DATA, B, shuffle=True, generator=shuffled(rank)), {},
        r"`num_data` must be given where ranks read other rows of one data set by a RandomSampler",
    ),
    "two alike": (
        lambda rank: DataLoader(Rows(range(20) if rank else range(20, N)), B), {},
        r"`data` must have the same rows on all ranks, or others on each, got the same ones on the ranks \[1, 2\] of 3",
    ),
    "others later": (
        lambda rank: DataLoader(Rows([*range(20), 20 + rank]), B), {},
        r"`data` must have the same batches on all ranks, or other ones from the first one on",
    ),
    "none": (lambda rank: DataLoader(Rows([]), B), {}, r"`data` must give batches of one row or more, got a DataLoad"),
    "used up": (lambda rank: DataLoader(UsedUp(range(rank, N, 3)), B), {"num_data": N}, r".* got none in a later one"),
    "noise": (lambda rank: DataLoader(Noisy(), B), {}, r"`data` must give the same rows again after the same seed"),
    "noisy order": (lambda rank: DataLoader(NoisyRows(), B), {}, r"`num_data` must be given where `data` has other"),
    "num_data": (
        lambda rank: DataLoader(Rows(range(rank, N, 3)), B), {"num_data": "rank"},
        r"`num_data` must be the same on every rank, got 37 on rank 0 and 38 on rank 1",
    ),
    "forms": (
        lambda rank: DataLoader(TensorDataset(X[rank:, : 1 + (rank == 0)], NOISE[rank:]), B), {},
        r"`data` must be the same on every rank, got \[\[\[2\], .* on rank 0 and \[\[\[1\], .* on rank 1",
    ),
    "batch size": (
        lambda rank: Rows(range(rank, N, 3)), {"batch_size": 2},
        r"`batch_size` must be at least the number of ranks, 3, where each has rows of its own, got 2",
    ),
    "data sets": (
        lambda rank: Subset(DATA, [rank] * MANY), {"batch_size": B},
        r'`data` must be the same on every rank, got "\(1000, 2\) .* \w+ of 8 rows" on rank 0 and .* DataLoader',
    ),
    "sizes of data sets": (
        lambda rank: Subset(DATA, [0] * (MANY - rank)), {"batch_size": B},
        r'`data` must be the same on every rank, got "\(1000, 2\) .*" on rank 0 and "\(999, 2\) .*" on rank 1',
    ),
    "noise in data sets": (
        lambda rank: Subset(Noisy(), [0] * MANY), {"batch_size": B},
        r"`data` must give the same rows again after the same seed",
    ),
    "damaged": (lambda rank: DataLoader(Damaged([]), B), {}, r"(rank 1: )?row 33 is damaged"),
    "damaged shard": (
        lambda rank: DataLoader(Damaged([]), 4, sampler=DistributedSampler(DATA, 3, rank, shuffle=False)), {},
        r"(rank 0: )?row 33 is damaged",
    ),
    "infinite": (
        lambda rank: (sparse.csr_array(with_bad_row(torch.inf).tensors[0].numpy()), NOISE), {"batch_size": B},
        r"(rank 2: )?`data` must hold finite numbers, got inf at row 33, column \(0,\)",
    ),
    "not finite": (lambda rank: DataLoader(with_bad_row(1e30), B), {}, r"step 4: rank 1: .*in rows 33 of the data"),
}  # fmt: skip


def wrong():
    found, rank = {}, parallel.rank()
    for name, (make, options, _) in WRONG.items():
        options = {key: N + rank if value == "rank" else value for key, value in options.items()}
        try:
            trained(make(rank), **options)
        except (ValueError, OSError, FloatingPointError) as error:
            found[name] = type(error).__name__, str(error)
    return found


@pytest.fixture(scope="module")
def wrong_on_ranks():
    return run_on_ranks(wrong, 3)


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_run_ends_all_ranks_with_one_message(wrong_on_ranks, name):
    kinds, texts = zip(*(found.get(name, ("no error", "")) for found in wrong_on_ranks), strict=True)
    assert len(set(kinds)) == 1
    for text in texts:
        assert re.match(WRONG[name][2], text.removeprefix("rank 0: ")), text
