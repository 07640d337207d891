"""The code of the documents runs and gives the numbers they show; their links, figures and reference are complete."""

import doctest
import importlib
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import pyro
import pytest

from pyro_vae._utils.rng import seeded

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
CODE = [page for page in PAGES if "notebooks" not in page.parts]  # test_notebooks.py runs the others
FIGURES = sorted((ROOT / "docs" / "figures").glob("*.py"))

BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^(```|~~~).*?^\1$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|<img[^>]*\ssrc=\"([^\"]+)\"")
PLOT = re.compile(r"^\.\. plot:: (\S+)$", re.MULTILINE)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """Return the blocks of code of a page: the language, the line on which the code starts, and the code."""
    text = page.read_text()
    return [(block[1], text.count("\n", 0, block.start(2)) + 1, block[2]) for block in BLOCK.finditer(text)]


def run_session(code: str, namespace: dict, page: str, line: int) -> None:
    """Run a block with prompts in ``namespace``, and fail if it prints something else than the page shows."""
    test = doctest.DocTestParser().get_doctest(code, {}, page, page, line - 1)
    assert test.examples, f"{page}, line {line}: a pycon block without a prompt"
    test.globs = namespace
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    runner.run(test, out=report.append, clear_globs=False)
    assert not report, "".join(report)


@pytest.mark.parametrize("page", [page for page in CODE if blocks(page)], ids=name)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # files of a page go there
    document = ModuleType("__document__")
    monkeypatch.setitem(sys.modules, "__document__", document)  # where the classes of the page can be found
    namespace = vars(document)
    with pyro.get_param_store().scope(), seeded(0), warnings.catch_warnings():
        warnings.simplefilter("error")
        for language, line, code in blocks(page):
            if language == "python":
                # Empty lines in front, so that a traceback has the line numbers of the page.
                exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
            else:
                run_session(code, namespace, str(page), line)


def test_a_session_shares_the_page_and_fails_with_its_line():
    namespace = {"a": 1}
    run_session(">>> b = a + 1\n>>> b, 0.123\n(2, 0.1...)\n", namespace, "page.md", 1)
    assert namespace["b"] == 2
    with pytest.raises(AssertionError, match=r'"page\.md", line 8, in page\.md(.|\n)*Expected:\s+3(.|\n)*Got:\s+2'):
        run_session(">>> b\n3\n", namespace, "page.md", 8)
    with pytest.raises(AssertionError, match="NameError"):
        run_session(">>> c\n", namespace, "page.md", 1)


@pytest.mark.parametrize("script", FIGURES, ids=lambda path: path.stem)
def test_figure_is_drawn(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pyro.get_param_store().scope(), seeded(0), warnings.catch_warnings(), plt.rc_context():
        warnings.simplefilter("error")
        runpy.run_path(str(script))
        assert len(plt.get_fignums()) == 1
        assert plt.gcf().axes
        plt.savefig(tmp_path / "figure.png")
        plt.close("all")


def test_every_figure_is_shown_once_with_alt_text_and_caption():
    shown = [(page.parent / path, page) for page in PAGES for path in PLOT.findall(page.read_text())]
    assert sorted(path for path, _ in shown) == FIGURES
    for path, page in shown:
        directive = page.read_text().partition(f".. plot:: figures/{path.name}\n")[2].partition("```")[0]
        assert re.match(r"   :alt: \S.{20,}\n\n   \S", directive), (
            f"{name(page)}: {path.name} lacks alt text or caption"
        )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_have_a_target(page):
    prose = FENCED.sub("", page.read_text())
    targets = [first or second for first, second in LINK.findall(prose)]
    relative = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [target for target in relative if target and not (page.parent / target).exists()]
    assert not missing


def test_dead_links_of_built_pages_are_found(tmp_path):
    script = [sys.executable, str(ROOT / "docs" / "check_links.py"), str(tmp_path)]
    index = '<h1 id="top"></h1><a href="#top"></a><a href="other.html#here"></a><a href="https://example.org/gone"></a>'
    (tmp_path / "index.html").write_text(index)
    (tmp_path / "other.html").write_text('<p id="here"></p><a href="index.html"></a>')
    good = subprocess.run(script, capture_output=True, text=True)
    assert (good.returncode, good.stdout) == (0, "")
    (tmp_path / "other.html").write_text('<a href="index.html#away"></a><img src="gone.png">')
    bad = subprocess.run(script, capture_output=True, text=True)
    assert bad.returncode == 1
    assert bad.stdout.splitlines() == [
        "index.html: nothing at other.html#here",
        "other.html: nothing at gone.png",
        "other.html: nothing at index.html#away",
    ]


def test_the_reference_describes_every_module_and_every_name_once(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    reference = importlib.import_module("reference")
    pages = {page.stem: reference.expand(page.read_text()) for page in sorted((ROOT / "docs" / "api").glob("*.md"))}
    lines = [line.split() for page in pages.values() for line in page.splitlines() if line.startswith(".. auto")]
    modules = [name for _, directive, name in lines if directive == "automodule::"]
    names = [name for _, directive, name in lines if directive != "automodule::"]
    expected = set(reference.modules_below("pyro_vae")) - {"pyro_vae", "pyro_vae.parts"}
    assert sorted(modules) == sorted(expected)
    assert len(names) == len(set(names)) > 100
    assert {"pyro_vae.VAE", "pyro_vae.fit", "pyro_vae.exact.log_evidence", "pyro_vae.parts.priors.Normal"} <= set(names)
    contents = (ROOT / "docs" / "api.md").read_text()
    assert not [page for page in pages if f"api/{page}" not in contents], "a page is not in the table of contents"


def test_the_pages_have_code():
    learn = {"maximum_likelihood", "reparameterisation", "kl", "posterior_and_prior", "losses"}
    use = {"index", "exact", "your_own"}
    assert {name(page) for page in PAGES if blocks(page)} >= {"README.md", *(f"docs/{page}.md" for page in learn | use)}


def test_lines_of_code_fit_a_screen():
    wide = [
        f"{name(page)}, line {start + number}"
        for page in PAGES
        for _, start, code in blocks(page)
        for number, line in enumerate(code.splitlines())
        if len(line) > 120
    ]
    assert not wide
