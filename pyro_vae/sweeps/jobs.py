"""The jobs of a sweep, and what an engine needs to run them in other processes."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pyro_vae
from pyro_vae._utils.validation import describe
from pyro_vae.sweeps.run import Run, Task, run_settings
from pyro_vae.sweeps.space import Settings

__all__ = ["Job", "Jobs", "described", "optional_module", "pack", "run_here", "unpack"]


class Job(NamedTuple):
    """Settings, and the seeds that one process runs them with, one after the other."""

    settings: Settings
    seeds: tuple[int, ...]


@dataclass
class Jobs:
    """What is to be done.

    Attributes:
        task: what all runs share.
        drawn: the settings, each with its seeds; ``None`` if a searcher of the engine proposes them.
        seeds: the seeds of the sweep.
        num_settings: how many settings a searcher proposes.
        workers: runs at the same time.
        retries: how often a run is started again whose process ended.
        grace: epochs before a run may be stopped early, or a scheduler or pruner of the engine, or ``None``.
        search: the searcher or sampler.
        resources: of a run, for Ray.
        advance: is called when a job has ended.
    """

    task: Task
    drawn: Sequence[Job] | None
    seeds: tuple[int, ...]
    num_settings: int
    workers: int
    retries: int
    grace: Any
    search: Any
    resources: Mapping[str, float]
    advance: Callable[[], object]

    def known(self) -> list[Job]:
        """The jobs whose settings are known: drawn, or proposed so far."""
        if self.drawn is not None:
            return list(self.drawn)
        paths = sorted(self.task.folder.glob("runs/*/settings.json"), key=lambda path: path.stat().st_mtime_ns)
        return [Job(json.loads(path.read_text()), self.seeds) for path in paths]

    def left(self) -> list[Job]:
        """The known jobs that have not ended."""
        return [job for job in self.known() if not self.has_ended(job)]

    def unknown(self) -> int:
        """The number of settings that are still to be proposed."""
        return 0 if self.drawn is not None else max(0, self.num_settings - len(self.known()))

    def runs(self, job: Job) -> list[Run]:
        """The runs of a job."""
        return [self.task.run(job.settings, seed) for seed in job.seeds]

    def has_ended(self, job: Job) -> bool:
        """Whether all seeds are complete, or the first that is not has ended."""
        for run in self.runs(job):
            if not self.task.is_ended(run):
                return False
            if run.status != "complete":
                return True
        return True

    def end(self, job: Job, status: str, message: str = "") -> None:
        """Write how a job ended that could not write it itself."""
        for run in self.runs(job):
            if run.status == "complete":
                continue
            if not self.task.is_ended(run):
                history = run.history.values()
                epochs = max(map(len, history), default=0)
                Run(run.settings, run.seed, status, message, epochs=epochs, attempt=self.task.attempt,
                    folder=run.folder).save()  # fmt: skip
            return


def run_here(jobs: Jobs) -> None:
    """Run all jobs in this process, one after the other."""
    for job in jobs.left():
        run_settings(jobs.task, job.settings, job.seeds, lambda epoch, elbo: False)
        jobs.advance()


def pack(task: Task) -> bytes:
    """Pickle a task, with the functions and classes of the user's script, and where their modules are found."""
    cloudpickle = optional_module("cloudpickle", "sweep")
    module = sys.modules.get(getattr(task.make, "__module__", None) or "__main__")
    is_here_alone = module is not None and module.__spec__ is None and module.__name__ != "__main__"
    try:
        with _by_value(cloudpickle, module) if is_here_alone else nullcontext():
            pickled = cloudpickle.dumps(task)
    except Exception as error:
        must = "what can be pickled, to be sent to other processes"
        raise TypeError(
            f"`make`, `space`, `data` and options of a sweep must be {must}: {type(error).__name__}: {error}"
        ) from error
    return cloudpickle.dumps((pyro_vae.__version__, sys.path, pickled))


@contextmanager
def _by_value(cloudpickle: ModuleType, module: ModuleType | None) -> Iterator[None]:
    """Pickle functions of a module as those of the script: no file has it, so that no other process can import it."""
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def unpack(packed: bytes) -> Task:
    """Restore a task in another process, of the same version of the package."""
    import pickle

    version, path, pickled = pickle.loads(packed)
    if version != pyro_vae.__version__:
        where = Path(pyro_vae.__file__).parent
        raise RuntimeError(
            f"a worker of the sweep must have pyro_vae {version}, got {pyro_vae.__version__} in {str(where)!r}"
        )
    sys.path.extend(entry for entry in path if entry not in sys.path)
    return pickle.loads(pickled)


def optional_module(name: str, extra: str) -> ModuleType:
    """Import a module of an engine; name the extra that installs it if it is missing."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        package = "ray[tune]" if error.name == "ray" else error.name
        raise ImportError(
            f"`engine` needs {package}, which is not installed: pip install 'pyro-vae[{extra}]'"
        ) from error


def described(value: Any) -> Any:
    """Return a short description of an option, to compare it with that of an earlier call."""
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, Mapping):
        return {str(key): described(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    return getattr(value, "__name__", None) or describe(value)
