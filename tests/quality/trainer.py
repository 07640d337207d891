"""The process of one contestant, which trains on a problem and waits for ``go`` or ``stop`` after each epoch.

Its answers have the epoch, and the steps and seconds of training so far: by the clock, and of processor time, that of
compilers which it started included. Waiting is not part of them, nor are the imports and the reading of the data.
"""

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from worker import Channel, Stopped, main, memory


def processor_seconds() -> float:
    """Return the processor time of this process and of its children, those that still run included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(map(_of_tree, _children(os.getpid())))


def _children(process: int | str) -> list[str]:
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        found += path.read_text().split()
    return found


def _of_tree(process: str) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks = sum(int(field) for field in fields[11:15])  # its own and those of its ended children
        return ticks / os.sysconf("SC_CLK_TCK") + sum(map(_of_tree, _children(process)))
    except FileNotFoundError:  # it has ended meanwhile
        return 0.0


class Reporter:
    """Receives the report of each epoch: stops the clock, answers, and waits for the next command."""

    def __init__(self, channel: Channel, weights: Path):
        self.channel, self.weights = channel, weights
        self.epoch = self.steps = 0
        self.seconds = self.processor = 0.0
        self._go()

    def __call__(self, steps: int, weights: Any) -> None:
        self.seconds += time.perf_counter() - self.begun
        self.processor += processor_seconds() - self.begun_processor
        self.epoch, self.steps = self.epoch + 1, self.steps + steps
        np.savez(self.weights, **weights())
        spent = {"seconds": self.seconds, "processor": self.processor}
        self.channel.send(epoch=self.epoch, steps=self.steps, **spent, **memory())
        if self.channel.receive()["do"] == "stop":
            raise Stopped
        self._go()

    def _go(self) -> None:
        self.begun, self.begun_processor = time.perf_counter(), processor_seconds()


def serve(channel: Channel, order: dict[str, Any]) -> None:
    """Set up the contestant, and train when the first command comes."""
    from inputs import read, runner
    from problems import Problem

    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in order["problem"].items()}
    problem, folder = Problem(**fields), Path(order["folder"])
    run = runner(order["module"], "train", **order["options"])
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(order["threads"])
    given = read(problem, folder)
    channel.send(**memory())
    if channel.receive()["do"] == "stop":
        return
    report = Reporter(channel, Path(order["weights"]))
    try:
        run(problem, given, report, epochs=order["epochs"], seed=order["seed"])
    except Stopped:
        return
    channel.send(ended=True)


if __name__ == "__main__":
    main(serve)
