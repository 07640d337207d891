"""Several ranks share evaluation, evidence, diagnostics and exports, and have the numbers of one process.

Each number of ranks runs :func:`numbers` once; the tests compare what it returned.
"""

import dataclasses
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from ranks import run_on_ranks
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyro_vae as pv
from pyro_vae import exact, guides, likelihoods, model_guide, networks, parallel, priors
from pyro_vae.diagnostics import decomposition
from pyro_vae.evidence import importance_sampling

SIZES = (2, 3, 5)


def make_vae(latents=1, seed=0):
    torch.manual_seed(seed)
    net = networks.mlp([8])
    return pv.VAE(
        priors.StandardNormal(latents), guides.DiagonalNormal(2, latents, net), likelihoods.Normal(latents, 2, net)
    )


def make_bernoulli_vae():
    torch.manual_seed(0)
    net = networks.mlp([8])
    return pv.VAE(priors.Bernoulli(2), guides.Bernoulli(2, 2, net), likelihoods.Normal(2, 2, net))


def evaluations():
    """Held-out ELBOs of batches of all rows, of several draws, and of loaders."""
    vae = make_vae()
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(1))
    pair = vae.model, vae.guide
    yield "evaluate", pv.evaluate(*pair, x, batch_size=30)
    yield "evaluate, several draws", pv.evaluate(*pair, x, num_samples=3)
    yield "evaluate, one batch", pv.evaluate(*pair, x)
    yield "evaluate, loader", pv.evaluate(*pair, DataLoader(TensorDataset(x), batch_size=9, shuffle=True))


def regression(x, y):
    """A regression, whose weights are global."""
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)


def regression_guide(x, y):
    pyro.sample("weights", dist.Normal(torch.tensor([0.4, -0.2]), 0.2).to_event(1))


def estimates():
    """Importance sampling, annealed and plain: rows in batches, one batch in chunks of draws, and one chunk."""
    vae, generator = make_vae(), torch.Generator().manual_seed(1)
    pair, x = (vae.model, vae.guide), torch.randn(300, 2, generator=generator)
    yield "log_evidence, batches of rows", vars(pv.log_evidence(*pair, x, num_samples=40))
    yield "log_evidence, one batch", vars(pv.log_evidence(*pair, x[:9], num_samples=40))
    many = torch.randn(5000, 2, generator=generator), torch.randn(5000, generator=generator)
    yield "log_evidence, draws", vars(pv.log_evidence(regression, regression_guide, *many, num_samples=200))
    short = {"num_chains": 10, "num_temperatures": 4}
    yield "annealed, batches of rows", vars(pv.annealed_log_evidence(*pair, x, **short))
    few = [tensor[:500] for tensor in many]
    with mock.patch.object(importance_sampling, "_BUDGET", 2**17):
        yield "annealed, draws", vars(pv.annealed_log_evidence(regression, regression_guide, *few, **short))


def decompositions():
    """Draws compared with q(z), sums over states, and terms alone, each in batches of rows and in one."""
    vae, bernoulli, generator = make_vae(2), make_bernoulli_vae(), torch.Generator().manual_seed(1)
    x = torch.randn(150, 2, generator=generator)
    for rows in (150, 64):
        with mock.patch.object(model_guide, "_BUDGET", rows * 64):
            yield f"decompose, {rows}", as_dict(pv.decompose(vae.model, vae.guide, x))
            yield f"decompose, states, {rows}", as_dict(pv.decompose(bernoulli.model, bernoulli.guide, x))
            with mock.patch.multiple(decomposition, _MAX_PAIRS=1, _MIN_COMPARED=50):
                yield f"decompose, some rows, {rows}", as_dict(pv.decompose(vae.model, vae.guide, x))
            yield f"decompose, prior of each row, {rows}", as_dict(pv.decompose(own_prior, own_guide, x))
    yield "decompose, global", as_dict(pv.decompose(regression, regression_guide, x, x[:, 0]))


def own_prior(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x[:, 0], 1.0))
        pyro.sample("x", dist.Normal(z[:, None], 1.0).to_event(1), obs=x)


def own_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.mean(1), 0.7))


def exact_answers():
    """Quadratures and sums, of rows in batches, and of one batch whose quadrature is in batches."""
    vae, bernoulli = make_vae(), make_bernoulli_vae()
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    for rows in (40, 16):
        with mock.patch.object(model_guide, "_BUDGET", rows * 64):
            for name, each in (("quadrature", vae), ("sum", bernoulli)):
                yield f"exact.log_evidence, {name}, {rows}", exact.log_evidence(each.model, x)
                yield f"exact.elbo, {name}, {rows}", exact.elbo(each.model, each.guide, x)
                yield f"exact.kl, {name}, {rows}", exact.kl(each.model, each.guide, x)
                yield f"exact.posterior, {name}, {rows}", exact.posterior(each.model, x).mean


def as_dict(result):
    """The attributes of a result, and of those in it, by name."""
    if dataclasses.is_dataclass(result):
        return {field.name: as_dict(getattr(result, field.name)) for field in dataclasses.fields(result)}
    if isinstance(result, dict):
        return {name: as_dict(value) for name, value in result.items()}
    return result


FUNCTIONS = (evaluations, estimates, decompositions, exact_answers)


def numbers():
    """All that is the same on each rank, by name."""
    return {name: value for function in FUNCTIONS for name, value in function()}


@pytest.fixture(scope="module")
def alone():
    return numbers()  # in this process, which then has imported what its copies need


@pytest.fixture(scope="module", params=SIZES)
def shared(request, alone):
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
    vae = make_bernoulli_vae()
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
