"""The applications: run each with several seeds, and keep what the pages show.

    python docs/applications.py [NAME ...] [--folder FOLDER] [--jobs 2]

An application is an example that states a headline: its number next to a simple baseline and a published figure. Each
is run with three seeds in ``results/applications``; a run whose example has not changed since is not repeated. Then
its numbers over the seeds, and what the first seed printed and drew, are kept in ``docs/applications/NAME``, and the
table of the page is written between the markers ``<!-- applications: NAME -->`` and ``<!-- end -->``.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"
RESULTS = DOCS.parent / "results" / "applications"
KEPT = DOCS / "applications"
PAGE = DOCS / "applications.md"
FRAGMENT = re.compile(r"(<!-- applications: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLOURS = 256  # of a picture that is kept, so that it is small

Run = dict[str, Any]


def names() -> list[str]:
    """Return the examples that state a headline."""
    found = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "common")
    return [name for name in found if "common.headline(" in (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")]


def kept_names() -> list[str]:
    """Return the applications whose results are kept."""
    return sorted(path.parent.name for path in KEPT.glob("*/run.json"))


def read(name: str) -> Run:
    """Read the numbers of an application that are kept."""
    return json.loads((KEPT / name / "run.json").read_text(encoding="utf-8"))


# --- Running ---------------------------------------------------------------------------------------------------------


def options(name: str, folder: Path | None) -> list[str]:
    """Return the options of a full run: the folder of MNIST, where the example has this option."""
    if folder is None:
        return []
    command = [sys.executable, f"{name}.py", "--help"]
    described = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=True).stdout
    return ["--folder", str(folder)] if "--folder" in described else []


def digest(name: str) -> str:
    """Return a hash of the code of an example."""
    files = (EXAMPLES / f"{name}.py", EXAMPLES / "common.py")
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def run(name: str, seed: int, folder: Path | None) -> None:
    """Run an application with a seed on one thread, unless it was run before.

    Raises:
        RuntimeError: if it fails.
    """
    out = RESULTS / name / f"seed_{seed}"
    record = out / "run.json"
    if record.exists() and json.loads(record.read_text(encoding="utf-8"))["digest"] == digest(name):
        return
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    command = [sys.executable, f"{name}.py", "--out", str(out), "--seed", str(seed), *options(name, folder)]
    begun, used = time.monotonic(), digest(name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "TQDM_DISABLE": "1"}
    with (out / "printed.txt").open("w") as printed, (out / "errors.txt").open("w") as errors:
        process = subprocess.Popen(command, cwd=EXAMPLES, stdout=printed, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = (out / "errors.txt").read_text(encoding="utf-8").splitlines()[-20:]
        raise RuntimeError("\n".join([f"`{shlex.join(command)}` failed:", *tail]))
    found = {
        "digest": used,
        "seconds": time.monotonic() - begun,
        "processor": usage.ru_utime + usage.ru_stime,
        "gigabytes": usage.ru_maxrss / 2**20,
    }
    record.write_text(json.dumps(found), encoding="utf-8")
    print(f"{name}, seed {seed}: {found['seconds'] / 60:.1f} minutes", flush=True)


# --- Keeping what the pages show -------------------------------------------------------------------------------------


def keep(name: str, seeds: Iterable[int]) -> None:
    """Keep the numbers of all seeds, and the output and the pictures of the first one."""
    from PIL import Image

    folders = [RESULTS / name / f"seed_{seed}" for seed in seeds]
    results = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
    runs = [json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in folders]
    shutil.rmtree(KEPT / name, ignore_errors=True)
    (KEPT / name).mkdir(parents=True)
    found = {
        "seeds": list(seeds),
        "headlines": [merged(each) for each in zip(*(result["headlines"] for result in results), strict=True)],
        "processor_seconds": [round(run["processor"]) for run in runs],
        "gigabytes": round(max(run["gigabytes"] for run in runs), 1),
        "versions": {package: version(package) for package in ("torch", "pyro-ppl")},
    }
    (KEPT / name / "run.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    printed = (folders[0] / "printed.txt").read_text(encoding="utf-8").splitlines()
    shown = [line.rstrip() for line in printed if str(folders[0]) not in line]
    (KEPT / name / "printed.txt").write_text("\n".join(shown).strip() + "\n", encoding="utf-8")
    for picture in folders[0].glob("*.png"):
        Image.open(picture).convert("RGB").quantize(COLOURS).save(KEPT / name / picture.name, optimize=True)


def merged(headlines: tuple[Run, ...]) -> Run:
    """Merge the same headline of several seeds: the numbers become lists.

    Raises:
        ValueError: if they are not the same one.
    """
    changing = ("value", "baseline")
    first = {key: value for key, value in headlines[0].items() if key not in changing}
    for other in headlines[1:]:
        if {key: value for key, value in other.items() if key not in changing} != first:
            raise ValueError(f"`headlines` must be the same for all seeds, got {headlines[0]} and {other}")
    return first | {key: [float(f"{each[key]:.6g}") for each in headlines] for key in changing}


# --- The page --------------------------------------------------------------------------------------------------------


def advantage(found: Run) -> tuple[float, float]:
    """Return how much better the model is than the baseline, paired by seed: the mean and its standard error."""
    sign = 1 if found["higher_is_better"] else -1
    differences = [sign * (one - other) for one, other in zip(found["value"], found["baseline"], strict=True)]
    return statistics.fmean(differences), standard_error(differences)


def standard_error(values: list[float]) -> float:
    """Return the standard error of a mean over seeds."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def with_error(values: list[float]) -> str:
    """Format a mean over seeds and its standard error, or the number alone if it is the same for all seeds."""
    if len(set(values)) == 1:
        return f"{values[0]:.4g}"
    error = standard_error(values)
    digits = max(0, min(4, 1 - int(f"{max(error, 1e-4 * abs(statistics.fmean(values)), 1e-12):e}".split("e")[1])))
    return f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}"


def title(name: str) -> str:
    """Return the title of an example."""
    return (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").split('"""')[1].strip().splitlines()[0]


def numbers() -> str:
    """The table of all headlines, and the time of all runs together."""
    header = ["application", "measured on held-out data", "here", "simple baseline", "better by", "minutes"]
    rows, seconds = [], 0.0
    for name in kept_names():
        run, before = read(name), ""
        seconds += sum(run["processor_seconds"])
        minutes = f"{statistics.fmean(run['processor_seconds']) / 60:.1f}"
        link = f"[{title(name)}](examples/{name}.md)"
        for found in run["headlines"]:
            mean, error = advantage(found)
            better = f"{mean:.3g} ± {error:.2g}"
            baseline = f"{with_error(found['baseline'])}, {found['baseline_name']}"
            quantity = ", ".join(filter(None, (found["quantity"], found["unit"])))
            measured = [f"{quantity} {'↑' if found['higher_is_better'] else '↓'}", with_error(found["value"])]
            rows.append([link, *(["", ""] if quantity == before else measured), baseline, better, minutes])
            link, minutes, before = "", "", quantity
    return f"{_table(header, rows)}\n\nAll runs of all seeds together take {seconds / 60:.0f} minutes of one processor."


def published() -> str:
    """A list of the published figures, and how their protocols differ; an application says the same only once."""
    lines = []
    for name in kept_names():
        said: dict[str, list[str]] = {}
        for found in read(name)["headlines"]:
            text = f"Published: {found['published']}. Differences: {found['differences'].rstrip('.')}."
            said.setdefault(text, []).append(found["quantity"])
        for text, quantities in said.items():
            joined = "; ".join(dict.fromkeys(quantities))
            lines.append(f"- **{joined[0].upper()}{joined[1:]}** ({title(name)}). {text}")
    return "\n".join(lines)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


FRAGMENTS: dict[str, Callable[[], str]] = {"numbers": numbers, "published": published}


def fill(text: str) -> str:
    """Write what is kept of the runs between the markers of the page."""
    return FRAGMENT.sub(lambda found: f"{found[1]}\n{FRAGMENTS[found[2]]()}\n\n{found[3]}", text)


def main() -> None:
    """Run the applications, keep their results and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="applications to run; without any, all of them")
    parser.add_argument("--folder", type=Path, help="of the files of MNIST; without it, they are downloaded")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each application")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each on one thread")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds must be 2 or more, for a standard error, got {args.seeds}")
    if unknown := set(args.names) - set(names()):
        parser.error(f"names must be among {', '.join(names())}, got {', '.join(sorted(unknown))}")
    chosen, seeds = args.names or names(), range(args.seeds)
    folder = args.folder and args.folder.resolve()
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda pair: run(*pair, folder), [(name, seed) for name in chosen for seed in seeds]))
    for name in chosen:
        keep(name, seeds)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
