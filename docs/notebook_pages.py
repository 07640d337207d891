"""The notebooks: text files that myst-nb runs while the pages are built, each with a download."""

from pathlib import Path
from typing import Any

import jupytext

FOLDER = Path(__file__).parent / "notebooks"
DOWNLOADS = "_build/notebooks"


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


def add_download(app: Any, page: str, source: list[str]) -> None:
    """Put a link to the download below the title of a notebook's page."""
    folder, _, name = page.rpartition("/")
    if folder == "notebooks" and name in names():
        before, title, after = source[0].partition("\n# ")
        heading, _, text = after.partition("\n")
        link = f"{{download}}`Download this notebook </{DOWNLOADS}/{name}.ipynb>`"
        source[0] = f"{before}{title}{heading}\n\n{link}\n{text}"
