"""The kind of a column: which distribution its numbers have, inferred from the values of the column.

The rules, in this order:

- Ordered categories of pandas, and the enumerations of polars, are ``ordinal``; other categories, texts and booleans
  ``categorical``, or ``bernoulli`` with two levels. Texts with more than 20 levels are refused.
- Dates and durations are ``normal``, as numbers of days.
- Numbers with two values are ``bernoulli``.
- Whole numbers with at most 5 values, or at most 10 if they start above 0, are ``ordinal``: marks, answers, years.
  Each value must occur twice on average.
- Whole numbers that are not negative are counts if 0 is one of them or their mean is below 5, and the mean is below 3
  standard deviations and below 1000: ``poisson``, or ``negative_binomial`` if the variance is above 1.5 times the mean.
  Other whole numbers, such as an age or a mass in grams, are treated as real numbers.
- Whole numbers in a column that is called ``id`` or ends so are refused. So are codes for missing entries: -99, -999
  and -9999 if they repeat and no other number is negative, and 9, 99, 999, 9999 of either sign if they repeat and are
  further from all other numbers than these are from each other. So are texts that differ only in spaces or capitals.
- Real numbers are ``normal``, or ``log_normal`` if they are positive, have a skewness above 1, and their logarithms a
  smaller one.

``student_t`` and the zero-inflated kinds are for you to state: outliers and zeros of a column can also come from the
latent variables.
"""

import re
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae._utils.validation import describe, with_article

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CLASSES", "COUNTS", "KINDS", "REALS", "UnreadableColumn", "infer_kind", "is_classes", "numbers_of"]
__all__ += ["plain_number", "time_of"]

REALS = ("normal", "student_t", "log_normal")
COUNTS = ("poisson", "negative_binomial", "zero_inflated_poisson", "zero_inflated_negative_binomial")
CLASSES = ("bernoulli", "categorical", "ordinal")
KINDS = (*REALS, *COUNTS, *CLASSES)
"""The kinds that a column can have."""

_MAX_TEXTS = 20  # levels of a column of texts that nobody called categorical
_FEW, _FEW_ABOVE_ZERO = 5, 10  # values of whole numbers that are levels
_LEAST_ROWS = 10  # below it, values that are all different say little
_LEAST_IDENTIFIER = 1e5  # mean of numbers that may be identifiers; a year is smaller
_LARGEST_COUNT = 1000  # mean of counts; larger ones are like real numbers
_SMALL_COUNT = 5  # mean of counts of which some are 0, unless the table is small
_OVERDISPERSION, _SKEWNESS, _FROM_ZERO = 1.5, 1.0, 3.0
_FOR_MISSING = {"?", "", "-", "--", ".", "na", "n/a", "nan", "null", "<na>"}
_CODES_FOR_MISSING = (9.0, 99.0, 999.0, 9999.0)  # of either sign
_IDENTIFIER = re.compile(r"(?i:(.*[\W_])?id)|.*[a-z]I[Dd]")
_FORMATTED = re.compile(r"\s*[-+]?[$€£]?\s*(\d{1,3}(,\d{3})+|\d+)(\.\d+)?\s*%?\s*")
_DURATION = re.compile(r"\s*\d+:\d{2}:\d{2}(\.\d+)?\s*")
_LEADING_ZERO = re.compile(r"\s*0\d+\s*")
_DECIMAL_COMMA = re.compile(r"\s*[-+]?\d+,\d+\s*")
_DATE = re.compile(r"\s*(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4})([T\s].*)?")


class UnreadableColumn(ValueError):
    """A column that needs a decision of its owner; the message says which."""


def is_classes(column: "pd.Series") -> bool:
    """Whether the values of a column are texts, booleans or categories, and no numbers."""
    import pandas as pd

    if isinstance(column.dtype, pd.CategoricalDtype) or pd.api.types.is_bool_dtype(column.dtype):
        return True
    return pd.api.types.infer_dtype(column, skipna=True) in ("string", "boolean")


def infer_kind(column: "pd.Series") -> str:
    """Return the kind of a column; see the rules of this module.

    >>> import pandas as pd
    >>> columns = ["a", "b", None, "a"], [3750, 3800, 3250, 4175], [1, 2, 3, None, 2, 1, 3], [0, 7, 1, 0, 2, 9, 0, 1, 4]
    >>> [infer_kind(pd.Series(values)) for values in columns]
    ['bernoulli', 'normal', 'ordinal', 'negative_binomial']
    """
    import pandas as pd

    present = column.dropna()
    if not len(present):
        raise UnreadableColumn("has no value: all are missing")
    if not all(isinstance(value, Hashable) for value in present):
        raise UnreadableColumn(_unreadable(column, ""))
    levels = present.nunique()
    if time_of(column) and levels > 1:
        return "normal"
    if not is_classes(column):
        return _kind_of_numbers(numbers_of(column), column.name)
    if levels == 1:
        raise _constant(present)
    if isinstance(column.dtype, pd.CategoricalDtype):
        return "bernoulli" if levels == 2 else "ordinal" if column.dtype.ordered else "categorical"
    if isinstance(present.iloc[0], str):
        _check_texts(present.astype("object"), levels)
    return "bernoulli" if levels == 2 else "categorical"


def _constant(present: "pd.Series") -> UnreadableColumn:
    value = present.iloc[0]
    shown = plain_number(value) if isinstance(value, float) else value
    return UnreadableColumn(f"has one value alone, {shown!r}, and so nothing to learn from")


def _check_texts(texts: "pd.Series", levels: int) -> None:
    """Raise for texts that are dates, numbers or notes."""
    name = texts.name
    if texts.map(lambda text: bool(_DATE.fullmatch(text))).all():
        raise UnreadableColumn(
            f"has dates as text, such as {texts.iloc[0]!r}: convert them, `frame[{name!r}] = "
            f"pd.to_datetime(frame[{name!r}])`, and they are modelled as days"
        )
    if texts.map(lambda text: bool(_DURATION.fullmatch(text))).all():
        raise UnreadableColumn(
            f"has durations as text, such as {texts.iloc[0]!r}: convert them, `frame[{name!r}] = "
            f"pd.to_timedelta(frame[{name!r}])`, and they are modelled as days"
        )
    many = levels > _MAX_TEXTS or (levels == len(texts) >= _LEAST_ROWS)
    is_number, conversion = _number_texts(texts)
    is_code = texts.map(lambda text: bool(_LEADING_ZERO.fullmatch(text))).any()  # as of post: its zero is no digit
    if not is_code and is_number.mean() > 0.5 and (many or not is_number.all()):
        others = texts[~is_number]
        other = f", and {others.iloc[0]!r}, which is none" if len(others) else ""
        marks = others.map(lambda text: text.strip().lower() in _FOR_MISSING)
        lost = "" if marks.all() else f", if the {len(others)} others may be missing"
        raise UnreadableColumn(
            f"has numbers as text, such as {texts[is_number].iloc[0]!r}{other}: convert them, `frame[{name!r}] = "
            f"pd.to_numeric({conversion}, errors='coerce')`{lost}"
        )
    if many:
        each = "a different text in each row, as names and notes have" if levels == len(texts) else f"{levels} texts"
        raise UnreadableColumn(
            f"has {each}: if these are classes, state the kind, `kinds={{{name!r}: 'categorical'}}`; if they name the "
            f"rows, `index={name!r}`"
        )
    holes = texts[texts.map(lambda text: text.strip().lower() in _FOR_MISSING)]
    if len(holes):
        mark = repr(holes.iloc[0])
        raise UnreadableColumn(
            f"has {mark} in {len(holes)} rows, which looks like a missing entry: make it one, `frame[{name!r}] = "
            f"frame[{name!r}].replace({mark}, None)` or `pd.read_csv(path, na_values=[{mark}])`; if it is a level, "
            f"state the kind, `kinds={{{name!r}: 'categorical'}}`"
        )
    _check_spelling(texts)


def _number_texts(texts: "pd.Series") -> tuple["pd.Series", str]:
    """Return which texts are numbers, such as 1,234 or 45%, and the expression that makes all of them plain."""
    import pandas as pd

    column = f"frame[{texts.name!r}]"
    is_plain = pd.to_numeric(texts, errors="coerce").notna()
    is_formatted = is_plain | texts.map(lambda text: bool(_FORMATTED.fullmatch(text)))
    has_comma = is_plain | texts.map(lambda text: bool(_DECIMAL_COMMA.fullmatch(text)))
    if has_comma.sum() > is_formatted.sum():
        return has_comma, f"{column}.str.replace(',', '.')"
    if is_formatted.sum() > is_plain.sum():
        return is_formatted, f"{column}.str.replace('[$€£,%]', '', regex=True)"
    return is_plain, column


def _check_spelling(texts: "pd.Series") -> None:
    """Raise for levels that are probably one: they differ in spaces, or in small and capital letters."""
    name, levels = texts.name, texts.drop_duplicates()
    for what, method, plain_levels in (
        ("spaces", "strip", levels.str.strip()),
        ("capital letters", "lower", levels.str.lower()),
    ):
        if len(same := levels[plain_levels.duplicated(keep=False)]):
            group = levels[plain_levels == plain_levels[same.index[0]]]
            raise UnreadableColumn(
                f"has levels that differ only in {what}, such as {group.iloc[0]!r} and {group.iloc[1]!r}: make them "
                f"one, `frame[{name!r}] = frame[{name!r}].str.{method}()`; if they are different, state the kind, "
                f"`kinds={{{name!r}: 'categorical'}}`"
            )


def _sign_of_identifier(present: "pd.Series", name: Any) -> str | None:
    """Say why whole numbers look like row numbers or identifiers; ``None`` if they do not."""
    mean, count = present.mean(), present.nunique()
    if count == len(present) >= _LEAST_ROWS:
        if present.max() - present.min() == count - 1:
            return "consecutive whole numbers, a different one in each row, as a row number has"
        if _LEAST_IDENTIFIER < mean > 100 * present.std():
            return "large whole numbers of nearly the same size, a different one in each row, as an identifier has"
    return "whole numbers and the name of an identifier" if _IDENTIFIER.fullmatch(str(name)) else None


def _kind_of_numbers(values: np.ndarray, name: Any) -> str:
    """Return the kind of numbers, of which NaN are missing."""
    import pandas as pd

    present = pd.Series(values[~np.isnan(values)])
    least, mean, variance = present.min(), present.mean(), present.var()
    count = present.nunique()
    if count == 1:
        raise _constant(present)
    _check_codes(present, name)
    if count == 2:
        return "bernoulli"
    if (present == present.round()).all():
        if (sign := _sign_of_identifier(present, name)) is not None:
            raise UnreadableColumn(
                f"has {sign}: if they name the rows, `index={name!r}`; if they are data, state the kind, "
                f"`kinds={{{name!r}: 'normal'}}` or 'categorical'"
            )
        if 2 * count <= len(present) and count <= (_FEW_ABOVE_ZERO if least > 0 else _FEW):
            return "ordinal"
        if (least == 0 or (least > 0 and mean < _SMALL_COUNT)) and mean < min(
            _FROM_ZERO * variance**0.5, _LARGEST_COUNT
        ):
            return "negative_binomial" if variance > _OVERDISPERSION * mean else "poisson"
    if least > 0 and (skewness := present.skew()) > _SKEWNESS and abs(np.log(present).skew()) < skewness:
        return "log_normal"
    return "normal"


def _check_codes(present: "pd.Series", name: Any) -> None:
    """Raise if the least or the largest of two numbers or more repeats as codes for missing entries do."""
    for value in (present.min(), present.max()):
        others = present[present != value]
        repeats = len(present) - len(others)
        if abs(value) not in _CODES_FOR_MISSING or repeats == 1:
            continue
        alone = value <= -99 and others.min() >= 0
        distance, spread = (others - value).abs().min(), others.max() - others.min()
        if alone or distance > spread > 0:
            code, what = plain_number(value), "no other negative number" if alone else "all other numbers far away"
            raise UnreadableColumn(
                f"has {code} in {repeats} rows and {what}, which looks like a missing entry: make it one, "
                f"`frame[{name!r}] = frame[{name!r}].replace({code}, None)` or `pd.read_csv(path, na_values=[{code}])`"
                f"; if it is a number, state the kind, such as `kinds={{{name!r}: 'normal'}}`"
            )


def time_of(column: "pd.Series") -> str:
    """Whether a column has values of time, ``"date"`` or ``"duration"``; empty if not."""
    import pandas as pd

    kind = pd.api.types.infer_dtype(column, skipna=True)
    if isinstance(column.dtype, pd.DatetimeTZDtype) or kind in ("datetime64", "datetime", "date"):
        return "date"
    return "duration" if kind in ("timedelta64", "timedelta") else ""


def plain_number(value: float) -> float | int:
    """Return a whole number as an int.

    >>> plain_number(3.0), plain_number(2.5)
    (3, 2.5)
    """
    return int(value) if float(value).is_integer() else float(value)


def numbers_of(column: "pd.Series") -> np.ndarray:
    """Return the numbers of a column, days since 1970 for dates and days for durations, with NaN for missing ones."""
    import pandas as pd

    kind = pd.api.types.infer_dtype(column, skipna=True)
    if isinstance(column.dtype, pd.CategoricalDtype) and pd.api.types.is_numeric_dtype(column.cat.categories.dtype):
        column, kind = column.astype(column.cat.categories.dtype), "floating"
    if time_of(column) == "date":
        times = pd.to_datetime(column, utc=True).dt.tz_localize(None)
        return ((times - pd.Timestamp(0)) / pd.Timedelta(days=1)).to_numpy(dtype=float, na_value=np.nan)
    if time_of(column) == "duration":
        return (pd.to_timedelta(column) / pd.Timedelta(days=1)).to_numpy(dtype=float, na_value=np.nan)
    if kind not in ("integer", "floating", "mixed-integer-float", "decimal", "boolean", "empty"):
        raise UnreadableColumn(_unreadable(column, kind))
    values = pd.to_numeric(column.astype("object") if kind == "decimal" else column)
    found = values.astype("float64").to_numpy(dtype=float, na_value=np.nan)
    if (places := np.flatnonzero(np.isinf(found))).size:
        where = f"{found[places[0]]} in row {column.index[places[0]]!r}"
        missing = f"frame[{column.name!r}].replace([float('inf'), -float('inf')], float('nan'))"
        raise UnreadableColumn(f"has {where}: make infinite numbers missing ones, `frame[{column.name!r}] = {missing}`")
    return found


def _unreadable(column: "pd.Series", kind: str) -> str:
    present = column.dropna()
    first = present.iloc[0]
    other = next((value for value in present if type(value) is not type(first)), None)
    if kind == "string":
        return f"has texts, such as {first!r}, where numbers are needed"
    if other is not None:
        types = f"{describe(first).partition(' ')[2]} and {describe(other).partition(' ')[2]}"
        return f"has values of several types, {types}, such as {first!r} and {other!r}: convert them to one"
    return f"has values of the type {with_article(type(first).__name__).partition(' ')[2]}, such as {first!r}: " + (
        "convert them to numbers or texts"
    )
