"""What the documents say runs, and what they point to is there."""

import re
import warnings
from pathlib import Path

import pyro
import pytest

from pyro_vae.randomness import seeded

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^(```|~~~).*?^\1$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|<img[^>]*\ssrc=\"([^\"]+)\"")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[int, str]]:
    """The python blocks of a page, each with the line on which its code starts."""
    text = page.read_text()
    return [(text.count("\n", 0, block.start(1)) + 1, block[1]) for block in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a page writes, it writes there
    namespace: dict = {"__name__": "__document__"}
    with pyro.get_param_store().scope(), seeded(0), warnings.catch_warnings():
        warnings.simplefilter("error")
        for line, code in blocks(page):
            # Empty lines in front, so that a traceback has the line numbers of the page.
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    prose = FENCED.sub("", page.read_text())
    targets = [first or second for first, second in LINK.findall(prose)]
    relative = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [target for target in relative if target and not (page.parent / target).exists()]
    assert not missing


def test_the_pages_hold_code():
    assert {name(page) for page in PAGES if blocks(page)} >= {"README.md", "docs/index.md", "docs/elbo.md"}
