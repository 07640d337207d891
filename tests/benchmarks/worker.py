"""The process of one contestant, which reads commands from its standard input, one line of JSON each.

``check`` trains with some seeds and answers with the mean losses of each; ``start`` begins the timed run and answers
after the warm-up; ``round`` continues it for some seconds and answers with the work done; ``stop`` ends it.
"""

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

EPOCHS = 10**6  # of the timed run, which is stopped long before


class Stopped(BaseException):
    """Ends a run. It is no ``Exception``, which a library may catch."""


class Channel:
    """Lines of JSON, in and out; prints of the contestant go to the standard error."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **answer: Any) -> None:
        self.out.write(json.dumps(answer) + "\n")
        self.out.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for the next command; the end of the input means ``stop``."""
        line = sys.stdin.readline()
        return json.loads(line) if line else {"do": "stop"}


def processor_seconds() -> float:
    """Return the processor time of this process and of its children that have ended, such as a compiler."""
    used = os.times()
    return time.process_time() + used.children_user + used.children_system


CLOCKS = {"wall": time.perf_counter, "processor": processor_seconds}


class Stopwatch:
    """Counts work and its time, and stops the clock while the process waits for the next round.

    The first unit of work and the seconds of ``warm_up`` after it are not measured.
    """

    def __init__(
        self, channel: Channel, warm_up: float, now: Callable[[], float], memory_monitor: "MemoryMonitor | None" = None
    ):
        self.channel, self.warm_up, self.now, self.memory_monitor = channel, warm_up, now, memory_monitor
        self.begun, self.until = now(), float("inf")
        self.first: dict[str, float] = {}
        self.done, self.measuring = 0.0, False

    def __call__(self, work: float) -> None:
        now = self.now()
        self.done += work
        if not self.first:
            self.first = {"first_work": work, "first_seconds": now - self.begun}
            self._go(self.warm_up)
        elif now >= self.until:
            answer = {"work": self.done, "seconds": now - self.begun} if self.measuring else self.first
            most = self.memory_monitor.most if self.memory_monitor else None
            self.channel.send(**answer, **memory(), most_anonymous=most)
            command = self.channel.receive()
            if command["do"] == "stop":
                raise Stopped
            self.measuring = True
            self._go(command["seconds"])

    def _go(self, seconds: float) -> None:
        self.done, self.begun = 0.0, self.now()
        self.until = self.begun + seconds


class MemoryMonitor(threading.Thread):
    """Records the peak of anonymous memory, which is not mapped from files; the system records no such peak."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0.0

    def run(self) -> None:
        while True:
            self.most = max(self.most, memory().get("anonymous", 0.0))
            time.sleep(0.01)


def memory() -> dict[str, float]:
    """Measure the memory of the process in MB: now, now without mapped files, and the peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak": most / (2**20 if sys.platform == "darwin" else 2**10)}
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    names = {"resident": "VmRSS", "anonymous": "RssAnon", "peak": "VmHWM"}
    return {name: float(fields[field].split()[0]) / 1024 for name, field in names.items()}


def processors_of(threads: int) -> list[int] | None:
    """Return the processors that a contestant with so many threads runs on, where a system can say so."""
    return sorted(os.sched_getaffinity(0))[:threads] if hasattr(os, "sched_getaffinity") else None


def limit(threads: int) -> None:
    """Limit threads and processors, before a library counts them."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    if allowed := processors_of(threads):
        os.sched_setaffinity(0, allowed)


def _check(
    run: Callable[..., Any], case: Any, given: Any, seeds: list[int], now: Callable[[], float]
) -> dict[str, Any]:
    losses: dict[str, list[float]] = {}
    seconds = []
    for seed in seeds:
        started = now()
        found = run(case, given, lambda work: None, epochs=case.check, rows=case.check_rows, seed=seed)
        seconds.append(now() - started)
        for name, values in found.items():  # the floor has none
            losses.setdefault(name, []).append(sum(values) / len(values))
    return {"losses": losses, "seconds": seconds}


def serve(channel: Channel, order: dict[str, Any]) -> None:
    """Set up the contestant and execute commands."""
    from cases import Case
    from inputs import read, runner

    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in order["case"].items()}
    case = Case(**fields)
    run = runner(order["module"], case.task, **order["options"])
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(order["threads"])
    given, now = read(case, Path(order["folder"])), CLOCKS[order["clock"]]
    monitor = MemoryMonitor() if case.mapped else None
    if monitor:
        monitor.start()
    channel.send(**memory())
    while (command := channel.receive())["do"] != "stop":
        if command["do"] == "check":
            channel.send(**_check(run, case, given, command["seeds"], now))
            continue
        try:
            watch = Stopwatch(channel, command["warm_up"], now, monitor)
            run(case, given, watch, epochs=EPOCHS, rows=case.rows, seed=0)
        except Stopped:
            break


def main(serve: Callable[[Channel, dict[str, Any]], None] = serve) -> None:
    """Read the order, the first line of the input, and serve it."""
    channel = Channel()
    order = channel.receive()
    limit(order["threads"])
    try:
        serve(channel, order)
    except Exception as error:
        traceback.print_exc()
        missing = isinstance(error, (ModuleNotFoundError, NotImplementedError)) or (
            order.get("optional", False) and isinstance(error, (TypeError, AttributeError))
        )
        first_line = str(error).splitlines()[0] if str(error) else ""
        channel.send(**{"missing" if missing else "failed": f"{type(error).__name__}: {first_line}"})


if __name__ == "__main__":
    main()
