"""The code of the documents runs and gives the numbers they show; their links, figures and reference are complete."""

import doctest
import importlib
import json
import pkgutil
import posixpath
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pyro
import pytest

from pyro_vae._utils.rng import seeded

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = [DOCS / "_build", DOCS / "examples"]
PAGES = [page for page in PAGES if not any(map(page.is_relative_to, GENERATED))]
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


SCRIPTS = {
    "good": "plt.subplots()",
    "warns": "plt.subplots(); import warnings; warnings.warn('odd')",
    "two": "plt.subplots(); plt.subplots()",
    "empty": "plt.figure()",
    "fails": "1 / 0",
}
FAULTS = {
    "warns": "UserWarning: odd",
    "two": "leaves 2",
    "empty": "leaves 1 without axes",
    "fails": "ZeroDivisionError",
}


def test_a_figure_that_warns_or_is_none_is_a_fault_of_the_pages(tmp_path):
    """Sphinx runs the scripts of all figures in `make docs`, with its warnings as errors; here it runs some."""
    figures = 'extensions = ["matplotlib.sphinxext.plot_directive"]\nplot_formats = [("png", 50)]\n'
    checks = f"import sys\nsys.path.insert(0, {str(DOCS)!r})\nimport figure_checks\n"
    (tmp_path / "conf.py").write_text(f"{figures}{checks}def setup(app):\n    figure_checks.install()\n")
    (tmp_path / "index.rst").write_text("Page\n====\n\n" + "".join(f".. plot:: {each}.py\n\n" for each in SCRIPTS))
    for each, script in SCRIPTS.items():
        (tmp_path / f"{each}.py").write_text(f"import matplotlib.pyplot as plt\n{script}\n")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", str(tmp_path), str(tmp_path / "html")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert said.count("Exception occurred in plotting") == len(FAULTS)
    assert [each for each in SCRIPTS if f"{each}.py" in said] == list(FAULTS)
    assert all(fault in said for fault in FAULTS.values())


def test_every_figure_is_shown_once_with_alt_text_and_caption():
    shown = [(page.parent / path, page) for page in PAGES for path in PLOT.findall(page.read_text())]
    assert sorted(path for path, _ in shown) == FIGURES
    for path, page in shown:
        directive = page.read_text().partition(f".. plot:: figures/{path.name}\n")[2].partition("```")[0]
        assert re.match(r"   :alt: \S.{20,}\n(   :class: .*\n)?\n   \S", directive), (
            f"{name(page)}: {path.name} lacks alt text or caption"
        )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_have_a_target(page, load):
    gallery, applications = load("gallery"), load("applications")
    written = ["index", *gallery.SHORT_FORMS, *applications.kept_names()]  # pages that `make docs` writes
    written = {(gallery.PAGES / f"{each}.md").resolve() for each in written}
    prose = FENCED.sub("", page.read_text())
    targets = [first or second for first, second in LINK.findall(prose)]
    relative = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    paths = {target: (page.parent / target).resolve() for target in relative if target}
    assert not [target for target, path in paths.items() if path not in written and not path.exists()]


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


@pytest.fixture
def load(monkeypatch):
    """Return a function that imports a module of the folder ``docs``."""
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module


def described(load, folder: str) -> tuple[dict[str, str], list[str], list[str]]:
    """Return the pages of a folder with their markers replaced, and the modules and names that they describe."""
    pages = {page.stem: load("reference").expand(page.read_text()) for page in sorted((DOCS / folder).glob("*.md"))}
    lines = [line.split() for page in pages.values() for line in page.splitlines() if line.startswith(".. auto")]
    modules = [name for _, directive, name in lines if directive == "automodule::"]
    return pages, modules, [name for _, directive, name in lines if directive != "automodule::"]


def test_the_reference_describes_each_public_name_once_as_a_user_types_it(load):
    pages, _, names = described(load, "api")
    reference = load("reference")
    assert sorted(names) == sorted({reference.typed(place) for place in reference.public_paths()})
    assert {"pyro_vae.VAE", "pyro_vae.fit", "pyro_vae.exact.log_evidence", "pyro_vae.priors.Normal"} <= set(names)
    assert not [name for name in names if "._" in name]
    contents = (DOCS / "api.md").read_text()
    assert not [page for page in pages if f"api/{page}" not in contents], "a page is not in the table of contents"


def test_the_table_of_a_chapter_has_each_of_its_names_with_a_sentence(load):
    pages, _, names = described(load, "api")
    rows = [found for page in pages.values() for found in re.findall(r"py:obj}`\S+ <(\S+)>`\n  - (.*)", page)]
    assert sorted(path for path, _ in rows) == sorted(names)
    assert not [row for row in rows if len(row[1]) < 5]


def test_the_pages_for_developers_describe_all_other_names_and_every_module(load):
    public, internal = described(load, "api"), described(load, "developers")
    assert not set(public[2]) & set(internal[2])
    assert len(internal[2]) == len(set(internal[2])) > 100
    reference = load("reference")
    with_names = {name for name in reference.modules_below("pyro_vae")[1:] if reference.names_of(name)}
    assert with_names <= {*public[1], *internal[1]}
    contents = (DOCS / "developers" / "index.md").read_text()
    assert not [page for page in internal[0] if page != "index" and f"\n{page}\n" not in contents]


def test_a_reference_by_place_or_bare_name_finds_the_public_name(load):
    candidates = load("reference").candidates
    assert "pyro_vae.guides.DiagonalNormal" in candidates("pyro_vae.parts.guides.DiagonalNormal", None)
    assert "pyro_vae.VAE.save" in candidates("pyro_vae.vae.VAE.save", None)
    assert "pyro_vae.log_evidence" in candidates("log_evidence", "pyro_vae.evidence")
    assert "pyro_vae.exact.log_evidence" in candidates("log_evidence", "pyro_vae.exact")


def test_the_times_on_the_pages_are_those_of_the_run_that_is_kept(load):
    benchmarks = load("benchmarks")
    run, shown = json.loads(benchmarks.RUN.read_text()), set()
    for page in benchmarks.PAGES:
        text = page.read_text()
        assert benchmarks.fill(text, run) == text, f"{name(page)}: python docs/benchmarks.py results.json"
        shown |= {found[2] for found in benchmarks.FRAGMENT.finditer(text)}
    assert shown == set(benchmarks.FRAGMENTS)


def test_a_run_that_lacks_what_the_pages_show_is_refused(load):
    with pytest.raises(ValueError, match="must have the cases mixture, mnist-128, and lacks mnist-128"):
        load("benchmarks").kept({"cases": {"mixture": {}}, "growth": {}})


def measured(seconds):
    """The result of a contestant in a file of `make bench`."""
    turns = [{"seconds": seconds, "work": 1, "peak": 300.0}]
    spread = {"lower": 0.9 * seconds, "upper": 1.1 * seconds, "start": 4.0}
    memory = {"peak": 300.0, "begun_with": {"peak": 250.0}, "turns": turns}
    return {"title": "a", "time": seconds, "losses": {"elbo": [1.0]}} | spread | memory


def test_a_new_run_is_written_into_the_pages_and_its_figures_are_drawn(load, monkeypatch, tmp_path):
    benchmarks = load("benchmarks")
    case = {"case": {"title": "A case"}, "unit": "step", "contestants": {"captured": measured(1e-3)}}
    case["contestants"]["eager"] = measured(3e-3)
    points = [{"value": value, "contestants": {"captured": measured(value * 1e-5)}} for value in (10, 100)]
    growth = {"batch": {"title": "Growth", "grows": "batch_size", "each": "step", "points": points}, "epochs": case}
    machine = {"threads": 1, "processor": "one", "processors": 4, "packages": dict.fromkeys(("torch", "pyro-ppl"), "9")}
    machine["packages"]["numpyro"] = "8"
    results = {"machine": machine, "settings": {"rounds": 3, "clock": "processor"}, "growth": growth}
    (tmp_path / "results.json").write_text(json.dumps(results | {"cases": dict.fromkeys(benchmarks.NEEDED, case)}))
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- benchmarks: {name} -->\nold\n<!-- end -->\n" for name in benchmarks.FRAGMENTS))
    for attribute, value in {"RUN": tmp_path / "run.json", "PAGES": [page], "PICTURES": tmp_path / "pictures"}.items():
        monkeypatch.setattr(benchmarks, attribute, value)
    monkeypatch.setattr(sys, "argv", ["benchmarks.py", str(tmp_path / "results.json")])
    benchmarks.main()
    text = page.read_text()
    assert "old" not in text
    assert "Medians of processor time of 3 rounds" in text
    assert "| A case | 1 ms | 3 ms |" in text
    assert "| A case | 4.0 s | 2,000 |" in text
    kept = benchmarks.RUN.read_text()
    assert '"grown": 50.0' in kept
    assert "turns" not in kept
    assert "losses" not in kept
    benchmarks.draw()
    assert [path.stem for path in benchmarks.PICTURES.iterdir()] == re.findall(r"_build/benchmarks/(\S+)\.png", text)


def test_a_compilation_has_paid_after_the_steps_whose_savings_are_its_seconds(load):
    compiled = {"time": 1e-3, "lower": 1e-3, "upper": 1e-3, "start": 6.0}
    eager = {"time": 3e-3, "lower": 2e-3, "upper": 4e-3}
    case = {"title": "a", "unit": "step", "contestants": {"captured": compiled, "eager": eager}}
    benchmarks = load("benchmarks")
    assert benchmarks.payback({"cases": {"a": case}}).splitlines()[-1] == "| a | 6.0 s | 3,000 |"
    case["contestants"] |= {"handwritten": {"time": 2e-3, "lower": 1e-3, "upper": 2e-3}}
    assert benchmarks.ratios({"cases": {"a": case}}).splitlines()[-1] == "| a | 1.50 (1.00 – 4.00) |"
    case["contestants"]["eager"] = {"time": 1e-3, "lower": 1e-3, "upper": 1e-3}
    assert benchmarks.payback({"cases": {"a": case}}).splitlines()[-1] == "| a | 6.0 s | never |"


INVENTORIES = sorted((DOCS / "inventories").glob("*.txt"))


@pytest.mark.parametrize("path", INVENTORIES, ids=lambda path: path.stem)
def test_names_of_other_documentations_exist_and_are_read_by_sphinx(load, path, tmp_path):
    from sphinx.util.inventory import InventoryFile

    inventory = load("inventory").Inventory.read(path)
    for name, kind, _ in inventory.lines:
        value = pkgutil.resolve_name(name)
        kinds = {"class": isinstance(value, type), "function": callable(value), "module": isinstance(value, ModuleType)}
        assert kinds[kind]
    inventory.write(tmp_path / "objects.inv")
    with (tmp_path / "objects.inv").open("rb") as file:
        read = InventoryFile.load(file, inventory.address, posixpath.join)
    found = {
        (item, role.removeprefix("py:")): entry.uri for role, items in read.items() for item, entry in items.items()
    }
    assert found == {(name, kind): inventory.address + page.replace("$", name) for name, kind, page in inventory.lines}


EXAMPLE = """import math


# 1. The model.
@decorated
def model():
    return 1


def main():
    # 2. Train it,
    # and look.
    for _ in range(3):
        # 3. A step.
        train()

        report()
    save()
"""


def test_numbered_comments_of_an_example_are_its_steps(load):
    first, second, third = load("gallery").steps(EXAMPLE)
    assert first == ("The model.", "@decorated\ndef model():\n    return 1")
    assert second == ("Train it, and look.", "for _ in range(3):")
    assert third == ("A step.", "train()\n\nreport()")


def test_each_example_of_the_gallery_exists_and_each_theme_names_examples(load):
    gallery = load("gallery")
    themed = [name for names in gallery.THEMES.values() for name in names]
    assert len(themed) == len(set(themed))
    assert set(themed) <= set(gallery.SHORT_FORMS)
    kept = load("applications").kept_names()
    assert not set(kept) & set(gallery.SHORT_FORMS)
    assert not [name for name in [*gallery.SHORT_FORMS, *kept] if not gallery.Example.read(name).introduction]


def test_the_first_page_shows_the_program_that_draws_its_picture():
    page = DOCS / "index.md"
    picture = (DOCS / "figures" / "first_picture.py").read_text().split('"""')[2].strip()
    assert page.read_text().index("first_picture.py") < page.read_text().index("## ")
    assert blocks(page)[0][2].strip() == picture
    assert len(picture.split("\n\n")[1].splitlines()) <= 7


def test_formulas_need_one_file_that_is_copied_next_to_the_pages(load, tmp_path):
    mathjax = load("mathjax")
    mathjax.install(type("App", (), {"outdir": tmp_path}))
    copied = [path for path in (tmp_path / "_static").rglob("*") if path.is_file()]
    assert [path.name for path in copied] == [mathjax.COMPONENT]
    assert copied[0].stat().st_size < 3e6


def test_the_browser_finds_what_is_wrong_with_a_page(load, tmp_path):
    check = load("check_pages")
    if check.browser() is None:
        pytest.skip("needs Chromium")
    load("mathjax").install(type("App", (), {"outdir": tmp_path}))
    head = '<!doctype html><meta name="viewport" content="width=device-width"><body style="margin:0">'
    formula = r'<span class="math">\(\mathbb{E}_{q}[\log p] \ge \mathcal{L}\)</span>'
    script = f'<script src="_static/{load("mathjax").PATH}"></script>'
    pages = {
        "good": f"{formula}{script}<div style='overflow-x:auto'><div style='width:2000px'>wide</div></div>",
        "no_script": formula,
        "remote": '<img src="https://example.org/picture.png">',
        "wide": '<div class="broad" style="width:800px">wide</div>',
        "wrong": r'<span class="math">\(\frac{1}\)</span>' + script,
    }
    for name, body in pages.items():
        (tmp_path / f"{name}.html").write_text(head + body)
    found = check.faults(tmp_path)
    assert {(page, width) for page, width, _ in found} == {
        *(("no_script.html", width) for width in check.WIDTHS),
        *(("remote.html", width) for width in check.WIDTHS),
        *(("wrong.html", width) for width in check.WIDTHS),
        ("wide.html", 390),
    }
    text = {page: fault for page, _, fault in found}
    assert "1 of 1 formulas are not set" in text["no_script.html"]
    assert text["remote.html"] == "requests https://example.org/picture.png"
    assert text["wide.html"] == "800 pixels wide in a window of 390: div.broad"


def test_the_pages_have_code():
    learn = {"maximum_likelihood", "reparameterisation", "kl", "posterior_and_prior", "losses"}
    use = {"index", "exact", "your_own", "cheat_sheet"}
    how_to = {f"how_to/{page.stem}" for page in (DOCS / "how_to").glob("*.md") if page.stem != "index"}
    assert {name(page) for page in PAGES if blocks(page)} >= {
        "README.md",
        *(f"docs/{page}.md" for page in learn | use | how_to),
    }


def test_lines_of_code_fit_a_screen():
    wide = [
        f"{name(page)}, line {start + number}"
        for page in PAGES
        for _, start, code in blocks(page)
        for number, line in enumerate(code.splitlines())
        if len(line) > 120
    ]
    assert not wide
