"""Configuration of Sphinx: MyST pages, figures from scripts, a gallery of examples, a reference from docstrings.

Neither the build nor the pages need a network: formulas are set by a MathJax that is copied next to the pages, and the
names of other libraries come from the lists in ``inventories``.
"""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "examples")]  # examples import `common`, as scripts do
sys.path.append(str(DOCS.parent / "tests" / "scaling"))  # the figure of the cost model imports it

import benchmarks
import figure_checks
import gallery
import inventory
import mathjax
import notebook_pages
import reference

import pyro_vae

project = "pyro_vae"
author = "the pyro_vae authors"
release = version = pyro_vae.__version__

extensions = [
    "myst_nb",  # includes myst_parser
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "matplotlib.sphinxext.plot_directive",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
os.environ["TQDM_DISABLE"] = "1"  # pages show results, not progress bars
short_notebooks = os.environ.get("PYRO_VAE_DOCS") == "short"  # `make docs SHORT=1`
nb_execution_mode = "force"
nb_execution_in_temp = True  # files of a notebook are no part of the repository
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars

mathjax_path = mathjax.PATH
mathjax3_config = mathjax.CONFIG

intersphinx_mapping = inventory.mapping(DOCS / "_build" / "inventories")
viewcode_line_numbers = True

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True
copybutton_exclude = ".linenos, .gp, .go"
copybutton_selector = "div:not(.printed) > div.highlight pre"

plot_formats = [("png", 120)]
plot_html_show_formats = False
plot_html_show_source_link = True

autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False  # inherited docstrings, such as torch's of `forward`, describe torch
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 100
add_module_names = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"pyro_vae {release}"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False


def setup(app):
    """Check and draw figures, run the examples, generate the sections of the reference, add MathJax to the pages."""

    figure_checks.install()

    def expand(app, name, source):
        source[0] = reference.expand(source[0])

    app.connect("builder-inited", benchmarks.draw)
    app.connect("builder-inited", gallery.generate)
    app.connect("source-read", expand)
    app.connect("env-before-read-docs", notebook_pages.spread)
    notebook_pages.setup(app)
    app.connect("source-read", notebook_pages.add_download)
    app.connect("builder-inited", notebook_pages.write_downloads)
    app.connect("autodoc-skip-member", reference.skip_fields)
    app.connect("missing-reference", reference.resolve, priority=400)
    app.connect("doctree-read", lambda app, doctree: reference.link_sources(app, doctree), priority=400)
    app.connect("html-collect-pages", lambda app: mathjax.install(app) or [])
