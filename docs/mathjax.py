"""MathJax next to the pages, so that formulas need no network."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

COMPONENT = "tex-svg-full.js"
"""TeX in, SVG out, with all extensions and glyphs in one file of 2 MB: it loads no other file."""

PATH = f"mathjax/{COMPONENT}"
"""The place of the component under ``_static``, for ``mathjax_path``."""

CONFIG = {"options": {"enableMenu": False}, "svg": {"fontCache": "local"}}
"""For ``mathjax3_config``: without the menu, whose entries load files that are not here."""


def source() -> Path:
    """Return the file of the installed package ``sphinx-mathjax-offline``.

    Raises:
        FileNotFoundError: if the package is not installed.
    """
    found = importlib.util.find_spec("sphinx-mathjax-offline")
    if found is None or found.origin is None:
        raise FileNotFoundError("the documentation needs MathJax: pip install 'pyro-vae[docs]'")
    return Path(found.origin).parent / "static" / "mathjax" / COMPONENT


def install(app: Any) -> None:
    """Copy MathJax into the pages that are built."""
    target = Path(app.outdir) / "_static" / PATH
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source(), target)
