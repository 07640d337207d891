"""Loaders on several ranks: runs equal those of one process on the batches of all ranks, and no rank reads more."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from given_noise import Noise
from ranks import run_on_ranks
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

import pyro_vae as pv
from pyro_vae import parallel
from pyro_vae._utils.rng import seeded

N, B, EPOCHS = 37, 10, 4
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
    "no generator": lambda: DataLoader(DATA, B, shuffle=True),
    "subset sampler": lambda: DataLoader(DATA, B, sampler=SubsetRandomSampler(range(N))),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), B, drop_last=True)),
    "workers": lambda: DataLoader(DATA, B, shuffle=True, num_workers=1, generator=shuffled()),
    "one row left": lambda: DataLoader(DATA, 6, shuffle=True),
    "iterable": lambda: DataLoader(Rows(range(N)), B),
    "items are batches": lambda: DataLoader([(X[:20], NOISE[:20]), (X[20:], NOISE[20:])], None),
    "evaluated": lambda: DataLoader(DATA, B, shuffle=True),
}
OPTIONS = {"evaluated": {"validation": (X[:9], NOISE[:9]), "patience": 3}}


def replicated():
    return {name: trained(make(), **OPTIONS.get(name, {})) for name, make in REPLICATED.items()}


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


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", REPLICATED)
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
    "sampler in batches": lambda rank, size: DataLoader(
        DATA, batch_sampler=BatchSampler(DistributedSampler(DATA, size, rank, seed=3), 4, drop_last=False)
    ),
    "subsets": lambda rank, size: DataLoader(Subset(DATA, range(rank, N, size)), 4),
    "subset samplers": lambda rank, size: DataLoader(DATA, 4, sampler=SubsetRandomSampler([*range(rank, N, size)])),
    "unnamed sampler": lambda rank, size: DataLoader(DATA, 4, sampler=Unnamed(rank, size)),
    "iterable": lambda rank, size: DataLoader(Rows(range(rank, N, size)), 4),
    "uneven": lambda rank, size: DataLoader(Rows(shares(size)[rank]), 4),
    "uneven data sets": lambda rank, size: DataLoader(Subset(DATA, shares(size)[rank]), 4),
    "batch size of all": lambda rank, size: Rows(range(rank, N, size)),
}
OWN_OPTIONS = {"unnamed sampler": {"num_data": N}, "batch size of all": {"batch_size": 7}}


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
    return {name: trained(make(rank, size), **OWN_OPTIONS.get(name, {})) for name, make in OWN.items()}


@pytest.fixture(scope="module")
def own_on_ranks():
    return {size: run_on_ranks(own, size) for size in SIZES}


DRAWN = ["subset samplers", "unnamed sampler"]  # whose order the ranks draw in the run, and the union cannot repeat


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name in OWN if name not in DRAWN])
def test_rows_of_each_rank_train_as_their_union_in_one_process(own_on_ranks, name, size):
    expected = trained(DataLoader(DATA, batch_sampler=Union(name, size)))
    for found in own_on_ranks[size]:
        assert_same(found[name], expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", DRAWN)
def test_orders_that_ranks_draw_are_the_same_run_on_all(own_on_ranks, name, size):
    first, *others = own_on_ranks[size]
    for other in others:
        assert_same(first[name], other[name])
    assert first[name][2] == EPOCHS * -(-len(range(0, N, size)) // 4)
