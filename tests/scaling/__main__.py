"""Measure how training grows with ranks on this machine: `make scale`, or `python tests/scaling`.

One and two ranks of one thread each train a VAE on images, and take turns. Strong scaling: the batch of all ranks stays
the same. Weak scaling: it grows with the ranks. The peer is the same network under ``DistributedDataParallel``. The
cost model is fitted to steps of one rank and to sums of tensors, and predicts the steps of two ranks.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, TextIO

import numpy as np
from cost_model import Cluster, fitted_link, fitted_work, step
from train import HIDDEN, LATENT, Loss
from turns import Run, Times, measure, ratio, summary, trained

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from inputs import images
from machine import machine
from result_tables import table

CLOCKS = {"wall": "seconds on the clock", "processor": "seconds of a processor"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="of the files of MNIST; without it, enlarged digits of 8 × 8 pixels"
    )
    parser.add_argument("--out", type=Path, default=Path("results/scaling.json"), help="file of the results")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each run")
    parser.add_argument("--warm-up", type=int, default=3, help="turns before those")
    parser.add_argument("--batch", type=int, default=1024, help="rows of a step")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--compile", choices=("choose", "yes", "no"), default="no", help="as of `fit`; choose is None")
    parser.add_argument("--seeds", type=int, default=6, help="trainings for the held-out ELBO, of each number of ranks")
    parser.add_argument("--epochs", type=int, default=3, help="of each of these trainings")
    parser.add_argument(
        "--held-out", type=int, nargs="*", default=[1, 2, 4], help="numbers of ranks of these trainings"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a run of seconds, to test this program; its times mean nothing"
    )
    args = parser.parse_args()
    if args.tiny:
        args.rounds, args.warm_up, args.batch, args.steps, args.seeds, args.epochs = 2, 0, 32, 2, 2, 1
        args.compile, args.held_out = "no", [1, 2]
    return args


def runs(batch: int, compile: str, fewest: bool) -> list[Run]:
    """The runs that take turns; two of one rank have other batches, to which the model is fitted.

    The ``fewest`` that a report needs have no weak scaling and no peer.
    """
    needed = [
        Run("fit 1", "fit", 1, batch, compile),
        Run("fit 2", "fit", 2, batch, compile),
        Run("fit 1 half", "fit", 1, batch // 2, compile),
        Run("sums 2", "sums", 2),
    ]
    if fewest:
        return needed
    return [
        *needed,
        Run("fit 2 weak", "fit", 2, 2 * batch, compile),
        Run("fit 1 double", "fit", 1, 2 * batch, compile),
        Run("ddp 1", "ddp", 1, batch),
        Run("ddp 2", "ddp", 2, batch),
    ]


def gains(found: Mapping[str, Times]) -> dict[str, dict[str, dict[str, float]]]:
    """Return throughput of two ranks over that of one, by kind of scaling and clock; all turns have the same rows."""
    pairs = {"strong": ("fit 1", "fit 2"), "weak": ("fit 1", "fit 2 weak"), "DDP, strong": ("ddp 1", "ddp 2")}
    return {
        name: {clock: ratio(found[one][clock], found[two][clock]) for clock in CLOCKS}
        for name, (one, two) in pairs.items()
        if {one, two} <= found.keys()
    }


def predicted(found: Mapping[str, Times], rows: int, batch: int) -> dict[str, float]:
    """Fit the model to one rank and to sums alone, and return its seconds of a step of two ranks, and those measured.

    The processor time of a rank is the time of its own computation, whatever else the machine does. Sums have no such
    time, since they wait for each other: the shortest is the one with the least other load.
    """
    parameters = sum(parameter.numel() for parameter in Loss(784, HIDDEN, LATENT).parameters())
    sizes = {"fit 1 half": batch // 2, "fit 1": batch, "fit 1 double": 2 * batch}
    sizes = {name: size for name, size in sizes.items() if name in found}
    seconds = {name: median(found[name]["processor"]) * size / rows for name, size in sizes.items()}
    work = fitted_work(parameters, list(sizes.values()), list(seconds.values()))
    sums = {name: min(found["sums 2"][name]) for name in ("few", "all")}
    link = fitted_link(2, (32, sums["few"]), (4 * parameters, sums["all"]))
    cluster = Cluster(link, link, ranks_per_machine=2, exchange=link)
    parts = {ranks: step(work, cluster, ranks, batch) for ranks in (1, 2)}
    return {
        "fixed": work.fixed, "per_row": work.per_row, "latency": link.latency, "bandwidth": link.bandwidth,
        "one": parts[1].seconds, "one_measured": seconds["fit 1"], "two": parts[2].seconds,
        "two_measured": median(found["fit 2"]["wall"]) * batch / rows,
        "two_processor": median(found["fit 2"]["processor"]) * batch / rows,
        "gain": parts[1].seconds / parts[2].seconds, "all_reduce": parts[2].all_reduce, "exchange": parts[2].exchange,
    }  # fmt: skip


def held_out(args: argparse.Namespace, folder: Path, log: TextIO) -> dict[str, Any]:
    """Return the held-out ELBO over seeds for each number of ranks, and its difference to that of one process."""
    options = ["--data", str(folder), "--seeds", str(args.seeds), "--epochs", str(args.epochs)]
    found: dict[str, Any] = {}
    for ranks in args.held_out:
        run = Run(f"elbo {ranks}", "elbo", ranks, args.batch, args.compile)
        elbos = [line["elbo"] for line in trained(run, folder, options, log)]
        found[str(ranks)] = {"elbos": elbos, "mean": fmean(elbos), "error": stdev(elbos) / math.sqrt(len(elbos))}
    first = found[str(args.held_out[0])]
    for one in found.values():
        one["difference"] = one["mean"] - first["mean"]
        one["difference_error"] = math.hypot(one["error"], first["error"])
    return found


def write_data(args: argparse.Namespace, folder: Path) -> int:
    """Write the images of the runs, and return the number of rows of a turn."""
    rows = args.steps * args.batch
    np.save(folder / "x.npy", np.ascontiguousarray(images("train", rows, args.folder)))
    np.save(folder / "test.npy", np.ascontiguousarray(images("test", min(rows, 10_000), args.folder)))
    return rows


def report(found: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    parts = []
    header = ["two ranks over one", *CLOCKS.values()]
    rows = [[name, *(_range(gain[clock]) for clock in CLOCKS)] for name, gain in found["gains"].items()]
    parts.append(table(header, rows))
    model = found["model"]
    parts.append(
        f"The model, fitted to one rank and to sums: {1e3 * model['fixed']:.2f} ms a step, "
        f"{1e6 * model['per_row']:.2f} µs a row, {1e6 * model['latency']:.0f} µs a message, "
        f"{1e-9 * model['bandwidth']:.2f} GB/s. A step of two ranks: {1e3 * model['two']:.2f} ms predicted, "
        f"{1e3 * model['two_measured']:.2f} ms measured, of which {1e3 * model['two_processor']:.2f} ms of a "
        f"processor. Predicted gain: {model['gain']:.2f}."
    )
    header = ["ranks", "held-out ELBO, nats", "standard error", "minus one process", "standard error"]
    keys = ("mean", "error", "difference", "difference_error")
    parts.append(table(header, [[n, *(f"{one[key]:.3f}" for key in keys)] for n, one in found["held_out"].items()]))
    return "\n\n".join(parts)


def _range(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['lower']:.2f} – {found['upper']:.2f})"


def main() -> None:
    args, begun = parse(), time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    described = machine(1)
    if described["load"] is not None and described["load"] > 0.3:
        print(f"The machine is busy, with a load of {described['load']:.1f}: ranks may have to wait for a processor.\n")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name, args.out.with_suffix(".log").open("w") as log:
        folder = Path(name)
        rows, chosen = write_data(args, folder), runs(args.batch, args.compile, args.tiny)
        times = measure(chosen, args.rounds, args.warm_up, folder, ["--data", name], log)
        found = {
            "machine": described,
            "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
            "turns": times,
            "seconds": {name: {clock: summary(turns) for clock, turns in one.items()} for name, one in times.items()},
            "gains": gains(times),
            "model": predicted(times, rows, args.batch),
            "held_out": held_out(args, folder, log) if args.held_out else {},
        }
    found["minutes"] = (time.monotonic() - begun) / 60
    args.out.write_text(json.dumps(found, indent=1))
    print(report(found))
    print(f"\n{found['minutes']:.1f} minutes. In {args.out.parent}: {args.out.name}, {args.out.stem}.log")


if __name__ == "__main__":
    main()
