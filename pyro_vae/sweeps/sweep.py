"""Train a model with many settings and seeds, on an engine that runs them side by side, and compare them."""

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_vae._utils.data import DataTensors, rows_like
from pyro_vae._utils.display import count_of
from pyro_vae._utils.files import locked, replacing
from pyro_vae._utils.processes import default_processes
from pyro_vae._utils.progress import check_progress, progress_bar
from pyro_vae._utils.ranks import ranks
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.typing import Data
from pyro_vae._utils.validation import describe, file_path, is_integer, mapping, positive, positive_int, seed_number
from pyro_vae._utils.warn import warn_user
from pyro_vae.arguments import Arguments, bind
from pyro_vae.sweeps.jobs import Job, Jobs, described, run_here
from pyro_vae.sweeps.result import COLUMNS, Sweep
from pyro_vae.sweeps.run import Task, check_options
from pyro_vae.sweeps.space import Settings, Space, settings_text
from pyro_vae.training.state import data_fingerprint
from pyro_vae.training.streams import as_source

__all__ = ["sweep"]

_ENGINES = {"ray": "pyro_vae.sweeps.ray_engine", "optuna": "pyro_vae.sweeps.optuna_engine"}
_MAKE = "a function of the settings that returns what to fit, as `def make(latent, lr): ...`"


def sweep(
    make: Callable[..., Any],
    space: Mapping[str, Any],
    data: Data = (),
    *,
    validation: Data,
    folder: str | os.PathLike[str],
    num_settings: int | None = None,
    seeds: int | Sequence[int] = 1,
    engine: str | None = "ray",
    workers: int | None = None,
    early_stopping: Any = None,
    search: Any = None,
    num_samples: int = 100,
    retries: int = 3,
    every_seconds: float = 30.0,
    threads: int = 1,
    resources: Mapping[str, float] | None = None,
    seed: int = 0,
    progress: bool | None = None,
    **options: Any,
) -> Sweep:
    r"""Fit a model with many settings and seeds, in several processes, and compare their held-out ELBO.

    A run is :func:`pyro_vae.fit` with some settings and a seed. It has a folder of its own with its checkpoints: a run
    whose process is killed is started again and resumes. A sweep that is killed resumes when it is called again with
    the same arguments, and its finished runs are not repeated; those that failed are. What a run computes depends on
    its settings and its seed alone, so that the result is the same.

    The ELBO at the end is that of :math:`K` draws for each held-out datum, whatever objective was trained, so that
    objectives can be compared. See :class:`pyro_vae.sweeps.Sweep` for the table and its standard errors.

    Args:
        make: function of the settings by name, called in each run. It returns a VAE or ``(model, guide)``, or with
            keyword arguments of ``fit`` at the end ``(vae, {"lr": lr})``. Random numbers in it, such as the initial
            weights, follow from the seed. It is called once here, to check the data, and then in other processes. It
            may be defined in a script or a notebook.
        space: for each setting a list of values, a mapping from labels to values, or a range: :func:`uniform
            <pyro_vae.sweeps.uniform>`, :func:`log_uniform <pyro_vae.sweeps.log_uniform>` or :func:`integers
            <pyro_vae.sweeps.integers>` of ``pv.sweeps``. Functions and classes in a list are labelled by their name.
        data: as for ``fit``; sent to each process once.
        validation: held-out data, of the same form.
        folder: of the sweep, made if it does not exist; on a cluster, one that all machines share.
        num_settings: number of settings, drawn at random, none of them twice. By default all combinations of values.
        seeds: seeds of each settings, or their number.
        engine: ``"ray"``, Ray Tune, on this machine or on the cluster of ``ray.init``; ``"optuna"``, processes on this
            machine; or ``None``, one run after the other in this process, to find errors in ``make``.
        workers: number of runs at the same time; by default one for each processor.
        early_stopping: number of epochs after which a run is stopped if its ELBO on the held-out data is not in the
            best quarter of those that came as far, and again after 4, 16, ... times as many (asynchronous successive
            halving). Or a scheduler of Ray with ``time_attr="epoch"``, or a pruner of Optuna. All seeds of settings are
            then run one after the other, and their epochs counted together. Which runs are stopped depends on their
            order in time. By default none is stopped.
        search: a searcher of Ray, such as ``OptunaSearch()``, or a sampler of Optuna, such as ``TPESampler(seed=0)``,
            which proposes settings by the results so far. By default they are drawn before the first run.
        num_samples: K, draws of the latents for each held-out datum at the end of a run.
        retries: how often a run is started again whose process ended.
        every_seconds: seconds between two checkpoints of a run.
        threads: of each run.
        resources: of each run on Ray, such as ``{"gpu": 1}``.
        seed: of the settings that are drawn.
        progress: whether to show a progress bar; by default only on a terminal or in a notebook.
        options: keyword arguments of ``fit`` for each run, such as ``epochs``; those from ``make`` come first.

    Ctrl-C ends the sweep with ``KeyboardInterrupt``; a later call resumes it.

    Raises:
        ImportError: if the engine is not installed, with the extra that installs it.
        TypeError, ValueError: for unusable arguments, or a folder of a sweep with other arguments.
        BlockingIOError: if another process runs a sweep in the folder.
        RuntimeError: if all runs fail, with the first error; on several ranks of ``torchrun``.

    Source: Li et al. 2020, "A system for massively parallel hyperparameter tuning", on successive halving.

    >>> import tempfile
    >>> import pyro_vae as pv
    >>> from pyro_vae import guides, likelihoods, networks, priors
    >>> def make(latent, lr):
    ...     net = networks.mlp([8])
    ...     encoder, decoder = guides.DiagonalNormal(2, latent, net), likelihoods.Normal(latent, 2, net)
    ...     return pv.VAE(priors.StandardNormal(latent), encoder, decoder), {"lr": lr}
    >>> space = {"latent": [1, 2], "lr": pv.sweeps.log_uniform(1e-3, 1e-1)}
    >>> x = pv.datasets.two_gaussians(200, seed=0).x
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     options = {"folder": folder, "num_settings": 3, "seeds": 2, "epochs": 5}
    ...     result = pv.sweep(make, space, x[:100], validation=x[100:], engine=None, **options)
    >>> result.table.shape, result.best.keys()
    ((3, 12), dict_keys(['latent', 'lr']))
    """
    if (size := ranks().size) > 1:
        must = "called in one process, as it starts others itself"
        raise RuntimeError(f"`sweep` must be {must}, got a call on {size} ranks: start the script without torchrun")
    checked = Space(space)
    _check_make(make, checked)
    _check_engine(engine, early_stopping=early_stopping, search=search)
    options, seeds, grace = check_options(options, "options"), _checked_seeds(seeds), _checked_stopping(early_stopping)
    resources = dict(mapping(resources, "resources", '{"gpu": 1}'))
    for name, amount in resources.items():
        positive(amount, f"resources[{name!r}]")
    if not is_integer(retries) or retries < 0:
        raise ValueError(f"`retries` must be 0 or a positive integer, got {retries!r}")
    if search is not None and num_settings is None:
        raise ValueError("`num_settings` must be given with `search`, got None")
    check_progress(progress)
    workers = default_processes() if workers is None else positive_int(workers, "workers")
    task = Task(
        make, checked, data, validation, options, positive_int(num_samples, "num_samples"),
        positive(every_seconds, "every_seconds"), _checked_folder(folder), threads=positive_int(threads, "threads"),
        needs_elbo=grace is not None or search is not None,
    )  # fmt: skip
    seed_number(seed)
    drawn = None if search is not None else checked.draw(num_settings, seed)
    count = positive_int(num_settings, "num_settings") if drawn is None else len(drawn)
    _check_data(task, checked.middle if drawn is None else drawn[0], seeds[0])
    by_seed = grace is None and drawn is not None  # else a process runs all seeds of settings, to stop or rate them
    groups = [(each,) for each in seeds] if by_seed else [seeds]
    listed = None if drawn is None else [Job(settings, group) for settings in drawn for group in groups]
    run = run_here if engine is None else import_module(_ENGINES[engine]).run
    task.folder.mkdir(parents=True, exist_ok=True)
    with _opened(task.folder, _config(task, engine, seed, search, early_stopping)) as task.attempt:
        with progress_bar("sweep", progress, total=count * len(groups), unit="run") as bar:
            jobs = Jobs(task, listed, seeds, count, workers, int(retries), grace, search, resources, bar.advance)
            left, unknown = jobs.left(), jobs.unknown()
            bar.advance_to(len(jobs.known()) - len(left))
            if left or unknown:
                run(jobs)
            bar.advance_to(bar.total)
            if missing := jobs.unknown():
                warn_user(
                    f"sweep: `search` proposed {count_of(missing, 'settings', 'settings')} that were there already, of "
                    f"{count}. One with another seed may propose others"
                )
        settings = drawn if drawn is not None else [job.settings for job in jobs.known()]
        return _compared(Sweep.of([[task.run(each, number) for number in seeds] for each in settings], seeds, task))


def _compared(result: Sweep) -> Sweep:
    """Return the result, unless there is nothing to compare."""
    if not (result.table["status"] == "failed").all():
        return result
    run = next(run for runs in result.runs for run in runs if run.status == "failed")
    count = len(result.runs)
    raise RuntimeError(
        f"{'the only' if count == 1 else f'all {count}'} settings of the sweep failed, the first, "
        f"{settings_text(run.settings)}, with seed {run.seed}: {run.message}. See {str(run.folder / 'error.txt')!r}"
    )


def _check_make(make: Any, space: Space) -> None:
    if not callable(make) or isinstance(make, torch.nn.Module):
        raise TypeError(f"`make` must be {_MAKE}, got {describe(make)}")
    try:
        inspect.signature(make).bind(**dict.fromkeys(space))
    except TypeError as error:
        got = f"one that does not take {', '.join(space)}: {error}"
        raise TypeError(f"`make` must be {_MAKE}, got {got}") from error
    if wrong := [name for name in space if name in COLUMNS]:
        raise ValueError(f"`space` must have other names than columns of the table, got {wrong[0]!r}")


def _check_data(task: Task, settings: Settings, seed: int) -> None:
    """Raise for data that ``fit`` cannot take, before any process starts; an error of ``make`` is one of its run."""
    with seeded(seed), pyro.get_param_store().scope():
        try:
            model, guide, options = task.make_pair(settings, seed)
        except Exception:
            return
        keeps, sources = options.get("transform") is not None, []
        for name, data in (("data", task.data), ("validation", task.validation)):
            program = bind(model, guide, data, options.get("plate", "data"), name, keeps)
            sources.append(as_source(program.data, name, program.model, keeps, options.get("batch_size"))[0])
        rows_like(sources[1], sources[0], "validation")


def _check_engine(engine: Any, **needing: Any) -> None:
    if engine is not None and not (isinstance(engine, str) and engine in _ENGINES):
        raise ValueError(f"`engine` must be 'ray', 'optuna' or None, got {engine!r}")
    if engine is None and (given := [name for name, value in needing.items() if value is not None]):
        raise ValueError(f"`engine` must be 'ray' or 'optuna' for `{given[0]}`, got None")


def _checked_seeds(seeds: Any) -> tuple[int, ...]:
    if is_integer(seeds):
        return tuple(range(positive_int(seeds, "seeds")))
    if isinstance(seeds, str) or not isinstance(seeds, Sequence | range) or not seeds:
        raise TypeError(f"`seeds` must be a number of seeds, or a list of them, got {seeds!r}")
    checked = tuple(seed_number(each, "seeds") for each in seeds)
    if len(set(checked)) < len(checked):
        raise ValueError(f"`seeds` must differ, got {list(checked)}")
    return checked


def _checked_stopping(early_stopping: Any) -> Any:
    if is_integer(early_stopping):
        return positive_int(early_stopping, "early_stopping")
    if isinstance(early_stopping, bool | float | str):
        must = "a number of epochs, a scheduler of Ray or a pruner of Optuna"
        raise TypeError(f"`early_stopping` must be {must}, got {early_stopping!r}")
    return early_stopping


def _checked_folder(folder: Any) -> Path:
    path = file_path(folder, "folder").absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"`folder` must be a folder, or a path to make one at, got the file {str(path)!r}")
    return path


def _config(task: Task, engine: str | None, seed: int, search: Any, early_stopping: Any) -> dict[str, Any]:
    """Return what must be equal for a sweep to resume, by name of the argument, as JSON has it."""
    config = {
        "space": task.space.description(),
        "data": _fingerprint(task.data),
        "validation": _fingerprint(task.validation),
        "engine": engine,
        "seed": seed,
        "num_samples": task.num_samples,
        "search": described(search),
        "early_stopping": described(early_stopping),
        "options": described(task.options),
    }
    return json.loads(json.dumps(config))


def _fingerprint(data: Any) -> list[str]:
    data = [data.args, data.kwargs] if isinstance(data, Arguments) else data
    found = []
    for leaf in tree_leaves(data):
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "iufb":
            leaf = torch.as_tensor(leaf)
        is_rows = isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.dim() and leaf.numel()
        found.append(data_fingerprint(DataTensors([leaf])) if is_rows else str(described(leaf)))
    return found


class _opened:
    """Lock the folder of a sweep, compare its arguments with those of earlier calls, and return the call's number."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        self._path, self._config, self._lock = folder / "sweep.json", config, locked(folder / ".lock")

    def __enter__(self) -> int:
        try:
            self._lock.__enter__()
        except BlockingIOError as error:
            raise BlockingIOError(
                f"`folder` must be a folder of its own for each sweep, got {str(self._path.parent)!r}, which "
                f"{error.strerror} uses: wait for its end, or give another folder"
            ) from None
        try:
            return self._number()
        except BaseException as error:
            self._lock.__exit__(type(error), error, error.__traceback__)
            raise

    def _number(self) -> int:
        stored = json.loads(self._path.read_text()) if self._path.exists() else {"calls": 0, **self._config}
        for name, value in self._config.items():
            if stored.get(name) != value:
                must = f"that of the sweep in `folder`, {stored.get(name)!r}"
                raise ValueError(f"`{name}` must be {must}, got {value!r}: give another folder for another sweep")
        stored["calls"] += 1
        with replacing(self._path) as partial:
            partial.write_text(json.dumps(stored, indent=1))
        return stored["calls"]

    def __exit__(self, *exception: Any) -> None:
        self._lock.__exit__(*exception)
