"""Columns that a model is given: covariates and exposures."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from pyro_vae.tables.columns import Classes
from pyro_vae.tables.kinds import CLASSES, UnreadableColumn, is_classes, numbers_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Covariate", "Offset"]


class Covariate(nn.Module):
    """A column that the model is given: standardised numbers, or one-hot classes."""

    def __init__(self, column: "pd.Series", kind: str | None, storage: Mapping[str, Any]):
        super().__init__()
        self.label = column.name
        self._check(column)
        classes = is_classes(column) if kind is None else kind in CLASSES
        if kind is None and not classes and numbers_of(column).std() == 0:
            raise UnreadableColumn("has one value alone, so it cannot be a covariate")
        self.classes = Classes(column, "categorical", storage) if classes else None
        if not classes:
            from sklearn.preprocessing import StandardScaler

            fitted = StandardScaler().fit(numbers_of(column)[:, None])
            self.loc, self.scale = float(fitted.mean_[0]), float(fitted.scale_[0])

    def _check(self, column: "pd.Series") -> None:
        if column.isna().any():
            row = column.index[np.flatnonzero(column.isna())[0]]
            raise UnreadableColumn(
                f"has a missing entry in row {row!r}: a covariate must be known; model the column, or leave out the row"
            )

    @property
    def name(self) -> str:
        """The name of the column as text."""
        return str(self.label)

    @property
    def width(self) -> int:
        """How many numbers of the context it is."""
        return 1 if self.classes is None else len(self.classes.levels)

    def encode(self, column: "pd.Series", unseen: str) -> np.ndarray:
        self._check(column)
        if self.classes is None:
            return ((numbers_of(column) - self.loc) / self.scale)[:, None]
        from sklearn.preprocessing import OneHotEncoder

        numbers = self.classes.encode(column, "raise")
        encoder = OneHotEncoder(categories=[np.arange(float(self.width))], sparse_output=False)
        return encoder.fit_transform(numbers[:, None])

    def values(self, column: "pd.Series") -> np.ndarray:
        """Values for an array: numbers, or levels as texts."""
        if self.classes is None:
            return numbers_of(column)
        return column.astype("object").map(str).to_numpy(dtype=str)

    def describe(self) -> str:
        return f"mean {self.loc:.4g}, sd {self.scale:.4g}" if self.classes is None else self.classes.describe()


class Offset(nn.Module):
    """A column of exposures, whose logarithm, less its mean, is added to the log-mean of counts."""

    width = 1

    def __init__(self, column: "pd.Series"):
        super().__init__()
        self.label = column.name
        self.loc = 0.0
        self.loc = float(self.encode(column).mean())

    @property
    def name(self) -> str:
        """The name of the column as text."""
        return str(self.label)

    def encode(self, column: "pd.Series", unseen: str = "raise") -> np.ndarray:
        values = numbers_of(column)
        wrong = np.flatnonzero(~(values > 0))
        if wrong.size:
            row = column.index[wrong[0]]
            raise UnreadableColumn(f"must be a positive exposure in each row, got {values[wrong[0]]:g} in row {row!r}")
        return (np.log(values) - self.loc)[:, None]

    def values(self, column: "pd.Series") -> np.ndarray:
        """Values for an array."""
        return numbers_of(column)

    def describe(self) -> str:
        return f"log of it is added to the log-mean of counts, geometric mean {np.exp(self.loc):.4g}"
