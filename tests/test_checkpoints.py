"""A run that is killed and goes on ends with the same bits; what is damaged or foreign is told as that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_vae.tensor_files import read

ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).parent / "killed_runs.py"


def run_script(*arguments, cache):
    """Its output."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # or there would be a pool of processes for each that is forked
    }
    script = [sys.executable, str(SCRIPT), *map(str, arguments)]
    result = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def same(ours, theirs):
    """Whether two folders hold the same checkpoints, to the bit: parameters, optimizer, random states, history."""
    for name, kind in (("last.ckpt", "checkpoint"), ("best.ckpt", "best parameters")):
        (header, tensors), (other_header, other_tensors) = (read(folder / name, kind) for folder in (ours, theirs))
        differing = [name for name in header | other_header if header.get(name) != other_header.get(name)]
        differing += list(tensors.keys() ^ other_tensors.keys())
        differing += [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])]
        assert not differing, (theirs, name, differing)
    return True


SHORT = [("continuous", 12), ("discrete", 8), ("frozen", 8), ("captured", 3)]
LONG = [("continuous", 150), ("discrete", 100), ("frozen", 100), ("captured", 25), ("frozen, captured", 10)]


@pytest.mark.parametrize(
    ("variant", "kills"),
    [*SHORT, *(pytest.param(*row, marks=pytest.mark.slow) for row in (*LONG, ("compiled", 8)))],
)
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bits(variant, kills, tmp_path):
    done, _, rounds = map(int, run_script(variant, tmp_path, kills, 0, cache=tmp_path / "cache").split())
    assert done >= kills
    killed = sorted(tmp_path.glob("killed *"))
    assert len(killed) == rounds + 1
    assert all(same(tmp_path / "whole", folder) for folder in killed)
