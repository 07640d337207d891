"""One column of a table: from the values of a frame to the numbers of a model, and back.

Each column is encoded by a transformer of scikit-learn. A column keeps what this transformer has learned as plain
numbers and texts, so that a model file can hold it without scikit-learn's own objects.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from pyro_vae.parts import families
from pyro_vae.parts.families.base import Family
from pyro_vae.tables.frames import native_column, plain
from pyro_vae.tables.kinds import CLASSES, COUNTS, UnreadableColumn, is_classes, numbers_of, plain_number, time_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Classes", "Column", "Counts", "Reals", "make_column"]

_PRECISION = float(np.finfo(np.float32).eps)
_STEPS = (86_400, 3_600, 60, 1)  # seconds
_FLOOR = 0.5  # of a number of rows, for the logarithms of shares and means that are zero


class Column(nn.Module):
    """A column of a table.

    Attributes:
        label: the name of the column in the frame.
        kind: one of :data:`pyro_vae.tables.KINDS`.
        storage: how the frame stores the column, :func:`pyro_vae.tables.frames.storage_of`.
        missing: the share of missing entries in the frame that the table was made from.
        levels: the values of the classes, in the order of their numbers.
        loc, scale: the encoded number is (value - loc) / scale, for real numbers.
        log_scale: the logarithm of the change of scale: log p(value) is log p(encoded number) minus it.
        feature: what an encoder reads: the name of a transformation, and the location and scale of its result.
    """

    levels: list[Any] = []
    loc, scale, log_scale = 0.0, 1.0, 0.0
    feature: tuple[str, float, float] | None = None

    def __init__(self, column: "pd.Series", kind: str, storage: Mapping[str, Any]):
        super().__init__()
        self.label, self.kind, self.storage = plain(column.name), kind, dict(storage)
        self.missing = float(column.isna().mean())

    @property
    def name(self) -> str:
        """The name of the column as text."""
        return str(self.label)

    def encode(self, column: "pd.Series", unseen: str = "raise") -> np.ndarray:
        """Return the numbers ``(N,)`` of a column, NaN for missing entries."""
        raise NotImplementedError

    def values(self, numbers: np.ndarray) -> "pd.Series":
        """Return the values that numbers stand for: times, texts, or numbers in the units of the frame."""
        raise NotImplementedError

    def decode(self, numbers: np.ndarray) -> Any:
        """Return a column of the frame's library and dtype."""
        return native_column(self.name, self.values(numbers), self.storage)

    def in_units(self, numbers: np.ndarray) -> np.ndarray:
        """Return numbers in the units of the frame, for arrays; class numbers stay if their levels are no numbers."""
        return numbers

    def family(self) -> Family:
        """The family of the column's distribution."""
        raise NotImplementedError

    def start(self) -> list[float]:
        """Raw outputs of the family at which its distribution is near that of the column alone."""
        return self.family().start().tolist()

    @property
    def has_log_mean(self) -> bool:
        """Whether the first raw output is the logarithm of a mean, to which an offset is added."""
        return self.kind in COUNTS

    def describe(self) -> str:
        """Return levels or scale in words."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.label!r}, {self.kind}"


class Reals(Column):
    """Real numbers, standardised; log-normal ones divided by their geometric mean. Dates are numbers of days."""

    def __init__(self, column: "pd.Series", kind: str, storage: Mapping[str, Any]):
        super().__init__(column, kind, storage)
        numbers = numbers_of(column)
        present = numbers[~np.isnan(numbers)]
        self.is_time = time_of(column)
        seconds = np.round(present * _STEPS[0])
        self.step = next(step for step in _STEPS if step == 1 or (seconds % step == 0).all())
        if kind == "log_normal":
            if (present <= 0).any():
                raise UnreadableColumn(
                    f"has {plain_number(present.min())!r}, which is not positive, as log_normal needs: state 'normal', "
                    "or for counts with zeros 'zero_inflated_negative_binomial'"
                )
            logs = np.log(present)
            self.loc, self.scale = 0.0, float(np.exp(logs.mean()))
            self.feature = ("log", 0.0, float(logs.std()) or 1.0)
        else:
            fitted = self._fit(present[:, None])
            self.loc, self.scale = (float(getattr(fitted, name)[0]) for name in self._learned())
            inner = (present - self.loc) / self.scale
            self.feature = ("identity", 0.0, max(1.0, float(inner.std())))
        self.log_scale = float(np.log(self.scale))

    def _learned(self) -> tuple[str, str]:
        return ("center_", "scale_") if self.kind == "student_t" else ("mean_", "scale_")

    def _transformer(self) -> Any:
        """The transformer of scikit-learn, before it has learned anything."""
        from sklearn.preprocessing import RobustScaler, StandardScaler

        if self.kind == "student_t":  # outliers would set the scale
            return RobustScaler(unit_variance=True)
        return StandardScaler(with_mean=self.kind != "log_normal")

    def _fit(self, values: np.ndarray) -> Any:
        fitted = self._transformer().fit(values)
        if self.kind == "student_t" and len(values) > 1 and fitted.scale_[0] == 1.0:  # as for a range of zero
            fitted.scale_ = np.array([values.std() or 1.0])
        return fitted

    def _fitted(self) -> Any:
        """The transformer with what it has learned."""
        transformer = self._transformer()
        for name, value in zip(self._learned(), (self.loc, self.scale), strict=True):
            setattr(transformer, name, np.array([value]))
        transformer.n_features_in_ = 1
        return transformer

    def encode(self, column: "pd.Series", unseen: str = "raise") -> np.ndarray:
        values = numbers_of(column)
        if self.kind == "log_normal" and (values <= 0).any():
            least = plain_number(float(np.nanmin(values)))
            raise UnreadableColumn(f"must be positive, as it is modelled as log_normal, got {least!r}")
        return self._fitted().transform(values[:, None])[:, 0]

    def in_units(self, numbers: np.ndarray) -> np.ndarray:
        flat = np.asarray(numbers, dtype=float).reshape(-1, 1)
        values = self._fitted().inverse_transform(flat).reshape(numbers.shape)
        least = 0.0 if self.kind == "log_normal" else 1.0
        error = _PRECISION * self.scale * np.maximum(np.abs(numbers), least)
        # Without the digits that single precision does not have: 3750 and not 3750.000023.
        per_step = 10.0 ** -np.ceil(np.log10(np.where(error > 0, error, 1.0)))
        return np.where(per_step >= 1, np.round(values * per_step) / per_step, values) + 0.0  # 0 and not -0

    def values(self, numbers: np.ndarray) -> "pd.Series":
        import pandas as pd

        values = self.in_units(numbers)
        if not self.is_time:
            dtype = self.storage["dtype"]
            whole = dtype.lower().startswith(("int", "uint"))
            return pd.Series(values.round() if whole else values)
        seconds = np.round(values * _STEPS[0] / self.step) * self.step
        found = pd.to_timedelta(pd.Series(seconds), unit="s")
        if self.is_time == "duration":
            return found
        found = pd.Timestamp(0) + found
        return found.dt.tz_localize("UTC") if self._zone() else found

    def decode(self, numbers: np.ndarray) -> Any:
        values = self.values(numbers)
        if self.is_time == "date" and (zone := self._zone()):
            values = values.dt.tz_convert(zone)
        return native_column(self.name, values, self.storage)

    def _zone(self) -> str | None:
        """The time zone of dates."""
        _, comma, zone = self.storage["dtype"].rstrip("]").partition(", ")
        return zone if comma else self.storage.get("time_zone")

    def family(self) -> Family:
        kinds = {"normal": families.Normal, "student_t": families.StudentT, "log_normal": families.LogNormal}
        return kinds[self.kind](1, scale="shared")

    def start(self) -> list[float]:
        return [0.0]

    def describe(self) -> str:
        if self.kind == "log_normal":
            return f"geometric mean {self.scale:.4g}"
        if self.is_time == "date":
            import pandas as pd

            middle = (pd.Timestamp(0) + pd.Timedelta(days=self.loc)).date()
            return f"mean {middle}, sd {self.scale:.4g} days"
        unit = " days" if self.is_time else ""
        centre, spread = ("median", "robust sd") if self.kind == "student_t" else ("mean", "sd")
        return f"{centre} {self.loc:.4g}{unit}, {spread} {self.scale:.4g}{unit}"


class Counts(Column):
    """Counts 0, 1, 2, ..., as they are."""

    def __init__(self, column: "pd.Series", kind: str, storage: Mapping[str, Any]):
        super().__init__(column, kind, storage)
        numbers = self._checked(numbers_of(column))
        present = numbers[~np.isnan(numbers)]
        self.mean, self.zeros = float(present.mean()), float((present == 0).mean())
        logs = np.log1p(present)
        self.feature = ("log1p", float(logs.mean()), float(logs.std()) or 1.0)

    def _checked(self, numbers: np.ndarray) -> np.ndarray:
        wrong = numbers[(numbers < 0) | (numbers != np.round(numbers)) & ~np.isnan(numbers)]
        if len(wrong):
            raise UnreadableColumn(f"must hold counts 0, 1, 2, ..., as it is {self.kind}, got {wrong[0]:g}")
        return numbers

    def encode(self, column: "pd.Series", unseen: str = "raise") -> np.ndarray:
        from sklearn.preprocessing import FunctionTransformer

        return FunctionTransformer().fit_transform(self._checked(numbers_of(column))[:, None])[:, 0]

    def values(self, numbers: np.ndarray) -> "pd.Series":
        import pandas as pd

        return pd.Series(numbers.round())

    def family(self) -> Family:
        counts = families.Poisson(1) if self.kind.endswith("poisson") else families.NegativeBinomial(1)
        return families.ZeroInflated(counts) if self.kind.startswith("zero_inflated") else counts

    def start(self) -> list[float]:
        return [float(np.log(max(self.mean, 1e-3))), *self.family().start().tolist()[1:]]

    def describe(self) -> str:
        return f"mean {self.mean:.4g}, zeros {self.zeros:.0%}"


class Classes(Column):
    """Classes, as their numbers 0 to k - 1 in the order of the levels."""

    def __init__(self, column: "pd.Series", kind: str, storage: Mapping[str, Any]):
        super().__init__(column, kind, storage)
        self.levels = _levels(column)
        if others := [level for level in self.levels if not isinstance(level, str | int | float)]:
            kind_found = type(others[0]).__name__
            raise UnreadableColumn(
                f"has levels of the type {kind_found}, such as {others[0]!r}: make them texts, "
                f"`frame[{self.label!r}] = frame[{self.label!r}].cat.rename_categories(str)`"
            )
        if len(self.levels) < 2 or (kind == "bernoulli" and len(self.levels) != 2):
            need = "two levels" if kind == "bernoulli" else "two levels or more"
            raise UnreadableColumn(f"must have {need} to be {kind}, got {len(self.levels)}: {_listed(self.levels)}")
        if kind == "ordinal" and len(self.levels) > 2 and not _order_is_known(column):
            raise UnreadableColumn(
                f"has levels whose order is not known, {_listed(self.levels)}: write all of them from low to high, "
                f"{_in_order(self.label, self.levels, self.storage['library'])}"
            )
        numbers = self.encode(column)
        counts = np.array([(numbers == number).sum() for number in range(len(self.levels))])
        self.shares = [float(count) for count in np.maximum(counts, _FLOOR) / np.maximum(counts, _FLOOR).sum()]

    def encode(self, column: "pd.Series", unseen: str = "raise") -> np.ndarray:
        from sklearn.preprocessing import OrdinalEncoder

        values = _objects(column)
        encoder = OrdinalEncoder(
            categories=[np.array(self.levels, dtype=object)], handle_unknown="use_encoded_value", unknown_value=-1
        )
        encoder.fit(np.array(self.levels, dtype=object)[:, None])
        numbers = np.full(len(values), np.nan)
        present = ~column.isna().to_numpy(dtype=bool)
        if present.any():
            numbers[present] = encoder.transform(values[present][:, None])[:, 0]
        if (new := np.flatnonzero(numbers == -1)).size:
            if unseen != "missing":
                raise UnreadableColumn(
                    f"must have the levels {_listed(self.levels)}, got {values[new[0]]!r} in row "
                    f"{column.index[new[0]]!r}, which the table was not made with: correct it, or take such entries as "
                    "missing, `unseen='missing'`"
                )
            numbers[new] = np.nan
        return numbers

    def values(self, numbers: np.ndarray) -> "pd.Series":
        import pandas as pd

        present = ~np.isnan(numbers)
        found = np.full(len(numbers), None, dtype=object)
        found[present] = np.array(self.levels, dtype=object)[numbers[present].astype(int)]
        return pd.Series(found, dtype=object)

    @property
    def has_number_levels(self) -> bool:
        """Whether the levels are numbers, in whose units arrays are."""
        return all(isinstance(level, int | float) and not isinstance(level, bool) for level in self.levels)

    def in_units(self, numbers: np.ndarray) -> np.ndarray:
        if not self.has_number_levels:
            return numbers
        levels = np.array([*self.levels, np.nan], dtype=float)
        return levels[np.where(np.isnan(numbers), len(levels) - 1, numbers).astype(int)]

    def family(self) -> Family:
        if self.kind == "bernoulli":
            return families.Bernoulli(1)
        if self.kind == "categorical":
            return families.Categorical(1, len(self.levels))
        family = families.Ordinal(1, len(self.levels))
        below = torch.tensor(self.shares, dtype=torch.float64, device="cpu").cumsum(0)[:-1].logit()
        start = torch.cat([below[:1], below.diff().clamp(min=1e-3).log()])
        with torch.no_grad():
            family.raw_cuts.copy_(start)
        return family

    def start(self) -> list[float]:
        logs = [float(np.log(share)) for share in self.shares]
        if self.kind == "bernoulli":
            return [logs[1] - logs[0]]
        return logs if self.kind == "categorical" else [0.0]

    def describe(self) -> str:
        return _listed(self.levels, " < " if self.kind == "ordinal" else ", ")


def make_column(column: "pd.Series", kind: str, storage: Mapping[str, Any]) -> Column:
    """Make the column of a kind from the values in a frame."""
    if (time := time_of(column)) and kind not in ("normal", "student_t"):
        raise UnreadableColumn(f"has {time}s, which can be 'normal' or 'student_t', got {kind!r}")
    return (Classes if kind in CLASSES else Counts if kind in COUNTS else Reals)(column, kind, storage)


def _listed(levels: list[Any], separator: str = ", ") -> str:
    shown = [str(level) for level in levels]
    return separator.join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-2:]])


def _order_is_known(column: "pd.Series") -> bool:
    """Whether levels have an order: ordered categories and numbers. The order of the alphabet is none."""
    import pandas as pd

    if isinstance(column.dtype, pd.CategoricalDtype):
        return bool(column.dtype.ordered) or pd.api.types.is_numeric_dtype(column.cat.categories.dtype)
    return not is_classes(column)


def _in_order(label: Any, levels: list[Any], library: str) -> str:
    """The code that gives levels an order. It has all of them: a level that is left out would become missing."""
    if library == "polars":
        return f"`frame = frame.with_columns(pl.col({label!r}).cast(pl.Enum({levels!r})))`"
    return f"`frame[{label!r}] = pd.Categorical(frame[{label!r}], {levels!r}, ordered=True)`"


def _levels(column: "pd.Series") -> list[Any]:
    """The values of classes that occur: in the order of categories, or sorted."""
    import pandas as pd

    present = column.dropna()
    if isinstance(column.dtype, pd.CategoricalDtype):
        used = set(present.astype("object"))
        return [plain(level) for level in column.cat.categories if level in used]
    if not is_classes(column):
        return sorted({plain_number(value) for value in numbers_of(present)})
    return sorted({plain(value) for value in present.astype("object")})


def _objects(column: "pd.Series") -> np.ndarray:
    """The values of classes as an array of objects of Python."""
    if is_classes(column):
        return column.astype("object").map(plain).to_numpy(dtype=object)
    return np.array([None if np.isnan(value) else plain_number(value) for value in numbers_of(column)], dtype=object)
