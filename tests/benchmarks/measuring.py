"""One case, all contestants: first that they compute the same, then their times, in rounds that take turns."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, TextIO

import inputs
from cases import Case
from processes import CONTESTANTS, Process, Unusable
from scipy.stats import t as student_t

REFERENCES = ("handwritten", "pyro", "eager", "numpyro")  # the first that can gives the spread between seeds
FAILURE = 1e-5  # probability that contestants which do the same are called different


@dataclass(frozen=True)
class Settings:
    """Of a measurement.

    Attributes:
        rounds: how often each contestant has its turn.
        seconds: of a turn.
        threads: that each may use.
        reference_seeds: runs of the reference, from which the spread between seeds is learned.
        seeds: runs of the others; of those that compile, one. Without any nothing is checked.
        pause: seconds between turns, in which threads that wait busily for work fall asleep.
    """

    rounds: int = 7
    seconds: float = 3.0
    threads: int = 2
    reference_seeds: int = 16
    seeds: int = 4
    pause: float = 0.3


class Entrant:
    """A contestant that takes part in a case, and what is known of it so far."""

    def __init__(self, name: str):
        self.name = name
        self.process: Process | None = None
        self.found: dict[str, Any] = {"title": CONTESTANTS[name].title}
        self.turns: list[dict[str, float]] = []

    def ask(self, do: str, **arguments: Any) -> dict[str, Any] | None:
        """Tell it what to do; when it can't, that is its result, and it is out."""
        if self.process is None:
            return None
        try:
            return self.process.ask(do, **arguments)
        except Unusable as error:
            self.give_up(error)
            return None

    def give_up(self, error: Unusable) -> None:
        """Out of the race."""
        self.process = None
        self.found["not_available" if error.missing else "failed"] = str(error)

    def result(self) -> dict[str, Any]:
        """What came of it: times of a unit of work, in seconds, and memory, in MB."""
        if not self.turns:
            return self.found
        times = [turn["seconds"] / turn["work"] for turn in self.turns]
        middle = median(times)
        found = {"time": middle, "fastest": min(times), "slowest": max(times)} | self.found
        # The first unit of work comes with all that is done once: tracing, compilation, checks.
        for start, of in (("start", "check"), ("start_again", "first")):
            if f"{of}_seconds" in found:
                found[start] = max(0.0, found.pop(f"{of}_seconds") - found.pop(f"{of}_work") * middle)
        found["peak"] = self.turns[-1]["peak"]
        found["turns"] = self.turns
        return found


def measure(
    case: Case, names: Sequence[str], settings: Settings, folder: Path, log: TextIO, mnist: Path | None = None
) -> dict[str, Any]:
    """Everything about a case, ready for JSON."""
    inputs.write(case, folder, mnist)
    entrants = {name: Entrant(name) for name in names}
    reference = None
    with ExitStack() as stack:
        # Those first that may be the reference.
        for entrant in sorted(entrants.values(), key=lambda entrant: entrant.name not in REFERENCES):
            _enter(entrant, case, settings, folder, log, stack)
        for name in (name for name in REFERENCES if name in names and settings.seeds):
            if reference is None and _check(entrants[name], case, settings.reference_seeds):
                reference = name
        for entrant in entrants.values():
            if settings.seeds and entrant.name != reference:
                _check(entrant, case, 1 if CONTESTANTS[entrant.name].compiles else settings.seeds)
        for entrant in entrants.values():
            if begun := entrant.ask("start", warm_up=settings.seconds / 3):
                entrant.found |= {key: begun[key] for key in ("first_seconds", "first_work")}
        for entrant in _turns(list(entrants.values()), settings.rounds):
            time.sleep(settings.pause if len(entrants) > 1 else 0.0)
            if turn := entrant.ask("round", seconds=settings.seconds):
                entrant.turns.append(turn)
    results = {name: entrant.result() for name, entrant in entrants.items()}
    return {"case": asdict(case), "contestants": results, "agreement": agreement(results, reference)}


def _enter(entrant: Entrant, case: Case, settings: Settings, folder: Path, log: TextIO, stack: ExitStack) -> None:
    """Start its process."""
    log.write(f"--- {case.name}: {entrant.name}\n")
    log.flush()
    try:
        entrant.process = Process(CONTESTANTS[entrant.name], case, folder, settings.threads, log)
    except Unusable as error:
        entrant.give_up(error)
        return
    stack.enter_context(closing(entrant.process))
    entrant.found["begun_with"] = entrant.process.begun_with


def _check(entrant: Entrant, case: Case, runs: int) -> bool:
    """Let it compute the losses by which it is judged; whether it has."""
    checked = entrant.ask("check", seeds=list(range(1, runs + 1)))
    if checked is None:
        return False
    work = {"train": case.check_rows // case.batch_size, "evaluate": case.check_rows * case.particles}
    entrant.found["losses"] = checked["losses"]
    entrant.found["check_seconds"] = checked["seconds"][0]
    entrant.found["check_work"] = case.check * work.get(case.task, case.particles)
    return True


def _turns(entrants: list[Entrant], rounds: int) -> Iterator[Entrant]:
    """Each in every round, another first each time: what else the machine does then falls on all alike."""
    for number in range(rounds if entrants else 0):
        shift = number % len(entrants)
        yield from entrants[shift:] + entrants[:shift]


def agreement(results: dict[str, dict[str, Any]], reference: str | None) -> dict[str, Any]:
    """Whether the mean loss of each is within Monte-Carlo spread of the reference's, by the spread between its seeds.

    A prediction interval: m ± t s sqrt(1/n + 1/R) of a reference of R runs, mean m and standard deviation s, and a
    contestant's mean of n runs. Losses are compared by name: some report a bound, some the ELBO beneath it.
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
    return {"loss": loss, "reference_loss": mean, "spread": spread, "off": off, "allowed": allowed} | {
        "agrees": abs(off) <= allowed
    }
