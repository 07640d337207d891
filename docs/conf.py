"""Sphinx: MyST pages, pictures from the scripts in `figures`, and the API from docstrings.

Nothing is fetched from the network while it builds.
"""

import pyro_vae

project = "pyro_vae"
author = "the pyro_vae authors"
release = version = pyro_vae.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "matplotlib.sphinxext.plot_directive",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings: list[str] = []

plot_formats = [("png", 120)]
plot_html_show_formats = False
plot_html_show_source_link = True

autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False  # torch's words on `forward` and the like are not ours
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
html_copy_source = False
