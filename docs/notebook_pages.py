"""The notebooks: text files that myst-nb runs while the pages are built, each with a download."""

from pathlib import Path
from typing import Any

import jupytext

FOLDER = Path(__file__).parent / "notebooks"
DOWNLOADS = "_build/notebooks"

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
    "translation": {"steps": 5, "epochs": 1, "samples": 5},
    "sentences": {"epochs": 2, "samples": 5},
    "disentangling": {"epochs": 2, "images": 200},
    "dream_control": {"starts": 50, "epochs": 2, "practice": 1},
}
"""Values of the cell that is tagged ``parameters``, by notebook, for tests and quick builds."""


def names() -> list[str]:
    """Return the names of the notebooks."""
    return sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "index")


def spread(app: Any, env: Any, pages: list[str]) -> None:
    """Spread the notebooks evenly over the pages that are to be read.

    Sphinx gives each process a piece of the list. In alphabetical order one piece has all notebooks, and the other
    processes wait for it.
    """
    notebooks = [page for page in pages if page in {f"notebooks/{name}" for name in names()}]
    others = [page for page in pages if page not in notebooks]
    count = len(notebooks)
    ends = [len(others) * number // count for number in range(1, count + 1)]
    pieces = zip(notebooks, [0, *ends], ends, strict=False)
    pages[:] = [page for notebook, start, end in pieces for page in (notebook, *others[start:end])] or others


def write_downloads(app: Any) -> None:
    """Write each notebook as an ``.ipynb`` file without outputs."""
    folder = FOLDER.parent / DOWNLOADS
    folder.mkdir(parents=True, exist_ok=True)
    for name in names():
        jupytext.write(jupytext.read(FOLDER / f"{name}.md"), folder / f"{name}.ipynb")


def setup(app: Any) -> None:
    """Shorten the notebooks if the configuration says ``short_notebooks``; pages of the other form are built again."""
    app.add_config_value("short_notebooks", False, "env", bool)
    app.connect("source-read", shorten)


def shorten(app: Any, page: str, source: list[str]) -> None:
    """Give the parameters of a notebook the values of its short form, if the configuration says so."""
    folder, _, name = page.rpartition("/")
    if app.config.short_notebooks and folder == "notebooks" and name in SHORT_FORMS:
        notebook = jupytext.reads(source[0], "md:myst")
        [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        cell.source += "".join(f"\n{parameter} = {value}" for parameter, value in SHORT_FORMS[name].items())
        source[0] = jupytext.writes(notebook, "md:myst")


def add_download(app: Any, page: str, source: list[str]) -> None:
    """Put a link to the download below the title of a notebook's page."""
    folder, _, name = page.rpartition("/")
    if folder == "notebooks" and name in names():
        before, title, after = source[0].partition("\n# ")
        heading, _, text = after.partition("\n")
        link = f"{{download}}`Download this notebook </{DOWNLOADS}/{name}.ipynb>`"
        source[0] = f"{before}{title}{heading}\n\n{link}\n{text}"
