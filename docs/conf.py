"""Configuration of Sphinx: MyST pages, figures from scripts, a gallery of examples, a reference from docstrings.

The build needs no network.
"""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "examples")]  # examples import `common`, as scripts do

import gallery  # noqa: E402
import notebook_pages  # noqa: E402
import reference  # noqa: E402

import pyro_vae  # noqa: E402

project = "pyro_vae"
author = "the pyro_vae authors"
release = version = pyro_vae.__version__

extensions = [
    "myst_nb",  # includes myst_parser
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "matplotlib.sphinxext.plot_directive",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
os.environ["TQDM_DISABLE"] = "1"  # pages show results, not progress bars
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars
suppress_warnings: list[str] = []

plot_formats = [("png", 120)]
plot_html_show_formats = False
plot_html_show_source_link = True

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "examples",
    "filename_pattern": ".",
    "ignore_pattern": rf"^(?!({'|'.join(gallery.SHORT_FORMS)})\.py$)",
    "within_subsection_order": "gallery.Order",
    "reset_argv": gallery.ShortForm(),
    "image_scrapers": (gallery.SavedPictures(),),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "notebook_extensions": set(),
    "show_signature": False,
    "min_reported_time": 1e9,
}

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
    """Generate the sections of the reference."""

    def expand(app, name, source):
        source[0] = reference.expand(source[0])

    app.connect("source-read", expand)
    app.connect("source-read", notebook_pages.add_download)
    app.connect("builder-inited", notebook_pages.write_downloads)
