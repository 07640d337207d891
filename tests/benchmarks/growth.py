"""Growth of time and memory with data, latents, particles and epochs, and with data that stay in a file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any, TextIO

from cases import CASES, DIGITS, MIXTURE, MNIST, Case, shortened
from measuring import Settings, measure
from result_tables import absent, format_seconds, peak, table

OURS = ("captured", "replayed", "eager")
TIMES = ("time", "lower", "upper", "fastest", "slowest")


@dataclass(frozen=True)
class Series:
    """A case at several sizes."""

    title: str  # in the tables
    base: Case
    grows: str  # the size that grows: "rows", "batch_size", "latent" or "particles"
    values: tuple[int, ...]  # of that size
    quick: tuple[int, ...] = (40, 80)  # its values in the short form
    each: str = "step"  # the time is that of a "step", an "epoch" or a "call"
    peers: tuple[str, ...] = ()  # contestants next to ours

    def case(self, value: int, quick: bool) -> Case:
        base = shortened(self.base) if quick else self.base
        if self.grows == "latent":
            return replace(base, latent=(value,))
        if self.grows == "particles":
            return replace(base, particles=value)
        if self.grows == "batch_size":
            return replace(base, rows=10 * value, batch_size=value)
        return replace(base, rows=value, batch_size=value if self.base.full_batch else base.batch_size)

    def work(self, case: Case) -> int:
        """Return the units of work in a step, epoch or call."""
        draws = case.particles * (case.rows if case.task == "evaluate" else 1)
        return {"step": 1, "epoch": case.rows // case.batch_size, "call": draws}[self.each]


SERIES = {
    "data": Series("An epoch of MNIST 784-400-20 at batch 128, by images", MNIST, "rows",
                   (50 * 128, 150 * 128, 450 * 128), each="epoch"),
    "batch": Series("A step of MNIST 784-400-20, by images in a batch", MNIST, "batch_size", (8, 32, 128, 512, 2048),
                    (4, 8), peers=("numpyro",)),
    "full-batch": Series("A step on all points of the mixture, by points", MIXTURE, "rows", (1000, 10_000, 100_000)),
    "latents": Series("A step of MNIST 784-400 at batch 128, by latents", MNIST, "latent", (5, 40, 320), (2, 4)),
    "states": Series("A step on digits, by Bernoulli variables enumerated", CASES["enumerated"], "latent",
                     (4, 8, 12), (2, 3)),
    "particles": Series("A step of MNIST 784-400-20 at batch 20, importance-weighted, by K", CASES["importance"],
                        "particles", (2, 10, 50, 250), (2, 4)),
    "evidence-draws": Series("log p(x) of 100 MNIST images, by draws of each", CASES["evidence"], "particles",
                             (250, 1000, 4000), (5, 10), each="call"),
    "evidence-rows": Series("log p(x) of all points of the mixture, 10 draws of each, by points",
                            replace(MIXTURE, task="evaluate", particles=10), "rows", (3000, 30_000, 300_000),
                            each="call"),
    "export-draws": Series("Draws of 1000 points of the mixture for ArviZ, by draws", CASES["export"], "particles",
                           (50, 200, 800), (5, 10), each="call"),
}  # fmt: skip
EPOCHS = replace(DIGITS, name="epochs", title="Memory by epochs: digits, 64-128-2, batch 100")
MAPPED = replace(
    MNIST, name="mapped", title="Data in a mapped file: 784-16-2, batch 1000",
    rows=300_000, hidden=(16,), latent=(2,), batch_size=1000, mapped=True,
)  # fmt: skip
MAPPED_ROWS, QUICK_MAPPED_ROWS = (30_000, 300_000), (20_000,)
GROWTHS = (*SERIES, "epochs", "mapped")


def measure_growth(
    name: str, names: Sequence[str], settings: Settings, folder: Path, log_file: TextIO, quick: bool
) -> dict[str, Any]:
    """Measure one of :data:`GROWTHS`; the result can be written as JSON."""
    settings = replace(settings, seeds=0, rounds=min(3, settings.rounds), seconds=settings.seconds / 2)
    settings = replace(settings, pause=min(0.1, settings.pause))
    peers = SERIES[name].peers if name in SERIES else ()
    names = [contestant for contestant in names if contestant in (*OURS, *peers)]
    if name in ("epochs", "mapped"):
        names = [contestant for contestant in names if contestant != "replayed"]  # its memory is that of the others
    if name == "epochs":
        settings = replace(settings, rounds=2 if quick else 10)
        return measure(shortened(EPOCHS) if quick else EPOCHS, names, settings, folder, log_file)
    if name == "mapped":
        cases = [replace(MAPPED, rows=rows) for rows in (QUICK_MAPPED_ROWS if quick else MAPPED_ROWS)]
        return {"points": [measure(case, names, settings, folder, log_file) for case in cases]}
    series, points = SERIES[name], []
    if series.base.task != "train":
        names = [name for name in names if name == "eager"]
    for value in series.quick if quick else series.values:
        case = series.case(value, quick)
        found = measure(case, names, settings, folder, log_file)["contestants"]
        for result in found.values():
            for key in TIMES if "time" in result else ():
                result[key] *= series.work(case)
        points.append({"value": value, "contestants": found})
    return {"title": series.title, "grows": series.grows, "each": series.each, "points": points}


def to_markdown(name: str, found: dict[str, Any]) -> str:
    if name == "epochs":
        return f"## {EPOCHS.title}\n\n{_of_epochs(found)}"
    if name == "mapped":
        return f"## {MAPPED.title}\n\n{_of_mapped(found['points'])}"
    return f"## {SERIES[name].title}\n\n{_of_series(SERIES[name], found['points'])}"


def _of_series(series: Series, points: list[dict[str, Any]]) -> str:
    """Format a row for each size; the exponent is that of the power law through a point and its predecessor."""
    rows = []
    for number, point in enumerate(points):
        for name, result in point["contestants"].items():
            if "time" not in result:
                rows.append([f"{point['value']:,}", result["title"], absent(result), "", "", ""])
                continue
            smaller = points[number - 1]
            before = smaller["contestants"][name].get("time") if number else None
            growth = log(point["value"] / smaller["value"])
            exponent = f"{log(result['time'] / before) / growth:.2f}" if before else ""
            cells = [result["title"], format_seconds(result["time"]), exponent, *peak(result)]
            rows.append([f"{point['value']:,}", *cells])
    return table([series.grows, "", f"time per {series.each}", "exponent", "peak MB", "grown by"], rows)


def _of_epochs(found: dict[str, Any]) -> str:
    """Format the memory after the first round and after the last."""
    steps, rows = found["case"]["rows"] // found["case"]["batch_size"], []
    for result in found["contestants"].values():
        if "time" not in result or "resident" not in result["turns"][0]:
            rows.append([result["title"], absent(result), "", "", ""])
            continue
        first, *others = result["turns"]
        epochs = sum(turn["work"] for turn in others) / steps
        growth = others[-1]["resident"] - first["resident"]
        cells = [f"{first['resident']:.1f}", f"{others[-1]['resident']:.1f}", f"{epochs:,.0f}"]
        rows.append([result["title"], *cells, f"{1024 * growth / epochs:.2f}"])
    return table(["MB resident", "at first", "at last", "epochs between", "kB per epoch"], rows)


def _of_mapped(points: list[dict[str, Any]]) -> str:
    """Format the growth of anonymous memory: a file of ten times the size should need little more."""
    rows = []
    for point in points:
        size = f"{point['case']['rows'] * point['case']['features'] / 2**20:.0f}"
        for result in point["contestants"].values():
            if "time" not in result or "anonymous" not in result["begun_with"]:
                rows.append([size, result["title"], absent(result), ""])
                continue
            grown = max(turn["most_anonymous"] for turn in result["turns"]) - result["begun_with"]["anonymous"]
            rows.append([size, result["title"], format_seconds(result["time"]), f"{grown:.0f}"])
    return table(["MB of data", "", "time per step", "MB of anonymous memory"], rows)
