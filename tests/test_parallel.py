"""Several ranks share evaluation, evidence, diagnostics and exports, and have the numbers of one process.

Each test runs a function on one process and on ranks, and compares all that it yields.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from ranks import run_on_ranks
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyro_vae as pv
from pyro_vae import exact, guides, likelihoods, model_guide, networks, parallel, priors
from pyro_vae._utils.ranks import ranks
from pyro_vae.diagnostics import calibration, decomposition, refinement
from pyro_vae.evidence import importance_sampling
from pyro_vae.exact import model_density


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


def mixture(x):
    """A mixture of two normals, whose classes are summed out."""
    means = pyro.sample("means", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(means[k.long()], 1.0), obs=x)


def mixture_guide(x):
    pyro.sample("means", dist.Normal(torch.tensor([-1.0, 1.0]), 0.3).to_event(1))


def fixed_guide(x):
    pyro.sample("means", dist.Delta(torch.tensor([-1.0, 1.0])).to_event(1))


def school(x):
    """A hierarchy, whose likelihood is an integral over local latents."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def school_guide(x):
    pyro.sample("mean", dist.Normal(x.mean(), 0.4))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


def exports():
    """Draws one by one and together, in memory, and in a file that rank 0 writes."""
    vae = make_vae()
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    programs = {
        "vae": (vae.model, vae.guide, x),
        "mixture": (mixture, mixture_guide, x[:, 0]),
        "fixed": (mixture, fixed_guide, x[:, 0]),
        "school": (school, school_guide, x[:, 0]),
    }
    for name, arguments in programs.items():
        yield f"to_datatree, {name}", as_arrays(pv.to_datatree(*arguments, draws=30))
    yield "to_datatree, parallel", as_arrays(pv.to_datatree(*programs["vae"], draws=30, parallel=True))
    with shared_folder() as folder:
        for name, options in {"chunks": {"chunk": 4}, "parallel": {"chunk": 7, "parallel": True}}.items():
            path = pv.save_draws(folder / f"{name}.nc", *programs["vae"], draws=30, **options)
            with xr.open_datatree(path, engine="h5netcdf") as tree:
                yield f"save_draws, {name}", as_arrays(tree)
        yield "files of draws", sorted(path.name for path in folder.iterdir())


def gaps():
    """Rows that are refined in chunks and together, with exact and estimated numbers."""
    vae = make_vae()
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    options = {"steps": 5, "num_samples": 50, "num_particles": 8}
    for chunk in (2**20, 2**12):
        with mock.patch.object(refinement, "_CHUNK", chunk), mock.patch.object(model_density, "_BUDGET", 2**14):
            for tolerance in (1e-3, None):
                gap = pv.inference_gap(vae.model, vae.guide, x, tolerance=tolerance, **options)
                found = {name: value for name, value in vars(gap).items() if isinstance(value, torch.Tensor)}
                yield f"inference_gap, {chunk}, {tolerance}", found
    gap = pv.inference_gap(school, school_guide, x[:, 0], num_samples=20)
    yield "inference_gap, global", {name: value for name, value in vars(gap).items() if name != "evidence"}


def reports():
    """A page that rank 0 writes, and a model file."""
    vae = make_vae()
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
    options = {"num_samples": 20, "num_simulations": 10, "max_refined": 5}
    with shared_folder() as folder:
        found = pv.report(folder / "page.html", vae.model, vae.guide, x, **options)
        yield "report", (found.skipped, float(found.evidence.log_evidence.mean()), found.nats.elbo)
        vae.save(folder / "model.pt")
        yield "save", sorted(path.name for path in folder.iterdir())
        yield "load", pv.evaluate(pv.VAE.load(folder / "model.pt").model, vae.guide, x)


@contextmanager
def shared_folder():
    """A folder of all ranks, which rank 0 makes and removes."""
    with tempfile.TemporaryDirectory() as own:
        yield Path(ranks().from_first("a folder", own))
        with ranks().together("the end of a folder"):
            pass


def as_arrays(tree):
    """The values and dimensions of all variables, by name, and the attributes that are no times."""
    found = {
        f"{group.path}/{name}": (value.dims, torch.from_numpy(value.to_numpy().astype(float)))
        for group in tree.subtree
        for name, value in group.data_vars.items()
    }
    attrs = {f"{group.path}: {name}": value for group in tree.subtree for name, value in group.attrs.items()}
    return found | {name: value for name, value in attrs.items() if "created_at" not in name}


def as_dict(result):
    """The attributes of a result, and of those in it, by name."""
    if dataclasses.is_dataclass(result):
        return {field.name: as_dict(getattr(result, field.name)) for field in dataclasses.fields(result)}
    if isinstance(result, dict):
        return {name: as_dict(value) for name, value in result.items()}
    return result


def calibrations():
    """Rows that are simulations, data sets that are, with and without refits, and chains of NUTS."""
    vae = make_vae()
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    with mock.patch.object(calibration, "_BATCH", 16):
        yield "calibrate, rows", as_dict(pv.calibrate(vae.model, vae.guide, x, num_simulations=50, num_draws=20))
    y = x[:8, 0]
    yield "calibrate, data sets", as_dict(pv.calibrate(school, school_guide, y, num_simulations=10, num_draws=10))
    options = {"num_simulations": 10, "num_draws": 10, "refit": {"epochs": 2, "lr": 0.01}}
    yield "calibrate, refits", as_dict(pv.calibrate(school, AutoNormal(school), y, **options))
    yield "reference", as_arrays(pv.reference(school, y, draws=5, warmup=5, chains=3))


QUICK = (evaluations, decompositions, exports)
SLOW = (estimates, exact_answers, gaps, reports, calibrations)


def numbers(functions):
    """All that is the same on each rank, by name."""
    return {name: value for function in functions for name, value in function()}


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


def compare(functions, sizes):
    alone = dict(leaves(numbers(functions)))  # in this process, which then has imported what its copies need
    for size in sizes:
        for found in map(dict, map(leaves, run_on_ranks(numbers, size, functions, timeout=400))):
            compare_leaves(alone, found)


def compare_leaves(expected, found):
    assert found.keys() == expected.keys()
    for path, value in found.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, expected[path], rtol=1e-5, atol=1e-5, equal_nan=True, msg=path)
        elif isinstance(value, float):
            assert value == pytest.approx(expected[path], rel=1e-5, abs=1e-5, nan_ok=True), path
        else:
            assert value == expected[path], path


@pytest.mark.parametrize("function", QUICK)
def test_every_rank_has_the_numbers_of_one_process(function):
    compare([function], [3])


@pytest.mark.slow
@pytest.mark.parametrize("function", [*QUICK, *SLOW])
def test_all_numbers_of_ranks_have_the_numbers_of_one_process(function):
    """Also more ranks than there are chunks."""
    compare([function], [2, 3, 5])


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
        pv.evaluate(vae.model, vae.guide, DataLoader(x.split(10), batch_size=None))
    return True


def test_a_loader_whose_later_batches_differ_is_refused():
    assert run_on_ranks(changing_loaders, 2) == [True, True]


def failing_calls():
    """What one rank alone finds wrong, what ranks call that differs, and a call of one rank alone."""
    vae = make_vae()
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    pair, found = (vae.model, vae.guide), []

    def failing(x):
        if parallel.rank() == 0:
            raise KeyError("the reason")
        return vae.model(x)

    for call in (
        lambda: pv.evaluate(failing, vae.guide, x),
        lambda: pv.evaluate(*pair, x) if parallel.rank() else pv.decompose(*pair, x),
    ):
        with pytest.raises((KeyError, RuntimeError)) as caught:
            call()
        found.append(str(caught.value.args[0]))
    rank = parallel.rank()
    with parallel.one_process():
        alone = pv.evaluate(*pair, x, num_samples=4) if rank == 1 else None
    return found, alone, pv.evaluate(*pair, x, num_samples=4)


def test_a_wrong_call_of_one_rank_is_an_error_of_all_and_a_call_in_one_process_is_none():
    (found, _, first), (others, alone, second) = run_on_ranks(failing_calls, 2)
    assert found[0] == "the reason"
    assert others[0] == "rank 0: 'the reason'"
    assert found[1] == others[1]
    assert "got decompose on rank 0, evaluate on rank 1" in found[1]
    assert alone == first == second


def nonfinite_rows():
    """The ELBO of data of which a row is too large for float32."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None], 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    x[25] = 1e30
    found = []
    for call in (
        lambda: pv.evaluate(model, guide, x, batch_size=10),
        lambda: pv.fit(model, guide, x[:20], epochs=1, batch_size=10, validation=x, progress=False),
    ):
        with pytest.raises(FloatingPointError) as caught:
            call()
        found.append(str(caught.value))
    return found


def test_rows_that_are_not_finite_on_one_rank_are_an_error_of_all():
    alone = nonfinite_rows()
    assert "in rows 25 of the data" in alone[0]
    for found in run_on_ranks(nonfinite_rows, 3):
        assert [text.removeprefix("rank 2: ") for text in found] == alone


SCRIPT = """
import sys
import torch
import test_parallel
found = test_parallel.numbers([test_parallel.evaluations, test_parallel.estimates, test_parallel.decompositions])
if test_parallel.parallel.rank() == 0:
    torch.save(dict(test_parallel.leaves(found)), sys.argv[1])
"""


@pytest.mark.integration
def test_a_script_has_the_same_numbers_under_torchrun(tmp_path):
    script, found = tmp_path / "script.py", []
    script.write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths}
    for name, start in (("alone", []), ("ranks", torchrun)):
        path = tmp_path / f"{name}.pt"
        subprocess.run([sys.executable, *start, script, path], check=True, timeout=240, env=environment)
        found.append(torch.load(path))
    compare_leaves(*found)
