"""The page of applications shows the runs that are kept, and each application is better than its simple baseline."""

import importlib
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"

SCRIPT = '''"""
An application
==============

A program that measures something.
"""

import argparse, json, pathlib
import matplotlib.pyplot as plt

# common.headline(
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=pathlib.Path)
parser.add_argument("--seed", type=int)
parser.add_argument("--folder")
args = parser.parse_args()
headline = {
    "quantity": "error", "unit": "nats", "value": 1.0 + args.seed, "baseline": 3.0 + 2 * args.seed,
    "baseline_name": "last frame", "higher_is_better": False, "published": "0.5 (a paper)", "differences": "more data",
}
(args.out / "results.json").write_text(json.dumps({"headlines": [headline]}))
figure, ax = plt.subplots()
ax.plot([1, 2])
figure.savefig(args.out / "line.png")
print("folder", args.folder)
print(f"Picture: {args.out}/line.png")
'''


@pytest.fixture
def applications(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("applications")


@pytest.fixture
def one(applications, monkeypatch, tmp_path):
    """The module, with one application in folders of its own."""
    for name in ("EXAMPLES", "RESULTS", "KEPT"):
        monkeypatch.setattr(applications, name, tmp_path / name)
    (tmp_path / "EXAMPLES").mkdir()
    for name, source in {"thing": SCRIPT, "common": "# common.headline(", "other": '"""No application."""'}.items():
        (tmp_path / "EXAMPLES" / f"{name}.py").write_text(source)
    return applications


def test_an_application_is_run_with_each_seed_and_what_the_page_shows_is_kept(one, tmp_path):
    assert one.names() == ["thing"]
    for seed in (0, 1):
        one.run("thing", seed, tmp_path)
    one.keep("thing", [0, 1])
    found = one.read("thing")
    assert found["headlines"][0]["value"] == [1.0, 2.0]
    assert {path.name for path in (one.KEPT / "thing").iterdir()} == {"run.json", "printed.txt", "line.png"}
    assert (one.KEPT / "thing" / "printed.txt").read_text() == f"folder {tmp_path}\n"
    # The differences 2 and 3 have the mean 2.5 and the standard error 0.5.
    assert one.advantage(found["headlines"][0]) == pytest.approx((2.5, 0.5))
    page = one.fill("<!-- applications: numbers -->\n<!-- end --><!-- applications: published -->\n<!-- end -->")
    assert (
        "[An application](examples/thing.md) | error, nats ↓ | 1.50 ± 0.50 | 4.0 ± 1.0, last frame | 2.5 ± 0.5" in page
    )
    assert "- **Error** (An application). Published: 0.5 (a paper). Differences: more data." in page
    assert one.fill(page) == page


def keep_headlines(one, headlines, seconds=60):
    """Keep headlines of the application as those of its runs."""
    (one.KEPT / "thing").mkdir(parents=True)
    found = {"headlines": headlines, "processor_seconds": [seconds, seconds]}
    (one.KEPT / "thing" / "run.json").write_text(json.dumps(found))


def headline(quantity, **changed):
    numbers = {"value": [1.0, 2.0], "baseline": [0.0, 0.0], "baseline_name": "zero"}
    texts = {"quantity": quantity, "unit": "%", "published": "none", "differences": "all"}
    return numbers | texts | {"higher_is_better": True} | changed


def test_the_table_shows_the_better_direction_the_same_quantity_once_and_the_time_of_all_seeds(one):
    lower = headline("error", higher_is_better=False, baseline=[3.0, 3.0])
    keep_headlines(one, [headline("accuracy"), headline("accuracy", baseline_name="half"), lower], seconds=90)
    _, _, *rows, _, last = one.numbers().splitlines()
    assert [row.split(" | ")[1].strip() for row in rows] == ["accuracy, % ↑", "", "error, % ↓"]
    assert [row.split(" | ")[2].strip() for row in rows] == ["1.50 ± 0.50", "", "1.50 ± 0.50"]
    assert ["half" in row for row in rows] == [False, True, False]
    assert [row.split(" | ")[-1].strip(" |") for row in rows] == ["1.5", "", ""]
    assert last == "All runs of all seeds together take 3 minutes of one processor."


def test_a_published_figure_that_several_quantities_share_is_listed_once(one):
    other = headline("length", published="7 (a paper)")
    keep_headlines(one, [headline("accuracy"), headline("accuracy", baseline_name="half"), headline("error"), other])
    assert one.published().splitlines() == [
        "- **Accuracy; error** (An application). Published: none. Differences: all.",
        "- **Length** (An application). Published: 7 (a paper). Differences: all.",
    ]


def test_a_run_is_repeated_only_if_the_example_has_changed(one):
    one.run("thing", 0, None)
    record = one.RESULTS / "thing" / "seed_0" / "run.json"
    first = record.read_text()
    one.run("thing", 0, None)
    assert record.read_text() == first
    (one.EXAMPLES / "thing.py").write_text(SCRIPT + "print(1)\n")
    one.run("thing", 0, None)
    assert json.loads(record.read_text())["digest"] == one.digest("thing") != json.loads(first)["digest"]


def test_a_run_that_fails_is_an_error_with_its_last_lines_and_is_not_kept(one):
    (one.EXAMPLES / "thing.py").write_text("common.headline(\n")  # a syntax error
    with pytest.raises(RuntimeError, match=r"thing\.py .* failed:[\s\S]*SyntaxError"):
        one.run("thing", 0, None)
    assert not (one.RESULTS / "thing" / "seed_0" / "run.json").exists()


def test_headlines_of_other_seeds_must_be_the_same_quantity(one):
    lines = [{"quantity": name, "value": 1.0, "baseline": 0.0} for name in ("error", "accuracy")]
    with pytest.raises(ValueError, match=r"`headlines` must be the same for all seeds, got .*error.*accuracy"):
        one.merged(tuple(lines))


def test_numbers_are_shown_with_two_digits_of_their_error(applications):
    assert applications.with_error([96.91, 97.53, 97.22]) == "97.22 ± 0.18"
    assert applications.with_error([-100.0, -120.0]) == "-110 ± 10"
    assert applications.with_error([0.5, 0.5]) == "0.5", "the same for all seeds has no error over seeds"


def test_the_page_is_that_of_the_runs_that_are_kept(applications):
    text = applications.PAGE.read_text()
    assert applications.fill(text) == text, "python docs/applications.py writes it"
    assert {found[2] for found in applications.FRAGMENT.finditer(text)} == set(applications.FRAGMENTS)
    shown = set(re.findall(r"\(examples/(\w+)\.md\)", text)) - {"index"}
    assert shown == set(applications.kept_names())


def test_each_application_is_better_than_its_baseline_by_more_than_the_standard_error(applications):
    for name in applications.kept_names():
        for found in applications.read(name)["headlines"]:
            mean, error = applications.advantage(found)
            assert mean > error, f"{name}: {found['quantity']}"
            assert len(found["value"]) == 3


def test_pictures_that_are_kept_are_small(applications):
    assert not [path for path in applications.KEPT.glob("*/*.png") if path.stat().st_size > 300_000]
