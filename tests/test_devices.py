"""No operation mixes devices: with a model on another device, or with another default device than that of the data.

The checks run on a stand-in device (tests/stand_in_device.py), in a process of their own, since it changes the whole
process.
"""

import json
import subprocess
import sys
from pathlib import Path

import pair_cases
import part_cases
import pytest

CHECKS = [
    "fit", "fit of two variables", "fit of a discrete latent", "full rank", "low rank", "mixture", "checkpoints",
    "save", "evaluate", "log_evidence", "annealed", "exact of one variable", "exact of two variables",
    "exact of a discrete latent", "decompose", "inference_gap", "calibrate", "plot of calibration", "report",
    "plots of evidence", "plots of images", "posterior of one variable", "posterior of two variables",
    "posterior of a discrete latent", "plate diagram", "to_datatree", "datasets", "missing entries",
    "draws in files, and a reference",
    *(f"prior {name}" for name in pair_cases.PRIORS), *(f"guide {name}" for name in pair_cases.GUIDES),
    *(f"likelihood {name}" for name in pair_cases.LIKELIHOODS),
    *(f"objective {name}" for name in pair_cases.OBJECTIVES),
]  # fmt: skip


def errors(situation):
    """The errors of all checks in a situation, by check."""
    program = Path(__file__).with_name("device_checks.py")
    command = [sys.executable, program, situation]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.skipif(not part_cases.HAS_ZUKO, reason="flows need zuko")
@pytest.mark.parametrize(
    "situation", ["model on the device", pytest.param("another default device", marks=pytest.mark.slow)]
)
def test_no_operation_mixes_devices(situation):
    assert errors(situation) == dict.fromkeys(CHECKS)


@pytest.mark.skipif(not part_cases.HAS_ZUKO, reason="flows need zuko")
def test_the_stand_in_raises_where_devices_mix():
    assert errors("a mixture of devices") == {
        "an operation": "MixedDevices",
        "a generator": "MixedDevices",
        "a model and data": "ValueError",
        "numpy": "TypeError",
    }
