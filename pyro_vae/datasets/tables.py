"""Tables with columns of several kinds and missing entries."""

from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["penguins"]


def penguins() -> "DataFrame":
    """344 penguins of the Palmer Archipelago: species, island, four measurements, sex and year; 19 entries are missing.

    Lengths are in millimetres, the mass is in grams. The file is a part of the package: no download.

    Source: Gorman, Williams and Fraser 2014, "Ecological sexual dimorphism and environmental variability within a
    community of Antarctic penguins"; Horst, Hill and Gorman 2020, "palmerpenguins" (CC0).

    >>> frame = penguins()
    >>> frame.shape, int(frame.isna().sum().sum()), list(frame.columns[:3])
    ((344, 8), 19, ['species', 'island', 'bill_length_mm'])
    """
    import pandas as pd

    with (files("pyro_vae.datasets") / "penguins.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file)
