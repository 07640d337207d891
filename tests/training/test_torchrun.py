"""Scripts as they are, run by python and by torchrun."""

import functools
import json
import os
import statistics
import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

SCRIPT = """
import json, sys, torch
import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors

found = []
digits, network = pv.datasets.digits("train"), networks.mlp([64])
x, held_out = pv.datasets.binarize(digits.x), pv.datasets.binarize(pv.datasets.digits("test").x)
for seed in range(4):
    torch.manual_seed(seed)
    vae = pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(64, 2, network), likelihoods.Bernoulli(2, 64, network))
    pv.fit(vae.model, vae.guide, x, epochs=20, batch_size=100, lr=3e-3, seed=seed)
    found.append(pv.evaluate(vae.model, vae.guide, held_out, num_samples=10)["elbo"])
if pv.parallel.rank() == 0:
    print(json.dumps(found))
"""


def run(path, ranks=None, timeout=240):
    """Run a script, and return its exit code, what it prints, and its errors."""
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*start, str(path)], capture_output=True, text=True, timeout=timeout, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    path = tmp_path_factory.mktemp("torchrun") / "script.py"
    path.write_text(SCRIPT)

    @functools.cache
    def elbos(ranks):
        code, printed, errors = run(path, ranks)
        assert code == 0, errors
        return json.loads(printed.splitlines()[-1])

    return elbos


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_held_out_elbo_is_that_of_one_process_within_its_standard_error(held_out, ranks):
    ours, theirs = held_out(ranks), held_out(None)
    error = (sum(statistics.variance(of) for of in (ours, theirs)) / len(ours)) ** 0.5
    assert abs(statistics.mean(ours) - statistics.mean(theirs)) < 4 * error
    assert max(ours) < -15  # nats per image, of 64 pixels
    assert min(ours) > -30


FAULTS = {
    "in the script": "if pv.parallel.rank() == 1:\n    raise LookupError('a fault of the script')",
    "in the data": "x = x[: 900 + 10 * pv.parallel.rank()]",
    "before fit": "import os\nif os.environ.get('RANK') == '1':\n    raise LookupError('a fault before fit')",
}


@pytest.mark.parametrize(
    ("case", "message"),
    [("in the script", "a fault of the script"), ("in the data", "must be the same on every rank"),
     ("before fit", "a fault before fit")],
)  # fmt: skip
def test_a_script_that_fails_on_one_rank_ends_with_its_message(tmp_path, case, message):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.replace("for seed in range(4):", f"{FAULTS[case]}\nfor seed in range(1):"))
    code, _, errors = run(path, 2, timeout=90)
    assert code != 0
    assert message in errors
