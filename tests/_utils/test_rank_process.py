"""Which process is a rank: one that torchrun, or its shell script, starts, and none that a rank starts."""

import os
import subprocess
import sys

ASKS = "import pyro_vae; from pyro_vae._utils import rank_process as r; print(r.is_started_by_torchrun(), flush=True)"
STARTS = f"""
import os, subprocess, sys
{ASKS}
child = [sys.executable, "-c", {ASKS!r}]
subprocess.run(child, check=True)
subprocess.run(child, check=True, env=os.environ | {{"MASTER_PORT": "2"}})  # that torchrun of its own starts
if (pid := os.fork()) == 0:
    print(r.is_started_by_torchrun(), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
"""


def answers(*command, **variables):
    start = {"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "1", "RANK": "1", "WORLD_SIZE": "2"} | variables
    kept = {name: value for name, value in os.environ.items() if name != "PYRO_VAE_RANK"}
    found = subprocess.run(command, env=kept | start, check=True, capture_output=True, text=True, timeout=60)
    return found.stdout.split()


def test_a_rank_is_one_and_what_it_starts_or_forks_is_none_but_for_ranks_of_another_start():
    assert answers(sys.executable, "-c", STARTS) == ["True", "False", "True", "False"]


def test_a_process_that_a_shell_script_of_torchrun_starts_is_a_rank():
    assert answers("sh", "-c", '"$0" -c "$1" && "$0" -c "$1"', sys.executable, ASKS) == ["True", "True"]


def test_a_process_alone_is_no_rank():
    assert answers(sys.executable, "-c", ASKS, WORLD_SIZE="1") == ["False"]
