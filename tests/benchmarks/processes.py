"""The parent's side: contestants in processes of their own, told in turn what to do."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from cases import Case

WORKER = Path(__file__).parent / "worker.py"


@dataclass(frozen=True)
class Contestant:
    """Who does the work.

    Attributes:
        title: for the tables.
        module: which has ``runner(task, **options)``.
        options: what it is told.
        compiles: whether a run begins with seconds of compilation: it is then checked with one seed. Such a one may be
            missing from this version of the package, or unable to compile a case.
    """

    title: str
    module: str
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
    """The contestant can't do this, or broke down."""

    def __init__(self, answer: Mapping[str, str]):
        self.missing = "missing" in answer
        super().__init__(answer.get("missing") or answer.get("failed"))


class Process:
    """A contestant at work on a case.

    Args:
        contestant: who.
        case: on what.
        folder: where its inputs are.
        threads: how many it may use.
        log: for what it prints.
    """

    def __init__(self, contestant: Contestant, case: Case, folder: Path, threads: int, log: TextIO):
        # Compiled code is not kept from one run of the benchmark to the next: to compile is timed too.
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        self._send(
            case=asdict(case),
            module=contestant.module,
            options=dict(contestant.options),
            optional=contestant.compiles,
            folder=str(folder),
            threads=threads,
        )
        self.begun_with = self._answer()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Tell it to do something, and wait until it has."""
        self._send(do=do, **arguments)
        return self._answer()

    def close(self) -> None:
        """End it, whatever it does."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        try:
            self.process.wait(timeout=2)  # the end of its input tells it to stop
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
