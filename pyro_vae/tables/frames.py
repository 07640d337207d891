"""Frames of pandas and polars: their columns as pandas series, and columns of their own types back."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae._utils.validation import describe

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["as_pandas", "is_pandas", "native_column", "native_frame", "storage_of"]

_LARGEST_WHOLE = 2**62  # that a float and an integer of 64 bits both hold
_MUST = "a data frame of pandas or polars, such as `pd.read_csv(path)`"


def is_pandas(frame: Any) -> bool:
    """Whether ``frame`` is a frame of pandas."""
    import pandas as pd

    return isinstance(frame, pd.DataFrame)


def as_pandas(frame: Any, name: str = "frame", rows: int = 2) -> "pd.DataFrame":
    """Return a frame of pandas, of ``rows`` rows or more; of another library, converted by column through narwhals.

    >>> import polars as pl
    >>> as_pandas(pl.DataFrame({"a": [1, None], "b": ["x", "y"]})).dtypes.astype(str).tolist()
    ['Int64', 'str']
    """
    import pandas as pd

    if isinstance(frame, pd.DataFrame):
        if isinstance(frame.columns, pd.MultiIndex):
            hint = "Join the levels: `frame.columns = frame.columns.map('_'.join)`"
            raise ValueError(f"`{name}` must have columns with one name each, got several levels of names. {hint}")
        found = frame
    else:
        found = pd.DataFrame({column.name: _as_series(column) for column in _narwhals(frame, name).iter_columns()})
    if (twice := found.columns[found.columns.duplicated()]).size:
        hint = "Rename one of them, or leave it out"
        raise ValueError(f"`{name}` must have different names of columns, got {twice[0]!r} twice. {hint}")
    if len(found) < rows or not found.shape[1]:
        few = "a row" if rows == 1 else "two rows"
        raise ValueError(f"`{name}` must have {few} or more, and a column, got shape {tuple(found.shape)}")
    for label in found.columns:
        if not isinstance(label, str | int | np.integer) or label == "":
            raise TypeError(f"`{name}` must have names of columns that are text or whole numbers, got {label!r}")
    return found


def _narwhals(frame: Any, name: str) -> Any:
    if hasattr(type(frame), "collect"):
        raise TypeError(f"`{name}` must be {_MUST}, got {describe(frame)}. Collect it first: `frame.collect()`")
    if not hasattr(type(frame), "columns"):
        raise TypeError(f"`{name}` must be {_MUST}, got {describe(frame)}")
    try:
        import narwhals as nw
    except ImportError as error:
        hint = "pip install 'pyro-vae[frames]'"
        raise ImportError(f"a frame that is not of pandas needs narwhals: {hint}; got {describe(frame)}") from error
    try:
        return nw.from_native(frame, eager_only=True)
    except TypeError as error:
        raise TypeError(f"`{name}` must be {_MUST}, got {describe(frame)}") from error


def _as_series(column: Any) -> "pd.Series":
    """Convert a series of narwhals to one of pandas with a dtype of the same meaning."""
    import narwhals as nw
    import pandas as pd

    values, dtype = column.to_list(), column.dtype
    if isinstance(dtype, nw.Enum):
        return pd.Series(pd.Categorical(values, categories=list(dtype.categories), ordered=True))
    if dtype == nw.Categorical:
        return pd.Series(pd.Categorical(values))
    if dtype == nw.Boolean:
        return pd.Series(values, dtype="boolean")
    if dtype.is_integer():
        return pd.Series(values, dtype="Int64" if None in values else "int64")
    if dtype.is_float():
        return pd.Series(values, dtype="float64")
    if dtype in (nw.Date, nw.Datetime):
        return pd.Series(pd.to_datetime(pd.Series(values, dtype=object)))
    if dtype == nw.Duration:
        return pd.Series(pd.to_timedelta(pd.Series(values, dtype=object)))
    if dtype == nw.String:
        return pd.Series(values, dtype="str")
    return pd.Series(values, dtype=object)


def storage_of(frame: Any, label: Any) -> dict[str, Any]:
    """Describe how a frame stores a column, in strings, numbers and lists alone, so that a model file can hold it."""
    import pandas as pd

    if not is_pandas(frame):
        import narwhals as nw

        dtype: Any = nw.from_native(frame, eager_only=True)[label].dtype
        backend = nw.from_native(frame, eager_only=True).implementation.value
        found: dict[str, Any] = {"library": backend, "dtype": type(dtype).__name__}
        if isinstance(dtype, nw.Enum):
            found["categories"] = [str(category) for category in dtype.categories]
        return found | {key: getattr(dtype, key) for key in ("time_unit", "time_zone") if hasattr(dtype, key)}
    dtype = frame[label].dtype
    if isinstance(dtype, pd.CategoricalDtype):
        categories = [plain(category) for category in dtype.categories]
        return {"library": "pandas", "dtype": "category", "categories": categories, "ordered": bool(dtype.ordered)}
    if pd.api.types.is_object_dtype(dtype) and pd.api.types.infer_dtype(frame[label], skipna=True) == "date":
        return {"library": "pandas", "dtype": "date"}
    return {"library": "pandas", "dtype": str(dtype)}


def plain(value: Any) -> Any:
    """Return a number of NumPy as one of Python."""
    return value.item() if isinstance(value, np.generic) else value


def native_column(name: str, values: "pd.Series", storage: Mapping[str, Any]) -> Any:
    """Convert plain values (numbers, texts, booleans, times, missing ones) to a column as a frame stores it."""
    import pandas as pd

    dtype = storage["dtype"]
    if storage["library"] != "pandas":
        return _narwhals_column(name, values, storage)
    if dtype == "category":
        kind = pd.CategoricalDtype(storage["categories"], ordered=storage["ordered"])
        return pd.Series(pd.Categorical(values, dtype=kind), values.index)
    if dtype == "date":  # objects of Python
        return pd.to_datetime(values).dt.date
    holes = bool(values.isna().any())
    if holes and dtype.startswith(("int", "uint")):
        return values.astype("float64")
    if holes and dtype == "bool":
        return values.astype("object")
    if dtype.lower().startswith(("int", "uint")):
        limits = np.iinfo(dtype.lower().partition("[")[0])
        low, high = max(limits.min, -_LARGEST_WHOLE), min(limits.max, _LARGEST_WHOLE)
        return values.astype("float64").clip(low, high).round().astype(dtype)
    return values.astype(dtype)


def _narwhals_column(name: str, values: "pd.Series", storage: Mapping[str, Any]) -> Any:
    import narwhals as nw
    import pandas as pd

    kind = storage["dtype"]
    dtype: Any = getattr(nw, kind)
    if kind == "Enum":
        dtype = nw.Enum(storage["categories"])
    elif kind == "Datetime":
        dtype = nw.Datetime(storage["time_unit"], storage["time_zone"])
    elif kind == "Duration":
        dtype = nw.Duration(storage["time_unit"])
    whole = "Int" in kind

    def convert(value: Any) -> Any:
        if pd.isna(value):
            return None
        if isinstance(value, pd.Timestamp):
            return value.to_pydatetime().date() if kind == "Date" else value.to_pydatetime()
        if isinstance(value, pd.Timedelta):
            return value.to_pytimedelta()
        return round(value) if whole else plain(value)

    plain_values = [convert(value) for value in values]
    return nw.to_native(nw.new_series(name, plain_values, dtype, backend=storage["library"]))


def native_frame(columns: Mapping[Any, Any], library: Any) -> Any:
    """Make a frame of the library from its columns."""
    import pandas as pd

    if library == "pandas":
        return pd.DataFrame(dict(columns))
    import narwhals as nw

    return nw.to_native(nw.from_dict(dict(columns), backend=library))
