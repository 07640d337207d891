"""Seconds to a held-out target: ``python tests/quality --help``.

Each contestant has its own process and trains the same model from the same weights, with the same optimizer and
learning rates. After some epochs it waits while its weights are judged, by log p(x) of held-out data, until they reach
the target. The time is that of training alone, from the first call of the library, so compilation is part of it. A
time that is extrapolated is the measured time of a step, times the steps that the first contestant needed.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from machine import machine
from problems import PROBLEMS, shortened
from racing import CONTESTANTS, Paces, contest
from result_tables import absent, format_seconds, table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("quality", description=__doc__, formatter_class=raw)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="all")
    usual = ["automatic", "numpyro", "pyro", "pythae"]
    parser.add_argument("--contestants", nargs="*", choices=CONTESTANTS, default=usual, help=f"{', '.join(usual)}")
    parser.add_argument("--extrapolate", nargs="*", choices=CONTESTANTS, default=[], help="only measure their steps")
    parser.add_argument("--steps", type=int, help="steps of an extrapolated run; those of the first contestant")
    parser.add_argument("--threads", type=int, default=1, help="threads of each contestant (1)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to test the contest, not the speed")
    parser.add_argument("--folder", type=Path, help="folder of MNIST; without it, enlarged digits take its place")
    parser.add_argument("--out", type=Path, default=Path("results/quality"), help="folder for JSON and Markdown")
    return parser.parse_args(arguments)


def to_markdown(result: dict[str, Any]) -> str:
    """Format a row for each contestant, with ratios to the first that has a time."""
    rows, base, reasons = [], None, []
    for found in result["contestants"].values():
        last = found["checks"][-1] if "checks" in found else found.get("extrapolated")
        if last is None:
            rows.append([found["title"], absent(found), *[""] * 5])
            reasons.append(f"- {found['title']}: {found.get('failed') or found.get('not_available', 'only its pace')}")
            continue
        base = base or last
        reached = f"{last['value']:.3f}" if "value" in last else "extrapolated"
        reached += "" if found.get("reached", True) else ", not reached"
        ratios = f"{last['seconds'] / base['seconds']:.2f}", f"{last['processor'] / base['processor']:.2f}"
        times = format_seconds(last["seconds"]), format_seconds(last["processor"])
        rows.append([found["title"], reached, f"{last['steps']:,}", *times, *ratios])
    header = ["", "held-out nats", "steps", "time", "processor time", "first = 1", "processor, first = 1"]
    return "\n\n".join(filter(None, [f"Target: {result['problem']['goal']}.", table(header, rows), "\n".join(reasons)]))


def main(args: argparse.Namespace) -> int:
    """Run the contest, print and write the results; return 1 if a contestant failed or missed the target."""
    args.out.mkdir(parents=True, exist_ok=True)
    described = machine(args.threads, "pythae")
    results: dict[str, Any] = {
        "machine": described,
        "images": "MNIST" if args.folder else "enlarged digits",
        "problems": {},
    }
    written = [f"# Time to quality\n\n{json.dumps(described)}"]
    paces = Paces(rounds=2, seconds=0.05, start=0.01) if args.tiny else Paces()
    with tempfile.TemporaryDirectory() as folder, (args.out / "log.txt").open("w") as log:
        for name in args.problems:
            problem = shortened(PROBLEMS[name]) if args.tiny else PROBLEMS[name]
            raced = [each for each in args.contestants if each not in args.extrapolate]
            result = contest(
                problem, raced, args.extrapolate, args.steps, Path(folder) / name, args.threads, paces, log, args.folder
            )
            results["problems"][name] = result
            written.append(f"## {problem.title}\n\n{to_markdown(result)}")
            print(f"{written[-1]}\n", flush=True)
            (args.out / "results.json").write_text(json.dumps(results, indent=2))
            (args.out / "results.md").write_text("\n\n".join(written) + "\n")
    print(f"In {args.out}: results.json, results.md, log.txt")
    found = [each for result in results["problems"].values() for each in result["contestants"].values()]
    return 1 if any("failed" in each or not each.get("reached", True) for each in found) else 0


if __name__ == "__main__":
    sys.exit(main(parse()))
