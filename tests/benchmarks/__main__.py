"""Compare times with other implementations that compute the same: ``python tests/benchmarks --help``.

``python tests/benchmarks compare FIRST.json SECOND.json`` compares the results of two runs, and ``merge`` joins those
of a run that was made in parts.

Each contestant has its own process and the same number of threads. It first trains from the same initial weights, and
its losses must agree with the others'. Then contestants take turns, and a time is the median over the rounds of seconds
per unit of work, with its quartiles. One-off costs, such as compilation, are listed separately.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import comparison
import result_tables
from cases import CASES, Case, shortened
from growth import GROWTHS, measure_growth, to_markdown
from machine import machine
from measuring import Settings, measure
from processes import CONTESTANTS, USUAL

SHORT = ("mixture", "digits", "mnist-128", "mnist-1024")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks", description=__doc__, formatter_class=raw)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="cases to measure; all")
    parser.add_argument("--growth", nargs="*", choices=GROWTHS, default=list(GROWTHS), help="growth to measure; all")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(USUAL), help=f"{' '.join(USUAL)}")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant (7)")
    parser.add_argument("--seconds", type=float, default=0.8, help="length of a turn (0.8)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each contestant (2)")
    clock = "seconds of the wall, or of the processor, which do not depend on other load if there is one thread (wall)"
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help=clock)
    parser.add_argument("--short", action="store_true", help="three minutes: four cases, no growth, and fewer rounds")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to test the benchmark, not the speed")
    parser.add_argument("--folder", type=Path, help="folder of MNIST, for real images at the same speed")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder for JSON and Markdown")
    args = parser.parse_args(arguments)
    if args.short:
        parser.set_defaults(cases=list(SHORT), growth=[], rounds=3, seconds=0.7)
        args = parser.parse_args(arguments)
    return args


def settings_of(args: argparse.Namespace) -> Settings:
    if args.tiny:
        settings = Settings(rounds=2, seconds=0.05, reference_seeds=8, seeds=2, pause=0.0, settle=0.0)
    else:
        settings = Settings(rounds=args.rounds, seconds=args.seconds)
    return replace(settings, threads=args.threads, clock=args.clock)


def passed(found: dict[str, Any]) -> bool:
    """Whether no contestant failed, and all compared losses agree."""
    agree = all(judged["agrees"] for judged in found["agreement"]["contestants"])
    return agree and not any("failed" in result for result in found["contestants"].values())


def main(args: argparse.Namespace) -> int:
    """Measure, print and write the results; return 1 if a contestant failed or computes something else."""
    begun = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    settings, described = settings_of(args), machine(args.threads)
    if described["load"] is not None and described["load"] > 0.3 and args.clock == "wall":
        print(f"The machine is busy, with a load of {described['load']:.1f}: times will be too long.\n")
    found: dict[str, Any] = {"machine": described, "settings": vars(settings), "cases": {}, "growth": {}}
    written = [f"# Benchmarks\n\n{json.dumps(described)}"]
    with tempfile.TemporaryDirectory() as folder, (args.out / "log.txt").open("w") as log:
        for name in args.cases:
            case: Case = shortened(CASES[name]) if args.tiny else CASES[name]
            result = measure(case, args.contestants, settings, Path(folder) / name, log, args.folder)
            found["cases"][name] = result
            written.append(f"## {case.title}\n\n{result_tables.of_case(result, case.unit)}")
            print(f"{written[-1]}\n", flush=True)
        for name in args.growth:
            grown = measure_growth(name, args.contestants, settings, Path(folder) / name, log, args.tiny)
            found["growth"][name] = grown
            written.append(to_markdown(name, grown))
            print(f"{written[-1]}\n", flush=True)
    if not args.tiny:
        written.append(f"## Targets\n\n{result_tables.of_targets(found['cases'])}")
        print(written[-1])
    found["minutes"] = (time.monotonic() - begun) / 60
    (args.out / "results.json").write_text(json.dumps(found, indent=2))
    (args.out / "results.md").write_text("\n\n".join(written) + "\n")
    print(f"\n{found['minutes']:.1f} minutes. In {args.out}: results.json, results.md, log.txt")
    return 0 if all(map(passed, found["cases"].values())) else 1


if __name__ == "__main__":
    joins = sys.argv[1:2] in (["compare"], ["merge"])
    sys.exit(comparison.main(sys.argv[1:]) if joins else main(parse()))
