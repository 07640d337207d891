"""Processes of contestants, and the commands that the parent sends them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
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
    compile a case, or missing in another version of the package. One that changes its engine while it runs needs some
    seconds of ``warm_up`` before it is measured.
    """

    title: str  # in the tables
    module: str  # with ``train``, ``evaluate`` or ``export``, which take ``options``
    options: Mapping[str, Any] = field(default_factory=dict)
    compiles: bool = False
    warm_up: float = 0.0


CONTESTANTS = {
    "automatic": Contestant("pyro_vae, by itself", "ours", compiles=True, warm_up=25.0),
    "captured": Contestant("pyro_vae, compiled", "ours", {"compile": True}, compiles=True),
    "captured-svi": Contestant("pv.SVI, compiled", "ours", {"compile": True, "by_step": True}, compiles=True),
    "replayed": Contestant("pyro_vae, replayed", "ours", {"replayed": True}, compiles=True),
    "eager": Contestant("pyro_vae, eager", "ours", {"compile": False}),
    "vae-svi": Contestant("pyro.infer.SVI of pv.VAE", "ours", {"by_step": True}),
    "pyro": Contestant("pyro.infer.SVI, plain Pyro", "plain_pyro"),
    "handwritten": Contestant("PyTorch by hand", "handwritten"),
    "numpyro": Contestant("NumPyro, lax.scan", "numpyro_scan"),
    "floor": Contestant("matrix products alone", "floor"),
}
USUAL = [name for name in CONTESTANTS if not name.endswith("-svi")]


class Unusable(Exception):
    """The contestant cannot do this, or failed."""

    def __init__(self, answer: Mapping[str, str]):
        self.missing = "missing" in answer
        super().__init__(answer.get("missing") or answer.get("failed"))


class Process:
    """The process of a contestant on a case, with the folder of its inputs and a file for its output."""

    def __init__(self, name: str, case: Case, folder: Path, threads: int, clock: str, log: TextIO):
        contestant = CONTESTANTS[name]
        # Compiled code is not kept for another contestant or run of the benchmark, since compilation is timed too.
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor-{name}"), "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=PIPE, stdout=PIPE, stderr=log, text=True, env=environment
        )
        order = {"module": contestant.module, "options": contestant.options, "optional": contestant.compiles}
        self._send(**order, case=asdict(case), folder=str(folder), threads=threads, clock=clock)

    def ready(self) -> dict[str, Any]:
        """Wait until libraries and data are loaded; return the memory that they take."""
        return self._answer()

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
        with suppress(BrokenPipeError):  # if the process has ended, the answer says so
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"failed": f"its process ended with {self.process.wait()}"}
        if "missing" in answer or "failed" in answer:
            self.close()
            raise Unusable(answer)
        return answer
