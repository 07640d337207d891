"""The table of a sweep: means and errors over seeds and rows, against simulations and sums by hand."""

import math

import numpy as np
import pytest
import xarray as xr

from pyro_vae.sweeps.result import Sweep, paired_error
from pyro_vae.sweeps.run import Run, Task, folder_of
from pyro_vae.sweeps.space import Space


@pytest.fixture
def stored(tmp_path):
    """A function that stores runs by their rows, ``(settings, seeds, N)``, and compares them."""
    task = Task(len, Space({"a": range(9)}), (), (), {}, 1, 1.0, tmp_path)

    def store(rows, statuses=None, with_rows=True):
        runs = []
        for a, each in enumerate(rows):
            runs.append([])
            for seed, values in enumerate(each):
                status = "complete" if statuses is None else statuses[a][seed]
                folder = folder_of(tmp_path, {"a": a}, seed)
                run = Run(
                    {"a": a}, seed, status, "bad" if status == "failed" else "", folder=folder, epochs=2, seconds=0.5
                )
                if status == "complete":
                    run.elbo = float(np.mean(values))
                run.save()
                (folder / "elbo.npy").unlink(missing_ok=True)
                if with_rows and status == "complete":
                    np.save(folder / "elbo.npy", values)
                lines = [
                    [epoch, {"elbo": -3.0, "validation_elbo": float(np.mean(values)) - 2 + epoch}] for epoch in (1, 2)
                ]
                (folder / "history.jsonl").write_text("".join(f"\n{line}\n" for line in lines).replace("'", '"'))
                runs[-1].append(Run.load(folder, {"a": a}, seed))
        return Sweep.of(runs, range(len(rows[0])), task)

    return store


def test_the_error_is_that_of_new_seeds_and_new_rows():
    """Differences with random effects of seeds, rows and both: the squared error is that of the mean, on average."""
    rng, seeds, rows, repeats, mean = np.random.default_rng(0), 4, 30, 4000, 0.3
    found, squares = [], []
    for _ in range(repeats):
        effects = (
            rng.normal(size=(seeds, 1)) * 0.5 + rng.normal(size=(1, rows)) * 1.0 + rng.normal(size=(seeds, rows)) * 2.0
        )
        found.append((mean + effects).mean())
        squares.append(paired_error(mean + effects) ** 2)
    exact = 0.5**2 / seeds + 1.0**2 / rows + 2.0**2 / (seeds * rows)
    assert np.mean(squares) == pytest.approx(exact, rel=0.06)
    assert np.var(found) == pytest.approx(exact, rel=5 * math.sqrt(2 / repeats))


@pytest.mark.parametrize("shape", [(1, 40), (5, 1)])
def test_with_one_seed_or_one_column_the_error_is_that_of_a_mean(shape):
    values = np.random.default_rng(1).normal(size=shape)
    assert paired_error(values) == pytest.approx(values.std(ddof=1) / values.size**0.5)
    assert math.isnan(paired_error(np.zeros((1, 1))))


def test_the_table_is_sorted_and_compares_in_pairs_by_row_and_seed(stored):
    rng = np.random.default_rng(0)
    hard = rng.normal(size=(1, 1, 50)) * 10  # what all models find hard
    rows = hard + np.array([-3.0, -1.0, -2.0])[:, None, None] + 0.1 * rng.normal(size=(3, 2, 50))
    result = stored(rows)
    table = result.table
    assert table["a"].tolist() == [1, 2, 0]
    assert result.best == {"a": 1}
    means = rows.mean(2)
    assert table["elbo"].to_numpy() == pytest.approx(means.mean(1)[[1, 2, 0]])
    assert table["standard_error"].to_numpy() == pytest.approx((abs(means[:, 0] - means[:, 1]) / 2)[[1, 2, 0]])
    assert table["difference"].tolist() == [0, *(means.mean(1)[[2, 0]] - means.mean(1)[1])]
    assert table["difference_error"].tolist()[1:] == pytest.approx([paired_error(rows[a] - rows[1]) for a in (2, 0)])
    assert (table["difference_error"][1:] < 0.1).all()  # and not of the size of the rows
    assert table["paired_by"].tolist() == ["", "row, seed", "row, seed"]
    assert table[["epochs", "seconds"]].to_numpy().tolist() == [[4, 1.0]] * 3


def test_without_rows_the_seeds_are_the_pairs_and_with_one_seed_the_rows(stored):
    rows = np.random.default_rng(0).normal(size=(2, 3, 4))
    table = stored(rows, with_rows=False).table
    means = rows.mean(2)
    best = int(means.mean(1).argmax())
    error = (means[1 - best] - means[best]).std(ddof=1) / 3**0.5
    assert (table["paired_by"][1], table["difference_error"][1]) == ("seed", pytest.approx(error))
    rows = rows[:, :1]
    table = stored(rows).table
    assert np.isnan(table["standard_error"]).all()
    error = (rows[0, 0] - rows[1, 0]).std(ddof=1) / 2
    assert (table["paired_by"][1], table["difference_error"][1]) == ("row", pytest.approx(error))
    table = stored(rows, with_rows=False).table
    assert (table["paired_by"][1], math.isnan(table["difference_error"][1])) == ("", True)


def test_settings_that_did_not_complete_have_no_elbo_and_come_last_with_their_reason(stored):
    rows = np.array([[[5.0, 5.0]] * 2, [[4.0, 4.0]] * 2, [[1.0, 2.0]] * 2, [[9.0, 9.0]] * 2])
    done, begun = ["complete", "complete"], ["stopped", "unfinished"]
    result = stored(rows, [["complete", "failed"], begun, done, begun])
    table = result.table
    assert table["a"].tolist() == [2, 3, 1, 0]
    assert table["status"].tolist() == ["complete", "stopped", "stopped", "failed"]
    assert table["elbo"].isna().tolist() == [False, True, True, True]
    assert table["validation_elbo"].tolist() == [1.5, 9.0, 4.0, 5.0]
    assert table["message"].tolist() == ["", "", "", "bad"]
    assert "8 runs, of which 2 stopped, 1 failed, 2 unfinished" in repr(result)
    assert "best held-out ELBO 1.500 ± 0.000 nats per datum with a 2" in repr(result)
    page = result._repr_html_()
    assert "bad" in page
    assert page.count("stopped") >= 2


def test_everything_is_in_the_tree_and_comes_back_from_a_file(stored, tmp_path):
    rows = np.random.default_rng(0).normal(size=(3, 2, 7))
    result = stored(rows, [["complete"] * 2, ["complete"] * 2, ["stopped", "unfinished"]])
    result.to_datatree().to_netcdf(tmp_path / "sweep.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "sweep.nc", engine="h5netcdf") as tree:
        order = [runs[0].settings["a"] for runs in result.runs]
        assert tree["settings"]["a"].values.tolist() == order
        assert tree["settings"]["status"].values.tolist() == ["complete", "complete", "stopped"]
        np.testing.assert_array_equal(tree["rows"]["elbo"].values[:2], rows[order[:2]])
        assert np.isnan(tree["rows"]["elbo"].values[2]).all()
        assert tree["training"]["validation_elbo"].dims == ("setting", "seed", "epoch")
        np.testing.assert_allclose(tree["runs"]["elbo"].values[:2], rows.mean(2)[order[:2]])
        assert tree["settings"]["text"].values.tolist() == [f"a {a}" for a in order]


def test_rows_of_the_table_are_found_by_number_or_settings(stored):
    result = stored(np.zeros((2, 1, 3)))
    for wrong in (2, {"a": 8}):
        with pytest.raises(ValueError, match="`settings` must be"):
            result.load(wrong)
    with pytest.raises(ValueError, match=r"`seed` must be one of \[0\], got 5"):
        result.load(0, seed=5)
