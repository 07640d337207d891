"""Run a sweep on Ray Tune: its actors, its scheduler, its searchers, and its restart of what was killed."""

import builtins
import logging
import os
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyro_vae.sweeps.jobs import Job, Jobs, optional_module, pack, unpack
from pyro_vae.sweeps.run import run_settings
from pyro_vae.sweeps.space import Range, plain_settings

__all__ = ["run"]

_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of the user stay relative to the folder of the script
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a run that fails at once has no ELBO
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "300",  # on a machine that is busy
    "RAY_AIR_NEW_OUTPUT": "0",
}
_MAX_FACTOR = 4  # of successive halving: a quarter goes on


def run(jobs: Jobs) -> None:
    """Run all jobs that have not ended; resume the experiment of an earlier call that was killed."""
    folder = jobs.task.folder / "ray"
    with _environment(), _handlers_kept(), _cluster(jobs):
        trainable = _trainable(jobs)
        last = _experiments(folder)[-1:]
        for path in last:
            if not (path / "ended").exists():
                _restore(jobs, path, trainable)
        if left := jobs.left():
            configs = [{"settings": job.settings, "seeds": list(job.seeds)} for job in left]
            from ray import tune

            _fit(jobs, folder, trainable, {"job": tune.grid_search(configs)})
        if unknown := jobs.unknown():
            parameters = {name: _domain(values) for name, values in jobs.task.space.items()}
            _fit(jobs, folder, trainable, parameters, unknown, jobs.search)


def _trial(config: Mapping[str, Any], packed: bytes, seeds: tuple[int, ...], reports: bool) -> None:
    """Run one job in a process of Ray, or what a searcher has proposed."""
    from ray import tune

    job = config.get("job") or {"settings": plain_settings(config), "seeds": seeds}

    def report(epoch: int, elbo: float) -> bool:
        if reports:
            tune.report({"epoch": epoch, "validation_elbo": elbo})
        return False  # Ray ends the thread of a run that is stopped

    runs = run_settings(unpack(packed), job["settings"], job["seeds"], report)
    if all(run.status == "complete" for run in runs):
        elbo = sum(run.elbo for run in runs) / len(runs)
        tune.report({"epoch": sum(run.epochs for run in runs), "validation_elbo": elbo})


def _trainable(jobs: Jobs) -> Any:
    """The function of a trial; the task, with the data, is put into Ray's store once."""
    from ray import tune

    reports = jobs.grace is not None
    trial = tune.with_parameters(_trial, packed=pack(jobs.task), seeds=jobs.seeds, reports=reports)
    return tune.with_resources(trial, {"cpu": jobs.task.threads, **jobs.resources})


def _domain(values: Any) -> Any:
    from ray import tune

    if not isinstance(values, Range):
        return tune.choice(list(values))
    if values.integer:
        draw = tune.lograndint if values.log else tune.randint
        return draw(int(values.low), int(values.high) + 1)
    return (tune.loguniform if values.log else tune.uniform)(values.low, values.high)


def _fit(jobs: Jobs, folder: Path, trainable: Any, parameters: Any, num_samples: int = 1, search: Any = None) -> None:
    """Run a new experiment."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    scheduler = jobs.grace
    if isinstance(scheduler, int):
        scheduler = ASHAScheduler("epoch", max_t=10**9, grace_period=scheduler, reduction_factor=_MAX_FACTOR)
    path = folder / str(len(_experiments(folder)))
    tuner = tune.Tuner(
        trainable,
        param_space=parameters,
        tune_config=tune.TuneConfig(
            metric="validation_elbo",
            mode="max",
            scheduler=scheduler,
            search_alg=search,
            num_samples=num_samples,
            max_concurrent_trials=jobs.workers,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=path.name,
            storage_path=str(folder.resolve()),
            failure_config=tune.FailureConfig(max_failures=jobs.retries),
            callbacks=[_progress()],
            verbose=0,
        ),
    )
    _finish(jobs, path, tuner)


def _restore(jobs: Jobs, path: Path, trainable: Any) -> None:
    """Resume an experiment."""
    from ray import tune

    if tune.Tuner.can_restore(str(path.resolve())):
        _finish(jobs, path, tune.Tuner.restore(str(path.resolve()), trainable, resume_unfinished=True))


_advance: list[Any] = []


def _progress() -> Any:
    from ray import tune

    class Progress(tune.Callback):
        """Advance the bar of the sweep, which no experiment that is restored could have stored."""

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            for advance in _advance:
                advance()

    return Progress()


def _finish(jobs: Jobs, path: Path, tuner: Any) -> None:
    """Run an experiment to its end, and write how those runs ended that could not do so themselves."""
    with _handlers_kept():
        before = signal.getsignal(signal.SIGINT)
        results = tuner.fit()
        # Ray leaves a handler of its own, or puts back the one before when Ctrl-C is pressed.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is before:
            raise KeyboardInterrupt
    for result in results:
        config = result.config or {}
        job = Job(*config["job"].values()) if "job" in config else Job(plain_settings(config), jobs.seeds)
        if result.error is None:
            jobs.end(job, "stopped")  # by the scheduler, if it has not ended by itself
        else:
            message = f"its process ended {jobs.retries + 1} times: {str(result.error).strip().splitlines()[-1]}"
            jobs.end(job, "failed", message)
    (path / "ended").touch()


def _experiments(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("*") if path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


@contextmanager
def _cluster(jobs: Jobs) -> Iterator[None]:
    """Use the cluster that the user has connected to, or start one on this machine and shut it down afterwards."""
    ray = optional_module("ray", "sweep")
    optional_module("ray.tune", "sweep")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray, about itself
        _advance.append(jobs.advance)
        try:
            if ray.is_initialized():
                yield
                return
            temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
            try:
                ray.init(
                    num_cpus=jobs.workers * jobs.task.threads,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=temporary,
                )
                yield
            finally:
                ray.shutdown()
                shutil.rmtree(temporary, ignore_errors=True)
        finally:
            _advance.remove(jobs.advance)


@contextmanager
def _environment() -> Iterator[None]:
    """Set variables of Ray that are not set, and restore all variables and levels of loggers afterwards."""
    before = dict(os.environ)
    levels = {name: logging.getLogger(name).level for name in ("ray", "ray.tune")}
    handlers, printing = list(logging.getLogger("ray").handlers), builtins.print  # which Ray's bars replace
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in before})
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        logging.getLogger("ray").handlers[:] = handlers
        builtins.print = printing


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Restore the handlers of signals that Ray replaces."""
    is_main = threading.current_thread() is threading.main_thread()  # which alone may set them
    names = ("SIGINT", "SIGTERM", "SIGUSR1") if is_main else ()
    before = {name: signal.getsignal(getattr(signal, name)) for name in names if hasattr(signal, name)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
