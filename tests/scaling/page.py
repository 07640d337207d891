"""The numbers and figures of the page "Past one machine": measured by `make scale`, and computed by the cost model.

    python tests/scaling/page.py results/scaling.json

keeps what is shown of that run in ``docs/scaling.json``, and writes all numbers between the markers
``<!-- scaling: NAME -->`` and ``<!-- end -->`` of the page.
"""

import argparse
import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from cost_model import Cluster, Work, efficiency, expected_maximum, largest_useful, speed_up, step
from scipy import stats
from workloads import COLD, GENES, PAGE_CACHE, WORKLOADS, Counted, counted, gpus, on_gpu

DOCS = Path(__file__).parents[2] / "docs"
RUN, PAGE = DOCS / "scaling.json", DOCS / "past_one_machine.md"
FRAGMENT = re.compile(r"(<!-- scaling: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
KEPT = ("machine", "settings", "gains", "model", "held_out")
STEPS = {"no": "eager steps", "yes": "compiled steps", "choose": "steps as `fit` chooses them"}
RANKS = (1, 2, 4, 8, 16, 32, 64)
BATCH = 1024
CELL = 4 * GENES  # bytes

Found = dict[str, Any]


def kept(results: Found) -> Found:
    """Return the part of a file of results that the page needs, with four digits, and what the workloads compute."""
    counts = {name: asdict(counted(name)) for name in WORKLOADS}
    text = json.dumps({name: results[name] for name in KEPT} | {"counted": counts})
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.4g}"))


class Case(NamedTuple):
    """A workload on GPUs, and how it is drawn."""

    title: str
    work: Work
    cluster: Cluster


def cases(run: Found) -> dict[str, Case]:
    """The cases of the tables and the figure; what a step computes has been counted."""
    images, counts = (Counted(**run["counted"][name]) for name in WORKLOADS)
    cold = CELL / COLD
    return {
        "images": Case("images", on_gpu(images, "one by one"), gpus()),
        "images, graph": Case("images, CUDA graph", on_gpu(images, "CUDA graph"), gpus()),
        "counts": Case("counts on the GPU", on_gpu(counts, "CUDA graph"), gpus()),
        "counts, memory": Case("counts in memory", on_gpu(counts, "CUDA graph", CELL), gpus(read_rank=PAGE_CACHE)),
        "counts, disk": Case("counts on a disk", on_gpu(counts, "CUDA graph", CELL), gpus(read_rank=cold)),
    }


# --- Tables ----------------------------------------------------------------------------------------------------------


def measured(run: Found) -> str:
    rows = [[name, *(_range(gain[clock]) for clock in ("wall", "processor"))] for name, gain in run["gains"].items()]
    return _table(["two ranks, as a multiple of one", "rows a second", "rows a second of a processor"], rows)


def machine(run: Found) -> str:
    described, settings, model = run["machine"], run["settings"], run["model"]
    images = "MNIST" if settings["folder"] not in (None, "None") else "enlarged digits in place of MNIST"
    ratio = model["two_measured"] / model["two"]
    return _wrapped(
        f"Medians and quartiles of {settings['rounds']} turns of {settings['steps']} steps, in turns, on an "
        f"{described['processor']} ({described['processors']} processors, load {described['load']:.1f} when it began); "
        f"torch {described['packages']['torch']}; {images}, batch {settings['batch']:,}, {STEPS[settings['compile']]}, "
        "one thread for each rank. "
        f"Fitted to one rank and to sums alone, the model has {1e3 * model['fixed']:.2f} ms for a step, "
        f"{1e6 * model['per_row']:.1f} µs for a row, {1e6 * model['latency']:.0f} µs for a message and "
        f"{1e-9 * model['bandwidth']:.1f} GB/s. It predicts {1e3 * model['two']:.1f} ms for a step of two ranks; "
        f"measured were {1e3 * model['two_measured']:.1f} ms on the clock, {ratio:.2f} times as much, and "
        f"{1e3 * model['two_processor']:.1f} ms of a processor."
    )


def held_out(run: Found) -> str:
    rows = [
        [ranks, *(f"{one[key]:.2f}" for key in ("mean", "error", "difference", "difference_error"))]
        for ranks, one in run["held_out"].items()
    ]
    return _table(["ranks", "held-out ELBO", "standard error", "minus that of one process", "standard error"], rows)


def work(run: Found) -> str:
    rows = []
    for name, title in (("images", "64 × 64 × 3 pixels, convolutions"), ("counts", "2000 genes, 128 units")):
        found = Counted(**run["counted"][name])
        one = on_gpu(found, "CUDA graph")
        cells = f"{found.parameters:,}", f"{found.flops / 1e6:.1f}", f"{found.bytes / 1e6:.1f}", str(found.operations)
        rows.append([title, *cells, f"{1e6 * one.per_row:.1f}"])
    header = ["", "parameters", "MFLOP a row", "MB of memory traffic a row", "operations a step", "µs a row on an H100"]
    return _table(header, rows)


def growth(run: Found) -> str:
    rows = []
    for ranks in RANKS:
        cells = [str(ranks)]
        for case in cases(run).values():
            strong = speed_up(case.work, case.cluster, ranks, BATCH)
            weak = efficiency(case.work, case.cluster, ranks, BATCH, weak=True)
            cells.append(f"{strong:.1f} · {100 * weak:.0f} %")
        rows.append(cells)
    useful = [largest_useful(case.work, case.cluster, BATCH, RANKS[-1]) for case in cases(run).values()]
    rows.append(["pays up to", *map(str, useful)])
    return _table(["GPUs", *(case.title for case in cases(run).values())], rows)


def parts(run: Found) -> str:
    rows = []
    for ranks in (1, 8, 64):
        for case in (cases(run)["images, graph"], cases(run)["counts, memory"]):
            found = step(case.work, case.cluster, ranks, BATCH)
            times = (found.compute, found.all_reduce, found.exchange, found.reading, found.seconds)
            rows.append([f"{case.title}, {ranks}", *(f"{1e3 * one:.2f}" for one in times)])
    return _table(["GPUs", "compute", "sum of gradients", "exchange", "reading", "ms a step"], rows)


def stragglers(_: Found) -> str:
    rows = []
    for ranks in (2, 8, 64):
        gains = [expected_maximum(lambda tail, v=v: 1 + v * stats.norm.isf(tail), ranks) for v in (0.02, 0.05, 0.1)]
        rows.append([str(ranks), *(f"{gain:.2f}" for gain in gains)])
    return _table(["ranks", "2 %", "5 %", "10 %"], rows)


FRAGMENTS: dict[str, Callable[[Found], str]] = {
    "measured": measured, "machine": machine, "held_out": held_out, "work": work, "growth": growth, "parts": parts,
    "stragglers": stragglers,
}  # fmt: skip


def fill(text: str, run: Found) -> str:
    """Write the numbers between the markers of the page."""
    return FRAGMENT.sub(lambda found: f"{found[1]}{FRAGMENTS[found[2]](run)}\n{found[3]}", text)


def _range(found: Found) -> str:
    return f"{found['median']:.2f} ({found['lower']:.2f} – {found['upper']:.2f})"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, width=120)


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


# --- The figure ------------------------------------------------------------------------------------------------------


def draw(run: Found) -> None:
    """Draw speed-up at a fixed batch, and efficiency at a fixed batch for each rank, by the number of GPUs."""
    import matplotlib.pyplot as plt

    from pyro_vae.plots.colours import style

    figure, (strong, weak) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for number, case in enumerate(cases(run).values()):
        strong.plot(
            RANKS, [speed_up(case.work, case.cluster, k, BATCH) for k in RANKS], label=case.title, **style(number)
        )
        weak.plot(RANKS, [efficiency(case.work, case.cluster, k, BATCH, weak=True) for k in RANKS], **style(number))
    strong.plot(RANKS, RANKS, color="0.75", label="as many times as GPUs")
    strong.set(title=f"batch of {BATCH} for all", ylabel="speed-up", yscale="log", xlabel="GPUs")
    strong.set_yticks(RANKS, map(str, RANKS))
    weak.set(title=f"batch of {BATCH} for each", ylabel="efficiency", ylim=(0, 1.05), xlabel="GPUs")
    for ax in (strong, weak):
        ax.set_xscale("log")
        ax.set_xticks(RANKS, map(str, RANKS))
        ax.minorticks_off()
    figure.legend(loc="outside lower center", ncols=3)


def main() -> None:
    """Keep the results of a run, and write its numbers into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the file of `make scale`")
    run = kept(json.loads(parser.parse_args().results.read_text(encoding="utf-8")))
    RUN.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), run), encoding="utf-8")


if __name__ == "__main__":
    main()
