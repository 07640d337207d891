"""The machine and the versions of a measurement."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from worker import processors_of


def machine(threads: int, *others: str) -> dict[str, Any]:
    """Return the processors that are used, and the versions of Python, of the packages that are measured and others."""
    packages = {}
    for name in ("torch", "pyro-ppl", "numpyro", "jax", "numpy", *others):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": threads,
        "affinity": processors_of(threads),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "packages": packages,
    }


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()
