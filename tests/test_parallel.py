"""Several ranks share evaluation, evidence, diagnostics and exports, and have the numbers of one process.

Each number of ranks runs :func:`numbers` once; the tests compare what it returned.
"""

import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from ranks import run_on_ranks
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, parallel, priors

SIZES = (2, 3, 5)


def make_vae(latents=1, seed=0):
    torch.manual_seed(seed)
    net = networks.mlp([8])
    return pv.VAE(
        priors.StandardNormal(latents), guides.DiagonalNormal(2, latents, net), likelihoods.Normal(latents, 2, net)
    )


def evaluations():
    """Held-out ELBOs of batches of all rows, of several draws, and of loaders."""
    vae = make_vae()
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(1))
    pair = vae.model, vae.guide
    yield "evaluate", pv.evaluate(*pair, x, batch_size=30)
    yield "evaluate, several draws", pv.evaluate(*pair, x, num_samples=3)
    yield "evaluate, one batch", pv.evaluate(*pair, x)
    yield "evaluate, loader", pv.evaluate(*pair, DataLoader(TensorDataset(x), batch_size=9, shuffle=True))


FUNCTIONS = (evaluations,)


def numbers():
    """All that is the same on each rank, by name."""
    return {name: value for function in FUNCTIONS for name, value in function()}


@pytest.fixture(scope="module")
def alone():
    return run_on_ranks(numbers, 1)[0]


@pytest.fixture(scope="module", params=SIZES)
def shared(request):
    return run_on_ranks(numbers, request.param)


def leaves(value, path=""):
    """Yield the places of numbers and texts in a result, and what is there."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from leaves(each, f"{path}/{name}")
    elif isinstance(value, list | tuple):
        yield f"{path} length", len(value)
        for place, each in enumerate(value):
            yield from leaves(each, f"{path}[{place}]")
    else:
        yield path, value


def test_every_rank_has_the_numbers_of_one_process(alone, shared):
    expected = dict(leaves(alone))
    for found in map(dict, map(leaves, shared)):
        assert found.keys() == expected.keys()
        for path, value in found.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, expected[path], rtol=1e-5, atol=1e-6, equal_nan=True, msg=path)
            elif isinstance(value, float):
                assert value == pytest.approx(expected[path], rel=1e-5, abs=1e-6, nan_ok=True), path
            else:
                assert value == expected[path], path


def loaders():
    """The exact ELBO of rows of which each rank reads its own, and of the same rows in tensors."""
    torch.manual_seed(0)
    net = networks.mlp([8])
    vae = pv.VAE(priors.Bernoulli(2), guides.Bernoulli(2, 2, net), likelihoods.Normal(2, 2, net))
    x = torch.randn(90, 2, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x)
    sampler = DistributedSampler(data, parallel.num_ranks(), parallel.rank(), shuffle=False)
    pair, elbo = (vae.model, config_enumerate(vae.guide)), {"elbo": TraceEnum_ELBO()}
    ours = pv.evaluate(*pair, DataLoader(data, batch_size=7, sampler=sampler), **elbo)
    return ours["elbo"], pv.evaluate(*pair, x, **elbo)["elbo"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_sampler_that_knows_the_ranks_gives_each_its_own_batches(size):
    for of_loader, of_rows in run_on_ranks(loaders, size):
        assert of_loader == pytest.approx(of_rows, rel=1e-5)


def changing_loaders():
    vae = make_vae()
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    x[20:] += parallel.rank()
    with pytest.raises(ValueError, match="the same batches on all ranks, or other ones from the first one on"):
        pv.evaluate(vae.model, vae.guide, DataLoader(TensorDataset(x), batch_size=10))
    return True


def test_a_loader_whose_later_batches_differ_is_refused():
    assert run_on_ranks(changing_loaders, 2) == [True, True]
