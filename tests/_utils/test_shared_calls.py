"""Reports that ranks share have the same arguments and parameters on all of them, or raise with what differs."""

import copy
import tempfile

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from ranks import run_on_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, parallel, priors
from pyro_vae._utils.shared_calls import _described


class Squares(Dataset):
    def __init__(self, count, shift=0.0, noise=0.0):
        self.count, self.shift, self.noise = count, shift, noise
        self.generator = np.random.default_rng()

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        return torch.tensor([number**2 + self.shift + self.noise * self.generator.normal()]), torch.rand(1)


def changed(array):
    """Another one at the last number."""
    array = array.copy()
    array.flat[-1] += 1
    return array


SMALL, WIDE = np.arange(12.0).reshape(4, 3), np.arange(2**22, dtype=np.float32).reshape(-1, 64)
DIFFERENT = {
    "numbers": (1, 2, 2.5, True, None, "a", float("nan")),
    "tensors": (torch.from_numpy(SMALL), torch.from_numpy(changed(SMALL)), torch.from_numpy(SMALL.T), torch.zeros(())),
    "arrays": (SMALL, changed(SMALL), SMALL.astype(np.float32), np.array(["a", "b"]), np.array([None, "b"])),
    "large arrays": (WIDE, WIDE + 1, WIDE[:-1]),
    "large tensors": tuple(map(torch.from_numpy, (WIDE, WIDE + 1, WIDE[:-1]))),
    "frames": (pd.DataFrame(SMALL), pd.DataFrame(changed(SMALL)), pd.DataFrame(SMALL[:3])),
    "sparse": (scipy.sparse.csr_matrix(SMALL), scipy.sparse.csr_matrix(changed(SMALL))),
    "tensor sets": (TensorDataset(torch.from_numpy(SMALL)), TensorDataset(torch.from_numpy(changed(SMALL)))),
    "data sets": (Squares(20), Squares(20, 1.0), Squares(21)),
    "data": (pv.datasets.two_gaussians(20, seed=0), pv.datasets.two_gaussians(20, seed=1)),
    "sequences": ([SMALL, SMALL], [SMALL, changed(SMALL)], (SMALL,)),
    "mappings": ({"a": SMALL}, {"a": changed(SMALL)}, {"b": SMALL}),
    "arguments": (pv.Arguments(SMALL, beta=1.0), pv.Arguments(SMALL, beta=2.0), pv.Arguments(changed(SMALL), beta=1.0)),
    "bounds": (Trace_ELBO(), Trace_ELBO(num_particles=3), TraceMeanField_ELBO()),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_other_values_have_other_descriptions_and_the_same_ones_the_same(kind, random_states):
    before = random_states()
    described = [repr(_described(value)) for value in DIFFERENT[kind]]
    assert len(set(described)) == len(described)
    again = copy.deepcopy(DIFFERENT[kind])
    assert described == [repr(_described(value)) for value in again]
    assert random_states() == before


def test_what_cannot_be_compared_is_described_by_its_type():
    rows = TensorDataset(torch.zeros(3, 2))
    broken = pd.DataFrame({"a": [np.inf]})
    values = [DataLoader(rows), len, object(), broken, torch.zeros(3).to_sparse()]
    expected = ["a DataLoader", "a builtin_function_or_method", "an object", "a DataFrame", "a Tensor"]
    assert list(map(_described, values)) == expected
    assert _described(Squares(20, noise=1.0)) == [20, "a Squares"]


X = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))


def make_vae(seed=0):
    torch.manual_seed(seed)
    network = networks.mlp([8])
    return pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, network), likelihoods.Normal(1, 2, network))


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[:, None].expand(-1, 2), 1.0).to_event(1), obs=x)


def guide_at(loc):
    def guide(x):
        at = pyro.param("loc", torch.tensor(loc))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(at, 1.0))

    return guide


def guide_of(network):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(network(x)[:, 0], 1.0))

    return guide


def linear(seed):
    torch.manual_seed(seed)
    return nn.Linear(2, 1)


def calls(rank):
    """Calls that differ by rank, by the name of what differs."""
    vae, other = make_vae(), make_vae(rank)
    yield "data", lambda: pv.evaluate(vae.model, vae.guide, X + rank)
    yield "seed", lambda: pv.log_evidence(vae.model, vae.guide, X, num_samples=5, seed=rank)
    yield "num_samples", lambda: pv.evaluate(vae.model, vae.guide, X, num_samples=1 + rank)
    yield "model: encoder.network.0.weight", lambda: pv.decompose(other.model, other.guide, X)
    yield "loc", lambda: pv.to_datatree(model, guide_at(float(rank)), X, draws=3)
    yield "Linear 1: weight", lambda: pv.evaluate(model, guide_of(linear(rank)), X)


def errors():
    rank, found = parallel.rank(), []

    def alone_and_all():
        if rank == 0:  # to which the next call of rank 1 answers
            pv.evaluate(model, guide_at(0.0), X + 1)
        pv.evaluate(model, guide_at(0.0), X)

    for call in (*(call for _, call in calls(rank)), alone_and_all):
        with pytest.raises(ValueError, match="must be the same on every rank, got ") as caught:
            call()
        found.append(str(caught.value))
    return found


def test_calls_that_differ_by_rank_are_errors_of_all_with_what_differs():
    ours, theirs = run_on_ranks(errors, 2)
    assert ours == theirs
    for text, name in zip(ours, [*(name for name, _ in calls(0)), "data"], strict=True):
        assert f"`{name}" in text
        assert text.endswith("belong in `with pyro_vae.parallel.one_process():`")


def same_calls():
    """Calls that may differ: by rounding, in what each rank alone does, and in what changes no number."""
    rank, vae, other = parallel.rank(), make_vae(), make_vae(parallel.rank())
    pair = vae.model, vae.guide
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter *= 1 + 1e-7 * rank
    with parallel.one_process():
        pv.evaluate(other.model, other.guide, X + rank)
        pyro.param("of this rank", torch.tensor(float(rank)))
    with tempfile.TemporaryDirectory() as folder:
        pv.save_draws(f"{folder}/{rank}.nc", *pair, X, draws=3, progress=rank == 0)
    own = DataLoader(TensorDataset(X[rank::2]), batch_size=10)
    return pv.evaluate(*pair, own)["elbo"], pv.evaluate(*pair, TensorDataset(X), batch_size=20)["elbo"]


def test_calls_that_differ_in_what_changes_no_number_are_none():
    ours, theirs = run_on_ranks(same_calls, 2)
    assert ours == pytest.approx(theirs, rel=1e-5)
