"""Compare times with other implementations that compute the same: ``python tests/benchmarks --help``.

Each contestant has its own process and the same number of threads. It first trains from the same initial weights, and
its losses must agree with the others'. Then contestants take turns, and a time is the median over the rounds of seconds
per unit of work. One-off costs, such as compilation, are listed separately.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import result_tables
from cases import CASES, Case, shortened
from growth import GROWTHS, measure_growth, to_markdown
from machine import machine
from measuring import Settings, measure
from processes import CONTESTANTS


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks", description=__doc__, formatter_class=raw)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="cases to measure; all")
    parser.add_argument("--growth", nargs="*", choices=GROWTHS, default=list(GROWTHS), help="growth to measure; all")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="all")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant (7)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn (3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each contestant (2)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test the benchmark, not the speed")
    parser.add_argument("--folder", type=Path, help="folder of MNIST, for real images at the same speed")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder for JSON and Markdown")
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace) -> Settings:
    if args.quick:
        return Settings(rounds=2, seconds=0.05, threads=args.threads, reference_seeds=8, seeds=2, pause=0.0)
    return Settings(rounds=args.rounds, seconds=args.seconds, threads=args.threads)


def passed(found: dict[str, Any]) -> bool:
    """Whether no contestant failed, and all compared losses agree."""
    agree = all(judged["agrees"] for judged in found["agreement"]["contestants"])
    return agree and not any("failed" in result for result in found["contestants"].values())


def main(args: argparse.Namespace) -> int:
    """Measure, print and write the results; return 1 if a contestant failed or computes something else."""
    args.out.mkdir(parents=True, exist_ok=True)
    settings, described = settings_of(args), machine(args.threads)
    if described["load"] is not None and described["load"] > 0.3:
        print(f"The machine is busy, with a load of {described['load']:.1f}: times will be too long.\n")
    found: dict[str, Any] = {"machine": described, "settings": vars(settings), "cases": {}, "growth": {}}
    written = [f"# Benchmarks\n\n{json.dumps(described)}"]
    with tempfile.TemporaryDirectory() as folder, (args.out / "log.txt").open("w") as log:
        for name in args.cases:
            case: Case = shortened(CASES[name]) if args.quick else CASES[name]
            result = measure(case, args.contestants, settings, Path(folder) / name, log, args.folder)
            found["cases"][name] = result
            written.append(f"## {case.title}\n\n{result_tables.of_case(result, case.unit)}")
            print(f"{written[-1]}\n", flush=True)
        for name in args.growth:
            grown = measure_growth(name, args.contestants, settings, Path(folder) / name, log, args.quick)
            found["growth"][name] = grown
            written.append(to_markdown(name, grown))
            print(f"{written[-1]}\n", flush=True)
    if not args.quick:
        written.append(f"## Targets\n\n{result_tables.of_targets(found['cases'])}")
        print(written[-1])
    (args.out / "results.json").write_text(json.dumps(found, indent=2))
    (args.out / "results.md").write_text("\n\n".join(written) + "\n")
    print(f"\nIn {args.out}: results.json, results.md, log.txt")
    return 0 if all(map(passed, found["cases"].values())) else 1


if __name__ == "__main__":
    sys.exit(main(parse()))
