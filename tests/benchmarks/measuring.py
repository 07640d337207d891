"""Measurement of a case: check that all contestants compute the same, then time them in turns."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, quantiles, stdev
from typing import Any, TextIO

import inputs
from cases import Case
from processes import CONTESTANTS, Process, Unusable
from scipy.stats import t as student_t

REFERENCES = ("handwritten", "pyro", "eager", "numpyro")  # the first that works gives the spread between seeds
FAILURE = 1e-5  # probability of a false alarm


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement."""

    rounds: int = 7  # turns of each contestant
    seconds: float = 0.8  # length of a turn
    threads: int = 2  # of each contestant
    clock: str = "wall"  # or "processor", whose seconds do not depend on other load if there is one thread
    reference_seeds: int = 16  # runs of the reference, which estimate the spread between seeds
    seeds: int = 4  # runs of the others, one if they compile; 0 for no check
    pause: float = 0.3  # seconds between turns, in which waiting threads fall asleep
    settle: float = 1.0  # factor of the warm-up of a contestant that changes its engine while it runs


class Entrant:
    """A contestant on a case, and its results so far."""

    def __init__(self, name: str):
        self.name = name
        self.process: Process | None = None
        self.found: dict[str, Any] = {"title": CONTESTANTS[name].title}
        self.turns: list[dict[str, float]] = []

    def ready(self) -> dict[str, Any] | None:
        """Wait until the libraries are loaded; return the memory that the process begins with."""
        return self._try(lambda process: process.ready())

    def request(self, do: str, **arguments: Any) -> dict[str, Any] | None:
        """Send a command and wait for the answer."""
        return self._try(lambda process: process.request(do, **arguments))

    def _try(self, ask: Callable[[Process], dict[str, Any]]) -> dict[str, Any] | None:
        """Ask the process; a contestant that fails is out, and its failure is its result."""
        try:
            return ask(self.process) if self.process else None
        except Unusable as error:
            self.process = None
            self.found["not_available" if error.missing else "failed"] = str(error)
            return None

    def result(self) -> dict[str, Any]:
        """Return times of a unit of work, in seconds, and memory, in MB."""
        if not self.turns:
            return self.found
        times = [turn["seconds"] / turn["work"] for turn in self.turns]
        middle = median(times)
        lower, _, upper = quantiles(times, n=4, method="inclusive") if len(times) > 1 else (middle, middle, middle)
        spread = {"lower": lower, "upper": upper, "fastest": min(times), "slowest": max(times)}
        found = {"time": middle} | spread | self.found
        # The first unit of work includes what is done once: tracing, compilation, checks.
        for start, of in (("start", "check"), ("start_again", "first")):
            if f"{of}_seconds" in found:
                found[start] = max(0.0, found.pop(f"{of}_seconds") - found.pop(f"{of}_work") * middle)
        return found | {"peak": self.turns[-1]["peak"], "turns": self.turns}


def measure(
    case: Case, names: Sequence[str], settings: Settings, folder: Path, log: TextIO, mnist: Path | None = None
) -> dict[str, Any]:
    """Measure a case; the result can be written as JSON."""
    inputs.write(case, folder, mnist)
    entrants, reference = {name: Entrant(name) for name in names}, None
    with ExitStack() as stack:
        for entrant in entrants.values():  # all processes load their libraries at the same time
            log.write(f"--- {case.name}: {entrant.name}\n")
            log.flush()
            entrant.process = Process(entrant.name, case, folder, settings.threads, settings.clock, log)
            stack.enter_context(closing(entrant.process))
        for entrant in entrants.values():
            if begun := entrant.ready():
                entrant.found["begun_with"] = begun
        for name in (name for name in REFERENCES if name in names and settings.seeds):
            if reference is None and _check(entrants[name], case, settings.reference_seeds):
                reference = name
        for entrant in entrants.values():
            if settings.seeds and entrant.name != reference:
                _check(entrant, case, 1 if CONTESTANTS[entrant.name].compiles else settings.seeds)
        for entrant in entrants.values():
            warm_up = max(settings.seconds / 3, CONTESTANTS[entrant.name].warm_up * settings.settle)
            if begun := entrant.request("start", warm_up=warm_up):
                entrant.found |= {key: begun[key] for key in ("first_seconds", "first_work")}
        for entrant in _turns(list(entrants.values()), settings.rounds):
            time.sleep(settings.pause if len(entrants) > 1 else 0.0)
            if turn := entrant.request("round", seconds=settings.seconds):
                entrant.turns.append(turn)
    results = {name: entrant.result() for name, entrant in entrants.items()}
    found = {"case": asdict(case), "unit": case.unit, "contestants": results}
    return found | {"agreement": agreement(results, reference)}


def _check(entrant: Entrant, case: Case, runs: int) -> bool:
    """Compute the losses that are compared; return whether that worked."""
    checked = entrant.request("check", seeds=list(range(1, runs + 1)))
    if checked is None:
        return False
    work = {"train": case.check_rows // case.batch_size, "evaluate": case.check_rows * case.particles}
    entrant.found |= {"losses": checked["losses"], "check_seconds": checked["seconds"][0]}
    entrant.found["check_work"] = case.check * work.get(case.task, case.particles)
    return True


def _turns(entrants: list[Entrant], rounds: int) -> Iterator[Entrant]:
    """Yield each contestant in every round, another one first each time, so that other load affects all equally."""
    for number in range(rounds if entrants else 0):
        shift = number % len(entrants)
        yield from entrants[shift:] + entrants[:shift]


def agreement(results: dict[str, dict[str, Any]], reference: str | None) -> dict[str, Any]:
    """Compare the mean loss of each contestant with that of the reference, given the spread between its seeds.

    The prediction interval is m ± t s sqrt(1/n + 1/R) for R runs of the reference with mean m and standard deviation s,
    and n runs of the contestant. Losses are compared by name: some are a bound, some the ELBO below it.
    """
    known = results[reference]["losses"] if reference else {}
    judged = []
    for name, result in results.items():
        for bound, runs in result.get("losses", {}).items():
            if name != reference and len(known.get(bound, [])) > 1:
                judged.append({"contestant": name, "bound": bound} | _compared(runs, known[bound]))
    return {"reference": reference, "contestants": judged}


def _compared(runs: list[float], reference: list[float]) -> dict[str, Any]:
    mean, spread, loss = fmean(reference), stdev(reference), fmean(runs)
    allowed = float(student_t.isf(FAILURE / 2, len(reference) - 1)) * spread
    allowed *= (1 / len(runs) + 1 / len(reference)) ** 0.5
    allowed += 1e-5 * abs(mean)  # rounding, where nothing is random
    off = loss - mean
    found = {"loss": loss, "reference_loss": mean, "spread": spread, "off": off, "allowed": allowed}
    return found | {"agrees": abs(off) <= allowed}
