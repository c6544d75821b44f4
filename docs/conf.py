"""How Sphinx builds the documentation: `make docs`. Nothing is read from the network."""

import sys
from pathlib import Path

import prefork

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "prefork"
author = copyright = "the prefork authors"
release = version = prefork.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "reference_tables", "state_diagrams"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
default_role = "code"  # a word in one pair of backticks, in a docstring
nitpicky = True  # a name in a docstring that leads nowhere is a warning, too
myst_fence_as_directive = ["mermaid"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures have them
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_custom_sections = ["States", "Who owns what", "Failures"]

html_theme = "furo"
html_title = "prefork"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_copyright = False
html_copy_source = False
