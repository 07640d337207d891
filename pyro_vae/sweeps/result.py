"""The result of a sweep: one table of all settings, compared in pairs with the best, and its export."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyro_vae._utils.display import Result, Table, count_of
from pyro_vae._utils.validation import is_integer
from pyro_vae.sweeps.run import Run, Task
from pyro_vae.sweeps.space import Settings, settings_text
from pyro_vae.training.fit import Fitted

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["COLUMNS", "Sweep", "paired_error"]

COLUMNS = (
    "elbo", "standard_error", "difference", "difference_error", "paired_by", "validation_elbo", "epochs", "seconds",
    "status", "message",
)  # fmt: skip
"""Columns of the table besides the settings, whose names must differ from these."""

_ORDER = ("complete", "stopped", "failed", "unfinished")


@dataclass(frozen=True, repr=False)
class Sweep(Result):
    r"""What :func:`pyro_vae.sweep` returns.

    Attributes:
        runs: for each settings, the best first, the :class:`pyro_vae.sweeps.run.Run` of each seed.
        seeds: the seeds.
        folder: the folder of the sweep.
        table: a row for each settings, the best first, with their names as columns, and

            * ``elbo``: the held-out ELBO in nats per datum, mean over seeds; NaN unless all seeds are complete;
            * ``standard_error``: of that mean over seeds, :math:`s / \sqrt K`, for these held-out data; NaN for one;
            * ``difference``: to the best, 0 or less;
            * ``difference_error``: its standard error, see :func:`paired_error`; NaN for the best;
            * ``paired_by``: what that is over: ``"row, seed"``, ``"row"`` if there is one seed, ``"seed"`` if
              there is no ELBO of each row, or ``""``;
            * ``validation_elbo``: the last one of the history, which also early stopped runs have, mean over seeds;
            * ``epochs``, ``seconds``: sums over seeds;
            * ``status``: ``"complete"``, ``"stopped"``, ``"failed"`` or ``"unfinished"``, the worst of the seeds, and
              ``message``, the first error.

    The best of many is chosen by the same data that its ELBO is of, which is too good by the choice: report the ELBO of
    the best one on other data.
    """

    runs: Sequence[Sequence[Run]]
    seeds: Sequence[int]
    folder: Path
    table: pd.DataFrame = field(compare=False)
    _task: Task = field(compare=False)

    @classmethod
    def of(cls, runs: Sequence[Sequence[Run]], seeds: Sequence[int], task: Task) -> "Sweep":
        """Sort the runs of each settings, and compare them."""
        ranked = sorted(runs, key=_rank)
        return cls(ranked, seeds, task.folder, _table(ranked), task)

    @property
    def best(self) -> Settings:
        """The settings with the highest held-out ELBO."""
        return self.runs[0][0].settings

    def load(self, settings: Settings | int = 0, seed: int | None = None) -> Fitted:
        """Return a run as :func:`pyro_vae.fit` did, with its model and guide, trained, from its last checkpoint.

        ``make`` is called again, and parameters are put into Pyro's store, as by ``fit``. A run that failed, or was not
        begun, is trained here.

        Args:
            settings: a row of the table, by its number, or settings by name.
            seed: one of the seeds; by default the first.
        """
        seed = self.seeds[0] if seed is None else seed
        found = [run for runs in self._of(settings) for run in runs if run.seed == seed]
        if not found:
            raise ValueError(f"`seed` must be one of {list(self.seeds)}, got {seed!r}")
        return self._task.fit(*self._task.make_pair(found[0].settings, seed), found[0])

    def _of(self, settings: Settings | int) -> Sequence[Sequence[Run]]:
        if is_integer(settings):
            if not -len(self.runs) <= settings < len(self.runs):
                raise ValueError(f"`settings` must be a row of the table, below {len(self.runs)}, got {settings}")
            return [self.runs[settings]]
        if not (found := [runs for runs in self.runs if runs[0].settings == settings]):
            raise ValueError(f"`settings` must be those of a row of the table, such as {self.best}, got {settings!r}")
        return found

    def to_datatree(self) -> "xr.DataTree":
        """Return everything as an ``xarray.DataTree``, which ``tree.to_netcdf("sweep.nc", engine="h5netcdf")`` saves.

        The groups: ``settings``, the table, along ``setting``, the best first; ``runs``, the ``elbo``, ``epochs``,
        ``seconds`` and ``status`` of each seed; ``rows``, the ELBO of each row of the held-out data, along ``obs``;
        ``training``, the histories, along ``epoch``, NaN after the end of a run.
        """
        import xarray as xr

        names = np.arange(len(self.runs))
        coords = {"setting": names, "text": ("setting", [settings_text(runs[0].settings) for runs in self.runs])}
        both = {**coords, "seed": np.asarray(self.seeds)}
        columns = {name: ("setting", _storable(self.table[name].tolist())) for name in self.table.columns}
        groups = {"settings": xr.Dataset(columns, coords), "runs": xr.Dataset(self._each(), both)}
        if (rows := self._stack(lambda run: run.rows)) is not None:
            groups["rows"] = xr.Dataset(
                {"elbo": (("setting", "seed", "obs"), rows)}, {**both, "obs": np.arange(rows.shape[-1])}
            )
        histories = {id(run): run.history for runs in self.runs for run in runs}
        terms = dict.fromkeys(name for history in histories.values() for name in history)
        curves = {name: self._stack(lambda run, name=name: histories[id(run)].get(name)) for name in terms}
        if curves:
            length = max(curve.shape[-1] for curve in curves.values() if curve is not None)
            padded = {
                name: (("setting", "seed", "epoch"), np.pad(
                    curve, ((0, 0), (0, 0), (0, length - curve.shape[-1])), constant_values=np.nan
                ))
                for name, curve in curves.items() if curve is not None
            }  # fmt: skip
            groups["training"] = xr.Dataset(padded, {**both, "epoch": np.arange(1, length + 1)})
        tree = xr.DataTree.from_dict(groups)
        tree.attrs = {"inference_library": "pyro_vae", "folder": str(self.folder)}
        return tree

    def _each(self) -> dict[str, Any]:
        return {
            name: (("setting", "seed"), _storable2([[getattr(run, name) for run in runs] for runs in self.runs]))
            for name in ("elbo", "epochs", "seconds", "status", "message")
        }

    def _stack(self, values: Any) -> np.ndarray | None:
        """Stack values of each run, NaN where there are none or fewer, ``(settings, seeds, most)``."""
        found = [[values(run) for run in runs] for runs in self.runs]
        lengths = [len(value) for each in found for value in each if value is not None]
        if not lengths:
            return None
        stacked = np.full((len(found), len(self.seeds), max(lengths)), np.nan)
        for i, each in enumerate(found):
            for j, value in enumerate(each):
                if value is not None:
                    stacked[i, j, : len(value)] = value
        return stacked

    def _counts(self) -> str:
        statuses = [run.status for runs in self.runs for run in runs]
        others = [f"{statuses.count(name)} {name}" for name in _ORDER[1:] if name in statuses]
        return f"{count_of(len(statuses), 'run')}" + (f", of which {', '.join(others)}" if others else "")

    def _line(self) -> str:
        first = self.table.iloc[0]
        error = f" ± {first['standard_error']:.3f}" if math.isfinite(first["standard_error"]) else ""
        return (
            f"best held-out ELBO {first['elbo']:.3f}{error} nats per datum with {settings_text(self.best)}; "
            f"{count_of(len(self.runs), 'settings', 'settings')}, {self._counts()}"
        )

    def _table(self) -> Table:
        rows = []
        for _, row in self.table.iterrows():
            numbers = (_shown(row["elbo"], row["standard_error"]), _shown(row["difference"], row["difference_error"]))
            if row["status"] != "complete":
                numbers = (row["status"], row["message"] or f"validation {row['validation_elbo']:.3f}")
            settings = [f"{row[name]:.4g}" if isinstance(row[name], float) else row[name] for name in self.best]
            rows.append((*settings, *numbers))
        paired = next(iter(self.table["paired_by"].loc[lambda column: column != ""]), "")
        note = f"Held-out ELBO in nats per datum, ± its standard error over seeds; {self._counts()}."
        note += f" Differences are paired by {paired.replace(', ', ' and ')}." if paired else ""
        return Table((*self.best, "ELBO", "difference to the best"), rows, note)


def paired_error(differences: np.ndarray) -> float:
    r"""Standard error of the mean difference of two settings, for new held-out data and new seeds.

    The differences :math:`d_{ki}` are of seed k and row i. With the mean squares of a two-way layout with random
    effects of seeds and rows it is

    .. math:: \sqrt{(\mathrm{MS}_\text{seeds} + \mathrm{MS}_\text{rows} - \mathrm{MS}_\text{rest}) / KN},

    and at least that of the seeds or of the rows alone. For one seed it is over rows, :math:`s / \sqrt N`, and for one
    column, of means over rows, over seeds, :math:`s / \sqrt K`.

    Args:
        differences: ``(K, N)``, or ``(K, 1)``.

    Source: Searle, Casella and McCulloch 1992, "Variance components", chapter 4.

    >>> float(paired_error(np.array([[1.0, 3.0]]))), float(paired_error(np.array([[1.0], [3.0]])))
    (1.0, 1.0)
    """
    seeds, rows = differences.shape
    of_seeds = differences.mean(1).var(ddof=1) / seeds if seeds > 1 else 0.0
    of_rows = differences.mean(0).var(ddof=1) / rows if rows > 1 else 0.0
    if seeds == 1 and rows == 1:
        return math.nan
    if seeds == 1 or rows == 1:
        return math.sqrt(of_seeds + of_rows)
    rest = differences - differences.mean(0) - differences.mean(1, keepdims=True) + differences.mean()
    noise = np.square(rest).sum() / ((seeds - 1) * (rows - 1) * seeds * rows)
    return math.sqrt(max(of_seeds, of_rows, of_seeds + of_rows - noise))


def _rank(runs: Sequence[Run]) -> tuple[int, float]:
    status = _status(runs)
    value = _mean([run.elbo for run in runs]) if status == "complete" else _last(runs)
    return _ORDER.index(status), math.inf if math.isnan(value) else -value


def _status(runs: Sequence[Run]) -> str:
    """The worst status of the seeds: later ones are not begun after a run that stopped or failed."""
    found = {run.status for run in runs}
    ranked = ("failed", "stopped", "unfinished", "complete")
    return next(status for status in ranked if status in found)


def _last(runs: Sequence[Run]) -> float:
    """The last held-out ELBO of the histories, mean over the seeds that have one."""
    histories = (run.history.get("validation_elbo", []) for run in runs)
    return _mean([history[-1] for history in histories if history])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _table(ranked: Sequence[Sequence[Run]]) -> pd.DataFrame:
    best = ranked[0] if _status(ranked[0]) == "complete" else None
    best_rows = None if best is None else [run.rows for run in best]
    rows = []
    for runs in ranked:
        status = _status(runs)
        row = dict.fromkeys(("elbo", "standard_error", "difference", "difference_error"), math.nan)
        paired_by = ""
        if status == "complete" and best is not None and best_rows is not None:
            elbos = np.array([run.elbo for run in runs])
            row["elbo"] = float(elbos.mean())
            row["standard_error"] = float(elbos.std(ddof=1) / len(elbos) ** 0.5) if len(elbos) > 1 else math.nan
            row["difference"] = row["elbo"] - _mean([run.elbo for run in best])
            if runs is not best:
                differences, paired_by = _differences(runs, best, best_rows)
                row["difference_error"] = paired_error(differences)
        others = {
            "paired_by": paired_by,
            "validation_elbo": _last(runs),
            "epochs": sum(run.epochs for run in runs),
            "seconds": sum(run.seconds for run in runs),
            "status": status,
            "message": next((run.message for run in runs if run.message), ""),
        }
        rows.append({**runs[0].settings, **row, **others})
    return pd.DataFrame(rows, columns=[*ranked[0][0].settings, *COLUMNS])


def _differences(
    runs: Sequence[Run], best: Sequence[Run], best_rows: Sequence[np.ndarray | None]
) -> tuple[np.ndarray, str]:
    """The differences to the best, for each seed and row where both have them, and what they are paired by."""
    own_rows = [run.rows for run in runs]
    if any(row is None for row in (*own_rows, *best_rows)):
        differences = np.array([[run.elbo - other.elbo] for run, other in zip(runs, best, strict=True)])
        return differences, "seed" if len(runs) > 1 else ""
    return np.stack(own_rows) - np.stack(best_rows), "row, seed" if len(runs) > 1 else "row"  # type: ignore[arg-type]


def _shown(value: float, error: float) -> str:
    return f"{value:.3f}" + (f" ± {error:.3f}" if math.isfinite(error) else "")


def _storable(values: list[Any]) -> np.ndarray:
    """Return values as an array that netCDF can store: numbers of one kind, or text."""
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return np.array(values) if is_number else np.array([str(value) for value in values])


def _storable2(values: list[list[Any]]) -> np.ndarray:
    return np.stack([_storable(each) for each in values])
