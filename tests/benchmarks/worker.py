"""A contestant in a process of its own, which does what it is told on its standard input, a line of JSON each time.

``check`` trains with each of some seeds and answers with the mean losses of each; ``start`` begins the run that is
timed and answers when it is warm; ``round`` lets it go on for so many seconds and answers with the work done; ``stop``
ends it.
"""

import importlib
import json
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

EPOCHS = 10**6  # of the run that is timed: more than it ever gets to


class Stopped(BaseException):
    """The run is told to end. No ``Exception``: a library may catch those."""


class Channel:
    """Lines of JSON in and out. What the contestant itself prints goes to the standard error."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def tell(self, **answer: Any) -> None:
        """Answer."""
        self.out.write(json.dumps(answer) + "\n")
        self.out.flush()

    def hear(self) -> dict[str, Any]:
        """The next command; the end of the input is one to stop."""
        line = sys.stdin.readline()
        return json.loads(line) if line else {"do": "stop"}


class Stopwatch:
    """Is told of work as it is done; stands still while its process waits for the next round.

    Args:
        channel: where commands come from.
        warm_up: seconds that the run goes on after the first work, unmeasured.
        watch: on the memory.
    """

    def __init__(self, channel: Channel, warm_up: float, watch: "Watch | None" = None):
        self.channel = channel
        self.watch = watch
        self.warm_up = warm_up
        self.begun = time.perf_counter()
        self.first: dict[str, float] = {}
        self.done = 0.0
        self.until = float("inf")
        self.measuring = False

    def __call__(self, work: float) -> None:
        now = time.perf_counter()
        self.done += work
        if not self.first:
            self.first = {"first_work": work, "first_seconds": now - self.begun}
            self._go(self.warm_up)
        elif now >= self.until:
            answer = {"work": self.done, "seconds": now - self.begun} if self.measuring else self.first
            self.channel.tell(**answer, **memory(), most_anonymous=self.watch.most if self.watch else None)
            self._wait()

    def _wait(self) -> None:
        command = self.channel.hear()
        if command["do"] == "stop":
            raise Stopped
        self.measuring = True
        self._go(command["seconds"])

    def _go(self, seconds: float) -> None:
        self.done = 0.0
        self.begun = time.perf_counter()
        self.until = self.begun + seconds


class Watch(threading.Thread):
    """Looks again and again how much the process holds that is in no file: the system keeps no peak of that."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0.0

    def run(self) -> None:
        """Until the process ends."""
        while True:
            self.most = max(self.most, memory().get("anonymous", 0.0))
            time.sleep(0.01)


def memory() -> dict[str, float]:
    """MB that the process holds now, of them without files that are mapped, and the most it ever held."""
    status = Path("/proc/self/status")
    if not status.exists():
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak": most / (2**20 if sys.platform == "darwin" else 2**10)}
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    kilobytes = {name: float(fields[name].split()[0]) for name in ("VmRSS", "RssAnon", "VmHWM")}
    return {
        "resident": kilobytes["VmRSS"] / 1024,
        "anonymous": kilobytes["RssAnon"] / 1024,
        "peak": kilobytes["VmHWM"] / 1024,
    }


def _limit(threads: int) -> None:
    """So many threads and processors: before any library asks how many there are."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _check(run: Callable[..., Any], case: Any, given: Any, seeds: list[int]) -> dict[str, Any]:
    losses: dict[str, list[float]] = {}
    seconds = []
    for seed in seeds:
        started = time.perf_counter()
        found = run(case, given, lambda work: None, epochs=case.check, rows=case.check_rows, seed=seed)
        seconds.append(time.perf_counter() - started)
        for name, values in found.items():  # none, of the floor
            losses.setdefault(name, []).append(sum(values) / len(values))
    return {"losses": losses, "seconds": seconds}


def serve(channel: Channel, order: dict[str, Any]) -> None:
    """Set the contestant up, and do what comes."""
    from cases import Case
    from inputs import read

    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in order["case"].items()}
    case = Case(**fields)
    contestant = importlib.import_module(order["module"])
    if hasattr(contestant, "set_threads"):
        contestant.set_threads(order["threads"])
    run = contestant.runner(case.task, **order["options"])
    given = read(case, Path(order["folder"]))
    watch = Watch() if case.mapped else None
    if watch:
        watch.start()
    channel.tell(**memory())
    while (command := channel.hear())["do"] != "stop":
        if command["do"] == "check":
            channel.tell(**_check(run, case, given, command["seeds"]))
            continue
        try:
            run(case, given, Stopwatch(channel, command["warm_up"], watch), epochs=EPOCHS, rows=case.rows, seed=0)
        except Stopped:
            break


def main() -> None:
    """Take the order, which is the first line of the input, and serve it."""
    channel = Channel()
    order = channel.hear()
    _limit(order["threads"])
    try:
        serve(channel, order)
    except Exception as error:
        traceback.print_exc()
        missing = isinstance(error, (ModuleNotFoundError, NotImplementedError)) or (
            order["optional"] and isinstance(error, (TypeError, AttributeError))
        )
        said = str(error).splitlines()[0] if str(error) else ""
        channel.tell(**{"missing" if missing else "failed": f"{type(error).__name__}: {said}"})


if __name__ == "__main__":
    main()
