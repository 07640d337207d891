"""What the tests of exports read from a tree, and programs that they run."""

import json
import subprocess
import sys

import torch
import xarray as xr


def drawn(tree, name, group="posterior"):
    """The values of a variable, draws first."""
    return torch.from_numpy(tree[group][name].values[0])


def dims_of(group):
    return {name: variable.dims for name, variable in group.data_vars.items()}


def assert_file_holds(path, tree):
    tree.to_netcdf(path, engine="h5netcdf")
    with xr.open_datatree(path) as loaded:
        xr.testing.assert_identical(loaded.load(), tree)


def run_program(program, *arguments):
    """Run a program in another process, with warnings as errors, and return what it prints as JSON."""
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
