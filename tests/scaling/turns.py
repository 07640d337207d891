"""Runs on some ranks that take turns, so that other load of the machine meets all of them alike."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import TextIO

SCRIPT = Path(__file__).parent / "train.py"
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Run:
    """A run of the script: a task on some ranks, with its options."""

    name: str
    task: str
    ranks: int
    batch: int = 1024
    compile: str = "choose"

    def command(self, folder: Path, options: Sequence[str]) -> list[str]:
        script = [str(SCRIPT), self.task, str(folder), "--batch", str(self.batch), "--compile", self.compile, *options]
        if self.ranks == 1:
            return [sys.executable, *script]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        return [*torchrun, f"--nproc-per-node={self.ranks}", *script]


class Entrant:
    """A run whose processes wait for their turns."""

    def __init__(self, run: Run, folder: Path, options: Sequence[str], log: TextIO):
        folder.mkdir(parents=True)
        self.run, self.folder = run, folder
        self.process = subprocess.Popen(run.command(folder, options), stdout=log, stderr=log)

    def turn(self, number: int, timeout: float = 300.0) -> None:
        """Let the run take its turn of this number, and wait for its end; turn 0 begins by itself."""
        (self.folder / f"turn-{number}").touch()
        latest = time.monotonic() + timeout
        while any(len(lines) <= number for lines in self._lines()):
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.run.name} ended with {self.process.returncode}")
            if time.monotonic() > latest:
                raise TimeoutError(f"{self.run.name}: turn {number} has not ended after {timeout:.0f} s")
            time.sleep(0.01)

    def _lines(self) -> list[list[str]]:
        paths = [self.folder / f"rank-{rank}.jsonl" for rank in range(self.run.ranks)]
        return [path.read_text().splitlines() if path.exists() else [] for path in paths]

    def times(self, warm_up: int) -> Times:
        """Return the seconds of each turn after the warm-up, the longest of all ranks, by clock."""
        turns = [[json.loads(line) for line in lines[warm_up:]] for lines in self._lines()]
        return {name: [max(rank[name] for rank in turn) for turn in zip(*turns, strict=True)] for name in turns[0][0]}

    def close(self) -> None:
        (self.folder / "end").touch()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait()


@contextmanager
def started(runs: Sequence[Run], folder: Path, options: Sequence[str], log: TextIO) -> Iterator[list[Entrant]]:
    """Start all runs, one after the other, and end them with the block."""
    entrants: list[Entrant] = []
    try:
        for run in runs:
            entrants.append(Entrant(run, folder / run.name.replace(" ", "-"), options, log))
            entrants[-1].turn(0)
        yield entrants
    finally:
        for entrant in entrants:
            entrant.close()


def measure(
    runs: Sequence[Run], rounds: int, warm_up: int, folder: Path, options: Sequence[str], log: TextIO
) -> dict[str, Times]:
    """Return the seconds of each turn by run; runs take their turns in another order each time."""
    with started(runs, folder, options, log) as entrants:
        for number in range(1, warm_up + rounds + 1):
            shift = number % len(entrants)
            for entrant in entrants[shift:] + entrants[:shift]:
                entrant.turn(number)
        return {entrant.run.name: entrant.times(warm_up + 1) for entrant in entrants}


def trained(run: Run, folder: Path, options: Sequence[str], log: TextIO) -> list[dict[str, float]]:
    """Run the task ``elbo`` to its end, and return what it has written, a line for each seed."""
    subprocess.run(run.command(folder, options), stdout=log, stderr=log, check=True)
    return [json.loads(line) for line in (folder / f"elbo-{run.ranks}.jsonl").read_text().splitlines()]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    lower, middle, upper = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "lower": lower, "upper": upper}


def ratio(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles of the ratios of two runs, turn by turn: neighbours meet the same load."""
    return summary([one / other for one, other in zip(first, second, strict=True)])
