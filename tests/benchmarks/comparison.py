"""Compare two files of results, or merge the files of a run that was made in parts."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from result_tables import format_seconds, table

Results = dict[str, Any]
VARYING = ("load",)  # what differs between the parts of a run


def main(arguments: Sequence[str]) -> int:
    """Compare or merge files; a merge that would mix runs ends with a message."""
    args = parse(arguments)
    found = {str(path): json.loads(path.read_text()) for path in args.files}
    if args.command == "compare":
        print(compare(*found.values()))
    else:
        args.out.write_text(json.dumps(merge(found), indent=2))
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    compared = commands.add_parser("compare", help="print the times of the second file divided by those of the first")
    compared.add_argument("files", nargs=2, type=Path, metavar="FILE")
    merged = commands.add_parser("merge", help="write one file of the cases and growths of several")
    merged.add_argument("files", nargs="+", type=Path, metavar="FILE")
    merged.add_argument("--out", type=Path, required=True, help="file to write")
    return parser.parse_args(arguments)


def compare(first: Results, second: Results) -> str:
    """Format the times of the second file divided by those of the first, with their noise.

    The range of a ratio is that of the quartiles, lower by upper and upper by lower. Where it is on one side of 1, the
    middle halves of the rounds do not overlap, and the contestant is called faster or slower. The rounds of one run
    cannot show what differs between runs, such as other load.
    """
    before, rows = times(first), []
    for (place, title), new in times(second).items():
        if (old := before.get((place, title))) is None:
            continue
        low, high = new["lower"] / old["upper"], new["upper"] / old["lower"]
        changed = "slower" if low > 1 else "faster" if high < 1 else ""
        cells = [format_seconds(old["time"]), format_seconds(new["time"]), f"{new['time'] / old['time']:.2f}"]
        rows.append([place, title, *cells, f"{low:.2f} – {high:.2f}", changed])
    if not rows:
        return "The two files have no case and contestant in common."
    parts = [table(["", "", "first", "second", "ratio", "range", ""], rows)]
    if other := differences(first, second):
        parts.insert(0, "These are not the same, so that ratios are not of the code alone:\n" + "\n".join(other))
    return "\n\n".join(parts)


def times(found: Results) -> dict[tuple[str, str], Mapping[str, float]]:
    """Return the results that have a time, by the case or the point of a growth, and the contestant's title."""
    places = {name: case["contestants"] for name, case in found["cases"].items()}
    for name, grown in found["growth"].items():
        for point in grown.get("points", ()):
            if "value" in point:
                places[f"{name}, {point['value']:,}"] = point["contestants"]
    return {
        (place, result["title"]): result
        for place, contestants in places.items()
        for result in contestants.values()
        if "time" in result
    }


def differences(first: Results, second: Results) -> list[str]:
    """Describe what differs between the machines, libraries and settings of two files."""
    found = []
    for part in ("machine", "settings"):
        old, new = (_flat(results[part]) for results in (first, second))
        for key in sorted({*old, *new} - {*VARYING}):
            if old.get(key) != new.get(key):
                found.append(f"- {key}: {old.get(key)}, {new.get(key)}")
    return found


def _flat(described: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in described.items() if key != "packages"} | described.get("packages", {})


def merge(files: Mapping[str, Results]) -> Results:
    """Merge the parts of a run: other cases and growths, measured on one machine with the same settings."""
    (first, merged), *others = files.items()
    for path, found in others:
        if other := differences(merged, found):
            raise SystemExit(f"{first} and {path} are not parts of one run:\n" + "\n".join(other))
        for part in ("cases", "growth"):
            if twice := sorted({*merged[part]} & {*found[part]}):
                raise SystemExit(f"{', '.join(twice)} of {path} is in a file before it, too")
        merged = merged | {part: merged[part] | found[part] for part in ("cases", "growth")}
        merged["minutes"] = merged["minutes"] + found["minutes"]
    return merged
