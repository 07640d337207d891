"""The table of the documentation can be read again, and has a row for each program and a column for each capability."""

from programs import table
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
    assert "✓ 5.0×, 3 s" in page
    assert "1. `x` must be so\n2. `y`" in page
    assert "✓ right: 2, ○ runs: 1, – refused: 2, ✗ bug: 1." in page
