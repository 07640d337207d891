"""Races of contestants to the target of a problem, and their pace in turns."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from subprocess import PIPE
from typing import Any, TextIO

from judge import Judge
from problems import Problem, write_inputs
from processes import Process, Unusable

TRAINER = Path(__file__).parent / "trainer.py"
PACED_STEPS = 50  # of an epoch whose time is measured


@dataclass(frozen=True)
class Contestant:
    """An implementation that takes part, by its module with a function ``train``, which takes ``options``."""

    title: str  # in the tables
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    start: float = 3.0  # seconds of training before its pace is measured, in which it compiles


CONTESTANTS = {
    "automatic": Contestant("pyro_vae, defaults", "by_pyro_vae", start=40.0),
    "compiled": Contestant("pyro_vae, compile=True", "by_pyro_vae", {"compile": True}, start=20.0),
    "eager": Contestant("pyro_vae, compile=False", "by_pyro_vae", {"compile": False}),
    "pyro": Contestant("plain Pyro", "by_pyro"),
    "numpyro": Contestant("NumPyro, lax.scan", "by_numpyro"),
    "pythae": Contestant("pythae", "by_pythae"),
}


@dataclass(frozen=True)
class Paces:
    """Settings of the measurement of seconds per step."""

    rounds: int = 5  # turns of each contestant
    seconds: float = 3.0  # length of a turn
    start: float = 1.0  # factor of the seconds before the first turn


class Trainer(Process):
    """The process of a contestant that trains on a problem, paused after each report."""

    def __init__(self, name: str, problem: Problem, folder: Path, epochs: int, threads: int, log: TextIO):
        contestant, self.weights = CONTESTANTS[name], folder / f"{name}.npz"
        # Compiled code is not kept from another run, since compilation is part of the time.
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor-{name}"), "JAX_PLATFORMS": "cpu"}
        log.write(f"--- {problem.name}: {name}\n")
        log.flush()
        self.process = subprocess.Popen(
            [sys.executable, str(TRAINER)], stdin=PIPE, stdout=PIPE, stderr=log, text=True, env=environment
        )
        order = {"module": contestant.module, "options": contestant.options, "problem": asdict(problem), "seed": 0}
        files = {"folder": str(folder), "weights": str(self.weights)}
        self._send(**order, **files, epochs=epochs, threads=threads)
        self._answer()  # the libraries are loaded
        self.last = {"steps": 0, "seconds": 0.0, "processor": 0.0}

    def go(self) -> dict[str, Any]:
        """Train until the next report."""
        return self.request("go")


def race(name: str, problem: Problem, folder: Path, threads: int, log: TextIO) -> dict[str, Any]:
    """Train a contestant until its log p(x) of held-out data is above the target, or its epochs have ended."""
    judge, checks = Judge(problem, folder), []
    with closing(Trainer(name, problem, folder, problem.epochs, threads, log)) as trainer:
        while "ended" not in (report := trainer.go()):
            if problem.has_check(report["epoch"]):
                value = judge(trainer.weights)
                checks.append({key: report[key] for key in ("epoch", *trainer.last)} | {"value": value})
                log.write(f"--- {name}: {checks[-1]}\n")
                log.flush()
                if value >= problem.target:
                    break
    return {"reached": checks[-1]["value"] >= problem.target, "checks": checks, "peak": report.get("peak")}


def pace(
    names: Sequence[str], problem: Problem, folder: Path, threads: int, paces: Paces, log: TextIO
) -> dict[str, dict[str, Any]]:
    """Measure the seconds per step of contestants in turns, after the start of each.

    Their epochs are shorter than those of the problem, the steps are the same.
    """
    short = replace(problem, rows=min(problem.rows, PACED_STEPS * problem.batch_size))
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        trainers = {}
        for name in names:
            with _recorded(found.setdefault(name, {})):
                trainers[name] = Trainer(name, short, folder, 10**6, threads, log)
                stack.enter_context(closing(trainers[name]))
                found[name]["start"] = _turn(trainers[name], paces.start * CONTESTANTS[name].start)
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
        for _ in range(paces.rounds):
            for name in [name for name in trainers if "start" in found[name]]:
                with _recorded(found[name]):
                    turns[name].append(_turn(trainers[name], paces.seconds))
    for name, results in turns.items():
        if results:
            times = [turn["seconds"] / turn["steps"] for turn in results]
            used = [turn["processor"] / turn["steps"] for turn in results]
            found[name] |= {"step": median(times), "fastest": min(times), "slowest": max(times)}
            found[name]["step_processor"] = median(used)
    return found


def _turn(trainer: Trainer, seconds: float) -> dict[str, float]:
    """Let a contestant train for some seconds, and return what it did."""
    begun, report = trainer.last, {}
    while not report or report["seconds"] - begun["seconds"] < seconds:
        report = trainer.go()
    trainer.last = {name: report[name] for name in begun}
    return {name: report[name] - begun[name] for name in begun}


@contextmanager
def _recorded(found: dict[str, Any]) -> Iterator[None]:
    """Record that a contestant cannot do this, or failed."""
    try:
        yield
    except Unusable as error:
        found["not_available" if error.missing else "failed"] = str(error)


def attempt(name: str, problem: Problem, folder: Path, threads: int, log: TextIO) -> dict[str, Any]:
    """Race a contestant, or return why it cannot."""
    found: dict[str, Any] = {}
    with _recorded(found):
        found |= race(name, problem, folder, threads, log)
    return found


def contest(
    problem: Problem, raced: Sequence[str], paced: Sequence[str], steps: int | None, folder: Path, threads: int,
    paces: Paces, log: TextIO, mnist: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Race some contestants and measure the pace of others, whose time is that of the ``steps`` that a run needs.

    These are the steps of the first contestant that reached the target, if no other number is given.
    """
    write_inputs(problem, folder, mnist)
    found = {name: {"title": CONTESTANTS[name].title} for name in [*raced, *paced]}
    for name in raced:
        found[name] |= attempt(name, problem, folder, threads, log)
    reached = [result["checks"][-1]["steps"] for result in found.values() if result.get("reached")]
    steps = steps or (reached[0] if reached else None)
    if paced:
        for name, result in pace(paced, problem, folder, threads, paces, log).items():
            found[name] |= {"pace": result} if "step" in result else result
            if "step" in result and steps:
                start, left = result["start"], max(0, steps - result["start"]["steps"])
                found[name]["extrapolated"] = {
                    "steps": steps,
                    "seconds": start["seconds"] + left * result["step"],
                    "processor": start["processor"] + left * result["step_processor"],
                }
    return {"problem": asdict(problem), "contestants": found}
