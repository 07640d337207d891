"""Data of every common form become the same tensors, with the names of rows and columns; rows are read on demand."""

import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pairs import gaussian
from scipy import sparse
from torch.utils.data import Dataset, Subset, TensorDataset

import pyro_vae as pv
from pyro_vae._utils.data import DataTensors, LazyData, data_tensors

ARRAY = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
X = torch.from_numpy(ARRAY)
VAE = gaussian()


class Squares(Dataset):
    """Rows that are computed when they are read; ``read`` has their numbers."""

    def __init__(self, count=9):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        if not 0 <= number < self.count:
            raise IndexError(number)
        self.read.append(number)
        return np.array([number, number**2, 1.0]), number


class Table:
    """An object of the user that is data."""

    def __init__(self, x):
        self.x = x

    def to_data(self):
        return self.x, DataTensors([torch.ones(len(self.x))])


def mapped(folder, array):
    np.save(folder / "x.npy", array)
    return np.load(folder / "x.npy", mmap_mode="r")


FORMS = {
    "an array": ARRAY,
    "doubles": ARRAY.astype(np.float64),
    "halves and back": ARRAY.astype(np.float64).astype(">f8"),
    "long doubles": ARRAY.astype(np.longdouble),
    "an array of another order": np.asfortranarray(ARRAY),
    "a reversed view": ARRAY[::-1].copy()[::-1],
    "an array without a mask": np.ma.masked_array(ARRAY),
    "a frame": pd.DataFrame(ARRAY),
    "a frame of several dtypes": pd.DataFrame(ARRAY).astype({0: "Float64", 1: "float64"}),
    "a frame of pyarrow": pd.DataFrame(ARRAY).convert_dtypes(),
    "a frame of polars": pl.DataFrame(ARRAY),
    "a sparse matrix": sparse.csr_matrix(ARRAY),
    "a sparse array by columns": sparse.csc_array(ARRAY.astype(np.float64)),
    "a data set of the package": pv.datasets.Dataset(X, torch.zeros(7)),
    "a data set": TensorDataset(X),
    "a subset": Subset(TensorDataset(torch.cat([X, X])), range(7)),
    "a sequence": [ARRAY],
    "an object": Table(ARRAY),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_tensor(form):
    found = data_tensors(FORMS[form], "data", VAE.model)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], X, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_exact_evidence(form):
    data = FORMS[form].x if form == "an object" else FORMS[form]
    assert torch.allclose(pv.exact.log_evidence(VAE.model, data), pv.exact.log_evidence(VAE.model, X), atol=1e-5)


def test_floats_get_the_dtype_of_the_model_and_tensors_keep_theirs():
    double = gaussian().double()
    assert data_tensors(ARRAY, "data", double.model)[0].dtype == torch.float64
    assert data_tensors(ARRAY.astype(np.float64), "data", lambda x: None)[0].dtype == torch.float32
    assert data_tensors(X.double(), "data", VAE.model)[0].dtype == torch.float64
    torch.set_default_dtype(torch.float64)
    try:
        assert data_tensors(ARRAY, "data", lambda x: None)[0].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int64", "bool"])
def test_integers_become_floats_for_a_vae_and_stay_for_a_transform_or_a_pair_of_the_user(dtype):
    array = np.arange(6).reshape(3, 2).astype(dtype)
    for form in (array, pd.DataFrame(array), sparse.csr_matrix(array)):
        assert data_tensors(form, "data", VAE.model)[0].dtype == torch.float32
    assert not data_tensors(array, "data", lambda x: None)[0].is_floating_point()
    for form in (array, sparse.csr_matrix(array), *([pd.DataFrame(array), pl.DataFrame(array)] * (dtype != "bool"))):
        kept = data_tensors(form, "data", VAE.model, keep_integers=True)[0]
        assert not kept.is_floating_point()
        assert torch.equal(kept.long(), torch.from_numpy(array.astype(np.int64)))


def test_what_is_missing_is_nan():
    expected = torch.tensor([[1.0, np.nan], [np.nan, 2.0]])
    forms = [
        np.ma.masked_array([[1.0, 9.0], [9.0, 2.0]], [[False, True], [True, False]]),
        pd.DataFrame({"a": [1.0, None], "b": [np.nan, 2.0]}),
        pd.DataFrame({"a": pd.array([1, pd.NA], dtype="Int64"), "b": pd.array([pd.NA, 2.0], dtype="Float32")}),
        pl.DataFrame({"a": [1, None], "b": [None, 2.0]}),
        pl.DataFrame({"a": [1.0, float("nan")], "b": [None, 2.0]}),
    ]
    for form in forms:
        assert torch.equal(data_tensors(form, "data")[0].nan_to_num(-1.0), expected.nan_to_num(-1.0))


def test_booleans_of_frames_are_zeros_and_ones():
    for frame in (
        pd.DataFrame({"a": [True, False]}),
        pl.DataFrame({"a": [True, False]}),
        pd.DataFrame({"a": pd.array([True, False], dtype="boolean")}),
    ):
        assert data_tensors(frame, "data")[0].tolist() == [[1.0], [0.0]]


def test_series_are_arguments_of_one_number_per_row():
    for series in (pd.Series([1, 2], index=["a", "b"], name="c"), pl.Series("c", [1, 2])):
        found = data_tensors((torch.zeros(2, 3), series), "data")
        assert found[1].tolist() == [1.0, 2.0]
        assert found.columns == (None, None)


@given(
    hnp.arrays(
        np.float64, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=st.floats(-1e6, 1e6) | st.just(np.nan)
    )
)
@settings(max_examples=50, deadline=None)
def test_frames_sparse_matrices_and_arrays_agree(array):
    expected = torch.from_numpy(array).float()
    names = [f"c{number}" for number in range(array.shape[1])]
    for form in (array, pd.DataFrame(array, columns=names), pl.DataFrame(array, names), sparse.csr_matrix(array)):
        assert torch.equal(data_tensors(form, "data")[0].nan_to_num(7.0), expected.nan_to_num(7.0))


def test_an_array_of_the_right_dtype_is_not_copied_and_others_give_no_warning(tmp_path):
    array = ARRAY.copy()
    assert data_tensors(array, "data")[0].data_ptr() == array.ctypes.data
    array.flags.writeable = False
    with warnings.catch_warnings(action="error"):
        assert torch.equal(data_tensors(array, "data")[0], X)
        file = mapped(tmp_path, ARRAY)
        assert data_tensors(file, "data")[0].data_ptr() == file.ctypes.data
        assert isinstance(data_tensors(mapped(tmp_path, ARRAY.astype(np.float64)), "data", lazy=True), LazyData)


@pytest.mark.parametrize("make", [lambda folder: mapped(folder, ARRAY.astype(np.float64)),
                                  lambda folder: sparse.csr_array(ARRAY)])  # fmt: skip
def test_rows_on_demand_are_those_of_the_whole(make, tmp_path):
    lazy = data_tensors((make(tmp_path), torch.arange(7)), "data", lazy=True)
    assert isinstance(lazy, LazyData)
    assert lazy[0].shape == X.shape
    assert lazy[0].untyped_storage().nbytes() == 3 * 4
    rows, numbers = lazy.rows(torch.tensor([5, 0]))
    torch.testing.assert_close(rows, X[[5, 0]])
    assert numbers.tolist() == [5, 0]
    torch.testing.assert_close(lazy.whole()[0], X)


def test_infinities_are_found_wherever_they_are(tmp_path):
    array = ARRAY.astype(np.float64)
    array[5, 2] = np.inf
    for form in (array, mapped(tmp_path, array), sparse.csr_matrix(array), sparse.csc_matrix(array), Subset(
        TensorDataset(torch.from_numpy(array).float()), range(7))):  # fmt: skip
        with pytest.raises(ValueError, match=r"`data` must hold finite numbers, got inf at row 5, column \(2,\)"):
            data_tensors(form, "data")


def test_a_data_set_is_read_row_by_row_and_checked_at_its_first_rows():
    squares = Squares(1000)
    lazy = data_tensors(squares, "data", VAE.model, lazy=True)
    assert set(squares.read) == set(range(256))
    rows, numbers = lazy.rows(torch.tensor([999, 3]))
    assert rows.tolist() == [[999.0, 999.0**2, 1.0], [3.0, 9.0, 1.0]]
    assert (rows.dtype, numbers.dtype) == (torch.float32, torch.float32)
    assert data_tensors(squares, "data", keep_integers=True, lazy=True).rows(torch.tensor([4]))[1].dtype == torch.int64


def test_the_error_of_a_data_set_is_kept_with_the_rows():
    lazy = data_tensors(Squares(), "data", lazy=True)
    with pytest.raises(IndexError, match="9") as caught:
        lazy.rows(torch.tensor([8, 9]))
    assert caught.value.__notes__ == ["`data`: the data set raised this at one of the rows [8, 9]"]


def test_rows_on_demand_of_more_than_a_gigabyte_are_not_read_at_once():
    with pytest.raises(ValueError, match=r"`data` must take at most 1 GiB of memory.*got 100000 rows of 1.12 GiB"):
        data_tensors(sparse.csr_matrix((100_000, 3_000), dtype=np.float32), "data")


def test_names_of_rows_and_columns_are_kept():
    index = pd.MultiIndex.from_tuples([("a", 1), ("b", 2)])
    frame = pd.DataFrame({"u": [1.0, 2.0], "v": [3.0, 4.0]}, index=index)
    found = data_tensors((frame, frame["u"]), "data")
    assert found.row_labels.tolist() == ["a, 1", "b, 2"]
    assert (found.columns[0][0], found.columns[0][1].tolist(), found.columns[1]) == ("column", ["u", "v"], None)
    assert data_tensors(frame.reset_index(drop=True), "data").row_labels is None
    assert data_tensors(frame.set_axis([5, 9]), "data").row_labels.tolist() == [5, 9]
    dates = pd.date_range("2020-01-01", periods=2)
    assert (data_tensors(frame.set_axis(dates), "data").row_labels == dates.to_numpy()).all()
    assert data_tensors(frame.set_axis(dates.tz_localize("UTC")), "data").row_labels[0].startswith("2020-01-01 00")
    assert data_tensors(frame.rename_axis(columns="gene"), "data").columns[0][0] == "gene"


def test_a_package_that_reads_other_frames_is_named_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "narwhals.stable.v1", None)
    with pytest.raises(ImportError, match=r"`data` needs the package narwhals.*pip install 'pyro_vae\[frames\]'"):
        data_tensors(pl.DataFrame({"a": [1.0]}), "data")
    assert data_tensors(pd.DataFrame({"a": [1.0]}), "data")[0].tolist() == [[1.0]]


def test_frames_are_no_import_of_the_package():
    code = "import sys, torch; from pyro_vae._utils.data import data_tensors; data_tensors(torch.zeros(2), 'data');"
    code += " print(*{'pandas', 'polars', 'narwhals', 'scipy.sparse'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
