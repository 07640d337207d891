"""No operation mixes devices: with a model on another device, or with another default device than that of the data.

The checks run on a stand-in device (tests/stand_in_device.py), in a process of their own, since it changes the whole
process.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import part_cases
import pytest

import pyro_vae

WITHOUT_DEVICE = {
    "datasets.mnist": "needs a download; its last line is that of digits",
    "exact.QuadratureError.__init__": "an error, of a text",
    "exact.QuadratureError.count_from": "changes a number in a text",
    "families.Family.forward": "abstract",
    "families.Relaxed.discrete": "abstract",
    "families.Relaxed.hard": "abstract",
    "families.Relaxed.soft": "abstract",
    "schedules.RunSchedule.begin": "abstract",
}
"""The public functions that no check runs, and why."""

FACTORIES = {
    f"torch.{name}"
    for name in (
        "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm",
        "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
    )
}  # fmt: skip
OF_MODULES = ("parts/", "objectives/baselines.py", "distributions/flow.py", "tables/networks.py", "tables/table.py")
"""Files whose functions make parameters and buffers, on the default device as the modules of torch do."""


def results(situation):
    """The results of the checks in a situation."""
    code = "import public_functions, sys; public_functions.record_runs(); import device_checks as checks; "
    command = [sys.executable, "-c", f"{code}checks.main(sys.argv[1])", situation]
    here = Path(__file__).parent
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=here)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.skipif(not part_cases.HAS_ZUKO, reason="flows need zuko")
@pytest.mark.parametrize(
    "situation",
    [
        "model on the device",
        pytest.param("another default device", marks=pytest.mark.slow),
        pytest.param("all on the default device", marks=pytest.mark.slow),
    ],
)
def test_every_public_function_runs_and_no_operation_mixes_devices(situation):
    assert results(situation) == {"errors": {}, "not run": sorted(WITHOUT_DEVICE)}


@pytest.mark.skipif(not part_cases.HAS_ZUKO, reason="flows need zuko")
def test_the_stand_in_raises_where_devices_mix():
    errors = results("a mixture of devices")["errors"]
    assert {name: error.partition(":")[0] for name, error in errors.items()} == {
        "an operation": "MixedDevices",
        "a generator": "MixedDevices",
        "a model and data": "ValueError",
        "numpy": "TypeError",
    }


def test_tensors_that_are_no_parameters_are_made_on_a_device_by_name():
    root = Path(pyro_vae.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(OF_MODULES):
            found += [f"{name}:{line}" for line in factories_without_device(path.read_text())]
    assert found == []


def test_a_factory_without_device_is_found():
    code = "torch.zeros(3)\ntorch.zeros(3, device=x.device)\ntorch.eye(3).to(x)\ntorch.rand(2)"
    assert factories_without_device(code) == [1, 4]


def factories_without_device(code):
    """The lines of calls that make a tensor on the default device, which is not that of the data."""
    tree = ast.parse(code)
    moved = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "to"}
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and id(node) not in moved and ast.unparse(node.func) in FACTORIES
        if "device" not in {keyword.arg for keyword in node.keywords}
    ]
