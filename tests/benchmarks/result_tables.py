"""Tables of the results, in Markdown, for the terminal and a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """An upper bound on the ratio of the times of two contestants."""

    case: str
    contestant: str
    peer: str
    at_most: float


SMALL = ("mixture", "digits", "importance", "enumerated")
LARGE = ("mnist-128", "mnist-1024", "gumbel", "evidence")
TARGETS = (
    *(Target(case, "captured", "numpyro", 0.9) for case in SMALL),
    *(Target(case, "captured", "numpyro", 0.95) for case in LARGE),
    *(Target(case, "captured", "floor", 1.15) for case in LARGE),
    *(Target(case, "automatic", "captured", 1.05) for case in (*SMALL, *LARGE)),
    *(Target(case, "replayed", "handwritten", 1.5) for case in ("mixture", "digits", "importance")),
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; the first column is aligned left, the others right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {first[0]:{first[1]}} | " + " | ".join(f"{cell:>{width}}" for cell, width in others) + " |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return "\n".join([line(header), rule, *map(line, rows)])


def format_seconds(seconds: float) -> str:
    """Format a time in a suitable unit."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def of_case(found: Result, unit: str) -> str:
    """Format a row for each contestant, and whether they agree."""
    results = found["contestants"]
    base = next((name for name in ("captured", "automatic", "eager") if "time" in results.get(name, {})), None)
    header = [f"time per {unit}", "median", "quartiles", f"{base or '–'} = 1", "per second"]
    header += ["start", "again", "peak MB", "grown by"]
    rows = []
    for result in results.values():
        if "time" not in result:
            rows.append([result["title"], absent(result), *[""] * (len(header) - 2)])
            continue
        ratio = f"{result['time'] / results[base]['time']:.2f}" if base else ""
        times = [format_seconds(result["time"]), quartiles(result)]
        starts = [f"{result[key]:.1f} s" for key in ("start", "start_again")]
        rows.append([result["title"], *times, ratio, f"{1 / result['time']:,.0f}", *starts, *peak(result)])
    absent_ones = [result for result in results.values() if "time" not in result]
    reasons = [f"- {result['title']}: {result.get('failed') or result.get('not_available')}" for result in absent_ones]
    parts = [table(header, rows), "\n".join(reasons), agreement(found["agreement"], results)]
    return "\n\n".join(filter(None, parts))


def quartiles(result: Result) -> str:
    """Format the quartiles of the rounds, between which half of them are."""
    return f"{format_seconds(result['lower'])} – {format_seconds(result['upper'])}"


def absent(result: Result) -> str:
    """Return the entry of a contestant without a time."""
    return "failed" if "failed" in result else "not available"


def peak(result: Result) -> list[str]:
    """Format the peak memory of a contestant, and its growth after libraries and data were loaded."""
    return [f"{result['peak']:.0f}", f"{result['peak'] - result['begun_with']['peak']:.0f}"]


def agreement(found: Result, results: Mapping[str, Result]) -> str:
    if not found["contestants"]:
        return "Loss: no two contestants that could be compared."
    runs, rows = results[found["reference"]], []
    for judged in found["contestants"]:
        numbers = f"{judged['loss']:.4f}", f"{judged['reference_loss']:.4f}", f"{judged['off']:+.4f}"
        name = results[judged["contestant"]]["title"]
        agrees = "yes" if judged["agrees"] else "NO"
        rows.append([name, judged["bound"], *numbers, f"± {judged['allowed']:.4f}", agrees])
    header = ["mean loss of the first steps, nats per datum", "of", "loss", runs["title"], "off by", "allowed", "same"]
    return table(header, rows)


def of_targets(found: Mapping[str, Result]) -> str:
    """Format the ratios that have a target, of the measured cases."""
    rows = []
    for target in TARGETS:
        results = found.get(target.case, {}).get("contestants", {})
        times = [results.get(name, {}).get("time") for name in (target.contestant, target.peer)]
        if None in times:
            continue
        ratio = times[0] / times[1]
        verdict = "met" if ratio <= target.at_most else "missed"
        pair = f"{target.contestant} / {target.peer}"
        rows.append([target.case, pair, f"{ratio:.2f}", f"{target.at_most:.2f}", verdict])
    return table(["case", "ratio of times", "found", "at most", ""], rows) if rows else "None of them was measured."
