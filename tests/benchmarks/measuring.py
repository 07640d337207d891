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

REFERENCES = ("handwritten", "pyro", "eager", "numpyro")  # the first that takes part gives the spread between seeds
FAILURE = 1e-5  # probability that contestants which do the same are called different


@dataclass(frozen=True)
class Settings:
    """Of a measurement.

    Attributes:
        rounds: how often each contestant has its turn.
        seconds: of a turn.
        threads: that each may use.
        reference_seeds: runs of the reference, from which the spread between seeds is learned.
        seeds: runs of the others; of those that compile, one.
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
        found = {"time": middle, "fastest": min(times), "slowest": max(times), "times": times} | self.found
        # The first unit of work comes with all that is done once: tracing, compilation, checks.
        found["start_again"] = max(0.0, found.pop("first_seconds") - found.pop("first_work") * middle)
        found["start"] = max(0.0, found.pop("check_seconds") - found.pop("check_work") * middle)
        found |= {key: max(turn[key] for turn in self.turns) for key in ("peak",) if key in self.turns[0]}
        found["memory"] = [{key: turn[key] for key in ("resident", "anonymous") if key in turn} for turn in self.turns]
        return found


def measure(
    case: Case, names: Sequence[str], settings: Settings, folder: Path, log: TextIO, mnist: Path | None = None
) -> dict[str, Any]:
    """Everything about a case, ready for JSON."""
    inputs.write(case, folder, mnist)
    entrants = [Entrant(name) for name in names]
    reference = next((name for name in REFERENCES if name in names), None)
    with ExitStack() as stack:
        for entrant in entrants:
            _enter(entrant, case, entrant.name == reference, settings, folder, log, stack)
        for entrant in entrants:
            if begun := entrant.ask("start", warm_up=settings.seconds / 3):
                entrant.found |= {key: begun[key] for key in ("first_seconds", "first_work")}
        for entrant in _turns(entrants, settings.rounds):
            time.sleep(settings.pause if len(entrants) > 1 else 0.0)
            if turn := entrant.ask("round", seconds=settings.seconds):
                entrant.turns.append(turn)
    results = {entrant.name: entrant.result() for entrant in entrants}
    return {"case": asdict(case), "contestants": results, "agreement": agreement(results, reference)}


def _enter(
    entrant: Entrant, case: Case, is_reference: bool, settings: Settings, folder: Path, log: TextIO, stack: ExitStack
) -> None:
    """Start its process and let it compute the losses by which it is judged."""
    contestant = CONTESTANTS[entrant.name]
    log.write(f"--- {case.name}: {entrant.name}\n")
    log.flush()
    try:
        entrant.process = Process(contestant, case, folder, settings.threads, log)
    except Unusable as error:
        entrant.give_up(error)
        return
    stack.enter_context(closing(entrant.process))
    runs = settings.reference_seeds if is_reference else 1 if contestant.compiles else settings.seeds
    entrant.found["begun_with"] = entrant.process.begun_with.get("resident", 0.0)
    if checked := entrant.ask("check", seeds=list(range(1, runs + 1))):
        work = {"train": case.check_rows // case.batch_size, "evaluate": case.check_rows * case.particles}
        entrant.found["losses"] = checked["losses"]
        entrant.found["check_seconds"] = checked["seconds"][0]
        entrant.found["check_work"] = case.check * work.get(case.task, case.particles)


def _turns(entrants: list[Entrant], rounds: int) -> Iterator[Entrant]:
    """Each in every round, another first each time: what else the machine does then falls on all alike."""
    for number in range(rounds):
        shift = number % len(entrants)
        yield from entrants[shift:] + entrants[:shift]


def agreement(results: dict[str, dict[str, Any]], reference: str | None) -> dict[str, Any]:
    """Whether the mean loss of each is within Monte-Carlo spread of the reference's, by the spread between its seeds.

    A prediction interval: m ± t s sqrt(1/n + 1/R) of a reference of R runs, mean m and standard deviation s, and a
    contestant's mean of n runs.
    """
    runs = (results[reference].get("losses") if reference else None) or []
    if len(runs) < 2:
        return {"reference": None, "contestants": {}}
    mean, spread = fmean(runs), stdev(runs)
    quantile = float(student_t.isf(FAILURE / 2, len(runs) - 1))
    judged = {}
    for name, result in results.items():
        if name == reference or not result.get("losses"):
            continue
        loss = fmean(result["losses"])
        allowed = quantile * spread * (1 / len(result["losses"]) + 1 / len(runs)) ** 0.5
        allowed += 1e-5 * abs(mean)  # rounding, where nothing is random
        judged[name] = {"loss": loss, "off": loss - mean, "allowed": allowed, "agrees": abs(loss - mean) <= allowed}
    return {"reference": reference, "loss": mean, "spread": spread, "runs": len(runs), "contestants": judged}
