"""The code of the notebooks runs in a short form: each cell, and the display of its last expression."""

import ast
import sys
import warnings
from pathlib import Path
from types import ModuleType

import jupytext
import matplotlib.pyplot as plt
import pyro
import pytest

from pyro_vae._utils.rng import seeded

pytestmark = pytest.mark.integration
FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
SHORT_FORMS = {
    "first_steps": {"epochs": 20, "draws": 50},
    "maximum_likelihood_to_vae": {"epochs": 20, "largest": 4},
    "discrete_latents": {"epochs": 20, "repeats": 60},
    "posterior_collapse": {"epochs": 4},
    "convolutional_images": {"epochs": 2, "size": 5},
    "colour_images": {"epochs": 1, "images": 200, "held_out": 60},
    "table_to_arviz": {"epochs": 30, "draws": 50},
    "single_cells": {"epochs": 3, "draws": 10, "genes": 60},
    "your_own_model": {"epochs": 30, "draws": 50},
    "world_model": {"sequences": 50, "epochs": 1, "draws": 5},
    "inverse_autoregressive": {"epochs": 2, "steps": 10},
    "reading_an_inspection": {"epochs": 5, "rows": 30, "simulations": 200},
    "attend_infer_repeat": {"scenes": 200, "epochs": 2},
    "modalities": {"epochs": 2, "samples": 5},
    "music": {"epochs": 1, "particles": 3},
    "anomalies": {"epochs": 2, "samples": 5, "refined": 10},
    "scenes": {"epochs": 1, "scenes": 96},
}
"""Values of the cell that is tagged ``parameters``, by notebook."""


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
    namespace, short = vars(document), SHORT_FORMS[path.stem]
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
    assert {path.stem for path in NOTEBOOKS} == set(SHORT_FORMS)
