"""The code of the notebooks runs in a short form: each cell, and the display of its last expression."""

import ast
import importlib
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jupytext
import matplotlib.pyplot as plt
import pyro
import pytest
from sphinx.application import Sphinx

from pyro_vae._utils.rng import seeded

pytestmark = pytest.mark.integration
FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
sys.path.append(str(FOLDER.parent))
try:
    notebook_pages = importlib.import_module("notebook_pages")
finally:
    sys.path.remove(str(FOLDER.parent))


def name(path: Path) -> str:
    return path.stem


NOTEBOOKS = sorted(set(FOLDER.glob("*.md")) - {FOLDER / "index.md"})


def cells(path: Path) -> list:
    return [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]


def run(code: str, namespace: dict, place: str) -> None:
    """Run a cell as a notebook does: the value of its last expression is displayed, if no semicolon ends it."""
    body = ast.parse(code).body
    shown = body.pop() if body and isinstance(body[-1], ast.Expr) and not code.rstrip().endswith(";") else None
    exec(compile(ast.Module(body, []), place, "exec"), namespace)
    if isinstance(shown, ast.Expr):
        value = eval(compile(ast.Expression(shown.value), place, "eval"), namespace)
        for display in ("__repr__", "_repr_html_"):
            assert len(getattr(value, display, str)() or "") < 20_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_runs_in_a_short_form(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # files of a notebook go there
    document = ModuleType("__notebook__")
    monkeypatch.setitem(sys.modules, "__notebook__", document)
    namespace, short = vars(document), notebook_pages.SHORT_FORMS[path.stem]
    with pyro.get_param_store().scope(), seeded(0), warnings.catch_warnings(), plt.rc_context():
        warnings.simplefilter("error")
        for number, cell in enumerate(cells(path)):
            run(cell.source, namespace, f"{path.name}, code cell {number}")
            if "parameters" in cell.metadata.get("tags", []):
                assert short.keys() <= namespace.keys(), "a parameter of the short form is not in the notebook"
                namespace.update(short)
            plt.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_has_one_title_parameters_and_no_stored_output(path):
    notebook = jupytext.read(path)
    titles = [line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    assert sum(line.startswith("# ") for line in titles) == 1
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells(path)) == 1
    assert not any(cell.get("outputs") for cell in cells(path))


def test_every_notebook_has_a_short_form():
    assert {path.stem for path in NOTEBOOKS} == set(notebook_pages.SHORT_FORMS)


def configured(**config):
    return SimpleNamespace(config=SimpleNamespace(**config))


def test_a_full_build_changes_no_parameters():
    source = ["unread"]
    notebook_pages.shorten(configured(short_notebooks=False), "notebooks/music", source)
    assert source == ["unread"]


def test_pages_of_a_quick_build_are_built_again_by_a_full_one(tmp_path, monkeypatch):
    """Their sources are the same, so that Sphinx would keep the pages, with the numbers of a few steps."""
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "index.md").write_text("# Pages\n\n```{toctree}\nnotebooks/music\n```\n")
    cell = "```{code-cell} ipython3\n:tags: [parameters]\n\nepochs = 40\nparticles = 50\n```\n"
    (tmp_path / "notebooks" / "music.md").write_text(f"---\njupytext:\n  format_name: myst\n---\n\n# Music\n\n{cell}")

    def build(short):
        options = {"extensions": ["myst_nb", "notebook_pages"], "short_notebooks": short, "nb_execution_mode": "off"}
        out = str(tmp_path / "out")
        app = Sphinx(str(tmp_path), None, out, f"{out}/doctrees", "html", options, status=None, warning=None)
        app.build()
        return "epochs = 1" in re.sub("<[^>]*>", "", (tmp_path / "out" / "notebooks" / "music.html").read_text())

    assert [build(short) for short in (False, True, True, False)] == [False, True, True, False]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_quick_build_changes_the_parameters_to_those_of_the_short_form_alone(path):
    source = [path.read_text(encoding="utf-8")]
    notebook_pages.shorten(configured(short_notebooks=True), f"notebooks/{path.stem}", source)
    ours, theirs = ([cell.source for cell in found.cells] for found in (jupytext.reads(source[0]), jupytext.read(path)))
    [(one, other)] = [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]
    short, full = {}, {}
    exec(one, short)
    exec(other, full)
    assert short.keys() == full.keys()
    assert {key: short[key] for key in full if short[key] != full[key]} == notebook_pages.SHORT_FORMS[path.stem]
