"""Frames with columns of many kinds, for tests of tables."""

import numpy as np
import pandas as pd


def mixed_frame(rows=40, seed=0):
    """Columns of all kinds and dtypes, some with holes, and an index of texts."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "height": rng.normal(170, 9, rows),
            "income": rng.lognormal(8, 1.2, rows),
            "visits": rng.negative_binomial(1, 0.15, rows),
            "grams": rng.integers(2700, 6300, rows),
            "smoker": rng.random(rows) < 0.3,
            "owner": pd.array(rng.random(rows) < 0.6, dtype="boolean"),
            "children": pd.array(rng.integers(0, 4, rows), dtype="Int64"),
            "town": rng.choice(["Ulm", "Bonn", "Trier"], rows),
            "code": pd.array(rng.choice(["a", "b"], rows), dtype="string"),
            "size": pd.Categorical(rng.choice(["S", "M", "L"], rows), ["S", "M", "L", "XL"], ordered=True),
            "colour": pd.Categorical(rng.choice(["red", "blue", "grey"], rows)),
            "seen": pd.Timestamp("2024-02-01") + pd.to_timedelta(rng.integers(0, 300, rows), unit="D"),
            "zoned": pd.Timestamp("2024-02-01", tz="Europe/Berlin") + pd.to_timedelta(np.arange(rows) * 24, unit="h"),
            "waited": pd.to_timedelta(rng.integers(0, 90, rows), unit="D"),
            7: rng.normal(size=rows).astype("float32"),
        },
        index=pd.Index([f"person {number}" for number in range(rows)], name="who"),
    )
    frame.loc["person 0":"person 3", "size"] = "S"
    frame.loc["person 4":"person 7", "size"] = "M"
    frame.loc["person 8":"person 9", "size"] = "L"
    for place, label in enumerate(["height", "income", "owner", "children", "town", "code", "size", "seen", 7]):
        frame.loc[frame.index[10 + place], label] = None
    return frame


KINDS = {
    "height": "normal", "income": "log_normal", "visits": "negative_binomial", "grams": "normal",
    "smoker": "bernoulli", "owner": "bernoulli", "children": "ordinal", "town": "categorical", "code": "bernoulli",
    "size": "ordinal", "colour": "categorical", "seen": "normal", "zoned": "normal", "waited": "normal", "7": "normal",
}  # fmt: skip
