"""Tables: frames to tensors and back, imputation, ArviZ, files, and densities in the units of the frame."""

import datetime
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.tables import Table
from tables.frames import KINDS, mixed_frame


def assert_same(found, expected):
    pd.testing.assert_frame_equal(found, expected, check_exact=False, rtol=1e-5, check_column_type=False)


@pytest.fixture(scope="module")
def table():
    return Table.from_frame(mixed_frame())


def test_kinds_are_inferred_and_the_frame_comes_back_with_its_dtypes_levels_and_index(table):
    frame = mixed_frame()
    assert table.kinds == KINDS
    assert table.x.dtype == torch.float32
    assert int(table.x.isnan().sum()) == int(frame.isna().sum().sum())
    found = table.decode(table.x)
    found.columns = frame.columns
    pd.testing.assert_index_equal(found.index, frame.index)
    assert_same(found, frame)


def test_real_numbers_are_standardised_log_normal_ones_have_the_geometric_mean_one_and_counts_stay(table):
    x = dict(zip(table.names, table.x.T.double(), strict=True))
    height = x["height"][~x["height"].isnan()]
    assert abs(height.mean()) < 1e-6
    assert height.std(correction=0).item() == pytest.approx(1.0, rel=1e-5)
    assert x["income"][~x["income"].isnan()].log().mean().item() == pytest.approx(0.0, abs=1e-5)
    assert x["visits"].tolist() == mixed_frame()["visits"].tolist()
    assert x["size"][:10].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 2


def test_draws_come_back_as_one_frame_with_the_number_of_the_draw(table):
    frame = table.decode(torch.stack([table.x, table.x.flip(0)]))
    assert frame.index.names == ["draw", "who"]
    assert frame.loc[(1, "person 0"), "grams"] == mixed_frame()["grams"].iloc[-1]
    sampled = table.decode(table.vae().generate(5))
    assert sampled.index.tolist() == [0, 1, 2, 3, 4]
    assert sampled.dtypes.equals(mixed_frame().dtypes)


def polars_frame():
    frame = mixed_frame()
    sizes = pl.Enum(["S", "M", "L", "XL"])
    columns = {
        "height": pl.Series(frame["height"].to_numpy()), "visits": pl.Series(frame["visits"].to_numpy()),
        "children": pl.Series([None if pd.isna(value) else int(value) for value in frame["children"]], dtype=pl.Int8),
        "town": pl.Series([None if pd.isna(value) else value for value in frame["town"]]),
        "owner": pl.Series([None if pd.isna(value) else bool(value) for value in frame["owner"]]),
        "size": pl.Series([None if pd.isna(value) else value for value in frame["size"]], dtype=sizes),
        "colour": pl.Series(frame["colour"].astype(str).to_list(), dtype=pl.Categorical),
        "day": pl.Series(frame["zoned"].dt.date.to_list()),
        "time": pl.Series(frame["zoned"].dt.tz_localize(None).to_list()),
    }  # fmt: skip
    return pl.DataFrame(columns)


def test_a_frame_of_polars_comes_back_as_one_of_polars():
    frame = polars_frame()
    table = Table.from_frame(frame)
    assert table.kinds == {
        "height": "normal", "visits": "negative_binomial", "children": "ordinal", "town": "categorical",
        "owner": "bernoulli", "size": "ordinal", "colour": "categorical", "day": "normal", "time": "normal",
    }  # fmt: skip
    found = table.decode(table.x)
    assert found.schema == frame.schema
    for name in frame.columns:
        ours, theirs = found[name].to_list(), frame[name].to_list()
        if name == "height":
            np.testing.assert_allclose(*(np.array(values, dtype=float) for values in (ours, theirs)), rtol=1e-5)
        else:
            assert ours == theirs, name
    vae = table.vae(hidden=[4])
    filled = table.impute(vae, num_draws=5)
    assert filled.schema == frame.schema
    assert filled.drop("height").null_count().sum_horizontal().item() == 0
    assert table.decode(torch.stack([table.x] * 2)).columns[0] == "draw"


cells = {
    "real": st.one_of(st.none(), st.floats(-1e6, 1e6, width=32)),
    "count": st.one_of(st.none(), st.integers(0, 10**6)),
    "text": st.one_of(st.none(), st.text(max_size=5)),
    "flag": st.one_of(st.none(), st.booleans()),
}


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.fixed_dictionaries(cells), min_size=2, max_size=30))
def test_any_frame_is_encoded_and_comes_back_or_the_error_names_its_columns(rows):
    frame = pd.DataFrame(rows, columns=list(cells))
    try:
        table = Table.from_frame(frame)
    except ValueError as error:
        named = [label for label in frame if f"column {label!r}" in str(error)]
        if not named:
            raise
        rest = [label for label in frame if label not in named]
        if not rest:
            return
        table = Table.from_frame(frame, drop=named)
    found = table.decode(table.x)
    for label in table.names:
        ours, theirs = found[label], frame[label]
        assert ours.isna().tolist() == theirs.isna().tolist()
        assert ours.dtype == theirs.dtype
        if label in ("real", "count"):
            numbers = theirs.dropna().astype(float)
            scale = 1e-5 * (numbers.abs().max() + 1e-30)
            np.testing.assert_allclose(ours.dropna().astype(float), numbers, rtol=1e-5, atol=scale)
        else:
            assert ours.dropna().tolist() == theirs.dropna().tolist()


def one_bad(values, **options):
    frame = pd.DataFrame({"good": np.linspace(0, 1, len(values)) ** 2, "bad": values})
    return Table.from_frame(frame, **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0] * 12, r"column 'bad' has one value alone, 1, and so"),
        (["x"] * 12, r"column 'bad' has one value alone, 'x'"),
        ([None] * 12, r"column 'bad' has no value: all are missing"),
        (
            range(3_432_000, 3_432_600, 50),
            r"column 'bad' has large whole numbers of nearly .* identifier .* `index='bad'`",
        ),
        (range(5, 17), r"column 'bad' has consecutive whole numbers, .* `index='bad'`"),
        (
            ["yes", "no", " ?"] * 4,
            r"column 'bad' has ' \?' in 4 rows, which looks like .*na_values=\[' ",
        ),
        ([f"note {number}" for number in range(12)], r"column 'bad' has a different text in each row.*`index='bad'`"),
        ([f"{number % 25}x" for number in range(60)], r"column 'bad' has 25 texts: .*kinds=\{'bad': 'categorical'\}"),
        (
            [f"2024-01-{day + 1:02d}" for day in range(12)],
            r"column 'bad' has dates as text.*`frame\['bad'\] = pd.to_da",
        ),
        (
            ["1.5", "2", "3.5", "?"] * 3,
            r"column 'bad' has numbers as text, such as '1.5', and '\?', which is none: con",
        ),
        (["-", *map(chr, range(65, 90))] * 2, r"column 'bad' has 26 texts"),
        (["12", "22-23", "24"] * 4, r"has numbers as text, .* if the 4 others may be missing"),
        ([-999, 1.5, 2.5, 0.0] * 3, r"column 'bad' has -999 in 3 rows and no other .*na_values=\[-999\]"),
        ([1, 2, 3, 9] * 3, r"column 'bad' has 9 in 3 rows and all other numbers far away, .*na_values=\[9\]"),
        ([21.5, 999.0, 30.0] * 4, r"column 'bad' has 999 in 4 rows and all other numbers far away"),
        ([f"{hour:02d}:30:00" for hour in range(12)], r"column 'bad' has durations as text.*pd.to_timedelta\("),
        ([f"0{number}" for number in range(100, 112)], r"column 'bad' has a different text in each row"),
        ([[1], [2]] * 6, r"column 'bad' has values of the type list"),
        ([1, "a", 2.5, None] * 3, r"column 'bad' has values of several types, int and str, such as 1 and 'a'"),
        ([(1, 2), (3, 4), (5, 6)] * 4, r"column 'bad' has values of the type tuple, such as \(1, 2\): convert"),
        ([1.0, np.inf, 2.0] * 4, r"column 'bad' has inf in row 1"),
        ([1j, 2.0, 3.0] * 4, r"column 'bad' has values of"),
        (pd.cut(np.arange(12.0), 3), r"column 'bad' has levels of the type Interval.*cat.rename_categories\(str\)"),
        (pd.period_range("2024-01", periods=12, freq="M"), r"column 'bad' has values of the type Period"),
    ],
)
def test_a_column_that_needs_a_decision_is_named_with_what_to_do(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        one_bad(values)
    assert "To leave out: drop=['bad']" in str(caught.value)
    assert one_bad(values, drop=["bad"]).names == ["good"]


def test_all_columns_that_need_a_decision_are_in_one_error():
    frame = pd.DataFrame({"id": range(20), "one": 1.0, "x": np.linspace(0, 1, 20) ** 2})
    with pytest.raises(ValueError, match=r"(?s)- column 'id' .*- column 'one' .*drop=\['id', 'one'\]"):
        Table.from_frame(frame)
    table = Table.from_frame(frame, index="id", drop=["one"])
    assert table.names == ["x"]
    assert table.decode(table.x).index.name == "id"
    assert Table.from_frame(frame, kinds={"id": "normal"}, drop=["one"]).kinds["id"] == "normal"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Table.from_frame([1, 2]), TypeError, r"`frame` must be a data frame of pandas or polars.*got a list"),
        (lambda: Table.from_frame(pl.LazyFrame({"a": [1]})), TypeError, r"Collect it first"),
        (lambda: Table.from_frame(mixed_frame(), kinds={"height": "gauss"}), ValueError, r"got 'gauss' for 'height'"),
        (lambda: Table.from_frame(mixed_frame(), kinds={"x": "normal"}), ValueError, r"`kinds` must be columns .*'x'"),
        (lambda: Table.from_frame(mixed_frame(), context="town"), TypeError, r"`context` must be a list of names"),
        (lambda: Table.from_frame(mixed_frame(), context=["town"]), ValueError, r"'town' has a missing entry in row"),
        (lambda: Table.from_frame(mixed_frame(), context=["grams"], drop=["grams"]), ValueError, r"two for 'grams'"),
        (lambda: Table.from_frame(mixed_frame(), offset="children"), ValueError, r"'children' must be a positive expo"),
        (lambda: Table.from_frame(mixed_frame(), kinds={"height": "poisson"}), ValueError, r"must hold counts 0, 1, 2"),
        (lambda: Table.from_frame(mixed_frame(), kinds={"town": "poisson"}), ValueError, r"'town' has texts, such as"),
        (lambda: Table.from_frame(mixed_frame(), kinds={"visits": "log_normal"}), ValueError, r"which is not positive"),
        (lambda: Table.from_frame(mixed_frame(), kinds={"town": "bernoulli"}), ValueError, r"two levels to be bernoul"),
        (lambda: Table.from_frame(pd.DataFrame([[1, 2]] * 3, columns=["a", "a"])), ValueError, r"got 'a' twice"),
        (lambda: Table.from_frame(mixed_frame().head(1)), ValueError, r"two rows or more"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_new_rows_have_the_same_encoding_and_unseen_levels_are_named(table):
    frame = mixed_frame(20, seed=1)
    new = table.encode(frame)
    again = table.encode(mixed_frame())
    assert torch.equal(again.x.nan_to_num(), table.x.nan_to_num())
    assert new.index.equals(frame.index)
    assert_same(new.decode(new.x).iloc[:, :4], frame.iloc[:, :4])
    frame.loc["person 3", "town"] = "Aachen"
    with pytest.raises(
        ValueError, match=r"column 'town' must have the levels Bonn, Trier, Ulm, got 'Aachen' in row 'p"
    ):
        table.encode(frame)
    assert table.encode(frame, unseen="missing").x[3, 7].isnan()
    with pytest.raises(
        ValueError, match=r"`frame` must have the columns of the table, got none that is called \['town"
    ):
        table.encode(frame.drop(columns="town"))
    frame["town"] = None
    assert table.encode(frame).x[:, 7].isnan().all()


def test_the_network_of_an_encoder_reads_standardised_numbers_masks_and_one_hot_classes(table):
    features = table.network(networks.linear())(15, 2)[0](table.x)
    assert features.isfinite().all()
    assert features.shape == (40, features.shape[1])
    numbers = sum(kind not in ("bernoulli", "categorical", "ordinal") for kind in KINDS.values())
    values, observed = features[:, :numbers], features[:, numbers : 2 * numbers].bool()
    for column, mask in zip(values.T, observed.T, strict=True):
        assert abs(column[mask].mean()) < 1e-4
        assert column[mask].std(correction=0) == pytest.approx(1.0, abs=1e-3)
        assert (column[~mask] == 0).all()
    one_hot = features[:, 2 * numbers :]
    assert one_hot.sum() == (~table.x[:, [4, 5, 6, 7, 8, 9, 10]].isnan()).sum()


def test_the_decoder_starts_at_the_columns_alone(table):
    vae = table.vae(latent=1, hidden=[])
    for parameter in vae.decoder.network.parameters():
        parameter.data.zero_()
    p = vae.decode(torch.zeros(1, 1))
    frame = mixed_frame()
    assert p["visits"].mean.item() == pytest.approx(frame["visits"].mean(), rel=1e-4)
    assert p["smoker"].mean.item() == pytest.approx(frame["smoker"].mean(), rel=1e-4)
    shares = frame["town"].value_counts(normalize=True)
    log_p = [p["town"].log_prob(torch.tensor([[float(number)]])).exp().item() for number in range(3)]
    assert log_p == pytest.approx([shares[level] for level in ("Bonn", "Trier", "Ulm")], rel=1e-4)
    shares = frame["size"].value_counts(normalize=True)
    log_p = [p["size"].log_prob(torch.tensor([[float(number)]])).exp().item() for number in range(3)]
    assert log_p == pytest.approx([shares[level] for level in "SML"], rel=1e-3)


def factor_frame(rows=400, seed=0, holes=0.2):
    """A linear Gaussian table of one factor, in units of its own, and the same with holes."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=rows)
    full = pd.DataFrame(
        {"a": 100 + 20 * z + 5 * rng.normal(size=rows), "b": -3 + 0.2 * z + 0.1 * rng.normal(size=rows)}
    )
    full["c"] = 1e4 - 3000 * z + 900 * rng.normal(size=rows)
    return full, full.mask(rng.random(full.shape) < holes)


def test_log_p_in_the_units_of_the_frame_is_that_by_hand_and_does_not_depend_on_the_scaling():
    _, frame = factor_frame(30)
    table = Table.from_frame(frame)
    vae = table.vae(latent=1, hidden=[])
    found = pv.exact.log_evidence(vae.model, table) - table.log_scale
    decoder = vae.decoder
    linear = [module for module in decoder.modules() if isinstance(module, torch.nn.Linear)]
    weight, bias = (value.detach().double().numpy() for value in (linear[0].weight[:, 0], linear[0].bias))
    sd = decoder(torch.zeros(1, 1)).variance[0].sqrt().detach().double().numpy()
    scale = np.array([column.scale for column in table.columns])
    loc = np.array([column.loc for column in table.columns])
    mean, factor = loc + scale * bias, scale * weight
    covariance = np.outer(factor, factor) + np.diag((scale * sd) ** 2)
    for row, log_p in zip(frame.to_numpy(), found.tolist(), strict=True):
        seen = ~np.isnan(row)
        if not seen.any():
            assert log_p == pytest.approx(0.0, abs=1e-5)
            continue
        normal = stats.multivariate_normal(mean[seen], covariance[np.ix_(seen, seen)])
        assert log_p == pytest.approx(normal.logpdf(row[seen]), abs=2e-3)


def test_log_p_is_the_same_in_other_units():
    _, frame = factor_frame(60)
    found = []
    for factor in (1.0, 1000.0):
        table = Table.from_frame(frame * factor)
        torch.manual_seed(0)
        vae = table.vae(latent=1, hidden=[])
        log_p = pv.exact.log_evidence(vae.model, table) - table.log_scale
        observed = (~table.x.isnan()).sum(1)
        found.append(log_p + observed * np.log(factor))
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-4)


def covers(full, frame, table, vae, columns, level=0.9):
    cells = table.imputed_cells(vae, num_draws=999, quantiles=((1 - level) / 2, (1 + level) / 2))
    cells = cells[cells["column"].isin(columns)]
    truth = np.array([full.loc[row, column] for row, column in zip(cells["row"], cells["column"], strict=True)])
    low, high = (cells[name].astype(float).to_numpy() for name in cells.columns[3:5])
    inside = (low <= truth) & (truth <= high)
    return inside.mean(), len(inside)


def test_intervals_of_missing_entries_cover_the_truth_at_their_level():
    full, frame = factor_frame(600)
    table = Table.from_frame(frame)
    torch.manual_seed(0)
    vae = table.vae(latent=1, hidden=[])
    pv.fit(vae.model, vae.guide, table, epochs=400, lr=2e-2, batch_size=300, seed=0)
    share, count = covers(full, frame, table, vae, ["a", "b", "c"])
    assert abs(share - 0.9) < 4.5 * (0.09 / count) ** 0.5 + 0.02, "binomial error, and 2 % for a linear encoder"


def mixed_truth(rows=600, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=rows)
    full = pd.DataFrame({
        "weight": 70 + 12 * z + 4 * rng.normal(size=rows),
        "income": np.exp(8 + 0.8 * z + 0.4 * rng.normal(size=rows)),
        "visits": rng.poisson(np.exp(1.2 + 0.7 * z)),
        "smoker": np.where(rng.random(rows) < 1 / (1 + np.exp(-2 * z)), "yes", "no"),
        "grade": np.digitize(1.5 * z + rng.logistic(size=rows), [-1.0, 1.0]) + 1,
    })  # fmt: skip
    return full, full.mask(rng.random(full.shape) < 0.15)


@pytest.mark.slow
def test_imputation_of_a_mixed_table_covers_and_its_probabilities_are_calibrated():
    full, frame = mixed_truth(1500)
    table = Table.from_frame(frame, kinds={"visits": "poisson"})
    assert table.kinds == {
        "weight": "normal", "income": "log_normal", "visits": "poisson", "smoker": "bernoulli", "grade": "ordinal"
    }  # fmt: skip
    torch.manual_seed(0)
    vae = table.vae(latent=1, hidden=[32])
    pv.fit(vae.model, vae.guide, table, epochs=300, lr=5e-3, batch_size=128, seed=0)
    share, count = covers(full, frame, table, vae, ["weight", "income"])
    assert abs(share - 0.9) < 4.5 * (0.09 / count) ** 0.5 + 0.02
    share, count = covers(full, frame, table, vae, ["visits"])
    assert share > 0.9 - 4.5 * (0.09 / count) ** 0.5 - 0.02, "an interval of counts covers at least its level"
    cells = table.imputed_cells(vae)
    cells = cells[cells["column"] == "smoker"]
    right = np.array(
        [full.loc[row, "smoker"] == value for row, value in zip(cells["row"], cells["value"], strict=True)]
    )
    error = (right - cells["probability"].to_numpy()).mean()
    assert abs(error) < 4.5 * (0.25 / len(right)) ** 0.5 + 0.02


def test_impute_leaves_observed_cells_and_other_columns_untouched():
    frame = mixed_frame()
    frame["note"] = "left out"
    table = Table.from_frame(frame, drop=["note"])
    vae = table.vae(hidden=[4])
    filled = table.impute(vae, num_draws=20)
    assert filled.columns.tolist() == frame.columns.tolist()
    assert filled.isna().sum().sum() == 0
    assert filled.dtypes.equals(frame.dtypes)
    pd.testing.assert_frame_equal(filled.where(frame.notna(), frame), frame, check_dtype=False)
    assert frame.isna().sum().sum() == 9, "the frame of the user stays as it is"
    pd.testing.assert_frame_equal(filled, table.impute(vae, num_draws=20))


def test_the_tree_has_a_variable_for_each_column_and_the_index_of_the_frame(table):
    vae = table.vae(hidden=[4])
    tree = table.to_datatree(vae, draws=30)
    assert list(tree.children) == [
        "posterior", "sample_stats", "prior", "posterior_predictive", "prior_predictive", "observed_data", "guide",
        "imputed",
    ]  # fmt: skip
    observed = tree["observed_data"].to_dataset()
    assert observed["obs"].values.tolist() == mixed_frame().index.tolist()
    assert list(observed.data_vars) == table.names
    np.testing.assert_allclose(observed["height"], mixed_frame()["height"], rtol=1e-5)
    assert observed["children"].dropna("obs").values.tolist() == mixed_frame()["children"].dropna().tolist()
    assert observed["size"].attrs["levels"] == "S, M, L"
    imputed = tree["imputed"].to_dataset()
    assert imputed["town"].dims == ("chain", "draw", "town_missing")
    assert imputed["town_missing"].values.tolist() == ["person 14"]
    drawn = tree["posterior_predictive"]["height"]
    assert drawn.dims == ("chain", "draw", "obs")
    np.testing.assert_array_equal(drawn.sel(obs="person 10"), imputed["height"].sel(height_missing="person 10"))


@pytest.mark.parametrize(
    "index",
    [
        pd.MultiIndex.from_product([["a", "b"], range(20)], names=["group", "number"]),
        pd.date_range("2024-01-01", periods=40),
        pd.Index([1, 2] * 20),
    ],
    ids=["two levels", "dates", "names that repeat"],
)
def test_any_index_names_the_rows(index, tmp_path):
    frame = mixed_frame().set_axis(index)
    table = Table.from_frame(frame)
    vae = table.vae(hidden=[4])
    filled = table.impute(vae, num_draws=3)
    assert filled.index.equals(index)
    assert filled.notna().all().all()
    assert table.imputed_cells(vae, num_draws=3)["row"].iloc[0] == index[10]
    tree = table.to_datatree(vae, draws=2)
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    assert tree["imputed"].sizes["town_missing"] == 1
    assert table.decode(torch.stack([table.x] * 2)).index.nlevels == 1 + index.nlevels


def test_a_column_that_is_called_as_a_site_or_a_dimension_has_a_name_of_its_own(tmp_path):
    rng = np.random.default_rng(0)
    names = ["x", "z", "obs", "chain", "a/b", "latent"]
    table = Table.from_frame(pd.DataFrame(rng.normal(size=(12, 6)), columns=names))
    tree = table.to_datatree(table.vae(hidden=[]), draws=3)
    found = tree["observed_data"].to_dataset()
    assert [values.attrs.get("column", name) for name, values in found.data_vars.items()] == names
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz as az

        summary = az.summary(pv.to_arviz(tree), kind="stats", group="posterior_predictive")
    assert len(summary) == 6 * 12


PROCESS = """
import sys, numpy as np, torch, pandas as pd, pyro_vae as pv
folder = sys.argv[1]
vae = pv.VAE.load(f"{folder}/model.pt")
frame = pd.read_pickle(f"{folder}/frame.pkl")
new = vae.table.encode(frame)
filled = new.impute(vae, num_draws=20)
filled.to_pickle(f"{folder}/filled.pkl")
assert not [name for name in ("sklearn.linear_model", "arviz") if name in sys.modules]
"""


def test_a_loaded_model_encodes_and_imputes_new_rows_in_another_process(tmp_path, table):
    vae = table.vae(hidden=[4])
    vae.save(tmp_path / "model.pt")
    mixed_frame(20, seed=3).to_pickle(tmp_path / "frame.pkl")
    assert len(vae.table) == 0, "the rows are not stored"
    subprocess.run([sys.executable, "-c", PROCESS, str(tmp_path)], check=True)
    expected = table.encode(mixed_frame(20, seed=3)).impute(vae, num_draws=20)
    pd.testing.assert_frame_equal(pd.read_pickle(tmp_path / "filled.pkl"), expected)


def count_frame(rows=500, seed=0):
    rng = np.random.default_rng(seed)
    z, size, batch = rng.normal(size=rows), rng.lognormal(8, 1, rows), rng.choice(["one", "two"], rows)
    rates = np.outer(np.exp(0.5 * z), [1e-3, 2e-3, 4e-3]) * np.where(batch == "two", 2.0, 1.0)[:, None]
    frame = pd.DataFrame(rng.poisson(rates * size[:, None]), columns=["g1", "g2", "g3"])
    return frame.assign(library_size=size, batch=batch)


def test_covariates_are_one_hot_or_standardised_and_the_offset_has_the_coefficient_one():
    frame = count_frame().assign(age=np.arange(500.0) ** 1.5)
    kinds = dict.fromkeys(["g1", "g2", "g3"], "poisson")
    table = Table.from_frame(frame, kinds, context=["batch", "age"], offset="library_size")
    assert table.context.shape == (500, 4)
    assert table.num_covariates == 4
    assert torch.equal(table.context[:, 0] == 1, torch.tensor((frame["batch"] == "one").to_numpy()))
    assert table.context[:, 2].mean().item() == pytest.approx(0.0, abs=1e-5)
    vae = table.vae(latent=1, hidden=[8])
    z, c = torch.randn(1, 1), table.context[:1]
    doubled = c + torch.tensor([0.0, 0.0, 0.0, float(np.log(2.0))])
    torch.testing.assert_close(vae.decode(z, doubled).mean, 2 * vae.decode(z, c).mean)
    frame["center"] = np.arange(500) % 3
    coded = Table.from_frame(frame, kinds | {"center": "categorical"}, context=["center"], drop=["library_size"])
    assert torch.equal(coded.context, torch.eye(3)[torch.arange(500) % 3])
    tree = table.to_datatree(vae, draws=3)
    assert tree["constant_data"]["batch"].values.tolist() == frame["batch"].tolist()
    with pytest.raises(ValueError, match=r"`offset` needs a column of counts"):
        Table.from_frame(frame[["age", "library_size"]], offset="library_size")


@pytest.mark.slow
def test_an_offset_explains_the_size_and_a_covariate_the_batch():
    """The batch effect is that of a Poisson regression with the same offset; log p(x|c) is higher than without."""
    frame, kinds = count_frame(), dict.fromkeys(["g1", "g2", "g3"], "poisson")

    def fitted(**roles):
        table = Table.from_frame(frame, kinds, **roles)
        torch.manual_seed(0)
        vae = table.vae(latent=1, hidden=[])
        pv.fit(vae.model, vae.guide, table, epochs=300, lr=2e-2, batch_size=100, seed=0)
        return vae, pv.exact.log_evidence(vae.model, table).mean().item()

    vae, log_p = fitted(context=["batch"], offset="library_size")
    z, one, two = torch.zeros(1, 1), torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.0, 1, 0]])
    effect = (vae.decode(z, two).mean / vae.decode(z, one).mean).log()
    logs = np.log((frame[["g1", "g2", "g3"]].sum(axis=1) + 0.5) / frame["library_size"])
    expected = logs.groupby(frame["batch"]).mean().diff().iloc[-1]
    assert (effect - expected).abs().max() < 0.1
    assert log_p > fitted(drop=["batch", "library_size"])[1] + 0.3


def test_whole_numbers_stay_in_the_range_of_their_dtype():
    frame = pd.DataFrame({"small": np.arange(60, dtype="int8") ** 2 % 113, "big": np.arange(60) ** 9})
    table = Table.from_frame(frame, kinds={"small": "normal", "big": "normal"})
    found = table.decode(torch.full((3, 2), 1e6))
    assert found["small"].tolist() == [127] * 3
    assert (found["big"] > 2**61).all()
    assert found.dtypes.equals(frame.dtypes)


def test_a_model_in_double_precision_imputes_and_the_rows_follow_the_table(table):
    vae = table.vae(hidden=[4]).double()
    table.impute(vae, num_draws=3)
    assert table.to_datatree(vae, draws=2)["posterior"]["z"].dtype == "float64"
    double = table.without_rows().encode(mixed_frame()).double()
    assert double.x.dtype == torch.float64
    assert not dict(table.state_dict()), "the rows are no state of a model"


def test_parts_by_hand_are_those_of_the_one_line(table):
    net = networks.mlp([8])
    encoder = guides.FullRankNormal(len(table.names), 2, table.network(net))
    decoder = likelihoods.Columns(2, table.families(), table.output_network(net))
    vae = pv.VAE(priors.MixtureOfNormals(2, 3), encoder, decoder, table=table)
    fitted = pv.fit(vae.model, vae.guide, table, epochs=1)
    assert np.isfinite(fitted.history["elbo"]).all()
    with pytest.raises(ValueError, match=r"`vae` must be of 15 columns and no covariates"):
        table.impute(Table.from_frame(pv.datasets.penguins()).vae())
    with pytest.raises(ValueError, match=r"a table must have rows for this"):
        vae.table.impute(vae)


@pytest.mark.parametrize("name", ["wine", "diabetes", "breast_cancer", "iris"])
def test_tables_of_scikit_learn_need_no_decision(name):
    from sklearn import datasets

    frame = getattr(datasets, f"load_{name}")(as_frame=True).frame
    table = Table.from_frame(frame)
    assert_same(table.decode(table.x), frame)
    vae = table.vae(hidden=[8])
    fitted = pv.fit(vae.model, vae.guide, table, epochs=2, batch_size=100, lr=1e-2)
    assert np.isfinite(fitted.history["elbo"]).all()


def test_the_description_is_a_table_of_the_columns(table):
    lines = str(table).splitlines()
    assert lines[0] == "Table of 40 rows, 15 columns, 1.5% of entries missing"
    assert any(line.split() == ["size", "ordinal", "2.5%", "S", "<", "M", "<", "L"] for line in lines)
    assert ">categorical</td>" in table._repr_html_()


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [
        ([f"{2 * number}%" for number in range(30)], 2.0 * np.arange(30)),
        ([f"{1000 + 37 * number:,}" for number in range(30)], 1000.0 + 37 * np.arange(30)),
        ([f"${100 * number:,}.50" for number in range(30)], 0.5 + 100 * np.arange(30)),
        ([f"{number},5" for number in range(30)], 0.5 + np.arange(30)),
        (["7.5", "?", *map(str, range(28))], [7.5, np.nan, *range(28)]),
    ],
)
def test_the_conversion_that_an_error_states_gives_the_numbers(texts, numbers):
    frame = pd.DataFrame({"good": np.linspace(0, 1, 30), "a'b": texts})
    with pytest.raises(ValueError, match="numbers as text") as caught:
        Table.from_frame(frame)
    _, statement, *_ = str(caught.value).split("`frame[")
    code = "frame[" + statement.split("`")[0]
    exec(code, {"frame": frame, "pd": pd})
    np.testing.assert_allclose(frame["a'b"], numbers)
    assert Table.from_frame(frame).kinds["a'b"] in ("normal", "log_normal", "ordinal", "poisson", "negative_binomial")


@pytest.mark.parametrize(
    ("levels", "message", "mend"),
    [
        (["a", " a", "b"], "only in spaces, such as 'a' and ' a'", lambda texts: texts.str.strip()),
        (["Yes", "No", "yes"], "only in capital letters, such as 'Yes' and 'yes'", lambda texts: texts.str.lower()),
    ],
)
def test_levels_that_differ_only_in_spelling_are_refused_unless_the_kind_is_stated(levels, message, mend):
    frame = pd.DataFrame({"answer": levels * 5, "y": np.linspace(0, 1, 15)})
    with pytest.raises(ValueError, match=message):
        Table.from_frame(frame)
    assert len(Table.from_frame(frame, kinds={"answer": "categorical"}).columns[0].levels) == 3
    assert len(Table.from_frame(frame.assign(answer=mend(frame["answer"]))).columns[0].levels) == 2


@pytest.mark.parametrize("name", ["id", "ID", "RespondentID", "school_id", "user Id"])
def test_whole_numbers_with_the_name_of_an_identifier_need_a_decision(name):
    frame = pd.DataFrame({name: [3, 11, 7, 22, 5, 7] * 2, "y": np.linspace(0, 1, 12)})
    with pytest.raises(ValueError, match="name of an identifier"):
        Table.from_frame(frame)
    assert Table.from_frame(frame, kinds={name: "categorical"}).kinds[name] == "categorical"
    assert Table.from_frame(frame.rename(columns={name: "humid"})).kinds["humid"] != "categorical"


def test_texts_are_ordinal_only_in_a_stated_order():
    frame = pd.DataFrame({"often": ["Never", "Rarely", "Always"] * 4, "y": np.linspace(0, 1, 12)})
    with pytest.raises(ValueError, match=r"order is not known.*\['Always', 'Never', 'Rarely'\], ordered=True\)"):
        Table.from_frame(frame, kinds={"often": "ordinal"})
    frame["often"] = pd.Categorical(frame["often"], ["Never", "Rarely", "Always"], ordered=True)
    assert Table.from_frame(frame).columns[0].levels == ["Never", "Rarely", "Always"]


def test_dates_of_python_come_back_as_dates_also_where_they_were_missing():
    days = [datetime.date(2000, 1, 1) + datetime.timedelta(days=3 * number) for number in range(20)]
    frame = pd.DataFrame({"day": [None, *days[1:]], "y": np.linspace(0, 1, 20)})
    table = Table.from_frame(frame)
    assert table.decode(table.x)["day"].tolist()[1:] == days[1:]
    filled = table.impute(table.vae(latent=1, hidden=[4]), num_draws=10)["day"]
    assert filled.tolist()[1:] == days[1:]
    assert type(filled.iloc[0]) is datetime.date


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (pd.DataFrame({"often": pd.Categorical(["Never", "Rarely", "Always"] * 4)}), "pd.Categorical(frame['often'], "),
        (pl.DataFrame({"often": ["Never", "Rarely", "Always"] * 4}), "pl.Enum("),
        (pl.DataFrame({"often": pl.Series(["Never", "Rarely", "Always"] * 4, dtype=pl.Categorical)}), "pl.Enum("),
    ],
)
def test_the_order_of_the_alphabet_is_no_order_and_the_stated_code_keeps_all_levels(frame, code):
    with pytest.raises(ValueError, match="order is not known") as caught:
        Table.from_frame(frame, kinds={"often": "ordinal"})
    assert code in str(caught.value)
    line = str(caught.value).split("`")[-2].replace("['Always', 'Never', 'Rarely']", "['Never', 'Rarely', 'Always']")
    scope = {"frame": frame.copy() if isinstance(frame, pd.DataFrame) else frame, "pd": pd, "pl": pl}
    exec(line, scope)
    table = Table.from_frame(scope["frame"])
    assert table.kinds == {"often": "ordinal"}
    assert table.columns[0].levels == ["Never", "Rarely", "Always"]
    assert not table.x.isnan().any()


def test_a_zero_comes_back_without_a_sign():
    table = Table.from_frame(pd.DataFrame({"x": np.where(np.arange(40) % 3, np.sin(np.arange(40.0)), 0)}))
    assert not np.signbit(table.decode(table.x)["x"][table.decode(table.x)["x"] == 0]).any()


@pytest.mark.parametrize(
    "values",
    [[1, 2, 3, 9, 5] * 3, [9.0, 0.5, 12.0, 15.5] * 3, [80, 99, 60] * 4, [20.0, 999.0, *np.linspace(1, 40, 10)]],
)
def test_a_number_like_a_code_for_missing_entries_is_data_among_others_or_alone(values):
    assert one_bad(values).names == ["good", "bad"]
