"""The figures and tables of the page on speed, all from one run of `make bench`.

    python docs/benchmarks.py results/benchmarks/results.json

keeps what is shown of that run in ``docs/benchmarks.json``, and writes its numbers between the markers
``<!-- benchmarks: NAME -->`` and ``<!-- end -->`` of the pages. Sphinx draws the figures from the same file.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).parent
RUN = DOCS / "benchmarks.json"
PAGES = (DOCS.parent / "README.md", DOCS / "speed.md")
FRAGMENT = re.compile(r"(<!-- benchmarks: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PICTURES = DOCS / "_build" / "benchmarks"
NEEDED = ("mixture", "mnist-128")
"""The cases of the README; the tables and figures have what a run has."""

KEPT = ("title", "time", "lower", "upper", "start", "grown", "not_available", "failed")
COLUMNS = {
    "captured": "compiled", "replayed": "replayed", "eager": "eager", "automatic": "by itself",
    "pyro": "`pyro.infer.SVI`", "handwritten": "PyTorch by hand", "numpyro": "NumPyro", "floor": "products alone",
}  # fmt: skip
"""The contestants in the order of the columns, with their names on the pages."""

Run = dict[str, Any]


# --- Keeping a run ---------------------------------------------------------------------------------------------------


def kept(results: Run) -> Run:
    """Return the part of a file of results that the pages need: medians, quartiles and memory, without the rounds.

    Raises:
        ValueError: if the run lacks a case that the README shows.
    """
    if missing := [name for name in NEEDED if name not in results["cases"]]:
        raise ValueError(f"`results` must have the cases {', '.join(NEEDED)}, and lacks {', '.join(missing)}")
    found = {name: results[name] for name in ("machine", "settings")}
    cases = {
        name: {"title": case["case"]["title"], "unit": case["unit"], "contestants": _kept(case["contestants"])}
        for name, case in results["cases"].items()
    }
    growth = {
        name: {key: grown[key] for key in ("title", "grows", "each")}
        | {"points": [point | {"contestants": _kept(point["contestants"])} for point in grown["points"]]}
        for name, grown in results["growth"].items()
        if "grows" in grown
    }
    return found | {"cases": cases, "growth": growth}


def _kept(contestants: Run) -> Run:
    found = {}
    for name, result in contestants.items():
        if "time" in result:
            result = result | {"grown": result["peak"] - result["begun_with"]["peak"]}
        found[name] = {
            key: float(f"{result[key]:.4g}") if isinstance(result[key], float) else result[key]
            for key in KEPT
            if key in result
        }
    return found


# --- Tables ----------------------------------------------------------------------------------------------------------


def machine(run: Run) -> str:
    """Say what the run was made on, and how."""
    described, settings = run["machine"], run["settings"]
    packages = described["packages"]
    versions = ", ".join(
        f"{title} {packages[name]}"
        for name, title in (("torch", "torch"), ("pyro-ppl", "Pyro"), ("numpyro", "NumPyro"))
    )
    clock = "" if settings["clock"] == "wall" else " of processor time"
    note = f" {run['note']}" if "note" in run else ""
    return (
        f"Medians{clock} of {settings['rounds']} rounds in turns, each contestant with {_threads(run)} of an "
        f"{described['processor']} ({described['processors']} processors); {versions}.{note}"
    )


def steps(run: Run) -> str:
    """Make the table of the time of a step: a row for each case, a column for each contestant."""
    shown = [name for name in COLUMNS if any("time" in _result(case, name) for case in run["cases"].values())]
    rows = [
        [_row(case), *(_seconds(_result(case, name).get("time")) for name in shown)] for case in run["cases"].values()
    ]
    return _table(["", *(COLUMNS[name] for name in shown)], rows)


def ratios(run: Run) -> str:
    """Make the table of ratios of times, with the range that the quartiles of the rounds allow."""
    pairs = {
        "compiled / NumPyro": ("captured", "numpyro"),
        "compiled / products alone": ("captured", "floor"),
        "replayed / by hand": ("replayed", "handwritten"),
        "eager / by hand": ("eager", "handwritten"),
        "compiled / `pyro.infer.SVI`": ("captured", "pyro"),
    }
    rows = [
        [_row(case), *(_ratio(_result(case, ours), _result(case, theirs)) for ours, theirs in pairs.values())]
        for case in run["cases"].values()
    ]
    shown = [column for column in range(1, len(pairs) + 1) if any(row[column] for row in rows)]
    return _table(["", *(list(pairs)[column - 1] for column in shown)], [[r[0], *(r[c] for c in shown)] for r in rows])


def payback(run: Run) -> str:
    """Make the table of what ``compile=True`` costs, and the number of steps whose savings it is."""
    rows = []
    for case in run["cases"].values():
        compiled, eager = _result(case, "captured"), _result(case, "eager")
        if case["unit"] != "step" or not {"start", "time"} <= compiled.keys() or "time" not in eager:
            continue
        saved = eager["time"] - compiled["time"]
        pays = f"{compiled['start'] / saved:,.0f}" if saved > 0 else "never"
        rows.append([_row(case), f"{compiled['start']:.1f} s", pays])
    header = ["", "to compile", "pays after steps"]
    return f"\n{_table(header, rows)}\n" if rows else ""


def readme(run: Run) -> str:
    """Say the times of two cases in a sentence each."""
    mixture, mnist = run["cases"]["mixture"], run["cases"]["mnist-128"]
    names = ("captured", "pyro", "numpyro")
    first, second = ([_seconds(_result(case, name).get("time")) for name in names] for case in (mixture, mnist))
    text = (
        f"With {_threads(run)} of an {run['machine']['processor']}, a compiled step on the mixture takes "
        f"{first[0]}, where `pyro.infer.SVI` takes {first[1]} and NumPyro {first[2]}. On MNIST (784-400-20, "
        f"batch 128) the times are {second[0]}, {second[1]} and {second[2]}."
    )
    return _wrapped(text)


def growth(run: Run) -> str:
    """Show the figures of what was measured at several sizes."""
    shown = [
        f":::{{figure}} _build/benchmarks/{name}.png\n:alt: {figure.alt}\n\n{figure.caption}\n:::\n"
        for name, figure in FIGURES.items()
        if name in run["growth"]
    ]
    return "\n" + "\n".join(shown) if shown else ""


FRAGMENTS: dict[str, Callable[[Run], str]] = {
    "machine": lambda run: _wrapped(machine(run)), "steps": steps, "ratios": ratios, "payback": payback,
    "growth": growth, "readme": readme,
}  # fmt: skip


def fill(text: str, run: Run) -> str:
    """Write the numbers of a run between the markers of a page."""
    return FRAGMENT.sub(lambda found: f"{found[1]}{FRAGMENTS[found[2]](run)}\n{found[3]}", text)


def _threads(run: Run) -> str:
    threads = run["machine"]["threads"]
    return "one thread" if threads == 1 else f"{threads} threads"


def _wrapped(text: str, width: int = 120) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _result(case: Run, name: str) -> Run:
    return case["contestants"].get(name, {})


def _row(case: Run) -> str:
    each = "" if case["unit"] == "step" else f" (one {case['unit']})"
    return f"{case['title']}{each}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _ratio(ours: Run, theirs: Run) -> str:
    if "time" not in ours or "time" not in theirs:
        return ""
    ratio = f"{ours['time'] / theirs['time']:.2f}"
    if "lower" not in ours or "lower" not in theirs:
        return ratio
    return f"{ratio} ({ours['lower'] / theirs['upper']:.2f} – {ours['upper'] / theirs['lower']:.2f})"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


# --- Figures ---------------------------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """A figure of a measure that grows."""

    alt: str
    caption: str
    xlabel: str
    ylabel: str
    measure: str = "time"
    factor: float = 1.0


FIGURES = {
    "batch": Figure(
        "The time of a step by the size of the batch, a line for each contestant.",
        "The time of a step by the size of the batch. In small batches an eager step takes the time of Python's code.",
        "images in a batch", "ms a step", factor=1e3,
    ),
    "particles": Figure(
        "The time of an importance-weighted step by the number of draws, a line for each contestant.",
        "The time of an importance-weighted step by the number of draws.",
        "draws K of each image", "ms a step", factor=1e3,
    ),
    "data": Figure(
        "The time of an epoch by the number of images, a line for each contestant.",
        "The time of an epoch by the number of images.",
        "images", "s an epoch",
    ),
    "evidence-rows": Figure(
        "The memory of log_evidence by the number of points.",
        "The memory of `log_evidence` above that of the libraries, by the number of points, with ten draws of each.",
        "points", "MB", measure="grown",
    ),
}  # fmt: skip


def draw(app: Any = None) -> None:
    """Draw the figures of the run that is kept."""
    import matplotlib.pyplot as plt

    run = json.loads(RUN.read_text(encoding="utf-8"))
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, shown in FIGURES.items():
        if name in run["growth"]:
            figure, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
            draw_growth(ax, run["growth"][name], shown)
            figure.savefig(PICTURES / f"{name}.png", dpi=120)
            plt.close(figure)


def draw_growth(ax: Any, grown: Run, shown: Figure) -> None:
    """Draw a line for each contestant, with the quartiles of times as a band."""
    from pyro_vae.plots.colours import style

    for number, (contestant, title) in enumerate(COLUMNS.items()):
        points = [(point["value"], point["contestants"].get(contestant, {})) for point in grown["points"]]
        points = [(value, result) for value, result in points if shown.measure in result]
        if not points:
            continue
        sizes, look = [value for value, _ in points], style(number)
        ax.plot(sizes, [shown.factor * result[shown.measure] for _, result in points], label=title.strip("`"), **look)
        if shown.measure == "time":
            lower, upper = ([shown.factor * result[end] for _, result in points] for end in ("lower", "upper"))
            ax.fill_between(sizes, lower, upper, color=look["color"], alpha=0.2, linewidth=0)
    ax.set(
        xlabel=shown.xlabel, ylabel=shown.ylabel, xscale="log", yscale="log" if shown.measure == "time" else "linear"
    )
    ax.set_xticks([point["value"] for point in grown["points"]], [f"{point['value']:,}" for point in grown["points"]])
    ax.minorticks_off()
    ax.legend()


# --- A new run -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Take over the results of a run: keep them, and write their numbers into the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the file results.json of `make bench`, or several merged")
    run = kept(json.loads(parser.parse_args().results.read_text(encoding="utf-8")))
    RUN.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8"), run), encoding="utf-8")


if __name__ == "__main__":
    main()
