"""One run of a sweep: make model and guide, fit them, evaluate them on held-out data, and store what came out."""

import hashlib
import inspect
import json
import math
import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

from pyro_vae._utils.data import data_tensors
from pyro_vae._utils.files import locked, replacing
from pyro_vae._utils.param_store import without_training
from pyro_vae._utils.ranks import one_process
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import describe
from pyro_vae.arguments import any_arguments
from pyro_vae.evidence.importance_sampling import cell_plates, densities
from pyro_vae.model_guide import transformed
from pyro_vae.sweeps.space import Settings, Space
from pyro_vae.training.checkpoints import Checkpoints
from pyro_vae.training.fit import Fitted, evaluate, fit
from pyro_vae.training.loop import Callback, Epoch

__all__ = ["NotByRows", "Report", "Run", "Task", "elbo_of_rows", "run_settings"]

Report = Callable[[int, float], bool]
"""Receives the number of an epoch, counted over the seeds, and its held-out ELBO; ``True`` if the run must end."""

_ROWS, _BUDGET = 1024, 2**22  # rows at once, and numbers in the largest tensor
_MADE = (
    "a VAE, (vae, options), (model, guide) or (model, guide, options), where options are keyword arguments of pv.fit"
)
_WAIT = 0.1  # seconds between two looks at a folder that another process uses


@dataclass
class Run:
    """A run of a sweep, as its folder has it.

    Attributes:
        settings: its settings.
        seed: its seed.
        status: ``"complete"``; ``"stopped"``, early, as others were better; ``"failed"``, with a message; or
            ``"unfinished"``.
        message: the error of a failed run.
        elbo: held-out ELBO at the end, in nats per datum; NaN unless complete.
        epochs: number of finished epochs.
        seconds: time of the training and the evaluation since the run was last started.
        why_no_rows: why there is no ELBO of each row of the held-out data.
        attempt: the call of :func:`pyro_vae.sweep` that it ended in, in time order.
        folder: the folder of the run, which has its checkpoints.
    """

    settings: Settings
    seed: int
    status: str = "unfinished"
    message: str = ""
    elbo: float = math.nan
    epochs: int = 0
    seconds: float = 0.0
    why_no_rows: str = ""
    attempt: int = 0
    folder: Path = field(default=Path(), compare=False)

    @property
    def history(self) -> dict[str, list[float]]:
        """The history of the training so far, with a number for each epoch, NaN where it was not recorded."""
        by_epoch: dict[int, dict[str, float]] = {}
        path = self.folder / "history.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                epoch, record = json.loads(line)
            except ValueError:  # a process was killed in the middle of the line
                continue
            by_epoch[epoch] = record
        names = dict.fromkeys(name for record in by_epoch.values() for name in record)
        last = max(by_epoch, default=0)
        return {name: [by_epoch.get(n, {}).get(name, math.nan) for n in range(1, last + 1)] for name in names}

    @property
    def rows(self) -> np.ndarray | None:
        """The held-out ELBO of each row of a complete run, ``(N,)``, if it has one for each."""
        path = self.folder / "elbo.npy"
        return np.load(path) if self.status == "complete" and path.exists() else None

    @classmethod
    def load(cls, folder: Path, settings: Settings, seed: int) -> "Run":
        """Read a run from its folder, where there may be nothing yet."""
        path = folder / "run.json"
        if not path.exists():
            return cls(dict(settings), seed, folder=folder)
        values = json.loads(path.read_text())
        return cls(**{**values, "elbo": math.nan if values["elbo"] is None else values["elbo"]}, folder=folder)

    def save(self) -> None:
        """Write the run into its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {name: value for name, value in asdict(self).items() if name != "folder"}
        values["elbo"] = None if math.isnan(self.elbo) else self.elbo
        with replacing(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps(values, indent=1))


@dataclass
class Task:
    """What all runs of a sweep share; it is sent once to each process.

    Attributes:
        make: from settings to what is fitted.
        space: of the settings.
        data: for training.
        validation: held-out data.
        options: of ``fit``.
        num_samples: draws of the latents for the ELBO at the end.
        every_seconds: between two checkpoints.
        folder: of the sweep.
        attempt: the number of the call.
        threads: of a run.
        needs_elbo: whether runs are compared while they train.
    """

    make: Function
    space: Space
    data: Data
    validation: Data
    options: Mapping[str, Any]
    num_samples: int
    every_seconds: float
    folder: Path
    attempt: int = 0
    threads: int = 1
    needs_elbo: bool = False

    def run(self, settings: Settings, seed: int) -> Run:
        """Return a run, as its folder has it."""
        return Run.load(folder_of(self.folder, settings, seed), settings, seed)

    def is_ended(self, run: Run) -> bool:
        """Whether a run needs no more work in this call: those that failed in an earlier call are tried again."""
        return run.status in ("complete", "stopped") or (run.status == "failed" and run.attempt == self.attempt)

    def make_pair(self, settings: Settings, seed: int) -> tuple[Function, Function, dict[str, Any]]:
        """Make model and guide, with random numbers of the seed, and return the options of ``fit`` too."""
        with seeded(seed):
            model, guide, options = _made(self.make(**self.space.values_of(settings)))
        return model, guide, {**self.options, **options}

    def fit(
        self, model: Function, guide: Function, options: Mapping[str, Any], run: Run, callbacks: Sequence[Callback] = ()
    ) -> Fitted:
        """Fit model and guide, from the checkpoint in the folder of the run if there is one."""
        return fit(model, guide, self.data, **{
            **options,
            "validation": self.validation,
            "seed": run.seed,
            "progress": False,
            "checkpoints": Checkpoints(run.folder, every_seconds=self.every_seconds),
            "callbacks": [*options.get("callbacks", ()), *callbacks],
        })  # fmt: skip

    def evaluate(
        self, model: Function, guide: Function, options: Mapping[str, Any], seed: int
    ) -> tuple[float, np.ndarray | None, str]:
        """Return the held-out ELBO in nats per datum, that of each row if there is one, and else why not.

        It is the ELBO of one draw, whatever the objective was, so that runs with different objectives can be compared.
        """
        validation, transform = self.validation, options.get("transform")
        if transform is not None:
            with seeded(0):
                validation = transformed(data_tensors(validation, "validation", model), transform)
        common = {"num_samples": self.num_samples, "plate": options.get("plate", "data"), "seed": seed}
        try:
            rows = elbo_of_rows(model, guide, validation, **common)
        except NotByRows as error:
            terms = evaluate(model, guide, validation, elbo=options.get("elbo"), **common)
            return terms["elbo"], None, str(error)
        return float(rows.mean()), rows.numpy(), ""


def folder_of(folder: Path, settings: Settings, seed: int) -> Path:
    """Return the folder of a run: readable, and different for different settings."""
    text = json.dumps(settings, sort_keys=True)
    name = re.sub(r"[^\w.+-]+", "_", ",".join(f"{key}={value}" for key, value in settings.items()))[:60]
    return folder / "runs" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}" / f"seed-{seed}"


def run_settings(task: Task, settings: Settings, seeds: Iterable[int], report: Report) -> list[Run]:
    """Run settings for each seed in turn, up to the first that does not complete, and return the runs.

    What an earlier call or process has finished is not repeated.
    """
    runs: list[Run] = []
    for seed in seeds:
        before = sum(run.epochs for run in runs)
        runs.append(_run(task, settings, seed, partial(_report_from, report, before)))
        if runs[-1].status != "complete":
            break
    return runs


def _report_from(report: Report, before: int, epoch: int, elbo: float) -> bool:
    return report(before + epoch, elbo)


def _run(task: Task, settings: Settings, seed: int, report: Report) -> Run:
    """Run one seed, in an empty param store, and write what came out, or the error."""
    with _alone(folder_of(task.folder, settings, seed)):
        run = task.run(settings, seed)
        if task.is_ended(run):
            return run
        with replacing(run.folder.parent / "settings.json") as temporary:
            temporary.write_text(json.dumps(settings))
        run = Run(settings, seed, attempt=task.attempt, folder=run.folder)
        started, threads = time.perf_counter(), torch.get_num_threads()
        try:
            torch.set_num_threads(task.threads)
            with one_process(), pyro.get_param_store().scope():  # whatever ranks the sweep was started from
                _train(task, run, report)
        except Exception as error:
            run.status, run.elbo, run.message = "failed", math.nan, f"{type(error).__name__}: {error}"
            (run.folder / "error.txt").write_text("".join(traceback.format_exception(error)))
        finally:
            torch.set_num_threads(threads)
        run.seconds = time.perf_counter() - started
        run.save()
        return run


def _train(task: Task, run: Run, report: Report) -> None:
    """Fit and evaluate, and set what came out."""
    model, guide, options = task.make_pair(run.settings, run.seed)
    follow = _Follow(run.folder, report, task.needs_elbo)
    fitted = task.fit(model, guide, options, run, [follow])
    if fitted.stopped == "interrupted":
        raise KeyboardInterrupt
    run.epochs = len(next(iter(fitted.history.values())))
    if fitted.stopped == "callback" and follow.stopped.exists():
        run.status = "stopped"
        return
    run.elbo, rows, run.why_no_rows = task.evaluate(model, guide, options, run.seed)
    if not math.isfinite(run.elbo):
        raise FloatingPointError(f"the held-out ELBO is {run.elbo}")
    _save_rows(run.folder, rows)
    run.status = "complete"


@contextmanager
def _alone(folder: Path) -> Any:
    """Wait until no other process uses a folder, since a searcher may propose the same settings twice."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            with locked(folder / ".run"):
                yield
            return
        except BlockingIOError:
            time.sleep(_WAIT)


class _Follow:
    """A callback that writes the history, a line for each epoch, and reports the held-out ELBO to the engine."""

    def __init__(self, folder: Path, report: Report, needs_elbo: bool):
        self.path, self.stopped = folder / "history.jsonl", folder / "stopped"
        self.report, self.needs_elbo = report, needs_elbo

    def __call__(self, epoch: Epoch) -> bool:
        with self.path.open("a") as file:
            file.write(f"\n{json.dumps([epoch.number, epoch.record])}\n")
        if "validation_elbo" not in epoch.record:
            if not self.needs_elbo:
                return False
            raise ValueError(
                "`early_stopping` and `search` must be left out where the objective is no ELBO, got a history of "
                f"{', '.join(epoch.record)}"
            )
        ended = self.report(epoch.number, epoch.record["validation_elbo"])
        if ended:
            self.stopped.touch()  # a process that is killed before the run is saved knows it when it resumes
        return ended


def _save_rows(folder: Path, rows: np.ndarray | None) -> None:
    path = folder / "elbo.npy"
    if rows is None:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary:
        buffer = BytesIO()
        np.save(buffer, rows)
        temporary.write_bytes(buffer.getvalue())


def _made(made: Any) -> tuple[Function, Function, dict[str, Any]]:
    """Return model, guide and options from what ``make`` returned."""
    parts = list(made) if isinstance(made, tuple) else [made]
    options = parts.pop() if len(parts) > 1 and isinstance(parts[-1], Mapping) else {}
    if len(parts) == 1 and hasattr(parts[0], "model") and hasattr(parts[0], "guide"):
        parts = [parts[0].model, parts[0].guide]
    if len(parts) != 2 or not all(callable(part) for part in parts):
        shown = f"({', '.join(map(describe, made))})" if isinstance(made, tuple) else describe(made)
        raise TypeError(f"`make` must return {_MADE}, got {shown}")
    return parts[0], parts[1], check_options(options, "options of make")


def check_options(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return keyword arguments of ``fit``, of which those are refused that the sweep sets."""
    known = set(inspect.signature(fit).parameters) - {"model", "guide", "data"}
    ours = {"validation", "seed", "progress", "checkpoints"}
    for key in options:
        if key in ours or key not in known:
            must = "keyword arguments of pv.fit" + (", without those that the sweep sets" if key in ours else "")
            raise TypeError(f"`{name}` must be {must}, got {key!r}")
    return dict(options)


class NotByRows(ValueError):
    """Model and guide have no ELBO for each row."""


@torch.no_grad()
@any_arguments
@without_training
def elbo_of_rows(
    model: Function, guide: Function, *data: Data, num_samples: int, plate: str = "data", seed: int = 0
) -> torch.Tensor:
    r"""Estimate the ELBO of each row,

    .. math:: \frac1K \sum_{k=1}^K \log p(x_i, z_k) - \log q(z_k \mid x_i), \quad z_k \sim q(z \mid x_i),

    in nats, ``(N,)`` in float64, on the CPU.

    Args:
        model, guide: a Pyro model and its guide.
        data: arguments of both.
        num_samples: K.
        plate, seed: name of the data plate, and seed of the draws.

    Raises:
        NotByRows: if there is no density of each row, since latents are shared, for example.

    >>> from pyro_vae import VAE, guides, likelihoods, networks, priors
    >>> net = networks.linear()
    >>> vae = VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> elbo_of_rows(vae.model, vae.guide, torch.randn(10, 2), num_samples=5).shape
    torch.Size([10])
    """
    try:
        p, q = densities(model, guide, data, plate)
    except ValueError as error:
        raise NotByRows(str(error)) from error
    if cell_plates(p) is not None:
        raise NotByRows("the latents of the rows are not independent of each other given the data")
    is_split = p.by_rows and p.pair.is_amortized("model") and p.pair.is_amortized("guide")
    with seeded(seed):
        parts = p.batches(_ROWS) if is_split and p.num_data > _ROWS else [p]
        return torch.cat([_mean_log_weight(q.of_rows(part), num_samples) for part in parts])


def _mean_log_weight(q: Any, num_samples: int) -> torch.Tensor:
    total, chunk = q.p.zeros(), q.p.chunk_size(_BUDGET)
    for first in range(0, num_samples, chunk):
        values, log_q = q.sample(min(chunk, num_samples - first))
        total += (q.p.log_joint(values) - log_q).double().sum(0)
    return (total / num_samples).cpu()
