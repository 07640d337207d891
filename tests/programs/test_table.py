"""The table of the documentation can be read again, and has a row for each program and a column for each capability."""

import time
from contextlib import suppress

import pytest

from programs import harness, table
from programs.harness import Cell


def test_what_is_written_is_read_again():
    found = {
        "vae": {"fit": Cell("right", "-ELBO"), "compile": Cell("right", "5.0×, 3 s"), "exact": Cell("runs")},
        "hmm": {
            "fit": Cell("bug"),
            "compile": Cell("refused", "`x` must be so, got a"),
            "exact": Cell("refused", "`y`"),
        },
    }
    page = table.written(found)
    assert table.statuses(page) == table.statuses_of(found)
    marks = "| mark |\n|---|\n| ✓ |\n"
    assert table.statuses(f"{marks}{table.BEGIN}\n{page}") == table.statuses_of(found)
    assert "✓ 5.0×, 3 s" in page
    assert "1. `x` must be so\n2. `y`" in page
    assert "✓ right: 2, ○ runs: 1, – refused: 2, ✗ bug: 1." in page


def test_the_page_has_each_program_and_capability():
    page = table.statuses(table.PAGE.read_text())
    assert list(page) == harness.NAMES
    assert all(list(row) == list(harness.CAPABILITIES) for row in page.values())


def test_the_page_has_no_faults_and_few_refusals():
    cells = [status for row in table.statuses(table.PAGE.read_text()).values() for status in row.values()]
    assert "bug" not in cells
    assert cells.count("refused") <= 0.1 * len(cells)


def test_a_cell_without_end_is_stopped_also_where_errors_are_caught(monkeypatch):
    def never_ends(_):
        while True:
            with suppress(Exception):
                time.sleep(0.01)

    monkeypatch.setattr(harness, "SECONDS", 0.2)
    cell = harness.run(never_ends, None)
    assert cell.status == "bug"
    assert cell.note.startswith("TooSlowError: more than 0.2 s")


FAST = {
    "hmm": ["SVI", "log_evidence", "exact"],
    "survival": ["SVI", "to_datatree", "log_evidence"],
    "factor_analysis": ["SVI", "to_datatree", "log_evidence", "exact", "decompose"],
}


@pytest.mark.parametrize("name", FAST)
def test_the_page_is_what_is_found(name):
    found = harness.examine(name, {column: harness.CAPABILITIES[column] for column in FAST[name]})
    page = table.statuses(table.PAGE.read_text())[name]
    assert {column: cell.status for column, cell in found.items()} == {column: page[column] for column in FAST[name]}


@pytest.mark.slow
@pytest.mark.parametrize("name", harness.NAMES)
def test_the_whole_page_is_what_is_found(name):
    found = harness.examine(name)
    page = table.statuses(table.PAGE.read_text())[name]
    measured = {column: status for column, status in page.items() if status != "unmeasured"}
    assert {column: found[column].status for column in measured} == measured, found
