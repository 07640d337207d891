"""Run a sweep with Optuna: processes on this machine that share a study, whose storage is a file of the sweep."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pyro_vae._utils.files import locked
from pyro_vae.sweeps.jobs import Job, Jobs, optional_module, pack, unpack
from pyro_vae.sweeps.run import Task, run_settings
from pyro_vae.sweeps.space import Range, Settings, Space, plain_settings

if TYPE_CHECKING:
    import optuna

__all__ = ["run", "work"]

_NAME, _STORAGE, _LOG = "sweep", "optuna.log", "workers.log"
_POLL, _PATIENCE = 0.05, 10.0  # seconds between two looks at the processes, and until one that must end is killed
_REDUCTION = 4  # of successive halving: a quarter goes on
_START = "import sys; sys.path[:] = {path!r}; from pyro_vae.sweeps.optuna_engine import work; work({folder!r})"


def run(jobs: Jobs) -> None:
    """Run all jobs that have not ended, in processes that are started again if they are killed."""
    optuna = optional_module("optuna", "optuna")
    with _quiet(optuna):
        study = _open(jobs.task.folder, create=True)
        for trial in _in_state(study, "RUNNING"):  # of a sweep that was killed
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        waiting = _in_state(study, "WAITING")
        queued = [trial.user_attrs.get("job") for trial in waiting]
        for job in jobs.left():
            if (entry := {"settings": job.settings, "seeds": list(job.seeds)}) not in queued:
                study.enqueue_trial(job.settings, user_attrs={"job": entry})
        for _ in range(jobs.unknown() - queued.count(None)):
            study.enqueue_trial({})
        _Workers(jobs, study).run()


def _open(folder: Path, create: bool = False, **options: Any) -> "optuna.Study":
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(folder / _STORAGE)))
    if create:
        return optuna.create_study(
            storage=storage, study_name=_NAME, direction="maximize", load_if_exists=True, **options
        )
    return optuna.load_study(storage=storage, study_name=_NAME, **options)


def _in_state(study: "optuna.Study", name: str) -> "list[optuna.trial.FrozenTrial]":
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == name]


class _Workers:
    """Processes that take trials from a study until there are none."""

    def __init__(self, jobs: Jobs, study: "optuna.Study"):
        self.jobs, self.study = jobs, study
        self._packed = pickle.dumps((pack(jobs.task), jobs.seeds, jobs.grace, jobs.search, jobs.workers))
        self._log = jobs.task.folder / _LOG
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended = len(_in_state(study, "COMPLETE")) + len(_in_state(study, "PRUNED"))

    def run(self) -> None:
        """Start the processes, start others for those that end before their time, and return when all is done."""
        try:
            while waiting := len(_in_state(self.study, "WAITING")):
                for _ in range(min(self.jobs.workers - len(self._processes), waiting)):
                    self._processes.append(self._start())
                self._wait()
            while self._processes:
                self._wait()
                if len(_in_state(self.study, "WAITING")):
                    return self.run()
        finally:
            self._stop()

    def _start(self) -> "subprocess.Popen[bytes]":
        code = _START.format(path=sys.path, folder=str(self.jobs.task.folder))
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.jobs.task.threads)}
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment,
                start_new_session=True,
            )  # fmt: skip
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which is seen in `_wait`
            process.stdin.write(len(self._packed).to_bytes(8, "little") + self._packed)
            process.stdin.flush()
        return process

    def _wait(self) -> None:
        """Wait until a process has ended, and see to its trial."""
        while all(process.poll() is None for process in self._processes):
            self._count()
            time.sleep(_POLL)
        self._count()
        for process in [process for process in self._processes if process.poll() is not None]:
            self._processes.remove(process)
            _close(process.stdin)
            if process.returncode != 0:
                self._see_to(process)

    def _count(self) -> None:
        """Advance the bar of the sweep."""
        ended = len(_in_state(self.study, "COMPLETE")) + len(_in_state(self.study, "PRUNED"))
        for _ in range(ended - self._ended):
            self.jobs.advance()
        self._ended = ended

    def _see_to(self, process: "subprocess.Popen[bytes]") -> None:
        """Let the trial of a process that was killed run again, or write that it failed."""
        import optuna

        own = [trial for trial in _in_state(self.study, "RUNNING") if trial.user_attrs.get("process") == process.pid]
        if not own:
            lines = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(
                f"a worker of the sweep ended before its first run, with exit status {process.returncode}: "
                f"{''.join(lines)}. See {str(self._log)!r}"
            )
        for trial in own:
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            retries = trial.user_attrs.get("retries", 0) + 1
            job = _job_of(trial, self.jobs)
            if retries <= self.jobs.retries:
                attributes = {**trial.user_attrs, "retries": retries, "process": None}
                self.study.enqueue_trial(trial.params, user_attrs=attributes)
            elif job is not None:
                message = f"its process ended {retries} times, with exit status {process.returncode}"
                self.jobs.end(job, "failed", message)

    def _stop(self) -> None:
        """End all processes; a run writes a checkpoint first."""
        for process in self._processes:
            process.terminate()
        until = time.monotonic() + _PATIENCE
        for process in self._processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _close(process.stdin)
        self._processes.clear()


def _close(stream: IO[bytes] | None) -> None:
    assert stream is not None
    with suppress(BrokenPipeError):
        stream.close()


def _job_of(trial: "optuna.trial.FrozenTrial", jobs: Jobs) -> Job | None:
    """The job of a trial, if its settings were chosen before its process ended."""
    if job := trial.user_attrs.get("job"):
        return Job(job["settings"], tuple(job["seeds"]))
    return Job(trial.params, jobs.seeds) if len(trial.params) == len(jobs.task.space) else None


def work(folder: str) -> None:
    """Take trials from the study until there are none: what a process of the sweep does."""
    import optuna

    stream = sys.stdin.buffer
    packed, seeds, grace, search, workers = pickle.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    task = unpack(packed)
    pruner = grace
    if grace is None:
        pruner = optuna.pruners.NopPruner()
    elif isinstance(grace, int):
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=grace, reduction_factor=_REDUCTION)
    with _quiet(optuna):
        study = _open(Path(folder), sampler=search, pruner=pruner)
        if search is not None and (workers > 1 or any(trial.state.is_finished() for trial in study.trials)):
            search.reseed_rng()  # or it proposes what another process has proposed, or an earlier call
        while (trial := _next(study, Path(folder))) is not None:
            _run(task, study, trial, seeds)


def _end_with_parent() -> None:
    """Wait for the end of the process that started this one, and end this one too: a run writes a checkpoint first."""
    os.read(sys.stdin.fileno(), 1)  # not by its buffer, whose lock Python needs when it ends
    os.kill(os.getpid(), signal.SIGTERM)


def _next(study: "optuna.Study", folder: Path) -> "optuna.Trial | None":
    """Take a trial that waits; one process at a time, since Optuna makes a new one if there is none."""
    while True:
        try:
            with locked(folder / ".next"):
                if not _in_state(study, "WAITING"):
                    return None
                trial = study.ask()
                trial.set_user_attr("process", os.getpid())
                return trial
        except BlockingIOError:
            time.sleep(_POLL)


def _run(task: Task, study: "optuna.Study", trial: "optuna.Trial", seeds: Sequence[int]) -> None:
    """Run one trial, and tell the study its result."""
    from optuna.trial import TrialState

    job = trial.user_attrs.get("job", {"seeds": seeds})
    settings = _suggest(trial, task.space)

    def report(epoch: int, elbo: float) -> bool:
        trial.report(elbo, epoch)
        return trial.should_prune()

    runs = run_settings(task, settings, job["seeds"], report)
    statuses = {run.status for run in runs}
    if statuses == {"complete"}:
        study.tell(trial, sum(run.elbo for run in runs) / len(runs))
    else:
        study.tell(trial, state=TrialState.FAIL if "failed" in statuses else TrialState.PRUNED)


def _suggest(trial: "optuna.Trial", space: Space) -> Settings:
    found: Settings = {}
    for name, values in space.items():
        if not isinstance(values, Range):
            found[name] = trial.suggest_categorical(name, list(values))
        elif values.integer:
            found[name] = trial.suggest_int(name, int(values.low), int(values.high), log=values.log)
        else:
            found[name] = trial.suggest_float(name, values.low, values.high, log=values.log)
    return plain_settings(found)


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
