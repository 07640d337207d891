"""Comparison of models by held-out log p(x): means, paired differences, and errors that equal the spread of tables."""

import math

import pandas as pd
import pytest
import torch
from exact_cases import conjugate

import pyro_vae as pv

COLUMNS = [
    *("log_evidence", "standard_error", "monte_carlo_error"),
    *("difference", "difference_error", "difference_monte_carlo_error", "unreliable"),
]


def normals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def estimate(log_evidence, ess=50.0, khat=0.1, num_samples=100):
    ess, khat = (torch.as_tensor(value, dtype=torch.float64).expand_as(log_evidence) for value in (ess, khat))
    return pv.Evidence(log_evidence, ess, khat, num_samples)


def test_the_table_equals_a_calculation_by_hand():
    a, b = torch.tensor([-1.0, -2.0, -3.0, -4.0]).double(), torch.tensor([-1.5, -2.5, -3.0, -5.0]).double()
    khat = torch.tensor([0.1, 0.6, math.nan, -math.inf]).double()
    table = pv.compare_evidence({"b": estimate(b, khat=khat), "a": estimate(a)})
    assert list(table.columns) == COLUMNS
    assert list(table.index) == ["a", "b"]
    noise = (1 / 50 - 1 / 100) ** 0.5
    expected = pd.DataFrame(
        [
            [-2.5, (5 / 3) ** 0.5 / 2, noise / 2, 0.0, math.nan, math.nan, 0.0],
            [-3.0, float(b.std()) / 2, noise / 2, -0.5, float((b - a).std()) / 2, noise / 2**0.5, 0.5],
        ],
        index=["a", "b"],
        columns=COLUMNS,
    )
    pd.testing.assert_frame_equal(table, expected)


def test_exact_answers_have_no_monte_carlo_error():
    found = normals(40)
    table = pv.compare_evidence({"exact": found + 1, "estimate": estimate(found.float().double())})
    assert list(table["monte_carlo_error"]) == [0.0, pytest.approx(0.1 / 40**0.5)]
    assert table.loc["estimate", "difference_monte_carlo_error"] == pytest.approx(0.1 / 40**0.5)
    assert table.loc["estimate", "difference_error"] == pytest.approx(0, abs=1e-7)  # the same for each datum
    assert list(table["unreliable"]) == [0.0, 0.0]


def test_one_model_ties_one_datum_and_nan():
    table = pv.compare_evidence({"a": normals(5)})
    assert table.loc["a", "difference"] == 0
    assert table["difference_error"].isna().all()
    assert list(pv.compare_evidence({"a": normals(5), "b": normals(5)}).index) == ["a", "b"]
    assert pv.compare_evidence({"a": normals(1), "b": normals(1)})["standard_error"].isna().all()
    nan = torch.full((5,), math.nan)
    assert list(pv.compare_evidence({"nan": nan, "a": normals(5)}).index) == ["a", "nan"]


def tables(x, repeats):
    """Comparisons of two guides on each of ``repeats`` parts of x, with 50 draws for each datum."""
    evidence = {
        name: pv.log_evidence(*conjugate(0.5, scale), x, num_samples=50, seed=seed)
        for name, scale, seed in (("wide", 1.5, 0), ("wider", 3.0, 1))
    }
    size = len(x) // repeats
    for first in range(0, len(x), size):
        part = slice(first, first + size)
        yield pv.compare_evidence(
            {name: pv.Evidence(e.log_evidence[part], e.ess[part], e.khat[part], 50) for name, e in evidence.items()}
        )


@pytest.mark.parametrize(
    ("data", "columns", "off"),
    [
        ("new", ["standard_error", "difference_error"], 0.2),
        ("the same", ["monte_carlo_error", "difference_monte_carlo_error"], 0.25),
    ],
)
def test_the_errors_are_the_spread_of_tables(data, columns, off):
    """Each error has one source: new data and draws, or new draws for the same data.

    0.2 is 4.9 standard errors of a standard deviation of 300 numbers; the delta method of 50 draws adds to it.
    """
    repeats = 300
    x = 2**0.5 * (normals(50 * repeats) if data == "new" else normals(50).repeat(repeats))
    found, expected = [], []
    for table in tables(x, repeats):
        mean = table["log_evidence"]
        found.append([mean["wider"], mean["wider"] - mean["wide"]])
        expected.append([table.loc["wider", columns[0]], table.loc[table.index[1], columns[1]]])
    typical = torch.tensor(expected).square().mean(0).sqrt()
    assert ((torch.tensor(found).std(0) / typical - 1).abs() < off).all()


def test_the_table_shows_unreliable_estimates():
    x = 2**0.5 * normals(200)
    good, bad = (pv.log_evidence(*conjugate(0.5, scale), x, num_samples=500) for scale in (1.0, 0.05))
    table = pv.compare_evidence({"good": good, "bad": bad})
    assert table.loc["good", "unreliable"] < 0.02
    assert table.loc["bad", "unreliable"] > 0.6
    assert table.loc["bad", "difference"] < -0.5


def test_evidence_that_is_no_tensor_of_one_dimension_is_refused():
    with pytest.raises(TypeError, match=r"`evidence\['a'\]` must be the result of pv.log_evidence.*got a float"):
        pv.compare_evidence({"a": -3.2})
    with pytest.raises(ValueError, match=r"`evidence\['a'\]` must be \(N,\).*got shape \(5, 1\)"):
        pv.compare_evidence({"a": normals(5, 1)})
