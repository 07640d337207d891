"""Results as tables: on the terminal and, being Markdown, in a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """That the time of one contestant is at most so many times that of another."""

    case: str
    contestant: str
    peer: str
    at_most: float


TARGETS = (
    Target("mixture", "captured", "pyro", 1 / 6),
    Target("mixture", "captured", "numpyro", 1.0),
    Target("mnist-128", "captured", "numpyro", 1.0),
    Target("mnist-128", "captured", "floor", 1.35),
    Target("mnist-1024", "captured", "numpyro", 1.0),
    Target("mnist-1024", "captured", "floor", 1.2),
    *(Target(case, "eager", "handwritten", 1.3) for case in ("mixture", "digits", "mnist-128", "mnist-1024")),
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, in columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {first[0]:{first[1]}} | " + " | ".join(f"{cell:>{width}}" for cell, width in others) + " |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return "\n".join([line(header), rule, *map(line, rows)])


def span(seconds: float) -> str:
    """A time in a unit that reads well."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def of_case(found: Result, unit: str) -> str:
    """A row for each contestant, and whether they agree."""
    results = found["contestants"]
    base = next((name for name in ("captured", "eager") if "time" in results.get(name, {})), None)
    header = [f"time per {unit}", "median", "fastest", "slowest", f"{base or '–'} = 1", "per second"]
    header += ["start", "again", "peak MB", "grown by"]
    rows = []
    for result in results.values():
        if "time" not in result:
            why = f"failed: {result['failed']}" if "failed" in result else "not available"
            rows.append([result["title"], why, *[""] * (len(header) - 2)])
            continue
        ratio = f"{result['time'] / results[base]['time']:.2f}" if base else ""
        times = [span(result[key]) for key in ("time", "fastest", "slowest")]
        peak = result.get("peak")
        rows.append(
            [result["title"], *times, ratio, f"{1 / result['time']:,.0f}"]
            + [f"{result[key]:.1f} s" for key in ("start", "start_again")]
            + (["", ""] if peak is None else [f"{peak:.0f}", f"{peak - result['begun_with']:.0f}"])
        )
    return f"{table(header, rows)}\n\n{agreement(found['agreement'], results)}"


def agreement(found: Result, results: Mapping[str, Result]) -> str:
    """The losses by which contestants were judged to compute the same."""
    if found["reference"] is None:
        return "Loss: no contestant whose runs could be compared."
    title = results[found["reference"]]["title"]
    rows = [[f"{title}, {found['runs']} runs", f"{found['loss']:.4f}", "", f"{found['spread']:.4f} between runs", ""]]
    for name, judged in found["contestants"].items():
        says = "yes" if judged["agrees"] else "NO"
        cells = [f"{judged['loss']:.4f}", f"{judged['off']:+.4f}", f"± {judged['allowed']:.4f}", says]
        rows.append([results[name]["title"], *cells])
    return table(["nats per datum, first steps", "mean loss", "off by", "allowed", "the same"], rows)


def of_targets(found: Mapping[str, Result]) -> str:
    """Ratios that were promised, of the cases that were measured."""
    rows = []
    for target in TARGETS:
        results = found.get(target.case, {}).get("contestants", {})
        times = [results.get(name, {}).get("time") for name in (target.contestant, target.peer)]
        if None in times:
            continue
        ratio = times[0] / times[1]
        said = "met" if ratio <= target.at_most else "missed"
        rows.append(
            [target.case, f"{target.contestant} / {target.peer}", f"{ratio:.2f}", f"{target.at_most:.2f}", said]
        )
    return table(["case", "ratio of times", "found", "at most", ""], rows) if rows else "None of them was measured."
