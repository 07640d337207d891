"""Processes of contestants, and the commands that the parent sends them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import Any, TextIO

from cases import Case

WORKER = Path(__file__).parent / "worker.py"


@dataclass(frozen=True)
class Contestant:
    """An implementation that takes part in the benchmark.

    One that ``compiles`` begins a run with seconds of compilation, so that one seed is checked. It may be unable to
    compile a case, or missing in another version of the package.
    """

    title: str  # in the tables
    module: str  # with ``train``, ``evaluate`` or ``export``, which take ``options``
    options: Mapping[str, Any] = field(default_factory=dict)
    compiles: bool = False


CONTESTANTS = {
    "captured": Contestant("pyro_vae, captured", "ours", {"compiled": True}, compiles=True),
    "captured-svi": Contestant("pv.SVI, captured", "ours", {"compiled": True, "by_step": True}, compiles=True),
    "eager": Contestant("pyro_vae, eager", "ours"),
    "vae-svi": Contestant("pyro.infer.SVI of pv.VAE", "ours", {"by_step": True}),
    "pyro": Contestant("pyro.infer.SVI, plain Pyro", "plain_pyro"),
    "handwritten": Contestant("PyTorch by hand", "handwritten"),
    "numpyro": Contestant("NumPyro, lax.scan", "numpyro_scan"),
    "floor": Contestant("matrix products alone", "floor"),
}


class Unusable(Exception):
    """The contestant cannot do this, or failed."""

    def __init__(self, answer: Mapping[str, str]):
        self.missing = "missing" in answer
        super().__init__(answer.get("missing") or answer.get("failed"))


class Process:
    """The process of a contestant on a case, with the folder of its inputs and a file for its output."""

    def __init__(self, contestant: Contestant, case: Case, folder: Path, threads: int, log: TextIO):
        # Compiled code is not kept for the next run of the benchmark, since compilation is timed too.
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=PIPE, stdout=PIPE, stderr=log, text=True, env=environment
        )
        order = {"module": contestant.module, "options": contestant.options, "optional": contestant.compiles}
        self._send(**order, case=asdict(case), folder=str(folder), threads=threads)
        self.begun_with = self._answer()

    def request(self, do: str, **arguments: Any) -> dict[str, Any]:
        self._send(do=do, **arguments)
        return self._answer()

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        try:
            self.process.wait(timeout=2)  # the end of its input stops it
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _send(self, **command: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Unusable({"failed": "its process has ended"}) from None

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"failed": f"its process ended with {self.process.wait()}"}
        if "missing" in answer or "failed" in answer:
            self.close()
            raise Unusable(answer)
        return answer
